"""Where training starts: foreign weights, another run, statistics of the tissue, the right kind of records."""

import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import shrink, tiny, tiny_dataset

from mammodino_jax import checkpoint, provenance
from mammodino_jax.convert import folder
from mammodino_jax.convert.hub import to_hub
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.data.statistics import tissue_statistics
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import init_params
from mammodino_jax.recipe import from_config
from mammodino_jax.train import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "data", settings={"box": "tissue"})


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.allclose(x, y, rtol=0, atol=1e-6) for x, y in pairs)


@pytest.mark.slow
def test_continuation_starts_from_the_weights_and_says_so(dataset, tmp_path):
    """The `continue` recipe: the backbone stays as it was while the heads move, and moves after that."""
    c = shrink(importlib.import_module("configs.continue").get_config(f"hub:{tmp_path / 'w.safetensors'}"))
    c.data.update(sources=((str(dataset), "train", ("2d", "dbt"), 1.0),), workers=0)
    c.model.update(dim=128, heads=2, image_size=42, drop_path=0.0, remat="none", dtype="float32")
    c.loss.drop_path_group = 0
    c.init.update(freeze_steps=4, unfreeze_steps=10**7)  # step 4 moves it by nothing to speak of
    c.optim.update(warmup_steps=1, base_lr=0.1)
    recipe = from_config(c)
    weights = init_params(recipe.model, None, seed=5)
    save_file(to_hub(weights), tmp_path / "w.safetensors")
    c.steps = 5
    frozen = train(c, tmp_path / "frozen")
    got = frozen["student"]["backbone"]
    assert equal(got["blocks"], weights["blocks"]) and equal(got["pos_embed"], weights["pos_embed"])
    assert not equal(got["patch_embed"], weights["patch_embed"])
    fresh = init_params(recipe.model, recipe.head, recipe.seed)
    assert not equal(frozen["student"]["dino_head"]["mlp"], fresh["dino_head"]["mlp"])
    encoder = load_encoder(str(tmp_path / "frozen"))
    assert encoder.provenance["foreign"] == ["w.safetensors"] and len(encoder.provenance["patients"]) == 50
    folder.export(encoder, "hf", tmp_path / "out", "test")
    assert "Started from w.safetensors, whose terms apply" in (tmp_path / "out/README.md").read_text()
    c.steps, c.init.unfreeze_steps = 6, 1
    thawed = train(c, tmp_path / "thawed")
    assert not equal(thawed["student"]["backbone"]["blocks"], weights["blocks"])


@pytest.mark.slow
def test_second_stage_starts_from_the_teacher_of_the_first(dataset, tmp_path):
    """Other crops, so resampled positions; heads too; what the first stage saw counts as seen."""
    first = train(tiny(dataset, steps=2), tmp_path / "low")
    c = tiny(dataset, steps=1, init={"weights": str(tmp_path / "low")}, crops={"global_size": 56})
    c.optim.update(base_lr=1e-9)
    second = train(c, tmp_path / "high")
    for name in ("blocks", "patch_embed", "cls_token"):
        for a, b in zip(*(jax.tree.leaves(s["backbone"][name]) for s in (second["teacher"], first["teacher"])), strict=True):  # fmt: skip
            np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(
        second["teacher"]["dino_head"]["last_layer"]["weight_v"],
        first["teacher"]["dino_head"]["last_layer"]["weight_v"], atol=1e-6,
    )  # fmt: skip
    assert second["teacher"]["backbone"]["pos_embed"].shape == (1, 17, 32)
    assert first["teacher"]["backbone"]["pos_embed"].shape == (1, 10, 32)
    seen = checkpoint.load(tmp_path / "high", "provenance")
    assert len(seen["patients"]) == 50 and seen["foreign"] == []
    with_head = provenance.inherited(str(tmp_path / "low"), "RAD/dino_head.safetensors")
    assert with_head["foreign"] == ["dino_head.safetensors"] and with_head["patients"] == seen["patients"]


def test_weights_that_do_not_fit_are_named_before_anything_is_written(dataset, tmp_path):
    c = tiny(dataset, init={"weights": f"hub:{tmp_path / 'w.safetensors'}"}, model={"dim": 128})
    save_file(to_hub(init_params(from_config(c).model, None, 0)), tmp_path / "w.safetensors")
    c.model.dim = 64
    with pytest.raises(UserError, match=r"config\.model\.dim=128"):
        train(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tissue_statistics_are_those_of_the_tissue(dataset, tmp_path):
    data = DataConfig(sources=((str(dataset), "train", ("2d",), 1.0),))
    from mammodino_jax.data.index import open_records

    images = [open_records(data.sources).image(i) for i in range(40)]
    tissue = [i[i > 0] / 255 for i in images]
    mean, std = tissue_statistics(data)
    assert mean == pytest.approx(np.mean([t.mean() for t in tissue]), abs=1e-4)
    assert std == pytest.approx(np.sqrt(np.mean([(t**2).mean() for t in tissue]) - mean**2), abs=1e-3)
    c = tiny(dataset, steps=1, augment={"normalise": "tissue"})
    train(c, tmp_path)
    train(c, tmp_path)  # the same command again finds its own workdir
    encoder = load_encoder(str(tmp_path))
    assert encoder.mean[0] == encoder.mean[2] != 0.485 and 0 < encoder.std[0] < 0.5


def test_records_of_another_box_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match='box is "tisue"'):
        DataConfig(box="tisue")
    with pytest.raises(UserError, match=r"built with --box tissue, but data\.box asks for full"):
        train(tiny(dataset, data={"box": "full"}), tmp_path)
