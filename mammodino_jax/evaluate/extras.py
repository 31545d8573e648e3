"""Beside the tasks: dense and shortcut probes, likeness of slices, neighbours, the resolution sweep."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mammodino_jax.errors import UserError
from mammodino_jax.evaluate import dense, probes, shortcuts
from mammodino_jax.evaluate.items import group

CACHE_VERSION = 2  # raised where the same encoder and settings give other figures
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


def state(rows) -> str:
    """Fingerprint of the records in use, and of all that their builds say of them: pixels, labels, places."""
    digest = hashlib.sha256(rows.source.tobytes() + rows.place.tobytes())
    for folder in rows.folders:
        for name in ("index.parquet", "findings.parquet", "prep.json"):
            found = (folder / name).read_bytes() if (folder / name).is_file() else b""
            digest.update(hashlib.sha256(found).digest())
    return digest.hexdigest()


def dense_probe(args, entries: list) -> dict:
    """Lesion patches against tissue, for every encoder and the grey levels of patches.

    All are asked about the same tissue: that of --data, or where its build has no masks of another's.

    Args:
      args: of the command line: folds, seed, draws, batch_size, cache.

    Raises:
      UserError: no finding of the data has a place.
    """
    rows = entries[0].rows
    lesions = dense.lesions(rows)
    if not len(lesions.record):
        raise UserError("--dense: no finding of the data has a place (findings.parquet); leave it out")
    items = group(rows)
    located = np.isin(np.arange(len(items.first)), items.item[lesions.record]).astype(int)
    if args.folds:
        folds = probes.cross_folds(located, items.patient, args.folds, args.seed, "dense")
    else:
        folds = probes.official_fold(items.split, "dense")
    found: dict = {"rows": []}
    reference = dense.reference_of([e.rows for e in entries])
    readers = [(e.name, e.rows, e.encoder, e.long_side, e.remarks) for e in entries if e.encoder]
    for side in dict.fromkeys(e.long_side for e in entries if e.encoder):
        first = next(e for e in entries if e.encoder and e.long_side == side)
        grey = dense.GreyPatches(first.encoder.patch_size)
        suffix = first.name[first.name.rindex(" @ ") :] if " @ " in first.name else ""
        readers.insert(0, (grey.name + suffix, first.rows, grey, side, ()))
    parts = [[p.tolist() for p in (f.train, f.val, f.test)] for f in folds]
    states = {id(of): state(of) for of in (rows, reference, *(of for _, of, *_ in readers))}
    for name, of, encoder, side, remarks in readers:
        known = [states[id(of)] for of in (rows, reference, of)]
        key = ("dense", encoder.fingerprint, side, known, parts, args.draws, args.seed)
        asked = (of, encoder, side, items, folds, args.draws, args.seed, args.batch_size, reference)
        one = cached(args.cache, key, lambda asked=asked: dense.run(*asked))
        for row in one["rows"]:
            found["rows"].append(row | {"features": name, "remarks": [*remarks, *row["remarks"]]})
        found["counts"] = one["counts"]
    return found


def shortcut_probes(args, entries: list, features: dict, tested: np.ndarray) -> dict:
    """What the features of every entry tell that no task asked: results by section of results.json.

    Args:
      args: of the command line: parts, draws, seed, cache.
      features: {name of an entry: {part: f32 [r, F]}}.
      tested: bool [r], the records that test a task. Only these are asked: an encoder may have been trained
        on the others, on slices of a volume to be alike among other things.
    """
    joined, places = {}, np.flatnonzero(tested)
    for e in (e for e in entries if e.extractor):
        of = features[e.name]
        x = np.concatenate([of[p] for p in args.parts if p in of] or list(of.values()), axis=1)
        joined[e.name] = x[places]
    rows = entries[0].rows.take(places)
    digest = {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in joined.items()}
    encoders = {e.name: joined[e.name] for e in entries if e.encoder}
    found = cached(args.cache, ("shortcuts", digest, state(rows), args.draws, args.seed), lambda: {
        "shortcuts": shortcuts.run(rows, joined, args.draws, args.seed) | {"records": len(rows)},
        "cross_slice": shortcuts.cross_slice(rows, encoders, args.draws, args.seed),
        "retrieval": [
            {"encoder": name, "query": int(places[one["query"]]), "near": places[one["near"]].tolist(),
             "cosine": one["cosine"]}
            for name, x in encoders.items()
            for one in shortcuts.neighbours(rows, x, QUERIES, args.seed)
        ],
    })  # fmt: skip
    remarks = {e.name: list(e.remarks) for e in entries}
    for row in found["shortcuts"]["rows"]:
        row["remarks"] = remarks[row["features"]]
    return found


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
