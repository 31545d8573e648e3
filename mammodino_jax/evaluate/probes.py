"""Probes on frozen features, and the folds they are trained, chosen and tested on.

n items, D features, C classes. Features are standardised by the mean and deviation of the training part.
"""

import dataclasses
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.features import save
from mammodino_jax.evaluate.metrics import Scored

NEIGHBOURS = 20  # DINO's k-NN: k = 20, temperature 0.07 (Caron et al. 2021); nothing is tuned
TEMPERATURE = 0.07
STRENGTHS = tuple(float(c) for c in np.logspace(-5, 2, 8))  # C = 1 / L2 of the linear probe
SHARES = (0.01, 0.05, 0.1, 1.0)  # of the patients with labels, in few-label curves
DRAWS = 5  # of the patients of a share, where the folds have no repeats
CHUNK = 1024  # test items whose neighbours are looked for at once
CACHE_VERSION = 2  # raised where the same features and settings give other scores


@dataclasses.dataclass(frozen=True)
class Fold:
    """Items (i64 places) that a probe is trained on, that choose its L2, and that test it."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    repeat: int = 0  # of the cross-validation, each with parts of its own


def check_patients(patient, split) -> None:
    """Raise a UserError if a patient occurs in more than one split."""
    splits_of: dict = {}
    for p, s in zip(patient, split, strict=True):
        splits_of.setdefault(p, set()).add(s)
    shared = sum(len(s) > 1 for s in splits_of.values())
    if shared:
        raise UserError(
            f"{shared} of {len(splits_of)} patients are in more than one split; build the data again with "
            "splits grouped by patient"
        )


def official_fold(split, task: str) -> list[Fold]:
    """The one fold that the splits of the index define. Raises UserError where one of them is empty."""
    places = {name: np.flatnonzero(np.equal(split, name)) for name in ("train", "val", "test")}
    for name, found in places.items():
        if not len(found):
            raise UserError(
                f'task "{task}" has no labelled item in split {name}; use --folds 5 to cross-validate'
            )
    return [Fold(**places)]


def cross_folds(label, patient, count: int, seed: int, task: str, repeats: int = 1) -> list[Fold]:
    """Patient-grouped, label-stratified parts: each tests once, and validates for the fold before it.

    Every repeat draws parts of its own.

    Raises:
      UserError: too few folds, or too few patients or items for them.
    """
    patients, largest = len(np.unique(patient)), int(np.bincount(label).max())
    if count < 3 or min(patients, largest) < count:
        raise UserError(
            f'--folds {count} does not suit task "{task}" of {patients} patients and {largest} items in its '
            "largest class: 3 folds or more, and no more than either, can be drawn"
        )
    folds = []
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed + repeat)
        with warnings.catch_warnings():  # a fold without a rare class is counted where AUCs are computed
            warnings.filterwarnings("ignore", "The least populated class")
            parts = [test for _, test in splitter.split(np.zeros(len(label)), label, patient)]
        for i, test in enumerate(parts):
            val = parts[(i + 1) % count]
            train = np.setdiff1d(np.arange(len(label)), np.concatenate([test, val]))
            folds.append(Fold(train, val, test, repeat))
    return folds


def few(fold: Fold, label, patient, share: float, seed: int) -> Fold:
    """The fold with labels of a share of its training and of its validation patients; the test is the same.

    At least one patient a class is kept, and a larger share contains the smaller ones.
    """
    if share >= 1:
        return fold
    rng, parts = np.random.default_rng([seed, fold.repeat]), []
    for part in (fold.train, fold.val):
        patients = np.unique(patient[part].astype(str))
        order = rng.permutation(patients)
        kept = set(order[: max(1, round(share * len(order)))])
        for c in np.unique(label[part]):
            of_class = set(patient[part][label[part] == c].astype(str))
            kept.add(next(p for p in order if p in of_class))
        parts.append(part[np.isin(patient[part].astype(str), list(kept))])
    return dataclasses.replace(fold, train=parts[0], val=parts[1])


def standardise(x_nD: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Features with mean 0 and deviation 1 over `train`; features that are constant there become 0."""
    x = x_nD.astype(np.float64)
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    constant = deviation <= 1e-6 * np.abs(x[train]).max(axis=0)  # below that it is rounding, not signal
    return np.where(constant, 0, (x - mean) / np.where(constant, 1, deviation))


def majority(x_nD, label_n, fold: Fold, classes: int, seed: int = 0):
    """The most frequent class of the training part for everyone: AUC 0.5 by construction."""
    score = np.zeros((len(fold.test), classes))
    return score, np.full(len(fold.test), np.bincount(label_n[fold.train]).argmax()), {}


def knn(x_nD, label_n, fold: Fold, classes: int, seed: int = 0):
    """k nearest neighbours by cosine; a neighbour's vote weighs exp(cosine / T).

    Returns:
      score [test, C] (shares of the vote), predicted class [test] (votes over class frequency), settings.
    """
    x = standardise(x_nD, fold.train)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    y = label_n[fold.train]
    k = min(NEIGHBOURS, len(y))
    nearest, vote = [], []
    for first in range(0, len(fold.test), CHUNK):
        cosine = x[fold.test[first : first + CHUNK]] @ x[fold.train].T
        nearest.append(np.argsort(-cosine, axis=1, kind="stable")[:, :k])
        vote.append(np.exp((np.take_along_axis(cosine, nearest[-1], axis=1) - 1) / TEMPERATURE))
    nearest, vote = np.concatenate(nearest), np.concatenate(vote)
    score = np.stack([(vote * (y[nearest] == c)).sum(axis=1) for c in range(classes)], axis=1)
    score /= score.sum(axis=1, keepdims=True)
    frequency = np.bincount(y, minlength=classes)
    predicted = (score / np.maximum(frequency, 1)).argmax(axis=1)
    score[:, frequency == 0] = np.nan
    return score, predicted, {"k": k}


def linear(x_nD, label_n, fold: Fold, classes: int, seed: int = 0):
    """Logistic regression, classes weighted equally; L2 by the balanced log-loss on the validation part.

    Returns:
      score [test, C] (probabilities), predicted class [test], settings.
    """
    y, y_val = label_n[fold.train], label_n[fold.val]
    present = np.unique(y)
    score = np.full((len(fold.test), classes), np.nan)
    if len(present) == 1:
        return score, np.full(len(fold.test), present[0]), {"C": None}
    x = standardise(x_nD, fold.train)
    known = np.isin(y_val, present)
    if not known.any():  # nothing to choose the L2 by: not computed
        return score, np.full(len(fold.test), np.bincount(y).argmax()), {"C": None}
    best = (np.inf, None, None)
    for strength in STRENGTHS:  # ascending: a tie keeps the stronger L2
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        model.fit(x[fold.train], y)
        loss = _balanced_log_loss(model, x[fold.val[known]], y_val[known])
        if loss < best[0]:
            best = (loss, strength, model)
    score[:, present] = best[2].predict_proba(x[fold.test])
    predicted = present[score[:, present].argmax(axis=1)]
    return at_prevalence(score, y), predicted, {"C": best[1]}


def at_prevalence(score_nC: np.ndarray, label) -> np.ndarray:
    """Probabilities of two classes that counted equally in training, at the classes' shares among `label`.

    Ranks stay; probabilistic F1 means something. With more classes ranks would change: left as they are.
    """
    if score_nC.shape[1] != 2:
        return score_nC
    odds = score_nC * np.bincount(label, minlength=2)
    return odds / np.maximum(odds.sum(axis=1, keepdims=True), 1e-300)


def _balanced_log_loss(model, x_nD, label_n) -> float:
    """Cross-entropy, averaged within classes first."""
    log_nC = np.log(np.maximum(model.predict_proba(x_nD), 1e-12))
    loss = [-log_nC[label_n == c, i].mean() for i, c in enumerate(model.classes_) if (label_n == c).any()]
    return float(np.mean(loss))


PROBES = {"kNN": knn, "linear": linear}


def run(
    probe,
    x,
    label_n,
    patient_n,
    folds: list[Fold],
    classes: int,
    seed: int = 0,
    cache: Path | None = None,
    key: str = "",
) -> tuple[list[Scored], list[dict]]:
    """Train and test a probe on every fold; the settings it chose come second.

    Args:
      cache: a folder; scores of the same features (`key`, or x itself), labels, folds, seed come from it.
    """
    tested, settings = [], []
    for fold in folds:
        file = None
        if cache:
            digest = hashlib.sha256(repr((CACHE_VERSION, probe.__name__, classes, seed, key)).encode())
            arrays = (label_n, fold.train, fold.val, fold.test, *(() if key else (x,)))
            for a in arrays:
                digest.update(np.ascontiguousarray(a).tobytes())
            file = cache / f"probe-{digest.hexdigest()[:32]}.npz"
        if file and file.is_file():
            with np.load(file) as found:
                score, predicted, chosen = (
                    found["score"],
                    found["predicted"],
                    json.loads(str(found["chosen"])),
                )
        else:
            score, predicted, chosen = probe(x, label_n, fold, classes, seed)
            if file:
                save(file, score=score, predicted=predicted, chosen=json.dumps(chosen))
        tested.append(Scored(patient_n[fold.test], label_n[fold.test], score, predicted))
        settings.append(chosen)
    return tested, settings
