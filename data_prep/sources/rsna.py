"""RSNA Screening Mammography (Kaggle 2022): two sites. Terms: the competition's rules, non-commercial.

Layout: train.csv, train_images/<patient_id>/<image_id>.dcm, and where present test.csv and test_images/; at
the root or below. The files of test.csv have no outcomes. There are no official splits.

Rules and traps:
- Density exists only at site 1, and at site 2 the only BIRADS is 0: over both sites a probe would score by
  telling the sites apart. Labels of density and BIRADS (recall too) are given for site 1 only, whatever the
  cells of site 2 say. The site is kept as "site 1", the machine as the model "machine 49".
- BIRADS 0 is a recall, not a category below 1. Kaggle writes 1: negative, 2: normal; there is no 3 to 5.
- `cancer` is of a breast: the other breast of a patient with cancer is 0. Most zeros were never biopsied.
- A breast is patient_id and laterality, as in the competition: the study is the patient, whatever the header
  says.
- Many files are JPEG 2000. Views other than CC and MLO (AT, LM, ML, LMO) are kept.
"""

from pathlib import Path

from data_prep.header import VIEWS
from data_prep.plan import Listing, Row
from data_prep.tables import find_table, one_of, only_folder, read_table, whole

TERMS = "Kaggle competition rules (RSNA Breast Cancer Detection, 2022): non-commercial use only"
BREAST = {"level": "breast"}
NO_YES = BREAST | {"classes": ["no", "yes"]}
SITE_1 = "; site 1 only, since site 2 has no other value than BIRADS 0 and no density"
LABELS = {
    "label_density": BREAST | {"classes": list("ABCD"), "rule": f"density{SITE_1}"},
    "label_birads": BREAST | {"classes": ["1", "2"], "rule": f"BIRADS 1 or 2; 0 (recall): unknown{SITE_1}"},
    "label_recall": NO_YES | {"rule": f"1: BIRADS 0; 0: BIRADS 1 or 2; blank: unknown{SITE_1}"},
    "label_cancer_biopsy": NO_YES
    | {"rule": "cancer: 1 confirmed by biopsy; 0: all others, by biopsy or by a negative screening alone"},
    "label_invasive": NO_YES | {"rule": "invasive, of breasts with cancer only"},
    "label_difficult_negative": NO_YES | {"rule": "difficult_negative_case"},
}
_OF_IMAGE = ("site_id", "patient_id", "image_id", "laterality", "view", "implant", "machine_id")
_OUTCOMES = ("cancer", "invasive", "BIRADS", "density", "difficult_negative_case")


def list_files(inputs: list[Path]) -> Listing:
    """List every image of train.csv and test.csv, and unlabelled those on disk that neither names.

    Raises:
      UserError: no single folder is given, train.csv or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "rsna")
    base = root if (root / "train.csv").is_file() else find_table(root, "train.csv").parent
    rows = []
    for where, cells in read_table(base / "train.csv", _OF_IMAGE + _OUTCOMES):
        rows.append(_make_row(root, base / "train_images", where, cells))
        rows[-1].labels = _labels(where, cells)
    if (base / "test.csv").is_file():
        for where, cells in read_table(base / "test.csv", _OF_IMAGE):
            rows.append(_make_row(root, base / "test_images", where, cells))
    listed = {row.path for row in rows}
    for path in sorted(base.glob("t*_images/*/*.dcm")):
        if path not in listed and path.name[0] != ".":
            rows.append(Row(path, path.relative_to(root).as_posix(), path.parent.name))
    return Listing(rows, LABELS, TERMS)


def _make_row(root: Path, folder: Path, where: str, cells: dict) -> Row:
    path = folder / cells["patient_id"] / f"{cells['image_id']}.dcm"
    row = Row(path, path.relative_to(root).as_posix(), cells["patient_id"], cells["patient_id"])
    row.laterality = one_of(cells["laterality"], ("L", "R"), f"{where}, laterality")
    row.view = one_of(cells["view"], VIEWS, f"{where}, view")
    site = one_of(cells["site_id"], ("1", "2"), f"{where}, site_id")
    row.site = site and f"site {site}"
    row.model = f"machine {cells['machine_id']}" if cells["machine_id"] else None
    implant = whole(cells["implant"], f"{where}, implant", 0, 1)
    row.implant = None if implant is None else bool(implant)
    return row


def _labels(where: str, cells: dict) -> dict[str, int | None]:
    cancer, invasive = (whole(cells[name], f"{where}, {name}", 0, 1) for name in ("cancer", "invasive"))
    birads = whole(cells["BIRADS"], f"{where}, BIRADS", 0, 2)
    density = one_of(cells["density"], tuple("ABCD"), f"{where}, density")
    name = "difficult_negative_case"
    difficult = one_of(cells[name].lower(), ("0", "1", "false", "true"), f"{where}, {name}")
    if cells["site_id"] != "1":
        birads = density = None
    return {
        "label_density": "ABCD".index(density) if density else None,
        "label_birads": birads - 1 if birads else None,
        "label_recall": None if birads is None else int(birads == 0),
        "label_cancer_biopsy": cancer,
        "label_invasive": invasive if cancer else None,
        "label_difficult_negative": int(difficult in ("1", "true")) if difficult else None,
    }
