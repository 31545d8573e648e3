"""Acceptance line 6 of the learning algorithm, `make accept-learning`: deliberate failures name themselves.

Each case trains the nano recipe at batch 8 on data_prep's phantoms and ends soon after its warning fired.
"""

import time

import pytest
from failures import FAILURES, phantoms, run

from configs import nano

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
STEPS = 200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = phantoms(tmp_path_factory.mktemp("phantoms"), patients=24, long_side=384)
    print("\n6. | case | its warning | fired at step | others (step) | stopped the run | s |")
    return folder


def recipe(dataset):
    c = nano.get_config(str(dataset))
    c.batch_size, c.dbt_rows, c.steps = 8, 2, STEPS
    c.run.checkpoint_every = STEPS
    return c


@pytest.mark.parametrize("case", [*FAILURES, "healthy"])
def test_line_06(dataset, case, tmp_path, monkeypatch):
    failure, began = FAILURES.get(case), time.perf_counter()
    fired, error = run(recipe(dataset), tmp_path, failure, monkeypatch)
    expected = failure.expected if failure else "none"
    others = ", ".join(f"{name} ({step})" for name, step in fired.items() if name != expected) or "-"
    print(
        f"   | {case} | {expected} | {fired.get(expected, '-')} | {others} | "
        f"{'yes' if error else 'no'} | {time.perf_counter() - began:.0f} |"
    )
    if failure is None:
        assert not fired and error is None
    else:
        assert fired[expected] < STEPS and (error is not None) == failure.stops
