"""The VICTRE phantom's tomosynthesis: records as the contract wants, and depth that is in the pixels."""

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import slice_features
import victre

from mammodino_jax.data.index import open_split


@pytest.fixture(scope="module")
def labels(shared):
    return victre.load_labels(shared)


@pytest.fixture(scope="module")
def volume(labels):
    return victre.tomosynthesis(labels)


def pixels_of(volume, plane):
    """A map [y, x] of the label volume at the pixels of the slices."""
    places = [
        np.rint((corner + np.arange(n) * volume.pixel_mm) / victre.LABEL_MM).astype(int)
        for corner, n in zip(volume.corner_mm, volume.slices.shape[1:], strict=True)
    ]
    return plane[np.ix_(*places)]


def contrast(volume, inside):
    """Grey of a region minus that of a ring around it, by slice [K]."""
    inside = inside.astype(np.uint8)
    ring = cv2.dilate(inside, np.ones((25, 25))) > cv2.dilate(inside, np.ones((5, 5)))
    ring &= volume.slices[0] > 0
    return volume.slices[:, inside > 0].mean(1) - volume.slices[:, ring].mean(1)


def test_labels(labels):
    assert victre.compression_axis(labels) == 0
    assert victre.compression_axis(np.moveaxis(labels, 0, 2)) == 2
    mu, tissue = victre.attenuation(labels)
    assert mu.shape == tissue.shape == (129, 269, 165)
    assert mu[tissue == 0].max() == 0  # paddles are gone
    assert victre.FAT * 0.999 < mu[tissue == 1].min() and mu.max() < 0.09  # no calcification in pcl_1
    with pytest.raises(ValueError, match=r"\[77\]"):
        victre.attenuation(np.where(labels[:8] == victre.PADDLE, np.uint8(77), labels[:8]))


def test_slices_keep_the_contract(volume):
    slices = volume.slices
    mask = slices[0] > 0
    assert slices.dtype == np.uint8 and len(slices) == len(volume.position_mm) == 52
    assert ((slices > 0) == mask).all() and 0.5 < mask.mean() < 0.9
    assert mask.any(0).all() and mask.any(1).all()  # cropped to the tissue
    assert mask[:, 0].mean() > 0.9 and mask[:, -1].mean() < 0.1  # chest wall on the left
    np.testing.assert_allclose(np.diff(volume.position_mm), 1.0)
    assert 0 <= volume.position_mm[0] < volume.position_mm[-1] <= 258 * victre.LABEL_MM


def test_slices_change_with_depth(volume):
    inside = volume.slices[:, volume.slices[0] > 0].astype(float)
    correlation = np.corrcoef(inside)
    by_distance = [np.diagonal(correlation, d).mean() for d in range(1, 21)]
    assert by_distance[0] > 0.98 and (np.diff(by_distance) < 0).all() and by_distance[-1] < 0.9


def test_the_mass_is_brightest_inside_itself(labels, volume):
    mass = labels == victre.MASS
    seen = contrast(volume, pixels_of(volume, mass.sum(0) * victre.LABEL_MM > 5))  # it is 11 mm deep
    z = np.argwhere(mass)[:, 0] * victre.LABEL_MM
    assert z.min() < volume.position_mm[seen.argmax()] < z.max() and seen.max() > max(seen[0], seen[-1]) + 8


def test_calcifications_are_brightest_in_their_slices(labels, volume):
    """Shift-and-add must bring a point into focus at its own height, and only there. pcl_1 itself has none."""
    places = [(60, 258, 208), (128, 300, 82), (200, 408, 130)]  # dark at every depth, so that none saturates
    with_calcifications = labels.copy()
    for z, y, x in places:  # 0.6 mm across
        with_calcifications[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2] = victre.CALCIFICATION
    more = victre.tomosynthesis(with_calcifications)
    for z, y, x in places:
        spot = np.zeros(labels.shape[1:], bool)
        spot[y - 1 : y + 2, x - 1 : x + 2] = True
        spot = pixels_of(volume, spot)
        added = more.slices[:, spot].mean(1) - volume.slices[:, spot].mean(1)
        focus = np.average(volume.position_mm, weights=np.maximum(added - added.max() / 2, 0))
        assert abs(focus - z * victre.LABEL_MM) <= 1 and added.max() > 2.5 * max(added[0], added[-1])


def test_records(labels, tmp_path):
    data = victre.write_volumes(tmp_path, labels, phantoms=2, coarsen=4, long_side=96)
    shards, table = open_split(data, "train")
    rows = table.to_pylist()
    assert {r["volume_id"]: r["num_slices"] for r in rows}["victre"] == 52
    assert len({r["patient_id"] for r in rows}) == 3 and {r["kind"] for r in rows} == {"dbt"}
    masks = {}
    for r in rows:
        image = shards.read(r["row"])
        assert image.shape == (r["height"], r["width"])
        assert ((image > 0) == masks.setdefault(r["volume_id"], image > 0)).all()
    slices = slice_features.read_slices(data)
    assert slices.depth.min() == 0 and slices.depth.max() == 1
    assert pq.read_table(data / "index.parquet")["slice_position_mm"].null_count == 0


def test_figures_on_features_with_known_answers():
    rng = np.random.default_rng(0)
    volume = np.repeat(["a", "b", "c", "d"], 20)
    number = np.tile(np.arange(20), 4)
    slices = slice_features.Slices(volume, number, number / 19)
    place = np.repeat(rng.standard_normal((4, 8)), 20, axis=0)
    same = slice_features.measure(np.concatenate([place, number[:, None] * 0], 1), slices)
    np.testing.assert_allclose(same["raw"]["within_1"], 1)
    assert abs(same["depth"]["spearman"]) < 1e-6 and same["depth"]["r2"] <= 1e-6 and same["rank"] < 3.01
    known = np.concatenate([place, number[:, None] / 10], 1)
    told = slice_features.measure(known, slices)
    assert told["depth"]["spearman"] > 0.999 and told["raw"]["gap"][0] > told["raw"]["gap"][9] > 0
    noise = slice_features.measure(rng.standard_normal((80, 64)), slices)
    assert abs(noise["raw"]["gap"][0]) < 0.1 and noise["depth"]["r2"] < 0.2 and noise["rank"] > 40


@pytest.fixture
def quick_compile():
    """Two train steps are compiled for a dozen steps each: optimising the programs costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
def test_twin_of_line_08(labels, tmp_path, capsys, quick_compile):
    """Line 8 of the learning algorithm, scaled down; tests/acceptance/test_learning_pairs.py."""

    def small(c):
        c.crops.update(global_size=42, local_size=28, local_number=2)
        c.model.update(dim=32, depth=1, heads=2)
        c.head.update(prototypes=64, bottleneck=16, hidden=32)

    data = victre.write_volumes(tmp_path, labels, coarsen=4, long_side=96)
    workdirs = slice_features.train_both(data, tmp_path, 12, small)
    slice_features.check_same_images(workdirs, 12)
    found = slice_features.compare(workdirs, data, side=42)
    slice_features.check_finite(found)
    assert found["without DINO-adj"]["raw"] != found["with DINO-adj"]["raw"]
    slice_features.show(found)
    assert "within minus across with DINO-adj is" in capsys.readouterr().out
