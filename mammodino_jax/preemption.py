"""SIGTERM: how a scheduler says that it is about to take the machine away."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether to save and stop now, to be called once a step by all processes.

    Where several processes run, all of them are told at the same call, even if one alone got the signal.
    """
    if jax.distributed.is_initialized():  # it has taken the signal over, and agrees on a later call
        calls = itertools.count(1)  # not the step: for a signal before the first call it agrees on call 1
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield lambda: False
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
