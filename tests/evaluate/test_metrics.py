import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from mammodino_jax.evaluate.metrics import Scored, auc, balanced_accuracy, patient_weights, summarise


def scored(label, score, patient=None):
    """Two classes, scored by the probability of class 1."""
    score = np.asarray(score, float)
    label = np.asarray(label)
    patient = np.arange(len(label)) if patient is None else patient
    return Scored(patient, label, np.stack([1 - score, score], axis=1), (score > 0.5).astype(int))


def test_auc_equals_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive = rng.random(60) < 0.3
        score = rng.integers(0, 12, 60) / 7  # many ties
        weights = rng.integers(0, 4, (5, 60))
        ours = auc(positive, score, weights)
        for w, value in zip(weights, ours, strict=True):
            assert value == pytest.approx(roc_auc_score(positive, score, sample_weight=w), abs=1e-12)
        assert auc(positive, score)[0] == pytest.approx(roc_auc_score(positive, score), abs=1e-12)


def test_macro_auc_and_balanced_accuracy_equal_scikit_learn():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 4, 80)
    score = rng.random((80, 4)) + np.eye(4)[label] * 0.4
    score /= score.sum(axis=1, keepdims=True)
    fold = Scored(np.arange(80), label, score, score.argmax(axis=1))
    result = summarise([fold], draws=1000, seed=0)
    assert result["auc"] == pytest.approx(roc_auc_score(label, score, multi_class="ovr", average="macro"))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, fold.predicted))
    assert balanced_accuracy(label, np.zeros(80)) == 0.25
    assert result["low"] < result["auc"] < result["high"]


def test_bootstrap_draws_whole_patients():
    patient = np.repeat(np.array(["b", "a", "c", "d"]), [3, 1, 5, 2])
    weights = patient_weights(patient, 200, np.random.default_rng(0))
    for name in np.unique(patient):
        mine = weights[:, patient == name]
        assert (mine == mine[:, :1]).all()  # all images of a patient, as often as the patient was drawn
    first_of_each = weights[:, np.unique(patient, return_index=True)[1]]
    assert (first_of_each.sum(axis=1) == 4).all()
    assert len(np.unique(first_of_each, axis=0)) > 20


def test_images_of_one_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    label, score = np.repeat(rng.integers(0, 2, 30), 10), np.repeat(rng.random(30), 10)
    by_patient = summarise([scored(label, score, np.repeat(np.arange(30), 10))], draws=1000, seed=0)
    by_image = summarise([scored(label, score)], draws=1000, seed=0)
    width = by_patient["high"] - by_patient["low"]
    assert width > 2.5 * (by_image["high"] - by_image["low"])  # ten copies: sqrt(10) too narrow by image


def test_same_seed_same_interval():
    rng = np.random.default_rng(3)
    fold = scored(rng.integers(0, 2, 40), rng.random(40))
    assert summarise([fold], 1000, seed=5) == summarise([fold], 1000, seed=5)
    assert summarise([fold], 1000, seed=5)["low"] != summarise([fold], 1000, seed=6)["low"]


def test_folds_are_never_ranked_against_each_other():
    perfect = scored([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    shifted = scored([0, 0, 1, 1], [0.91, 0.92, 0.93, 0.94])  # pooled, its negatives would outrank positives
    assert summarise([perfect, shifted], 1000, 0)["auc"] == 1.0


def test_one_class_fold_is_counted_and_left_out():
    good, one_class = scored([0, 1, 0, 1], [0.2, 0.1, 0.3, 0.9]), scored([0, 0, 0], [0.4, 0.2, 0.9])
    result = summarise([good, one_class], 1000, 0)
    assert result["auc"] == summarise([good], 1000, 0)["auc"] == 0.5
    assert result["fold_auc"] == [0.5, None]
    assert result["not_computed"] == 1


def test_no_fold_with_both_classes_gives_no_figure():
    result = summarise([scored([0, 0], [0.4, 0.2]), scored([1, 1], [0.4, 0.2])], 1000, 0)
    assert (result["auc"], result["low"], result["high"], result["not_computed"]) == (None, None, None, 2)


def test_a_class_the_probe_never_saw_is_not_computed():
    score = np.array([[0.5, 0.5, np.nan]] * 6)
    fold = Scored(np.arange(6), np.array([0, 1, 2] * 2), score, np.zeros(6, int))
    result = summarise([fold], 1000, 0)
    assert result["auc"] is None
    assert result["not_computed"] == 1
