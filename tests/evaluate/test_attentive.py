"""Attentive probing: one cell in many, folds, choices, determinism."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mammodino_jax.evaluate import attentive, probes
from mammodino_jax.evaluate.features import patch_grids
from mammodino_jax.evaluate.items import group, read_rows, units
from mammodino_jax.evaluate.probes import Fold

FOLD = Fold(np.arange(120), np.arange(120, 180), np.arange(180, 300))


def one_cell(n=300, K=25, D=16, seed=0):
    """Tokens of noise; every item has a lesion-like cell, whose other feature tells the class."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2
    tokens = rng.normal(size=(n, K, D))
    where = rng.integers(0, K - 5, n)
    tokens[np.arange(n), where, 0] += 6
    tokens[:, :, 1] *= 2
    tokens[np.arange(n), where, 1] = (2 * label - 1) * 1.5 + rng.normal(size=n) / 2
    weight = np.ones((n, K), np.float32)
    weight[:, K - 5 :] = 0
    tokens[:, K - 5 :] = 0
    return (tokens.astype(np.float16), weight), label


def score_auc(score, label):
    return roc_auc_score(label, score[:, 1])


def test_finds_the_one_cell_that_the_mean_loses():
    x, label = one_cell()
    score, predicted, settings = attentive.attentive(x, label, FOLD, 2, seed=0)
    mean = (x[0] * x[1][..., None]).sum(axis=1) / x[1].sum(axis=1, keepdims=True)
    pooled = probes.linear(mean, label, FOLD, 2)[0]
    test = label[FOLD.test]
    assert score_auc(score, test) > 0.95 > 0.85 > score_auc(pooled, test)
    assert (predicted == test).mean() > 0.85
    assert (settings["learning_rate"], settings["weight_decay"]) in attentive.CANDIDATES


def test_noise_is_not_learnt():
    x, _ = one_cell()
    label = np.random.default_rng(1).permutation(np.arange(300) % 2)
    score = attentive.attentive(x, label, FOLD, 2, seed=0)[0]
    assert 0.35 < score_auc(score, label[FOLD.test]) < 0.65


def test_the_test_part_changes_nothing_but_its_own_scores():
    x, label = one_cell()
    found = attentive.attentive(x, label, FOLD, 2, seed=0)
    tokens, poisoned = x[0].copy(), label.copy()
    tokens[240:], poisoned[180:] = 100, 1 - label[180:]
    other = attentive.attentive((tokens, x[1]), poisoned, FOLD, 2, seed=0)
    np.testing.assert_array_equal(found[0][:60], other[0][:60])
    assert found[2] == other[2]


def test_deterministic_by_seed_and_compiled_once_for_all_folds():
    x, label = one_cell()
    before = attentive.update._cache_size()
    folds = [FOLD, Fold(np.arange(90, 300), np.arange(30), np.arange(30, 90))]
    first, _ = (attentive.attentive(x, label, fold, 2, seed=0)[0] for fold in folds)
    assert attentive.update._cache_size() - before <= 1
    np.testing.assert_array_equal(first, attentive.attentive(x, label, FOLD, 2, seed=0)[0])
    assert np.abs(first - attentive.attentive(x, label, FOLD, 2, seed=1)[0]).max() > 0


def test_validation_chooses():
    x, label = one_cell()
    useful = attentive.attentive(x, label, FOLD, 2, seed=0)[2]
    misleading = label.copy()
    misleading[FOLD.val] = 1 - label[FOLD.val]
    found = attentive.attentive(x, misleading, FOLD, 2, seed=0)[2]
    assert found["updates"] < useful["updates"] and found["learning_rate"] == 1e-4


def test_classes_without_training_items_and_parts_without_classes():
    x, label = one_cell()
    label = np.where(np.arange(300) >= 170, 2, label)
    score, predicted, _ = attentive.attentive(x, label, FOLD, 3, seed=0)
    assert np.isnan(score[:, 2]).all() and np.isfinite(score[:, :2]).all() and set(predicted) <= {0, 1}
    np.testing.assert_allclose(score[:, :2].sum(axis=1), 1, rtol=1e-5)
    single = dataclasses.replace(FOLD, train=np.arange(180, 200))
    assert np.isnan(attentive.attentive(x, label, single, 3)[0]).all()
    unseen = dataclasses.replace(FOLD, val=np.arange(180, 200))
    assert np.isnan(attentive.attentive(x, label, unseen, 3)[0]).all()


def test_an_item_without_tissue_gets_a_finite_score():
    x, label = one_cell()
    x[0][299], x[1][299] = 0, 0
    x[0][0], x[1][0] = 0, 0
    assert np.isfinite(attentive.attentive(x, label, FOLD, 2, seed=0)[0]).all()


@pytest.mark.parametrize("shape", [(5, 3), (16, 9), (37, 22)])
def test_cells_are_tissue_weighted_means(shape):
    rng = np.random.default_rng(0)
    tokens, tissue = rng.normal(size=(*shape, 4)).astype(np.float16), rng.random(shape).astype(np.float16)
    tissue[: shape[0] // 2, 0] = 0
    found, weight = attentive.cells(tokens, tissue, side=8)
    assert (found.shape, found.dtype, weight.shape, weight.dtype) == ((64, 4), np.float16, (64,), np.float32)
    bounds = [[-(-c * n // min(n, 8)) for c in range(min(n, 8) + 1)] for n in shape]
    for r, c in np.ndindex(8, 8):
        if r >= min(shape[0], 8) or c >= min(shape[1], 8):
            assert weight[8 * r + c] == 0 and (found[8 * r + c] == 0).all()
            continue
        block = np.s_[bounds[0][r] : bounds[0][r + 1], bounds[1][c] : bounds[1][c + 1]]
        t = tissue[block].astype(np.float32)
        assert weight[8 * r + c] == pytest.approx(t.mean(), rel=1e-5)
        mean = (t[..., None] * tokens[block]).sum(axis=(0, 1)) / t.sum() if t.any() else np.zeros(4)
        np.testing.assert_allclose(found[8 * r + c], mean, atol=2e-3)


def test_a_small_grid_keeps_its_patches():
    tokens = np.arange(24, dtype=np.float16).reshape(3, 4, 2)
    found, weight = attentive.cells(tokens, np.ones((3, 4), np.float16), side=4)
    np.testing.assert_array_equal(found[:12], tokens.reshape(12, 2))
    np.testing.assert_array_equal(weight, [1] * 12 + [0] * 4)


@pytest.mark.parametrize("level, images", [("image", 1), ("breast", 3)])
def test_items_get_the_cells_of_their_images(data, encoder, monkeypatch, level, images):
    rows = read_rows([data])
    items = group(rows, level)
    found = {i: (tokens, tissue) for i, tokens, tissue, _ in patch_grids(rows, range(len(rows)), encoder, 70)}

    def shuffled(rows, places, *_):
        for i in np.random.default_rng(0).permutation(places):
            yield i, *found[i], 1.0

    monkeypatch.setattr(attentive, "patch_grids", shuffled)
    tokens, weight, left_out = attentive.item_cells(rows, items, encoder, 70, side=4)
    assert tokens.shape == (len(items.first), 16 * images, 12) and weight.shape == tokens.shape[:2]
    assert left_out == 0 and tokens.dtype == np.float16
    unit = units(rows)
    for n in (0, 1, len(items.first) - 1):
        mine = np.flatnonzero(items.item == n)
        for slot, name in enumerate(dict.fromkeys(unit[mine])):
            cells = [attentive.cells(*found[i], side=4) for i in mine if unit[i] == name]
            x, w = (np.stack(a).astype(np.float64) for a in zip(*cells, strict=True))
            mean = (x * w[..., None]).sum(axis=0) / np.maximum(w.sum(axis=0), 1e-9)[:, None]
            part = np.s_[16 * slot : 16 * slot + 16]
            np.testing.assert_allclose(tokens[n][part], mean, atol=2e-3)
            np.testing.assert_allclose(weight[n][part], w.mean(axis=0), atol=1e-5)


def test_images_past_the_fourth_are_counted(data, encoder):
    rows = read_rows([data])
    items = dataclasses.replace(group(rows), item=np.where(np.arange(len(rows)) < 6, 0, 1)[: len(rows)])
    items = dataclasses.replace(items, first=np.array([0, 6]))
    of_units = [len(set(units(rows)[items.item == n])) for n in (0, 1)]
    tokens, _, left_out = attentive.item_cells(rows, items, encoder, 70, side=2)
    assert tokens.shape == (2, 16, 12) and left_out == sum(n - 4 for n in of_units if n > 4) > 0
