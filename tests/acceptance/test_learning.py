"""The acceptance lines of the learning algorithm at full size: `make accept-learning`. Each prints its figures.

Lines 4 and 5 (crops, masks and pairs, on the host) need the real images in MAMMODINO_SHARED or ../shared.
"""

import math
import random

import cv2
import numpy as np
import pytest
from make_dataset import row, write_dataset
from scipy import ndimage, stats

from data_prep.prepare import prepare
from data_prep.reject import Reject
from data_prep.settings import Settings
from mammodino_jax.data.crops import (
    BOX_RHO,
    FULL_RHO,
    SAMPLERS,
    CropConfig,
    draw_window,
    integral_image,
    patch_coverage,
    random_generator,
)
from mammodino_jax.data.index import patient_number
from mammodino_jax.data.masking import MaskConfig, draw_mask, plain
from mammodino_jax.data.pairs import PairConfig, draw_windows
from mammodino_jax.data.pipeline import DataConfig, make_batches

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
GRID = 37  # patches a side at 518 px
RHO = {"tissue": BOX_RHO, "full": FULL_RHO}


@pytest.fixture(scope="module")
def integrals(shared) -> dict[str, list[np.ndarray]]:
    """Integral images of the tissue of every real image, as box and as full-frame records."""
    data, found, rejected = shared / "data", {"tissue": [], "full": []}, []
    groups = [(data / "dicom", "*.dcm", "2d"), (data / "monai_density", "*.jpg", "2d"),
              (data / "nyu_exam0", "?_?-[CM]*[CO].png", "2d"), (data / "msynth_synthetic", "*.jpg", "2d"),
              (data / "minimias/images", "*.png", "film")]  # fmt: skip
    for folder, glob, kind in groups:
        for path in sorted(folder.glob(glob)):
            for box, records in found.items():
                try:
                    image = next(iter(prepare([path], Settings(kind=kind, box=box)).images()))
                except Reject as reject:
                    rejected.append(f"{path.name} ({reject.code})")
                    continue
                records.append(integral_image(image > 0))
    if not found["tissue"]:
        pytest.skip("no real images here")
    shares = {
        box: np.mean([r[-1, -1] / (r.size - sum(r.shape) + 1) for r in rs]) for box, rs in found.items()
    }
    print(f"\n4. {len(found['tissue'])} real images; tissue {shares['tissue']:.0%} of box records, "
          f"{shares['full']:.0%} of full frames; not used: {', '.join(sorted(set(rejected)))}")  # fmt: skip
    return found


def test_line_04_crops(integrals):
    """Would-reject, flagged, and unflagged under rho, by records, sampler and rho; 2 globals to 8 locals."""
    c, repeats = CropConfig(), 3
    print(
        "\n4. | records | rho | sampler | views | would reject | flagged | unflagged under rho | mean area |"
    )
    for box, records in integrals.items():
        for rho in sorted({*RHO.values()}):
            for sampler in SAMPLERS:
                flagged = []
                for kind, views in (("global", range(2)), ("local", range(2, 10))):
                    drawn, under, areas = [], 0, []
                    for number, integral in enumerate(records):
                        H, W = integral.shape[0] - 1, integral.shape[1] - 1
                        for sample in range(number * repeats, (number + 1) * repeats):
                            for view in views:
                                w = draw_window(
                                    integral, getattr(c, f"{kind}_scale"), c.ratio, rho, c.hflip,
                                    random_generator(0, sample, view), sampler,
                                )  # fmt: skip
                                y1, x1 = w.y + w.height, w.x + w.width
                                tissue = (
                                    integral[y1, x1]
                                    - integral[w.y, x1]
                                    - integral[y1, w.x]
                                    + integral[w.y, w.x]
                                )
                                assert 0 <= w.y and y1 <= H and 0 <= w.x and x1 <= W
                                under += not w.fallback and tissue < rho * w.height * w.width
                                areas.append(w.height * w.width / (H * W))
                                drawn.append((w.would_reject, w.fallback))
                    would_reject, fallback = np.mean(drawn, axis=0)
                    flagged += [d[1] for d in drawn]
                    default = "*" if rho == RHO[box] and sampler == SAMPLERS[0] else ""
                    print(f"   | {box} | {rho}{default} | {sampler} | {len(drawn)} {kind} | {would_reject:.1%} | "
                          f"{fallback:.2%} | {under} | {np.mean(areas):.3f} |")  # fmt: skip
                    assert under == 0
                if box == "tissue":
                    assert np.mean(flagged) <= 0.01
    print("   *: the default")


def test_line_04_masks(integrals):
    """Of the tokens masked in the input, those with at least min_coverage tissue: ours and DINOv2's."""
    c, config = CropConfig(), MaskConfig()
    print(f"\n4. | records | rho | masks | tokens | with coverage >= {config.min_coverage} | mean coverage |")
    for box, records in integrals.items():
        held = {"ours": [], "plain": []}
        for number, integral in enumerate(records):
            for sample in range(number * 4, number * 4 + 4):
                rng = random_generator(0, sample, 0)
                window = draw_window(integral, c.global_scale, c.ratio, RHO[box], c.hflip, rng)
                coverage = patch_coverage(integral, window, GRID)
                held["ours"].append(coverage[draw_mask(coverage, config, random_generator(0, sample, 1))])
                held["plain"].append(
                    coverage[draw_mask(coverage, plain(config), random_generator(0, sample, 2))]
                )
        for name, parts in held.items():
            tokens = np.concatenate(parts)
            share = (tokens >= config.min_coverage).mean()
            print(f"   | {box} | {RHO[box]} | {name} | {len(tokens)} | {share:.2%} | {tokens.mean():.3f} |")
            assert name == "plain" or share >= 0.98


def dinov2_mask(target: int, rng: random.Random, complete: bool = True) -> np.ndarray:
    """DINOv2's generator as reference/learning.md 1.6 describes it; `complete`: to the target, as DINOv3 does."""
    mask, most = np.zeros((GRID, GRID), bool), 666  # 0.5 * 518 // 14 * 518 // 14 by Python's precedence
    while (left := min(target - int(mask.sum()), most)) > 0:
        for _ in range(10):
            area, aspect = rng.uniform(4, left), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < GRID and h < GRID:
                y, x = rng.randint(0, GRID - h), rng.randint(0, GRID - w)
                if 0 < h * w - mask[y : y + h, x : x + w].sum() <= left:
                    mask[y : y + h, x : x + w] = True
                    break
        else:
            break
    if complete:
        free = np.flatnonzero(~mask).tolist()
        mask.ravel()[rng.sample(free, target - int(mask.sum()))] = True
    return mask


def block_statistics(mask: np.ndarray) -> list[float]:
    """Pieces, border length, largest full square, patches in the corner, at the edges and in the middle."""
    border = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    square = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_C, 3).max()
    middle = mask[12:25, 12:25].sum()
    return [ndimage.label(mask)[1], border, square, mask[:12, :12].sum(), mask[[0, -1]].sum(), middle]


NAMES = ("pieces", "border", "largest square", "corner", "edges", "middle")


def two_sample(ours: np.ndarray, theirs: np.ndarray) -> float:
    """p of a chi-square test that two samples come from one distribution, over up to 10 bins of equal weight."""
    edges = np.unique(np.quantile(np.concatenate([ours, theirs]), np.linspace(0, 1, 11)[1:-1]))
    counts = np.stack([np.bincount(np.digitize(x, edges), minlength=len(edges) + 1) for x in (ours, theirs)])
    return stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue


def test_line_04_strength_0_is_plain():
    """One value a mask, so that values are independent; 18 tests, hence p > 0.001 in each."""
    n, rng = 4000, random.Random(0)
    blank = np.zeros((GRID, GRID), np.float32)
    print(f"\n4. p of two-sample chi-square tests, {n} masks each: | ratio | {' | '.join(NAMES)} |")
    for ratio in (0.1, 0.3, 0.5):
        config = MaskConfig((ratio, ratio), of="all", min_coverage=0.0, strength=0.0)
        target = int(ratio * GRID * GRID)
        ours = np.array(
            [block_statistics(draw_mask(blank, config, random_generator(0, i, 0))) for i in range(n)]
        )
        theirs = np.array([block_statistics(dinov2_mask(target, rng)) for _ in range(n)])
        p = [two_sample(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]
        print(f"   | {ratio} | {' | '.join(f'{x:.3f}' for x in p)} |")
        assert min(p) > 1e-3
    short = np.array([dinov2_mask(target, rng, complete=False).sum() for _ in range(500)]) / target
    print(f"   DINOv2's own masks are not completed: {(short < 1).mean():.0%} of them end short, by {1 - short.mean():.2%}"
          " on average")  # fmt: skip
    tissue = MaskConfig((0.3, 0.3), of="all", min_coverage=0.0 + 1e-6, strength=1.0)  # the test can fail
    slope = np.repeat(np.linspace(0.5, 1, GRID, dtype=np.float32)[None], GRID, 0)
    moved = np.array(
        [block_statistics(draw_mask(slope, tissue, random_generator(0, i, 0)))[3] for i in range(n)]
    )
    still = np.array([block_statistics(dinov2_mask(int(0.3 * GRID**2), rng))[3] for _ in range(n)])
    print(f"   strength 1 on tissue that thins to half, corner: p = {two_sample(moved, still):.1e}")
    assert two_sample(moved, still) < 1e-6


VOLUMES, SLICES, SPACING = 20, 12, (0.5, 1.0, 3.0)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """20 volumes of 12 slices of 0.5, 1 or 3 mm; the grey level names volume and slice."""
    items = []
    for v in range(VOLUMES):
        for s in range(SLICES):
            image = np.full((50, 40), 1 + v * SLICES + s, np.uint8)
            ids = {"patient_id": f"p{v}", "volume_id": f"v{v}", "kind": "dbt", "slice_index": s}
            spacing = SPACING[v % len(SPACING)]
            items.append((image, row(image, f"v{v}-{s}", **ids, num_slices=SLICES, slice_mm=spacing)))
    return write_dataset(tmp_path_factory.mktemp("pairs") / "set", items)


@pytest.mark.parametrize(("unit", "offsets"), [("slices", (1, 2, 4)), ("mm", (1.0, 3.0))])
def test_line_05_pairs(volumes, unit, offsets):
    """5,000 pairs of each unit from the pipeline: one volume, an offset of the set, no end slices."""
    crops, pairs = (
        CropConfig(global_size=14, local_size=14, local_number=0),
        PairConfig(offsets=offsets, unit=unit),
    )
    data, volume_of = DataConfig(sources=((volumes, "train", "dbt", 1.0),)), {}
    volume_of = {patient_number(f"p{v}"): v for v in range(VOLUMES)}
    seen = []
    for batch in make_batches(
        data, crops, MaskConfig(), pairs, batch_size=20, dbt_rows=20, steps=250, seed=0
    ):
        level = np.median(batch["adjacent_crops"], axis=(2, 3)).astype(int) - 1
        volume, number = level // SLICES, level % SLICES
        mine = np.array([volume_of[p] for p in batch["patient"].tolist()])
        assert (volume == mine[:, None]).all() and len(set(mine)) == len(mine)  # one pair a volume
        assert number.min() >= 1 and number.max() <= SLICES - 2  # a tenth is left out at each end
        spacing = np.array(SPACING)[mine % len(SPACING)]
        apart = np.abs(number[:, 0] - number[:, 1])
        np.testing.assert_allclose(batch["adjacent_gap_mm"], apart * spacing, rtol=1e-6)
        if unit == "slices":
            assert np.isin(apart, offsets).all()
        else:
            off = np.abs(batch["adjacent_gap_mm"][:, None] - offsets).min(1)
            assert (apart > 0).all() and (off <= spacing / 2 + 1e-3).all()
        seen += list(zip(spacing.tolist(), apart.tolist(), strict=True))
    counts = {key: seen.count(key) for key in sorted(set(seen))}
    table = ", ".join(f"{spacing} mm x {apart}: {n}" for (spacing, apart), n in counts.items())
    print(
        f"\n5. {len(seen)} pairs, offsets {offsets} {unit}: all of one volume; slice spacing x slices apart: {table}"
    )
    assert len(seen) == 5000


def test_line_05_windows(integrals):
    """10,000 pairs of windows on the masks of real images: equal up to the jitter, none under rho unflagged."""
    config, c = PairConfig(), CropConfig()
    shift, flagged, moved = [], 0, 0
    records = integrals["tissue"]
    for i in range(10_000):
        one, two = draw_windows(
            records[i % len(records)], config, c.ratio, c.hflip, random_generator(0, i, 0)
        )
        assert (one.height, one.width, one.flip) == (two.height, two.width, two.flip)
        assert one.fallback or min(one.coverage, two.coverage) >= config.coverage
        shift.append((abs(two.y - one.y) / one.height, abs(two.x - one.x) / one.width))
        flagged, moved = flagged + one.fallback, moved + (one != two)
    print(f"\n5. 10000 pairs of windows: largest shift {np.max(shift):.4f} of a side (jitter {config.jitter}), mean "
          f"{np.mean(shift):.4f}; {moved / 1e4:.0%} are shifted, {flagged / 1e4:.2%} flagged")  # fmt: skip
    assert np.max(shift) <= config.jitter and moved > 5000
