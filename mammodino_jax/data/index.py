"""The records that training draws from: columns of index.parquet beside the open shards.

Columns are numpy arrays, a place each record in use (1.4 million rows as dicts would take gigabytes and be
copied to every worker process).
"""

import dataclasses
import hashlib
import resource
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mammodino_jax.data import records
from mammodino_jax.errors import UserError, suggest

_COLUMNS = (
    "image_id", "patient_id", "volume_id", "kind", "slice_index", "slice_position_mm", "slice_mm", "slab_mm",
    "pixel_mm", "duplicate_of", "flags",
)  # fmt: skip


@dataclasses.dataclass
class Shards:
    """One split of a built data set, opened in record order; pickles as paths."""

    folder: str
    split: str
    source: grain.sources.ArrayRecordDataSource

    def read(self, record: int) -> np.ndarray:
        """The image u8 [H, W] of a record. Raises UserError, naming folder and record."""
        try:
            return records.decode(self.source[record])["image"]
        except Exception as error:
            raise UserError(
                f"{self.name(record)} cannot be read ({type(error).__name__}: {error}); "
                "build the data set again"
            ) from error

    def name(self, record: int) -> str:
        return f"{self.folder}: record {record} of split {self.split}"


@dataclasses.dataclass
class Records:
    """Records in use, of all sources. [n] arrays unless said otherwise; unknown numbers are NaN."""

    shards: list[Shards]  # one a source
    weights: list[float]  # one a source: its share of a stream's draws, relative to the others'
    full: list[bool]  # one a source: its records are full frames, not cropped to the tissue
    source: np.ndarray  # i32, place in `shards`
    record: np.ndarray  # i64, place in the split
    patient: np.ndarray  # i32, low 31 bits of sha256(patient_id)
    dbt: np.ndarray  # bool: a tomosynthesis slice
    slice_index: np.ndarray  # i32; -1: none
    position_mm: np.ndarray  # f32, of the slice in its volume
    slab_mm: np.ndarray  # f32, thickness of the tissue that a slice shows
    pixel_mm: np.ndarray  # f32
    lesion_box: np.ndarray  # f32 [F, 4]: (y0, x0, y1, x1) of findings in record pixels, by record
    lesion_end: np.ndarray  # i64: the findings of place p are rows lesion_end[p-1] (0: 0) to lesion_end[p]
    volumes: list[np.ndarray]  # a volume each: i64 places in these arrays, in slice order

    def image(self, place: int) -> np.ndarray:
        return self.shards[self.source[place]].read(int(self.record[place]))

    def name(self, place: int) -> str:
        """What messages call a record."""
        return self.shards[self.source[place]].name(int(self.record[place]))

    def lesions(self, place: int) -> np.ndarray:
        """Boxes f32 [k, 4] of a record's findings, in its pixels."""
        return self.lesion_box[self.lesion_end[place - 1] if place else 0 : self.lesion_end[place]]


def patient_number(patient_id: str) -> int:
    """Low 31 bits of sha256: what batches carry instead of the id."""
    return int.from_bytes(hashlib.sha256(patient_id.encode()).digest(), "big") & 0x7FFFFFFF


def open_split(folder: str | Path, split: str, columns=None) -> tuple[Shards, pa.Table]:
    """Open the shards of a split and read its index rows, in record order.

    Returns:
      Shards, and a table of `columns` (None: all) with `row`, the row's number in index.parquet, appended.

    Raises:
      UserError: no such split, a damaged shard, or index and shards disagree.
    """
    if split not in records.SPLITS:
        known = ", ".join(records.SPLITS) + "." + suggest(split, records.SPLITS)
        raise UserError(f'unknown split "{split}" of {folder}; expected one of {known}')
    records.read_prep(folder)
    index_file = Path(folder) / "index.parquet"
    if not index_file.is_file():
        raise UserError(f"{folder} has no index.parquet; build it again with: python -m data_prep build")
    table = pq.read_table(index_file, columns=None if columns is None else [*columns, "split"])
    table = table.append_column("row", pa.array(np.arange(len(table), dtype=np.int32)))
    table = table.filter(pc.equal(table["split"], split))
    paths = records.shard_paths(folder, split)
    if not paths or not len(table):
        raise UserError(f'{folder} has no records of split "{split}"; choose another split or data set')
    source = _open_shards(folder, paths)
    if len(source) != len(table):
        raise UserError(
            f"{folder}: split {split} has {len(source)} records but {len(table)} rows in index.parquet; "
            "build it again with: python -m data_prep build"
        )
    _allow_open_files(len(paths))
    return Shards(str(folder), split, source), table


def _open_shards(folder: str | Path, paths: list[str]) -> grain.sources.ArrayRecordDataSource:
    try:
        return grain.sources.ArrayRecordDataSource(paths)
    except RuntimeError:  # it does not say which shard
        for path in paths:
            try:
                grain.sources.ArrayRecordDataSource(path)
            except RuntimeError as error:
                name, told = Path(path).name, " ".join(str(error).split())
                raise UserError(
                    f"{folder}: shard {name} is damaged ({told}); build the data set again"
                ) from error
        raise


def _allow_open_files(more: int) -> None:
    """Raise the limit of open files: every shard that was read from stays open, thousands in a large set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _kept(table: pa.Table, kinds, exclude_flags, where: str) -> np.ndarray:
    """Places of the rows to train on, i64. Raises UserError, with what each filter removed, if none are."""
    for kind in kinds:
        if kind not in records.KINDS:
            known = ", ".join(records.KINDS) + "." + suggest(kind, records.KINDS)
            raise UserError(f'unknown kind "{kind}" of {where}; expected {known}')
    flags = table["flags"].combine_chunks()
    excluded = pc.is_in(pc.list_flatten(flags), pa.array(exclude_flags, pa.string()))
    flagged = np.zeros(len(table), bool)
    flagged[pc.list_parent_indices(flags).filter(excluded).to_numpy()] = True
    wrong_kind = ~pc.is_in(table["kind"], pa.array(kinds, pa.string())).to_numpy()
    duplicate = table["duplicate_of"].is_valid().to_numpy()
    kept = np.flatnonzero(~(wrong_kind | flagged | duplicate))
    if not kept.size:
        flagged, duplicate = flagged & ~wrong_kind, duplicate & ~wrong_kind & ~flagged
        raise UserError(
            f"no records left in {where}: of {len(table)}, {wrong_kind.sum()} are of other kinds than "
            f"{', '.join(kinds)}, {flagged.sum()} have an excluded flag ({', '.join(exclude_flags)}), "
            f"{duplicate.sum()} are duplicates"
        )
    return kept


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list]:
    """A text column as i64 codes (-1: null) and the texts they stand for."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def full_frames(folder: str | Path) -> bool:
    """Whether the records of a built data set are full frames, not cropped to the tissue."""
    return records.read_prep(folder).get("settings", {}).get("box") == "full"


def open_records(sources, exclude_flags=()) -> Records:
    """Open all sources.

    Args:
      sources: [(folder, split, kinds, weight), ...]; kinds is a name or a sequence of records.KINDS.
      exclude_flags: records with one of these flags are left out, and so are duplicates.

    Raises:
      UserError: no sources; a folder that is missing or of another schema version; an unknown split or kind;
        no record left after the filters; a weight that is not positive.
    """
    if not sources:
        raise UserError("data.sources is empty; give (folder, split, kinds, weight) of a built data set")
    shards, weights, full, parts, boxes, volume_count = [], [], [], [], [], 0
    for number, (folder, split, kinds, weight) in enumerate(sources):
        if weight <= 0:
            raise UserError(f"weight {weight} of source {folder} must be positive; or leave the source out")
        opened, table = open_split(folder, split, _COLUMNS)
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        record = _kept(table, kinds, tuple(exclude_flags), f"{folder} ({split})")
        table = table.take(record)
        patient, patient_ids = _codes(table["patient_id"].fill_null(""))
        volume, volume_ids = _codes(table["volume_id"])
        dbt = pc.equal(table["kind"], "dbt").to_numpy()
        number_of = np.array([patient_number(p) for p in patient_ids], np.int32)
        spacing, slice_index = _numbers(table["slice_mm"]), table["slice_index"].fill_null(-1).to_numpy()
        position = _numbers(table["slice_position_mm"])
        box, found = _lesions(folder, table["image_id"])
        boxes.append(box)
        parts.append({
            "source": np.full(len(record), number, np.int32),
            "record": record,
            "patient": number_of[patient],
            "dbt": dbt,
            "volume": np.where(dbt & (volume >= 0) & (slice_index >= 0), volume + volume_count, -1),
            "slice_index": slice_index,
            "position_mm": np.where(np.isnan(position), slice_index * spacing, position),
            "slab_mm": _numbers(table["slab_mm"]),
            "pixel_mm": _numbers(table["pixel_mm"]),
            "found": found,
        })  # fmt: skip
        shards.append(opened)
        weights.append(float(weight))
        full.append(full_frames(folder))
        volume_count += len(volume_ids)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((columns["slice_index"], columns["volume"]))
    volume = columns.pop("volume")
    order = order[volume[order] >= 0]
    volumes = np.split(order, np.flatnonzero(np.diff(volume[order])) + 1) if order.size else []
    lesion_end = np.cumsum(columns.pop("found"))
    lesion_box = np.concatenate(boxes)
    return Records(
        shards, weights, full, **columns, lesion_box=lesion_box, lesion_end=lesion_end, volumes=volumes
    )


def _lesions(folder: str | Path, image_id: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes f32 [F, 4] of the findings of records, in their order, and how many each record has, i64.

    Findings without a box are left out, and so are those of a volume without a known slice.
    """
    names, path = ("record_y0", "record_x0", "record_y1", "record_x1"), Path(folder) / "findings.parquet"
    none = np.zeros((0, 4), np.float32), np.zeros(len(image_id), np.int64)
    if not path.is_file():
        return none
    table = pq.read_table(path, columns=["image_id", *names])
    table = table.filter(pc.is_valid(table["image_id"]))
    if not len(table):
        return none
    box = np.stack([_numbers(table[name]) for name in names], axis=1)
    place = pc.index_in(table["image_id"], image_id.combine_chunks()).fill_null(-1).to_numpy()
    used = np.flatnonzero((place >= 0) & ~np.isnan(box).any(1))
    used = used[np.argsort(place[used], kind="stable")]
    return box[used], np.bincount(place[used], minlength=len(image_id))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.float32)  # null becomes NaN
