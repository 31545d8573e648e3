"""Vendors by the small table vendors.csv: their names, and what their headers say wrong.

Manufacturer and model are free text that a site can fill with anything. Only names and products of the table
leave the header; `other` stands for the rest. Columns: manufacturer, model and description are regular
expressions (searched, in any case; blank: any), the first row that fits gives the name and the known products
(`products`: a regular expression, what it finds in the model is kept), the first that fits and fills a cell
gives the override: window_center and window_width or voi_index for `--window tag`, invert (1: the greys are
stored the other way round than PhotometricInterpretation says).
"""

import csv
import functools
import io
import re
from importlib import resources

from data_prep import tables
from mammodino_jax.errors import UserError, suggest

COLUMNS = ("manufacturer", "model", "description", "products", "name", "window_center", "window_width",
           "voi_index", "invert", "why")  # fmt: skip


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
                patterns = [re.compile(row[c], re.IGNORECASE) for c in COLUMNS[:4]]
            except re.error as error:
                raise UserError(f"{where}: not a regular expression ({error})") from error
            numbers = {c: tables.number(row[c], f"{where}, {c}") for c in ("window_center", "window_width")}
            numbers["voi_index"] = tables.whole(row["voi_index"], f"{where}, voi_index", low=0)
            if (numbers["window_center"] is None) != (numbers["window_width"] is None):
                raise UserError(f"{where}: window_center and window_width go together")
            if numbers["window_width"] is not None and numbers["window_width"] <= 0:
                raise UserError(f"{where}, window_width: {row['window_width']}, expected a number above 0")
            invert = tables.one_of(row["invert"], ("0", "1"), f"{where}, invert") == "1"
            rows.append(numbers | {"patterns": patterns, "name": row["name"], "invert": invert})
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
    texts = (manufacturer, model, description)
    fitting = [
        r for r in _rows(extra) if all(p.search(t) for p, t in zip(r["patterns"][:3], texts, strict=True))
    ]
    named = next((r for r in fitting if r["name"]), None)
    product = named and named["patterns"][3].search(model)
    window = next((r for r in fitting if r["window_width"]), None)
    return {
        "name": named["name"] if named else "other" if manufacturer else None,
        "model": (product and product[0].upper()) or None,
        "window": window and (window["window_center"], window["window_width"]),
        "voi_index": next((r["voi_index"] for r in fitting if r["voi_index"] is not None), None),
        "invert": any(r["invert"] for r in fitting),
    }
