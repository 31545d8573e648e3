"""Finished shards -> data set: index, findings, labels, metadata, and prep.json last."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.plan import Listing, Planned, Row
from mammodino_jax.data import records

_FILES = (
    "features.json",
    "dataset_info.json",
    "index.parquet",
    "findings.parquet",
    "labels.json",
    "prep.json",
)
_CORNERS = ("y0", "x0", "y1", "x1")


def local_folder(folder: Path) -> Path:
    """DIR.local, the folder beside a data set that is not for sharing."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.local")


def is_ours(name: str) -> bool:
    return name.removesuffix(".tmp") in _FILES or name.startswith(f"{records.NAME}-")


def index_rows(rows: list[dict], planned: dict[int, Planned], first: dict[str, tuple]) -> list[dict]:
    """Index rows of a shard, with labels and marked duplicates.

    Args:
      rows: the shard's rows.
      planned: by number of input.
      first: {pixel_hash: (image_id, volume_id)} of the records before these; theirs are added.
    """
    out = []
    for row in rows:
        image_id, volume_id = first.setdefault(row["pixel_hash"], (row["image_id"], row["volume_id"]))
        # Slices of one volume may be equal (blank ends); a volume stays whole.
        other = image_id != row["image_id"] and (volume_id is None or volume_id != row["volume_id"])
        same = {"duplicate_of": image_id if other else None}
        out.append(row | same | planned[row["number"]].row.labels)
    return out


def manifest(rows: list[dict], files: list[dict], listed: list[Row]) -> list[dict]:
    """A line a file of a shard: number, path, checksum, decoder, warnings, and its records."""
    lines = {}
    for facts in files:
        path = str(listed[facts["number"]].path.absolute())
        lines[facts["number"]] = facts | {"path": path, "image_ids": [], "frames": []}
    for row in rows:
        line = lines[row["number"]]
        line["image_ids"].append(row["image_id"])
        line["frames"].append(row["source_frame"])
        line["source"] = {name: row[name] for name in ("source_height", "source_width")}
    return list(lines.values())


def findings_rows(index: list[dict], planned: dict[int, Planned]) -> list[dict]:
    """Findings in source and record pixels. In a volume those of a known slice belong to its record."""
    by_file, out = {}, []
    for row in index:
        by_file.setdefault(row["number"], []).append(row)
    for number, rows in by_file.items():
        for finding in planned[number].row.findings:
            own = [r for r in rows if len(rows) == 1 or r["source_frame"] == finding["slice_index"]]
            row = (own or rows)[0]
            finding = _in_source(finding, row) if planned[number].row.upright else finding
            ids = {"image_id": row["image_id"] if own else None, "volume_id": row["volume_id"]}
            slice_index = row["slice_index"] if own else None
            out.append(finding | ids | {"slice_index": slice_index} | _record_box(finding, row))
    return out


def _in_source(finding: dict, row: dict) -> dict:
    """A finding given in the upright image, in the pixels of the file."""
    if "upside_down" not in row["flags"] or finding["y0"] is None:
        return finding
    height, width = row["source_height"], row["source_width"]
    y0, x0, y1, x1 = (finding[name] for name in _CORNERS)
    return finding | {"y0": height - y1, "x0": width - x1, "y1": height - y0, "x1": width - x0}


def _record_box(finding: dict, row: dict) -> dict:
    """Source box -> record box: cropped, scaled, mirrored. It may reach beyond the record. No box: {}."""
    if any(finding[name] is None for name in _CORNERS):
        return {}
    scale_y = row["height"] / (row["box_y1"] - row["box_y0"])
    scale_x = row["width"] / (row["box_x1"] - row["box_x0"])
    y0, y1 = ((finding[name] - row["box_y0"]) * scale_y for name in ("y0", "y1"))
    x0, x1 = ((finding[name] - row["box_x0"]) * scale_x for name in ("x0", "x1"))
    if row["flipped"]:
        x0, x1 = row["width"] - x1, row["width"] - x0
    if "upside_down" in row["flags"]:
        y0, y1 = row["height"] - y1, row["height"] - y0
    return {"record_y0": y0, "record_x0": x0, "record_y1": y1, "record_x1": x1}


def finish(output: Path, parts: dict[Path, tuple[str, int]], groups: Iterable[list[dict]],
           planned: dict[int, Planned], listing: Listing, prep: dict) -> None:  # fmt: skip
    """Put the shards in place and write everything beside them; prep.json last, so that it means complete.

    Args:
      output: the data set.
      parts: {part: (split, number of records)}.
      groups: index rows, part by part; a million of them at once would not fit.
      planned: by number of input.
      listing, prep: for labels.json and prep.json.
    """
    for old in output.iterdir():
        old.unlink()  # left by an interrupted merge; foreign files were refused before
    _write_metadata(output, _place_shards(output, parts))
    write_tables(output, groups, planned, listing, prep)


def write_tables(output: Path, groups: Iterable[list[dict]], planned: dict[int, Planned], listing: Listing,
                 prep: dict) -> None:  # fmt: skip
    """Write index and findings under other names, rename them, then labels and prep.json."""
    label_names = sorted({name for p in planned.values() for name in p.row.labels})
    schema = pa.schema([*records.INDEX, *(pa.field(name, pa.int8()) for name in label_names)])
    names = {name: output / f"{name}.parquet.tmp" for name in ("index", "findings")}
    with (
        pq.ParquetWriter(names["index"], schema) as index,
        pq.ParquetWriter(names["findings"], records.FINDINGS) as findings,
    ):
        for rows in groups:
            index.write_table(pa.Table.from_pylist(rows, schema))
            if found := findings_rows(rows, planned):
                findings.write_table(pa.Table.from_pylist(found, records.FINDINGS))
    for name, temporary in names.items():
        temporary.replace(output / f"{name}.parquet")
    unknown = {"classes": None, "rule": "as given in labels.csv", "level": "image"}
    write_json(output / "labels.json", {name: listing.labels.get(name, unknown) for name in label_names})
    write_json(output / "prep.json", prep)


def _place_shards(output: Path, parts: dict[Path, tuple[str, int]]) -> dict[str, list[int]]:
    """Give the shards their final names, leaving out empty ones; returns the records of each by split. They
    stay under their old names too until the end, for a merge that is interrupted."""
    lengths = {}
    for split in records.SPLITS:
        filled = [part for part, (where, count) in parts.items() if count and where == split]
        for number, part in enumerate(filled):
            target = output / records.shard_name(split, number, len(filled))
            try:
                os.link(f"{part}.array_record", target)
            except OSError:  # a file system without links
                shutil.copyfile(f"{part}.array_record", target)
        if filled:
            lengths[split] = [parts[part][1] for part in filled]
    return lengths


def _write_metadata(output: Path, lengths: dict[str, list[int]]) -> None:
    """features.json and dataset_info.json, so that TFDS reads the folder (without TensorFlow)."""
    import tensorflow_datasets as tfds  # imported late: a second

    splits = []
    for split, counts in lengths.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=records.NAME, data_dir=output, split=split, filetype_suffix="array_record"
        )
        size = sum(Path(path).stat().st_size for path in records.shard_paths(output, split))
        info = dict(name=split, shard_lengths=counts, num_bytes=size, filename_template=template)
        splits.append(tfds.core.SplitInfo(**info))
    tfds.folder_dataset.write_metadata(
        data_dir=str(output), features=records.features(), split_infos=splits, version=records.SCHEMA_VERSION,
        description="Mammograms: grey images cropped to the breast, background 0.", check_data=False,
    )  # fmt: skip


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
