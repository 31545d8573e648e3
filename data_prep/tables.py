"""A data set's own tables, read with the columns checked; cells become numbers or a clear error."""

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path

from mammodino_jax.errors import UserError, suggest


def only_folder(inputs: list[Path], source: str) -> Path:
    """The one input folder of a source that has a fixed layout. Raises UserError otherwise."""
    if len(inputs) != 1 or not inputs[0].is_dir():
        given = ", ".join(map(str, inputs))
        raise UserError(f"--source {source} takes one --input folder, the root of the data set; got {given}")
    return inputs[0]


def walk(root: Path) -> list[Path]:
    """All files below a folder, through links too, in the order of names, hidden ones left out. Raises
    UserError where a folder cannot be read: nothing may be missed in silence."""

    def unreadable(error: OSError):
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror})")

    found, seen = [], set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if name[0] != ".") if real not in seen else []
        found += [Path(folder, name) for name in names if name[0] != "."] if real not in seen else []
        seen.add(real)
    return sorted(path for path in found if path.is_file())


def find_table(root: Path, *patterns: str) -> Path:
    """The first file below `root` that matches one of the glob patterns. Raises UserError where none does."""
    for pattern in patterns:
        if found := sorted(root.rglob(pattern)):
            return found[0]
    raise UserError(f"{root} holds no {' or '.join(patterns)}; give the root of the unpacked data set")


def read_table(path: Path, needed: tuple[str, ...], delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    """Yield ("name.csv line 2", {column: stripped text}) for every line of a CSV with a head.

    Blanks around column names are dropped (INbreast's "Mass "). Blank lines are skipped.

    Raises:
      UserError: the file is not there, or a needed column is missing.
    """
    if not path.is_file():
        raise UserError(f"{path.name} is missing in {path.parent}")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        columns = [(name or "").strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in needed:
            if name not in columns:
                shown = ", ".join(columns) + "." + suggest(name, columns)
                raise UserError(f"{path.name}: expected a column {name}, found {shown}")
        for cells in _lines(reader, path.name):
            values = {k: (v or "").strip() for k, v in cells.items() if k}
            if any(values.values()):
                yield f"{path.name} line {reader.line_num}", values


def _lines(reader: csv.DictReader, name: str) -> Iterator[dict]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num}: {error}") from error


def number(text: str, where: str) -> float | None:
    """A cell as a finite number; blank is None. Raises UserError naming `where`."""
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{where}: {text}, expected a number or blank")
    return value


def whole(text: str, where: str, low: int = -128, high: int = 127) -> int | None:
    """A cell as a whole number (2.0 counts); blank is None. Raises UserError naming `where`."""
    value = number(text, where)
    if value is not None and (value != int(value) or not low <= value <= high):
        raise UserError(f"{where}: {text}, expected a whole number from {low} to {high} or blank")
    return None if value is None else int(value)


def one_of(text: str, allowed: tuple[str, ...], where: str) -> str | None:
    """A cell that must be one of `allowed`; blank is None. Raises UserError naming `where`."""
    if text and text not in allowed:
        hint = suggest(text, allowed)
        raise UserError(f"{where}: {text}, expected one of {', '.join(allowed)} or blank.{hint}")
    return text or None
