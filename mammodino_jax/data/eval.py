"""The evaluation input: records once each, whole and at their own aspect, in canvases of a few sizes."""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from mammodino_jax.data.crops import box_coverage, integral_image, resample
from mammodino_jax.errors import UserError

STEP = 4  # patches: canvases are multiples of it, so that few shapes are compiled


def fitted(height: float, width: float, long_side: int) -> tuple[int, int]:
    """Height and width of an image whose long side becomes `long_side`."""
    scale = long_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def letterbox(image: np.ndarray, height: int, width: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit image u8 [H, W] into [height, width] at its own aspect, padded with 0 below and to the right.

    The record keeps its corner at (0, 0), so that a chest wall on the left stays at the same patch column.

    Returns:
      u8 [height, width], and the exact tissue share of each patch, f16 [height / patch, width / patch].
    """
    H, W = image.shape
    scale = min(height / H, width / W)
    return _place(image, max(1, round(H * scale)), max(1, round(W * scale)), height, width, patch)


def _place(image, h: int, w: int, height: int, width: int, patch: int):
    """`letterbox` with the size [h, w] that the image gets."""
    H, W = image.shape
    out = np.zeros((height, width), np.uint8)
    out[:h, :w] = resample(image, (h, w))
    y_edges = np.minimum(np.arange(0, height + 1, patch) * (H / h), H)
    x_edges = np.minimum(np.arange(0, width + 1, patch) * (W / w), W)
    tissue = box_coverage(integral_image(image > 0), y_edges, x_edges) * (h * w) / (H * W * patch**2)
    return out, tissue.astype(np.float16)


def check_long_side(long_side: int, patch: int) -> None:
    """Raise a UserError where `long_side` is no positive multiple of the patch size."""
    if long_side % patch or long_side <= 0:
        near = max(1, round(long_side / patch)) * patch
        raise UserError(
            f"--long-side {long_side} is not a positive multiple of the patch size {patch}; {near} is"
        )


def make_eval_batches(
    read: Callable[[int], np.ndarray],
    shapes_n2: Sequence,
    *,
    long_side: int,
    patch: int,
    batch_size: Callable[[int], int],
    step: int = STEP,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over images, those of one canvas together.

    Args:
      read: place 0..n-1 to image u8 [H, W].
      shapes_n2: height and width of each image.
      long_side: px of an image.
      batch_size: images in a batch, by the number of patches of the canvas.
      step: canvases are multiples of so many patches.

    Yields:
      image u8 [B, height, width], size i32 [B, 2] that the images take of it, tissue f16 [B, height / patch,
      width / patch], and row i32 [B], the place of each; -1 pads the last batch of a canvas.

    Raises:
      UserError: an unreadable record.
    """
    sizes = [fitted(*shape, long_side) for shape in shapes_n2]
    canvases: dict[tuple, list[int]] = {}
    for place, size in enumerate(sizes):
        canvases.setdefault(tuple(-(-s // (patch * step)) * step * patch for s in size), []).append(place)
    jobs = []
    for canvas, places in sorted(canvases.items()):
        B = batch_size(canvas[0] * canvas[1] // patch**2)
        jobs += [(canvas, B, places[first : first + B]) for first in range(0, len(places), B)]

    def build(job: int) -> dict[str, np.ndarray]:
        (height, width), B, places = jobs[job]
        batch = {
            "image": np.zeros((B, height, width), np.uint8),
            "size": np.full((B, 2), (height, width), np.int32),
            "tissue": np.zeros((B, height // patch, width // patch), np.float16),
            "row": np.full(B, -1, np.int32),
        }
        for i, place in enumerate(places):
            image = read(place)
            batch["image"][i], batch["tissue"][i] = _place(image, *sizes[place], height, width, patch)
            batch["size"][i], batch["row"][i] = sizes[place], place
        return batch

    dataset = grain.MapDataset.range(0, len(jobs)).map(build)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
