"""A data worker that is killed ends a run with a clear error; its checkpoints stay."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from tiny import tiny, tiny_dataset

from mammodino_jax import checkpoint, metrics
from mammodino_jax.errors import DataError
from mammodino_jax.train import train


def workers():
    return [p.pid for p in multiprocessing.active_children() if p.name.startswith("grain")]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_keeps_its_work(tmp_path):
    config, workdir = tiny(tiny_dataset(tmp_path / "data"), steps=24), tmp_path / "run"
    config.data.workers = 1

    def kill():
        while len(metrics.read(workdir / "metrics.jsonl")) < 6:
            time.sleep(0.02)
        os.kill(workers()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(DataError, match=r"step \d+: data worker 0 of 1 was killed by SIGKILL"):
        train(config, str(workdir))
    thread.join()
    assert not workers()
    assert 4 <= max(checkpoint.steps(workdir / "checkpoints")) < 24
