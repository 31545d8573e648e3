"""INbreast: 410 digital mammograms of 115 patients, read by radiologists. Terms: research only.

Layout: INbreast.csv (`;` between cells), AllDICOMs/<File Name>_<hash>_MG_<L|R>_<CC|ML>_ANON.dcm (copies also
<File Name>.dcm), AllXML/<File Name>.xml (outlines); each anywhere below the root.

Rules and traps:
- `File Name` is written as a float in copies (22678622.0). Lines without it are sums at the end: skipped.
- `Patient ID` is blanked: the patient is the hash in the file's name, else Patient ID where it says anything,
  else the file's own name (its views are then not known to belong together).
- ML in the file names means MLO; the table's View is used. The head `Mass ` has a blank at its end.
- There is no biopsy result: BI-RADS only. 4a, 4b and 4c count as 4; 6 (known cancer) and 0 have no place in
  the order and stay unknown.
- Findings are the box of each outline. A file of outlines that cannot be read gives none.
"""

import plistlib
import re
from pathlib import Path

from data_prep.header import VIEWS
from data_prep.labels import BIRADS_LABELS, IMAGE, NO_YES, birads_labels
from data_prep.plan import Listing, Row, finding
from data_prep.tables import find_table, one_of, only_folder, read_table, whole
from mammodino_jax.errors import UserError

TERMS = "research only (INbreast, Moreira et al. 2012); the original site is gone: ask the authors"
LABELS = BIRADS_LABELS | {
    "label_density": IMAGE | {"classes": list("ABCD"), "rule": "ACR 1 to 4 = A to D"},
    "label_lesion": NO_YES
    | {"rule": "1: X in Mass, Micros, Distortion or Asymmetry, or an outline; 0: none"},
    "label_mass": NO_YES | {"rule": "1: X in Mass, or a mass is outlined; 0: neither"},
    "label_calcification": NO_YES
    | {"rule": "1: X in Micros, or a calcification or cluster is outlined; 0: no"},
}
_FLAGS = ("Mass", "Micros", "Distortion", "Asymmetry")
_NEEDED = ("Patient ID", "Laterality", "View", "File Name", "ACR", "Bi-Rads", *_FLAGS)
_BIRADS = ("0", "1", "2", "3", "4", "4a", "4b", "4c", "5", "6")
_NAME = re.compile(r"\d+_(?P<hash>[0-9a-f]+)_MG_(?P<side>[LR])_(?P<view>[A-Z]+)_ANON", re.IGNORECASE)


def list_files(inputs: list[Path]) -> Listing:
    """List every image of INbreast.csv, and unlabelled those on disk that it does not name.

    Raises:
      UserError: no single folder is given, the table or a column is missing, or a cell is wrong.
    """
    root = only_folder(inputs, "inbreast")
    files = {p.stem.split("_")[0]: p for p in sorted(root.rglob("*.dcm"), reverse=True) if p.name[0] != "."}
    outlines = {path.stem: path for path in root.rglob("*.xml")}
    if not any(root.rglob("INbreast.csv")) and (sheets := sorted(root.rglob("INbreast.xls*"))):
        raise UserError(f"{sheets[0]}: a spreadsheet; save it as INbreast.csv with ; between the cells")
    rows, listed = [], set()
    for where, cells in read_table(find_table(root, "INbreast.csv"), _NEEDED, delimiter=";"):
        if not cells["File Name"]:
            continue
        name = str(whole(cells["File Name"], f"{where}, File Name", 0, 10**12))
        listed.add(name)
        row = _make_row(root, files.get(name, root / "AllDICOMs" / f"{name}.dcm"), cells["Patient ID"])
        side = one_of(cells["Laterality"].upper(), ("L", "R"), f"{where}, Laterality")
        view = one_of(cells["View"].upper(), VIEWS, f"{where}, View")
        row.laterality, row.view = side or row.laterality, view or row.view
        birads = one_of(cells["Bi-Rads"].lower(), _BIRADS, f"{where}, Bi-Rads")
        row.findings = _read_outlines(outlines.get(name), birads)
        row.labels = birads_labels(int(birads[0]) if birads else None) | _lesions(where, cells, row.findings)
        density = whole(cells["ACR"], f"{where}, ACR", 1, 4)
        row.labels["label_density"] = None if density is None else density - 1
        rows.append(row)
    rows += [_make_row(root, files[name]) for name in sorted(set(files) - listed)]
    return Listing(rows, LABELS, TERMS)


def _make_row(root: Path, path: Path, patient: str = "") -> Row:
    """What the file's name tells."""
    row = Row(path, path.relative_to(root).as_posix(), kind="2d", pixel_mm=0.07)
    parts = _NAME.fullmatch(path.stem)
    blanked = not patient or patient.lower() == "removed"
    row.patient = parts["hash"] if parts else path.stem.split("_")[0] if blanked else patient
    if parts:
        row.laterality = parts["side"].upper()
        row.view = {"ML": "MLO"}.get(parts["view"].upper(), parts["view"].upper())
    return row


def _lesions(where: str, cells: dict, findings: list[dict]) -> dict[str, int]:
    flags = {name for name in _FLAGS if one_of(cells[name].upper(), ("X",), f"{where}, {name}")}
    outlined = " ".join(f["category"] or "" for f in findings)
    return {
        "label_lesion": int(bool(flags or findings)),
        "label_mass": int("Mass" in flags or "mass" in outlined),
        "label_calcification": int("Micros" in flags or "calcification" in outlined or "cluster" in outlined),
    }


def _read_outlines(path: Path | None, birads: str | None) -> list[dict]:
    """The findings of an OsiriX file (a property list): one a ROI, its box that of the ROI's points."""
    if path is None:
        return []
    findings = []
    try:
        for roi in plistlib.loads(path.read_bytes())["Images"][0]["ROIs"]:
            points = [[float(v) for v in point.strip("() ").split(",")] for point in roi["Point_px"]]
            x, y = zip(*points, strict=True)
            box = min(y), min(x), max(y) + 1, max(x) + 1  # a single calcification is one point
            findings.append(finding(roi.get("Name", "").strip().lower() or None, birads, None, "mask", box))
    except Exception:  # whatever an XML parser finds: the image and its labels count without
        return []
    return findings
