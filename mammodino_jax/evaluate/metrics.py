"""AUC and balanced accuracy, with intervals that resample patients.

n test items, C classes, F folds, P patients of a fold, W bootstrap draws.
"""

import dataclasses

import numpy as np


def auc(positive_n, score_n, weights_Wn=None) -> np.ndarray:
    """Area under the ROC curve, a tie counting half, for several weightings of the items at once.

    Args:
      positive_n: bool [n].
      score_n: float [n], higher is more positive.
      weights_Wn: how often each item counts, [W, n]; None: once, W = 1.

    Returns:
      float64 [W]; NaN where a weighting leaves only one class, or where a score is NaN.
    """
    positive_n, score_n = np.asarray(positive_n, bool), np.asarray(score_n, np.float64)
    weights_Wn = np.ones((1, len(score_n))) if weights_Wn is None else weights_Wn
    if not len(score_n) or np.isnan(score_n).any():
        return np.full(len(weights_Wn), np.nan)
    order = np.argsort(score_n, kind="stable")
    ties = np.flatnonzero(np.r_[True, np.diff(score_n[order]) != 0])  # where each run of equal scores begins
    weights, positive_n = weights_Wn[:, order], positive_n[order]
    pos = np.add.reduceat(weights * positive_n, ties, axis=1)
    neg = np.add.reduceat(weights * ~positive_n, ties, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    pairs = pos.sum(axis=1) * neg.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(pairs > 0, (pos * (below + neg / 2)).sum(axis=1) / pairs, np.nan)


def patient_weights(patient_n, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap weights [draws, n]: patients drawn with replacement, all items of a patient together."""
    patients, place_n = np.unique(patient_n, return_inverse=True)
    counts = rng.multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=draws)
    return counts[:, place_n]


def balanced_accuracy(label_n, predicted_n) -> float:
    """Mean recall over the classes that occur in `label_n`."""
    label_n, predicted_n = np.asarray(label_n), np.asarray(predicted_n)
    return float(np.mean([(predicted_n[label_n == c] == c).mean() for c in np.unique(label_n)]))


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a probe said about the test items of one fold."""

    patient: np.ndarray  # [n]
    label: np.ndarray  # i64 [n], 0..C-1
    score: np.ndarray  # float [n, C]; a column of NaN: a class that the training part lacks
    predicted: np.ndarray  # i64 [n]


def summarise(folds: list[Scored], draws: int, seed: int) -> dict:
    """AUC with its 95 % interval, and balanced accuracy, of a probe tested on disjoint folds.

    Two classes: the AUC of class 1. More: the mean over classes of one-vs-rest AUCs (macro). Scores of two
    folds are never ranked against each other: an AUC is computed in each fold, then averaged. The interval is
    the 2.5th to 97.5th percentile over draws of patients within folds; the probes stay as trained.

    Returns:
      auc, low, high (None where not computed: no fold has items both in and out of a class), draws_used,
      balanced_accuracy, fold_auc, and not_computed, how many of the F x C AUCs could not be computed.
    """
    classes = folds[0].score.shape[1]
    classes = range(1, 2) if classes == 2 else range(classes)
    once = np.array([[auc(f.label == c, f.score[:, c])[0] for c in classes] for f in folds])  # [F, C]
    drawn = []
    for number, f in enumerate(folds):  # the same draws for every encoder: differences are paired
        weights = patient_weights(f.patient, draws, np.random.default_rng([seed, number]))
        drawn.append([auc(f.label == c, f.score[:, c], weights) for c in classes])
    drawn = _over_folds(np.array(drawn))  # [F, C, W] -> [W]
    drawn = drawn[np.isfinite(drawn)]
    estimate = float(_over_folds(once[..., None])[0])
    low = high = None
    if np.isfinite(estimate) and len(drawn) >= draws / 2:
        low, high = (float(v) for v in np.percentile(drawn, [2.5, 97.5]))
    return {
        "auc": _number(estimate),
        "low": low,
        "high": high,
        "draws_used": len(drawn),
        "balanced_accuracy": float(np.mean([balanced_accuracy(f.label, f.predicted) for f in folds])),
        "fold_auc": [_number(v) for v in once.mean(axis=1)],
        "not_computed": int(np.isnan(once).sum()),
    }


def _over_folds(values_FCW: np.ndarray) -> np.ndarray:
    """Mean over the folds that could score a class, then over classes: [W], NaN where one had no fold."""
    known = np.isfinite(values_FCW)
    with np.errstate(invalid="ignore"):
        per_class = np.where(known, values_FCW, 0).sum(axis=0) / known.sum(axis=0)
    return per_class.mean(axis=0)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
