"""The evaluation input: every record of some splits once, in order, whole and at its own aspect."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from mammodino_jax.data.crops import box_coverage, integral_image, resample
from mammodino_jax.data.index import open_split
from mammodino_jax.errors import UserError


def letterbox(image: np.ndarray, height: int, width: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit image u8 [H, W] into [height, width] at its own aspect, padded with 0 below and to the right.

    The record keeps its corner at (0, 0), so that a chest wall on the left stays at the same patch column.

    Returns:
      u8 [height, width], and the exact tissue share of each patch, f16 [height / patch, width / patch].
    """
    H, W = image.shape
    scale = min(height / H, width / W)
    return _fit(image, max(1, round(H * scale)), max(1, round(W * scale)), height, width, patch)


def network_input(image: np.ndarray, long_side: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """The same at `long_side` pixels, padded to whole patches only: what an encoder is given of a record."""
    h, w = (max(1, round(s * long_side / max(image.shape))) for s in image.shape)
    return _fit(image, h, w, -(-h // patch) * patch, -(-w // patch) * patch, patch)


def _fit(image: np.ndarray, h: int, w: int, height: int, width: int, patch: int):
    H, W = image.shape
    out = np.zeros((height, width), np.uint8)
    out[:h, :w] = resample(image, (h, w))
    y_edges = np.minimum(np.arange(0, height + 1, patch) * (H / h), H)
    x_edges = np.minimum(np.arange(0, width + 1, patch) * (W / w), W)
    tissue = box_coverage(integral_image(image > 0), y_edges, x_edges) * (h * w) / (H * W * patch**2)
    return out, tissue.astype(np.float16)


def make_eval_batches(
    folder: str | Path, splits: Sequence[str], *, height: int, width: int, batch_size: int, patch: int = 14
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over all records of the splits, duplicates and flagged ones too, in record order.

    Yields:
      image u8 [B, height, width], tissue f16 [B, height / patch, width / patch] (letterbox), and row i32 [B],
      the record's row number in index.parquet; -1 pads the last batch.

    Raises:
      UserError: sizes that are no multiple of `patch`, a bad folder or split, an unreadable record.
    """
    if height % patch or width % patch or min(height, width) <= 0:
        raise UserError(f"evaluation size {height} x {width} must be a positive multiple of patch {patch}")
    rows, places = [], []
    for split in splits:
        shards, table = open_split(folder, split, ["image_id"])
        rows += table["row"].to_pylist()
        places += [(shards, record) for record in range(len(table))]

    def build(first: int) -> dict[str, np.ndarray]:
        batch = {
            "image": np.zeros((batch_size, height, width), np.uint8),
            "tissue": np.zeros((batch_size, height // patch, width // patch), np.float16),
            "row": np.full(batch_size, -1, np.int32),
        }
        for i, (shards, record) in enumerate(places[first : first + batch_size]):
            batch["image"][i], batch["tissue"][i] = letterbox(shards.read(record), height, width, patch)
            batch["row"][i] = rows[first + i]
        return batch

    dataset = grain.MapDataset.range(0, len(rows), batch_size).map(build)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
