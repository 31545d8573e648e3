"""Files -> shards + index: list, scan headers, plan, write shards in worker processes, merge.

The output folder gets its first file when every shard is finished, and prep.json last: a folder with
prep.json is complete, one without is built again. Everything that knows a path lies in DIR.local/ beside it.
"""

import importlib
import json
import logging
import multiprocessing
import pkgutil
import platform
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import cv2
from tqdm import tqdm

from data_prep import merge, plan, sources
from data_prep.header import Header, Reject
from data_prep.identity import hash_id, load_key
from data_prep.plan import Listing, Row, count_by, reject_line
from data_prep.read import scan
from data_prep.shards import Prepared, Settings, prepare, write_shard
from mammodino_jax.data import records
from mammodino_jax.errors import UserError, suggest

__all__ = ["BuildOptions", "Prepared", "Settings", "build", "prepare"]

log = logging.getLogger("data_prep")
_SCAN_CHUNK = 64


@dataclass(frozen=True)
class BuildOptions:
    """Everything of a build but the pixels' recipe."""

    inputs: tuple[Path, ...]
    output: Path
    source: str = "folder"
    dataset: str = ""  # its name in the index and in the ids; empty: the source's name
    workers: int = 1
    seed: int = 0
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test where the source gives none
    key: str | None = None
    dry_run: bool = False
    settings: Settings = field(default_factory=Settings)


def build(options: BuildOptions) -> dict:
    """Build a data set.

    Returns:
      Counts: {"inputs", "records", "rejects", "train", "val", "test"}; and "already_built" where
      nothing was done.

    Raises:
      UserError: an input is missing or empty, nothing in it is usable, or the output is of other settings.
    """
    local = options.output.with_name(options.output.name + ".local")
    listing = _source(options.source).list_files([Path(p) for p in options.inputs])
    dataset = options.dataset or options.source
    key = load_key(options.key, options.output)
    prep = _describe(options, dataset, listing, key)
    if _already_built(options.output, prep):
        return prep["counts"] | {"already_built": True}

    with _pool(options.workers) as run:
        headers, rejects = _scan_headers(listing.rows, options.settings.kind, run)
        files = [plan.identify(number, listing.rows[number], header) for number, header in headers.items()]
        planned, repeats = plan.drop_repeats(files)
        rejects += repeats
        plan.assign_splits(planned, options.split, options.seed)
        shards = plan.make_shards(planned, options.seed)
        if options.dry_run:
            log.info("%d files: %s", len(planned), count_by(p.header.kind for p in planned))
            log.info("shards: %s", ", ".join(f"{len(chunks)} {split}" for split, chunks in shards.items()))
            sizes = {s: sum(len(p.header.frames) for chunk in shards[s] for p in chunk) for s in shards}
            return _counts(listing.rows, rejects, sizes)

        parts = local / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        chunks = {parts / f"{s}-{i:05d}": chunk for s in shards for i, chunk in enumerate(shards[s])}
        recipe = repeat(options.settings), repeat(dataset), repeat(key)
        with tqdm(total=len(planned), desc="images", unit="file", mininterval=1) as bar:
            for files in run(write_shard, chunks, chunks.values(), *recipe):
                bar.update(files)

    results = {part: json.loads(Path(f"{part}.json").read_text()) for part in chunks}
    rejects += [reject for result in results.values() for reject in result["rejects"]]
    rejects.sort(key=lambda reject: reject["number"])
    merge.write_lines(local / "rejects.jsonl", rejects)
    for reject in rejects:
        log.warning("input %d rejected: %s", reject["number"], reject["code"])
    by_number = {p.number: p for p in planned}
    index = merge.index_rows(results, by_number)
    if not index:
        shutil.rmtree(parts)
        raise UserError(
            f"none of {len(listing.rows)} input files is usable ({count_by(r['code'] for r in rejects)}); "
            f"reasons are in {local / 'rejects.jsonl'}"
        )
    sizes = {split: sum(row["split"] == split for row in index) for split in records.SPLITS}
    prep["counts"] = _counts(listing.rows, rejects, sizes)
    prep["decoder_fallbacks"] = sum("decoder_fallback" in row["flags"] for row in index)
    merge.write_lines(local / "manifest.jsonl", merge.manifest(index, listing.rows))
    merge.finish(options.output, results, index, by_number, listing, prep)
    shutil.rmtree(parts)
    return prep["counts"]


def _source(name: str):
    known = sorted(m.name for m in pkgutil.iter_modules(sources.__path__))
    if name not in known:
        raise UserError(f"unknown source {name}; there are: {', '.join(known)}.{suggest(name, known)}")
    return importlib.import_module(f"data_prep.sources.{name}")


def _describe(options: BuildOptions, dataset: str, listing: Listing, key: bytes) -> dict:
    """prep.json without its counts; equal content means that a build would give the same bytes."""
    # Sizes in place of paths: the input folder may move.
    listed = [vars(row) | {"path": row.path.stat().st_size} for row in listing.rows]
    packages = ("numpy", "pydicom", "imagecodecs", "array-record", "tensorflow-datasets")
    return {
        "schema_version": records.SCHEMA_VERSION,
        "settings": asdict(options.settings)
        | {"source": options.source, "dataset": dataset, "seed": options.seed, "split": list(options.split)},
        "inputs": hash_id(key, dataset, "inputs", repr((listed, listing.labels))),
        "terms": {dataset: listing.terms},
        "versions": {"opencv": cv2.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def _already_built(output: Path, prep: dict) -> bool:
    """True where `output` is complete and of the same settings and inputs.

    Raises:
      UserError: it is complete but differs, or is a folder that is not ours.
    """
    if not (output / "prep.json").is_file():
        foreign = [p for p in output.iterdir() if not merge.is_ours(p.name)] if output.is_dir() else []
        if foreign or (output.exists() and not output.is_dir()):
            raise UserError(f"output {output} is not empty and no data set of ours; give a new folder")
        return False
    built = records.read_prep(output)
    old, new, changed = built["settings"], prep["settings"], ""
    if built["inputs"] != prep["inputs"]:
        changed = "inputs (files, sizes, tables, key)"
    if name := next((name for name in new if old.get(name) != new[name]), None):
        changed = f"{name}: {old.get(name)} there, {new[name]} now"
    if changed:
        raise UserError(
            f"{output} is already built with other {changed}; give a new output folder or delete it"
        )
    prep["counts"] = built["counts"]
    return True


def _counts(rows: list[Row], rejects: list[dict], splits: dict[str, int]) -> dict:
    return {"inputs": len(rows), "records": sum(splits.values()), "rejects": len(rejects), **splits}


def _scan_headers(rows: list[Row], kind: str, run: Callable) -> tuple[dict[int, Header], list[dict]]:
    """Headers of the usable files by number, and the rejects."""
    found: list[Header | Reject] = []
    chunks = [[row.path for row in rows[i : i + _SCAN_CHUNK]] for i in range(0, len(rows), _SCAN_CHUNK)]
    with tqdm(total=len(rows), desc="headers", unit="file", mininterval=1) as bar:
        for part in run(_scan_chunk, chunks, repeat(kind)):
            found += part
            bar.update(len(part))
    headers = {number: header for number, header in enumerate(found) if isinstance(header, Header)}
    return headers, [reject_line(n, rows[n], found[n]) for n in range(len(rows)) if n not in headers]


def _scan_chunk(paths: list[Path], kind: str) -> list[Header | Reject]:
    found = []
    for path in paths:
        try:
            found.append(replace(scan(path, kind), voi={}))  # look-up tables stay in the worker
        except Reject as reject:
            found.append(Reject(*reject.args))  # without its traceback, which would keep the file's header
    return found


@contextmanager
def _pool(workers: int) -> Iterator[Callable]:
    """Yield `map`, over processes if there are several workers: results in order, whoever is done first.

    A worker that dies (out of memory, killed) ends the build with an error.
    """
    if workers <= 1:
        yield map
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield executor.map
    except BrokenProcessPool as error:
        message = "a worker process died (out of memory?); nothing was built, try fewer --workers"
        raise UserError(message) from error
    finally:
        executor.shutdown(cancel_futures=True)
