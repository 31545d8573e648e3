"""Beside the tasks: dense and shortcut probes, likeness of slices, neighbours, the resolution sweep."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import dense, probes, shortcuts
from mammodino_jax.evaluate.items import group

CACHE_VERSION = 1  # raised where the same encoder and settings give other figures
QUERIES = 4  # images whose neighbours the page shows, of each encoder


def cached(cache: Path, what: tuple, compute: Callable[[], dict]) -> dict:
    """The JSON that `compute` returns, or what it returned before for the same `what`."""
    file = cache / f"extra-{hashlib.sha256(repr((CACHE_VERSION, *what)).encode()).hexdigest()[:32]}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".part")
        half.write_text(json.dumps(compute()))
        half.rename(file)
    return json.loads(file.read_text())


def dense_probe(args, entries: list) -> dict:
    """Lesion patches against tissue, for every encoder and the grey levels of patches.

    Args:
      args: of the command line: folds, seed, draws, batch_size, cache.

    Raises:
      UserError: no finding of the data has a place.
    """
    rows = entries[0].rows
    if not len(dense.lesions(rows).record):
        raise UserError("--dense: no finding of the data has a place (findings.parquet); leave it out")
    items = group(rows)
    located = np.isin(np.arange(len(items.first)), items.item[dense.lesions(rows).record]).astype(int)
    if args.folds:
        folds = probes.cross_folds(located, items.patient, args.folds, args.seed, "dense")
    else:
        folds = probes.official_fold(items.split, "dense")
    found: dict = {"rows": []}
    readers = [(e.name, e.rows, e.encoder, e.long_side) for e in entries if e.encoder]
    for side in dict.fromkeys(e.long_side for e in entries if e.encoder):
        first = next(e for e in entries if e.encoder and e.long_side == side)
        grey = dense.GreyPatches(first.encoder.patch_size)
        suffix = first.name[first.name.rindex(" @ ") :] if " @ " in first.name else ""
        readers.insert(0, (grey.name + suffix, first.rows, grey, side))
    ids = [rows.columns[name].tolist() for name in ("image_id", "pixel_hash")]
    parts = [[p.tolist() for p in (f.train, f.val, f.test)] for f in folds]
    for name, of, encoder, side in readers:
        key = (encoder.fingerprint, side, ids, parts, args.draws, args.seed, [str(f) for f in of.folders])
        one = cached(
            args.cache, key,
            lambda a=(of, encoder, side, items, folds): dense.run(*a, args.draws, args.seed, args.batch_size),
        )  # fmt: skip
        found["rows"] += [row | {"features": name} for row in one["rows"]]
        found["counts"] = one["counts"]
    return found


def shortcut_probes(args, entries: list, features: dict) -> dict:
    """What the features of every entry tell that no task asked: results by section of results.json."""
    joined = {}
    for e in (e for e in entries if e.extractor):
        of = features[e.name]
        joined[e.name] = np.concatenate([of[p] for p in args.parts if p in of] or list(of.values()), axis=1)
    rows = entries[0].rows
    digest = {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in joined.items()}
    ids = [rows.columns[name].tolist() for name in ("image_id", "pixel_hash")]
    key = ("shortcuts", digest, ids, args.draws, args.seed)
    encoders = {e.name: joined[e.name] for e in entries if e.encoder}
    return cached(args.cache, key, lambda: {
        "shortcuts": shortcuts.run(rows, joined, args.draws, args.seed),
        "cross_slice": shortcuts.cross_slice(rows, encoders, args.draws, args.seed),
        "retrieval": [
            {"encoder": name} | found
            for name, x in encoders.items()
            for found in shortcuts.neighbours(rows, x, QUERIES, args.seed)
        ],
    })  # fmt: skip


def sweep(tasks: list[dict]) -> dict[str, list[dict]]:
    """AUC of the last probe over the size of a pixel: {task: [{features, mm_per_px, auc, ...}]}."""
    found = {}
    for task in tasks:
        rows = [row for row in task["rows"] if row["long_side"] and row["probe"] == task["rows"][-1]["probe"]]
        found[task["task"]] = [
            {"features": row["features"].rsplit(" @ ", 1)[0], "long_side": row["long_side"],
             "mm_per_px": row["mm_per_px"], "auc": row["metrics"]["auc"]["value"],
             "low": row["metrics"]["auc"]["low"], "high": row["metrics"]["auc"]["high"]}
            for row in rows
        ]  # fmt: skip
    return found
