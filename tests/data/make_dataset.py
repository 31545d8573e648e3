"""Writes tiny built data sets for tests: shards, index.parquet and prep.json as the record contract says."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter

from mammodino_jax.data import records


def breast(height, width, seed, radius=0.95):
    """u8 [height, width]: half an ellipse of textured tissue on the left, background 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (height / 2)) ** 2 + (x / width) ** 2 < radius**2
    texture = cv2.resize(
        rng.integers(1, 256, (height // 8 + 2, width // 8 + 2)).astype(np.uint8), (width, height)
    )
    return np.where(inside, np.maximum(texture, 1), 0).astype(np.uint8)


def row(image, image_id, **columns):
    """An index row of a record; `columns` overrides the defaults."""
    values = dict.fromkeys(records.INDEX.names)
    values |= {
        "image_id": image_id, "patient_id": f"p-{image_id}", "dataset": "test", "kind": "2d",
        "laterality": "L", "view": "MLO", "pixel_mm": 0.2, "height": image.shape[0],
        "width": image.shape[1], "flipped": False,
        "coverage": float((image > 0).mean()), "split": "train", "flags": [],
    }  # fmt: skip
    unknown = set(columns) - {n for n in columns if n in values or n.startswith("label_")}
    assert not unknown, unknown
    return values | columns


def volume(name, slices, height=60, width=40, spacing=1.0, **columns):
    """Index rows and images of a tomosynthesis volume; slice s has grey level 20 + s on one shared mask."""
    mask = breast(height, width, 0) > 0
    out = []
    for s in range(slices):
        image = np.where(mask, 20 + s, 0).astype(np.uint8)
        place = {"slice_index": s, "num_slices": slices, "slice_mm": spacing}
        ids = {"patient_id": f"p-{name}", "volume_id": name, "kind": "dbt"}
        out.append((image, row(image, f"{name}-{s}", **{**ids, **place, **columns})))
    return out


def write_findings(folder, findings):
    """Write findings.parquet beside a data set's index; columns not given are null."""
    rows = [dict.fromkeys(records.FINDINGS.names) | finding for finding in findings]
    pq.write_table(pa.Table.from_pylist(rows, schema=records.FINDINGS), folder / "findings.parquet")


def write_dataset(folder, items, shards=2, **prep):
    """Write [(image u8 [H, W], index row), ...] as a built data set; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [item for split in records.SPLITS for item in items if item[1]["split"] == split]
    for split in records.SPLITS:
        mine = [item for item in items if item[1]["split"] == split]
        for s, part in enumerate(np.array_split(np.arange(len(mine)), shards) if mine else []):
            writer = ArrayRecordWriter(str(folder / records.shard_name(split, s, shards)), "group_size:1")
            for i in part:
                writer.write(records.encode(mine[i][0], mine[i][1]["image_id"]))
            writer.close()
    pq.write_table(
        pa.Table.from_pylist([r for _, r in items], schema=records.INDEX), folder / "index.parquet"
    )
    (folder / "prep.json").write_text(json.dumps({"schema_version": records.SCHEMA_VERSION, **prep}))
    return folder
