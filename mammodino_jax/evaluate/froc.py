"""Detection by patch probabilities: candidates, and sensitivity over false positives (FROC).

n units (an image, or a tomosynthesis volume), k lesions, c candidates, W bootstrap draws.
"""

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter

RATES = (1, 2, 3, 4)  # false positives a unit; DBTex averages over these


def peaks(probability, tissue) -> np.ndarray:
    """Local maxima of the smoothed probability on tissue: (y, x, score) in patches, f64 [c, 3]."""
    inside = tissue >= 0.5
    weight = gaussian_filter(inside.astype(float), 1)
    smooth = gaussian_filter(np.where(inside, probability, 0), 1) / np.maximum(weight, 1e-6)
    smooth = np.where(inside, smooth, -1)
    y, x = np.nonzero(inside & (smooth == maximum_filter(smooth, 3)))
    return np.stack([y + 0.5, x + 0.5, smooth[y, x]], axis=1)


def suppress(found_c4, radius: float, depth: float) -> np.ndarray:
    """Non-maximum suppression of (z, y, x, score): no two that are kept lie within radius and depth."""
    rest, kept = found_c4[np.argsort(-found_c4[:, 3], kind="stable")], []
    while len(rest):
        kept.append(rest[0])
        far = np.hypot(*(rest[:, 1:3] - rest[0, 1:3]).T) > radius
        rest = rest[1:][(far | (np.abs(rest[:, 0] - rest[0, 0]) > depth))[1:]]
    return np.array(kept).reshape(-1, 4)


def froc(candidates_c5, truths_k6, weights_Wn, rates=RATES) -> np.ndarray:
    """Sensitivity at the lowest threshold with no more than so many false positives a unit.

    A candidate hits a lesion of its unit if its centre lies within `reach` of the lesion's, and its slice
    within `depth`. One that hits no lesion is a false positive; several hits of a lesion count once.

    Args:
      candidates_c5: (unit, z, y, x, score); units are numbers 0..n-1.
      truths_k6: (unit, z, y, x, reach, depth).
      weights_Wn: how often each unit counts; several weightings at once.
      rates: false positives a unit.

    Returns:
      f64 [W, len(rates)]; NaN where no lesion counts.
    """
    unit_c, score_c = candidates_c5[:, 0].astype(int), candidates_c5[:, 4]
    false, best_k = np.ones(len(candidates_c5), bool), np.full(len(truths_k6), -np.inf)
    for k, (unit, z, y, x, reach, depth) in enumerate(truths_k6):
        mine = np.flatnonzero(unit_c == unit)
        at = candidates_c5[mine]
        hit = mine[(np.hypot(at[:, 2] - y, at[:, 3] - x) <= reach) & (np.abs(at[:, 1] - z) <= depth)]
        false[hit] = False
        best_k[k] = score_c[hit].max(initial=-np.inf)
    # a lesion is found at a rate if the false positives that score no lower are no more than that
    above_nk = np.zeros((weights_Wn.shape[1], len(best_k)))
    for unit in np.unique(unit_c[false]):
        scores = np.sort(score_c[false & (unit_c == unit)])
        above_nk[unit] = len(scores) - np.searchsorted(scores, best_k)
    rate_Wk = weights_Wn @ above_nk / np.maximum(weights_Wn.sum(axis=1, keepdims=True), 1e-9)
    counts_Wk = weights_Wn[:, truths_k6[:, 0].astype(int)]
    found = [counts_Wk * (np.isfinite(best_k) & (rate_Wk <= rate)) for rate in rates]
    with np.errstate(invalid="ignore"):
        return np.stack([f.sum(axis=1) for f in found], axis=1) / counts_Wk.sum(axis=1)[:, None]
