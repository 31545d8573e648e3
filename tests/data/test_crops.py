import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mammodino_jax.data.crops import (
    REJECTION_TRIES,
    CropConfig,
    Window,
    crop,
    draw_size,
    draw_window,
    integral_image,
    patch_coverage,
    random_generator,
    rekey,
    resample,
)
from mammodino_jax.errors import UserError

RATIO = (3 / 4, 4 / 3)


def window(y, x, h, w, flip=False, coverage=0.5):
    return Window(y, x, h, w, flip, coverage, False, False)


def blob(height, width, seed, share):
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.random((height, width)), (0, 0), 4)
    return smooth > np.quantile(smooth, 1 - share)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(8, 70), st.integers(8, 70), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31),
    st.sampled_from([(0.32, 1.0), (0.05, 0.32), (0.8, 1.0), (1.0, 1.0)]),
)  # fmt: skip
def test_coverage_is_exact_and_guaranteed(height, width, share, rho, seed, scale):
    mask = blob(height, width, seed, share)
    drawn = draw_window(integral_image(mask), scale, RATIO, rho, 0.5, random_generator(1, seed, 0))
    y, x, h, w = drawn[:4]
    inside = mask[y : y + h, x : x + w]
    assert inside.shape == (h, w)  # the window lies in the record
    assert drawn.coverage == inside.sum() / (h * w)
    sums = np.lib.stride_tricks.sliding_window_view(mask, (h, w)).sum((2, 3))
    if drawn.fallback:
        assert sums.max() < rho * h * w and inside.sum() == sums.max() and drawn.would_reject
    else:
        assert inside.sum() >= rho * h * w


@settings(deadline=None, max_examples=100)
@given(st.integers(8, 70), st.integers(8, 70), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_rejection_takes_the_first_good_draw_or_flags_the_best(height, width, share, rho, seed):
    mask, key = blob(height, width, seed, share), (1, seed, 0)
    law = ((0.05, 1.0), RATIO, rho, 0.5)
    drawn = draw_window(integral_image(mask), *law, random_generator(*key), "rejection")
    assert drawn == draw_window(integral_image(mask), *law, random_generator(*key), "rejection")
    rng, tried = random_generator(*key), []  # the same draws, written plainly
    rng.random()
    while len(tried) < REJECTION_TRIES and not (
        tried and tried[-1][1] >= rho * tried[-1][0][2] * tried[-1][0][3]
    ):
        h, w = draw_size(mask.shape, (0.05, 1.0), RATIO, rng)
        y, x = rng.integers(0, [height - h + 1, width - w + 1]).tolist()
        tried.append(((y, x, h, w), mask[y : y + h, x : x + w].sum()))
    coverage = [tissue / (place[2] * place[3]) for place, tissue in tried]
    good = tried[-1][1] >= rho * tried[-1][0][2] * tried[-1][0][3]
    best = -1 if good else int(np.argmax(coverage))
    assert drawn[:4] == tried[best][0] and drawn.coverage == coverage[best]
    assert drawn.fallback == (not good) and drawn.would_reject == (len(tried) > 1 or not good)


def test_rejection_shrinks_windows_where_size_first_does_not():
    """Half a frame of tissue at rho 0.9: few places for large windows, none for the largest."""
    mask = np.zeros((120, 100), bool)
    mask[:, :50] = True
    area = {}
    for sampler in ("size_first", "rejection"):
        drawn = [
            draw_window(integral_image(mask), (0.1, 0.5), RATIO, 0.9, 0, random_generator(0, i, 0), sampler)
            for i in range(400)
        ]
        area[sampler] = np.mean([w.height * w.width for w in drawn]) / mask.size
    assert area["size_first"] == pytest.approx(0.3, abs=0.02) and area["rejection"] < 0.22


def test_sides_are_log_uniform_in_record_pixels():
    rng = np.random.default_rng(0)
    sizes = np.array([draw_size((1000, 800), None, RATIO, rng, side=(50, 400)) for _ in range(4000)])
    side = np.log(sizes.prod(1)) / 2
    assert stats.kstest(side, stats.uniform(np.log(50), np.log(8)).cdf).pvalue > 1e-3
    largest = draw_size((100, 90), None, RATIO, rng, side=(500, 500))
    assert largest == (100, 90)  # the record is smaller: its largest window


def test_rho_by_default_depends_on_the_records():
    assert [CropConfig().rho("global"), CropConfig().rho("local", full=True)] == [0.8, 0.5]
    set_one = CropConfig(local_coverage=0.0)
    assert [set_one.rho("local", full) for full in (False, True)] == [0.0, 0.0]


def test_size_law_is_random_resized_crop():
    """Where every size fits, area share and log aspect are uniform."""
    rng = np.random.default_rng(0)
    sizes = np.array([draw_size((1000, 1000), (0.2, 0.5), RATIO, rng) for _ in range(4000)])
    area, aspect = sizes.prod(1) / 1e6, np.log(sizes[:, 1] / sizes[:, 0])
    assert stats.kstest(area, stats.uniform(0.2, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(aspect, stats.uniform(np.log(3 / 4), np.log(16 / 9)).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("shape", "size"), [((1000, 100), (133, 100)), ((100, 1000), (100, 133))])
def test_size_that_never_fits_is_the_largest_of_allowed_aspect(shape, size):
    assert draw_size(shape, (1.0, 1.0), RATIO, np.random.default_rng(0)) == size


@pytest.mark.parametrize("valid_share", [0.5, 0.02])  # 0.02: half of the draws come from the exact map
def test_positions_are_uniform_among_valid_windows(valid_share):
    mask = blob(44, 40, 3, 0.5)
    integral = integral_image(mask)
    sums = np.lib.stride_tricks.sliding_window_view(mask, (19, 19)).sum((2, 3))
    rho = np.quantile(sums, 1 - valid_share) / 19**2
    valid = [tuple(p) for p in np.argwhere(sums >= rho * 19**2)]
    observed = dict.fromkeys(valid, 0)
    for sample in range(6000):
        drawn = draw_window(integral, (0.2, 0.2), (1, 1), rho, 0.5, random_generator(7, sample, 0))
        assert (drawn.height, drawn.width) == (19, 19)
        observed[drawn.y, drawn.x] += 1
    assert len(valid) > 5 and stats.chisquare(list(observed.values())).pvalue > 1e-3


def test_would_reject_is_the_share_of_bad_unconstrained_draws():
    mask = blob(64, 48, 5, 0.6)
    integral = integral_image(mask)
    drawn = [
        draw_window(integral, (0.1, 0.1), (1, 1), 0.7, 0, random_generator(0, i, 0)) for i in range(3000)
    ]
    h = drawn[0].height
    sums = np.lib.stride_tricks.sliding_window_view(mask, (h, h)).sum((2, 3))
    expected = (sums < 0.7 * h * h).mean()
    assert np.mean([w.would_reject for w in drawn]) == pytest.approx(expected, abs=0.03)
    assert 0.2 < expected < 0.8


def test_draws_depend_on_seed_sample_and_view_alone():
    integral = integral_image(blob(64, 48, 0, 0.7))

    def draw(*key):
        return draw_window(integral, (0.1, 1.0), RATIO, 0.5, 0.5, random_generator(*key))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 2 + 2**31, 3)}) == 5


def test_flip_probability():
    integral = integral_image(np.ones((30, 30), bool))
    flips = [
        draw_window(integral, (0.5, 1), RATIO, 0, 0.3, random_generator(0, i, 0)).flip for i in range(3000)
    ]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 11), st.booleans(), st.integers(0, 10**6))
def test_patch_coverage_equals_brute_force(h, w, grid, flip, seed):
    """Each source pixel cut into grid x grid parts: patch borders then fall on part borders exactly."""
    mask = np.random.default_rng(seed).random((h + 5, w + 3)) < 0.6
    part = np.kron(mask[2 : 2 + h, 1 : 1 + w], np.ones((grid, grid)))
    expected = part.reshape(grid, h, grid, w).mean((1, 3))
    if flip:
        expected = expected[:, ::-1]
    share = mask[2 : 2 + h, 1 : 1 + w].mean()
    found = patch_coverage(integral_image(mask), window(2, 1, h, w, flip, share), grid)
    assert found.shape == (grid, grid) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_patch_coverage_reaches_the_far_border():
    mask = blob(30, 20, 1, 0.5)
    found = patch_coverage(integral_image(mask), window(0, 0, 30, 20, coverage=mask.mean()), 5)
    np.testing.assert_allclose(found, mask.reshape(5, 6, 5, 4).mean((1, 3)), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([14, 28, 42]), st.integers(0, 10**6))
def test_background_stays_exactly_0(h, w, size, seed):
    rng = np.random.default_rng(seed)
    image = np.where(blob(h, w, seed, 0.6), rng.choice([1, 2, 255], (h, w)), 0).astype(np.uint8)
    view = resample(image, (size, size))
    nearest = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    assert view.shape == (size, size) and view.dtype == np.uint8
    np.testing.assert_array_equal(view == 0, nearest == 0)


def test_all_tissue_changes_nothing_where_there_is_no_background():
    image = np.random.default_rng(0).integers(1, 256, (50, 40)).astype(np.uint8)
    np.testing.assert_array_equal(resample(image, (28, 28)), resample(image, (28, 28), all_tissue=True))


@pytest.mark.parametrize("side", [98, 100, 130, 170, 195, 196, 250, 391, 480])
def test_shrinking_is_an_area_mean(side):
    """Close to INTER_AREA on texture, and a calcification of 1-2 view pixels keeps its summed brightness."""
    sigma = 1.5 * side / 98
    texture = cv2.GaussianBlur(np.random.default_rng(0).normal(0, 1, (side, side)), (0, 0), sigma)
    image = np.clip(texture / texture.std() * 40 + 120, 1, 255).astype(np.uint8)
    area = cv2.resize(image, (98, 98), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(resample(image, (98, 98)) - area).mean() < 3  # of a standard deviation of 40
    background, bright = 60, 160  # far from 0 and 255, where uint8 would clip
    speck_side = 1 if side < 150 else 2 if side < 200 else 4
    for y, x in np.random.default_rng(1).integers(side // 4, 3 * side // 4, (40, 2)):
        speck = np.full((side, side), background, np.uint8)
        speck[y : y + speck_side, x : x + speck_side] = bright
        energy = (resample(speck, (98, 98)).astype(float) - background).sum() * (side / 98) ** 2
        assert energy == pytest.approx(speck_side**2 * (bright - background), rel=0.08)


def test_crop_cuts_resamples_and_flips():
    image = np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)
    np.testing.assert_array_equal(crop(image, window(3, 2, 14, 14), 14), np.maximum(image[3:17, 2:16], 0))
    np.testing.assert_array_equal(
        crop(image, window(3, 2, 20, 18, flip=True), 14), crop(image, window(3, 2, 20, 18), 14)[:, ::-1]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_size", 500),
        ("local_size", 0),
        ("global_scale", (0.5, 0.2)),
        ("local_coverage", 1.5),
        ("hflip", 2),
        ("sampler", "rejecting"),
        ("local_mm", (30, 20)),
    ],
)
def test_bad_config_is_named(field, value):
    with pytest.raises(UserError, match=f"crops.{field}"):
        CropConfig(**{field: value})


def test_ten_thousand_crops_of_real_film(film_records):
    """Acceptance line 8: each crop's tissue share is >= rho or it is flagged; at most 1 % are flagged."""
    config, flagged, rejected, total = CropConfig(), [], [], 0
    per_record = -(-10_000 // (10 * len(film_records)))  # 2 global and 8 local crops each time
    for number, image in enumerate(film_records):
        mask = image > 0
        integral = integral_image(mask)
        for repeat in range(per_record):
            for view in range(10):
                scale = config.global_scale if view < 2 else config.local_scale
                rho = config.rho("global" if view < 2 else "local")
                rng = random_generator(0, number * per_record + repeat, view)
                y, x, h, w, _, coverage, fallback, would_reject = draw_window(
                    integral, scale, config.ratio, rho, config.hflip, rng
                )
                truth = mask[y : y + h, x : x + w].mean()
                assert coverage == pytest.approx(truth, abs=1e-12)
                assert fallback or truth >= rho
                flagged.append(fallback)
                rejected.append(would_reject)
                total += 1
    print(f"{total} crops: {np.mean(flagged):.2%} flagged, {np.mean(rejected):.1%} of free draws rejected")
    assert total >= 10_000 and np.mean(flagged) <= 0.01 and np.mean(rejected) > 0.05


def test_a_rekeyed_generator_draws_as_a_new_one():
    rng = random_generator(1, 2, 3)
    for key in ((0, 0, 0), (2**32 - 1, 2**31 - 1, 1004), (7, 12345, 3)):
        rng.integers(5, size=3, dtype=np.uint8), rng.random()  # leaves half-used words behind
        ours, new = rekey(rng, *key), random_generator(*key)
        for draw in (
            lambda g: g.integers(9, size=5, dtype=np.uint8),
            lambda g: g.random(),
            lambda g: g.integers(7),
        ):
            np.testing.assert_array_equal(draw(ours), draw(new))
