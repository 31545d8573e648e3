"""Benchmark frozen encoders.

    python -m mammodino_jax.evaluate --encoder E --data DIR --benchmark phantom --output DIR

Writes results.json (every number, setting and version) and table.md. Rows always shown beside the encoders:
the majority class, hand-made features, and the same architecture with random weights.
"""

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mammodino_jax import __version__
from mammodino_jax.errors import UserError, run_command
from mammodino_jax.evaluate import benchmarks, probes
from mammodino_jax.evaluate.benchmarks import Benchmark, Task
from mammodino_jax.evaluate.features import (
    Items,
    encoder_features,
    extract,
    handmade_features,
    read_items,
    untrained,
)
from mammodino_jax.evaluate.metrics import summarise
from mammodino_jax.evaluate.table import markdown
from mammodino_jax.provenance import hashes

SCALE = 2  # whole images at twice the side of the training crops: near the mm per pixel of those crops


@dataclasses.dataclass(frozen=True)
class Entry:
    """Features that the table has rows of."""

    name: str
    long_side: int | None = None  # None: the majority class, which needs no features
    patch: int | None = None
    function: Callable | None = None  # (batch, mm_per_px) -> float32 [B, F]
    seen: str = "no"  # test patients or pixels in pretraining: no, yes (transductive), unknown


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mammodino_jax.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--encoder",
        nargs="+",
        action="extend",
        required=True,
        help="workdir, export, hub:FILE, timm:FILE, hf:DIR, dbt-dino:FILE or random:ARCH",
    )
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="built data sets")
    parser.add_argument("--benchmark", required=True, help=", ".join(benchmarks.BENCHMARKS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--long-side", type=int, help=f"pixels; default: {SCALE} x the training size")
    parser.add_argument("--folds", type=int, default=0, help="cross-validate over all splits, for small data")
    parser.add_argument("--transductive", action="store_true", help="allow test patients seen in pretraining")
    parser.add_argument("--draws", type=int, default=2000, help="bootstrap draws of patients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)
    if args.draws < 1000:
        raise UserError(f"--draws {args.draws} is too few for a 95 % interval; give 1000 or more")
    return args


def select(items: Items, task: Task, count: int, seed: int) -> tuple[np.ndarray, list[probes.Fold]]:
    """Places of a task's labelled items, and its folds (places among those)."""
    labels = items.labels[task.label]
    chosen = np.flatnonzero(np.isin(items.kind, task.kinds) & (labels >= 0))
    if not count:
        return chosen, probes.official_fold(items.split[chosen], task.name)
    return chosen, probes.cross_folds(labels[chosen], items.patient[chosen], count, seed, task.name)


def asked(benchmark: Benchmark, items: Items) -> tuple[list[Task], list[str]]:
    """The tasks that these data can answer, and the names of those whose kind of image is not there.

    Raises:
      UserError: a label is missing from the data, or known for no item, or has one value only.
    """
    tasks, absent = [], []
    there = ", ".join(items.labels) or "none"
    for task in benchmark.tasks:
        if task.label not in items.labels:
            raise UserError(f'task "{task.name}" needs the label "{task.label}"; labels there are: {there}')
        of_kind = np.isin(items.kind, task.kinds)
        if not of_kind.any():
            absent.append(task.name)
            continue
        values = np.unique(items.labels[task.label][of_kind])
        if (values >= 0).sum() < 2:
            raise UserError(
                f'task "{task.name}": label "{task.label}" has {(values >= 0).sum()} known values over the '
                f"{'/'.join(task.kinds)} items, two or more are needed; labels there are: {there}"
            )
        tasks.append(task)
    if not tasks:
        raise UserError(f"the data hold {', '.join(np.unique(items.kind))} items, none of the benchmark")
    return tasks, absent


def seen_in_pretraining(encoder, items: Items, tested: np.ndarray, transductive: bool) -> str:
    """Whether pretraining saw patients or pixels of tested items: no, yes, or unknown (foreign weights).

    Raises:
      UserError: it did, and `transductive` is not set.
    """
    if encoder.name.startswith("random:"):
        return "no"
    if not encoder.provenance:
        return "unknown"
    patients = hashes(items.patient[tested]) & set(encoder.provenance["patients"])
    pixels = hashes(h for i in tested for h in items.pixels[i]) & set(encoder.provenance["pixels"])
    if (patients or pixels) and not transductive:
        raise UserError(
            f"{encoder.name} saw {len(patients)} test patients and {len(pixels)} test images in pretraining; "
            "test on others, or pass --transductive to have it said in the table"
        )
    if patients or pixels:
        return "yes"
    return "unknown" if encoder.provenance.get("foreign") else "no"


def plan_entries(args, items: Items, tested: np.ndarray) -> list[Entry]:
    """The rows of the table: baselines first; the hand-made ones read the images of the first encoder."""
    from mammodino_jax.encoder import load_encoder

    entries, architectures = [Entry("majority class")], set()
    for encoder in map(load_encoder, args.encoder):
        vit, seen = encoder.vit, seen_in_pretraining(encoder, items, tested, args.transductive)
        size = (args.long_side or SCALE * vit.image_size, vit.patch_size)
        if len(entries) == 1:
            entries.append(Entry("hand-made", *size, handmade_features()))
        if vit not in architectures:
            architectures.add(vit)
            name = "random init" if len(architectures) == 1 else f"random init {len(architectures)}"
            entries.append(Entry(name, *size, encoder_features(untrained(encoder, args.seed))))
        name = encoder.name
        while name in {entry.name for entry in entries}:
            name += "'"
        entries.append(Entry(name, *size, encoder_features(encoder), seen))
    return entries


def extract_all(entries: list[Entry], args, items: Items) -> dict[str, np.ndarray]:
    """Features {name: float32 [n, F]}, one pass over the data for each image size."""
    found = {}
    for size in sorted({(e.long_side, e.patch) for e in entries if e.function}):
        functions = {e.name: e.function for e in entries if (e.long_side, e.patch) == size}
        found |= extract(args.data, items, functions, *size, args.batch_size)
    return found


def score(task: Task, entries: list[Entry], features: dict, items: Items, chosen, folds, args) -> dict:
    """Probe all entries on one task: the task's facts, and a row for each entry and probe."""
    classes, label = np.unique(items.labels[task.label][chosen], return_inverse=True)
    patient, rows = items.patient[chosen], []
    pixel_mm, long_px = items.pixel_mm[chosen], items.long_px[chosen]
    for entry in entries:
        x = features[entry.name][chosen] if entry.function else None
        mm = None
        if entry.function and np.isfinite(pixel_mm).any():
            mm = float(np.nanmedian(pixel_mm * long_px) / entry.long_side)
        for name, probe in (probes.PROBES if entry.function else {"none": probes.majority}).items():
            tested, chosen_settings = probes.run(probe, x, label, patient, folds, len(classes))
            facts = {"features": entry.name, "probe": name, "long_side": entry.long_side, "mm_per_px": mm}
            result = summarise(tested, args.draws, args.seed)
            rows.append({**facts, "seen": entry.seen, **result, "chosen": chosen_settings})
    test = np.concatenate([f.test for f in folds])
    names = dict(enumerate(items.class_names.get(task.label, [])))
    counts = np.bincount(label[test], minlength=len(classes)).tolist()
    return {
        "task": task.name,
        "label": task.label,
        "kinds": task.kinds,
        "classes": classes.tolist(),
        "folds": len(folds),
        "train_items": int(np.mean([len(f.train) for f in folds])),
        "test_items": len(test),
        "test_patients": len(np.unique(patient[test])),
        "test_items_by_class": {names.get(c, str(c)): n for c, n in zip(classes, counts, strict=True)},
        "rows": rows,
    }


def _facts(args, items: Items, benchmark: Benchmark, absent: list[str]) -> dict:
    import jax
    import sklearn

    splits = {s: len(np.unique(items.patient[items.split == s])) for s in np.unique(items.split)}
    kinds = {k: int((items.kind == k).sum()) for k in np.unique(items.kind)}
    return {
        "benchmark": args.benchmark, "title": benchmark.title, "note": benchmark.note, "absent_tasks": absent,
        "settings": {
            "encoders": args.encoder, "data": [str(d) for d in args.data], "long_side": args.long_side,
            "folds": args.folds, "transductive": args.transductive, "draws": args.draws, "seed": args.seed,
            "features": "CLS beside the tissue-weighted mean of patch tokens; mean over a volume's slices",
            "probes": {"kNN": {"k": probes.NEIGHBOURS, "temperature": probes.TEMPERATURE},
                       "linear": {"C": probes.STRENGTHS, "chosen_by": "balanced log-loss on validation"}},
            "interval": "95 %, patients resampled within folds, probes as trained",
        },
        "data": {"items_by_kind": kinds, "patients_by_split": splits, "records_left_out": items.left_out},
        "versions": {
            "mammodino_jax": __version__, "jax": jax.__version__, "scikit-learn": sklearn.__version__,
            "numpy": np.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip


def main(argv=None) -> None:
    args = parse(argv)
    benchmark = benchmarks.find(args.benchmark)
    items = read_items(args.data)
    probes.check_patients(items.patient, items.split)
    tasks, absent = asked(benchmark, items)
    selected = {task: select(items, task, args.folds, args.seed) for task in tasks}
    tested = np.unique(np.concatenate([chosen[f.test] for chosen, folds in selected.values() for f in folds]))
    entries = plan_entries(args, items, tested)
    features = extract_all(entries, args, items)
    results = _facts(args, items, benchmark, absent)
    results["tasks"] = [score(task, entries, features, items, *selected[task], args) for task in tasks]
    text = markdown(results)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (args.output / "table.md").write_text(text)
    print(text)
    print(f"results: {args.output / 'results.json'}, {args.output / 'table.md'}")


if __name__ == "__main__":
    run_command(main)
