"""Tissue-weighted block masks (iBOT-M) with an exact count.

DINOv2's generator (blocks of random area and aspect until the target is reached), with two changes: the
place of a block is drawn with probability proportional to its tissue coverage, and patches with too
little tissue stay visible. Single patches top the mask up to its exact target, as in DINOv3, so that the
number of slots is static. Patches with known lesions can be masked first, or never (`mask.lesions`).
"""

import dataclasses
import math

import numpy as np

from mammodino_jax.data.crops import Window, tissue_map
from mammodino_jax.errors import UserError

MIN_BLOCK = 4  # patches; DINOv2
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height / width; DINOv2
BLOCK_TRIES = 10  # blocks tried before the rest is topped up by single patches; DINOv2


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    ratio: tuple[float, float] = (0.1, 0.5)  # masked share, uniform; DINOv2
    of: str = "tissue"  # the ratio is a share of the "tissue" patches, or of "all"
    min_coverage: float = 0.5  # patches with less tissue stay visible; the paper gives no number
    strength: float = 1.0  # block places are drawn with P ~ coverage ** strength; 0: uniform, as DINOv2
    # Patches that a finding's box touches: "ignore" the findings (pretraining needs no labels), or mask these
    # patches first ("always") or "never", to see whether masking small lesions matters. Not in the paper.
    lesions: str = "ignore"

    def __post_init__(self):
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise UserError(f"mask.ratio is {tuple(self.ratio)}; expected 0 < low <= high < 1")
        if self.of not in ("tissue", "all"):
            raise UserError(f'mask.of is "{self.of}"; expected "tissue" or "all"')
        if self.lesions not in ("ignore", "always", "never"):
            raise UserError(f'mask.lesions is "{self.lesions}"; expected "ignore", "always" or "never"')
        if self.strength < 0 or not 0 <= self.min_coverage <= 1:
            raise UserError("mask.strength must be >= 0 and mask.min_coverage between 0 and 1")
        if self.strength > 0 and self.min_coverage == 0:
            raise UserError("mask.min_coverage must be above 0 where mask.strength is (no tissue, no weight)")


def slots(config: MaskConfig, patches: int) -> int:
    """M, the static number of mask slots of an image whose views have `patches` patches each."""
    return int(config.ratio[1] * patches)


def draw_place(coverage_sum: np.ndarray, h: int, w: int, strength: float, rng) -> tuple[int, int]:
    """Draw the top-left patch of an h x w block, P ~ (tissue coverage of the block) ** strength.

    coverage_sum: f64 [G+1, G+1], integral image of the patch coverage.
    """
    block = tissue_map(coverage_sum, h, w)
    cumulative = np.cumsum(np.maximum(block, 0) ** strength)
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return divmod(int(min(place, cumulative.size - 1)), block.shape[1])


def plain(config: MaskConfig) -> MaskConfig:
    """DINOv2's masks of the same ratio: of all patches, tissue plays no part."""
    return MaskConfig(config.ratio, of="all", min_coverage=0.0, strength=0.0)


def lesion_patches(boxes: np.ndarray, window: Window, grid: int) -> np.ndarray:
    """The patches of a window's view, flip included, that a box touches: bool [grid, grid].

    boxes: f32 [k, 4], (y0, x0, y1, x1) in record pixels, half-open; they may reach beyond the record.
    """
    steps = np.arange(grid + 1) / grid
    y, x = window.y + steps * window.height, window.x + steps * window.width
    rows = (boxes[:, 0, None] < y[1:]) & (boxes[:, 2, None] > y[:-1])
    columns = (boxes[:, 1, None] < x[1:]) & (boxes[:, 3, None] > x[:-1])
    touched = (rows[:, :, None] & columns[:, None]).any(0)
    return touched[:, ::-1] if window.flip else touched


def draw_mask(coverage: np.ndarray, config: MaskConfig, rng, lesions: np.ndarray | None = None) -> np.ndarray:
    """Draw the mask of a view.

    Args:
      coverage: f32 [G, G], tissue share of each patch.
      config: MaskConfig.
      rng: numpy Generator.
      lesions: bool [G, G], patches with lesions, which config.lesions treats; None: no lesion.

    Returns:
      bool [G, G]; exactly int(r * n) patches are True for r ~ U(ratio) and n the tissue patches (or all
      patches; never more than there are tissue patches, with "never" those without lesions). Patches under
      min_coverage are never True, lesions or not.
    """
    G = coverage.shape[0]
    tissue = coverage >= config.min_coverage
    count = int(tissue.sum())
    of = count if config.of == "tissue" else G * G
    if lesions is not None and config.lesions == "never":
        tissue &= ~lesions
        count = int(tissue.sum())
    left = min(int(rng.uniform(*config.ratio) * of), count)
    free = tissue.copy()  # tissue patches that are still visible
    if lesions is not None and config.lesions == "always":
        first = np.flatnonzero(lesions & tissue)
        first = first if len(first) <= left else rng.choice(first, left, replace=False)
        free.ravel()[first] = False
        left -= len(first)
    coverage_sum = np.zeros((G + 1, G + 1))
    coverage_sum[1:, 1:] = coverage.cumsum(0, dtype=np.float64).cumsum(1)
    tries = 0
    while left and tries < BLOCK_TRIES:
        tries += 1
        area = MIN_BLOCK + (left - MIN_BLOCK) * rng.random()  # downwards where fewer than MIN_BLOCK are left
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < G and 0 < w < G):
            continue
        y, x = draw_place(coverage_sum, h, w, config.strength, rng)
        new = int(free[y : y + h, x : x + w].sum())
        if 0 < new <= left:
            free[y : y + h, x : x + w] = False
            left, tries = left - new, 0
    if left:
        rest = np.flatnonzero(free)
        weight = coverage.ravel()[rest].astype(np.float64) ** config.strength
        free.ravel()[rng.choice(rest, left, replace=False, p=weight / weight.sum())] = False
    return tissue & ~free


def pack_mask(mask: np.ndarray, view: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask bool [G, G] of a view (0 or 1) as slots into the 2 G^2 patches of both views.

    Returns:
      index i32 [slots], weight f32 [slots]: 1 / count for masked patches and 0 for empty slots. Empty slots
      repeat the first masked patch (0 where there is none); an empty slot counts neither in the input nor
      in the loss, so scatter `weight > 0` with max, never with set.
    """
    patches = np.flatnonzero(mask) + view * mask.size
    index, weight = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    if patches.size:
        index[:] = patches[0]
        index[: patches.size] = patches
        weight[: patches.size] = 1 / patches.size
    return index, weight
