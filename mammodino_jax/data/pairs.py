"""Pairs of adjacent tomosynthesis slices (DINO-adj): which slices, by number or by millimetres, and where."""

import dataclasses

import numpy as np

from mammodino_jax.data.crops import Window, draw_window, window_tissue
from mammodino_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PairConfig:
    # "dedicated": both slices in crops of their own (paper). "reuse": the row's first global crop against
    # slice k +- d in the same window, cheaper, an approximation. "none": no DINO-adj, on the same slices k.
    mode: str = "dedicated"
    symmetric: bool = False  # each slice of a pair is student and teacher once ("dedicated" only)
    offsets: tuple[float, ...] = (1, 2)  # d; the paper does not say. Structures stay in view over 1-2 slices
    unit: str = "slices"  # of the offsets: "slices" or "mm" (vendors space slices 0.5 to 3 mm apart)
    end_share: float = 0.1  # of the slices left out at each end: little but skin and blur
    scale: tuple[float, float] = (0.8, 1.0)  # conservative window, the same for both slices
    coverage: float = 0.7  # rho of that window: on film boxes (tissue 58-91 %) 0.8 leaves 1.3 % without one
    # Largest shift of the partner's window, as a share of its sides ("dedicated" only). Not in the paper:
    # less than a patch at 518 px, so that equal pixels at equal places are not all there is to find.
    jitter: float = 0.02

    def __post_init__(self):
        if self.mode not in ("dedicated", "reuse", "none"):
            raise UserError(f'pairs.mode is "{self.mode}"; expected "dedicated", "reuse" or "none"')
        if self.symmetric and self.mode == "reuse":
            raise UserError(
                'pairs.symmetric needs pairs.mode "dedicated": "reuse" has no student view of k +- d'
            )
        if self.unit not in ("slices", "mm"):
            raise UserError(f'pairs.unit is "{self.unit}"; expected "slices" or "mm"')
        whole = self.unit == "mm" or all(d == int(d) for d in self.offsets)
        if not self.offsets or min(self.offsets) <= 0 or not whole:
            raise UserError(
                f"pairs.offsets is {tuple(self.offsets)}; expected positive (for slices, whole) numbers"
            )
        if not 0 <= self.end_share < 0.5:
            raise UserError(f"pairs.end_share is {self.end_share}; expected 0 to below 0.5")
        if not 0 <= self.jitter <= 0.5:
            raise UserError(f"pairs.jitter is {self.jitter}; expected a share between 0 and 0.5")


def possible_pairs(slice_index: np.ndarray, position_mm: np.ndarray, config: PairConfig) -> np.ndarray:
    """Every ordered pair (k, k +- d) that a volume offers.

    Args:
      slice_index: i32 [n], ascending; gaps where slices are missing.
      position_mm: f32 [n], NaN where unknown.
      config: PairConfig.

    Returns:
      i64 [P, 2] positions into the volume's n slices, without the outer slices. By mm a partner lies at most
      half a slice spacing off the wanted distance; there is none where positions are unknown.
    """
    n = len(slice_index)
    ends = int(config.end_share * n)
    inner = np.arange(ends, n - ends)
    if config.unit == "slices":
        distance = np.abs(slice_index[inner, None] - slice_index[None, inner])
        wanted = np.isin(distance, config.offsets)
    else:
        position = position_mm[inner].astype(np.float64)
        distance = np.abs(position[:, None] - position[None, :])
        half = np.median(np.abs(np.diff(position))) / 2 if len(inner) > 1 else np.nan
        off = np.abs(distance[:, :, None] - np.asarray(config.offsets))
        wanted = (off <= half + 1e-3).any(-1) & (distance > 0)  # NaN compares False
    return inner[np.argwhere(wanted)]


def draw_windows(integral: np.ndarray, config: PairConfig, ratio, hflip: float, rng) -> tuple[Window, Window]:
    """Draw the window of slice k and, shifted by up to `jitter` of its sides, that of its partner.

    The partner's window has the same size and flip, stays in the record, and is not shifted where it would
    then hold less tissue than `coverage` (or than slice k's, where no window holds so much). `integral` is of
    the tissue mask that the slices of a volume share.
    """
    window = draw_window(integral, config.scale, ratio, config.coverage, hflip, rng)
    h, w = window.height, window.width
    shift = rng.uniform(-config.jitter, config.jitter, 2) * (h, w)
    room = np.array(integral.shape) - 1 - (h, w)
    y, x = np.clip((window.y, window.x) + np.trunc(shift).astype(int), 0, room).tolist()
    coverage = int(window_tissue(integral, y, x, h, w)) / (h * w)
    if coverage < min(config.coverage, window.coverage):
        return window, window
    return window, window._replace(y=y, x=x, coverage=coverage)
