"""Intervals of means over images whose patients come together."""

import numpy as np
import pytest

from mammodino_jax.evaluate import intervals


def test_weightings_take_a_patient_as_a_whole():
    patient = np.array(["b", "a", "b", "c"], object)
    weights = intervals.weightings(patient, 50, 0)
    assert weights.shape == (1 + 50 + 3, 4)
    assert (weights[0] == 1).all()
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert (weights[1:51, [0, 1, 3]].sum(axis=1) == 3).all()
    assert sorted(map(tuple, weights[51:, [0, 1, 3]])) == [(0, 1, 1), (1, 0, 1), (1, 1, 0)]


def test_more_images_of_the_same_patients_do_not_narrow_the_interval():
    value, patient = np.random.default_rng(0).normal(size=60), np.arange(60)
    once = intervals.mean(value, patient, 1000, 0)
    often = intervals.mean(np.tile(value, 9), np.tile(patient, 9), 1000, 0)
    assert once["value"] == pytest.approx(value.mean()) and (once["n"], often["n"]) == (60, 540)
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))
    half = (once["high"] - once["low"]) / 2
    assert half == pytest.approx(2.0 * value.std(ddof=1) / 60**0.5, rel=0.15)  # Student's


def test_what_is_not_computed_is_none():
    assert intervals.mean([], [], 1000, 0) == {"value": None, "low": None, "high": None, "n": 0}
    assert intervals.mean([0.5, 0.7], ["p", "p"], 1000, 0)["low"] is None  # one patient has no interval
    assert intervals.estimate(np.full(1003, np.nan), ["p", "q"], 1000)["value"] is None
