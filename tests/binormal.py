"""Data sets of scores whose true AUC is known in closed form, and how often intervals hold it."""

import dataclasses

import numpy as np
from scipy.stats import norm

from mammodino_jax.evaluate.metrics import Scored, interval, resample
from mammodino_jax.evaluate.paired import paired

ALIKE = 0.6  # correlation between two encoders, or two repeats, of the scores of an item


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Patients with several items each, whose scores correlate: 0.5 within a patient.

    Scores are normal with deviation 1, those of positives higher by a shift, so AUC = Phi(shift / sqrt(2)).
    Of the items of a positive patient one half are positive. Several repeats score with noise of their own.
    """

    name: str
    patients: int
    items: int
    prevalence: float  # of positive patients
    aucs: tuple[float, ...]  # of one encoder, or of two that are compared
    folds: int = 1
    repeats: int = 1

    def draw(self, rng: np.random.Generator) -> list[list[Scored]]:
        """Folds of every encoder, on the same items."""
        patient = np.repeat(np.arange(self.patients), self.items)
        positive = (rng.random(self.patients) < self.prevalence)[patient]
        label = (positive & (rng.random(len(patient)) < 0.5)).astype(int)
        parts = [rng.permutation(self.patients) % self.folds for _ in range(self.repeats)]

        def noise():
            own = rng.normal(size=len(patient))
            return np.sqrt(0.5) * (rng.normal(size=self.patients)[patient] + own)

        common, found = noise(), []
        for auc in self.aucs:
            folds = []
            for repeat, part in enumerate(parts):
                score = np.sqrt(ALIKE) * common + np.sqrt(1 - ALIKE) * noise()
                score += np.sqrt(2) * norm.ppf(auc) * label
                for number in range(self.folds):
                    at = part[patient] == number
                    shifted = score[at] + 3 * number  # scores of two folds cannot be ranked together
                    both = np.stack([-shifted, shifted], axis=1)
                    folds.append(Scored(patient[at], label[at], both, label[at], repeat=repeat))
            found.append(folds)
        return found


def ends(encoders: list[list[Scored]], draws: int, seed: int) -> tuple[float, float]:
    """The interval of the AUC of one encoder, or of the difference of two."""
    if len(encoders) == 1:
        return interval(resample(encoders[0], draws, seed, ["auc"])[0])
    found = paired(*encoders, draws, seed)
    return found["low"], found["high"]


def as_items(folds: list[Scored]) -> list[Scored]:
    """Wrong on purpose: every item a patient of its own."""
    return [
        dataclasses.replace(f, patient=np.arange(len(f.patient)) + 10**6 * i) for i, f in enumerate(folds)
    ]


def as_new_patients(folds: list[Scored]) -> list[Scored]:
    """Wrong on purpose: the patients of every repeat are other people."""
    return [dataclasses.replace(f, patient=f.patient + 10**6 * f.repeat) for f in folds]


def coverage(
    scenario: Scenario, data_sets: int, draws: int = 1000, change=list
) -> tuple[float, float, float]:
    """Shares of data sets whose 95 % interval holds the truth, lies below it, and lies above it."""
    truth = scenario.aucs[0] - (scenario.aucs[1] if len(scenario.aucs) > 1 else 0)
    rng, lows, highs = np.random.default_rng(0), [], []
    for number in range(data_sets):
        low, high = ends([change(folds) for folds in scenario.draw(rng)], draws, number)
        lows.append(low)
        highs.append(high)
    below, above = np.mean(np.less(highs, truth)), np.mean(np.greater(lows, truth))
    return 1 - below - above, below, above
