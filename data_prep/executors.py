"""Where the tasks of a build run: in this process, in a pool of processes, or on a Dask cluster."""

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager

from mammodino_jax.errors import UserError


@contextmanager
def executor(workers: int, dask: str | None) -> Iterator[Callable]:
    """Yield `map`, over processes if there are several workers or over a Dask cluster: results in order,
    whoever is done first.

    A worker that dies (out of memory, killed) ends the build with an error; what is finished stays.
    """
    if dask:
        with _dask(workers, dask) as cluster:
            yield cluster.map
        return
    if workers <= 1:
        yield map
        return
    processes = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield processes.map
    except BrokenProcessPool as error:
        message = "a worker process died (out of memory?); try fewer --workers: finished shards are kept"
        raise UserError(message) from error
    finally:
        processes.shutdown(cancel_futures=True)


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
