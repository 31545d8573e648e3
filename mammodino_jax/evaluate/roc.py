"""ROC curves averaged over folds, with a band over draws of patients.

n test items, C classes, W weightings of the items (how often each counts), G false-positive rates.
"""

import numpy as np

GRID = np.linspace(0, 1, 101)  # false-positive rates at which curves are averaged
DRAWS, BAND = 200, [2.5, 97.5]


def mean_roc(folds: list, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sensitivity at the false-positive rates GRID, averaged over folds: their scores are never pooled.

    More than two classes: the mean over classes of one against the rest. A fold that lacks items in or out of
    a class is left out of it, in a draw too. A patient counts equally often in all folds and repeats.

    Args:
      folds: metrics.Scored of the test part of each.

    Returns:
      f64 [3, G]: the curve, its 2.5th and 97.5th percentile over draws of patients; NaN where not computed.
    """
    patients, place_n = np.unique(np.concatenate([f.patient for f in folds]), return_inverse=True)
    P, classes = len(patients), folds[0].score.shape[1]
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), draws)
    weights_WP = np.concatenate([np.ones((1, P), int), drawn])
    places = np.split(place_n, np.cumsum([len(f.label) for f in folds])[:-1])
    curves = []
    for c in range(1, 2) if classes == 2 else range(classes):
        total, count = np.zeros((1 + draws, len(GRID))), np.zeros((1 + draws, 1))
        for fold, place in zip(folds, places, strict=True):
            found = _roc(fold.label == c, fold.score[:, c], weights_WP[:, place])
            known = np.isfinite(found[:, :1])
            total, count = total + np.where(known, found, 0), count + known
        curves.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    once, drawn = np.split(np.mean(curves, axis=0), [1])
    drawn = drawn[np.isfinite(drawn[:, 0])]
    low, high = np.percentile(drawn, BAND, axis=0) if len(drawn) else np.full((2, len(GRID)), np.nan)
    return np.stack([once[0], low, high])


def _roc(positive_n, score_n, weights_Wn) -> np.ndarray:
    """Sensitivity at GRID, linear between thresholds: [W, G]; NaN where a weighting leaves one class."""
    out = np.full((len(weights_Wn), len(GRID)), np.nan)
    if np.isnan(score_n).any():
        return out
    order = np.argsort(-score_n, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score_n[order])), len(order) - 1]  # of each run of equal scores
    weights, positive = weights_Wn[:, order], positive_n[order]
    pos, neg = (np.cumsum(weights * side, axis=1)[:, last] for side in (positive, ~positive))
    pos, neg = (np.pad(side, ((0, 0), (1, 0))) for side in (pos, neg))  # above the highest score
    for w in np.flatnonzero((pos[:, -1] > 0) & (neg[:, -1] > 0)):
        out[w] = np.interp(GRID, neg[w] / neg[w, -1], pos[w] / pos[w, -1])
    return out
