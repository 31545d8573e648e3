import cv2
import numpy as np
import pytest

from mammodino_jax import visualize
from mammodino_jax.errors import UserError


def test_choose_shows_every_kind_and_view_and_other_patients(data):
    pictures = visualize.choose(data, 6)
    shown = [(p.row["kind"], p.row["view"]) for p in pictures]
    assert set(shown[:3]) == {("2d", "CC"), ("2d", "MLO"), ("dbt", "MLO")}
    assert len({p.row["patient_id"] for p in pictures}) == 6
    assert {p.row["split"] for p in pictures} == {"test"}
    for p in pictures:
        assert p.image.shape == (p.row["height"], p.row["width"])
        assert p.row["kind"] != "dbt" or p.row["slice_index"] == 1


def test_choose_gives_what_there_is(labelled, tmp_path):
    folder = labelled.write(tmp_path / "d", labelled.items(4, slices=0))
    assert len(visualize.choose(folder, 99)) == 8


def test_patch_pca_colours_tissue_by_its_largest_directions():
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1], 50)
    tokens = np.zeros((100, 16))
    tokens[:, 5] = np.where(group, 10, -10) + rng.normal(0, 0.1, 100)
    tokens[:, 2] = rng.normal(0, 1, 100)
    tissue = np.ones(100)
    tissue[::10] = 0.2
    tokens[::10] = 1e4  # background must not steer the components
    colour = visualize.patch_pca(tokens, tissue)
    assert (colour.shape, colour.dtype) == ((100, 3), np.uint8)
    assert not colour[::10].any()
    inside = tissue > 0.5
    red = colour[inside, 0].astype(int)
    assert abs(red[group[inside] == 0].mean() - red[group[inside] == 1].mean()) > 150
    assert abs(np.corrcoef(colour[inside, 1], tokens[inside, 2])[0, 1]) > 0.9


def test_patch_pca_without_tissue_is_black():
    assert not visualize.patch_pca(np.ones((9, 4)), np.zeros(9)).any()


def test_tiles_are_as_large_as_the_images(data, encoder):
    pictures = visualize.choose(data, 3)
    tiles = visualize.pca_tiles(encoder, pictures, 56)
    for picture, tile in zip(pictures, tiles, strict=True):
        height, width = picture.image.shape
        assert tile.shape == (56, round(56 * width / height), 3)
        assert tile.any()
        assert not tile[:14, -10:].any()  # the corner is background


def test_the_command_writes_one_picture(monkeypatch, data, encoder, tmp_path):
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda name: encoder)
    command = ["--encoder", "tiny", "--data", str(data), "--output", str(tmp_path / "out"), "--images", "2"]
    visualize.main([*command, "--long-side", "56"])
    assert cv2.imread(str(tmp_path / "out/patch_pca.png")).any()
    with pytest.raises(UserError, match="--images 0"):
        visualize.main([*command[:-1], "0"])
