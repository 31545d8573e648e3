"""Acceptance line 2 of scale: interrupted at random, resumed each time, nothing lost. make accept-scale.

About 25 minutes on 2 cores. MAMMODINO_CHAOS=STEPS,KILLS,TERMS (default 300,20,5) tries it on a toy network,
which the full disk always has.
"""

import os
import shutil
import subprocess
import time

import chaos
import jax
import numpy as np
import pytest
from chaos import Runs, say, truncate
from tiny import shrink, tiny_dataset

from configs import nano
from mammodino_jax import metrics

pytestmark = [pytest.mark.accept, pytest.mark.timeout(7200)]
TOY = "MAMMODINO_CHAOS" in os.environ
STEPS, KILLS, TERMS = map(int, os.environ.get("MAMMODINO_CHAOS", "300,20,5").split(","))
# half of the signals let steps pass: these are to be spread over the whole run
STRIDE = 4 * STEPS // (KILLS + TERMS)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The nano recipe at 98 px on a synthetic data set, a checkpoint every 10 steps."""
    c = nano.get_config(str(tiny_dataset(tmp_path_factory.mktemp("chaos") / "data")))
    if TOY:
        shrink(c).update(batch_size=32, dbt_rows=8)
    c.steps = STEPS
    c.run.update(checkpoint_every=2 if TOY else 10, diagnose_every=0)
    return c


def test_line_02_same_devices(config, tmp_path):
    """20 SIGKILLs, 5 SIGTERMs and a truncated checkpoint: bitwise the uninterrupted run."""
    began, rng = time.time(), np.random.default_rng(2)
    straight, run = Runs(tmp_path / "straight", config), Runs(tmp_path / "chaos", config, STRIDE)
    beside, cut = straight.start(), None  # on the other core
    try:
        for number, (what, moment) in enumerate(chaos.signals(KILLS, TERMS, rng), start=1):
            say(f"2. {number}: {run.interrupt(run.start(), what, moment, rng)}")
            if cut is None and len(run.saved()) >= 2 and number >= (KILLS + TERMS) // 2:
                cut = run.saved()[-1]
                truncate(run.workdir / "checkpoints" / str(cut))
                say(f"2. the newest checkpoint, of step {cut}, is cut in two")
        run.finish()
        assert beside.wait() == 0, straight.log()[-3000:]
    finally:
        beside.kill()
    (step, state), (same_step, expected) = chaos.parameters(run), chaos.parameters(straight)
    leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True))
    differ = sum(not np.array_equal(a, b) for a, b in leaves)
    compiled, found = run.steps_from.count("compiler"), run.steps_from.count("cache")
    say(
        f"2. {KILLS} SIGKILL and {TERMS} SIGTERM in {time.time() - began:.0f} s: {differ} of {len(leaves)} arrays of "
        f"the state at step {step} differ from the uninterrupted run's; metrics equal: "
        f"{run.rows() == straight.rows()}; of {len(run.steps_from)} starts {compiled} compiled the step, {found} "
        "found it in the cache, the others ended before"
    )
    assert cut and list((run.workdir / "checkpoints").glob(f"{cut}.corrupt"))
    assert differ == 0 and step == same_step == STEPS
    assert compiled == 1 and found and run.steps_from[-1] == "cache"
    assert run.rows() == straight.rows() and len(run.rows()) == STEPS


def test_line_02_other_devices(config, tmp_path):
    """The same on 1, 2, 4 and 8 fake devices in turn."""
    began, rng = time.time(), np.random.default_rng(3)
    run = Runs(tmp_path / "chaos", config, STRIDE)
    plan = [
        (what, moment, (1, 8, 2, 4)[n % 4])
        for n, (what, moment) in enumerate(chaos.signals(KILLS, TERMS, rng))
    ]
    found = chaos.changing_devices(run, plan, rng)
    rows = run.rows()
    say(
        f"2. device counts 1, 8, 2, 4 in turn, {len(plan)} interruptions in {time.time() - began:.0f} s: {len(found)} "
        f"resumed steps differ by at most {max(loss for loss, _ in found):.1e} in a loss and "  # finite: next_step.py
        f"{max(update for _, update in found):.4f} LR in an update; last loss {rows[-1]['loss']:.3f}, "
        f"bad steps {sum(r['bad'] for r in rows):.0f}"
    )
    assert found and all(loss <= 1e-5 and update <= 0.02 for loss, update in found)
    assert [r["step"] for r in rows] == list(range(STEPS)) and run.saved()[-1] == STEPS
    assert all(np.isfinite(list(r.values())).all() and not r["bad"] for r in rows)


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds three checkpoints, compiled programs and little more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder]).returncode:
        pytest.fail("this part of line 2 was not run: mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder])


@pytest.mark.parametrize("left", [0, 100_000], ids=["nothing left", "100 KB left: fails half-way"])
def test_line_02_full_disk(config, small_disk, left):
    """The disk fills up during a run and is emptied later; then it fills up for good."""
    c = shrink(config.copy_and_resolve_references())
    c.update(batch_size=32, dbt_rows=8, steps=40)
    c.run.checkpoint_every = 10
    run = Runs(small_disk / "a", c)

    def fill(at: int):
        while process.poll() is None and run.trained() < at:
            time.sleep(0.01)
        while any((run.workdir / "checkpoints").glob("*tmp*")):
            time.sleep(0.01)
        free = shutil.disk_usage(small_disk).free - left
        with (small_disk / "filler").open("wb", buffering=0) as file:
            while free > 0:
                free -= file.write(bytes(min(free, 1 << 20)))

    def wait_for(text: str):
        while process.poll() is None and text not in run.log():
            time.sleep(0.05)

    process = run.start()
    fill(12)
    wait_for("could not be saved")
    (small_disk / "filler").unlink()
    assert process.wait() == 0, run.log()[-3000:]
    rows = metrics.read(run.workdir / "metrics.jsonl")
    failed = [r["step"] + 1 for r in rows if r.get("checkpoint_failed")]
    reason = next(line for line in run.log().splitlines() if "could not be saved" in line)
    say(
        f"\n2. disk full, {left} bytes left: {reason[:230]}\n2. counted at steps {failed}; checkpoints {run.saved()}"
    )
    assert failed and run.saved()[-1] == 40 and [r["step"] for r in rows] == list(range(40))
    assert not run.saving() and not list((run.workdir / "checkpoints").glob("*.corrupt"))

    shutil.rmtree(run.folder)
    run = Runs(small_disk / "b", c)
    process = run.start()
    fill(25)
    code, last = process.wait(), run.log().splitlines()[-1]
    say(f"2. disk full to the end: exit code {code}: {last[:300]}; checkpoints {run.saved()}")
    assert code == 2 and 20 in run.saved()
    if left:  # else there was no room for the console's last line, which lies on this disk, too
        assert last.startswith("error: the state of step 40 could not be saved")
    (small_disk / "filler").unlink()
    run.finish()
    assert run.saved()[-1] == 40
