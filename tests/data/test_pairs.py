import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammodino_jax.data.crops import integral_image
from mammodino_jax.data.pairs import PairConfig, draw_windows, possible_pairs
from mammodino_jax.errors import UserError


def unknown(n):
    return np.full(n, np.nan, np.float32)


def test_offsets_by_slices():
    found = possible_pairs(np.arange(10), unknown(10), PairConfig(offsets=(2,), end_share=0.1))
    expected = {(k, k + s) for k in range(1, 9) for s in (-2, 2) if 1 <= k + s <= 8}
    assert {tuple(p) for p in found.tolist()} == expected and len(found) == len(expected)


def test_missing_slices_are_not_bridged():
    found = possible_pairs(np.array([0, 1, 4, 5, 9]), unknown(5), PairConfig(offsets=(1,), end_share=0))
    assert {tuple(p) for p in found.tolist()} == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_offsets_by_mm_take_the_nearest_slice():
    position = np.arange(8, dtype=np.float32) * 1.5
    found = possible_pairs(np.arange(8), position, PairConfig(offsets=(2.8,), unit="mm", end_share=0))
    assert {abs(int(a) - int(b)) for a, b in found} == {2}  # 3.0 mm
    assert len(found) == 2 * 6


def test_mm_below_the_spacing_or_unknown_gives_none():
    config = PairConfig(offsets=(1.0,), unit="mm")
    assert len(possible_pairs(np.arange(8), np.arange(8) * 3.0, config)) == 0
    assert len(possible_pairs(np.arange(8), unknown(8), config)) == 0


@settings(deadline=None)
@given(st.integers(0, 60), st.sampled_from([(1,), (1, 2), (5,)]), st.floats(0, 0.49))
def test_pairs_stay_inside_and_are_symmetric(n, offsets, end_share):
    found = possible_pairs(np.arange(n), unknown(n), PairConfig(offsets=offsets, end_share=end_share))
    ends = int(end_share * n)
    assert found.shape == (len(found), 2)
    pairs = {tuple(p) for p in found.tolist()}
    assert all(ends <= k < n - ends and abs(k - j) in offsets for k, j in pairs)
    assert pairs == {(j, k) for k, j in pairs}
    assert bool(pairs) == (n - 2 * ends > min(offsets))


@settings(deadline=None)
@given(
    st.integers(20, 90),
    st.integers(20, 90),
    st.sampled_from([0.0, 0.1]),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_windows_of_a_pair_are_equal_up_to_the_jitter(height, width, jitter, rho, seed):
    mask = np.hypot(*(np.mgrid[:height, :width] / [[[height]], [[width]]])) < 1
    config = PairConfig(scale=(0.3, 1.0), jitter=jitter, coverage=rho)
    one, two = draw_windows(integral_image(mask), config, (3 / 4, 4 / 3), 0.5, np.random.default_rng(seed))
    h, w = one.height, one.width
    assert (two.height, two.width, two.flip) == (h, w, one.flip)
    assert abs(two.y - one.y) <= jitter * h and abs(two.x - one.x) <= jitter * w
    inside = mask[two.y : two.y + h, two.x : two.x + w]
    assert inside.shape == (h, w) and two.coverage == inside.sum() / (h * w)  # exact, and in the record
    assert two.coverage >= rho or one.fallback
    assert jitter or one == two


def test_jitter_reaches_both_sides_of_both_axes():
    rng, config = np.random.default_rng(0), PairConfig(scale=(0.5, 0.5), jitter=0.1)
    full = integral_image(np.ones((100, 100), bool))
    pairs = [draw_windows(full, config, (1, 1), 0, rng) for _ in range(300)]
    shift = np.array([(b.y - a.y, b.x - a.x) for a, b in pairs])
    assert (shift.min(0) <= -6).all() and (shift.max(0) >= 6).all() and abs(np.corrcoef(shift.T)[0, 1]) < 0.2


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "both"},
        {"unit": "cm"},
        {"offsets": ()},
        {"offsets": (1.5,)},
        {"offsets": (0,)},
        {"end_share": 0.5},
        {"jitter": -0.1},
    ],
)
def test_bad_config_is_named(bad):
    with pytest.raises(UserError, match=f"pairs.{next(iter(bad))}"):
        PairConfig(**bad)
