"""Acceptance of the evaluation, line 2: coverage of 95 % intervals by simulation. It prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_evaluation_statistics.py

About three minutes of one core. Metrics, DeLong and the bootstrap are held against scikit-learn, a direct
computation and scipy in tests/evaluate/test_metrics.py and test_paired.py; a scaled-down twin of this is
tests/evaluate/test_coverage.py.
"""

import time

import pytest
from binormal import Scenario, as_items, as_new_patients, coverage

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
DATA_SETS = 2000  # standard error of a coverage of 95 %: 0.5 %
BAND = (0.93, 0.97)

SCENARIOS = [
    Scenario("one test split", 200, 4, 0.3, (0.8,)),
    Scenario("one test split, high AUC", 150, 2, 0.5, (0.95,)),
    Scenario("one test split, 30 of 300 patients positive", 300, 2, 0.1, (0.75,)),
    Scenario("5 folds", 200, 2, 0.3, (0.8,), folds=5),
    Scenario("5 folds x 3 repeats", 200, 2, 0.3, (0.8,), folds=5, repeats=3),
    Scenario("difference, none", 200, 2, 0.3, (0.8, 0.8)),
    Scenario("difference of 0.1, 5 folds", 200, 2, 0.3, (0.85, 0.75), folds=5),
]
CLUSTERED = Scenario("one test split", 150, 10, 0.3, (0.8,))


def told(name: str, scenario: Scenario, found: tuple[float, float, float], began: float) -> None:
    aucs = " and ".join(map(str, scenario.aucs))
    seconds = time.process_time() - began
    print(f"\n2. {name}, {scenario.patients} patients x {scenario.items} items, AUC {aucs}: interval holds the "
          f"truth {found[0]:.1%}, lies below {found[1]:.1%}, above {found[2]:.1%} ({seconds:.0f} s CPU)",
          flush=True)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_line_2_coverage(scenario):
    began = time.process_time()
    found = coverage(scenario, DATA_SETS)
    told(scenario.name, scenario, found, began)
    assert BAND[0] <= found[0] <= BAND[1]


@pytest.mark.parametrize(("scenario", "change"), [(CLUSTERED, as_items), (SCENARIOS[4], as_new_patients)])
def test_line_2_wrong_units_are_noticed(scenario, change):
    """Resampling items, or the patients of each repeat apart, does not hold the truth: the band can fail."""
    began = time.process_time()
    found = coverage(scenario, 300, change=change)
    told(f"{scenario.name}, wrong on purpose ({change.__name__})", scenario, found, began)
    assert found[0] < BAND[0] - 0.05
