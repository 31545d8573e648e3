"""CMMD (TCIA, The Chinese Mammography Database): 1,775 patients with biopsies. Terms: CC BY 4.0 (check).

Layout: CMMD_clinicaldata_revision.xlsx (first sheet, a line a breast) and manifest-*/CMMD/<ID1>/<date>/
<series>/1-1.dcm; each anywhere below the root. There are no official splits.

Rules and traps:
- The patient is the folder named like D1-0001, else PatientID (copies in folders of study UIDs).
- Labels belong to a breast (ID1, LeftRight), and the side of a file is only in its header: the order of the
  files says nothing certain. A file whose header cannot be read has no labels.
- A breast without a line is unlabelled, not negative: there are no normals in the set. About 1,450 images are
  of such contralateral breasts.
- A breast on several lines gets the maximum of each label.
"""

import re
from pathlib import Path

import pydicom

from data_prep.plan import Listing, Row
from data_prep.read import rejecting
from data_prep.reject import Reject
from data_prep.tables import find_table, one_of, only_folder
from mammodino_jax.errors import UserError, suggest

TERMS = "CC BY 4.0 (according to third parties; check the TCIA page of CMMD)"
BREAST = {"level": "breast"}
NO_YES = BREAST | {"classes": ["no", "yes"]}
LABELS = {
    "label_cancer_biopsy": BREAST
    | {"classes": ["benign", "malignant"], "rule": "classification, by biopsy; no line: unknown"},
    "label_lesion": NO_YES | {"rule": "1: the breast has a line, as all biopsied breasts; no line: unknown"},
    "label_mass": NO_YES | {"rule": "1: abnormality mass or both; 0: calcification; no line: unknown"},
    "label_calcification": NO_YES
    | {"rule": "1: abnormality calcification or both; 0: mass; no line: unknown"},
}
_NEEDED = ("ID1", "LeftRight", "abnormality", "classification")
_ID = re.compile(r"D[12]-\d+")
_TAGS = ["PatientID", "ImageLaterality", "Laterality"]


def list_files(inputs: list[Path]) -> Listing:
    """List every .dcm below the root, with the labels of its breast.

    Raises:
      UserError: no single folder is given, the table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "cmmd")
    breasts = _read_breasts(find_table(root, "CMMD_clinicaldata_revision.xlsx"))
    rows = []
    for path in sorted(root.rglob("*.dcm")):
        if path.name[0] == ".":
            continue
        name = path.relative_to(root).as_posix()
        patient, side = _read_header(path)
        patient = next((part for part in name.split("/") if _ID.fullmatch(part)), patient)
        rows.append(Row(path, name, patient, labels=dict(breasts.get((patient, side), {}))))
    return Listing(rows, LABELS, TERMS)


def _read_header(path: Path) -> tuple[str | None, str]:
    """(PatientID, side) or blanks."""
    try:
        with rejecting("truncated"):
            ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        side = str(ds.get("ImageLaterality") or ds.get("Laterality") or "")
        return str(ds.get("PatientID") or "").strip() or None, side.strip().upper()
    except Reject:  # the build will say why
        return None, ""


def _read_breasts(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """{(ID1, L | R): labels}."""
    breasts = {}
    for where, cells in _read_sheet(path):
        side = one_of(cells["LeftRight"].upper(), ("L", "R"), f"{where}, LeftRight")
        if not cells["ID1"] or not side:
            raise UserError(f"{where}: expected an ID1 and L or R in LeftRight")
        kinds = ("mass", "calcification", "both")
        kind = one_of(cells["abnormality"].lower(), kinds, f"{where}, abnormality")
        found = one_of(cells["classification"].lower(), ("benign", "malignant"), f"{where}, classification")
        known = {"label_lesion": 1}
        if kind:
            known |= {"label_mass": int(kind != "calcification"), "label_calcification": int(kind != "mass")}
        if found:
            known["label_cancer_biopsy"] = int(found == "malignant")
        labels = breasts.setdefault((cells["ID1"], side), {})
        labels |= {name: max(value, labels.get(name, 0)) for name, value in known.items()}
    return breasts


def _read_sheet(path: Path):
    """What tables.read_table does, of the first sheet."""
    import openpyxl  # only this source needs it

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        lines = [["" if v is None else str(v).strip() for v in line] for line in book.worksheets[0].values]
        book.close()
    except Exception as error:  # a zip of XML: many ways to be broken
        raise UserError(f"{path.name}: not a readable Excel file ({error}); download it again") from error
    columns = lines[0] if lines else []
    for name in _NEEDED:
        if name not in columns:
            shown = ", ".join(columns) + "." + suggest(name, columns)
            raise UserError(f"{path.name}: expected a column {name}, found {shown}")
    for index, line in enumerate(lines[1:], 2):
        if any(line):
            cells = dict(zip(columns, line, strict=False))  # lines may be cut off after their last cell
            yield f"{path.name} line {index}", dict.fromkeys(columns, "") | cells
