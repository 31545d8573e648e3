"""What DINO-adj does to the features of tomosynthesis slices: two runs that differ in the term alone.

n slices of all volumes, D width. Volumes weigh equally, however many slices they have.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import r2_score

from configs import nano
from mammodino_jax import metrics
from mammodino_jax.encoder import load_encoder
from mammodino_jax.evaluate.features import encoder_extractor, record_features, untrained
from mammodino_jax.evaluate.items import read_rows
from mammodino_jax.evaluate.probes import standardise
from mammodino_jax.held_out import effective_rank
from mammodino_jax.train import train

OFFSETS = range(1, 11)
MODES = {"without DINO-adj": "none", "with DINO-adj": "dedicated"}  # pairs.mode
RIDGE = np.logspace(-1, 5, 7)  # L2, chosen by leaving out another volume


@dataclasses.dataclass(frozen=True)
class Slices:
    """[n] each: the volume's name, slice number, and depth from 0 (first slice) to 1 (last)."""

    volume: np.ndarray
    number: np.ndarray
    depth: np.ndarray


def recipe(data: Path, steps: int, mode: str):
    """configs.nano on volumes only: half of the rows are pairs' slices, the others single slices. The mode
    changes no draw: both runs see the same slices k, crops and masks in the same order.
    """
    c = nano.get_config(str(data))
    c.steps, c.batch_size, c.dbt_rows = steps, 16, 8
    c.data.flat_slices = True
    c.data.exclude_flags = ()  # all nine volumes, small phantoms with a doubtful mask too: a batch needs eight
    c.pairs.mode = mode
    c.optim.warmup_steps = max(1, steps // 10)
    return c


def train_both(data: Path, folder: Path, steps: int, edit=lambda c: None) -> dict[str, Path]:
    """Workdirs by name; `edit` may change both recipes alike."""
    out = {}
    for name, mode in MODES.items():
        c = recipe(data, steps, mode)
        edit(c)
        out[name] = folder / name.replace(" ", "-")
        train(c, str(out[name]))
    return out


def embed(encoder, data: Path, side: int) -> np.ndarray:
    """CLS of every slice, whole, its long side at `side` px: f64 [n, D] in the index's order."""
    return record_features(read_rows([data]), encoder_extractor(encoder), side)["cls"].astype(np.float64)


def read_slices(data: Path) -> Slices:
    column = read_rows([data]).columns
    number = column["slice_index"].astype(int)
    return Slices(column["volume_id"].astype(str), number, number / (column["num_slices"] - 1))


def similarity(cls_nD: np.ndarray, slices: Slices, centred: bool) -> tuple[np.ndarray, float]:
    """Mean cosine of slices k and k + d of a volume, by offset d [10], and of slices of different volumes.

    `centred`: after the mean of all volumes is subtracted, since CLS tokens share a large common part.
    """
    volumes = np.unique(slices.volume)
    if centred:
        cls_nD = cls_nD - np.mean([cls_nD[slices.volume == v].mean(0) for v in volumes], axis=0)
    unit = cls_nD / np.maximum(np.linalg.norm(cls_nD, axis=1, keepdims=True), 1e-12)
    within, means = [], []
    for v in volumes:
        mine = np.flatnonzero(slices.volume == v)
        mine = mine[np.argsort(slices.number[mine])]
        cosine = unit[mine] @ unit[mine].T
        within.append([np.diagonal(cosine, d).mean() for d in OFFSETS])
        means.append(unit[mine].mean(0))
    across = [a @ b for a, b in itertools.combinations(means, 2)]
    return np.mean(within, axis=0), float(np.mean(across))


def depth_probe(cls_nD: np.ndarray, slices: Slices, target_n: np.ndarray) -> tuple[float, float]:
    """Ridge regression of `target_n`, each volume predicted from the others.

    The L2 is the one that does best on the volume after the tested one, which the fit leaves out for that.

    Returns:
      Spearman's correlation, mean over volumes (0 where a prediction is constant), and R2 over all slices.
    """
    volumes = np.unique(slices.volume)
    predicted = np.zeros(len(target_n))
    for i, v in enumerate(volumes):
        test, val = slices.volume == v, slices.volume == volumes[(i + 1) % len(volumes)]
        tried = _ridge(cls_nD, target_n, ~test & ~val, val)
        best = np.square(tried - target_n[val]).mean(1).argmin()
        predicted[test] = _ridge(cls_nD, target_n, ~test, test)[best]
    ranks = [_rank_correlation(predicted[slices.volume == v], target_n[slices.volume == v]) for v in volumes]
    return float(np.mean(ranks)), float(r2_score(target_n, predicted))


def _rank_correlation(a, b) -> float:
    return 0.0 if np.ptp(a) < 1e-9 else float(spearmanr(a, b)[0])


def _ridge(cls_nD, target_n, fit_n, test_n) -> np.ndarray:
    """Predictions [len(RIDGE), test] of ridge regressions fitted on `fit_n`, features standardised on it."""
    x = standardise(cls_nD, np.flatnonzero(fit_n))
    U, s, Vt = np.linalg.svd(x[fit_n], full_matrices=False)  # x is centred on fit_n
    mean = target_n[fit_n].mean()
    found = (s / (s**2 + RIDGE[:, None])) * (U.T @ (target_n[fit_n] - mean))
    return mean + found @ (x[test_n] @ Vt.T).T


def measure(cls_nD: np.ndarray, slices: Slices) -> dict:
    """All figures of one encoder's features."""
    out = {}
    for name, centred in (("raw", False), ("centred", True)):
        within, across = similarity(cls_nD, slices, centred)
        out[name] = {"gap": (within - across).tolist(), "within_1": float(within[0]), "across": across}
    for name, target in (("depth", slices.depth), ("from the middle", abs(2 * slices.depth - 1))):
        out[name] = dict(zip(("spearman", "r2"), depth_probe(cls_nD, slices, target), strict=True))
    return out | {"rank": effective_rank(cls_nD)}


def compare(workdirs: dict[str, Path], data: Path, side: int) -> dict[str, dict]:
    """Figures of untrained weights and of each run's teacher, by name."""
    slices = read_slices(data)
    encoders = {name: load_encoder(str(workdir)) for name, workdir in workdirs.items()}
    encoders = {"random init": untrained(next(iter(encoders.values())))} | encoders
    return {name: measure(embed(encoder, data, side), slices) for name, encoder in encoders.items()}


def show(found: dict[str, dict]) -> None:
    """Print the tables, and in words what the comparison says of DINO-adj."""
    print(f"   cosine at offset d within a volume minus across volumes | {' | '.join(map(str, OFFSETS))} | "
          "within, d = 1 | across |")  # fmt: skip
    for kind in ("raw", "centred"):
        for name, f in found.items():
            gap = " | ".join(f"{g:.3f}" for g in f[kind]["gap"])
            print(f"   {kind} | {name} | {gap} | {f[kind]['within_1']:.3f} | {f[kind]['across']:.3f} |")
    print("   distance (1 - cosine) at offset d within a volume, in % of that across volumes; centred")
    for name, f in found.items():
        share = (1 - np.array(f["centred"]["gap"]) / (1 - f["centred"]["across"])) * 100
        print(f"   {name} | {' | '.join(f'{x:.2f}' for x in share)} |")
    print("   ridge from CLS, leave one volume out | Spearman | R2 | effective rank |")
    for target in ("depth", "from the middle"):
        for name, f in found.items():
            print(
                f"   {target} | {name} | {f[target]['spearman']:.3f} | {f[target]['r2']:.3f} | {f['rank']:.1f} |"
            )
    without, with_ = (found[name] for name in MODES)
    for kind in ("raw", "centred"):
        larger = [
            d for d, a, b in zip(OFFSETS, with_[kind]["gap"], without[kind]["gap"], strict=True) if a > b
        ]
        said = f"larger at offsets {larger}" if larger else "NOT LARGER AT ANY OFFSET"
        print(f"   {kind}: within minus across with DINO-adj is {said}"
              f"{'' if len(larger) in (0, 10) else ', not at the others'}")  # fmt: skip


def check_same_images(workdirs: dict[str, Path], steps: int) -> tuple[float, float]:
    """Assert that both runs logged every step, finite, with equal counters of the images that both saw.

    Returns:
      The adjacent term over the first and the last tenth of the steps, of the run that has it.
    """
    logs = [metrics.read(workdirs[name] / "metrics.jsonl") for name in MODES]
    seen = [
        [
            {k: v for k, v in r.items() if k.startswith("data/") and not k.startswith("data/adjacent")}
            for r in log
        ]
        for log in logs
    ]
    assert seen[0] == seen[1] and len(seen[0]) == steps and all(seen[0])
    assert not any(r["bad"] for log in logs for r in log)
    assert not any("adjacent" in r for r in logs[0])
    tenth, term = max(1, steps // 10), [r["adjacent"] for r in logs[1]]
    return float(np.mean(term[:tenth])), float(np.mean(term[-tenth:]))


def check_finite(found: dict[str, dict]) -> None:
    for name, f in found.items():
        parts = [f["raw"]["gap"], f["centred"]["gap"], *f["depth"].values(), *f["from the middle"].values()]
        assert np.isfinite(np.hstack([*parts, f["rank"]])).all(), name
