"""Coverage-guaranteed multi-crop (DINO-M): where the windows lie, and how their pixels are resampled.

Sampler `size_first`: the size of a window is drawn first (RandomResizedCrop's law), then its position
uniformly among the windows of that size whose tissue share is at least rho: the law of sizes stays DINOv2's
and only the position is conditioned. Sampler `rejection`, as the paper words it, redraws size and position
together, so that sizes that rarely hold rho tissue become rarer (large ones, on full frames).
Letters: H, W record; h, w window; S side of a square view; G = S / patch.
"""

import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np

from mammodino_jax.errors import UserError, suggest

POSITION_TRIES = 32  # positions looked up at once; the exact map of all positions is needed only after these
SIZE_TRIES = 10  # redraws of a size that does not fit, as in torchvision
REJECTION_TRIES = 32  # sizes and places tried by the sampler `rejection`
SAMPLERS = ("size_first", "rejection")
NOTHING = 0.02  # share of rejected crops under which rho does nothing worth the name
BOX_RHO, FULL_RHO = 0.8, 0.5  # where rho is None, on box records and on full frames (see CropConfig)


@dataclasses.dataclass(frozen=True)
class CropConfig:
    global_size: int = 518  # pixels; the paper's input size
    local_size: int = 98  # DINOv2 at patch 14
    local_number: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)  # share of the record's area; DINOv2
    local_scale: tuple[float, float] = (0.05, 0.32)
    # (low, high) side, the root of the window's area, in mm, drawn log-uniformly instead of by scale; None:
    # by scale. Not in the paper. A scale is another size in mm for every breast; None keeps DINOv2's law.
    # By scale too, and counted, where a record's pixel_mm is unknown; cut to the record where it is smaller.
    global_mm: tuple[float, float] | None = None
    local_mm: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    # rho. The paper gives no number. None: 0.8 on box records, where lower values reject next to nothing, and
    # 0.5 on full frames, where 0.8 leaves many large windows without any place.
    global_coverage: float | None = None
    local_coverage: float | None = None
    sampler: str = "size_first"  # or "rejection", the paper's; ours keeps the law of sizes at any rho
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
        for name in ("global_mm", "local_mm"):
            if getattr(self, name) is not None:
                low, high = getattr(self, name)
                if not 0 < low <= high:
                    raise UserError(f"crops.{name} is ({low}, {high}); expected 0 < low <= high, in mm")
        for name in ("global_coverage", "local_coverage", "hflip"):
            value = getattr(self, name)
            if not (value is None and name != "hflip") and not 0 <= value <= 1:
                raise UserError(f"crops.{name} is {value}; expected a share between 0 and 1")
        if self.sampler not in SAMPLERS:
            hint = suggest(self.sampler, SAMPLERS)
            raise UserError(f'crops.sampler is "{self.sampler}"; expected {" or ".join(SAMPLERS)}.{hint}')

    def rho(self, kind: str, full: bool = False) -> float:
        """Least tissue share of "global" or "local" windows, on full frames or (default) on box records."""
        value = getattr(self, f"{kind}_coverage")
        return (FULL_RHO if full else BOX_RHO) if value is None else value


class Window(NamedTuple):
    """A crop of a record, in record pixels."""

    y: int
    x: int
    height: int
    width: int
    flip: bool  # mirrored left-right after cropping
    coverage: float  # exact tissue share
    fallback: bool  # no window of this size (rejection: no try) reaches rho: this is the one with most tissue
    would_reject: bool  # the first, unconstrained draw fell below rho


def random_generator(seed: int, sample: int, purpose: int) -> np.random.Generator:
    """The random numbers of (seed, sample, purpose): counter-based, so any sample can be drawn first."""
    return np.random.Generator(np.random.Philox(key=_key(seed, sample, purpose)))


def _key(seed: int, sample: int, purpose: int) -> int:
    return seed << 96 | sample << 32 | purpose


def rekey(rng: np.random.Generator, seed: int, sample: int, purpose: int) -> np.random.Generator:
    """Make a generator that of random_generator(seed, sample, purpose), ten times as fast as a new one."""
    key = _key(seed, sample, purpose)
    zeros = np.zeros(4, np.uint64)
    rng.bit_generator.state = {
        "bit_generator": "Philox", "buffer": zeros, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
        "state": {"counter": zeros, "key": np.array([key & (1 << 64) - 1, key >> 64], np.uint64)},
    }  # fmt: skip
    return rng


def integral_image(mask: np.ndarray) -> np.ndarray:
    """Sums of a mask bool [H, W] over [0, y) x [0, x): i32 [H+1, W+1]."""
    return cv2.integral(mask.view(np.uint8))


def draw_size(shape, scale, ratio, rng, side=None) -> tuple[int, int]:
    """Draw (h, w) by RandomResizedCrop's law: area share ~ U(scale), log aspect ~ U(log ratio).

    With side = (low, high), in record pixels, log sqrt(area) ~ U(log side) instead. Redrawn up to SIZE_TRIES
    times until it fits into shape = (H, W); then, as in torchvision, the largest window whose aspect lies
    within `ratio`.
    """
    H, W = shape
    if side is None:
        areas = (rng.uniform(*scale, SIZE_TRIES) * H * W).tolist()
    else:
        areas = np.exp(2 * rng.uniform(math.log(side[0]), math.log(side[1]), SIZE_TRIES)).tolist()
    log_aspect = rng.uniform(math.log(ratio[0]), math.log(ratio[1]), SIZE_TRIES).tolist()
    for area, log in zip(areas, log_aspect, strict=True):
        h = round(math.sqrt(area / math.exp(log)))
        w = round(math.sqrt(area * math.exp(log)))
        if 0 < h <= H and 0 < w <= W:
            return h, w
    aspect = min(max(W / H, ratio[0]), ratio[1])
    return max(1, min(H, round(W / aspect))), max(1, min(W, round(H * aspect)))


def window_tissue(integral: np.ndarray, y, x, h, w):
    """Tissue pixels of windows [y, y + h) x [x, x + w); y and x may be arrays."""
    return integral[y + h, x + w] - integral[y, x + w] - integral[y + h, x] + integral[y, x]


def tissue_map(integral: np.ndarray, h: int, w: int) -> np.ndarray:
    """Tissue in the h x w window at every position: [H - h + 1, W - w + 1], of an integral image."""
    return integral[h:, w:] - integral[:-h, w:] - integral[h:, :-w] + integral[:-h, :-w]


def draw_window(
    integral: np.ndarray, scale, ratio, rho: float, hflip: float, rng, sampler="size_first", side=None
) -> Window:
    """Draw a window whose tissue share is >= rho.

    Args:
      integral: i32 [H+1, W+1] of the record's tissue mask.
      scale, ratio: bounds of the area share and of width / height.
      rho: least tissue share; the window with the most tissue is returned, flagged, where none reaches it.
      hflip: probability of a left-right flip.
      rng: numpy Generator.
      sampler: "size_first": uniform over the valid positions of a size drawn beforehand. "rejection": sizes
        and positions are redrawn together, up to REJECTION_TRIES times.
      side: (low, high) of the root of the area, in record pixels, instead of `scale`.
    """
    shape = integral.shape[0] - 1, integral.shape[1] - 1
    if sampler == "rejection":
        return _draw_by_rejection(integral, shape, scale, ratio, rho, hflip, rng, side)
    (H, W), (h, w) = shape, draw_size(shape, scale, ratio, rng, side)
    flip = rng.random() < hflip
    places = rng.integers(0, [[H - h + 1], [W - w + 1]], (2, POSITION_TRIES)).T.tolist()
    enough, fallback = rho * h * w, False
    # the first of independent uniform draws that is valid is uniform over the valid ones
    for tries, (y, x) in enumerate(places):  # noqa: B007
        count = window_tissue(integral, y, x, h, w)
        if count >= enough:
            break
    else:
        every = tissue_map(integral, h, w)
        allowed = np.flatnonzero(every >= enough)
        fallback = allowed.size == 0
        place = every.argmax() if fallback else allowed[rng.integers(allowed.size)]
        (y, x), count = divmod(int(place), every.shape[1]), every.ravel()[place]
    return Window(y, x, h, w, flip, float(count) / (h * w), fallback, would_reject=tries > 0)


def _draw_by_rejection(integral, shape, scale, ratio, rho, hflip, rng, side) -> Window:
    """The first of REJECTION_TRIES free windows with rho tissue; else, flagged, the one with the most."""
    flip, best = rng.random() < hflip, None
    for tries in range(REJECTION_TRIES):
        h, w = draw_size(shape, scale, ratio, rng, side)
        y, x = rng.integers(0, [shape[0] - h + 1, shape[1] - w + 1]).tolist()
        tissue = int(window_tissue(integral, y, x, h, w))
        window = Window(y, x, h, w, flip, tissue / (h * w), fallback=False, would_reject=tries > 0)
        if tissue >= rho * h * w:
            return window
        if best is None or window.coverage > best.coverage:
            best = window
    return best._replace(fallback=True, would_reject=True)


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
    return cv2.copyTo(out, mask=nearest)  # 0 elsewhere


def crop(image: np.ndarray, window: Window, size: int) -> np.ndarray:
    """Pixels of a window of image u8 [H, W], resampled and flipped: u8 [size, size]."""
    y, x, h, w = window[:4]
    view = resample(image[y : y + h, x : x + w], (size, size), all_tissue=window.coverage == 1)
    return cv2.flip(view, 1) if window.flip else view


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
