"""Any folder of mammograms, with optional tables at its root.

labels.csv: `file` (path relative to the folder), `patient_id, study_id, laterality` (L|R)`, view, split,
kind` (2d|synthetic2d|dbt|film)`, site, manufacturer, model, implant` (0|1|true|false)`, pixel_mm` (of the
file's pixels), and any `label_<name>` (whole number; blank: unknown). labels.json says what the labels mean.
findings.csv: `file, category, birads, pathology, shape` (box|circle|mask)`, y0, x0, y1, x1, slice_index` in
source pixels and frame numbers. Every file is an input; what is no mammogram ends among the rejects.

A table with other column names is read through a mapping {our column: their column}; its columns that are
neither ours nor mapped are then left out, without one they are an error.
"""

import json
import re
from pathlib import Path

from data_prep import vendors
from data_prep.header import VIEWS
from data_prep.plan import Listing, Row, finding
from data_prep.tables import number, one_of, read_table, walk, whole
from mammodino_jax.data.records import KINDS, SPLITS
from mammodino_jax.errors import UserError, suggest

TABLES = ("labels.csv", "labels.json", "findings.csv")
TERMS = "as agreed with the owner of the files"
_COLUMNS = ("file", "patient_id", "study_id", "laterality", "view", "split", "kind", "site", "manufacturer",
            "model", "implant", "pixel_mm")  # fmt: skip
_FINDING = ("file", "category", "birads", "pathology", "shape", "y0", "x0", "y1", "x1", "slice_index")


def list_files(inputs: list[Path], columns: dict[str, str] | None = None) -> Listing:
    """List the files below each input folder (or the input files themselves), with what the tables say.

    Args:
      inputs: folders or files.
      columns: {our column: the name it has in labels.csv}.

    Raises:
      UserError: an input does not exist, holds no file, or one of its tables or `columns` is wrong.
    """
    for column in columns or {}:
        if not _is_ours(column):
            hint = suggest(column, _COLUMNS)
            raise UserError(f"column mapping: unknown column {column} (not label_<name>).{hint}")
    rows, labels, names = [], {}, set()
    wanted = "give a folder of DICOM, PNG, JPEG, PGM or TIFF files"
    for root in inputs:
        if not root.exists():
            raise UserError(f"input {root} does not exist; {wanted}")
        folder = root if root.is_dir() else root.parent
        prefix = f"{folder.name}/" if len(inputs) > 1 else ""
        listed = {}
        for path in walk(root) if root.is_dir() else [root]:
            name = path.relative_to(folder).as_posix()
            if name not in TABLES:
                listed[name] = Row(path, prefix + name)
        if not listed:
            raise UserError(f"input {root} holds no files; {wanted}")
        if columns and not (root.is_dir() and (root / "labels.csv").is_file()):
            raise UserError(f"--columns maps the columns of labels.csv, which {root} does not have")
        if root.is_dir():
            _read_labels(folder / "labels.csv", listed, columns)
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


def _is_ours(column: str) -> bool:
    return column in _COLUMNS or re.fullmatch(r"label_[a-z0-9_]{1,40}", column) is not None


def _find(where: str, name: str, listed: dict[str, Row]) -> Row:
    """The listed file of a `file` cell; tables made on Windows have backslashes."""
    row = listed.get(name) or listed.get(name.replace("\\", "/"))
    if row is None:
        raise UserError(f"{where}: {name} is not in the folder.{suggest(name, listed)}")
    return row


def _read_labels(path: Path, listed: dict[str, Row], columns: dict[str, str] | None) -> None:
    if not path.is_file():
        return
    renamed = {"file": "file"} | (columns or {})
    seen = {}
    for where, theirs in read_table(path, tuple(renamed.values())):
        cells = {k: v for k, v in theirs.items() if _is_ours(k) or not columns}
        cells |= {ours: theirs[name] for ours, name in renamed.items()}
        for column in cells:
            if not _is_ours(column):
                hint = suggest(column, _COLUMNS)
                raise UserError(
                    f"labels.csv: unknown column {column} (not label_<name>).{hint} --columns names ours and "
                    "leaves the others out"
                )
        row = _find(where, cells["file"], listed)
        if row.name in seen:
            line = seen[row.name].removeprefix("labels.csv ")
            raise UserError(f"{where}: the file is listed on {line} already; one line a file")
        seen[row.name] = where
        _fill(row, where, cells)


def _fill(row: Row, where: str, cells: dict[str, str]) -> None:
    row.patient, row.study = cells.get("patient_id") or None, cells.get("study_id") or None
    row.view = one_of(cells.get("view", "").upper(), VIEWS, f"{where}, view")
    row.laterality = one_of(cells.get("laterality", "").upper(), ("L", "R"), f"{where}, laterality")
    row.split = one_of(cells.get("split", "").lower(), SPLITS, f"{where}, split")
    row.kind = one_of(cells.get("kind", "").lower(), KINDS, f"{where}, kind")
    row.site = _word(cells.get("site", ""), f"{where}, site", r"[\w.-]+( \d+)?")
    vendor = vendors.look_up(cells.get("manufacturer", ""), cells.get("model", ""), "")
    row.manufacturer, row.model = vendor["name"], vendor["model"]
    implant = one_of(cells.get("implant", "").lower(), ("0", "1", "false", "true"), f"{where}, implant")
    row.implant = implant in ("1", "true") if implant else None
    row.pixel_mm = number(cells.get("pixel_mm", ""), f"{where}, pixel_mm")
    if row.pixel_mm is not None and row.pixel_mm <= 0:
        raise UserError(f"{where}, pixel_mm: {cells['pixel_mm']}, expected a length above 0 or blank")
    row.labels = {c: whole(v, f"{where}, {c}") for c, v in cells.items() if c.startswith("label_")}


def _read_findings(path: Path, listed: dict[str, Row]) -> None:
    for where, cells in read_table(path, ("file",)) if path.is_file() else ():
        row = _find(where, cells["file"], listed)
        for column in cells:
            if column not in _FINDING:
                raise UserError(f"findings.csv: unknown column {column}.{suggest(column, _FINDING)}")
        what = {k: _word(cells.get(k, ""), f"{where}, {k}") for k in ("category", "birads", "pathology")}
        shape = one_of(cells.get("shape", ""), ("box", "circle", "mask"), f"{where}, shape")
        place = {k: number(cells.get(k, ""), f"{where}, {k}") for k in ("y0", "x0", "y1", "x1")}
        index = whole(cells.get("slice_index", ""), f"{where}, slice_index", low=0, high=1 << 30)
        known = [v for v in place.values() if v is not None]
        if len(known) not in (0, 4) or (known and (known[2] <= known[0] or known[3] <= known[1])):
            raise UserError(f"{where}: expected y0 < y1 and x0 < x1, or no place at all")
        row.findings.append(finding(**what) | {"shape": shape} | place | {"slice_index": index})


def _word(text: str, where: str, pattern: str = r"[A-Za-z][A-Za-z _/-]*|\d[abc]?") -> str | None:
    """A short term; tables may hold what must not be published, such as remarks with names and dates."""
    if text and (len(text) > 40 or not re.fullmatch(pattern, text)):
        raise UserError(f"{where}: expected a short term of letters, not free text: it would be published")
    return text or None


def _read_meanings(path: Path) -> dict[str, dict]:
    if not path.is_file():
        return {}
    try:
        meanings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"labels.json: not valid JSON ({error})") from error
    shaped = isinstance(meanings, dict) and all(
        isinstance(v, dict) and isinstance(v.get("classes", []), list | type(None)) for v in meanings.values()
    )
    if not shaped:
        expected = '{"label_<name>": {"classes": [...], "rule": "...", "level": "..."}}'
        raise UserError(f"labels.json: expected {expected}")
    return meanings
