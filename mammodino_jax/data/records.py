"""The record contract: what a shard holds, what index.parquet and findings.parquet say about it.

A built data set is a folder:

    mammograms-<split>.array_record-00000-of-0000N   one record an image or a tomosynthesis slice
    features.json, dataset_info.json                 so that TFDS reads it too (TensorFlow is not needed)
    index.parquet, findings.parquet, labels.json     one row a record, one row a finding, what the labels mean
    prep.json                                        schema version, settings, versions, terms of each source

Pixel coordinates are (y, x), half-open boxes, "source" pixels unless a column says otherwise.
"""

import functools
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa

from mammodino_jax.errors import UserError, refuse_bucket

SCHEMA_VERSION = "1.0.0"
NAME = "mammograms"
SPLITS = ("train", "val", "test")
KINDS = ("2d", "synthetic2d", "dbt", "film")

_text, _int, _float = pa.string(), pa.int32(), pa.float32()

# One row a record, in record order within a split. label_<name> columns (nullable int8) follow these.
INDEX = pa.schema([
    ("image_id", _text), ("patient_id", _text), ("study_id", _text), ("volume_id", _text),  # dbt only
    ("dataset", _text), ("kind", _text), ("laterality", _text), ("view", _text), ("view_modifier", _text),
    ("manufacturer", _text), ("model", _text), ("site", _text), ("implant", pa.bool_()),
    ("slice_index", _int), ("num_slices", _int),  # slice_index is 0-based
    ("slice_position_mm", _float), ("slice_mm", _float), ("slab_mm", _float),
    ("pixel_mm", _float), ("pixel_mm_source", _text),  # pixel_mm is of the record; null where unknown
    ("height", _int), ("width", _int),  # of the record
    ("box_y0", _int), ("box_x0", _int), ("box_y1", _int), ("box_x1", _int),  # in source pixels
    ("flipped", pa.bool_()),  # mirrored left-right after cropping
    ("coverage", _float),  # tissue share of the record
    ("window_lo", _float), ("window_hi", _float), ("mask_recipe", _text),
    ("pixel_hash", _text), ("duplicate_of", _text),  # image_id of the first record with equal pixels
    ("split", _text), ("flags", pa.list_(_text)),
])  # fmt: skip

FINDINGS = pa.schema([
    ("image_id", _text), ("volume_id", _text), ("category", _text), ("birads", _text), ("pathology", _text),
    ("shape", _text),  # box | circle | mask; null where the place is unknown
    ("y0", _float), ("x0", _float), ("y1", _float), ("x1", _float),  # source pixels
    ("record_y0", _float), ("record_x0", _float), ("record_y1", _float), ("record_x1", _float),
    ("slice_index", _int),
])  # fmt: skip


def features():
    """The TFDS feature spec of one record: image u8 [H, W], mask u8 [ceil(H*W/8)], image_id."""
    with _importing:
        return _features()


_importing = threading.Lock()  # TFDS imports itself lazily, and fails where two threads are the first at once


@functools.cache
def _features():
    from tensorflow_datasets.core import features as f  # imported late: costs a second, shards only

    return f.FeaturesDict({
        "image": f.Tensor(shape=(None, None), dtype=np.uint8, encoding="bytes"),
        "mask": f.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
        "image_id": f.Text(),
    })  # fmt: skip


def encode(image: np.ndarray, image_id: str) -> bytes:
    """Serialise one record.

    Args:
      image: u8 [H, W], background exactly 0 and tissue 1..255; the mask is stored from it.
      image_id: the id of the record's index row.

    Returns:
      tf.train.Example bytes.
    """
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"image: expected uint8 [H, W], got {image.dtype} {image.shape}")
    from tensorflow_datasets.proto import tf_example_pb2

    mask = np.packbits((image > 0).ravel())
    record = features().serialize_example({"image": image, "mask": mask, "image_id": image_id})
    # A proto map is written in an order that changes from process to process; equal input gives equal bytes.
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


def decode(record: bytes) -> dict:
    """Parse one record into {"image": u8 [H, W], "mask": bool [H, W], "image_id": str}."""
    example = features().deserialize_example_np(record)
    image = example["image"]
    return {"image": image, "mask": image > 0, "image_id": example["image_id"].decode()}


def shard_name(split: str, shard: int, shards: int) -> str:
    return f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def shard_paths(folder: Path, split: str) -> list[str]:
    """The shards of a split in record order; empty where the split has none."""
    return sorted(str(p) for p in Path(folder).glob(f"{NAME}-{split}.array_record-*-of-*"))


def read_prep(folder: Path) -> dict:
    """Read prep.json of a built data set and check that this version can read its shards.

    Raises:
      UserError: the folder is missing, not a built data set, or of another schema version.
    """
    refuse_bucket(folder, "data folder")
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; build it with: python -m data_prep build")
    if not (folder / "prep.json").is_file():
        raise UserError(
            f"{folder} is not a built data set (no prep.json); build one with: python -m data_prep build"
        )
    prep = json.loads((folder / "prep.json").read_text())
    if prep.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has shards of schema version {prep.get('schema_version')}, this code reads "
            f"{SCHEMA_VERSION}; build them again with: python -m data_prep build"
        )
    return prep
