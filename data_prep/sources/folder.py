"""Any folder of mammograms, with optional tables at its root.

labels.csv: `file` (path relative to the folder), `patient_id, study_id, laterality` (L|R)`, view, split`, and
any `label_<name>` (whole number; blank is unknown). labels.json says what the labels mean. findings.csv:
`file, category, birads, pathology, shape` (box|circle|mask)`, y0, x0, y1, x1, slice_index` in source pixels
and frame numbers. Every file is an input; what is no mammogram ends among the rejects.
"""

import csv
import json
import math
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
    """List the files below each input folder (or the input files themselves), with what the tables say.

    Raises:
      UserError: an input does not exist, holds no file, or one of its tables is wrong.
    """
    rows, labels, names = [], {}, set()
    wanted = "give a folder of DICOM, PNG, JPEG, PGM or TIFF files"
    for root in inputs:
        if not root.exists():
            raise UserError(f"input {root} does not exist; {wanted}")
        folder = root if root.is_dir() else root.parent
        prefix = f"{folder.name}/" if len(inputs) > 1 else ""
        listed = {}
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in TABLES and not any(part[0] == "." for part in name.split("/")):
                listed[name] = Row(path, prefix + name)
        if not listed:
            raise UserError(f"input {root} holds no files; {wanted}")
        if root.is_dir():
            _read_labels(folder / "labels.csv", listed)
            _read_findings(folder / "findings.csv", listed)
            labels |= _read_meanings(folder / "labels.json")
        for row in listed.values():
            if row.name in names:
                raise UserError(
                    f"two inputs hold {row.name}; give folders of different names, or their common parent"
                )
            names.add(row.name)
            rows.append(row)
    return Listing(rows, labels, TERMS)


def _table(path: Path, listed: dict[str, Row]):
    """Yield ("labels.csv line 2", Row, cells) of a CSV; nothing where there is none."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "file" not in columns:
            raise UserError(f"{path.name}: expected a column file, found {', '.join(columns)}")
        for number, cells in enumerate(reader, start=2):
            name = (cells["file"] or "").strip()
            where = f"{path.name} line {number}"
            if name not in listed:
                raise UserError(f"{where}: {name} is not in the folder.{suggest(name, listed)}")
            yield where, listed[name], {k: (v or "").strip() for k, v in cells.items() if k}


def _read_labels(path: Path, listed: dict[str, Row]) -> None:
    seen = {}
    for where, row, cells in _table(path, listed):
        for column in cells:
            if column not in _COLUMNS and not column.startswith("label_"):
                hint = suggest(column, _COLUMNS)
                raise UserError(f"labels.csv: unknown column {column} (not label_<name>).{hint}")
        if row.name in seen:
            line = seen[row.name].removeprefix("labels.csv ")
            raise UserError(f"{where}: the file is listed on {line} already; one line a file")
        seen[row.name] = where
        row.patient, row.study = cells.get("patient_id") or None, cells.get("study_id") or None
        row.view = cells.get("view", "").upper() or None
        row.laterality = _one_of(cells.get("laterality", "").upper(), ("L", "R"), f"{where}, laterality")
        row.split = _one_of(cells.get("split", "").lower(), SPLITS, f"{where}, split")
        row.labels = {c: _whole(v, f"{where}, {c}") for c, v in cells.items() if c.startswith("label_")}


def _read_findings(path: Path, listed: dict[str, Row]) -> None:
    for where, row, cells in _table(path, listed):
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
        expected = '{"label_<name>": {"classes": [...], "rule": "...", "level": "..."}}'
        raise UserError(f"labels.json: expected {expected}")
    return meanings


def _one_of(text: str, allowed: tuple[str, ...], where: str) -> str | None:
    if text and text not in allowed:
        hint = suggest(text, allowed)
        raise UserError(f"{where}: {text}, expected one of {', '.join(allowed)} or blank.{hint}")
    return text or None


def _whole(text: str, where: str, high: int = 127) -> int | None:
    value = _number(text, where)
    if value is not None and (value != int(value) or not -128 <= value <= high):
        raise UserError(f"{where}: {text}, expected a whole number from -128 to {high} or blank")
    return None if value is None else int(value)


def _number(text: str, where: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{where}: {text}, expected a number or blank")
    return value
