"""VinDr-Mammo 1.0.0 (PhysioNet): 5,000 exams of four views. Terms: PhysioNet credentialed, no redistribution.

Layout: breast-level_annotations.csv, finding_annotations.csv and images/<study_id>/<image_id>.dicom beside
each other, at the root or below.

Rules and traps:
- One exam a patient: the patient is `study_id`. "test" stays test, "training" is "trainval": the set has no
  validation split.
- BI-RADS and density are of a breast: 32 exams have another density left than right. One exam has L CC twice
  and no L MLO: nothing may be looked up by side and view.
- There is no biopsy result. BI-RADS 4 or 5 stands in for cancer; 5 alone is the stricter form.
- `finding_categories` is the text of a Python list. Its findings are BI-RADS 3 to 5 only: what counts as no
  lesion here may still be benign (BI-RADS 2).
"""

import ast
from pathlib import Path

from data_prep.plan import Listing, Row, finding
from data_prep.tables import find_table, number, one_of, only_folder, read_table
from mammodino_jax.errors import UserError

TERMS = "PhysioNet Credentialed Health Data License 1.5.0: no redistribution, no sharing with third parties"
BREAST = {"level": "breast"}
IMAGE = {"level": "image", "classes": ["no", "yes"]}
LABELS = {
    "label_density": BREAST | {"classes": list("ABCD"), "rule": "breast_density"},
    "label_birads": BREAST | {"classes": list("12345"), "rule": "breast_birads"},
    "label_suspicious_birads45": BREAST
    | {"classes": ["no", "yes"], "rule": "1: breast_birads 4 or 5; 0: 1 to 3; no biopsy"},
    "label_suspicious_birads5": BREAST
    | {"classes": ["no", "yes"], "rule": "1: breast_birads 5; 0: 1 to 4; no biopsy"},
    "label_lesion": IMAGE | {"rule": "1: a finding of BI-RADS 3 to 5 is marked; 0: No Finding"},
    "label_mass": IMAGE | {"rule": "1: a Mass is marked; 0: none"},
    "label_calcification": IMAGE | {"rule": "1: a Suspicious Calcification is marked; 0: none"},
}
_BIRADS = tuple(f"BI-RADS {n}" for n in range(1, 6))
_DENSITY = tuple(f"DENSITY {letter}" for letter in "ABCD")
_SPLITS = {"training": "trainval", "test": "test"}
_BOX = ("ymin", "xmin", "ymax", "xmax")
_OF_BREAST = (
    "study_id",
    "image_id",
    "laterality",
    "view_position",
    "breast_birads",
    "breast_density",
    "split",
)
_OF_FINDING = ("image_id", "finding_categories", "finding_birads", *_BOX)


def list_files(inputs: list[Path]) -> Listing:
    """List every image of the breast table, and unlabelled those on disk that it does not name.

    Raises:
      UserError: no single folder is given, a table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "vindr")
    table = find_table(root, "breast-level_annotations.csv")
    images = table.parent / "images"
    rows = {}
    for where, cells in read_table(table, _OF_BREAST):
        path = images / cells["study_id"] / f"{cells['image_id']}.dicom"
        row = Row(path, path.relative_to(root).as_posix(), cells["study_id"], cells["study_id"])
        row.laterality = one_of(cells["laterality"], ("L", "R"), f"{where}, laterality")
        row.view = one_of(cells["view_position"], ("CC", "MLO"), f"{where}, view_position")
        if cells["split"] not in _SPLITS:  # blank too: it would be drawn, perhaps away from the official test
            raise UserError(f"{where}, split: {cells['split'] or 'blank'}, expected training or test")
        row.split = _SPLITS[cells["split"]]
        row.labels = _breast_labels(where, cells)
        rows[cells["image_id"]] = row
    _read_findings(table.with_name("finding_annotations.csv"), rows)
    listed = {row.path for row in rows.values()}
    found = [p for p in sorted(images.rglob("*.dicom")) if p not in listed and p.name[0] != "."]
    more = [Row(path, path.relative_to(root).as_posix(), path.parent.name) for path in found]
    return Listing([*rows.values(), *more], LABELS, TERMS)


def _breast_labels(where: str, cells: dict) -> dict[str, int | None]:
    birads = one_of(cells["breast_birads"], _BIRADS, f"{where}, breast_birads")
    density = one_of(cells["breast_density"], _DENSITY, f"{where}, breast_density")
    order = _BIRADS.index(birads) if birads else None
    return {
        "label_density": _DENSITY.index(density) if density else None,
        "label_birads": order,
        "label_suspicious_birads45": int(order >= 3) if birads else None,
        "label_suspicious_birads5": int(order == 4) if birads else None,
    }


def _read_findings(path: Path, rows: dict[str, Row]) -> None:
    for where, cells in read_table(path, _OF_FINDING):
        row = rows.get(cells["image_id"])
        if row is None:
            raise UserError(
                f"{where}, image_id: {cells['image_id']}, expected an image of the breast-level table"
            )
        names = _categories(cells["finding_categories"], f"{where}, finding_categories")
        birads = one_of(cells["finding_birads"], _BIRADS, f"{where}, finding_birads")
        box = tuple(number(cells[name], f"{where}, {name}") for name in _BOX)
        if None in box and any(side is not None for side in box):
            raise UserError(f"{where}: expected numbers in all of {', '.join(_BOX)}, or all blank")
        box = None if None in box else box
        flags = (bool(names), "mass" in names, "suspicious_calcification" in names)
        for name, flag in zip(("lesion", "mass", "calcification"), flags, strict=True):
            row.labels[f"label_{name}"] = max(int(flag), row.labels.get(f"label_{name}", 0))
        row.findings += [finding(name, birads and birads[-1], None, "box", box) for name in names]


def _categories(text: str, where: str) -> list[str]:
    """["Skin Thickening", "No Finding"] -> [skin_thickening]."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {text or 'blank'}, expected a list such as ['Mass']")
    return [name.strip().lower().replace(" ", "_") for name in names if name != "No Finding"]
