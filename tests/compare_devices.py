"""Compare a train step over device layouts: used by the fast test and the acceptance run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]


def run_layouts(config: dict, batch: dict, folder: Path, layouts) -> dict:
    """{(devices, fsdp): arrays of step_once.py} for the same state and batch bytes."""
    np.savez(folder / "batch.npz", **batch)
    (folder / "config.json").write_text(json.dumps(config))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    results = {}
    for devices, fsdp in layouts:
        out = folder / f"{devices}x{fsdp}.npz"
        arguments = [folder / "config.json", folder / "batch.npz", out, devices, fsdp]
        command = [sys.executable, REPO / "tests" / "step_once.py", *arguments]
        done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results[devices, fsdp] = dict(np.load(out))
    return results


def differences(a: dict, b: dict) -> tuple[float, float]:
    """(largest relative difference of a loss, largest difference of an update in learning rates)."""
    losses = ("loss", "dino_global", "dino_local", "ibot", "koleo", "adjacent")
    worst_loss = max(abs(a[k] - b[k]) / abs(a[k]) for k in (f"metric/{n}" for n in losses))
    lr = float(a["metric/lr"])
    worst_update = 0.0
    for name in (k.removeprefix("mu/") for k in a if k.startswith("mu/")):
        counts = (
            np.abs(a[f"mu/{name}"]) / 0.1 > 1e-7
        )  # below, Adam's first step is the sign of rounding noise
        error = np.abs(a[f"student/{name}"] - b[f"student/{name}"])[counts] / lr
        worst_update = max(worst_update, float(error.max(initial=0)))
    return float(worst_loss), worst_update
