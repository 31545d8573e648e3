"""What is said, and what is left running, when making a batch fails or its process dies."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from mammodino_jax.data import workers
from mammodino_jax.data.workers import iterate, note
from mammodino_jax.errors import DataError, UserError

NAME = "record {} of DATA".format


def maker(fail=None, at=3):
    """Batches {"step": step}; `fail()` is called in making step `at`. Nested, so that it travels by value."""

    def build(step):
        note(step, 100 + step)
        if fail and step == at:
            fail()
        return {"step": step}

    return build


def found(build, processes):
    return [batch["step"] for batch in iterate(build, NAME, range(8), processes, 1)]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (-7, "killed by SIGBUS .is /dev/shm full"),
        (-11, "killed by SIGSEGV; "),
        (1, "ended with exit code 1; "),
    ],
)
def test_other_deaths_are_told_apart(tmp_path, code, how):
    notes = workers._Notes(tmp_path / "notes", 2, 1)
    assert re.search(how, message := workers._death(notes, 1, code, 5, NAME))
    assert message.startswith("step 5: data worker 1 of 2 ") and message.endswith("it was at no record")


def no_workers_left():
    return not [p for p in multiprocessing.active_children() if p.name.startswith("grain")]


@pytest.mark.slow
def test_a_killed_worker_is_named_with_its_record():
    def die():
        time.sleep(0.5)  # for step 1 to reach us
        os.kill(os.getpid(), signal.SIGKILL)

    got = []
    with pytest.raises(DataError) as error:
        for batch in iterate(maker(die), NAME, range(8), 2, 1):
            got.append(batch["step"])
    assert got == [0, 1, 2]
    message = "step 3: data worker 1 of 2 was killed by SIGKILL .*; it was at record 103 of DATA, for step 3$"
    assert error.match(message) and no_workers_left()


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_names_step_and_record(processes):
    class Odd(
        Exception
    ):  # one that cannot be pickled would be lost between processes, and the run would wait
        def __reduce__(self):
            raise TypeError("cannot be pickled")

    def fail():
        raise Odd("odd")

    where = "data worker 0 of 1, step 3" if processes else "step 3"
    with pytest.raises(DataError, match=f"^{where}, record 103 of DATA: Odd: odd"):
        found(maker(fail), processes)
    assert no_workers_left()


def test_bad_input_stays_bad_input():
    def fail():
        raise UserError("record 103 cannot be read")

    with pytest.raises(UserError, match=r"^step 3: record 103 cannot be read"):
        found(maker(fail), processes=0)


@pytest.mark.slow
def test_close_stops_the_workers_and_a_signal_to_the_group_does_not():
    """In a new process: the first next() of a process starts helpers of multiprocessing, too."""
    code = (
        "import multiprocessing, os, signal\n"
        "from absl import flags; flags.FLAGS.mark_as_parsed()\n"
        "from mammodino_jax.data.workers import iterate\n"
        "if __name__ == '__main__':\n"
        "    batches = iterate(lambda step: {'step': step}, str, range(1000), 2, 2)\n"
        "    next(batches)\n"
        "    workers = multiprocessing.active_children()\n"
        "    for worker in workers:\n"
        "        os.kill(worker.pid, signal.SIGTERM)\n"
        "        os.kill(worker.pid, signal.SIGINT)\n"
        "    steps = [next(batches)['step'] for _ in range(20)]\n"
        "    batches.close()\n"
        "    assert not multiprocessing.active_children()\n"
        "    print(len(workers), steps)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == f"2 {list(range(1, 21))}", run.stderr


@pytest.mark.slow
def test_workers_end_with_a_killed_run():
    code = (
        "import multiprocessing, time\n"
        "from absl import flags; flags.FLAGS.mark_as_parsed()\n"
        "from mammodino_jax.data.workers import iterate\n"
        "if __name__ == '__main__':\n"
        "    batches = iterate(lambda step: {'step': step}, str, range(9**9), 2, 1)\n"
        "    next(batches)\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in run.stdout.readline().split()]
    assert len(pids) == 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.1)
