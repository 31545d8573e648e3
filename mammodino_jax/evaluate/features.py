"""Frozen features of everything in built data sets: an item is a 2D image, or a whole tomosynthesis volume.

n items, B images of a batch, N patches, D width of the encoder.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from mammodino_jax.data import records
from mammodino_jax.data.eval import make_eval_batches
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.errors import UserError

_COLUMNS = (
    "image_id", "patient_id", "volume_id", "kind", "split", "height", "width", "pixel_mm", "pixel_hash",
    "duplicate_of", "flags",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Items:
    """[n] arrays; a volume's values are those of its first slice.

    Attributes:
      patient, kind, split: text.
      pixel_mm: of the record, NaN where unknown; long_px: its long side.
      labels: {name without label_: i64, -1 where unknown}.
      class_names: {name without label_: names of its values}, as far as labels.json of a folder has them.
      pixels: a list an item, pixel hashes of its records.
      of_row: for each data folder, i64 [rows of its index]: the row's item, -1 where it is left out.
      left_out: number of records that are duplicates or carry a flag that training leaves out too.
    """

    patient: np.ndarray
    kind: np.ndarray
    split: np.ndarray
    pixel_mm: np.ndarray
    long_px: np.ndarray
    labels: dict[str, np.ndarray]
    class_names: dict[str, list[str]]
    pixels: list[list[str]]
    of_row: list[np.ndarray]
    left_out: int


def read_items(folders: Sequence[Path]) -> Items:
    """Read the indices of built data sets.

    Raises:
      UserError: a folder is no built data set, or nothing is left to evaluate.
    """
    first_rows, pixels, of_row, left_out, names, class_names = [], [], [], 0, set(), {}
    flags = set(DataConfig().exclude_flags)
    for folder in folders:
        records.read_prep(folder)
        index = Path(folder) / "index.parquet"
        label_columns = [name for name in pq.read_schema(index).names if name.startswith("label_")]
        names |= set(label_columns)
        described = Path(folder) / "labels.json"
        for name, label in json.loads(described.read_text()).items() if described.is_file() else ():
            class_names[name.removeprefix("label_")] = label.get("classes", [])
        table = pq.read_table(index, columns=[*_COLUMNS, *label_columns]).to_pylist()
        place, item_of = np.full(len(table), -1, np.int64), {}
        for r, row in enumerate(table):
            if row["duplicate_of"] or flags & set(row["flags"] or ()):
                left_out += 1
                continue
            key = row["volume_id"] if row["kind"] == "dbt" else row["image_id"]
            if key not in item_of:
                item_of[key] = len(first_rows)
                first_rows.append(row)
                pixels.append([])
            place[r] = item_of[key]
            pixels[place[r]].append(row["pixel_hash"])
        of_row.append(place)
    if not first_rows:
        raise UserError(
            f"nothing to evaluate in {', '.join(map(str, folders))}: all records are duplicates or flagged"
        )

    def column(name, missing, dtype):
        values = (row.get(name) for row in first_rows)
        return np.array([missing if v is None else v for v in values], dtype)

    return Items(
        patient=column("patient_id", "", object),
        kind=column("kind", "", object),
        split=column("split", "", object),
        pixel_mm=column("pixel_mm", np.nan, np.float64),
        long_px=np.maximum(column("height", 0, np.int64), column("width", 0, np.int64)),
        labels={name.removeprefix("label_"): column(name, -1, np.int64) for name in sorted(names)},
        class_names=class_names,
        pixels=pixels,
        of_row=of_row,
        left_out=left_out,
    )


def encoder_features(encoder) -> Callable:
    """CLS beside the tissue-weighted mean of the patch tokens: batch -> float32 [B, 2 D]."""

    def extract(batch, mm_per_px):
        out = encoder(batch["image"])
        weight_BN = jnp.asarray(batch["tissue"], jnp.float32).reshape(len(batch["row"]), -1)
        weight_BN = weight_BN / jnp.maximum(weight_BN.sum(axis=1, keepdims=True), 1e-6)
        mean_BD = jnp.einsum("bn,bnd->bd", weight_BN, out["patches"], precision="highest")
        return np.concatenate([out["cls"], mean_BD], axis=1)

    return extract


def untrained(encoder, seed: int = 0):
    """The same architecture and normalisation with random weights."""
    from mammodino_jax.model.head import init_params

    params = init_params(encoder.vit, None, seed)
    return dataclasses.replace(encoder, name="random init", params=params, provenance={})


def handmade_features() -> Callable:
    """Hand-made features of the very images that the encoders see: batch -> float32 [B, F]."""
    from mammodino_jax.evaluate.handmade import handmade

    def extract(batch, mm_per_px):
        return np.stack([handmade(i, mm) for i, mm in zip(batch["image"], mm_per_px, strict=True)])

    return extract


def extract(
    folders: Sequence[Path],
    items: Items,
    extractors: dict[str, Callable],
    long_side: int,
    patch: int,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Run extractors over all records at `long_side` pixels; slices of a volume are averaged.

    Args:
      extractors: {name: f(batch, mm_per_px [B]) -> float32 [B, F]}.
      long_side: of the letterboxed images, a multiple of `patch`.

    Returns:
      {name: float32 [n, F]}.

    Raises:
      UserError: long_side is no multiple of the patch size; an unreadable record.
    """
    if long_side % patch or long_side <= 0:
        near = max(1, round(long_side / patch)) * patch
        raise UserError(
            f"--long-side {long_side} is not a positive multiple of the patch size {patch}; {near} is"
        )
    mm_of_item = items.pixel_mm * items.long_px / long_side
    if np.isnan(mm_of_item).any():  # some in mm and some in pixels would be a code for the data set
        mm_of_item = np.ones_like(mm_of_item)
    count = np.zeros(len(items.patient))
    total: dict[str, np.ndarray] = {}
    for folder, of_row in zip(folders, items.of_row, strict=True):
        index = pq.read_table(Path(folder) / "index.parquet", columns=["split"])
        present = set(index["split"].to_pylist())
        splits = [s for s in records.SPLITS if s in present]
        # one square canvas for all: its padding must not tell records or data sets apart
        batches = make_eval_batches(
            folder, splits, height=long_side, width=long_side, batch_size=batch_size, patch=patch
        )
        title = f"features at {long_side} px"
        for batch in tqdm(batches, title, total=math.ceil(len(index) / batch_size), unit="batch"):
            item = np.where(batch["row"] >= 0, of_row[batch["row"]], -1)
            kept = item >= 0
            if not kept.any():
                continue
            np.add.at(count, item[kept], 1)
            for name, function in extractors.items():
                x = function(batch, mm_of_item[item])
                total.setdefault(name, np.zeros((len(count), x.shape[1])))
                np.add.at(total[name], item[kept], x[kept])
    return {name: (x / count[:, None]).astype(np.float32) for name, x in total.items()}
