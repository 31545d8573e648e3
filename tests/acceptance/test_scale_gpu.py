"""Acceptance of scale and speed, line 8: the train step on one GPU, beside PyTorch. Prints the tables.

    python -m pytest -s -m accept tests/acceptance/test_scale_gpu.py

Four runs of up to 40 minutes, and where the time goes; on a machine lent for less, take single recipes with
`python -m benchmarks.train_step`, which keeps what it has measured. Skips where JAX finds no GPU. Scaled-down twins on the
CPU: tests/benchmarks/test_train_step.py, test_parts.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.accept, pytest.mark.timeout(4 * 3600)]
ROOT = Path(__file__).parents[2]
ALL = "none,attention,dots,block"
RUNS = {  # recipes, images a device, recomputation; the first is what line 8 asks of
    "vitb14_518": ("vitb14_518", "16,32", ALL),
    "others at 518": ("vits14_518,vitl14_518", "16", "none,block"),
    "vitb14_224": ("vitb14_224", "64,128", "none,block"),
    "others at 224": ("vits14_224,vitl14_224", "64", "none,block"),
}


def run(*command: str) -> str:
    """Run Python outside the tests' settings (conftest.py asks for the CPU)."""
    ours = ("JAX_PLATFORMS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    # asked in a process of its own: the first to find a GPU takes its memory
    if run("-c", "import jax; print(jax.default_backend())").strip() != "gpu":
        pytest.skip("no GPU is here (jax.default_backend() is not gpu): line 8 is not measured")
    folder, found = tmp_path_factory.mktemp("gpu"), {}
    for name, (recipes, batch, remat) in RUNS.items():
        output = folder / f"{name.replace(' ', '_')}.md"
        print(f"\n8. {name}\n")
        print(run(
            "-m", "benchmarks.train_step", "--recipes", recipes, "--batch", batch, "--remat", remat,
            "--attention", "xla,cudnn", "--peer", "torch", "--seconds", "2400", "--output", str(output),
        ))  # fmt: skip
        found[name] = json.loads(output.with_suffix(".json").read_text())
    return found


def measured(rows: list[dict], step: str) -> list[dict]:
    return [row for row in rows if row["step"] == step and "failed" not in row]


def test_line_8_mfu(rows):
    """Of full model FLOPs (no discount for drop-path, no recomputation), bf16 by the data sheet."""
    best = max(measured(rows["vitb14_518"], "ours"), key=lambda row: row["mfu"])
    assert best["mfu"] >= 0.35, f"{best}: the table of parts says where the time goes"


def test_line_8_ratio_to_pytorch(rows):
    best = {s: [r["images_per_s"] for r in measured(rows["vitb14_518"], s)] for s in ("ours", "torch")}
    assert all(best.values()), (
        "no time was left for one of the two: run benchmarks.train_step with fewer cases"
    )
    assert max(best["ours"]) >= 1.2 * max(best["torch"])


def test_line_8_tables(rows):
    """Every size, attention implementation and recomputation has a row, with figures or the reason why not."""
    for name, (recipes, batch, remat) in RUNS.items():
        cells = len(recipes.split(",")) * len(batch.split(",")) * (2 * len(remat.split(",")) + 2)
        assert len(rows[name]) == cells
        late = [row for row in rows[name] if "no time left" in row.get("failed", "")]
        assert not late, f"{len(late)} of {cells} cases of {name} were not measured: give them more --seconds"


def test_where_the_time_goes(rows):
    print(run("-m", "benchmarks.parts", "--recipe", "vitb14_518", "--batch", "16", "--dtype", "bfloat16"))
