import cv2
import numpy as np
import pytest

from mammodino_jax import visualize
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.features import aggregate, encoder_extractor, record_features
from mammodino_jax.evaluate.items import group, read_rows


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


def test_choose_leaves_out_what_read_rows_leaves_out(labelled, encoder, tmp_path):
    content = labelled.items(4)
    for _, row in content:
        if row["patient_id"] == "p3" and row["kind"] == "dbt":
            row["duplicate_of"] = "other"
        elif row["patient_id"] == "p3" or row["view"] == "CC":
            row["flags"] = ["mask_suspect"]
    folder = labelled.write(tmp_path / "d", content)
    pictures = visualize.choose(folder, 99)
    assert pictures and {p.row["patient_id"] for p in pictures} == {"p0", "p1", "p2"}
    assert not any(p.row["flags"] for p in pictures)
    (tmp_path / "out").mkdir()
    assert "slices.png" in visualize.write_page(encoder, folder, tmp_path / "out", 3, 56, "")
    middle = [
        {**row, "flags": ["mask_suspect"] if row["slice_index"] in (None, 1) else []} for _, row in content
    ]
    content = [(image, row) for (image, _), row in zip(content, middle, strict=True)]
    with pytest.raises(UserError, match="no image to show"):
        visualize.choose(labelled.write(tmp_path / "e", content), 1)


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


def test_centred_colours_show_what_differs_within_images():
    """Two images far apart, each with the same two kinds of patches."""
    rng = np.random.default_rng(0)
    kind = np.repeat([-1.0, 1.0], 8)
    looks = []
    for offset in (0, 50):
        tokens = np.zeros((16, 6))
        tokens[:, 0], tokens[:, 1], tokens[:, 2:] = offset, kind, rng.normal(0, 0.01, (16, 4))
        looks.append(visualize.Look(tokens.reshape(4, 4, 6), np.ones((4, 4)), None, (8, 8)))
    plain, centred = (visualize.colour(looks, 2, centre=c) for c in (False, True))
    first = [tile[::2, ::2, 0].astype(int).ravel() for tile in plain + centred]
    assert abs(first[0].mean() - first[1].mean()) > 150 and np.ptp(first[0]) < 20
    assert abs(first[2][:8].mean() - first[2][8:].mean()) > 150
    assert abs(first[2].mean() - first[3].mean()) < 10


def test_attention_is_that_of_the_last_block(data, encoder):
    """Against the softmax written out, in an encoder of one block; canvas patches beyond an image get none."""
    import jax
    import jax.numpy as jnp

    from mammodino_jax.augment import AugmentConfig, normalise
    from mammodino_jax.model.head import bind

    pictures = visualize.choose(data, 2)
    for seen in visualize.look(encoder, [p.image for p in pictures], 56):
        assert seen.attention.shape == seen.tissue.shape == seen.tokens.shape[:2]
        assert 0 < seen.attention.min() and 0.5 < seen.attention.sum() < 1
    image = cv2.resize(pictures[0].image, (56, 56))

    @jax.jit
    def queries_and_keys(params, x):
        model = bind(params, encoder.vit)
        tokens = jnp.concatenate([model.cls_token[...], model.patch_embed(x).reshape(1, 16, -1)], axis=1)
        block = model.blocks[0]
        return jnp.split(block.attn.qkv(block.norm1(tokens + model.positions(4, 4)))[0], 3, axis=1)[:2]

    x = normalise(image[None] / np.float32(255), AugmentConfig(), 3)
    q, k = queries_and_keys(encoder.params, x)
    expected = jax.nn.softmax(k @ q[0] / np.sqrt(encoder.vit.dim))[1:]
    found = visualize.look(encoder, [image], 56)[0]
    np.testing.assert_allclose(found.attention.ravel(), expected, atol=1e-5)
    patches = encoder(image[None])["patches"][0]
    np.testing.assert_allclose(found.tokens.reshape(16, -1), patches, atol=1e-5)


def test_neighbours_are_of_other_patients_and_nearest(data, encoder, tmp_path):
    rows, pictures = read_rows([data]), visualize.choose(data, 3)
    items = group(rows)
    x = aggregate(record_features(rows, encoder_extractor(encoder), 56)["cls"], rows, items)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for picture, near in visualize.neighbours(encoder, rows, pictures, 56, tmp_path):
        patients = [rows.columns["patient_id"][i] for _, i in near]
        assert len(near) == visualize.NEIGHBOURS and picture.row["patient_id"] not in patients
        cosine = [c for c, _ in near]
        mine = items.item[rows.columns["image_id"].tolist().index(picture.row["image_id"])]
        best = np.sort((x @ x[mine])[items.patient != picture.row["patient_id"]])[::-1]
        np.testing.assert_allclose(cosine, best[: len(near)], atol=1e-6)


class NoTransformer:
    """A network of another kind: the mean grey of each patch."""

    name, vit, patch_size, dim, long_side, made_for, fingerprint = "convnet", None, 14, 3, 56, {}, "0"

    def __call__(self, images, sizes=None):
        B, H, W = images.shape
        grey = images.reshape(B, H // 14, 14, W // 14, 14).mean(axis=(2, 4)).reshape(B, -1, 1) / 255
        patches = np.concatenate([grey, grey**2, 1 - grey], axis=2).astype(np.float32)
        return {"cls": patches.mean(axis=1), "patches": patches}


@pytest.mark.parametrize("transformer", [True, False])
def test_the_command_writes_pictures_and_a_page(monkeypatch, data, encoder, tmp_path, transformer):
    used = encoder if transformer else NoTransformer()
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda name: used)
    command = ["--encoder", "tiny", "--data", str(data), "--output", str(tmp_path / "out"), "--images", "3"]
    visualize.main([*command, "--long-side", "56"])
    page = (tmp_path / "out/index.html").read_text()
    names = ["patch_pca", "neighbours", "slices"] + ["attention"] * transformer
    for name in names:
        assert cv2.imread(str(tmp_path / f"out/{name}.png")).any()
    assert {p.stem for p in (tmp_path / "out").glob("*.png")} == set(names)
    assert page.count("<img") == 3 + 3 + 3 + 3 * transformer  # the volume has 3 slices
    assert ("it has no attention to show" in page) != transformer and "http" not in page
    with pytest.raises(UserError, match="--images 0"):
        visualize.main([*command[:-1], "0"])
    if transformer:
        with pytest.raises(UserError, match="--long-side 60 is not a positive multiple"):
            visualize.main([*command[:4], "--output", str(tmp_path / "no"), "--long-side", "60"])
        assert not (tmp_path / "no").exists()


def test_pictures_of_raw_files(monkeypatch, labelled, encoder, tmp_path):
    monkeypatch.setattr("mammodino_jax.encoder.load_encoder", lambda name: encoder)
    monkeypatch.setenv("MAMMODINO_KEY_FILE", str(tmp_path / "key"))
    (tmp_path / "in").mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"in/{i}.png"), labelled.breast(120, i, 300, 200))
    command = ["--encoder", "tiny", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    visualize.main([*command, "--long-side", "56"])
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<img") == 9 and "3 records" in page and not (tmp_path / "out/slices.png").exists()
