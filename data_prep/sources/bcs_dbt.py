"""BCS-DBT (Duke, TCIA Breast-Cancer-Screening-DBT): tomosynthesis volumes. Terms: CC BY-NC 4.0.

Layout: BCS-DBT-{file-paths,labels,boxes}-{train,validation,test}*.csv in any version (-v2, -PHASE-2, ...)
anywhere below the root. Volumes lie at `descriptive_path` or `classic_path` below the root or a manifest-*/
folder; where the name differs (1-1.dcm, a UUID) the only .dcm of that folder counts.

Rules and traps:
- The tables are joined on PatientID, StudyUID and View. Older downloads have no labels or boxes of
  validation and test: these rows stay unlabelled. Versions differ in a few volumes: lines of labels and boxes
  on volumes that file-paths does not name are skipped. Volumes of a split without file-paths are unlabelled.
- Side and view are View's (lcc, rmlo2, ...), since the headers' laterality is unreliable and some volumes are
  stored turned by 180 degrees: `upright`. Boxes are in the turned volume.
- `Slice` is 0-based, as in the official code.
- Actionable (recalled, no biopsy) says nothing on cancer. Normal counts as no cancer: a normal screening,
  without biopsy.
"""

import re
from pathlib import Path

from data_prep.plan import Listing, Row, finding
from data_prep.tables import find_table, number, one_of, only_folder, read_table, whole
from mammodino_jax.errors import UserError

TERMS = "CC BY-NC 4.0 (according to third parties; check the TCIA page of Breast-Cancer-Screening-DBT)"
CLASSES = ("Normal", "Actionable", "Benign", "Cancer")
LABELS = {
    "label_bcs": {"classes": [name.lower() for name in CLASSES], "rule": "the class of the view"},
    "label_cancer_biopsy": {
        "classes": ["no", "cancer"],
        "rule": "1: Cancer; 0: Benign (both by biopsy) or Normal (no biopsy); Actionable: unknown",
    },
    "label_lesion": {"classes": ["no", "yes"], "rule": "1: Actionable, Benign or Cancer; 0: Normal"},
}
LABELS = {name: meaning | {"level": "image"} for name, meaning in LABELS.items()}
_KEY = ("PatientID", "StudyUID", "View")
_BOX = ("Slice", "X", "Y", "Width", "Height", "Class", "AD")
_VIEW = re.compile(r"([lr])(cc|mlo)\d*")


def list_files(inputs: list[Path]) -> Listing:
    """List every volume of the file-paths tables, and unlabelled those on disk that no table names.

    Raises:
      UserError: no single folder is given, no file-paths table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "bcs_dbt")
    find_table(root, "*file-paths*.csv")
    bases = [root, *sorted(root.glob("manifest-*")), *sorted(root.glob("*/manifest-*"))]
    rows = []
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        volumes = {}
        for where, cells in _read(root, f"*file-paths*{name}*.csv", ("descriptive_path",)):
            match = _VIEW.fullmatch(cells["View"].lower())
            if not match:
                raise UserError(
                    f"{where}, View: {cells['View']}, expected lcc, lmlo, rcc or rmlo and perhaps a digit"
                )
            path = _find(bases, cells["descriptive_path"], cells.get("classic_path", ""))
            row = Row(path or root / cells["descriptive_path"], "", cells["PatientID"], cells["StudyUID"])
            row.name = row.path.relative_to(root).as_posix()
            row.laterality, row.view, row.upright = match[1].upper(), match[2].upper(), True
            row.split, row.kind = split, "dbt"
            volumes[tuple(cells[column] for column in _KEY)] = row
        for where, cells in _read(root, f"*labels*{name}*.csv", CLASSES):
            labels = _class_labels(where, cells)
            if row := volumes.get(tuple(cells[column] for column in _KEY)):
                row.labels = labels
        for where, cells in _read(root, f"*boxes*{name}*.csv", _BOX):
            box = _box(where, cells)
            if row := volumes.get(tuple(cells[column] for column in _KEY)):
                row.findings.append(box)
        rows += volumes.values()
    listed = {row.path for row in rows}
    for path in sorted(root.rglob("*.dcm")):
        if path not in listed:
            rows.append(Row(path, path.relative_to(root).as_posix(), kind="dbt"))
    return Listing(rows, LABELS, TERMS)


def _read(root: Path, pattern: str, columns: tuple[str, ...]):
    """The lines of the newest version of a table; none where it is absent."""
    # "-" sorts before ".": labels-train-v2.csv, then labels-train.csv
    found = sorted(root.rglob(pattern), key=lambda path: path.name)
    return read_table(found[0], _KEY + columns) if found else ()


def _find(bases: list[Path], *listed: str) -> Path | None:
    places = [base / path for path in listed if path for base in bases]
    for place in places:
        if place.is_file():
            return place
    for place in places:
        if len(files := sorted(place.parent.glob("*.dcm"))) == 1:
            return files[0]
    return None


def _class_labels(where: str, cells: dict) -> dict[str, int | None]:
    flags = [whole(cells[name], f"{where}, {name}", 0, 1) for name in CLASSES]
    if flags.count(1) != 1:
        raise UserError(f"{where}: expected a single 1 among {', '.join(CLASSES)}")
    index = flags.index(1)
    cancer = (0, None, 0, 1)[index]
    return {"label_bcs": index, "label_cancer_biopsy": cancer, "label_lesion": int(index > 0)}


def _box(where: str, cells: dict) -> dict:
    x, y, width, height = (number(cells[name], f"{where}, {name}") for name in ("X", "Y", "Width", "Height"))
    if None in (x, y, width, height):
        raise UserError(f"{where}: expected numbers in X, Y, Width and Height")
    pathology = one_of(cells["Class"].lower(), ("benign", "cancer"), f"{where}, Class")
    distorted = whole(cells["AD"], f"{where}, AD", 0, 1)
    category = "architectural_distortion" if distorted else "lesion"
    index = whole(cells["Slice"], f"{where}, Slice", 0, 1 << 30)
    return finding(category, None, pathology, "box", (y, x, y + height, x + width), index)
