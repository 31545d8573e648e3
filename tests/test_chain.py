"""The whole way through by its commands, small: phantoms, shards, pretraining, export, probes, report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import nano
from data_prep.phantom import write_phantoms
from mammodino_jax import metrics

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_from_phantoms_to_report(tmp_path):
    def run(*command):
        arguments = [sys.executable, *map(str, command)]
        done = subprocess.run(
            arguments, cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr[-3000:])
        return done.stdout

    dicom, data, workdir, encoder = (tmp_path / n for n in ("dicom", "data", "run", "encoder"))
    write_phantoms(dicom, patients=18, seed=0, coarsen=4)
    build = (
        "-m",
        "data_prep",
        "build",
        "--source",
        "folder",
        "--input",
        dicom,
        "--output",
        data,
        "--long-side",
        128,
    )
    run(*build, "--split", "0.5,0.2,0.3", "--key", tmp_path / "key")
    assert "already built" in run(*build, "--split", "0.5,0.2,0.3", "--key", tmp_path / "key")

    c = nano.get_config(str(data))
    c.batch_size, c.dbt_rows, c.steps = 8, 2, 30
    c.crops.update(global_size=42, local_size=28, local_number=2)
    c.model.update(dim=32, depth=2, heads=2)
    c.head.update(prototypes=64, bottleneck=16, hidden=32)
    c.optim.update(warmup_steps=3, freeze_last_layer_steps=1)
    config = tmp_path / "recipe.py"
    config.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n"
        f"VALUES = json.loads('''{json.dumps(c.to_dict())}''')\n\ndef get_config():\n    return ConfigDict(VALUES)\n"
    )
    run("main.py", f"--config={config}", f"--workdir={workdir}")
    rows = metrics.read(workdir / "metrics.jsonl")
    terms = [r["dino_global"] + r["dino_local"] + r["ibot"] for r in rows]
    assert sum(terms[-6:]) < sum(terms[:6]) and not any(r["bad"] for r in rows)
    assert all(r["data/global_fallback"] <= 0.1 for r in rows)

    run("-m", "mammodino_jax.export", "--workdir", workdir, "--format", "hf", "--output", encoder)
    run("-m", "mammodino_jax.evaluate", "--encoder", encoder, "--data", data, "--benchmark", "phantom",
        "--output", tmp_path / "results", "--long-side", 84, "--folds", 3, "--transductive",
        "--cache", tmp_path / "cache")  # fmt: skip
    run("-m", "mammodino_jax.report", "--workdir", workdir, "--data", data, "--results", tmp_path / "results",
        "--export", encoder, "--output", tmp_path / "report.html")  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert (
        "synthetic" in page.lower()
        and page.count("<img") >= 5
        and "http://" not in page.replace("http://www.w3.org", "")
    )
