import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import rankdata
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    roc_auc_score,
    roc_curve,
)

from mammodino_jax.evaluate import metrics
from mammodino_jax.evaluate.metrics import Scored, interval, resample, summarise


def scored(label, score, patient=None, repeat=0):
    """Two classes, scored by the probability of class 1."""
    score, label = np.asarray(score, float), np.asarray(label)
    patient = np.arange(len(label)) if patient is None else patient
    both = np.stack([1 - score, score], axis=1)
    return Scored(patient, label, both, (score > 0.5).astype(int), repeat=repeat)


def sklearn_sensitivity(positive, score, sample_weight=None):
    fpr, tpr, _ = roc_curve(positive, score, sample_weight=sample_weight, drop_intermediate=False)
    return tpr[fpr <= 0.1].max()


def direct_pf1(y, p, sample_weight=None):
    """From precision and recall, item by item, as the challenge defines it."""
    w = np.ones(len(y)) if sample_weight is None else sample_weight
    tp = fp = 0.0
    for weight, truth, probability in zip(w, y, np.clip(p, 0, 1), strict=True):
        tp += weight * probability * truth
        fp += weight * probability * (1 - truth)
    precision, recall = tp / (tp + fp), tp / sum(w * y)
    return 2 * precision * recall / (precision + recall)


PEERS = {
    "auc": roc_auc_score,
    "average_precision": average_precision_score,
    "sensitivity_at_90_specificity": sklearn_sensitivity,
    "pf1": direct_pf1,
}


@pytest.mark.parametrize("name", PEERS)
def test_ranked_metrics_equal_scikit_learn_with_ties_and_weights(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive = rng.random(60) < 0.3
        score = (rng.integers(0, 12, 60) + 3 * positive) / 15  # many ties
        weights = rng.integers(0, 4, (5, 60))
        ours = metrics.RANKED[name](positive, score, weights)
        for w, value in zip(weights, ours, strict=True):
            assert value == pytest.approx(PEERS[name](positive, score, sample_weight=w), abs=1e-12)
            repeated = np.repeat(np.arange(60), w)  # a weight is how often an item is there
            assert value == pytest.approx(PEERS[name](positive[repeated], score[repeated]), abs=1e-12)
        once = metrics.RANKED[name](positive, score)
        assert once[0] == pytest.approx(PEERS[name](positive, score), abs=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_one_class_or_an_unknown_score_is_not_computed(name):
    metric, score = metrics.RANKED[name], np.array([0.1, 0.6, 0.3, 0.8])
    for positive in (np.zeros(4, bool), np.ones(4, bool)):
        assert np.isnan(metric(positive, score)).all()
    positive = np.array([False, True, False, True])
    weighted = metric(positive, score, np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]))
    assert np.isnan(weighted).tolist() == [True, True, False]
    assert np.isnan(metric(positive, np.array([0.1, np.nan, 0.3, 0.8]))).all()


def test_specificity_of_exactly_090_counts():
    score = np.r_[np.arange(20) / 20, [0.93, 0.87, 0.4]]  # 2 of 20 negatives lie at 0.9 or above
    positive = np.r_[np.zeros(20, bool), np.ones(3, bool)]
    assert metrics.sensitivity_at_90_specificity(positive, score)[0] == 2 / 3
    one_more = np.r_[score, 0.86], np.r_[positive, False]  # 2 of 21 still, 3 would be too many
    assert metrics.sensitivity_at_90_specificity(one_more[1], one_more[0])[0] == 2 / 3
    assert metrics.sensitivity_at_90_specificity([True, False], [0.1, 0.9])[0] == 0


def test_decided_metrics_equal_scikit_learn_with_weights():
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    weights = rng.integers(0, 3, (5, 80))
    for w, recall in zip(weights, metrics.balanced_accuracy(label, predicted, weights), strict=True):
        assert recall == pytest.approx(balanced_accuracy_score(label, predicted, sample_weight=w))
    assert metrics.balanced_accuracy(label, np.zeros(80))[0] == 0.25
    assert np.isnan(metrics.balanced_accuracy([0, 1], [0, 1], [[2, 0]])[0])


def test_macro_metrics_equal_scikit_learn():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 4, 80)
    score = rng.random((80, 4)) + np.eye(4)[label] * 0.4
    score /= score.sum(axis=1, keepdims=True)
    fold = Scored(np.arange(80), label, score, score.argmax(axis=1))
    found = summarise([fold], draws=1000, seed=0)
    assert found["auc"]["value"] == pytest.approx(
        roc_auc_score(label, score, multi_class="ovr", average="macro")
    )
    peer = average_precision_score(np.eye(4)[label], score, average="macro")
    assert found["average_precision"]["value"] == pytest.approx(peer)
    assert found["balanced_accuracy"]["value"] == pytest.approx(
        balanced_accuracy_score(label, fold.predicted)
    )
    assert set(found) == {"auc", "average_precision", "balanced_accuracy"}  # the others are of two classes
    for f in found.values():
        assert f["low"] < f["value"] < f["high"]


def test_all_metrics_of_two_classes_have_intervals():
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 80)
    found = summarise([scored(label, np.clip(rng.random(80) * 0.7 + 0.3 * label, 0, 1))], 1000, 0)
    assert tuple(found) == metrics.METRICS
    for f in found.values():
        assert f["low"] < f["value"] < f["high"]
        assert (f["draws_used"], f["seed_std"], f["not_computed"]) == (1000, None, 0)
        assert f["folds"] == [pytest.approx(f["value"])]


def test_draws_take_whole_patients_and_the_same_ones_in_all_folds_and_repeats(monkeypatch):
    seen = []

    def keep(label, predicted, weights=None):
        if weights is not None and len(weights) == 200:
            seen.append(weights)
        return np.zeros(1 if weights is None else len(weights))

    monkeypatch.setitem(metrics.DECIDED, "balanced_accuracy", keep)
    patient = np.repeat(np.array(["b", "a", "c", "d"]), [3, 1, 5, 2])
    folds = [
        scored(np.zeros(11), np.zeros(11), patient[order]) for order in (np.arange(11), np.arange(11)[::-1])
    ]
    resample(folds, 200, 0, ["balanced_accuracy"])
    first, second = seen
    np.testing.assert_array_equal(first, second[:, ::-1])  # the same people, the same draw
    for name in np.unique(patient):
        mine = first[:, patient == name]
        assert (mine == mine[:, :1]).all()  # all images of a patient, as often as the patient was drawn
    of_each = first[:, np.unique(patient, return_index=True)[1]]
    assert (of_each.sum(axis=1) == 4).all()
    assert len(np.unique(of_each, axis=0)) > 20


def test_the_interval_is_that_of_scipy():
    """BCa of scipy.stats, which resamples patients by their number; 400 of them hardly need the widening."""
    rng = np.random.default_rng(7)
    patient = np.repeat(np.arange(400), 3)
    label = (rng.random(400) < 0.15)[patient].astype(int)
    score = 1 / (1 + np.exp(-(rng.normal(size=400)[patient] + rng.normal(size=1200) + 2.5 * label)))
    low, high = interval(resample([scored(label, score, patient)], 4000, 0, ["auc"])[0])

    def statistic(drawn, axis):  # Mann-Whitney from midranks
        items = (3 * drawn.astype(int)[..., None] + np.arange(3)).reshape(*drawn.shape[:-1], -1)
        positives, ranks = label[items].sum(axis=-1), rankdata(score[items], axis=-1)
        u = (ranks * label[items]).sum(axis=-1) - positives * (positives + 1) / 2
        return u / (positives * (items.shape[-1] - positives))

    peer = scipy_bootstrap((np.arange(400),), statistic, n_resamples=4000, vectorized=True, rng=1)
    width = peer.confidence_interval.high - peer.confidence_interval.low
    assert low == pytest.approx(peer.confidence_interval.low, abs=0.06 * width)  # Monte Carlo error of both
    assert high == pytest.approx(peer.confidence_interval.high, abs=0.06 * width)


def test_images_of_one_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    label, score = np.repeat(rng.integers(0, 2, 30), 10), np.repeat(rng.random(30), 10)
    by_patient = summarise([scored(label, score, np.repeat(np.arange(30), 10))], 1000, 0, ("auc",))["auc"]
    by_image = summarise([scored(label, score)], 1000, 0, ("auc",))["auc"]
    width = by_patient["high"] - by_patient["low"]
    assert width > 2.5 * (by_image["high"] - by_image["low"])  # ten copies: sqrt(10) too narrow by image


def test_repeats_do_not_narrow_the_interval_and_show_their_spread():
    rng = np.random.default_rng(6)
    label, score = rng.integers(0, 2, 60), rng.random(60)
    one = summarise([scored(label, score)], 1000, 0, ("auc",))["auc"]
    same = summarise([scored(label, score, repeat=r) for r in range(5)], 1000, 0, ("auc",))["auc"]
    assert (same["low"], same["high"]) == pytest.approx((one["low"], one["high"]))
    assert one["seed_std"] is None
    assert same["seed_std"] == pytest.approx(0, abs=1e-12)
    scores = [rng.random(60) for _ in range(3)]
    found = summarise([scored(label, s, repeat=r) for r, s in enumerate(scores)], 1000, 0, ("auc",))["auc"]
    each = [roc_auc_score(label, s) for s in scores]
    assert found["value"] == pytest.approx(np.mean(each))
    assert found["seed_std"] == pytest.approx(np.std(each, ddof=1))


def test_same_seed_same_interval():
    rng = np.random.default_rng(3)
    fold = scored(rng.integers(0, 2, 40), rng.random(40))
    assert summarise([fold], 1000, seed=5) == summarise([fold], 1000, seed=5)
    assert summarise([fold], 1000, seed=5)["auc"]["low"] != summarise([fold], 1000, seed=6)["auc"]["low"]


def test_draws_in_parts_are_the_draws_at_once(monkeypatch):
    rng = np.random.default_rng(3)
    fold = scored(rng.integers(0, 2, 40), rng.random(40))
    at_once = resample([fold], 1000, 0, ["auc"])[0]
    monkeypatch.setattr(metrics, "AT_ONCE", 40 * 64)
    in_parts = resample([fold], 1000, 0, ["auc"])[0]
    np.testing.assert_allclose(in_parts.drawn, at_once.drawn)
    np.testing.assert_allclose(np.sort(in_parts.left_out), np.sort(at_once.left_out))


def test_folds_are_never_ranked_against_each_other():
    perfect = scored([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4])
    shifted = scored([0, 0, 1, 1], [0.91, 0.92, 0.93, 0.94])  # pooled, its negatives would outrank positives
    found = summarise([perfect, shifted], 1000, 0)
    assert found["auc"]["value"] == found["average_precision"]["value"] == 1.0


def test_one_class_fold_is_counted_and_left_out():
    good, one_class = scored([0, 1, 0, 1], [0.2, 0.1, 0.3, 0.9]), scored([0, 0, 0], [0.4, 0.2, 0.9])
    found = summarise([good, one_class], 1000, 0)["auc"]
    assert found["value"] == summarise([good], 1000, 0)["auc"]["value"] == 0.5
    assert (found["folds"], found["not_computed"]) == ([0.5, None], 1)


def test_no_fold_with_both_classes_gives_no_figure():
    found = summarise([scored([0, 0], [0.4, 0.2]), scored([1, 1], [0.4, 0.2])], 1000, 0)["auc"]
    assert (found["value"], found["low"], found["high"], found["not_computed"]) == (None, None, None, 2)


def test_one_patient_gives_no_interval_and_two_give_one_or_none():
    label, score = np.array([0, 1, 1, 0] * 3), np.tile([0.2, 0.1, 0.9, 0.3], 3) + np.arange(12) / 100
    one, two = (summarise([scored(label, score, np.arange(12) % n)], 1000, 0)["auc"] for n in (1, 2))
    assert one["value"] == two["value"] == pytest.approx(0.5)
    assert (one["low"], one["high"]) == (None, None)
    assert two["low"] <= 0.5 <= two["high"]
    apart = summarise([scored([0, 1], [0.2, 0.1])], 1000, 0)["auc"]  # whoever is left out, a class is gone
    assert apart["value"] == 0 and apart["low"] in (None, 0)


def test_a_class_the_probe_never_saw_is_not_computed():
    score = np.array([[0.5, 0.5, np.nan]] * 6)
    fold = Scored(np.arange(6), np.array([0, 1, 2] * 2), score, np.zeros(6, int))
    found = summarise([fold], 1000, 0)
    assert (found["auc"]["value"], found["auc"]["not_computed"]) == (None, 1)
    assert found["balanced_accuracy"]["value"] == pytest.approx(1 / 3)
