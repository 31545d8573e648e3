"""Fine-tuning a tiny ViT end to end: what it learns, what chooses, what it may not look at."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mammodino_jax.augment import AugmentConfig, normalise
from mammodino_jax.encoder import Encoder
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import finetune as ft
from mammodino_jax.evaluate import probes
from mammodino_jax.evaluate.features import tissue_mean
from mammodino_jax.evaluate.items import group, read_rows
from mammodino_jax.evaluate.probes import Fold
from mammodino_jax.model.head import init_params
from mammodino_jax.model.vit import ViTConfig

REPO = Path(__file__).resolve().parents[2]
VIT = ViTConfig(dim=32, depth=2, heads=2, image_size=56, layerscale=1.0)
FAST = ft.FinetuneConfig(epochs=10, learning_rate=6e-3, batch_size=16, micro_batch=8)
SIDE = 56


def stripes_encoder() -> Encoder:
    return Encoder("tiny", VIT, init_params(VIT, None, seed=1))


def toy(n=160, seed=0):
    """Noise of two widths; the class is the direction of the stripes in a square anywhere."""
    rng = np.random.default_rng(seed)
    label, pictures = np.arange(n) % 2, []
    for i in range(n):
        height, width = 56, 42 + 14 * (i // 2 % 2)
        image = rng.integers(90, 160, (height, width))
        y, x = rng.integers(0, height - 28), rng.integers(0, width - 28)
        stripes = np.tile(np.where(np.arange(28) // 2 % 2, 255, 1), (28, 1))
        image[y : y + 28, x : x + 28] = stripes if label[i] else stripes.T
        pictures.append(image.astype(np.uint8))
    shape = np.array([p.shape for p in pictures])
    return ft.Images(pictures.__getitem__, np.arange(n), shape), label


def thirds(n):
    return Fold(np.arange(n // 2), np.arange(n // 2, 3 * n // 4), np.arange(3 * n // 4, n))


def frozen(images, n, model):
    """CLS and mean of tissue patches, as the linear probe gets them."""
    out = []
    for batch in ft.batches(images, np.arange(n), 8, SIDE, model.vit):
        found = model(batch["image"], batch["size"])
        canvas = batch["image"].shape[1] // 14, batch["image"].shape[2] // 14
        share = (batch["image"] > 0).reshape(8, canvas[0], 14, canvas[1], 14).mean(axis=(2, 4))
        out.append(np.concatenate([found["cls"], tissue_mean(np.asarray(found["patches"]), share)], axis=1))
    return np.concatenate(out)


@pytest.mark.slow
def test_learns_what_the_frozen_features_do_not_tell():
    images, label = toy()
    fold = thirds(160)
    score, predicted, settings = short(images, label, fold=fold, epochs=10)
    linear = probes.linear(frozen(images, 160, stripes_encoder()), label, fold, 2)[0]
    truth = label[fold.test]
    assert roc_auc_score(truth, score[:, 1]) > 0.95 > 0.7 > roc_auc_score(truth, linear[:, 1])
    np.testing.assert_allclose(score[:, :2].sum(axis=1), 1, rtol=1e-5)
    assert (predicted == truth).mean() > 0.8
    assert settings["epoch"] > 1 and settings["layer_decay"] == 0.75


def short(images, label, seed=0, fold=None, **changes):
    """Scores of three classes, of which no item may be: they share what is compiled."""
    c = dataclasses.replace(FAST, **{"epochs": 2, **changes})
    return ft.finetune(images, label, fold or thirds(48), 3, seed, stripes_encoder(), SIDE, c)


def test_the_test_part_changes_nothing_and_the_seed_everything():
    images, label = toy(48)
    score, _, settings = short(images, label)
    poisoned = np.where(np.arange(48) >= 36, 1 - label, label)
    read = lambda i: images.read(i) if i < 44 else np.full(images.shape[i], 200, np.uint8)  # noqa: E731
    other, _, chosen = short(dataclasses.replace(images, read=read), poisoned)
    np.testing.assert_array_equal(score[:8], other[:8])
    assert settings == chosen and np.nanmax(np.abs(score[8:] - other[8:])) > 0
    assert np.nanmax(np.abs(score - short(images, label, seed=1)[0])) > 0


def test_validation_ends_it_and_keeps_the_best_epoch(monkeypatch):
    losses, asked = iter([0.9, 0.5, 0.7, 0.6, 0.4]), []

    def loss(prob, label):
        asked.append(len(label))
        return next(losses)

    monkeypatch.setattr(ft, "balanced_log_loss", loss)
    images, label = toy(48)
    found = short(images, label, epochs=9, patience=2)
    assert asked == [12] * 4  # validation items; the fifth epoch is never trained
    assert (found[2]["epoch"], found[2]["validation_loss"]) == (2, 0.5)
    monkeypatch.setattr(ft, "balanced_log_loss", lambda prob, label: float("nan"))
    with pytest.raises(UserError, match="no finite validation loss; lower it"):
        short(images, label, patience=1)


def test_an_item_of_several_images_gets_their_mean():
    images, label = toy(48)
    apart = short(images, label)[0]
    twos = np.where(
        np.arange(48) < 36, np.arange(48), 36 + np.arange(48) // 2 % 6
    )  # tests of two images each
    fold = dataclasses.replace(thirds(48), test=np.arange(36, 42))
    together = short(dataclasses.replace(images, item=twos), label[:42], fold=fold)[0]
    for i in range(36, 42):
        np.testing.assert_allclose(together[i - 36], apart[twos[36:] == i].mean(axis=0), atol=1e-6)


def test_a_class_without_training_items_and_parts_without_classes():
    images, label = toy(48)
    label = np.where(np.arange(48) >= 33, 2, label)
    score, predicted, _ = short(images, label)
    assert np.isnan(score[:, 2]).all() and np.isfinite(score[:, :2]).all() and set(predicted) <= {0, 1}
    single = dataclasses.replace(thirds(48), train=np.arange(40, 44))
    assert np.isnan(short(images, label, fold=single)[0]).all()


def test_many_slices_are_read_evenly_spaced():
    item = np.array([0] * 100 + [-1] + [1] * 3)
    of_item = ft.Images(None, item, np.ones((104, 2), int)).of_items()
    assert list(of_item) == [0, 1] and of_item[1].tolist() == [101, 102, 103]
    assert len(of_item[0]) == ft.SLICES and (of_item[0][0], of_item[0][-1]) == (0, 99)
    assert set(np.diff(of_item[0])) <= {6, 7}


def test_images_of_built_data(data):
    rows = read_rows([data])
    items = group(rows, "breast", ["2d"])
    images = ft.images_of(rows, items, np.array([3, 5]))
    for place, item in enumerate((3, 5)):
        found = images.of_items()[place]
        np.testing.assert_array_equal(found, np.flatnonzero(items.item == item))
        assert images.read(int(found[0])).shape == tuple(images.shape[found[0]])
    assert len(images.of_items()) == 2
    assert images.canvas(84, 14) == (84, 56)  # 70 x 42 px


def in_micros(batch, micro):
    label = np.arange(len(batch["image"])) % 2
    batch = {**batch, "label": label.astype(np.int32)}
    return jax.tree.map(lambda a: a.reshape(-1, micro, *a.shape[1:]), batch)


def one_step(model, batch, c, look=None):
    """A step from a head that is not zero, so that the backbone gets gradients."""
    state = ft.init_state(model, 3)
    state["params"]["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(2), (2 * model.dim, 3))
    before = jax.tree.map(np.asarray, state["params"])
    whole, _, micros = ft.placements(8)
    state, weight, key = jax.device_put((state, np.ones(3, np.float32), jax.random.key(0)), whole)
    look = look or AugmentConfig(blur_prob=(0.0, 0.0, 0.0))
    after, loss = ft.train_step(
        state, jax.device_put(batch, micros), weight, 1e-3, key, vit=model.vit, look=look, optim=c.optim
    )
    return jax.tree.map(lambda a, b: np.asarray(a) - b, after["params"], before), float(loss)


def test_layers_learn_at_their_own_rates():
    vit = dataclasses.replace(VIT, drop_path=FAST.drop_path, remat="block")  # as finetune() sets them
    batch = next(ft.batches(toy(16)[0], np.arange(16), 16, SIDE, vit))
    moved, _ = one_step(Encoder("tiny", vit, init_params(VIT, None, seed=1)), in_micros(batch, 8), FAST)
    backbone = moved["backbone"]
    found = [
        backbone["patch_embed"]["proj"]["bias"],
        *(backbone["blocks"][i]["attn"]["proj"]["bias"] for i in range(2)),
        backbone["norm"]["bias"],
        moved["head"]["bias"],
    ]  # Adam's first step is the rate itself; biases do not decay
    rates = [np.abs(a).max() / 1e-3 for a in found]
    np.testing.assert_allclose(rates, [0.75**3, 0.75**2, 0.75, 1, 1], rtol=1e-2)


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(encoder, monkeypatch):
    monkeypatch.setattr(ft, "SCALE", 0.0)  # which image is moved how depends on its micro-batch
    monkeypatch.setattr(ft, "SHIFT", 0.0)
    still = AugmentConfig(jitter_prob=0.0, blur_prob=(0.0, 0.0, 0.0))
    batch = next(ft.batches(toy(8)[0], np.arange(8), 8, SIDE, encoder.vit))
    c = dataclasses.replace(FAST, clip=4.0)  # compiles afresh: SCALE is no argument
    (once, loss), (twice, loss_2) = (one_step(encoder, in_micros(batch, n), c, still) for n in (8, 4))
    assert loss == pytest.approx(loss_2, rel=1e-5)
    for a, b in zip(jax.tree.leaves(once["head"]), jax.tree.leaves(twice["head"]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_unmoved_features_are_those_of_the_frozen_encoder(encoder):
    images, _ = toy(8)
    batch = next(ft.batches(images, np.arange(8), 8, SIDE, encoder.vit))
    x = normalise(batch["image"].astype(np.float32) / 255, AugmentConfig(), 3)
    head = {"kernel": jnp.eye(2 * encoder.dim), "bias": jnp.zeros(2 * encoder.dim)}
    params = {"backbone": encoder.params, "head": head}
    found = ft.forward(params, x, batch["image"] > 0, batch["grids"], encoder.vit)
    np.testing.assert_allclose(found, frozen(images, 8, encoder), atol=1e-5)


def test_images_move_within_their_frames():
    image, inner = np.zeros((2, 56, 56), np.float32)
    image[:42, :28] = inner[14:28, 7:21] = 200
    keys, size = jax.random.split(jax.random.key(0), 8), jnp.array([42, 28])
    warp = jax.jit(jax.vmap(ft.warp, (None, None, 0)))
    for moved in np.asarray(warp(image, size, keys)):
        assert moved[42:].max() == 0 and moved[:, 28:].max() == 0
        assert (moved > 0).sum() > 0.75 * 42 * 28 and moved.max() < 200.1
    edges = [np.argwhere(moved > 100) for moved in np.asarray(warp(inner, size, keys))]
    assert len({tuple(e.min(axis=0)) for e in edges}) > 2 and len({len(e) for e in edges}) > 2


def test_what_cannot_be_tuned_is_said(encoder):
    images, label = toy(48)
    other = dataclasses.replace(encoder, vit=None, name="mammoclip")
    with pytest.raises(UserError, match="mammoclip cannot be fine-tuned: its network is not one of"):
        ft.finetune(images, label, thirds(48), 2, 0, other, SIDE)
    with pytest.raises(UserError, match="micro_batch 3 must divide batch_size 16"):
        short(images, label, micro_batch=3)
    with pytest.raises(UserError, match="--long-side 50 is not a positive multiple of the patch size 14"):
        ft.finetune(images, label, thirds(48), 2, 0, encoder, 50)


RUN = """
import json, sys
import jax
sys.path[:0] = sys.argv[1:]
import test_finetune as t
assert jax.device_count() == 2
score = t.short(*t.toy(48), epochs=4)[0]
print(json.dumps([score.tolist(), t.ft.train_step._cache_size()]))
"""


@pytest.mark.slow
def test_two_devices_learn_what_one_does():
    assert jax.device_count() == 1
    alone = short(*toy(48), epochs=4)[0]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(REPO), str(Path(__file__).parent)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    score, compiled = json.loads(done.stdout.splitlines()[-1])
    assert compiled == 1
    np.testing.assert_allclose(score, alone, atol=5e-5)
    assert np.nanstd(alone[:, 0]) > 1e-3  # it did learn something
