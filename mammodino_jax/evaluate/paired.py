"""Paired tests between two encoders that were scored on the same items.

n items of P patients, W bootstrap draws, a positives and b negatives.
"""

import numpy as np
from scipy import stats

from mammodino_jax.evaluate.metrics import Resampled, Scored, resample


def paired(one: list[Scored], other: list[Scored], draws: int, seed: int, metric: str = "auc") -> dict | None:
    """The `difference` of a metric, `one` minus `other`, over draws of patients that both share.

    Raises:
      ValueError: folds, repeats, patients, labels or items of the two differ.
    """
    same_items(one, other)
    return difference(*(resample(folds, draws, seed, [metric])[0] for folds in (one, other)))


def difference(a: Resampled, b: Resampled) -> dict | None:
    """A metric of one encoder minus that of another, resampled with the same items, draws and seed.

    With d the difference and d* that of a draw, its distance |d* - d| widened by sqrt(P / (P - 1)):
    p = (1 + number of draws with |d* - d| >= |d|) / (W + 1), two-sided, and the interval is d plus and minus
    the 95th percentile of |d* - d|, so that p < 0.05 where 0 lies outside. Symmetric because differences
    are nearly so: percentile and BCa intervals of them hold the truth less often.

    Returns:
      difference, low, high, p, draws_used; None where either metric is not computed, or half of the draws or
      more are not.
    """
    d, drawn = a.value - b.value, a.drawn - b.drawn
    known = drawn[np.isfinite(drawn)]
    if a.patients < 2 or not np.isfinite(d) or len(known) <= len(drawn) / 2:
        return None
    distance = np.abs(known - d) * np.sqrt(a.patients / (a.patients - 1))
    p = (1 + (distance >= abs(d) - 1e-9).sum()) / (len(known) + 1)  # equal encoders: p = 1
    half = float(np.quantile(distance, 0.95))
    return {"difference": d, "low": d - half, "high": d + half, "p": float(p), "draws_used": len(known)}


def same_items(one: list[Scored], other: list[Scored]) -> None:
    """Raise a ValueError where two encoders were not scored on the same items of the same folds."""
    if [f.repeat for f in one] != [f.repeat for f in other]:
        raise ValueError(f"{len(one)} and {len(other)} folds, or their repeats differ")
    for number, (f, g) in enumerate(zip(one, other, strict=True)):
        for name in ("patient", "label", "item"):
            if not np.array_equal(getattr(f, name), getattr(g, name)):
                raise ValueError(f"fold {number}: {name}s differ")


def delong(one: list[Scored], other: list[Scored]) -> dict:
    """DeLong's test of two correlated AUCs (DeLong, DeLong & Clarke-Pearson, Biometrics 1988).

    An item's structural component is the share of the other class that it is ranked right against, a tie
    counting half; midranks give all of them in O(n log n) (Sun & Xu, IEEE Signal Process. Lett. 2014).

    Returns:
      auc (of both), difference, z and p (two-sided; NaN where the difference cannot vary).

    Raises:
      ValueError: not one fold of two classes with one item a patient, which the test assumes, or `one` and
      `other` differ in items.
    """
    same_items(one, other)
    if len(one) > 1:
        raise ValueError(f"DeLong's test needs one fold, these are {len(one)}")
    label, patient = one[0].label, one[0].patient
    if len(np.unique(patient)) < len(patient):
        raise ValueError("DeLong's test needs one item a patient")
    if one[0].score.shape[1] != 2 or len(np.unique(label)) < 2:
        raise ValueError("DeLong's test needs two classes, with items of both")
    positive = label == 1
    a, b = positive.sum(), (~positive).sum()
    right_2a, right_2b = [], []
    for folds in (one, other):
        score = folds[0].score[:, 1]
        ranks = stats.rankdata(score)
        right_2a.append((ranks[positive] - stats.rankdata(score[positive])) / b)
        right_2b.append(1 - (ranks[~positive] - stats.rankdata(score[~positive])) / a)
    auc = np.mean(right_2a, axis=1)
    d = auc[0] - auc[1]
    variance = sum(np.var(np.subtract(*r), ddof=1) / len(r[0]) for r in (right_2a, right_2b))
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.divide(d, np.sqrt(variance))
    return {
        "auc": auc.tolist(),
        "difference": float(d),
        "z": float(z),
        "p": float(2 * stats.norm.sf(abs(z))),
    }


def holm(p: list[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p-values that control the error over the whole family."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted.tolist()
