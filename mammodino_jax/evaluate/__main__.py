"""Benchmark frozen encoders.

    python -m mammodino_jax.evaluate --encoder E --data DIR --benchmark phantom --output DIR

Writes results.json (every number, setting and version), scores.parquet (what compare tests), table.md and
page.html. Rows always shown beside the encoders: the majority class, the outline of the breast, hand-made
features, raw pixels, and the same architecture with random weights.
"""

import argparse
import functools
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from mammodino_jax import __version__
from mammodino_jax.errors import UserError, run_command, suggest
from mammodino_jax.evaluate import benchmarks, extras, probes
from mammodino_jax.evaluate.benchmarks import Benchmark
from mammodino_jax.evaluate.entries import Entry, plan
from mammodino_jax.evaluate.features import REMEMBERED
from mammodino_jax.evaluate.html import write_page
from mammodino_jax.evaluate.items import Rows, read_rows
from mammodino_jax.evaluate.scores import NAME, write_scores
from mammodino_jax.evaluate.table import markdown
from mammodino_jax.evaluate.tasks import answer, ask

PARTS = {"cls": ("cls",), "cls+mean": ("cls", "mean")}
PROBES = (*probes.PROBES, "attentive", "finetune")
CACHE = Path.home() / ".cache" / "mammodino"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mammodino_jax.evaluate", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--encoder", nargs="+", action="extend", required=True,
        help="workdir, export, hub:FILE, timm:FILE, hf:DIR, dbt-dino:FILE, biomedclip:DIR, mammoclip:FILE or "
             "random:ARCH")  # fmt: skip
    add("--data", nargs="+", type=Path, required=True, help="built data sets")
    add("--builds", nargs="+", type=Path, default=[], help="the same files built with the presets of other "
        "encoders, which then read those; with one of preset raw our encoders get a row on it")  # fmt: skip
    add(
        "--benchmark",
        required=True,
        help=", ".join((*benchmarks.BENCHMARKS, "or labels: all that the data have")),
    )
    add("--output", type=Path, required=True)
    add("--long-side", nargs="+", type=int, help="px of the images; several: a resolution sweep. Default: "
        "what the encoder is made for (twice its training crops for DINOv2 and ours)")  # fmt: skip
    add("--tiles", action="store_true", help="cut images into squares of the training size")
    add("--features", choices=PARTS, default="cls+mean", help="CLS, or CLS beside the mean of tissue patches")
    add(
        "--aggregate",
        choices=("mean", "max"),
        default="mean",
        help="over slices, and over images of a breast",
    )
    add("--probes", default="kNN,linear", help=", ".join(PROBES))
    add("--few-labels", action="store_true", help="curves over 1, 5, 10 and 100 %% of the patients")
    add("--dense", action="store_true", help="probe lesion patches against other tissue of the same images")
    add("--shortcuts", action="store_true", help="what else features tell: patient, vendor, side, depth, ...")
    add("--folds", type=int, help="cross-validate over all splits; default: the benchmark's, mostly none")
    add("--repeats", type=int, default=1, help="of the cross-validation, with other parts each")
    add("--transductive", action="store_true", help="allow test patients seen in pretraining, and say so")
    add("--foreign-preprocessing", action="store_true", help="allow a build that an encoder was not made for")
    add("--draws", type=int, default=2000, help="bootstrap draws of patients")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=0, help="images encoded at once, or differentiated at once by "
        "finetune (a part of 32); default: by the memory of their attention")  # fmt: skip
    add(
        "--cache", type=Path, default=CACHE, help="features and scores of earlier runs (default: %(default)s)"
    )
    add("--patches", type=Path, metavar="DIR", help="keep patch tokens here for other runs (4 MB an image "
        "of ViT-B at 1036 px); default: not beyond a run")  # fmt: skip
    add("--threads", type=int, default=1, help="of linear algebra; more help with tens of thousands of "
        "images; those of small fits wait for each other")  # fmt: skip
    args = parser.parse_args(argv)
    if args.draws < 1000:
        raise UserError(f"--draws {args.draws} is too few for a 95 % interval; give 1000 or more")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected 1 or more")
    args.probes = tuple(args.probes.split(","))
    for name in args.probes:
        if name not in PROBES:
            raise UserError(f"unknown probe {name!r}.{suggest(name, PROBES)} Known: {', '.join(PROBES)}")
    if args.batch_size < 0 or ("finetune" in args.probes and args.batch_size and 32 % args.batch_size):
        raise UserError(
            f"--batch-size {args.batch_size}: expected a number above 0, a part of 32 for finetune"
        )
    args.parts = PARTS[args.features]
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "-m", "mammodino_jax.evaluate", *map(str, words)])
    return args


def facts(args, rows: Rows, benchmark: Benchmark, absent: list[str], entries: list[Entry]) -> dict:
    """What was asked, of what data, with which encoders, settings and versions."""
    import jax
    import sklearn

    column = rows.columns
    splits = {s: len(set(column["patient_id"][column["split"] == s])) for s in sorted(set(column["split"]))}
    kinds = sorted(set(column["kind"]))
    encoders = {
        e.name: {"spec": e.spec, "kind": e.kind, "fingerprint": e.encoder.fingerprint,
                 "patch": e.encoder.patch_size, "mean": list(e.encoder.mean), "std": list(e.encoder.std),
                 "made_for": e.encoder.made_for,
                 "reads": [str(f) for f in e.rows.folders], "remarks": list(e.remarks)}
        for e in entries if e.encoder
    }  # fmt: skip
    names = ("encoder", "long_side", "tiles", "features", "aggregate", "probes", "repeats", "transductive",
             "foreign_preprocessing", "draws", "seed")  # fmt: skip
    return {
        "command": args.command,
        "benchmark": args.benchmark, "title": benchmark.title, "note": benchmark.note, "absent_tasks": absent,
        "settings": {name: getattr(args, name) for name in names} | {
            "data": [str(d) for d in args.data], "builds": [str(d) for d in args.builds], "folds": args.folds,
            "protocol": {"kNN": {"k": probes.NEIGHBOURS, "temperature": probes.TEMPERATURE},
                         "linear": {"C": probes.STRENGTHS, "chosen_by": "balanced log-loss on validation"}},
            "interval": "95 %, patients resampled, probes as trained",
        },
        "encoders": encoders,
        "data": {"records_by_kind": {k: int((column["kind"] == k).sum()) for k in kinds},
                 "patients_by_split": splits, "records_left_out": rows.left_out},
        "versions": {
            "mammodino_jax": __version__, "jax": jax.__version__, "scikit-learn": sklearn.__version__,
            "numpy": np.__version__, "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
        },
    }  # fmt: skip


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv=None) -> None:
    args = parse(argv)
    with threadpool_limits(args.threads):
        _evaluate(args)


def _evaluate(args) -> None:
    benchmark = benchmarks.find(args.benchmark)
    if args.dense and benchmark and not benchmark.dense:
        raise UserError(f"--dense: the findings of {benchmark.title} have no places; leave it out")
    rows = read_rows(args.data)
    benchmark = benchmark or benchmarks.find(args.benchmark, rows)
    probes.check_patients(rows.columns["patient_id"], rows.columns["split"])
    args.folds = benchmark.folds if args.folds is None else args.folds
    if args.repeats > 1 and not args.folds:
        raise UserError("--repeats is of a cross-validation; give --folds too, or leave it out")
    questions, absent = ask(benchmark, rows, args.folds, args.repeats, args.seed)
    tested = np.any([q.tested() for q in questions], axis=0)
    with tempfile.TemporaryDirectory(prefix="patches-", dir=_made(args.cache)) as memory:
        runs = 2 * len(args.encoder) * len(args.long_side or [0])
        kept = (args.dense or "attentive" in args.probes) and len(rows) * runs <= REMEMBERED
        entries = plan(args, rows, tested, args.patches or (Path(memory) if kept else None))
        for entry in entries:
            if entry.extractor:
                entry.features(args.cache, args.tiles)  # into the cache: in memory one at a time
        results, scored = facts(args, rows, benchmark, absent, entries), []
        if args.dense:
            results["dense"] = extras.dense_probe(args, entries)
        results["tasks"] = []
        for question in questions:
            read = functools.partial(Entry.features, cache=args.cache, tiles=args.tiles)
            task, found = answer(question, entries, read, args, benchmark.breakdown)
            results["tasks"].append(task)
            scored += [(task["task"], *of_entry) for of_entry in found]
    if args.shortcuts:
        features = {e.name: e.features(args.cache, args.tiles) for e in entries if e.extractor}
        results |= extras.shortcut_probes(args, entries, features, tested)
    if args.long_side and len(args.long_side) > 1:
        results["sweep"] = extras.sweep(results["tasks"])
    args.output.mkdir(parents=True, exist_ok=True)
    write_scores(args.output / NAME, scored)
    (args.output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    text = markdown(results)
    (args.output / "table.md").write_text(text)
    print(text)
    page = write_page(results, {tuple(key): folds for *key, folds in scored}, rows, args.output)
    print(f"results: {args.output / 'results.json'}, {args.output / 'table.md'}, {page}")


if __name__ == "__main__":
    run_command(main)
