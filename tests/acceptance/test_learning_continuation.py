"""Acceptance of the learning algorithm, line 7: what continuing from DINOv2 ViT-S/14 does on mini-MIAS.

Five patient-grouped folds; pretraining sees the four training folds only, probes are tested on the fifth. On a CPU
the crops are small and the steps few: the line reports what happens, whatever it is. Needs the films and weights in
MAMMODINO_SHARED or ../shared. MAMMODINO_SEEDS="0 1 2" repeats everything with other seeds.
"""

import csv
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from make_dataset import write_dataset

from mammodino_jax import metrics
from mammodino_jax.data.index import open_split
from mammodino_jax.encoder import load_encoder
from mammodino_jax.evaluate import probes
from mammodino_jax.evaluate.baselines import extractor
from mammodino_jax.evaluate.features import encoder_extractor, record_features, untrained
from mammodino_jax.evaluate.items import group, read_rows
from mammodino_jax.evaluate.metrics import summarise
from mammodino_jax.train import train

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3 * 3600)]
REPO = Path(__file__).resolve().parents[2]
GPU = jax.default_backend() != "cpu"
LONG_SIDE = 518 if GPU else 196  # of the whole images that are probed
SIZES = dict(global_size=518, local_size=98, local_number=8) if GPU else dict(global_size=70, local_size=42, local_number=2)  # fmt: skip
BATCH, STEPS, FREEZE, THAW = (32, 600, 200, 50) if GPU else (16, 32, 12, 4)
SEEDS = [int(s) for s in os.environ.get("MAMMODINO_SEEDS", "0").split()]
TASKS = {"density (F, G, D), macro": "density", "abnormality": "abnormal"}
TRAINED = {"naive unfreeze": ("full", False), "two-stage, plain DINOv2 (box)": ("dinov2_box", True),
           "two-stage, DINO-M + iBOT-M": ("full", True)}  # fmt: skip


def build_films(shared: Path, folder: Path) -> Path:
    """All 238 films as box records; labels from the table beside them."""
    source = folder / "films"
    source.mkdir()
    rows = {}
    with open(shared / "data/minimias/labels.csv") as f:
        for line in csv.DictReader(f):
            name = f"{line['image']}.png"
            row = rows.setdefault(name, {
                "file": name, "patient_id": line["patient"], "view": "MLO", "kind": "film", "pixel_mm": 0.2,
                "split": "train", "label_density": "FGD".index(line["density_FGD"]), "label_abnormal": 0,
            })  # fmt: skip
            row["label_abnormal"] = max(row["label_abnormal"], int(line["finding"] != "NORM"))
    for name in rows:
        (source / name).symlink_to(shared / "data/minimias/images" / name)
    with open(source / "labels.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())
    subprocess.run(
        [sys.executable, "-m", "data_prep", "build", "--source", "folder", "--input", str(source), "--output",
         str(folder / "all"), "--long-side", "518", "--key", str(folder / "key"), "--workers", "2"],
        cwd=REPO, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "all"


def training_folds(everything: Path, patients: set, folder: Path) -> Path:
    """A data set of the records of some patients only."""
    shards, _ = open_split(everything, "train")
    index = pq.read_table(everything / "index.parquet").to_pylist()
    items = [(shards.read(i), row) for i, row in enumerate(index) if row["patient_id"] in patients]
    return write_dataset(folder, items, settings={"box": "tissue"})


def recipe(name: str, two_stages: bool, weights: str, data: Path, seed: int):
    """The `continue` recipe with an ablation's crops and masks, in the sizes of this test."""
    c = importlib.import_module("configs.continue").get_config(weights)
    terms = importlib.import_module("configs.ablation").get_config(f"{name},base=nano")
    crops = terms.crops.to_dict()
    c.crops.update({k: v for k, v in crops.items() if "coverage" in k and v is not None}, **SIZES)
    c.mask.update(terms.mask.to_dict())
    c.data.box, c.pairs.mode = terms.data.box, "none"
    c.seed, c.steps, c.batch_size, c.dbt_rows = seed, STEPS, BATCH, 0
    c.data.update(sources=((str(data), "train", ("film",), 1.0),), workers=0)
    c.model.update(dim=384, heads=6, drop_path=0.0, remat="none", dtype="bfloat16" if GPU else "float32")
    c.head.update(prototypes=1024, bottleneck=64, hidden=512, separate_ibot=False)
    c.loss.drop_path_group = 0
    c.init.update(freeze_steps=FREEZE if two_stages else 0, unfreeze_steps=THAW if two_stages else 0)
    c.optim.update(
        base_lr=2e-3,  # 2.5e-4 at this batch: few steps must do
        warmup_steps=4, freeze_last_layer_steps=0, warmup_teacher_temp_steps=STEPS // 2,
        momentum=0.96, final_momentum=0.99,  # a short run needs a fast teacher
    )  # fmt: skip
    c.run.update(log_every=1, checkpoint_every=STEPS, diagnose_every=0)
    return c


def score(features, items, folds, label: str) -> dict[str, dict]:
    """{probe: summary} of features, one array for all folds or one a fold."""
    y, out = items.label(label), {}
    for probe in ("kNN", "linear"):
        tested = []
        for number, fold in enumerate(folds):
            x = features[number] if isinstance(features, list) else features
            tested += probes.run(probes.PROBES[probe], x, y, items.patient, [fold], y.max() + 1)[0]
        out[probe] = summarise(tested, 2000, 0, ("auc",))["auc"]
    return out


def whole(rows, read) -> np.ndarray:
    """All features of every film side by side."""
    return np.concatenate(list(record_features(rows, read, LONG_SIDE).values()), axis=1)


def run_line(shared: Path, folder: Path, seed: int, count: int = 5) -> dict[str, dict]:
    """Features of every row of the table, probed: {row: {task: {probe: summary}}}."""
    weights = f"hub:{shared / 'weights/dinov2_vits14_hub_fp16.safetensors'}"
    everything = build_films(shared, folder)
    rows = read_rows([everything])
    items = group(rows)
    joint = items.label("density") * 2 + items.label("abnormal")
    folds = probes.cross_folds(joint, items.patient, count, 0, "mini-MIAS")
    start = load_encoder(weights)
    readers = {
        "hand-made": extractor("hand-made", 14),
        "random init": encoder_extractor(untrained(start, seed)),
        "frozen start (DINOv2 ViT-S/14)": encoder_extractor(start),
    }
    features = {name: whole(rows, read) for name, read in readers.items()}
    for name, (terms, two_stages) in TRAINED.items():
        features[name] = []
        for number, fold in enumerate(folds):
            inside = set(items.patient[np.concatenate([fold.train, fold.val])])
            assert not inside & set(items.patient[fold.test])
            data = folder / f"fold{number}"
            data = data if data.exists() else training_folds(everything, inside, data)
            workdir, began = folder / f"{terms}-{two_stages}-{number}", time.perf_counter()
            train(recipe(terms, two_stages, weights, data, seed), workdir)
            rows = metrics.read(workdir / "metrics.jsonl")
            assert len(rows) == STEPS and not any(r["bad"] for r in rows)
            features[name].append(whole(rows, encoder_extractor(load_encoder(str(workdir)))))
            print(f"   ({name}, fold {number}: loss {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f}, "
                  f"{time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
    return {
        name: {task: score(x, items, folds, label) for task, label in TASKS.items()}
        for name, x in features.items()
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_line_07_continuation(shared, tmp_path, seed):
    if not (shared / "weights").is_dir():
        pytest.skip("no weights here")
    print(f"\n7. seed {seed}, {jax.devices()[0].device_kind}: {STEPS} steps of {BATCH} films ({FREEZE} frozen, {THAW} "
          f"thawing), crops {SIZES}, probed at {LONG_SIDE} px", flush=True)  # fmt: skip
    table = run_line(shared, tmp_path, seed)
    print("   | features | task | linear AUC [95 %] | kNN AUC [95 %] |")
    for name, tasks in table.items():
        for task, by_probe in tasks.items():
            cells = [
                f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]"
                for s in (by_probe["linear"], by_probe["kNN"])
            ]
            print(f"   | {name} | {task} | {' | '.join(cells)} |")
            assert all(np.isfinite(s["value"]) for s in by_probe.values())
