"""Vendors by the small table vendors.csv: their names, and what their headers say wrong.

Manufacturer and model are free text that a site can fill with anything. Only names of the table and models of
named vendors leave the header; `other` stands for the rest. Columns: manufacturer, model and description are
regular expressions (upper case, searched; blank: any), the first row that fits gives the name, the first that
fits and fills a cell gives the override: window_center and window_width or voi_index for `--window tag`,
invert (1: the greys are stored the other way round than PhotometricInterpretation says).
"""

import csv
import functools
import io
import re
from importlib import resources

from data_prep import tables
from mammodino_jax.errors import UserError, suggest

COLUMNS = ("manufacturer", "model", "description", "name", "window_center", "window_width", "voi_index",
           "invert", "why")  # fmt: skip


@functools.cache
def _rows(extra: str) -> list[dict]:
    """The rows of a user's table, then ours. Raises UserError for an unknown column or a bad cell."""
    rows = []
    ours = resources.files(__package__).joinpath("vendors.csv").read_text()
    for name, text in (("--vendors", extra), ("vendors.csv", ours)):
        reader = csv.DictReader(io.StringIO(text))
        for column in reader.fieldnames or []:
            if column not in COLUMNS:
                raise UserError(f"{name}: unknown column {column}.{suggest(column, COLUMNS)}")
        for line, cells in enumerate(reader, start=2):
            row, where = {c: (cells.get(c) or "").strip() for c in COLUMNS}, f"{name} line {line}"
            try:
                patterns = [re.compile(row[c]) for c in COLUMNS[:3]]
            except re.error as error:
                raise UserError(f"{where}: not a regular expression ({error})") from error
            numbers = {c: tables.number(row[c], f"{where}, {c}") for c in COLUMNS[4:7]}
            if (numbers["window_center"] is None) != (numbers["window_width"] is None):
                raise UserError(f"{where}: window_center and window_width go together")
            rows.append(numbers | {"patterns": patterns, "name": row["name"], "invert": row["invert"] == "1"})
    return rows


def check(extra: str) -> None:
    """Raise UserError where the user's table is wrong."""
    _rows(extra)


def look_up(manufacturer: str, model: str, description: str, extra: str = "") -> dict:
    """What the tables say of a device.

    Args:
      manufacturer, model, description: header texts.
      extra: text of the user's table.

    Returns:
      {"name": str | None, "model": str | None, "window": (centre, width) | None, "voi_index": int | None,
      "invert": bool}
    """
    texts = [text.upper() for text in (manufacturer, model, description)]
    fitting = [r for r in _rows(extra) if all(p.search(t) for p, t in zip(r["patterns"], texts, strict=True))]
    name = next((r["name"] for r in fitting if r["name"]), "other" if manufacturer else None)
    plain = re.sub(r"[^A-Za-z0-9 ._/-]", "", model).strip()[:64]
    window = next((r for r in fitting if r["window_width"]), None)
    return {
        "name": name, "model": plain if plain and name not in (None, "other") else None,
        "window": window and (window["window_center"], window["window_width"]),
        "voi_index": next((int(r["voi_index"]) for r in fitting if r["voi_index"] is not None), None),
        "invert": any(r["invert"] for r in fitting),
    }  # fmt: skip
