"""Intervals of figures that are sums over images, by weighting the images of each patient together.

n images, P patients, W weightings: all images once, then the bootstrap's draws, then each patient left out.
"""

import numpy as np

from mammodino_jax.evaluate.metrics import LEFT_OUT, Resampled, interval


def weightings(patient_n, draws: int, seed: int) -> np.ndarray:
    """How often each image counts, f64 [W, n].

    Equal patients and seeds give equal draws, so that differences of encoders are paired.
    """
    patients, place_n = np.unique(np.asarray(patient_n).astype(str), return_inverse=True)
    P, rng = len(patients), np.random.default_rng(seed)
    drawn = rng.multinomial(P, np.full(P, 1 / P), size=draws)
    left_out = rng.permutation(P)[:LEFT_OUT, None] != np.arange(P)
    return np.concatenate([np.ones((1, P)), drawn, left_out])[:, place_n]


def estimate(values_W, patient_n, draws: int) -> dict:
    """{"value", "low", "high"} of a figure under `weightings`; None: not computed, or no interval."""
    value, drawn, left_out = values_W[0], values_W[1 : draws + 1], values_W[draws + 1 :]
    patients = len(np.unique(np.asarray(patient_n).astype(str)))
    low, high = interval(Resampled(float(value), drawn, left_out, patients))
    return {"value": float(value) if np.isfinite(value) else None, "low": low, "high": high}


def mean(value_n, patient_n, draws: int, seed: int) -> dict:
    """`estimate` of the mean over images, with their number "n"."""
    value_n = np.asarray(value_n, np.float64)
    if not len(value_n):
        return {"value": None, "low": None, "high": None, "n": 0}
    weights = weightings(patient_n, draws, seed)
    with np.errstate(invalid="ignore"):
        return estimate(weights @ value_n / weights.sum(axis=1), patient_n, draws) | {"n": len(value_n)}
