import dataclasses

import numpy as np
import pytest

from mammodino_jax.data.eval import letterbox
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import features
from mammodino_jax.evaluate.baselines import extractor
from mammodino_jax.evaluate.items import group, read_rows


def marker(image, size, tissue, mm):
    """Features that name the record: its brightest grey level, and mm per pixel."""
    return {"x": np.stack([image.reshape(len(image), -1).max(axis=1), mm], axis=1)}


MARKER = features.Extractor("marker", 14, marker, lambda tokens: 3)


def test_every_record_gets_its_own_features_and_a_volume_the_mean(labelled, tmp_path):
    content = [(np.full_like(i, 10 + n), row) for n, (i, row) in enumerate(labelled.items(8))]
    rows = read_rows([labelled.write(tmp_path / "d", content)])
    found = features.record_features(rows, MARKER, 56)["x"]
    grey = np.array([{r["image_id"]: i.max() for i, r in content}[name] for name in rows.columns["image_id"]])
    np.testing.assert_allclose(found[:, 0], grey)
    np.testing.assert_allclose(found[:, 1], 0.2 * rows.columns["height"] / 56, rtol=1e-6)
    items = group(rows)
    for how, of in (("mean", np.mean), ("max", np.max)):
        x = features.aggregate(found, rows, items, how)
        expected = [of(grey[items.item == i]) for i in range(len(items.first))]
        np.testing.assert_allclose(x[:, 0], expected, rtol=1e-6)


def test_a_volume_counts_once_in_its_exam(labelled, tmp_path):
    rows = read_rows([labelled.write(tmp_path / "d", labelled.items(2))])
    x = np.where(rows.columns["kind"] == "dbt", 1.0, 0.0)[:, None]
    exams = group(rows, "exam")
    np.testing.assert_allclose(features.aggregate(x, rows, exams), 1 / 3)  # two images and one volume


def test_sizes_are_in_pixels_for_all_if_one_spacing_is_unknown(labelled, tmp_path):
    content = labelled.items(4, slices=0)
    content[2][1]["pixel_mm"] = None
    rows = read_rows([labelled.write(tmp_path / "d", content)])
    assert (features.record_features(rows, MARKER, 56)["x"][:, 1] == 1).all()


def test_the_second_time_features_come_from_the_cache(data, tmp_path):
    rows, calls = read_rows([data]), []

    def counted(*batch):
        calls.append(1)
        return marker(*batch)

    read = dataclasses.replace(MARKER, function=counted)
    first = features.record_features(rows, read, 56, tmp_path)
    done = len(calls)
    assert done
    again = features.record_features(rows, read, 56, tmp_path)
    np.testing.assert_array_equal(first["x"], again["x"])
    assert len(calls) == done
    features.record_features(rows, dataclasses.replace(read, fingerprint="other"), 56, tmp_path)
    assert len(calls) == 2 * done  # other weights
    features.record_features(rows.take(np.arange(5)), read, 56, tmp_path)
    assert len(calls) > 2 * done  # other records
    assert len(list(tmp_path.iterdir())) == 3


def test_encoder_features_are_cls_and_the_tissue_mean_of_the_image_alone(data, encoder):
    rows = read_rows([data]).take(np.arange(3))
    found = features.record_features(rows, features.encoder_extractor(encoder), 56)
    image, tissue = letterbox(rows.image(1), 56, 42, 14)  # 70 x 42 becomes 56 x 34
    alone = encoder(image[None])
    weight = tissue.astype(np.float32).ravel() / tissue.sum(dtype=np.float32)
    np.testing.assert_allclose(found["cls"][1], alone["cls"][0], atol=1e-5)
    np.testing.assert_allclose(found["mean"][1], weight @ np.asarray(alone["patches"][0]), atol=1e-5)
    nothing = features.tissue_mean(np.ones((1, 6, 4), np.float32), np.zeros((1, 2, 3), np.float16))
    np.testing.assert_array_equal(nothing, 0)  # no tissue: zeros, not NaN


def test_tiles_cover_the_image_at_the_training_size(data, encoder):
    rows = read_rows([data]).take(np.arange(2))
    read = features.encoder_extractor(encoder)
    found = features.record_features(rows, read, 56, tiles=True)
    image, _ = letterbox(rows.image(0), 56, 42, 14)
    tiles = [(y, x) for y in (0, 28) for x in (0, 6)]  # 56 x 34 in squares of 28
    total, weight = 0.0, 0.0
    for y, x in tiles:
        tile = image[y : y + 28, x : x + 28]
        share = letterbox(tile, 28, 28, 14)[1].astype(np.float64).sum()
        total, weight = total + share * np.asarray(encoder(tile[None])["cls"][0]), weight + share
    np.testing.assert_allclose(found["cls"][0], total / weight, atol=1e-4)
    whole = features.record_features(rows, read, 28, tiles=True)  # one tile is the image
    np.testing.assert_allclose(whole["cls"], features.record_features(rows, read, 28)["cls"], atol=1e-6)


def test_patch_grids_are_those_of_the_image_alone(data, encoder):
    rows = read_rows([data])
    found = {place: rest for place, *rest in features.patch_grids(rows, [4, 45, 0], encoder, 56)}
    assert set(found) == {0, 4, 45}
    tokens, tissue, scale = found[4]
    image, expected = letterbox(rows.image(4), 56, 42, 14)
    assert tokens.shape == (4, 3, 12) and scale == pytest.approx(56 / rows.columns["height"][4])
    alone = np.asarray(encoder(image[None])["patches"]).reshape(4, 3, 12)
    np.testing.assert_allclose(tokens, alone, atol=2e-3)  # float16
    np.testing.assert_array_equal(tissue, expected)


def test_a_remembered_encoder_encodes_an_image_once(data, encoder, tmp_path):
    rows, calls = read_rows([data]), []

    class Counted(features.Remembered):
        def __getattr__(self, name):
            return getattr(encoder, name)

    def count(images, sizes):
        calls.append(len(images))
        return encoder(images, sizes)

    remembered = Counted(count, tmp_path)
    found = features.record_features(rows, features.encoder_extractor(remembered), 56)
    plain = features.record_features(rows, features.encoder_extractor(encoder), 56)
    np.testing.assert_array_equal(found["cls"], plain["cls"])
    np.testing.assert_array_equal(found["mean"], plain["mean"])
    encoded = sum(calls)
    for place, tokens, _, _ in features.patch_grids(rows, [4, 45, 0], remembered, 56):
        (expected,) = (t for p, t, _, _ in features.patch_grids(rows, [place], encoder, 56))
        np.testing.assert_allclose(tokens, expected, atol=2e-3)
    assert sum(calls) == encoded


def test_baselines_see_the_image_and_not_the_canvas(data):
    rows = read_rows([data]).take(np.arange(4))
    for name in ("mask geometry", "hand-made", "raw pixels"):
        found = features.record_features(rows, extractor(name, 14), 56)["x"]
        finer = features.record_features(rows, extractor(name, 7), 56)["x"]  # smaller canvases
        np.testing.assert_array_equal(found, finer)
        assert np.isfinite(found).all() and found.std(axis=0).max() > 0


def test_a_long_side_off_the_patch_grid_is_a_user_error(data):
    with pytest.raises(
        UserError, match="--long-side 100 is not a positive multiple of the patch size 14; 98 is"
    ):
        features.record_features(read_rows([data]), dataclasses.replace(MARKER, tile=56), 100)
    assert len(features.record_features(read_rows([data]), MARKER, 100)["x"])  # not a ViT


def test_untrained_keeps_the_shape_and_forgets_what_was_seen(encoder):
    seen = dataclasses.replace(encoder, provenance={"patients": ["x"], "pixels": []})
    random = features.untrained(seen, seed=3)
    assert random.vit == encoder.vit
    assert not random.provenance
    assert random.fingerprint != encoder.fingerprint


def test_convolutions_are_drawn_anew_too(encoder):
    params = {"conv": {"kernel": np.ones((3, 3, 8, 4), np.float32), "bias": np.ones(4, np.float32)}}
    tower = dataclasses.replace(encoder, vit=None, params=params)
    fresh = features.untrained(tower, seed=1).params["conv"]
    assert fresh["kernel"].std() == pytest.approx(np.sqrt(2 / 72), rel=0.1) and not fresh["bias"].any()
