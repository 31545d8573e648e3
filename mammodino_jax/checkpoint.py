"""Checkpoints by Orbax (v1 API): all of Orbax that the project uses is in this file."""

import re
from pathlib import Path

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from mammodino_jax.errors import UserError


class Checkpoints:
    """Saves and restores train states under `folder`/<step>; a save is atomic."""

    def __init__(self, folder: Path, keep: int = 2):
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(folder, preservation_policy=policy)

    def save(self, step: int, state: dict, provenance: dict) -> None:
        """Save a train state with what it was trained on.

        Args:
          step: number of steps trained.
          state: pytree of arrays.
          provenance: JSON, what was seen (provenance.collect).
        """
        self._checkpointer.save_checkpointables(step, {"state": state, "provenance": provenance}, force=True)

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore(self, target: dict) -> dict:
        """Restore the newest state into the shapes, dtypes and shardings of `target`."""
        step = self.latest
        logging.info("restoring step %d", step)
        return self._checkpointer.load_checkpointables(step, {"state": target})["state"]

    def close(self) -> None:
        self._checkpointer.close()


def dump(folder: Path, state: dict, batch: dict) -> Path:
    """Write a state (all processes together) and this process's rows of a batch, to look into a failure.

    `folder` gets state/ (Orbax) and batch-<process>.npz; what an earlier failure left there is replaced.
    """
    ocp.save_checkpointables(folder / "state", {"state": state}, overwrite=True)
    np.savez(folder / f"batch-{jax.process_index()}.npz", **batch)
    return folder


def load_dump(folder: Path, target: dict) -> dict:
    """The state of a dump, in the shapes, dtypes and shardings of `target`."""
    return ocp.load_checkpointables(folder / "state", {"state": target})["state"]


def save_params(folder: Path, params: dict) -> None:
    """Write parameters alone, as one Orbax pytree."""
    ocp.save(Path(folder).absolute(), params)


def load_params(folder: Path, target: dict) -> dict:
    """Parameters that `save_params` wrote, in the shapes of the abstract `target`.

    Raises:
      UserError: nothing readable there, or of another structure or shapes.
    """
    try:
        return ocp.load(Path(folder).absolute(), _here(target))
    except (ValueError, KeyError, OSError, ocp.errors.InvalidLayoutError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} does not hold the parameters that are described: {reason}") from None


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints under `folder`, ascending."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(p.name) for p in Path(folder).iterdir() if re.fullmatch(r"\d+", p.name))


def workdir_of(path: Path) -> Path | None:
    """The workdir that `path` is, or that it is a checkpoint of (workdir/checkpoints/STEP); None: neither."""
    path = Path(path).absolute()
    if path.parent.name == "checkpoints" and re.fullmatch(r"\d+", path.name):
        return path.parent.parent
    return path if (path / "checkpoints").is_dir() else None


def load(path: Path, part: str = "state", names: dict | None = None):
    """Read a part of a checkpoint without building a train state.

    Args:
      path: a training workdir, for its newest checkpoint, or one of its checkpoints.
      part: "state" or "provenance".
      names: abstract subtree to read, e.g. {"teacher": {"backbone": ...}}; None reads all.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it holds other arrays than `names`.
    """
    path = Path(path).absolute()
    workdir = workdir_of(path) or path
    folder = workdir / "checkpoints"
    found = steps(folder)
    if not found:
        raise UserError(
            f"no finished checkpoint under {folder}; train first: python main.py --config=... --workdir=..."
        )
    file = folder / str(found[-1]) if path == workdir else path
    context = ocp.Context()
    context.pytree.loading.partial_load = names is not None
    try:
        if names is not None:
            _check(file, ocp.metadata(file, checkpointable_name=part).metadata, names)
            names = _here(names)
        with context:
            return ocp.load_checkpointables(file, {part: names})[part]
    except (ValueError, KeyError, TypeError, OSError, ocp.errors.InvalidLayoutError) as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise UserError(
            f"{file} does not read as a checkpoint (damaged, or not copied whole?): {reason}"
        ) from None


def _check(file: Path, stored: dict | None, names: dict) -> None:
    """Raise a UserError where what is stored of the networks in `names` has other arrays or shapes.

    Orbax itself passes over arrays that are missing or not asked for. What is damaged (None) it names itself.
    """
    if stored is None:
        return
    there, expected = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(a.shape)
            for path, a in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, names)
    )
    networks = {tuple(name.split(".")[:2]) for name in expected}  # ("teacher", "backbone")
    for name in sorted({*there, *expected}):
        here, want = there.get(name, "missing"), expected.get(name, "no array of this name")
        if tuple(name.split(".")[:2]) in networks and here != want:
            raise UserError(
                f"{file}: mismatched architecture: {name} is {here} there, but {want} by the workdir's "
                "config.json; take the config.json that the run was started with"
            )


def _here(abstract: dict) -> dict:
    """Abstract arrays to be read onto one device, whatever layout they were trained in."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), abstract)
