"""Acceptance line 3 of scale and speed: the plan of the paper's recipe on TPU slices, compiled for them.

Needs libtpu (pip install .[tpu]), no TPU; each slice is compiled in a process of its own, for minutes.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.accept,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install .[tpu]"),
]


def planned(tmp_path, recipe: str, topology: str, *flags: str) -> dict:
    out = tmp_path / "plan.json"
    words = [
        sys.executable,
        "-m",
        "mammodino_jax.plan",
        f"--config=configs/{recipe}.py",
        f"--topology={topology}",
    ]
    done = subprocess.run([*words, *flags, f"--json={out}"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\n3. {recipe} on {topology} {' '.join(flags)}\n{done.stdout}")
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("topology", "images"), [("v5e:4x4", 8), ("v5e:16x16", 8), ("v6e:4x4", 16), ("v5p:4x4x4", 16)]
)
def test_vitb14_518_fits(tmp_path, topology, images):
    report = planned(tmp_path, "vitb14_518", topology, f"--images-per-chip={images}")
    assert report["fits"] and report["images_per_chip"] == images and report["dbt_rows"] > 0
    assert report["memory"]["total"] < report["hbm"]
    assert report["large_collectives"] == [] and report["warnings"] == [] and not report["unknown_loops"]


def test_vitl14_fits_with_sharded_parameters(tmp_path):
    report = planned(tmp_path, "vitl14", "v5e:16x16", "--images-per-chip=8", "--config.fsdp=16")
    assert report["fits"] and report["mesh"] == {"data": 16, "fsdp": 16}
    # parameters are gathered, not the tokens that they are applied to
    assert report["large_collectives"] == []
