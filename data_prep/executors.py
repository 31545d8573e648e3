"""Where the tasks of a build run: in this process, in a pool of processes, or on a Dask cluster."""

import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress

from mammodino_jax.errors import UserError


@contextmanager
def executor(workers: int, dask: str | None) -> Iterator[Callable]:
    """Yield `map`, over processes if there are several workers or over a Dask cluster: results in order,
    whoever is done first.

    A worker process that dies (out of memory, killed) ends the run with an error; what is finished stays. Not
    so where `map` has an argument `died`: tasks are tried again, and of one that kills a process of its own
    too, `died(*task)` is the result.
    """
    if dask:
        with _dask(workers, dask) as cluster:
            yield lambda work, *tasks, died=None: cluster.map(work, *tasks)
        return
    if workers <= 1:
        yield lambda work, *tasks, died=None: map(work, *tasks)
        return
    pool = _Pool(workers)
    try:
        yield pool.map
    except BrokenProcessPool as error:
        message = "a worker process died (out of memory?); try fewer --workers: finished shards are kept"
        raise UserError(message) from error
    finally:
        pool.processes.shutdown(cancel_futures=True)


class _Pool:
    """Processes that are started again where one dies. One `map` at a time."""

    def __init__(self, workers: int):
        spawn = multiprocessing.get_context("spawn")
        self._start = functools.partial(ProcessPoolExecutor, workers, spawn)
        self.processes = self._start()

    def _restart(self) -> None:
        self.processes.shutdown()  # waits for its processes, which may write still
        self.processes = self._start()

    def map(self, work: Callable, *iterables, died: Callable | None = None) -> Iterator:
        results = iter(())
        with suppress(BrokenProcessPool):  # there are too few results then
            results = self.processes.map(work, *iterables)
        return self._results(work, list(zip(*iterables, strict=True)), results, died)

    def _results(self, work: Callable, tasks: list[tuple], results: Iterator, died) -> Iterator:
        for place, task in enumerate(tasks, 1):
            try:
                result = next(results)
            except (BrokenProcessPool, StopIteration) as error:  # this task's process, or one after it
                if not died:
                    raise BrokenProcessPool from error
                self._restart()
                try:
                    result = self.processes.submit(work, *task).result()
                except BrokenProcessPool:
                    self._restart()
                    self.processes.submit(int).result()  # an error where no process lives at all
                    result = died(*task)
                results = self.map(work, *zip(*tasks[place:], strict=True), died=died)
            yield result


@contextmanager
def _dask(workers: int, dask: str) -> Iterator:
    """A concurrent-futures executor on the Dask scheduler at an address, or on a cluster of our own. Its
    workers must see the files under the same paths."""
    try:
        import distributed
    except ImportError as error:
        raise UserError("--dask needs dask.distributed: pip install 'mammodino-jax[dask]'") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it warns of its own end
    with ExitStack() as stack:
        address = dask
        try:
            if address == "local":
                settings = dict(n_workers=workers, threads_per_worker=1, dashboard_address=None)
                address = stack.enter_context(distributed.LocalCluster(**settings))
            client = stack.enter_context(distributed.Client(address, timeout=20))
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {dask} ({error})") from error
        try:
            yield client.get_executor()
        except distributed.scheduler.KilledWorker as error:
            raise UserError(f"Dask workers died ({error}); finished shards are kept, run it again") from error
