import numpy as np
import pytest

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import probes
from mammodino_jax.evaluate.metrics import summarise


def table(patients=60, images=2, width=24, seed=0):
    """Noise features, binary labels, patients: [n, D], [n], [n]."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    return rng.normal(size=(len(patient), width)), (patient % 2), patient


def result(probe, x, label, patient, folds, classes=2):
    found = summarise(probes.run(probe, x, label, patient, folds, classes)[0], draws=1000, seed=0)
    return (
        found["auc"]["value"],
        found["auc"]["low"],
        found["auc"]["high"],
        found["balanced_accuracy"]["value"],
    )


@pytest.mark.parametrize("name", probes.PROBES)
def test_separable_features_reach_auc_1(name):
    x, label, patient = table()
    x[:, :12] += 6 * label[:, None]
    folds = probes.cross_folds(label, patient, 5, 0, "t")
    assert result(probes.PROBES[name], x, label, patient, folds) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", probes.PROBES)
def test_four_separable_classes_reach_macro_auc_1(name):
    x, _, patient = table()
    label = patient % 4
    x += 9 * np.tile(np.eye(4), 6)[label]
    found = result(probes.PROBES[name], x, label, patient, probes.cross_folds(label, patient, 5, 0, "t"), 4)
    assert found == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", probes.PROBES)
def test_noise_covers_one_half(name):
    # A fixed split: cross-validation of balanced noise is biased below one half.
    inside = 0
    for seed in range(10):
        x, label, patient = table(patients=90, seed=seed)
        parts = np.split(np.arange(len(label)), [80, 120])
        _, low, high, _ = result(probes.PROBES[name], x, label, patient, [probes.Fold(*parts)])
        inside += low <= 0.5 <= high
    assert inside >= 8


def test_majority_is_one_half():
    x, label, patient = table()
    found = result(probes.majority, x, label, patient, probes.cross_folds(label, patient, 5, 0, "t"))
    assert found == (0.5, 0.5, 0.5, 0.5)


def test_test_items_change_neither_the_choice_of_l2_nor_each_other():
    x, label, _ = table()
    x[:, 0] += label
    fold = probes.Fold(*np.split(np.arange(120), [60, 90]))
    score, _, chosen = probes.linear(x, label, fold, 2)
    x_other, label_other = x.copy(), label.copy()
    x_other[100:], label_other[90:] = 1e6, 1 - label[90:]
    score_other, _, chosen_other = probes.linear(x_other, label_other, fold, 2)
    assert chosen == chosen_other
    np.testing.assert_allclose(score[:10], score_other[:10])
    knn, knn_other = (probes.knn(v, label, fold, 2)[0] for v in (x, x_other))
    np.testing.assert_allclose(knn[:10], knn_other[:10])


def test_l2_is_chosen_on_validation():
    x, label, _ = table(patients=120)
    x[:, 0] += 3 * label
    fold = probes.Fold(*np.split(np.arange(240), [120, 180]))
    useful = probes.linear(x, label, fold, 2)[2]["C"]
    misleading = label.copy()
    misleading[fold.val] = 1 - label[fold.val]
    assert probes.linear(x, misleading, fold, 2)[2]["C"] == probes.STRENGTHS[0] < useful


def test_standardise_uses_the_training_part_only_and_drops_constants():
    x = np.random.default_rng(0).normal(3, 2, (20, 3))
    x[:, 1] = 7.0
    train = np.arange(12)
    z = probes.standardise(x, train)
    np.testing.assert_allclose(z[train][:, [0, 2]].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(z[train][:, [0, 2]].std(axis=0), 1)
    assert (z[:, 1] == 0).all()
    x[12:] = 1e9
    np.testing.assert_array_equal(probes.standardise(x, train)[train], z[train])


def test_folds_keep_patients_apart_and_test_everything_once():
    _, _, patient = table(patients=37, images=3)
    label = (patient % 4 == 0).astype(int)
    folds = probes.cross_folds(label, patient, 5, 0, "t")
    assert len(folds) == 5
    np.testing.assert_array_equal(np.sort(np.concatenate([f.test for f in folds])), np.arange(111))
    for f in folds:
        groups = [set(patient[part]) for part in (f.train, f.val, f.test)]
        assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
        assert len(f.train) + len(f.val) + len(f.test) == 111
        assert 0 < label[f.test].mean() < 1


def test_a_patient_in_two_splits_is_refused_with_the_count():
    with pytest.raises(UserError, match="2 of 3 patients are in more than one split"):
        probes.check_patients(["a", "a", "b", "c", "c"], ["train", "test", "val", "train", "val"])
    probes.check_patients(["a", "a", "b"], ["train", "train", "test"])


def test_missing_split_and_too_few_patients_are_user_errors():
    with pytest.raises(UserError, match="no labelled item in split val"):
        probes.official_fold(np.array(["train", "test"], object), "density")
    with pytest.raises(UserError, match='--folds 5 does not suit task "density" of 3 patients'):
        probes.cross_folds(np.array([0, 1, 0]), np.array([1, 2, 3]), 5, 0, "density")
    with pytest.raises(UserError, match="and 3 items in its largest class"):
        probes.cross_folds(np.arange(9) // 3, np.arange(9), 5, 0, "density")


@pytest.mark.parametrize("name", probes.PROBES)
def test_a_class_without_training_items_has_no_score(name):
    x, _, patient = table(patients=30)
    label = np.where(np.arange(60) < 30, patient % 2, 2)
    fold = probes.Fold(np.arange(20), np.arange(20, 40), np.arange(40, 60))
    score, predicted, _ = probes.PROBES[name](x, label, fold, 3)
    assert np.isnan(score[:, 2]).all()
    assert np.isfinite(score[:, :2]).all()
    assert set(predicted) <= {0, 1}


def test_scores_of_two_classes_are_at_the_prevalence_of_the_training_part():
    balanced = np.array([[0.5, 0.5], [0.1, 0.9]])
    score = probes.at_prevalence(balanced, np.repeat([0, 1], [98, 2]))
    np.testing.assert_allclose(score[0], [0.98, 0.02])
    assert score[0, 1] < score[1, 1] < 0.9  # ranks stay
    three = np.full((1, 3), 1 / 3)
    assert probes.at_prevalence(three, np.array([0, 1, 2, 2])) is three
