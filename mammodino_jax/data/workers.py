"""Runs a batch maker in threads or worker processes, and names what was at fault when one fails or dies.

A killed process (out of memory, SIGKILL, a crash in a decoder) says nothing. So every thread notes, before
it reads a record, which one and for which step; the process that waits for the batch reads these notes.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import grain
import numpy as np

from mammodino_jax.errors import DataError, UserError

_CAUSES = {
    signal.SIGKILL: " (out of memory? fewer data.workers or data.threads need less)",
    signal.SIGBUS: " (is /dev/shm full? finished batches wait there: allow it more, or fewer data.workers)",
}
_thread = threading.local()  # .record: the one that this thread is at
_notes: "_Notes | None" = None  # in a worker process


class _Notes:
    """What the threads of the workers are at, (step, record) each, in a file that processes share.

    i64 [workers, threads + 1, 2]. A worker makes its steps in order, `threads` at a time, so its j-th has the
    slot j % (threads + 1) to itself. Record -1: the step is done.
    """

    def __init__(self, path: Path, workers: int, threads: int, worker: int | None = None):
        self.path, self.workers, self.threads, self.worker = path, workers, threads, worker
        if worker is None:
            path.write_bytes(np.full((workers, threads + 1, 2), -1, np.int64).tobytes())
        self.at = np.memmap(path, np.int64, "r+", shape=(workers, threads + 1, 2))

    def put(self, step: int, record: int) -> None:
        self.at[self.worker, step // self.workers % (self.threads + 1)] = step, record


def note(step: int, record: int) -> None:
    """Say which record this thread is about to read, for which step."""
    _thread.record = record
    if _notes:
        _notes.put(step, record)


def _guarded(build: Callable[[int], dict], name: Callable[[int], str], step: int) -> dict:
    """build(step), whose errors name step, worker and record.

    What is no UserError becomes a DataError. It holds text only: an error that cannot be pickled would never
    leave a worker.
    """
    where = f"data worker {_notes.worker} of {_notes.workers}, step {step}" if _notes else f"step {step}"
    note(step, -1)
    try:
        batch = build(step)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        record = f", {name(_thread.record)}" if _thread.record >= 0 else ""
        text = f"{where}{record}: {type(error).__name__}: {error}"
        raise DataError(text).with_traceback(error.__traceback__) from error
    note(step, -1)
    return batch


def iterate(
    build: Callable[[int], dict], name: Callable[[int], str], steps: range, workers: int, threads: int
) -> Iterator[dict]:
    """build(step) for every step, in order, made ahead by `threads` threads in each of `workers` processes.

    The end, an error and close() stop the workers. `build` calls note(); `name` gives a record's name.

    Raises:
      UserError: as `build` does.
      DataError: `build` failed otherwise, or a worker process was killed.
    """
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(functools.partial(_guarded, build, name))
    # grain's defaults (16 threads, 500 elements ahead) are meant for elements of kilobytes; ours are batches.
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    shared = tempfile.TemporaryDirectory(prefix="mammodino-") if workers else contextlib.nullcontext()
    with shared as folder:
        if workers:
            notes = _Notes(Path(folder) / "notes", workers, threads)
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            start = functools.partial(_start_worker, path=notes.path, threads=threads)
            dataset = dataset.mp_prefetch(options, worker_init_fn=start)
        batches = iter(dataset)
        # Ctrl-C and preemption reach the whole group, but the training process decides, and stops its workers
        # itself: processes that start during the first next() inherit the mask and never see these signals.
        # Python's tracker of shared memory lifts the mask as it starts, so it must run before.
        if workers and steps:
            multiprocessing.resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM) if workers and steps else ()
        )
        try:
            for step in steps:
                try:
                    batch = next(batches)
                except RuntimeError as error:
                    if not (code := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))):
                        raise
                    worker = (step - steps.start) % workers  # grain takes from the workers in turns
                    raise DataError(_death(notes, worker, int(code[1]), step, name)) from error
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                yield batch
        finally:
            batches.close()


def _death(notes: _Notes, worker: int, code: int, step: int, name: Callable[[int], str]) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    how += _CAUSES.get(-code, "")
    at = [f"{name(record)}, for step {s}" for s, record in notes.at[worker].tolist() if record >= 0]
    who = f"data worker {worker} of {notes.workers}"
    return f"step {step}: {who} {how}; it was at {'; '.join(at) or 'no record'}"


def _start_worker(worker: int, workers: int, path: Path, threads: int) -> None:
    global _notes
    _notes = _Notes(path, workers, threads, worker)
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    shutil.rmtree(_notes.path.parent, ignore_errors=True)  # a killed parent has left it
    os._exit(1)
