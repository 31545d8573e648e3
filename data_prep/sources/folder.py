"""Any folder of mammograms, with optional tables at its root.

labels.csv: `file` (path relative to the folder), `patient_id, study_id, laterality` (L|R)`, view, split`, and
any `label_<name>` (whole number; blank is unknown). labels.json says what the labels mean. findings.csv:
`file, category, birads, pathology, shape` (box|circle|mask)`, y0, x0, y1, x1, slice_index` in source pixels
and frame numbers. Every file is an input; what is no mammogram ends among the rejects.
"""

import csv
import json
from pathlib import Path

from data_prep.plan import Listing, Row
from mammodino_jax.data.records import SPLITS
from mammodino_jax.errors import UserError, suggest

TABLES = ("labels.csv", "labels.json", "findings.csv")
TERMS = "as agreed with the owner of the files"
_COLUMNS = ("file", "patient_id", "study_id", "laterality", "view", "split")
_FINDING_TEXT = ("category", "birads", "pathology", "shape")
_FINDING_PLACE = ("y0", "x0", "y1", "x1")


def list_files(inputs: list[Path]) -> Listing:
    """List the files below each input folder (or the input files themselves) with what the tables say of
    them.

    Raises:
      UserError: an input does not exist, holds no file, or one of its tables is wrong.
    """
    rows, labels, names = [], {}, set()
    for root in inputs:
        if not root.exists():
            raise UserError(
                f"input {root} does not exist; give a folder of DICOM, PNG, JPEG, PGM or TIFF files"
            )
        folder = root if root.is_dir() else root.parent
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
        files = [p for p in files if p.parent != folder or p.name not in TABLES]
        if not files:
            raise UserError(
                f"input {root} holds no files; give a folder of DICOM, PNG, JPEG, PGM or TIFF files"
            )
        prefix = f"{folder.name}/" if len(inputs) > 1 else ""
        listed = {
            p.relative_to(folder).as_posix(): Row(p, prefix + p.relative_to(folder).as_posix()) for p in files
        }
        if root.is_dir():
            _read_labels(folder / "labels.csv", listed)
            _read_findings(folder / "findings.csv", listed)
            labels |= _read_meanings(folder / "labels.json")
        rows += listed.values()
        clash = names & {row.name for row in listed.values()}
        if clash:
            raise UserError(
                f"two inputs hold {sorted(clash)[0]}; give folders of different names, or their common parent"
            )
        names |= {row.name for row in listed.values()}
    return Listing(rows, labels, TERMS)


def _table(path: Path, listed: dict[str, Row]):
    """Yield (row number, Row, cells) of a CSV; nothing where there is none."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "file" not in (reader.fieldnames or []):
            raise UserError(
                f"{path.name}: expected a column file, found {', '.join(reader.fieldnames or [])}"
            )
        for number, cells in enumerate(reader, start=2):
            name = (cells["file"] or "").strip()
            if name not in listed:
                raise UserError(
                    f"{path.name} line {number}: {name} is not in the folder.{suggest(name, listed)}"
                )
            yield number, listed[name], {k: (v or "").strip() for k, v in cells.items() if k}


def _read_labels(path: Path, listed: dict[str, Row]) -> None:
    seen = {}
    for number, row, cells in _table(path, listed):
        where = f"labels.csv line {number}"
        for column in cells:
            if column not in _COLUMNS and not column.startswith("label_"):
                raise UserError(
                    f"labels.csv: unknown column {column} (not label_<name>).{suggest(column, _COLUMNS)}"
                )
        if id(row) in seen:
            raise UserError(f"{where}: the file is listed on line {seen[id(row)]} already; one line a file")
        seen[id(row)] = number
        row.patient, row.study = cells.get("patient_id") or None, cells.get("study_id") or None
        row.view = (cells.get("view") or "").upper() or None
        row.laterality = _one_of(cells.get("laterality", "").upper(), ("L", "R"), f"{where}, laterality")
        row.split = _one_of(cells.get("split", "").lower(), SPLITS, f"{where}, split")
        row.labels = {c: _whole(v, f"{where}, {c}") for c, v in cells.items() if c.startswith("label_")}


def _read_findings(path: Path, listed: dict[str, Row]) -> None:
    for number, row, cells in _table(path, listed):
        where = f"findings.csv line {number}"
        finding = {name: cells.get(name) or None for name in _FINDING_TEXT}
        finding["shape"] = _one_of(cells.get("shape", ""), ("box", "circle", "mask"), f"{where}, shape")
        for name in _FINDING_PLACE:
            finding[name] = _number(cells.get(name, ""), f"{where}, {name}")
        finding["slice_index"] = _whole(cells.get("slice_index", ""), f"{where}, slice_index", high=1 << 30)
        row.findings.append(finding)


def _read_meanings(path: Path) -> dict[str, dict]:
    if not path.is_file():
        return {}
    try:
        meanings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"labels.json: not valid JSON ({error})") from error
    if not isinstance(meanings, dict) or not all(isinstance(v, dict) for v in meanings.values()):
        raise UserError(
            'labels.json: expected {"label_<name>": {"classes": [...], "rule": "...", "level": "..."}}'
        )
    return meanings


def _one_of(text: str, allowed: tuple[str, ...], where: str) -> str | None:
    if text and text not in allowed:
        raise UserError(
            f"{where}: {text}, expected one of {', '.join(allowed)} or blank.{suggest(text, allowed)}"
        )
    return text or None


def _whole(text: str, where: str, high: int = 127) -> int | None:
    value = _number(text, where)
    if value is None:
        return None
    if value != int(value) or not -128 <= value <= high:
        raise UserError(f"{where}: {text}, expected a whole number from -128 to {high} or blank")
    return int(value)


def _number(text: str, where: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = float("nan")
    if value is not None and not abs(value) < float("inf"):
        raise UserError(f"{where}: {text}, expected a number or blank")
    return value
