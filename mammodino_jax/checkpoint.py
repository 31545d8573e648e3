"""Checkpoints by Orbax (v1 API): all of Orbax that the project uses is in this file.

A checkpoint is a folder named by its step. What is called otherwise is none: STEP.orbax-checkpoint-tmp, a
save that did not finish, and STEP.corrupt (no process could read it) or STEP.unread (some could), which were
moved out of the way.
"""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mammodino_jax.errors import UserError

# for a file to appear on other hosts: NFS and gcsfuse remember for a while what is not there
SHARED_SECONDS = 60
RETRY_SECONDS = 3


class Checkpoints:
    """Saves train states under `folder`/<step> in the background and keeps the newest `keep`.

    A save is atomic, and one that fails (a full disk) costs nothing but itself: a warning, what it wrote is
    removed, older checkpoints stay. All processes call the same methods in the same order.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder, self._keep = Path(folder), keep
        self._saving: tuple | None = None  # (step, Orbax's response)
        self._failed = ""
        self._remove(_unfinished(self._folder))  # of a run that was killed

    def save(self, step: int, state: dict, provenance: dict, first: Callable[[], None] = lambda: None):
        """Begin to save a train state with what it was trained on, and return once the arrays are copied.

        Args:
          step: number of steps trained.
          state: pytree of arrays; may be donated afterwards.
          provenance: JSON, what was seen (provenance.collect).
          first: called before anything is written; the checkpoint does not count without it (OSError).
        """
        self.wait()
        try:
            first()
            reason = ""
        except OSError as error:
            reason = str(error)
        if not _everywhere(not reason):  # asked first: the others would wait for this process while saving
            self._fail(step, reason or "another process failed")
            return
        parts = {"state": state, "provenance": provenance}
        context = ocp.Context()
        # where a folder cannot be made, Orbax's threads would wait minutes for it
        context.asynchronous.create_directories_asynchronously = False
        try:
            with context:
                self._saving = step, ocp.save_checkpointables_async(self._folder / str(step), parts)
        except Exception as error:  # Orbax's own, TensorStore's ValueError, OSError: told by `wait`
            self._saving = step, error

    def wait(self) -> str:
        """Wait for the save before; returns why the last one failed, "" where it did not."""
        if self._saving is None:
            return self._failed
        step, reason = self._saving[0], self._result()
        if _everywhere(not reason):
            self._failed = ""
            self._remove([self._folder / str(old) for old in steps(self._folder)[: -self._keep]])
        else:
            self._fail(step, reason or "another process failed")
        return self._failed

    def close(self) -> None:
        """Wait for what this process still writes; the others may have failed or gone."""
        if self._saving is not None and (reason := self._result()):
            logging.warning("a checkpoint could not be saved: %s", reason)

    def _result(self) -> str:
        (_, response), self._saving = self._saving, None
        try:
            if isinstance(response, Exception):
                raise response
            response.result()
            return ""
        except Exception as error:
            return _reason(error)

    def _fail(self, step: int, reason: str) -> None:
        self._failed = reason
        self._remove(_unfinished(self._folder))
        kept = steps(self._folder)
        logging.warning(
            "checkpoint %d could not be saved (%s); %s", step, reason,
            f"the one of step {kept[-1]} is kept" if kept else "there is no older one",
        )  # fmt: skip

    def _remove(self, folders) -> None:
        for folder in folders if jax.process_index() == 0 else ():
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logging.warning("%s could not be removed: %s", folder, error)


def restore(folder: Path, target: dict) -> tuple[int, dict | None, dict | None]:
    """The newest checkpoint that every process can read.

    Newer ones are moved aside, each with a warning: to STEP.corrupt, or to STEP.unread where it could be read
    by some processes, and so may be whole. Under its own name it would be in the way of the run's next ones.

    Args:
      folder: where the checkpoints lie.
      target: abstract train state; the arrays get its shapes, dtypes and shardings, whatever the number of
        devices and processes they were saved from.

    Returns:
      (steps trained, train state, provenance); (0, None, None) where there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none can be read; nothing has been moved then.
      jax.errors.JaxRuntimeError: the device has too little memory for the state.
    """
    folder, unread, aside = Path(folder), {}, {}
    left = steps(folder)
    while (step := _of_process_0(left.pop() if left else -1)) >= 0:
        parts, reason, readable = _read_together(folder / str(step), step, target)
        if readable.all():
            break
        parts = None  # the older state has to fit in its place
        unread[step] = reason or "another process cannot read it"
        aside[step] = f"{step}.unread" if readable.any() else f"{step}.corrupt"
    else:
        if unread:
            told = "; ".join(f"step {step}: {reason}" for step, reason in unread.items())
            raise UserError(
                f"no checkpoint under {folder} can be read ({told}); copy one back, or start anew with "
                "another --workdir"
            )
        return 0, None, None
    for broken, reason in unread.items() if jax.process_index() == 0 else ():
        moved = folder / aside[broken]
        while moved.exists():
            moved = moved.with_name(moved.name + "+")
        (folder / str(broken)).rename(moved)
        logging.warning(
            "checkpoint %d cannot be read (%s) and is moved to %s; going on from step %d",
            broken, reason, moved, step,
        )  # fmt: skip
    logging.info("restored step %d", step)
    return step, parts["state"], parts["provenance"]


def _read_together(file: Path, step: int, target: dict) -> tuple[dict, str, np.ndarray]:
    """(what a checkpoint holds, why this process cannot read it or "", which processes can).

    What a network file system fails to read may be there a moment later: with several processes, those that
    failed try again, for SHARED_SECONDS where another could read it, once where none could.
    """
    began, tries = time.monotonic(), 1
    parts, reason = _read(file, step, target)
    while True:
        found = multihost_utils.process_allgather(np.array([not reason, time.monotonic() - began]))
        found = found.reshape(-1, 2)
        readable, seconds = found[:, 0] > 0, found[:, 1].max()  # the same everywhere, and so is what follows
        patience = SHARED_SECONDS if readable.any() else RETRY_SECONDS
        if readable.all() or len(readable) == 1 or seconds >= patience:
            if tries > 1 or not readable.all():
                _count_alike()
            return parts, reason, readable
        tries += 1
        time.sleep(RETRY_SECONDS)
        if reason:
            parts, reason = _read(file, step, target)


def _read(file: Path, step: int, target: dict) -> tuple[dict, str]:
    """(what a checkpoint holds, why it cannot be read or ""), of this process alone: no process waits."""
    context, me = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process {me}"
    try:
        with context:
            parts = ocp.load_checkpointables(file, {"state": target, "provenance": None})
        if int(parts["state"]["step"]) != step:
            raise ValueError(f"it holds step {int(parts['state']['step'])}")
        return parts, ""
    except Exception as error:  # whatever damage makes Orbax, TensorStore or a decoder raise
        first = _first(error)
        if isinstance(first, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(first):
            raise  # the device is too small: nothing is wrong with the checkpoint
        return {}, _reason(error)


def _first(error: BaseException) -> BaseException:
    """What an error goes back to."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return error


def _reason(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    error = _first(error)
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _everywhere(good: bool) -> bool:
    """Whether all processes are well; where one is not, the next call of Orbax finds them in step again."""
    if np.all(multihost_utils.process_allgather(np.array(good))):
        return True
    _count_alike()
    return False


def _count_alike() -> None:
    """Let the next call of Orbax find all processes in step.

    Orbax counts its operations and meets the other processes under that number. One that fails early is not
    counted: without this the others would wait for it. There is no public way to say so.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator as Count

        most = multihost_utils.process_allgather(np.int32(Count.get_current_operation_id())).max()
        while int(Count.get_current_operation_id()) < most:
            Count.next_operation_id()


def _of_process_0(number: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


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


def _unfinished(folder: Path) -> list[Path]:
    """What saves that did not finish have left."""
    return list(Path(folder).glob("*.orbax-checkpoint-tmp*"))


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
