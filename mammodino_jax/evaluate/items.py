"""What is evaluated: the records of built data sets, and the items that they make up.

r records, n items. An item is an image (a tomosynthesis volume counts as one), a breast or an exam.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mammodino_jax.data import records
from mammodino_jax.data.index import Shards, open_split
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.errors import UserError

LEVELS = ("image", "breast", "exam")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The records in use: no duplicates, none with a flag that training leaves out.

    Attributes:
      folders: the built data sets.
      source, place: i64 [r], the record's folder, and its row in the index of that.
      columns: every other column of the index, [r]: text as objects (None: unknown), numbers as f64 (NaN).
      labels: {name without label_: i64 [r], -1 where unknown}.
      class_names, levels: {name without label_: names of its values; "image", "breast" or "exam"}, as far as
        labels.json of a folder has them.
      left_out: how many records are duplicates or flagged.
    """

    folders: tuple[Path, ...]
    source: np.ndarray
    place: np.ndarray
    columns: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    class_names: dict[str, list[str]]
    levels: dict[str, str]
    left_out: int

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def _opened(self) -> list[dict[int, tuple[Shards, int]]]:
        """For each folder {row of its index: (shards, record)}."""
        opened = []
        for number, folder in enumerate(self.folders):
            found = {}
            for split in sorted(set(self.columns["split"][self.source == number])):
                shards, table = open_split(folder, split, ["image_id"])
                found |= {row: (shards, record) for record, row in enumerate(table["row"].to_pylist())}
            opened.append(found)
        return opened

    def image(self, i: int) -> np.ndarray:
        """The image u8 [H, W] of a record."""
        shards, record = self._opened[self.source[i]][int(self.place[i])]
        return shards.read(record)

    def take(self, chosen: np.ndarray) -> "Rows":
        """The records at `chosen` places, in that order."""
        return dataclasses.replace(
            self, source=self.source[chosen], place=self.place[chosen],
            columns={name: c[chosen] for name, c in self.columns.items()},
            labels={name: c[chosen] for name, c in self.labels.items()},
        )  # fmt: skip


def read_rows(folders: Sequence[Path], everything: bool = False) -> Rows:
    """Read the indices of built data sets; `everything`: duplicates and flagged records too.

    Raises:
      UserError: a folder is no built data set, or nothing is left to evaluate.
    """
    folders, tables, class_names, levels, left_out = tuple(map(Path, folders)), [], {}, {}, 0
    excluded = set(DataConfig().exclude_flags)
    for number, folder in enumerate(folders):
        records.read_prep(folder)
        described = folder / "labels.json"
        for name, label in json.loads(described.read_text()).items() if described.is_file() else ():
            class_names[name.removeprefix("label_")] = label.get("classes", [])
            levels[name.removeprefix("label_")] = label.get("level", "image")
        table = pq.read_table(folder / "index.parquet")
        flagged = [bool(excluded & set(flags or ())) for flags in table["flags"].to_pylist()]
        kept = table["duplicate_of"].is_null().to_numpy() & ~np.array(flagged, bool)
        kept |= everything
        left_out += len(table) - int(kept.sum())
        table = table.append_column("place", pa.array(np.arange(len(table))))
        table = table.append_column("source", pa.array(np.full(len(table), number)))
        tables.append(table.filter(pa.array(kept)))
    table = pa.concat_tables(tables, promote_options="default")
    if not len(table):
        raise UserError(
            f"nothing to evaluate in {', '.join(map(str, folders))}: all records are duplicates or flagged"
        )
    columns, labels = {}, {}
    for name in table.column_names:
        column = table[name]
        if name.startswith("label_"):
            labels[name.removeprefix("label_")] = column.fill_null(-1).to_numpy().astype(np.int64)
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            columns[name] = column.to_numpy().astype(np.float64)  # null becomes NaN
        else:
            columns[name] = _objects(column.to_pylist())  # lists stay objects
    source, place = (columns.pop(name).astype(np.int64) for name in ("source", "place"))
    return Rows(folders, source, place, columns, labels, class_names, levels, left_out)


@dataclasses.dataclass(frozen=True)
class Items:
    """Items of one level, in the order of their first records.

    Attributes:
      item: i64 [r], the item of each record; -1: of none.
      first: i64 [n], an item's first record, which its metadata come from.
      id, patient, split, kind: text [n].
    """

    rows: Rows
    item: np.ndarray
    first: np.ndarray
    id: np.ndarray

    @property
    def patient(self) -> np.ndarray:
        return self.rows.columns["patient_id"][self.first]

    @property
    def split(self) -> np.ndarray:
        return self.rows.columns["split"][self.first]

    @property
    def kind(self) -> np.ndarray:
        return self.rows.columns["kind"][self.first]

    def take(self, chosen: np.ndarray) -> "Items":
        """The items at `chosen` places, in that order; records of others are of none."""
        place = np.full(len(self.first) + 1, -1)  # the last: of no item
        place[chosen] = np.arange(len(chosen))
        return Items(self.rows, place[self.item], self.first[chosen], self.id[chosen])

    def label(self, name: str) -> np.ndarray:
        """i64 [n]: the highest known label of an item's records; -1: none is known."""
        found = np.full(len(self.first), -1, np.int64)
        inside = self.item >= 0
        np.maximum.at(found, self.item[inside], self.rows.labels[name][inside])
        return found


def _objects(values) -> np.ndarray:
    """[n] objects as they are, lists too: None keeps numpy from making more of them."""
    return np.array([*values, None], object)[:-1]


def units(rows: Rows) -> np.ndarray:
    """Text [r] that slices of one volume share, and no other records: the volume's id, or the image's."""
    volume, image = rows.columns["volume_id"], rows.columns["image_id"]
    return np.where((rows.columns["kind"] == "dbt") & (volume != None), volume, image)  # noqa: E711


def group(rows: Rows, level: str = "image", kinds: Sequence[str] = records.KINDS) -> Items:
    """The items that the records of some kinds make up.

    A breast is one side of a patient in one study; an exam is a study. Where the study is unknown it is the
    patient's only one; records of unknown side are in no breast.

    Raises:
      ValueError: an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r}; expected one of {', '.join(LEVELS)}")
    asked = np.isin(rows.columns["kind"].astype(str), list(kinds))
    if level == "image":
        key = units(rows)
    else:
        study = [
            f"{p}/{s or ''}"
            for p, s in zip(rows.columns["patient_id"], rows.columns["study_id"], strict=True)
        ]
        key = _objects(study)
        if level == "breast":
            side = rows.columns["laterality"]
            asked &= side != None  # noqa: E711
            key = _objects(f"{k}/{s}" for k, s in zip(key, side, strict=True))
    item, first = np.full(len(rows), -1, np.int64), {}
    for i in np.flatnonzero(asked):
        item[i] = first.setdefault(key[i], (len(first), i))[0]
    return Items(rows, item, np.array([i for _, i in first.values()], np.int64), _objects(first))
