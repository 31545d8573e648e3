import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mammodino_jax.data.crops import CropConfig
from mammodino_jax.data.eval import letterbox, make_eval_batches
from mammodino_jax.data.index import patient_number
from mammodino_jax.data.masking import MaskConfig
from mammodino_jax.data.pairs import PairConfig
from mammodino_jax.data.pipeline import DataConfig, make_batches
from mammodino_jax.data.records import shard_paths
from mammodino_jax.errors import UserError

CROPS = CropConfig(global_size=56, local_size=28, local_number=3)
SIZES = {"batch_size": 8, "dbt_rows": 4, "steps": 5, "seed": 3}


@pytest.fixture(scope="module")
def folders(make, tmp_path_factory):
    """One set of 7 images and 5 volumes, one of 3 images and 1 volume."""
    root = tmp_path_factory.mktemp("data")
    images = [make.breast(60, 44, i) for i in range(10)]
    items = [(image, make.row(image, f"i{i}")) for i, image in enumerate(images)]
    slices = [item for v in range(5) for item in make.volume(f"v{v}", 10)]
    first = make.write_dataset(root / "a", items[:7] + slices)
    return first, make.write_dataset(root / "b", items[7:] + make.volume("w", 12, spacing=None))


@pytest.fixture(scope="module")
def data(folders):
    a, b = folders
    return DataConfig(sources=((str(a), "train", ("2d", "dbt"), 2.0), (str(b), "train", ("2d", "dbt"), 1.0)))


def batches(data, crops=CROPS, mask=MaskConfig(), pairs=PairConfig(), **sizes):  # noqa: B008
    return list(make_batches(data, crops, mask, pairs, **{**SIZES, **sizes}))


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        assert one[key].tobytes() == other[key].tobytes(), key


@pytest.fixture(scope="module")
def reference(data):
    return batches(data)


def test_shapes_and_types(reference):
    assert len(reference) == 5
    expected = {
        "global_crops": ((8, 2, 56, 56), np.uint8), "local_crops": ((8, 3, 28, 28), np.uint8),
        "mask_index": ((8, 8), np.int32), "mask_weight": ((8, 8), np.float32), "sample": ((8,), np.int32),
        "patient": ((8,), np.int32), "adjacent_crops": ((4, 2, 56, 56), np.uint8),
        "adjacent_gap_mm": ((4,), np.float32), "adjacent_offset": ((4,), np.int32),
    }  # fmt: skip
    for batch in reference:
        counters = {key for key in batch if key.startswith("count/")}
        assert set(batch) - counters == set(expected) and len(counters) >= 12
        for key, (shape, dtype) in expected.items():
            assert batch[key].shape == shape and batch[key].dtype == dtype
        for key in counters:
            assert batch[key].shape == (8,) and batch[key].dtype == np.float32


def test_samples_and_counters(reference):
    for k, batch in enumerate(reference):
        assert batch["sample"].tolist() == list(range(k * 8, k * 8 + 8))
        adjacent = np.isnan(batch["count/adjacent_coverage"])
        assert adjacent.tolist() == [False, True] * 4  # row r is from dbt iff r % (B / A) == 0
        good = batch["count/global_fallback"] == 0
        assert (batch["count/global_coverage"][good] >= 0.8).all()
        assert (batch["count/global_mm_per_px"] < 0.2).all() and (batch["count/local_mm_per_px"] > 0.04).all()
        assert np.allclose(batch["mask_weight"].sum(1)[batch["mask_weight"].any(1)], 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_split_the_same_global_batches(data, reference, processes):
    parts = [batches(data, process_index=p, process_count=processes) for p in range(processes)]
    for whole, *split in zip(reference, *parts, strict=True):
        same(whole, {key: np.concatenate([part[key] for part in split]) for key in whole})


@pytest.mark.parametrize("start", [1, 4, 5])
def test_any_start_step_resumes(data, reference, start):
    resumed = batches(data, start_step=start)
    assert len(resumed) == 5 - start
    for one, other in zip(reference[start:], resumed, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    ("workers", "threads"),
    [(0, 1), (0, 7), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_workers_and_threads_change_nothing(data, reference, workers, threads):
    iterator = make_batches(
        dataclasses.replace(data, workers=workers, threads=threads),
        CROPS,
        MaskConfig(),
        PairConfig(),
        **SIZES,
        start_step=1,
    )
    found = list(iterator)
    iterator.close()
    assert len(found) == 4
    for one, other in zip(reference[1:], found, strict=True):
        same(one, other)


def test_seeds_differ(data, reference):
    other = batches(data, seed=4)
    assert (other[0]["global_crops"] != reference[0]["global_crops"]).any()
    assert [b["patient"].tolist() for b in other] != [b["patient"].tolist() for b in reference]


def test_every_record_is_drawn_once_an_epoch(folders):
    only_a = DataConfig(sources=((folders[0], "train", "2d", 1.0),))
    drawn = np.concatenate([b["patient"] for b in batches(only_a, dbt_rows=0, batch_size=7, steps=4)])
    everyone = sorted(patient_number(f"p-i{i}") for i in range(7))
    epochs = drawn.reshape(4, 7).tolist()
    assert [sorted(epoch) for epoch in epochs] == [everyone] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_weights_are_shares_within_the_stream(data):
    drawn = np.concatenate([b["patient"][1::2] for b in batches(data, steps=21)])
    from_b = np.isin(drawn, [patient_number(f"p-i{i}") for i in (7, 8, 9)])
    assert from_b.mean() == pytest.approx(1 / 3, abs=0.02)


def test_at_most_one_pair_a_volume_in_a_global_batch(data):
    """6 volumes for 4 rows: epochs end inside batches; weights 2:1 would draw volume w twice in some."""
    seen = set()
    for batch in batches(data, steps=25):
        patients = batch["patient"][::2].tolist()
        assert len(set(patients)) == 4
        seen |= set(patients)
    assert seen == {patient_number(f"p-{v}") for v in ("v0", "v1", "v2", "v3", "v4", "w")}


def levels(crops):
    """Grey level of each crop of a phantom slice (uniform tissue: level 20 + slice)."""
    return np.array([np.median(crop[crop > 0]) for crop in crops]).astype(int) - 20


def test_pairs_are_adjacent_slices_in_one_window(data):
    flat, volume_w = 0, patient_number("p-w")
    for batch in batches(data, pairs=PairConfig(jitter=0.0), steps=15):
        one, two = levels(batch["adjacent_crops"][:, 0]), levels(batch["adjacent_crops"][:, 1])
        distance = np.abs(one - two)
        assert set(distance) <= {1, 2} and min(one.min(), two.min()) >= 1 and max(one.max(), two.max()) <= 10
        np.testing.assert_array_equal(one, levels(batch["global_crops"][::2, 0]))  # the row shows slice k
        np.testing.assert_array_equal(batch["adjacent_crops"][:, 0] > 0, batch["adjacent_crops"][:, 1] > 0)
        unknown = batch["patient"][::2] == volume_w
        np.testing.assert_array_equal(batch["adjacent_gap_mm"], np.where(unknown, np.nan, distance))
        flat += unknown.sum()
    assert flat > 0


def ramp(make, folder, **columns):
    """A data set of one volume of 4 slices, each the same ramp of grey levels 1 + column; no background."""
    image = np.repeat(np.arange(1, 201, dtype=np.uint8)[None], 200, 0)
    slices = make.volume("v", 4, 200, 200, **columns)
    return make.write_dataset(folder, [(image, row) for _, row in slices])


def test_jitter_shifts_the_partner_a_little(make, tmp_path):
    """On a ramp a shift is a difference of grey levels, whatever the resize and flip."""
    data = DataConfig(sources=((ramp(make, tmp_path / "set"), "train", "dbt", 1.0),))
    shifts = []
    for jitter in (0.0, 0.05):
        found = batches(
            data, pairs=PairConfig(jitter=jitter, end_share=0), batch_size=1, dbt_rows=1, steps=40
        )
        pairs = np.concatenate([b["adjacent_crops"] for b in found]).astype(float)
        shifts.append((pairs[:, 1] - pairs[:, 0]).mean((1, 2)))
    assert not shifts[0].any()
    assert np.abs(shifts[1]).max() <= 0.05 * 200 and shifts[1].min() < -1 and shifts[1].max() > 1


@pytest.mark.parametrize(
    ("slab", "offsets", "warned"),
    [(6.0, (1,), True), (1.5, (2, 1), True), (1.5, (2,), False), (None, (1,), False)],
)
def test_slabs_thicker_than_the_gap_are_told(make, tmp_path, caplog, slab, offsets, warned):
    data = DataConfig(sources=((ramp(make, tmp_path / "set", slab_mm=slab), "train", "dbt", 1.0),))
    with caplog.at_level("WARNING"):
        batches(data, pairs=PairConfig(offsets=offsets, end_share=0), batch_size=1, dbt_rows=1, steps=0)
    assert ("1 of 1 volumes have slabs thicker" in caplog.text) == warned


def test_rejection_sampler_is_used(data, reference):
    found = batches(data, crops=dataclasses.replace(CROPS, sampler="rejection"))
    assert (found[0]["global_crops"] != reference[0]["global_crops"]).any()
    same(found[3], batches(data, crops=dataclasses.replace(CROPS, sampler="rejection"), start_step=3)[0])


def test_full_frames_have_a_lower_rho_of_their_own(make, tmp_path):
    """60 % tissue: of large windows about half reach 0.5, hardly any 0.8."""
    image = make.breast(60, 44, 0)
    image[:, 34:] = 0
    least = {}
    for box in ("tissue", "full"):
        folder = make.write_dataset(
            tmp_path / box, [(image, make.row(image, "a"))], shards=1, settings={"box": box}
        )
        data = DataConfig(sources=((folder, "train", "2d", 1.0),))
        for rho in (None, 0.7):
            crops = dataclasses.replace(CROPS, global_coverage=rho, local_coverage=rho, hflip=0)
            found = batches(data, crops=crops, batch_size=1, dbt_rows=0, steps=150)
            whole = [b for b in found if b["count/global_fallback"] == b["count/local_fallback"] == 0]
            shares = [
                (b[f"{kind}_crops"] > 0).mean((2, 3)).min() for b in whole for kind in ("global", "local")
            ]
            least[box, rho] = min(shares)
    assert least["tissue", None] == pytest.approx(0.8, abs=0.05)
    assert least["full", None] == pytest.approx(0.5, abs=0.05)
    assert least["tissue", 0.7] == least["full", 0.7] == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("local_size", [98, 140, 196])
def test_sizes_in_mm(make, tmp_path, local_size):
    """Sides in mm whatever the pixel spacing; by scale, and counted, where it is unknown."""
    images = [make.breast(200, 150, i) for i in range(3)]
    items = [(x, make.row(x, f"i{p}", pixel_mm=p)) for x, p in zip(images, (0.2, 0.4, None), strict=True)]
    data = DataConfig(sources=((make.write_dataset(tmp_path / "set", items), "train", "2d", 1.0),))
    crops = dataclasses.replace(CROPS, local_size=local_size, global_mm=(20, 28), local_mm=(5, 10))
    unknown = 0
    for batch in batches(data, crops=crops, batch_size=3, dbt_rows=0):
        assert batch["local_crops"].shape == (3, 3, local_size, local_size)
        for r in range(3):
            known = batch["patient"][r] != patient_number("p-iNone")
            unknown += not known
            for kind, size, low, high in (("global", 56, 20, 28), ("local", local_size, 5, 10)):
                assert batch[f"count/{kind}_mm_unknown"][r] == (not known)
                assert batch[f"count/{kind}_mm_short"][r] == 0 if known else True
                side = batch[f"count/{kind}_mm_per_px"][r] * size
                assert low - 0.5 <= side <= high + 0.5 if known else np.isnan(side)
    assert unknown == 5
    larger = dataclasses.replace(
        CROPS, global_mm=(55, 60)
    )  # the first record is 40 x 30 mm, the second 80 x 60
    for batch in batches(data, crops=larger, batch_size=3, dbt_rows=0):
        short = dict(zip(batch["patient"].tolist(), batch["count/global_mm_short"].tolist(), strict=True))
        assert [short[patient_number(f"p-i{p}")] for p in (0.2, 0.4)] == [1, 0]
        assert np.isnan(short[patient_number("p-iNone")])


@pytest.mark.parametrize(("lesions", "masked"), [("always", 1), ("never", 0)])
def test_lesions_of_findings_are_masked_in_the_view(make, tmp_path, lesions, masked):
    """The lesion is the only bright place; the views, flipped or not, say where the mask must (not) be."""
    image = np.full((120, 90), 50, np.uint8)
    image[30:60, 5:35] = 250
    items = [(image, make.row(image, "a")), (np.full_like(image, 50), make.row(image, "b"))]
    folder = make.write_dataset(tmp_path / "set", items)
    box = {"record_y0": 30.0, "record_x0": 5.0, "record_y1": 60.0, "record_x1": 35.0}
    make.write_findings(folder, [{"image_id": "a", **box}])
    data = DataConfig(sources=((folder, "train", "2d", 1.0),))
    mask, crops = (
        MaskConfig((0.49, 0.49), lesions=lesions),
        dataclasses.replace(CROPS, global_scale=(0.6, 1.0)),
    )
    seen = 0
    for batch in batches(data, mask=mask, crops=crops, batch_size=2, dbt_rows=0, steps=20):
        bright = (batch["global_crops"] > 200).reshape(2, 2, 4, 14, 4, 14).mean((3, 5)).reshape(2, 32)
        for r in range(2):
            index = batch["mask_index"][r][batch["mask_weight"][r] > 0]
            view = np.arange(32) // 16 == index[0] // 16
            is_masked = np.isin(np.arange(32), index)
            lesion = (bright[r] > 0.05) & view
            if batch["patient"][r] == patient_number("p-b") or not lesion.any():
                assert batch["patient"][r] != patient_number("p-b") or np.isnan(batch["count/mask_lesion"][r])
                continue
            seen += 1
            share = batch["count/mask_lesion"][r]
            assert share == masked or (
                masked and len(index) == 7
            )  # 7 masked: fewer than the lesion may touch
            assert (is_masked[lesion] == masked).all() or (masked and share < 1)
    assert seen >= 15


def test_plain_masks_are_counted_beside_ours(data, reference):
    """For samples 0, 8, ...; masks drawn blindly hold less tissue than ours."""
    ours, plain = (
        np.concatenate([b[f"count/{name}"] for b in reference])
        for name in ("mask_coverage", "plain_mask_coverage")
    )
    assert np.flatnonzero(~np.isnan(plain)).tolist() == [0, 8, 16, 24, 32]
    assert 0.5 < np.nanmean(plain) < np.nanmean(ours)


def test_reuse_crops_the_partner_by_the_rows_first_window(data):
    for batch in batches(data, pairs=PairConfig(mode="reuse", offsets=(1,))):
        assert batch["adjacent_crops"].shape == (4, 1, 56, 56)
        first = batch["global_crops"][::2, 0]
        np.testing.assert_array_equal(first > 0, batch["adjacent_crops"][:, 0] > 0)
        assert set(np.abs(levels(first) - levels(batch["adjacent_crops"][:, 0]))) == {1}


def test_masked_patches_show_tissue(data):
    """The mask lies where the crop itself shows tissue, flips included."""
    flipped = 0
    for batch in batches(
        data, mask=MaskConfig(min_coverage=0.9), crops=dataclasses.replace(CROPS, hflip=0.5), steps=8
    ):
        shown = (batch["global_crops"] > 0).reshape(8, 2, 4, 14, 4, 14).mean((3, 5)).reshape(8, 32)
        for r in range(8):
            index = batch["mask_index"][r][batch["mask_weight"][r] > 0]
            assert len(set(index // 16)) <= 1  # one view of each image
            assert (shown[r][index] > 0.8).all()
        flipped += (
            shown.reshape(8, 2, 4, 4)[..., 0].mean(2) < shown.reshape(8, 2, 4, 4)[..., 3].mean(2)
        ).sum()
    assert flipped > 10


def test_without_dbt_rows_there_are_no_pairs(data):
    batch = batches(data, dbt_rows=0, steps=1)[0]
    assert not [key for key in batch if "adjacent" in key]


def test_all_rows_from_volumes_need_no_single_images(folders):
    only_dbt = DataConfig(sources=((folders[0], "train", "dbt", 1.0),))
    found = batches(only_dbt, batch_size=4, dbt_rows=4, steps=2)
    assert all(len(set(b["patient"])) == 4 for b in found)
    with pytest.raises(UserError, match="flat_slices"):
        batches(only_dbt)
    single = batches(dataclasses.replace(only_dbt, flat_slices=True), steps=12)
    levels_seen = {x for b in single for x in levels(b["global_crops"][1::2, 0])}
    assert {0, 9} <= levels_seen  # single slices, the outer ones too


def test_no_local_crops(data):
    batch = batches(data, crops=dataclasses.replace(CROPS, local_number=0), steps=1)[0]
    assert batch["local_crops"].shape == (8, 0, 28, 28) and "count/local_coverage" not in batch


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dbt_rows": 3}, "batch_size 8 must be a multiple of dbt_rows 3"),
        ({"process_count": 3}, "batch_size 8 must be a multiple of process count 3"),
        ({"process_count": 8}, "dbt_rows 4 must be a multiple of process count 8"),
        ({"dbt_rows": 8}, "6 volumes offer slice pairs but dbt_rows is 8"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 2**29}, "below 2"),
    ],
)
def test_bad_sizes_are_named(data, sizes, message):
    with pytest.raises(UserError, match=message):
        batches(data, **sizes)


def test_volumes_without_pairs_do_not_count(data):
    with pytest.raises(UserError, match="0 volumes offer slice pairs but dbt_rows is 4"):
        batches(data, pairs=PairConfig(offsets=(11,)))


def corrupted(make, folder, items=6):
    """A data set whose record 4 is cut short inside its shard (other records stay whole)."""
    images = [make.breast(60, 44, i) for i in range(items)]
    folder = make.write_dataset(
        folder, [(x, make.row(x, f"i{i}")) for i, x in enumerate(images)], shards=items
    )
    path = shard_paths(folder, "train")[4]
    writer = ArrayRecordWriter(path, "group_size:1")
    writer.write(b"not a record")
    writer.close()
    return DataConfig(sources=((str(folder), "train", "2d", 1.0),))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_unreadable_record_is_named(make, tmp_path, workers):
    data = dataclasses.replace(corrupted(make, tmp_path / "set"), workers=workers)
    where = "data worker 0 of 1, step [0-3]" if workers else "step [0-3]"
    with pytest.raises(UserError, match=f"^{where}: .*set: record 4 of split train cannot be read"):
        batches(data, dbt_rows=0, steps=4)


def test_slices_of_different_shapes_are_named(make, tmp_path):
    slices = make.volume("v", 2)
    image = make.breast(30, 20, 0)
    folder = make.write_dataset(tmp_path / "set", [slices[0], (image, slices[1][1])])
    with pytest.raises(UserError, match=r"record \d of split train and record \d are slices of one vol"):
        batches(DataConfig(sources=((folder, "train", "dbt", 1.0),)), batch_size=1, dbt_rows=1)


def test_unused_slices_are_told(data, caplog):
    with caplog.at_level("WARNING"):
        batches(data, dbt_rows=0, steps=0)
    assert "62 tomosynthesis slices are left out" in caplog.text


def test_importing_the_rooms_imports_no_jax():
    """index and pipeline are left out: grain itself imports jax where it is installed."""
    rooms = ", ".join(f"mammodino_jax.data.{room}" for room in ("records", "crops", "masking", "pairs"))
    code = f"import sys, {rooms}; sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_letterbox_keeps_aspect_and_exact_coverage(make):
    image = make.breast(90, 50, 0)
    out, tissue = letterbox(image, 56, 84, 14)
    assert out.shape == (56, 84) and tissue.shape == (4, 6) and tissue.dtype == np.float16
    assert out[:, 31:].max() == 0 and tissue[:, 3:].max() == 0  # 56 x 31, padded on the right
    np.testing.assert_allclose((out > 0).reshape(4, 14, 6, 14).mean((1, 3)), tissue, atol=0.06)
    full = np.ones((56, 28), np.uint8)
    np.testing.assert_array_equal(letterbox(full, 56, 56, 14)[1], np.repeat([[1, 1, 0, 0]], 4, 0))


def test_evaluation_gives_every_image_once_in_canvases_of_its_aspect(make):
    images = [make.breast(40 + i, 30, i) for i in range(5)] + [make.breast(28, 56, i) for i in range(3)]
    shapes = [image.shape for image in images]
    ask = dict(long_side=56, patch=14, batch_size=lambda patches: 3)
    found = list(make_eval_batches(lambda i: images[i], shapes, step=2, **ask))
    assert [b["image"].shape for b in found] == [(3, 28, 56), (3, 56, 56), (3, 56, 56)]
    places = np.concatenate([b["row"] for b in found])
    assert places.tolist() == [5, 6, 7, 0, 1, 2, 3, 4, -1]
    stacked = {p: (b["image"][i], b["size"][i]) for b in found for i, p in enumerate(b["row"])}
    for place, image in enumerate(images):
        canvas, size = stacked[place]
        np.testing.assert_array_equal(canvas, letterbox(image, *canvas.shape, 14)[0])
        assert size.tolist() == [round(s * 56 / max(image.shape)) for s in image.shape]
