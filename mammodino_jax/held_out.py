"""A look at held-out images during training: effective rank, likeness, and a k-NN without the own patient.

n images, D width, S side. Nothing here touches the train state.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mammodino_jax.augment import normalise
from mammodino_jax.data.eval import letterbox
from mammodino_jax.data.index import Records, open_records, open_split
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import bind
from mammodino_jax.recipe import Recipe

IMAGES = 256
CHUNK = 64  # images encoded at once
CLASS_PATIENTS = 3  # a class of fewer patients cannot be found by leaving one out
NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's k-NN


class HeldOut:
    """Up to 256 whole images, evenly spaced in split "val" of the sources ("train" where there is none)."""

    def __init__(self, recipe: Recipe, mesh):
        data, S = recipe.data, recipe.crops.global_size
        split, opened = _open(data.sources, data.exclude_flags)
        n = len(opened.record)
        places = np.unique(np.linspace(0, n - 1, min(n, IMAGES)).round().astype(int))
        self.patient = opened.patient[places]
        volume = np.arange(n)  # an image without a volume is one of its own
        for number, of in enumerate(opened.volumes):
            volume[of] = n + number
        self.volume = volume[places]
        self.label_name, self.label = _labels(opened, places, self.patient)
        self.images = np.stack([letterbox(opened.image(i), S, S, recipe.model.patch_size)[0] for i in places])
        self.patients = len(np.unique(self.patient))
        self.chance = self._chance()
        task = self.label_name or "patient retrieval"
        logging.info(
            "diagnostics look at %d images of %d patients of split %s; %s",
            len(places), self.patients, split, task,
        )  # fmt: skip
        # every process holds the same images and takes part: the teacher may be sharded over all of them
        self._everywhere = NamedSharding(mesh, P())
        self._encode = jax.jit(functools.partial(_encode, recipe=recipe), out_shardings=self._everywhere)

    def features(self, teacher: dict) -> np.ndarray:
        """CLS of the teacher, f32 [n, D]."""
        cls = []
        for first in range(0, len(self.images), CHUNK):
            part = self.images[first : first + CHUNK]
            padded = np.zeros((min(CHUNK, len(self.images)), *part.shape[1:]), np.uint8)
            padded[: len(part)] = part
            put = jax.make_array_from_process_local_data(self._everywhere, padded)
            cls.append(np.asarray(self._encode(teacher["backbone"], put))[: len(part)])
        return np.concatenate(cls)

    def __call__(self, teacher: dict) -> dict[str, float]:
        """The figures of a teacher; NaN ones mean features that are not finite, or too few images."""
        x_nD = self.features(teacher)
        if not np.isfinite(x_nD).all() or len(x_nD) < 2:
            return {}
        found = {"rank": effective_rank(x_nD), **off_diagonal(x_nD)}
        if self.label_name:
            found["knn"] = knn(x_nD, self.label, self.patient)
        else:
            found["retrieval"] = retrieval(x_nD, self.patient, self.volume)
        return {f"held_out/{name}": float(value) for name, value in found.items()}

    def _chance(self) -> float:
        """What features that say nothing would score."""
        if self.label_name:
            return 1 / len(np.unique(self.label[self.label >= 0]))
        others = self.volume[:, None] != self.volume
        mine = (self.patient[:, None] == self.patient) & others
        counted = mine.any(1)
        return float((mine.sum(1) / np.maximum(others.sum(1), 1))[counted].mean()) if counted.any() else 1.0


def _open(sources, exclude_flags) -> tuple[str, Records]:
    try:
        held = [(folder, "val", kinds, weight) for folder, _, kinds, weight in sources]
        return "val", open_records(held, exclude_flags)
    except UserError as error:
        logging.info("no split val to look at (%s): diagnostics look at the training images", error)
        return "train", open_records(sources, exclude_flags)


def _labels(opened: Records, places: np.ndarray, patient: np.ndarray) -> tuple[str, np.ndarray]:
    """The label column with most known values, and these; -1: unknown, or a class of fewer than 3 patients.

    ("", -1 everywhere) where no column has two classes.
    """
    columns: dict[str, np.ndarray] = {}
    for number, shards in enumerate(opened.shards):
        schema = pq.read_schema(Path(shards.folder) / "index.parquet")
        names = [name for name in schema.names if name.startswith("label_")]
        _, table = open_split(shards.folder, shards.split, names)
        mine = np.flatnonzero(opened.source[places] == number)
        for name in names:
            values = table[name].fill_null(-1).to_numpy().astype(np.int64)
            column = columns.setdefault(name, np.full(len(places), -1))
            column[mine] = values[opened.record[places[mine]]]
    for column in columns.values():
        for value in np.unique(column):
            if len(np.unique(patient[column == value])) < CLASS_PATIENTS:
                column[column == value] = -1
    usable = {name: v for name, v in columns.items() if len(np.unique(v[v >= 0])) > 1}
    if not usable:
        return "", np.full(len(places), -1)
    name = max(sorted(usable), key=lambda k: (usable[k] >= 0).sum())
    return name, usable[name]


def _encode(backbone, images_nSS, recipe: Recipe):
    x = normalise(images_nSS.astype(jnp.float32) / 255, recipe.augment, recipe.model.channels)
    return bind(backbone, recipe.model)(x)["cls"].astype(jnp.float32)


def effective_rank(x_nD: np.ndarray) -> float:
    """exp(entropy) of the centred features' singular values, as shares of their sum (Roy, Vetterli 2007).

    1: all differ along one line; at most min(n - 1, D).
    """
    sigma = np.linalg.svd(x_nD.astype(np.float64) - x_nD.mean(axis=0), compute_uv=False)
    if sigma.sum() <= 1e-12:
        return 0.0  # all rows are equal
    share = sigma / sigma.sum()
    return float(np.exp(-np.sum(share * np.log(np.maximum(share, 1e-300)))))


def _cosines(x_nD: np.ndarray) -> np.ndarray:
    unit = x_nD / np.maximum(np.linalg.norm(x_nD, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def off_diagonal(x_nD: np.ndarray) -> dict[str, float]:
    """Mean and deviation of the cosine between different images."""
    others = _cosines(x_nD.astype(np.float64))[~np.eye(len(x_nD), dtype=bool)]
    return {"cosine": float(others.mean()), "cosine_std": float(others.std())}


def knn(x_nD: np.ndarray, label_n: np.ndarray, patient_n: np.ndarray) -> float:
    """Balanced accuracy of a k-NN (k 20, T 0.07) on standardised features, neighbours of other patients only.

    Votes are divided by the frequency of their class, so that chance is 1 / classes. Rows labelled -1 are
    left out.
    """
    known = label_n >= 0
    x, label, patient = x_nD[known].astype(np.float64), label_n[known], patient_n[known]
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6 * np.abs(x).max() + 1e-12)
    cosine = _cosines(x)
    cosine[patient[:, None] == patient] = -np.inf
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :NEIGHBOURS]
    weight = np.exp((np.take_along_axis(cosine, nearest, axis=1) - 1) / TEMPERATURE)
    classes, code = np.unique(label, return_inverse=True)
    vote = np.stack([(weight * (code[nearest] == c)).sum(1) / (code == c).sum() for c in range(len(classes))])
    right = vote.argmax(axis=0) == code
    return float(np.mean([right[code == c].mean() for c in range(len(classes))]))


def retrieval(x_nD: np.ndarray, patient_n: np.ndarray, volume_n: np.ndarray) -> float:
    """Share of images whose nearest of another volume is of the same patient; NaN: no patient has two."""
    cosine = _cosines(x_nD - x_nD.mean(axis=0))
    others = volume_n[:, None] != volume_n
    same = patient_n[:, None] == patient_n
    counted = (same & others).any(axis=1)
    nearest = np.where(others, cosine, -np.inf).argmax(axis=1)
    return float((patient_n[nearest] == patient_n)[counted].mean()) if counted.any() else float("nan")
