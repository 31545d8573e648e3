import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import norm, rankdata

from mammodino_jax.evaluate.metrics import Scored, summarise
from mammodino_jax.evaluate.paired import delong, holm, paired


def scored(label, score, patient=None, repeat=0, item=None):
    patient = np.arange(len(label)) if patient is None else patient
    score = np.stack([-score, score], axis=1)
    return Scored(patient, np.asarray(label), score, np.asarray(label), item, repeat)


def two_readers(patients=200, items=1, seed=0, gap=0.5):
    """Scores of two encoders on the same items: patient [n], label [n], two scores [n]."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), items)
    label = (rng.random(patients) < 0.3)[patient].astype(int)
    common = rng.normal(size=patients)[patient] + rng.normal(size=len(patient))
    return patient, label, *(common + rng.normal(size=len(patient)) + s * label for s in (1 + gap, 1))


def direct_delong(label, *scores):
    """Structural components, covariances and z, pair by pair, as the paper writes them."""
    label = np.asarray(label, bool)
    v10, v01, areas = [], [], []
    for score in scores:
        psi = np.zeros((label.sum(), (~label).sum()))
        for i, x in enumerate(score[label]):
            for j, y in enumerate(score[~label]):
                psi[i, j] = 1.0 if y < x else 0.5 if y == x else 0.0
        v10.append(psi.mean(axis=1))
        v01.append(psi.mean(axis=0))
        areas.append(psi.mean())
    s = np.cov(v10) / label.sum() + np.cov(v01) / (~label).sum()
    z = (areas[0] - areas[1]) / np.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    return areas, z, 2 * norm.cdf(-abs(z))


@pytest.mark.parametrize("levels", [3, 1000])
def test_delong_equals_the_direct_computation(levels):
    for seed in range(5):
        patient, label, a, b = two_readers(80, seed=seed)
        a, b = (np.round(s * levels / 8) for s in (a, b))  # 3: nearly all scores are tied
        found = delong([scored(label, a, patient)], [scored(label, b, patient)])
        areas, z, p = direct_delong(label, a, b)
        assert found["auc"] == pytest.approx(areas)
        assert (found["difference"], found["z"], found["p"]) == pytest.approx((areas[0] - areas[1], z, p))


def test_delong_is_refused_where_it_does_not_hold():
    patient, label, a, b = two_readers(40, items=2)
    with pytest.raises(ValueError, match="needs one item a patient"):
        delong([scored(label, a, patient)], [scored(label, b, patient)])
    folds = [[scored(label[i::2], s[i::2], patient[i::2]) for i in range(2)] for s in (a, b)]
    with pytest.raises(ValueError, match="needs one fold, these are 2"):
        delong(*folds)
    with pytest.raises(ValueError, match="two classes"):
        delong([scored(np.zeros(80), a)], [scored(np.zeros(80), b)])


def test_the_difference_is_that_of_scipy():
    """Bootstrap of scipy.stats over patients: standard error, and both of its tails at the interval."""
    patient, label, a, b = two_readers(300, items=3)
    found = paired([scored(label, a, patient)], [scored(label, b, patient)], 4000, 0)

    def statistic(drawn, axis):
        items = (3 * drawn.astype(int)[..., None] + np.arange(3)).reshape(*drawn.shape[:-1], -1)
        y = label[items]
        pairs = y.sum(axis=-1) * (1 - y).sum(axis=-1)
        first, second = ((rankdata(s[items], axis=-1) * y).sum(axis=-1) for s in (a, b))
        return (first - second) / pairs

    peer = scipy_bootstrap(
        (np.arange(300),), statistic, n_resamples=4000, vectorized=True, rng=1, method="basic"
    )
    d, draws = statistic(np.arange(300.0), -1), peer.bootstrap_distribution
    assert found["difference"] == pytest.approx(d)
    half = np.quantile(abs(draws - d), 0.95)
    assert half == pytest.approx(1.96 * peer.standard_error, rel=0.05)
    assert found["high"] - found["difference"] == pytest.approx(half, rel=0.06)  # Monte Carlo error of both
    assert found["low"] + found["high"] == pytest.approx(2 * d)
    assert found["p"] == pytest.approx((1 + (abs(draws - d) >= abs(d)).sum()) / 4001, abs=0.01)


def test_with_one_item_a_patient_it_agrees_with_delong():
    for seed, gap in ((0, 0.5), (1, 0.0), (2, 0.3)):
        patient, label, a, b = two_readers(400, seed=seed, gap=gap)
        one, other = [scored(label, a, patient)], [scored(label, b, patient)]
        assert paired(one, other, 4000, 0)["p"] == pytest.approx(delong(one, other)["p"], abs=0.03)


def test_p_and_interval_agree_and_the_smallest_p_is_one_draw():
    patient, label, a, b = two_readers(100, gap=3)
    one, other = [scored(label, a, patient)], [scored(label, b, patient)]
    found = paired(one, other, 1000, 0)
    assert (found["p"], found["draws_used"]) == (1 / 1001, 1000)
    assert found["low"] > 0
    turned = paired(other, one, 1000, 0)
    assert turned["p"] == found["p"]
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))
    same = paired(one, one, 1000, 0)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    for seed in range(20):
        patient, label, a, b = two_readers(60, items=2, seed=seed)
        found = paired([scored(label, a, patient)], [scored(label, b, patient)], 1000, 0)
        assert (found["p"] < 0.05) == (found["low"] > 0 or found["high"] < 0)


def test_pairing_narrows_the_difference():
    patient, label, a, b = two_readers(200, items=2)
    one, other = [scored(label, a, patient)], [scored(label, b, patient)]
    found = paired(one, other, 1000, 0)
    alone = [summarise(folds, 1000, 0, ("auc",))["auc"] for folds in (one, other)]
    unpaired = np.hypot(*(f["high"] - f["low"] for f in alone))
    assert found["high"] - found["low"] < 0.85 * unpaired


def test_other_metrics_are_tested_too():
    patient, label, a, b = two_readers(200)
    one, other = [scored(label, a, patient)], [scored(label, b, patient)]
    found = paired(one, other, 1000, 0, "average_precision")
    assert found["low"] < found["difference"] < found["high"]


def test_other_items_are_refused_and_what_is_not_computed_is_none():
    patient, label, a, b = two_readers(20)
    one = [scored(label, a, patient)]
    for other, message in (
        ([scored(label, b, patient)] * 2, "1 and 2 folds"),
        ([scored(label, b, patient, repeat=1)], "repeats differ"),
        ([scored(label, b, patient + 1)], "fold 0: patients differ"),
        ([scored(1 - label, b, patient)], "fold 0: labels differ"),
        ([scored(label, b, patient, item=patient.astype(str))], "fold 0: items differ"),
    ):
        with pytest.raises(ValueError, match=message):
            paired(one, other, 1000, 0)
    blank = [scored(label, np.full(20, np.nan), patient)]
    assert paired(one, blank, 1000, 0) is None


def test_holm():
    p = [0.01, 0.04, 0.03, 0.005, 0.2, 0.03]
    # statsmodels 0.15, multipletests(p, method="holm")
    assert holm(p) == pytest.approx([0.05, 0.12, 0.12, 0.03, 0.2, 0.12])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
