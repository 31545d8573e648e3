"""Deliberate failures of a training run, and runs that end when the expected warning fires."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
from make_dataset import write_dataset

from data_prep.phantom import write_phantoms
from mammodino_jax import losses
from mammodino_jax import train as training
from mammodino_jax.data.index import open_split
from mammodino_jax.diagnostics import Watch

REPO = Path(__file__).resolve().parents[1]


def phantoms(folder: Path, patients: int, long_side: int, coarsen: int = 1) -> Path:
    """Phantoms as the demo builds them, with a train and a val split."""
    write_phantoms(folder / "dicom", patients=patients, seed=0, coarsen=coarsen)
    build = ["build", "--source", "folder", "--input", folder / "dicom", "--output", folder / "data"]
    options = ["--long-side", long_side, "--split", "0.7,0.3,0", "--key", folder / "key"]
    command = [sys.executable, "-m", "data_prep", *map(str, build + options)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "data"


# --- what goes wrong: in the records ...


def _empty(image):
    return np.zeros_like(image)


def _full(image):
    return np.maximum(image, 1)


def _tiny(image):
    """Tissue only in a square of a twentieth of the long side."""
    h, w = image.shape
    side = max(h, w) // 20
    out = np.zeros_like(image)
    box = np.s_[h // 2 : h // 2 + side, w // 4 : w // 4 + side]
    out[box] = np.maximum(image[box], 1)
    return out


def rewritten(source: Path, folder: Path, change) -> Path:
    """A data set of the same rows with changed images."""
    items = []
    for split in ("train", "val"):
        shards, table = open_split(source, split)
        for place, row in enumerate(table.drop_columns("row").to_pylist()):
            row = {k: v for k, v in row.items() if not k.startswith("label_")}
            items.append((change(shards.read(place)), row))
    return write_dataset(folder, items)


# --- ... in the batches ...


def _constant(step, batch):
    for name in ("global_crops", "local_crops", "adjacent_crops"):
        batch[name][:] = 128


def _nan(step, batch):
    if step >= 10:
        batch["mask_weight"][0] = np.nan


def _shifted(step, batch):
    """Slice k +- d lies a fifth of the side to the right."""
    crops = batch["adjacent_crops"][:, -1]
    away = round(0.2 * crops.shape[-1])
    moved = np.zeros_like(crops)
    moved[..., away:] = crops[..., :-away]
    batch["adjacent_crops"][:, -1] = moved


def _other_volume(step, batch):
    batch["adjacent_crops"][:, -1] = np.roll(batch["adjacent_crops"][:, -1], 1, axis=0)


# --- ... and in the recipe


def _sharp(c):
    c.loss.centering = "centering"  # Sinkhorn spreads the targets however sharp they are
    c.optim.update(teacher_temp=1e-3, warmup_teacher_temp=1e-3)


def _no_centering(c):
    c.loss.centering = "centering"


def _lr(c):
    c.optim.base_lr *= 100


def _layerscale(c):
    c.model.layerscale = 1e-5  # all images look alike for longer than a short run lasts


def _mask_ratio(c):
    c.mask.ratio = (0.9, 0.9)


@dataclasses.dataclass(frozen=True)
class Failure:
    expected: str  # the name of its warning
    recipe: object = None
    batch: object = None
    image: object = None
    frozen_center: bool = False
    stops: bool = False  # with a FloatingPointError


FAILURES = {
    "sharp teacher (T 0.001)": Failure("one_prototype", recipe=_sharp),
    "no centering": Failure("one_prototype", recipe=_no_centering, frozen_center=True),
    "learning rate x 100": Failure("diverging", recipe=_lr),
    "LayerScale 1e-5, short run": Failure("identical_features", recipe=_layerscale),
    "constant images": Failure("flat_images", batch=_constant),
    "NaN in the batch": Failure("not_finite", batch=_nan, stops=True),
    "empty masks": Failure("mask_failure", image=_empty),
    "full masks": Failure("mask_failure", image=_full),
    "tiny masks": Failure("mask_failure", image=_tiny),
    "pairs shifted by 20 %": Failure("slice_misalignment", batch=_shifted),
    "pairs of another volume": Failure("slice_misalignment", batch=_other_volume),
    "tissue mask ratio 0.9": Failure("excessive_masking", recipe=_mask_ratio),
}


class _Enough(Exception):
    pass


def run(config, workdir: Path, failure: Failure | None, monkeypatch, beyond: int = 5):
    """Train `config` with a failure until `beyond` steps after its warning fired, or to the end.

    Returns ({warning: step it was first seen}, the FloatingPointError that stopped the run or None).
    """
    failure, fired = failure or Failure(""), {}

    class Recorder(Watch):
        def __call__(self, step, metrics):
            metrics = super().__call__(step, metrics)
            for name in metrics:
                if name.startswith("warning/"):
                    fired.setdefault(name.removeprefix("warning/"), step)
            known = failure.expected in fired and not failure.stops
            if known and step >= fired[failure.expected] + beyond:
                raise _Enough
            return metrics

    make = training.make_batches

    def broken(*args, **options):
        for step, batch in enumerate(make(*args, **options)):
            if failure.batch:
                failure.batch(step, batch)
            yield batch

    if failure.recipe:
        failure.recipe(config)
    if failure.image:
        (source, *rest), *_ = config.data.sources
        folder = rewritten(Path(source), workdir / "data", failure.image)
        config.data.sources = ((str(folder), *rest),)
    with monkeypatch.context() as m:
        m.setattr(training, "Watch", Recorder)
        m.setattr(training, "make_batches", broken)
        if failure.frozen_center:
            m.setattr(losses, "update_center", lambda center_K, sum_K, count, momentum=1.0: center_K)
        try:
            training.train(config, workdir / "run")
        except _Enough:
            pass
        except FloatingPointError as error:
            return fired, error
    return fired, None
