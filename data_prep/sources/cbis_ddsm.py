"""CBIS-DDSM (TCIA): digitised films with biopsy results. Terms: CC BY 3.0.

Layout: {mass,calc}_case_description_{train,test}_set.csv anywhere below the root, and case folders
`Mass-Training_P_00001_LEFT_CC/<StudyUID>/<SeriesUID>/000000.dcm`, at any depth (CBIS-DDSM/, manifest-*/).
Newer downloads name what is inside otherwise (1-1.dcm): then the only .dcm of the case folder counts.
Folders with a number at the end (`..._CC_1`) hold the ROI mask and the cropped image of an abnormality.

Rules and traps:
- The tables have a line an abnormality, and a film with masses and calcifications is in both and on disk
  twice: one Row a film (patient, side, view), its labels the maximum over its abnormalities.
- A film of one table only says nothing of the other kind: label_mass and label_calcification are 1 or
  unknown.
- The splits of masses and calcifications were made apart: a patient who has a film in either test set is test
  with all films. The others are "trainval".
- The calc tables write `breast density`, the mass tables `breast_density`. Density 0 is unknown. Assessment 0
  (incomplete) leaves the film's BI-RADS unknown: what it would have become may be the maximum.
- Mask and cropped image are swapped in places, and some masks have another size than their film. A mask
  counts where its size is the film's; else, or where it cannot be read, the finding has no box.
- PatientID in the headers is the case folder's name; the tables' patient is used.
"""

import re
from pathlib import Path

import numpy as np
import pydicom

from data_prep.labels import BIRADS_LABELS, IMAGE, NO_YES, birads_labels
from data_prep.plan import Listing, Row, finding
from data_prep.read import rejecting
from data_prep.reject import Reject
from data_prep.tables import find_table, one_of, only_folder, read_table, whole
from mammodino_jax.errors import UserError

TERMS = "CC BY 3.0 (TCIA); cite the data set and Lee et al. 2017"
LABELS = BIRADS_LABELS | {
    "label_density": IMAGE | {"classes": list("ABCD"), "rule": "breast density 1 to 4 = A to D; 0: unknown"},
    "label_cancer_biopsy": IMAGE
    | {
        "classes": ["benign", "malignant"],
        "rule": "1: an abnormality is MALIGNANT; 0: all are BENIGN or BENIGN_WITHOUT_CALLBACK",
    },
    "label_lesion": NO_YES | {"rule": "1: in a table, as all films of the set should be"},
    "label_mass": NO_YES | {"rule": "1: in a mass table; else unknown"},
    "label_calcification": NO_YES | {"rule": "1: in a calc table; else unknown"},
}
_CASE = re.compile(r"(?:Mass|Calc)-(Training|Test)_(P_\d+)_(LEFT|RIGHT)_(CC|MLO)")
_FILLED = ("patient_id", "left or right breast", "image view", "abnormality type", "assessment", "pathology",
           "image file path")  # fmt: skip
_ROI = ("ROI mask file path", "cropped image file path")
_PATHOLOGIES = ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")


def list_files(inputs: list[Path]) -> Listing:
    """List every film of the four tables, and unlabelled those on disk that no table names.

    Raises:
      UserError: no single folder is given, a table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "cbis_ddsm")
    folders = {path.name: path for path in sorted(root.rglob("*_P_*")) if path.is_dir()}
    on_disk = [match for name in folders if (match := _CASE.fullmatch(name))]
    tested = {match[2] for match in on_disk if match[1] == "Test"}
    films = {}  # (patient, side, view) -> lines of the tables
    for name in ("mass_case_description_train_set.csv", "calc_case_description_train_set.csv",
                 "mass_case_description_test_set.csv", "calc_case_description_test_set.csv"):  # fmt: skip
        for where, cells in read_table(find_table(root, name), _FILLED + _ROI):
            case = _read_line(where, cells)
            films.setdefault(case["film"], []).append(case)
            if "test" in name:
                tested.add(case["film"][0])
    paths = {}
    for film, cases in films.items():
        found = [path for case in cases if (path := _find(folders, case["path"]))]
        paths[film] = found[0] if found else root / cases[0]["path"]
    for match in on_disk:
        film = match[2], match[3][0], match[4]
        if film not in paths and (path := _find(folders, match[0])):
            paths[film] = path
    rows = []
    for (patient, side, view), path in paths.items():
        row = Row(path, path.relative_to(root).as_posix(), patient, laterality=side, view=view, kind="film")
        row.split = "test" if patient in tested else "trainval"
        if cases := films.get((patient, side, view)):
            size = _size(path)
            row.labels, row.findings = _merge(cases), [_finding(folders, case, size) for case in cases]
        rows.append(row)
    return Listing(rows, LABELS, TERMS)


def _read_line(where: str, cells: dict) -> dict:
    density = cells.get("breast_density", cells.get("breast density"))
    if density is None:
        raise UserError(f"{where.split(' line ')[0]}: expected a column breast_density or breast density")
    if blank := [column for column in _FILLED if not cells[column]]:
        raise UserError(f"{where}, {blank[0]}: blank, expected a value")
    side = one_of(cells["left or right breast"], ("LEFT", "RIGHT"), f"{where}, left or right breast")
    view = one_of(cells["image view"], ("CC", "MLO"), f"{where}, image view")
    return {
        "film": (cells["patient_id"], side[0], view),
        "density": whole(density, f"{where}, breast density", 0, 4),
        "kind": one_of(cells["abnormality type"], ("mass", "calcification"), f"{where}, abnormality type"),
        "birads": whole(cells["assessment"], f"{where}, assessment", 0, 6),
        "pathology": one_of(cells["pathology"], _PATHOLOGIES, f"{where}, pathology"),
        "path": cells["image file path"],
        "roi": {cells[column].partition("/")[0] for column in _ROI},
    }


def _merge(cases: list[dict]) -> dict[str, int | None]:
    """Labels of a film from its abnormalities."""
    birads, kinds = {case["birads"] for case in cases}, {case["kind"] for case in cases}
    density = max(case["density"] or 0 for case in cases)
    return birads_labels(0 if 0 in birads else max(birads)) | {
        "label_density": density - 1 if density else None,
        "label_cancer_biopsy": int(any(case["pathology"] == "MALIGNANT" for case in cases)),
        "label_lesion": 1,
        "label_mass": 1 if "mass" in kinds else None,
        "label_calcification": 1 if "calcification" in kinds else None,
    }


def _find(folders: dict[str, Path], listed: str) -> Path | None:
    """The file of a table's path, or the only .dcm below its case folder."""
    name, _, rest = listed.partition("/")
    if name not in folders:
        return None
    if rest and (folders[name] / rest).is_file():
        return folders[name] / rest
    files = sorted(folders[name].rglob("*.dcm"))
    return files[0] if len(files) == 1 else None


def _finding(folders: dict[str, Path], case: dict, size: tuple[int, int] | None) -> dict:
    """A finding of one abnormality; `size` is its film's."""
    files = [
        path for name in sorted(case["roi"] & set(folders)) for path in sorted(folders[name].rglob("*.dcm"))
    ]
    masks = (_mask_box(path) for path in files if size and _size(path) == size)
    return finding(case["kind"], str(case["birads"]), case["pathology"].lower(), "mask", next(masks, None))


def _size(path: Path) -> tuple[int, int] | None:
    """(rows, columns) by the header; None where it cannot be read."""
    try:
        with rejecting("truncated"):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    except Reject:  # the build says what is wrong with a film
        return None
    return header.get("Rows"), header.get("Columns")


def _mask_box(path: Path) -> tuple[int, int, int, int] | None:
    try:
        with rejecting("truncated"):
            mask = pydicom.dcmread(path).pixel_array != 0
    except Reject:  # the labels count without the place
        return None
    y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (y[0], x[0], y[-1] + 1, x[-1] + 1) if len(y) else None
