"""Compare train steps over layouts of devices and processes: used by the fast test and the acceptance run."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo", "adjacent")
BETA1 = 0.9  # of Adam, in all recipes


@dataclasses.dataclass(frozen=True)
class Layout:
    """`processes` of `devices` fake devices each, as a mesh [data, fsdp]."""

    devices: int
    fsdp: int
    processes: int = 1

    def __str__(self) -> str:
        data = self.devices * self.processes // self.fsdp
        return f"{data}x{self.fsdp}" + (f"-on-{self.processes}-processes" if self.processes > 1 else "")


def start(layout: Layout, folder: Path, restore) -> list[subprocess.Popen]:
    """Start tests/step_once.py in every process of a layout."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    # orbax compiles hundreds of small programs to slice small sharded arrays: cached, they count
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    job = {"config": str(folder / "config.json"), "folder": str(folder), "name": str(layout)}
    job |= {"coordinator": coordinator, "restore": [str(r) for r in restore], **dataclasses.asdict(layout)}
    return [
        subprocess.Popen(
            [sys.executable, REPO / "tests" / "step_once.py", json.dumps(job | {"process": process})],
            env=os.environ | env, stdout=subprocess.DEVNULL,
            stderr=(folder / f"{layout}-{process}.log").open("w"),
        )
        for process in range(layout.processes)
    ]  # fmt: skip


def run_layouts(config: dict, folder: Path, layouts, restore=()) -> list[dict]:
    """Arrays of the first step in each layout; all layouts run at once, and then go on from `restore`."""
    (folder / "config.json").write_text(json.dumps(config))
    running = {(layout, p): job for layout in layouts for p, job in enumerate(start(layout, folder, restore))}
    try:
        while any(job.poll() != 0 for job in running.values()):
            for (layout, process), job in running.items():
                assert not job.poll(), (folder / f"{layout}-{process}.log").read_text()[-3000:]
            time.sleep(0.1)
    finally:
        for job in running.values():
            job.kill()
    return [dict(np.load(folder / f"{layout}.npz")) for layout in layouts]


def batch_digests(folder: Path, layouts) -> list[str]:
    """SHA-256 of two global batches, the processes' rows one after the other, in each layout."""
    digests = []
    for layout in layouts:
        parts = [dict(np.load(folder / f"{layout}-rows-{p}.npz")) for p in range(layout.processes)]
        digest = hashlib.sha256()
        for name in sorted(parts[0]):
            whole = np.concatenate([part[name] for part in parts])
            digest.update(f"{name} {whole.dtype} {whole.shape}".encode() + whole.tobytes())
        digests.append(digest.hexdigest())
    return digests


def differences(a: dict, b: dict, before: dict | None = None) -> tuple[float, float]:
    """(largest relative difference of a loss, largest difference of an update in learning rates).

    `before`: the arrays before the step, where Adam's moments were not 0.

    Raises AssertionError: something is not finite.
    """
    # np.max, as Python's max passes over a NaN
    worst_loss = np.max([abs(a[k] - b[k]) / abs(a[k]) for k in (f"metric/{n}" for n in LOSSES)])
    lr = float(a["metric/lr"])
    worst_update = [0.0]
    for name in (k.removeprefix("mu/") for k in a if k.startswith("mu/")):
        gradient = a[f"mu/{name}"] - (BETA1 * before[f"mu/{name}"] if before else 0)
        counts = np.abs(gradient) / (1 - BETA1) > 1e-7  # below, Adam takes the sign of rounding noise
        error = np.abs(a[f"student/{name}"] - b[f"student/{name}"]) / lr
        assert np.isfinite(gradient).all() and np.isfinite(error).all(), name
        worst_update.append(error[counts].max(initial=0))
    worst = float(worst_loss), float(np.max(worst_update))
    assert np.isfinite(worst).all(), worst
    return worst


def compare(config: dict, folder: Path, layouts) -> tuple[list[str], float, float]:
    """Run all layouts, restore the checkpoint of each in each, and step again.

    Returns lines to print, the largest relative difference of a loss and of an update in learning rates.

    Raises AssertionError: batches differ by a byte, or a restored state is not what was saved.
    """
    steps = run_layouts(config, folder, layouts, restore=layouts)
    digests = batch_digests(folder, layouts)
    assert len(set(digests)) == 1, digests
    lines, worst = [f"batches, all layouts: sha256 {digests[0][:16]}"], []
    for layout, step in zip(layouts, steps, strict=True):
        worst.append(differences(steps[0], step))
        lines.append(f"{layout}: losses {worst[-1][0]:.1e} relative, updates {worst[-1][1]:.5f} of a rate")
    for origin, saved in zip(layouts, steps, strict=True):
        own = dict(np.load(folder / f"{origin}-from-{origin}.npz"))
        found = []
        for layout in layouts:
            other = dict(np.load(folder / f"{layout}-from-{origin}.npz"))
            assert other["restored"] == saved["state"], (layout, origin)
            found.append(differences(own, other, before=saved))
        worst += found
        lines.append(
            f"checkpoint of {origin} in all layouts: state equal, next step: losses within "
            f"{max(f[0] for f in found):.1e}, updates within {max(f[1] for f in found):.5f} of a rate"
        )
    return lines, *map(float, np.max(worst, axis=0))
