"""The mini-MIAS benchmark on a few real films: build, folds, dense probe, cache. Twin of acceptance line 3."""

import json
import subprocess
import sys
from pathlib import Path

import minimias
import pytest

from mammodino_jax.evaluate import __main__ as evaluate

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_twin_of_line_3(shared, tmp_path, monkeypatch):
    source = minimias.write_source(shared, tmp_path / "mias", films=40)
    subprocess.run(
        [sys.executable, "-m", "data_prep", "build", "--source", "mias", "--input", source, "--output",
         tmp_path / "data", "--key", tmp_path / "key", "--long-side", "280", "--workers", "2"],
        cwd=REPO, check=True, capture_output=True,
    )  # fmt: skip

    def run(output: str) -> dict:
        evaluate.main(
            ["--encoder", "random:nano", "--data", str(tmp_path / "data"), "--benchmark", "minimias", "--folds", "3",
             "--repeats", "2", "--long-side", "98", "196", "--dense", "--shortcuts", "--draws", "1000", "--cache",
             str(tmp_path / "cache"), "--patches", str(tmp_path / "patches"), "--output", str(tmp_path / output)]
        )  # fmt: skip
        found = json.loads((tmp_path / output / "results.json").read_text())
        del found["command"]  # names the output folder
        return found

    first = run("first")
    monkeypatch.setattr("mammodino_jax.encoder.Encoder.__call__", None)  # the second run encodes nothing
    assert run("again") == first
    assert len(list((tmp_path / "patches").iterdir())) >= 2 * 20  # kept for other runs, at both sizes
    assert [t["task"] for t in first["tasks"]][:2] == ["density (fatty, glandular, dense)", "abnormality"]
    density = {(r["features"], r["probe"]): r["metrics"]["auc"] for r in first["tasks"][0]["rows"]}
    assert density["hand-made @ 196", "linear"]["value"] > density["majority class", "none"]["value"] == 0.5
    dense = {row["features"]: row for row in first["dense"]["rows"]}
    names = ("grey level of patches", "random:nano")
    assert set(dense) == {f"{name} @ {side}" for name in names for side in (98, 196)}
    assert all(0 < row["supervised_rank"]["value"] <= 1 for row in dense.values())
    assert (tmp_path / "first/page.html").stat().st_size > 50_000
