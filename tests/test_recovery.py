"""Nothing is lost: preemption, damaged checkpoints, failed saves, and what a run writes beside its training."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import chaos
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chaos import Runs, truncate
from tiny import tiny, tiny_dataset

from mammodino_jax import checkpoint, metrics
from mammodino_jax import train as training
from mammodino_jax.checkpoint import Checkpoints
from mammodino_jax.compile_cache import compile_cache
from mammodino_jax.errors import UserError
from mammodino_jax.recipe import from_config
from mammodino_jax.train import train
from mammodino_jax.workdir import claim_workdir


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "data")


def state_at(step: int) -> dict:
    rng = np.random.default_rng(step)
    arrays = {"large": rng.normal(size=(300, 200)), "small": rng.normal(size=3), "zeros": np.zeros((50, 50))}
    return {"step": jnp.int32(step), "student": {k: jnp.asarray(a, jnp.float32) for k, a in arrays.items()}}


def target() -> dict:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), state_at(0))


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def write(folder, *steps, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state_at(step), {"seen": [f"until {step}"]})
    assert checkpoints.wait() == ""
    return checkpoints


def test_a_state_may_be_donated_while_it_is_saved(tmp_path):
    add = jax.jit(functools.partial(jax.tree.map, lambda a: a + 1), donate_argnums=0)
    checkpoints, state = Checkpoints(tmp_path), state_at(0)
    for step in range(1, 6):
        state = add(state)
        checkpoints.save(step, state, {"seen": []})
    for _ in range(20):
        state = add(state)
    checkpoints.wait()
    step, saved, _ = checkpoint.restore(tmp_path, target())
    assert step == 5 == int(saved["step"])
    assert same(saved["student"]["zeros"], np.full((50, 50), 5))


def test_the_newest_readable_checkpoint_is_used_and_the_damaged_one_moved_aside(tmp_path, caplog):
    write(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "4.orbax-checkpoint-tmp/state").mkdir(parents=True)  # a killed save
    truncate(tmp_path / "3")
    (tmp_path / "2/state/_METADATA").unlink()
    step, state, seen = checkpoint.restore(tmp_path, target())
    assert (step, seen) == (1, {"seen": ["until 1"]}) and same(state, state_at(1))
    told = [
        r.getMessage() for r in caplog.records if "mammodino_jax" in r.pathname and r.levelname == "WARNING"
    ]
    assert len(told) == 2 and "checkpoint 3 cannot be read" in told[0] and "going on from step 1" in told[0]
    assert "OUT_OF_RANGE" in told[0] or "byte range" in told[0]
    assert checkpoint.steps(tmp_path) == [1] and (tmp_path / "3.corrupt/state").is_dir()
    write(tmp_path, 2, 3)
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3", "2.corrupt", "3.corrupt"}
    truncate(tmp_path / "3")  # once more
    assert checkpoint.restore(tmp_path, target())[0] == 2
    assert (tmp_path / "3.corrupt+").is_dir()


def test_readers_pass_over_what_is_no_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    for name in ("2.corrupt", "3.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "1", folder / name)
    assert checkpoint.load(tmp_path, "provenance") == {"seen": ["until 1"]}
    write(folder, 4, 5)
    assert {p.name for p in folder.iterdir()} == {"4", "5", "2.corrupt"}


def test_a_folder_of_another_step_is_not_taken_for_its_name(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "7")
    assert checkpoint.restore(tmp_path, target())[0] == 1
    assert (tmp_path / "7.corrupt").is_dir()


def test_no_readable_checkpoint_is_an_error_and_never_a_new_start(tmp_path):
    assert checkpoint.restore(tmp_path / "none", target()) == (0, None, None)
    write(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / str(step))
    with pytest.raises(
        UserError, match=r"no checkpoint under .* can be read \(step 2: .*; step 1: .*another"
    ):
        checkpoint.restore(tmp_path, target())
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_device_that_is_too_small_is_not_taken_for_damage(tmp_path, monkeypatch):
    def load(folder, parts):
        try:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("cannot be loaded") from error

    write(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    with pytest.raises(ValueError, match="cannot be loaded"):
        checkpoint.restore(tmp_path, target())
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_damage_to_any_file_is_noticed_or_harmless(tmp_path):
    """Each file of a checkpoint cut in two or missing: it is not read, or read as it was saved."""
    write(tmp_path / "whole", 1)
    whole = tmp_path / "whole/1"
    noticed = 0
    for file in sorted(p for p in whole.rglob("*") if p.is_file()):
        for cut in (True, False):
            shutil.rmtree(tmp_path / "broken", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "broken/1")
            broken = tmp_path / "broken/1" / file.relative_to(whole)
            if cut:
                broken.write_bytes(broken.read_bytes()[: file.stat().st_size // 2])
            else:
                broken.unlink()
            try:
                _, state, seen = checkpoint.restore(tmp_path / "broken", target())
            except UserError:
                noticed += 1
            else:
                assert same(state, state_at(1)) and seen == {"seen": ["until 1"]}, file
    assert noticed >= 10


def test_a_failed_save_is_counted_and_the_next_one_tried(dataset, tmp_path, monkeypatch, caplog):
    """The second of three saves runs out of space half-way."""
    save, calls = checkpoint.ocp.save_checkpointables_async, []

    class Full:
        def __init__(self, folder):
            self.part = folder.with_name(folder.name + ".orbax-checkpoint-tmp")

        def result(self):
            (self.part / "state").mkdir(parents=True)
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    def failing(folder, parts):
        calls.append(folder.name)
        return Full(folder) if calls == ["4", "8"] else save(folder, parts)

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", failing)
    train(tiny(dataset, steps=12), tmp_path)
    assert calls == ["4", "8", "12"] and checkpoint.steps(tmp_path / "checkpoints") == [4, 12]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r.get("checkpoint_failed")] == [11]
    assert "checkpoint 8 could not be saved (RESOURCE_EXHAUSTED" in caplog.text
    assert "the one of step 4 is kept" in caplog.text


def test_a_last_save_that_fails_is_an_error(dataset, tmp_path, monkeypatch):
    def failing(folder, parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", failing)
    with pytest.raises(UserError, match=r"the state of step 2 could not be saved \(.*No space left"):
        train(tiny(dataset, steps=2), tmp_path)
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2


def test_metrics_wait_for_space_and_no_checkpoint_counts_without_them(dataset, tmp_path, monkeypatch, caplog):
    """The metrics of steps 1 to 5 find the disk full: nor is the checkpoint of step 4 written."""
    now, fsync = [0], os.fsync

    def full(writer, step, values):
        now[0] = step
        return write_row(writer, step, values)

    def flush(writer, sync=True):
        if 1 <= now[0] <= 5:
            raise OSError(28, "No space left on device")
        return flush_rows(writer, sync)

    write_row, flush_rows = metrics.MetricsWriter.write, metrics.MetricsWriter.flush
    monkeypatch.setattr(metrics.MetricsWriter, "write", full)
    monkeypatch.setattr(metrics.MetricsWriter, "flush", flush)
    train(tiny(dataset), tmp_path)
    assert os.fsync is fsync and checkpoint.steps(tmp_path / "checkpoints") == [8]
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(8))
    assert [r["step"] for r in rows if r.get("checkpoint_failed")] == [7]
    assert "the metrics of step 1 wait in memory" in caplog.text


def test_tensorboard_alone_may_fail(dataset, tmp_path, monkeypatch, caplog):
    flush, closed = metrics.EventsWriter.flush, []

    def full(board):
        if board._file_name.endswith((".0", ".1")):
            closed.append(board._file_name[-2:])
            raise OSError(28, "No space left on device")
        return flush(board)

    monkeypatch.setattr(metrics.EventsWriter, "flush", full)
    train(tiny(dataset, steps=4, run={"diagnose_every": 0}), tmp_path)
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert closed == [".0", ".0", ".1", ".1"]  # tried once more while closing
    assert caplog.text.count("TensorBoard does not get the metrics of step 0") == 1
    assert "wait in memory" not in caplog.text and "of step 1" not in caplog.text


def test_a_workdir_that_cannot_be_written_is_an_error_of_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir .* cannot be made: Not a directory"):
        claim_workdir(tiny("data"), tmp_path / "file/run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match=r"config.json cannot be written: No space left"):
        claim_workdir(tiny("data"), tmp_path)
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left"):
        metrics.MetricsWriter(tmp_path, 0, from_config(tiny("data")))


def test_a_failure_that_cannot_be_dumped_is_still_the_one_that_is_raised(
    dataset, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "dump", full)
    c = tiny(dataset, run={"diagnose_every": 0})
    c.optim.base_lr = float("inf")
    with pytest.raises(FloatingPointError, match="the last batch and the state could not be written"):
        train(c, tmp_path)
    assert "could not be written: [Errno 28]" in caplog.text


def test_rows_that_do_not_fit_are_written_whole_later(tmp_path, monkeypatch):
    writer = metrics.MetricsWriter(tmp_path, 0, None)
    writer._unwritten = b'{"step": 0}\n'
    writer.flush()
    writer._unwritten = b'{"step": 1}\n'
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 0}]
    monkeypatch.undo()
    writer.flush()
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1}]


def test_sigterm_saves_at_the_running_step_and_the_same_call_resumes(dataset, tmp_path, monkeypatch, caplog):
    make = training.make_batches

    def signalled(*args, **options):
        for step, batch in enumerate(make(*args, **options), start=options["start_step"]):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    straight = train(tiny(dataset), tmp_path / "straight")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(training, "make_batches", signalled)
    with caplog.at_level("INFO"):
        state = train(tiny(dataset), tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    assert int(state["step"]) == 3 and checkpoint.steps(tmp_path / "stopped/checkpoints") == [3]
    assert "SIGTERM: stopped at step 3, which is saved; the same command resumes" in caplog.text
    monkeypatch.undo()
    resumed = train(tiny(dataset, profile_steps="90:91"), tmp_path / "stopped")  # free to differ
    assert same(resumed, straight)
    rows = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped")]
    for a, b in zip(*rows, strict=True):
        assert all(a[k] == b[k] for k in a.keys() | b.keys() if not k.startswith("time/"))


def test_a_run_keeps_its_compiled_programs_and_traces_some_steps(dataset, tmp_path):
    given = jax.config.jax_compilation_cache_dir  # of the test session; a user's is kept likewise
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        train(tiny(dataset, steps=4, profile_steps="1:3"), tmp_path)
        assert list((tmp_path / "compile_cache").glob("jit_train_step*"))
        assert jax.config.jax_compilation_cache_dir is None
        (first,) = (tmp_path / "compile_cache").glob("jit_train_step*-cache")
        half = first.with_name("half-cache")
        half.write_bytes(first.read_bytes()[:-100])  # killed while writing: JAX would not replace it
        with compile_cache(tmp_path / "compile_cache"):
            pass
        assert first.exists() and not half.exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", given)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("spec", ["3", "3-5", "5:3", "a:b", "3:3", "-1:2"])
def test_steps_to_trace_are_checked(dataset, spec):
    with pytest.raises(UserError, match=f"profile_steps is '{spec}', expected FIRST:END"):
        from_config(tiny(dataset, profile_steps=spec))


@pytest.mark.slow
def test_killed_and_preempted_runs_end_as_an_uninterrupted_one(dataset, tmp_path):
    """Acceptance line 2 of scale, small; one damaged checkpoint on the way."""
    config, rng = (
        tiny(dataset, steps=30, run={"checkpoint_every": 5, "diagnose_every": 0}),
        np.random.default_rng(0),
    )
    straight, run = Runs(tmp_path / "straight", config), Runs(tmp_path / "chaos", config)
    straight.finish()
    told = []
    for what, moment in ((signal.SIGKILL, "step"), (signal.SIGKILL, "saving"), (signal.SIGTERM, "step")):
        told.append(run.interrupt(run.start(), what, moment, rng))
    truncate(run.workdir / "checkpoints" / str(run.saved()[-1]))
    log = run.finish()
    assert "cannot be read" in log and log.count("WARNING") <= 1, log
    assert list((run.workdir / "checkpoints").glob("*.corrupt")), told
    assert run.rows() == straight.rows() and len(run.rows()) == 30, told
    (step, state), (same_step, expected) = chaos.parameters(run), chaos.parameters(straight)
    assert step == same_step == 30 and same(state, expected), told
    assert run.steps_from == ["compiler", "cache", "cache", "cache"], told


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices(dataset, tmp_path):
    config, rng = (
        tiny(dataset, steps=24, run={"checkpoint_every": 3, "diagnose_every": 0}),
        np.random.default_rng(0),
    )
    run = Runs(tmp_path, config)
    found = chaos.changing_devices(run, [(signal.SIGKILL, "step", 2)], rng)
    assert len(found) == 1  # from 2 devices to 1
    for loss, update in found:
        assert loss <= 1e-5 and update <= 0.02
    assert all(np.isfinite(list(row.values())).all() for row in run.rows()) and run.saved()[-1] == 24


TWO = """
import json, os, signal, sys
from absl import flags, logging
flags.FLAGS.mark_as_parsed()
logging.set_verbosity("info")
import jax
me, port, config, workdir, stop, broken = int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]), sys.argv[6]
passing = int(sys.argv[7])
jax.distributed.initialize(f"localhost:{port}", 2, me)
from ml_collections import ConfigDict
from mammodino_jax import checkpoint, train
make, load = train.make_batches, checkpoint.ocp.load_checkpointables
def signalled(*args, **options):  # one process alone is told
    for step, batch in enumerate(make(*args, **options), start=options["start_step"]):
        if step == stop and me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
def unreadable(folder, parts):  # one process alone cannot read the newest, or only later
    global passing
    if me == 1 and folder.name == broken and passing:
        passing -= 1
        raise OSError("input/output error")
    return load(folder, parts)
checkpoint.SHARED_SECONDS = checkpoint.RETRY_SECONDS = 1
train.make_batches, checkpoint.ocp.load_checkpointables = signalled, unreadable
train.train(ConfigDict(json.load(open(config))), workdir)
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_agree_on_a_checkpoint(dataset, tmp_path):
    config = tiny(dataset, steps=400, run={"checkpoint_every": 4, "diagnose_every": 0})
    (tmp_path / "config.json").write_text(config.to_json())

    def run(stop: int, broken: int = -1, passing: int = 0) -> int:
        """The step at which both stop after process 1 got SIGTERM in step `stop`.

        Process 1 fails to read checkpoint `broken` the first `passing` times.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(chaos.REPO), "JAX_PLATFORMS": "cpu"}
        arguments = [port, tmp_path / "config.json", tmp_path / "run", stop, broken, passing]
        both = [
            subprocess.Popen(
                [sys.executable, "-c", TWO, *map(str, [me, *arguments])], env=env, stderr=subprocess.PIPE
            )
            for me in range(2)
        ]
        told = [process.communicate(timeout=300)[1].decode() for process in both]
        assert [process.returncode for process in both] == [0, 0], told[0][-3000:] + told[1][-3000:]
        lost = f"checkpoint {broken} cannot be read (another process cannot read it)" in told[0]
        assert lost == (passing > 1)
        stops = [int(re.findall(r"SIGTERM: stopped at step (\d+)", text)[0]) for text in told]
        assert stops[0] == stops[1]
        return stops[0]

    first = run(6)
    older, newest = checkpoint.steps(tmp_path / "run/checkpoints")
    assert newest == first < 400
    second = run(newest + 1, broken=newest, passing=1)
    assert not list((tmp_path / "run/checkpoints").glob("*.unread"))
    older, newest = checkpoint.steps(tmp_path / "run/checkpoints")
    assert newest == second
    second = run(older + 1, broken=newest, passing=99)
    assert (tmp_path / f"run/checkpoints/{newest}.unread").is_dir()
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == second
    steps = [row["step"] for row in metrics.read(tmp_path / "run/metrics.jsonl")]
    assert steps == list(range(second))
