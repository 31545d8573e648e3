"""Metrics of probes, with intervals that resample patients.

n test items, C classes, F folds (of all repeats of a cross-validation), P patients; W weightings of the
items, how often each of them counts: every metric is computed for many weightings at once.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

AT_ONCE = 4_000_000  # weights of items held at once: 32 MB
LEFT_OUT = 2000  # patients left out in turn, at most: they only tell how skewed the statistic is


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a probe said about the test items of one fold."""

    patient: np.ndarray  # [n]
    label: np.ndarray  # i64 [n], 0..C-1
    score: np.ndarray  # float [n, C]; a column of NaN: a class that the training part lacks
    predicted: np.ndarray  # i64 [n]
    item: np.ndarray | None = None  # str [n]: ids of the items, for score files
    repeat: int = 0  # of the cross-validation: its folds are disjoint, those of two repeats are not


def _weights(weights_Wn, n: int) -> np.ndarray:
    return np.ones((1, n)) if weights_Wn is None else np.asarray(weights_Wn, np.float64)


def _ratio(a_W: np.ndarray, b_W: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b_W > 0, a_W / b_W, np.nan)


def _ranked(positive_n, score_n, weights_Wn) -> tuple[np.ndarray, ...]:
    """What the ROC curve holds at the score of each of the p positives, highest first.

    Returns:
      weight of the positive; of all positives at its score or above; of negatives above; of negatives at its
      score or above: float64 [W, p] each; and of all negatives [W]. No positives where a score is NaN.
    """
    positive_n, score_n = np.asarray(positive_n, bool), np.asarray(score_n, np.float64)
    weights_Wn = _weights(weights_Wn, len(score_n))
    if np.isnan(score_n).any():
        positive_n = np.zeros_like(positive_n)
    order = np.argsort(-score_n, kind="stable")
    pos, neg = order[positive_n[order]], order[~positive_n[order]]
    at, of_neg = -score_n[pos], -score_n[neg]  # ascending
    weight = weights_Wn[:, pos]
    tp = np.cumsum(weight, axis=1)[:, np.searchsorted(at, at, "right") - 1]
    fp = np.zeros((len(weights_Wn), len(neg) + 1))
    np.cumsum(weights_Wn[:, neg], axis=1, out=fp[:, 1:])
    above, level = (fp[:, np.searchsorted(of_neg, at, side)] for side in ("left", "right"))
    return weight, tp, above, level, fp[:, -1]


def auc(positive_n, score_n, weights_Wn=None) -> np.ndarray:
    """Area under the ROC curve, a tie counting half.

    Args:
      positive_n: bool [n].
      score_n: float [n], higher is more positive.
      weights_Wn: how often each item counts, [W, n]; None: once, W = 1.

    Returns:
      float64 [W]; NaN where a weighting leaves only one class, or where a score is NaN. So do the other
      metrics of one class against the rest.
    """
    weight, _, above, level, N = _ranked(positive_n, score_n, weights_Wn)
    outranked = (weight * (N[:, None] - (above + level) / 2)).sum(axis=1)
    return _ratio(outranked, weight.sum(axis=1) * N)


def average_precision(positive_n, score_n, weights_Wn=None) -> np.ndarray:
    """Sum over thresholds of precision times the step in recall, not interpolated (scikit-learn's): [W]."""
    weight, tp, _, level, N = _ranked(positive_n, score_n, weights_Wn)
    precision = tp / np.maximum(tp + level, 1e-300)  # 0 / 0 above the first item that counts
    return _ratio((weight * precision).sum(axis=1), weight.sum(axis=1) * (N > 0))


def sensitivity_at_90_specificity(positive_n, score_n, weights_Wn=None) -> np.ndarray:
    """The highest sensitivity at a threshold whose specificity is 0.9 or more: float64 [W].

    A threshold is a score, tied items fall on one side of it; between thresholds nothing is interpolated.
    """
    weight, tp, _, level, N = _ranked(positive_n, score_n, weights_Wn)
    found = np.where(level <= 0.1 * N[:, None], tp, 0).max(axis=1, initial=0)
    return _ratio(found, weight.sum(axis=1) * (N > 0))


def pf1(positive_n, score_n, weights_Wn=None) -> np.ndarray:
    """Probabilistic F1 (beta 1) of the RSNA 2022 challenge: every item counts by its probability. [W].

    F1 of precision sum(p y) / sum(p) and recall sum(p y) / sum(y); no threshold, but calibration matters.
    """
    positive_n, p = np.asarray(positive_n, bool), np.clip(score_n, 0, 1)
    weights_Wn = _weights(weights_Wn, len(p))
    P, both = weights_Wn @ positive_n, weights_Wn @ ~positive_n > 0
    return _ratio(2 * (weights_Wn @ (p * positive_n)), (weights_Wn @ p + P) * (both & (P > 0)))


def balanced_accuracy(label_n, predicted_n, weights_Wn=None) -> np.ndarray:
    """Mean recall over the classes that occur in `label_n`: [W], NaN where a weighting loses one of them."""
    label_n, hit_n = np.asarray(label_n), np.equal(label_n, predicted_n)
    weights_Wn = _weights(weights_Wn, len(label_n))
    of_class = [label_n == c for c in np.unique(label_n)]
    return np.mean([_ratio(weights_Wn @ (c & hit_n), weights_Wn @ c) for c in of_class], axis=0)


RANKED = {
    "auc": auc,
    "average_precision": average_precision,
    "sensitivity_at_90_specificity": sensitivity_at_90_specificity,
    "pf1": pf1,
}
DECIDED = {"balanced_accuracy": balanced_accuracy}
BINARY = ("sensitivity_at_90_specificity", "pf1")
METRICS = ("auc", "average_precision", "balanced_accuracy", *BINARY)


def _values(metric: str, fold: Scored, weights_Wn=None) -> np.ndarray:
    """A metric in one fold: [K, W]; K: the classes it is averaged over, 1 if it is one figure."""
    if metric in DECIDED:
        return DECIDED[metric](fold.label, fold.predicted, weights_Wn)[None]
    classes = fold.score.shape[1]
    classes = range(1, 2) if classes == 2 else range(classes)
    return np.array([RANKED[metric](fold.label == c, fold.score[:, c], weights_Wn) for c in classes])


def _over_folds(values_FKW: np.ndarray) -> np.ndarray:
    """Mean over the folds that could score a class, then over classes: [W], NaN where one had no fold."""
    known = np.isfinite(values_FKW)
    return _ratio(np.where(known, values_FKW, 0).sum(axis=0), known.sum(axis=0)).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Resampled:
    """A metric, computed in each fold and averaged over folds, and how it varies over patients."""

    value: float  # NaN: not computed
    drawn: np.ndarray  # [W], patients drawn with replacement; NaN: a draw without one of the classes
    left_out: np.ndarray  # [P or LEFT_OUT], one patient left out
    patients: int


def resample(folds: list[Scored], draws: int, seed: int, metrics: Sequence[str]) -> list[Resampled]:
    """Bootstrap and jackknife of metrics over patients, the probes as trained; a `Resampled` a metric.

    A draw takes all items of a patient together, and the same patients in all folds and repeats: they are
    the same people, so that repeats do not narrow an interval as new patients would. Equal patients and seed
    give equal draws, so differences between encoders are paired.
    """
    patients = np.unique(np.concatenate([f.patient for f in folds]))
    P, places = len(patients), [np.searchsorted(patients, f.patient) for f in folds]
    rng = np.random.default_rng(seed)

    def values(counts_WP=None) -> list[np.ndarray]:
        by_fold = []
        for fold, place in zip(folds, places, strict=True):
            weights_Wn = None if counts_WP is None else counts_WP[:, place]
            by_fold.append([_values(metric, fold, weights_Wn) for metric in metrics])
        return [_over_folds(np.array(of_metric)) for of_metric in zip(*by_fold, strict=True)]

    size = max(1, AT_ONCE // max(P, *(len(p) for p in places)))
    drawn, left_out = [], []
    for begin in range(0, draws, size):
        rows = np.arange(min(size, draws - begin))[:, None]
        chosen = rng.integers(P, size=(len(rows), P)) + P * rows
        counts = np.bincount(chosen.ravel(), minlength=len(rows) * P)
        drawn.append(values(counts.reshape(-1, P).astype(np.float64)))
    away = rng.permutation(P)[:LEFT_OUT]
    for begin in range(0, len(away), size):
        left_out.append(values((away[begin : begin + size, None] != np.arange(P)).astype(np.float64)))
    parts = (values(), np.concatenate(drawn, axis=1), np.concatenate(left_out, axis=1))
    return [Resampled(float(v[0]), d, left, P) for v, d, left in zip(*parts, strict=True)]


def interval(found: Resampled) -> tuple[float | None, float | None]:
    """95 % interval by the bias-corrected and accelerated bootstrap (BCa, Efron 1987).

    Percentiles of the draws, moved for their bias and for the skewness that leaving patients out shows:
    plain percentiles lie too high near an AUC of 1 and with few positives. Widened for few patients by
    Student's t and P / (P - 1) (Hesterberg 2015).

    Returns:
      low, high; None where the metric is not computed, or half of the draws or more are not.
    """
    P, drawn = found.patients, found.drawn[np.isfinite(found.drawn)]
    if P < 2 or not np.isfinite(found.value) or len(drawn) <= len(found.drawn) / 2:
        return None, None
    tied = 1e-9  # the same items summed in another order
    below = ((drawn < found.value - tied).mean() + (drawn <= found.value + tied).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1)))
    left_out = found.left_out[np.isfinite(found.left_out)]
    skewness = stats.skew(left_out) if len(left_out) and np.ptp(left_out) > tied else 0.0
    ends = bias + np.array([-1, 1]) * stats.t.ppf(0.975, P - 1) * np.sqrt(P / (P - 1))
    moved = ends / np.maximum(1 + skewness / (6 * np.sqrt(P)) * ends, 1e-3)
    return tuple(float(v) for v in np.quantile(drawn, stats.norm.cdf(bias + moved)))


def summarise(
    folds: list[Scored], draws: int, seed: int, metrics: Sequence[str] = METRICS
) -> dict[str, dict]:
    """Metrics of a probe with 95 % intervals, from the folds of one or several repeats.

    AUC and average precision are those of class 1 where there are two classes, else the mean over classes of
    one against the rest (macro). Scores of two folds are never ranked against each other: a metric is
    computed in each fold, then averaged. The interval is over patients (`resample`, `interval`); what other
    seeds of the folds change is told apart from it, by `seed_std`.

    Returns:
      {metric: {value, low, high (None where not computed: no fold has items both in and out of a class),
      draws_used, folds (a value each), seed_std (standard deviation over repeats of their values, None with
      one repeat), not_computed (how many of the values, one a fold and class, could not be computed)}};
      the metrics of two classes only (`BINARY`) are left out where there are more.
    """
    if folds[0].score.shape[1] != 2:
        metrics = [metric for metric in metrics if metric not in BINARY]
    repeats = np.array([f.repeat for f in folds])
    out = {}
    for metric, found in zip(metrics, resample(folds, draws, seed, metrics), strict=True):
        by_fold = np.array([_values(metric, f) for f in folds])  # [F, K, 1]
        by_repeat = [_over_folds(by_fold[repeats == r])[0] for r in np.unique(repeats)]
        low, high = interval(found)
        out[metric] = {
            "value": _number(found.value),
            "low": low,
            "high": high,
            "draws_used": int(np.isfinite(found.drawn).sum()),
            "folds": [_number(v) for v in by_fold.mean(axis=(1, 2))],
            "seed_std": _number(np.std(by_repeat, ddof=1)) if len(by_repeat) > 1 else None,
            "not_computed": int(np.isnan(by_fold).sum()),
        }
    return out


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
