"""Coverage-guaranteed multi-crop (DINO-M): where the windows lie, and how their pixels are resampled.

The size of a window is drawn first (RandomResizedCrop's law), then its position uniformly among the
windows of that size whose tissue share is at least rho: the law of sizes stays DINOv2's and only the
position is conditioned. Letters: H, W record; h, w window; S side of a square view; G = S / patch.
"""

import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np

from mammodino_jax.errors import UserError

POSITION_TRIES = 32  # positions looked up at once; the exact map of all positions is needed only after these
SIZE_TRIES = 10  # redraws of a size that does not fit, as in torchvision


@dataclasses.dataclass(frozen=True)
class CropConfig:
    global_size: int = 518  # pixels; the paper's input size
    local_size: int = 98  # DINOv2 at patch 14
    local_number: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the record's area; DINOv2
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    global_coverage: float = 0.8  # rho. The paper gives no number; on box records lower ones reject nothing
    local_coverage: float = 0.8
    hflip: float = 0.5  # probability
    patch: int = 14

    def __post_init__(self):
        for name in ("global_size", "local_size"):
            size = getattr(self, name)
            if size <= 0 or size % self.patch:
                raise UserError(
                    f"crops.{name} is {size}; it must be a positive multiple of patch {self.patch}"
                )
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(f"crops.{name} is ({low}, {high}); expected 0 < low <= high <= 1")
        for name in ("global_coverage", "local_coverage", "hflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"crops.{name} is {getattr(self, name)}; expected a share between 0 and 1")


class Window(NamedTuple):
    """A crop of a record, in record pixels."""

    y: int
    x: int
    height: int
    width: int
    flip: bool  # mirrored left-right after cropping
    coverage: float  # exact tissue share
    fallback: bool  # no window of this size reaches rho: this is the one with the most tissue
    would_reject: bool  # an unconstrained draw at this size fell below rho


def random_generator(seed: int, sample: int, purpose: int) -> np.random.Generator:
    """The random numbers of (seed, sample, purpose): counter-based, so any sample can be drawn first."""
    return np.random.Generator(np.random.Philox(key=seed << 96 | sample << 32 | purpose))


def integral_image(mask: np.ndarray) -> np.ndarray:
    """Sums of a mask bool [H, W] over [0, y) x [0, x): i32 [H+1, W+1]."""
    return cv2.integral(mask.view(np.uint8))


def draw_size(shape, scale, ratio, rng) -> tuple[int, int]:
    """Draw (h, w) by RandomResizedCrop's law: area share ~ U(scale), log aspect ~ U(log ratio).

    Redrawn up to SIZE_TRIES times until it fits into shape = (H, W); then, as in torchvision, the largest
    window whose aspect lies within `ratio`.
    """
    H, W = shape
    area_share = rng.uniform(*scale, SIZE_TRIES).tolist()
    log_aspect = rng.uniform(math.log(ratio[0]), math.log(ratio[1]), SIZE_TRIES).tolist()
    for share, log in zip(area_share, log_aspect, strict=True):
        h = round(math.sqrt(share * H * W / math.exp(log)))
        w = round(math.sqrt(share * H * W * math.exp(log)))
        if 0 < h <= H and 0 < w <= W:
            return h, w
    aspect = min(max(W / H, ratio[0]), ratio[1])
    return max(1, min(H, round(W / aspect))), max(1, min(W, round(H * aspect)))


def draw_window(integral: np.ndarray, scale, ratio, rho: float, hflip: float, rng) -> Window:
    """Draw a window whose tissue share is >= rho, uniform over the valid positions of its size.

    Args:
      integral: i32 [H+1, W+1] of the record's tissue mask.
      scale, ratio: bounds of the area share and of width / height.
      rho: least tissue share; the window with the most tissue is returned, flagged, where none reaches it.
      hflip: probability of a left-right flip.
      rng: numpy Generator.
    """
    H, W = integral.shape[0] - 1, integral.shape[1] - 1
    h, w = draw_size((H, W), scale, ratio, rng)
    flip = rng.random() < hflip
    ys, xs = rng.integers(0, [[H - h + 1], [W - w + 1]], (2, POSITION_TRIES))
    tissue = integral[ys + h, xs + w] - integral[ys, xs + w] - integral[ys + h, xs] + integral[ys, xs]
    valid = tissue >= rho * h * w
    would_reject = not valid[0]
    fallback = False
    first = int(valid.argmax())
    if valid[first]:  # the first of independent uniform draws that is valid is uniform over the valid ones
        y, x, count = ys[first], xs[first], tissue[first]
    else:
        every = integral[h:, w:] - integral[:-h, w:] - integral[h:, :-w] + integral[:-h, :-w]
        allowed = np.flatnonzero(every >= rho * h * w)
        fallback = allowed.size == 0
        place = every.argmax() if fallback else allowed[rng.integers(allowed.size)]
        (y, x), count = divmod(int(place), every.shape[1]), every.ravel()[place]
    return Window(int(y), int(x), h, w, flip, float(count) / (h * w), fallback, would_reject)


def _interpolate(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize u8 [h, w] to `size`: cubic where it grows, area means where it shrinks.

    Means of 2 x 2 are much faster in OpenCV than INTER_AREA at any other ratio: the image is halved while it
    is twice as large (an odd last row is left out: half a pixel of the result), and the rest, between 1x and
    2x, is the mean over a cubic grid twice as fine. So a one-pixel calcification keeps its brightness within
    7 %, wherever it falls; plain cubic or linear would give 0 to 370 % of it.
    """
    height, width = size
    h, w = image.shape
    while h >= 2 * height and w >= 2 * width:
        h, w = h // 2, w // 2
        image = cv2.resize(image[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA)
    if h <= height and w <= width:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    if h > 2 * height or w > 2 * width:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    fine = cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def resample(image: np.ndarray, size: tuple[int, int], all_tissue: bool = False) -> np.ndarray:
    """Resize u8 [h, w] to u8 `size`, background exactly 0 and tissue >= 1 as in the record.

    The background follows the nearest source pixel, so that interpolation neither bleeds tissue into the
    background nor turns dark tissue into it. `all_tissue` promises that no pixel is 0 (saves the mask).
    """
    out = cv2.max(_interpolate(image, size), 1)
    if all_tissue:
        return out
    nearest = cv2.resize(image, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    tissue = cv2.threshold(nearest, 0, 255, cv2.THRESH_BINARY)[1]
    return cv2.min(out, tissue)


def crop(image: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Pixels of a window of image u8 [H, W], resampled and flipped: u8 [size, size]."""
    y, x, h, w = window[:4]
    view = resample(image[y : y + h, x : x + w], (size, size), all_tissue=window.coverage == 1)
    return view[:, ::-1] if window.flip else view


def box_coverage(integral: np.ndarray, y_edges: np.ndarray, x_edges: np.ndarray) -> np.ndarray:
    """Tissue pixels in each cell of a grid with fractional borders: f64 [len(y)-1, len(x)-1].

    The integral of a mask that is constant within pixels is bilinear within them, so bilinear look-ups
    in the integral image are exact.
    """

    def split(edges, length):
        low = np.minimum(edges.astype(np.int64), length - 1)  # the last edge may lie on the border
        return low, edges - low

    y, fy = split(y_edges, integral.shape[0] - 1)
    x, fx = split(x_edges, integral.shape[1] - 1)
    top, bottom = integral[y], integral[y + 1]
    rows = top + fy[:, None] * (bottom - top)
    corners = rows[:, x] + fx * (rows[:, x + 1] - rows[:, x])
    return np.diff(np.diff(corners, axis=0), axis=1)


def patch_coverage(integral: np.ndarray, window: Window, grid: int) -> np.ndarray:
    """Exact tissue share of each patch of a window's view, flip included: f32 [grid, grid]."""
    if window.coverage == 1:
        return np.ones((grid, grid), np.float32)
    steps = np.arange(grid + 1) / grid
    cells = box_coverage(integral, window.y + steps * window.height, window.x + steps * window.width)
    share = np.clip(cells * (grid * grid / (window.height * window.width)), 0, 1).astype(np.float32)
    return share[:, ::-1] if window.flip else share
