"""95 % intervals hold the truth in simulated data sets; tests/acceptance/test_evaluation_statistics.py has more."""

import numpy as np
import pytest
from binormal import Scenario, as_items, as_new_patients, coverage

DATA_SETS, DRAWS = 120, 250
SPLIT = Scenario("one test split", 60, 6, 0.4, (0.8,))
REPEATED = Scenario("3 folds x 3 repeats", 100, 2, 0.4, (0.8,), folds=3, repeats=3)
PAIRED = Scenario("difference", 100, 2, 0.4, (0.85, 0.75))


def lowest(nominal=0.93):
    """What intervals of that coverage reach in all but one of a thousand sets of simulations."""
    return nominal - 3.1 * np.sqrt(nominal * (1 - nominal) / DATA_SETS)


@pytest.mark.parametrize("scenario", [SPLIT, REPEATED, PAIRED], ids=lambda s: s.name)
def test_intervals_hold_the_truth(scenario):
    inside, below, above = coverage(scenario, DATA_SETS, DRAWS)
    assert inside >= lowest()
    assert max(below, above) <= 0.04 + 3.1 * np.sqrt(0.04 * 0.96 / DATA_SETS)


@pytest.mark.parametrize(("scenario", "change"), [(SPLIT, as_items), (REPEATED, as_new_patients)])
def test_they_would_not_with_items_or_repeats_as_patients(scenario, change):
    assert coverage(scenario, DATA_SETS, DRAWS, change)[0] < lowest()
