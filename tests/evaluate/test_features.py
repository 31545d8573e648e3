import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import features


def marker(batch, mm_per_px):
    """Features that name the record: its mean grey level, and mm per pixel."""
    return np.stack([batch["image"].reshape(len(batch["row"]), -1).max(axis=1), mm_per_px], axis=1)


def test_items_are_images_and_whole_volumes(data):
    items = features.read_items([data])
    assert [(items.kind == k).sum() for k in ("2d", "dbt")] == [40, 20]
    volume = np.flatnonzero(items.kind == "dbt")[0]
    assert len(items.pixels[volume]) == 3
    assert (items.of_row[0] == volume).sum() == 3
    assert set(items.labels) == {"cancer", "density", "lesion"}
    assert set(np.unique(items.labels["density"])) == {0, 1, 2, 3}


def test_duplicates_and_flagged_records_are_left_out_and_counted(labelled, tmp_path):
    content = labelled.items(6, slices=0)
    content[0][1]["duplicate_of"] = "p1-CC"
    content[3][1]["flags"] = ["stereo"]
    content[4][1]["label_cancer"] = None
    items = features.read_items([labelled.write(tmp_path / "d", content)])
    assert items.left_out == 2
    assert len(items.patient) == 10
    assert (items.labels["cancer"] == -1).sum() == 1


def test_a_volume_gets_the_mean_of_its_slices_and_a_row_its_own_features(labelled, tmp_path):
    content = [(np.full_like(i, 10) + n, row) for n, (i, row) in enumerate(labelled.items(8))]
    folder = labelled.write(tmp_path / "d", content)
    items = features.read_items([folder])
    found = features.extract([folder], items, {"x": marker}, 56, 14, batch_size=5)["x"]
    index = pq.read_table(folder / "index.parquet").to_pylist()
    grey = {row["image_id"]: image.max() for image, row in content}
    for item in range(len(items.patient)):
        mine = [grey[index[r]["image_id"]] for r in np.flatnonzero(items.of_row[0] == item)]
        assert found[item, 0] == pytest.approx(np.mean(mine))
        assert found[item, 1] == pytest.approx(0.2 * items.long_px[item] / 56)


def test_sizes_are_in_pixels_for_all_if_one_spacing_is_unknown(labelled, tmp_path):
    content = labelled.items(4, slices=0)
    content[2][1]["pixel_mm"] = None
    folder = labelled.write(tmp_path / "d", content)
    found = features.extract([folder], features.read_items([folder]), {"x": marker}, 56, 14, 4)["x"]
    assert (found[:, 1] == 1).all()


def test_two_data_sets_are_read_one_after_the_other(labelled, tmp_path):
    folders = [labelled.write(tmp_path / n, labelled.items(4, slices=0)) for n in "ab"]
    items = features.read_items(folders)
    found = features.extract(folders, items, {"x": marker}, 56, 14, 4)["x"]
    assert len(found) == 16
    np.testing.assert_array_equal(found[:8], found[8:])


def test_encoder_features_are_cls_and_the_tissue_mean():
    rng = np.random.default_rng(0)
    out = {"cls": rng.normal(size=(2, 4)), "patches": rng.normal(size=(2, 6, 4))}

    def fake(images):
        return {k: np.float32(v) for k, v in out.items()}

    tissue = np.float16([[[0, 1, 0], [0.5, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    batch = {"image": np.zeros((2, 28, 42), np.uint8), "tissue": tissue, "row": np.array([0, -1])}
    found = features.encoder_features(fake)(batch, None)
    expected = (out["patches"][0, 1] + 0.5 * out["patches"][0, 3]) / 1.5
    np.testing.assert_allclose(found[0], np.r_[out["cls"][0], expected], rtol=1e-5)
    np.testing.assert_array_equal(found[1, 4:], 0)  # no tissue: zeros, not NaN


def test_a_long_side_off_the_patch_grid_is_a_user_error(data):
    with pytest.raises(
        UserError, match="--long-side 100 is not a positive multiple of the patch size 14; 98 is"
    ):
        features.extract([data], features.read_items([data]), {"x": marker}, 100, 14, 4)


def test_untrained_keeps_the_shape_and_forgets_what_was_seen(encoder):
    seen = dataclasses.replace(encoder, provenance={"patients": ["x"], "pixels": []})
    random = features.untrained(seen, seed=3)
    assert random.vit == encoder.vit
    assert not random.provenance
    kernel = ("patch_embed", "proj", "kernel")
    before, after = encoder.params, random.params
    for key in kernel:
        before, after = before[key], after[key]
    assert np.abs(np.asarray(before) - np.asarray(after)).max() > 0
