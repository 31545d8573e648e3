"""95 % intervals of figures that are means over images, by drawing patients with replacement.

n images, W draws.
"""

import numpy as np


def patient_weights(patient_n, draws: int, seed: int) -> np.ndarray:
    """How often each image counts in each draw, f32 [draws, n]: all images of a patient come together.

    Equal patients and seeds give equal draws, so that differences of encoders are paired.
    """
    patients, place_n = np.unique(np.asarray(patient_n).astype(str), return_inverse=True)
    even = np.full(len(patients), 1 / len(patients))
    counts = np.random.default_rng(seed).multinomial(len(patients), even, size=draws)
    return counts.astype(np.float32)[:, place_n]


def figure(value: float, drawn_W) -> dict:
    """{"value", "low", "high"}; None where not computed, or where half of the draws or more are NaN."""
    known = np.asarray(drawn_W)[np.isfinite(drawn_W)]
    if not np.isfinite(value) or len(known) <= len(drawn_W) / 2:
        return {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def mean_figure(value_n, patient_n, draws: int, seed: int) -> dict:
    """`figure` of the mean over images, with their number "n"."""
    value_n = np.asarray(value_n, np.float64)
    if not len(value_n):
        return {"value": None, "low": None, "high": None, "n": 0}
    weights = patient_weights(patient_n, draws, seed)
    return figure(value_n.mean(), weights @ value_n / weights.sum(1)) | {"n": len(value_n)}
