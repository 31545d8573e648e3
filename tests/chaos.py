"""Interrupt a training run at random moments, as machines do, and start it again each time."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mammodino_jax import checkpoint, metrics

REPO = Path(__file__).resolve().parents[1]
MOMENTS = ("step", "saving", "restore", "start-up", "compile", "step")  # steps twice: most of a run is steps
READY = "devices: ["  # on the console: from here on SIGTERM is handled
LAST = 12  # steps before the end from which on nothing more is waited for: the signal must hit a running run
say = functools.partial(print, flush=True)  # a run of half an hour whose output is redirected


class Runs:
    """Starts of one training run, `main.py` on a recipe that is written to `folder`."""

    def __init__(self, folder: Path, config: ConfigDict, stride: int = 15):
        """`stride`: at most so many steps are let pass before a signal."""
        self.stride = stride
        self.folder, self.workdir = folder, folder / "run"
        self.steps, self.batch_size = config.steps, config.batch_size
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.py").write_text(
            "import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
            f"    return ConfigDict(json.loads('''{config.to_json()}'''))\n"
        )
        self.began = 0.0
        self.steps_from: list[str] = []  # of each start that has ended: "compiler", "cache" or ""

    def start(self, devices: int = 1) -> subprocess.Popen:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        # to be told what the compile cache has and has not; without a level these lines are left out
        env |= {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler", "JAX_LOGGING_LEVEL": "ERROR"}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)  # the run's own
        command = [
            sys.executable,
            "main.py",
            f"--config={self.folder}/recipe.py",
            f"--workdir={self.workdir}",
        ]
        self.began = time.time()
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)

    def finish(self, devices: int = 1) -> str:
        """Start and wait for the end; the console."""
        code = self.start(devices).wait()
        assert code == 0, self.log()[-3000:]
        self.steps_from.append(self.looked_up())
        return self.log()

    def looked_up(self) -> str:
        """How the last start came by its train step; "" where it ended before that."""
        lines = {
            "cache": "ersistent compilation cache hit for 'jit_train_step'",
            "compiler": "'jit_train_step' took at least",
        }
        return next((name for name, line in lines.items() if line in self.log()), "")

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def trained(self) -> int:
        """Steps in the metrics."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def rows(self) -> list[dict]:
        """The metrics, without what varies by start."""
        rows = metrics.read(self.workdir / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    def saved(self) -> list[int]:
        return checkpoint.steps(self.workdir / "checkpoints")

    def saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def interrupt(self, process, what: signal.Signals, moment: str, rng: np.random.Generator) -> str:
        """Wait for a moment, send the signal, wait for the end; returns what it hit.

        SIGTERM has to end a run with exit code 0 and its line, unless it is not ready yet.

        Raises AssertionError: the signal hit nothing, as the run had ended, or another exit code.
        """

        def until(reached):
            while process.poll() is None and not reached():
                time.sleep(0.005)

        if moment == "start-up":
            time.sleep(rng.uniform(0, 4))
        elif moment == "restore":  # between the first line and the one that says ready
            until(self.log)
            time.sleep(rng.uniform(0, 1))
        else:
            until(lambda: READY in self.log())
        if moment == "compile":
            time.sleep(rng.uniform(0, 3))
        if moment in ("step", "saving"):
            known, more = self.trained(), int(rng.integers(1, self.stride))
            until(lambda: self.trained() >= min(known + more, self.steps - LAST))
        if moment == "step":  # anywhere in the next one
            rates = [row["time/images_per_s"] for row in metrics.read(self.workdir / "metrics.jsonl")[-5:]]
            time.sleep(rng.uniform(0, self.batch_size / max(rates, default=self.batch_size)))
        if moment == "saving":
            until(self.saving)
            time.sleep(rng.uniform(0, 0.05))
        ready, saving, at = READY in self.log(), self.saving(), self.trained()
        process.send_signal(what)
        process.wait()
        seconds = time.time() - self.began
        hit = f"{what.name} {seconds:.1f} s after the start ({moment}), at step {at}{', saving' * saving}"
        told = f"{hit}, exit code {process.returncode}\n{self.log()[-3000:]}"
        if what == signal.SIGTERM and (ready or process.returncode == 0):
            assert process.returncode == 0 and "SIGTERM: stopped at step" in self.log(), told
        else:
            assert process.returncode == -what, told
        assert at < self.steps, told
        self.steps_from.append(self.looked_up())
        return f"{hit} -> checkpoints {self.saved()}"


def signals(kills: int, terms: int, rng: np.random.Generator) -> list[tuple[signal.Signals, str]]:
    """Signals in random order, each with a moment; all moments come up for both kinds where they can."""
    drawn = [
        (what, MOMENTS[n % len(MOMENTS)])
        for what, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terms))
        for n in range(count)
    ]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def truncate(file: Path) -> None:
    """Cut the largest file of a checkpoint in two."""
    largest = max((p for p in file.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def parameters(run: Runs) -> tuple[int, dict]:
    """(step, whole train state as arrays) of the newest checkpoint."""
    return run.saved()[-1], checkpoint.load(run.workdir)


def changing_devices(run: Runs, plan, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Interrupt a run by `plan` [(signal, moment, devices), ...], resume with the next one's devices to the end.

    Returns a (loss, update) difference for each resumed step between the old and the new number of devices.
    """
    kept, pairs, old = run.folder / "kept", [], plan[0][2]
    for what, moment, devices in plan:
        pairs += keep(run, kept, old, devices)
        process, old = run.start(devices), devices
        say(f"2. {devices} devices: {run.interrupt(process, what, moment, rng)}")
    pairs += keep(run, kept, old, 1)
    run.finish()
    out = run.folder / "next.json"
    command = [sys.executable, REPO / "tests/next_step.py", run.workdir / "config.json", kept, out, *pairs]
    path = os.pathsep.join(str(REPO / p) for p in (".", "tests"))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    # the programs of the largest number of devices are there
    env["JAX_COMPILATION_CACHE_DIR"] = str(run.workdir / "compile_cache")
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(pair) for pair in json.loads(out.read_text())]


def keep(run: Runs, kept: Path, old: int, new: int) -> list[str]:
    """Copy the checkpoint that the next start resumes from; [what next_step.py is to compare there]."""
    if old == new or not run.saved() or run.saved()[-1] == run.steps:
        return []
    step = run.saved()[-1]
    shutil.copytree(run.workdir / "checkpoints" / str(step), kept / str(step), dirs_exist_ok=True)
    return [f"{step}:{old}:{new}"]
