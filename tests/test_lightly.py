"""Losses, projection head, Sinkhorn and cosine equal lightly's; tests/oracle_lightly.py says where they part."""

import pytest

pytest.importorskip("torch", reason="torch is the oracle of these tests")
pytest.importorskip("lightly", reason="lightly is the oracle of these tests")

from oracle_lightly import COMPARISONS

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # in lightly


@pytest.mark.parametrize("name", COMPARISONS)
def test_equals_lightly(name):
    errors = COMPARISONS[name]()
    assert max(errors.values()) <= 1e-5, errors
