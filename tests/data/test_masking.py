import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mammodino_jax.data.crops import Window, integral_image, patch_coverage
from mammodino_jax.data.masking import (
    MaskConfig,
    draw_mask,
    draw_place,
    lesion_patches,
    pack_mask,
    plain,
    slots,
)
from mammodino_jax.errors import UserError


def half_breast(grid):
    """Tissue share falling off to the right, exactly 0 in the last columns."""
    y, x = np.mgrid[:grid, :grid] / grid
    return np.clip(1.4 - 1.6 * x - 0.3 * np.abs(y - 0.5), 0, 1).astype(np.float32)


def dinov2_mask(grid, target, rng):
    """DINOv2's generator, written plainly from its description (oracle)."""
    mask, count = np.zeros((grid, grid), bool), 0
    while count < target:
        added = 0
        for _ in range(10):
            area = rng.uniform(*sorted((4, target - count)))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < grid and w < grid:
                y, x = rng.integers(0, grid - h + 1), rng.integers(0, grid - w + 1)
                added = int((~mask[y : y + h, x : x + w]).sum())
                if 0 < added <= target - count:
                    mask[y : y + h, x : x + w] = True
                    break
                added = 0
        if not added:
            break
        count += added
    return mask


@settings(deadline=None, max_examples=150)
@given(
    st.integers(2, 37), st.floats(0.02, 0.9), st.floats(0, 0.09), st.floats(0, 1),
    st.sampled_from(["tissue", "all"]), st.sampled_from([0.0, 1.0, 3.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_count_is_exact_and_only_tissue_is_masked(grid, low, spread, min_coverage, of, strength, seed):
    config = MaskConfig((low, low + spread), of, max(min_coverage, 1e-3), strength)
    rng = np.random.default_rng(seed)
    coverage = (rng.random((grid, grid)) * rng.choice([0.2, 1.0])).astype(np.float32)
    mask = draw_mask(coverage, config, rng)
    tissue = coverage >= config.min_coverage
    base = tissue.sum() if of == "tissue" else grid * grid
    assert not (mask & ~tissue).any()
    assert min(int(low * base), tissue.sum()) <= mask.sum() <= min(int((low + spread) * base), tissue.sum())
    index, weight = pack_mask(mask, 1, slots(config, grid * grid))
    assert weight.sum() == pytest.approx(1 if mask.any() else 0, abs=1e-5)
    assert set(index[weight > 0]) == set(np.flatnonzero(mask) + grid * grid)


def test_fixed_ratio_gives_a_fixed_count():
    config = MaskConfig(ratio=(0.3, 0.3))
    coverage = half_breast(37)
    counts = {int(draw_mask(coverage, config, np.random.default_rng(i)).sum()) for i in range(50)}
    assert counts == {int(0.3 * (coverage >= 0.5).sum())}


def test_no_tissue_gives_empty_slots():
    mask = draw_mask(np.zeros((16, 16), np.float32), MaskConfig(), np.random.default_rng(0))
    index, weight = pack_mask(mask, 1, 128)
    assert not mask.any() and not weight.any() and not index.any()


def test_empty_slots_repeat_a_masked_patch():
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = mask[3, 3] = True
    index, weight = pack_mask(mask, 0, 5)
    assert index.tolist() == [6, 15, 6, 6, 6] and index.dtype == np.int32
    assert weight.tolist() == [0.5, 0.5, 0, 0, 0] and weight.dtype == np.float32
    assert pack_mask(mask, 1, 5)[0].tolist() == [22, 31, 22, 22, 22]


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_block_places_follow_coverage_to_the_strength(strength):
    coverage, h, w = half_breast(8), 3, 2
    padded = np.zeros((9, 9))
    padded[1:, 1:] = coverage.cumsum(0, dtype=np.float64).cumsum(1)
    rng = np.random.default_rng(0)
    observed = np.zeros((6, 7))
    for _ in range(8000):
        observed[draw_place(padded, h, w, strength, rng)] += 1
    boxes = np.lib.stride_tricks.sliding_window_view(coverage.astype(float), (h, w)).sum((2, 3))
    law = boxes**strength / (boxes**strength).sum()
    possible = law > 1e-9
    assert observed[~possible].sum() <= 1
    expected = 8000 * law[possible] / law[possible].sum()
    chi2 = ((observed[possible] - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi2, possible.sum() - 1) > 1e-3


def test_strength_0_without_minimum_is_dinov2():
    """Per-patch frequencies of the whole generator against an oracle; tissue plays no part."""
    grid, n = 16, 3000
    config = MaskConfig(ratio=(0.3, 0.3), of="all", min_coverage=0.0, strength=0.0)
    ours, theirs = np.zeros((grid, grid)), np.zeros((grid, grid))
    for i in range(n):
        ours += draw_mask(half_breast(grid), config, np.random.default_rng(i))
        theirs += dinov2_mask(grid, int(0.3 * grid * grid), np.random.default_rng(10**6 + i))
    assert theirs.sum() == pytest.approx(ours.sum(), rel=0.01)  # theirs may end a little short of the target
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.97  # fewer at the border, alike
    assert np.abs(ours - theirs).max() / n < 0.05


def test_weighting_moves_masks_into_tissue():
    coverage = half_breast(37)
    masked = {}
    for strength in (0.0, 1.0):
        config = MaskConfig(ratio=(0.2, 0.2), of="all", min_coverage=1e-6, strength=strength)
        drawn = [coverage[draw_mask(coverage, config, np.random.default_rng(i))].mean() for i in range(150)]
        masked[strength] = np.mean(drawn)
    assert masked[1.0] > masked[0.0] + 0.05


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 60),
    st.integers(0, 50),
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
    st.integers(1, 9),
)
def test_lesion_patches_are_those_that_show_the_box(y, x, h, w, flip, grid):
    """A box as a mask of its own: patches that hold any of it. The window is 40 x 33 at (7, 5) of 60 x 50."""
    lesion = np.zeros((60, 50), bool)
    lesion[y : y + h, x : x + w] = True
    share = lesion[7:47, 5:38].mean()
    window = Window(7, 5, 40, 33, flip, share, False, False)
    shown = patch_coverage(integral_image(lesion), window, grid) > 1e-6
    boxes = np.float32([[y, x, y + h, x + w], [-9, -9, 7, 5]])  # the second ends where the window begins
    np.testing.assert_array_equal(lesion_patches(boxes, window, grid), shown)


@settings(deadline=None, max_examples=100)
@given(st.integers(3, 20), st.floats(0.1, 0.6), st.floats(0, 1), st.integers(0, 10**6))
def test_lesions_are_masked_first_or_never(grid, ratio, share, seed):
    rng = np.random.default_rng(seed)
    coverage, lesions = rng.random((grid, grid)).astype(np.float32), rng.random((grid, grid)) < share
    tissue = coverage >= 0.5
    count = int(ratio * tissue.sum())
    masks = {}
    for mode in ("ignore", "always", "never"):
        config = MaskConfig((ratio, ratio), lesions=mode)
        masks[mode] = draw_mask(coverage, config, np.random.default_rng(seed), lesions)
        assert not (masks[mode] & ~tissue).any()
    without = draw_mask(coverage, MaskConfig((ratio, ratio)), np.random.default_rng(seed))
    np.testing.assert_array_equal(masks["ignore"], without)
    wanted = lesions & tissue
    assert masks["always"].sum() == count
    assert (masks["always"] & wanted).sum() == min(count, wanted.sum())
    assert masks["never"].sum() == min(count, (tissue & ~lesions).sum())
    assert not (masks["never"] & lesions).any()


def test_plain_masks_ignore_tissue_and_lesions():
    config = plain(MaskConfig(ratio=(0.2, 0.3), min_coverage=0.9, strength=2.0, lesions="never"))
    one, two = (draw_mask(c, config, np.random.default_rng(3)) for c in (half_breast(16), np.zeros((16, 16))))
    np.testing.assert_array_equal(one, two)
    assert 0.2 * 256 - 1 < one.sum() <= 0.3 * 256


def test_slots_hold_the_largest_mask():
    config = MaskConfig(of="all", min_coverage=0.0, strength=0.0)
    assert slots(config, 37 * 37) == 684
    full = [draw_mask(np.ones((4, 4), np.float32), config, np.random.default_rng(i)).sum() for i in range(99)]
    assert max(full) <= slots(config, 16)


@pytest.mark.parametrize(
    "bad",
    [
        {"ratio": (0.5, 0.1)},
        {"ratio": (0.0, 0.5)},
        {"of": "breast"},
        {"strength": -1.0},
        {"min_coverage": 0.0},
        {"lesions": "mask"},
    ],
)
def test_bad_config_is_named(bad):
    with pytest.raises(UserError, match=f"mask.{next(iter(bad))}"):
        MaskConfig(**bad)
