"""Files -> shards + index: list, scan headers, plan, write shards in worker processes, merge.

The output folder gets its first file when every shard is finished, and prep.json last: a folder with
prep.json is complete, one without is built again. Everything that knows a path lies in DIR.local/ beside it.
"""

import functools
import importlib
import json
import logging
import multiprocessing
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from data_prep import merge, sources
from data_prep.header import Header, Reject
from data_prep.identity import hash_id, key_path, load_key
from data_prep.plan import Planned, Row, assign_splits, count_by, drop_repeats, identify, make_shards
from data_prep.read import scan
from data_prep.shards import Item, Prepared, Settings, prepare, write_shard
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
    key = load_key(key_path(options.key), options.output)
    prep = _describe(options, dataset, listing, key)
    if _already_built(options.output, prep):
        return prep["counts"] | {"already_built": True}

    with _pool(options.workers) as run:
        headers, rejects = _scan_headers(listing.rows, options.settings.kind, run)
        planned, repeats = drop_repeats([identify(n, listing.rows[n], h) for n, h in headers.items()])
        rejects += [_reject(p.number, p.row, code, detail) for p, code, detail in repeats]
        assign_splits(planned, options.split, options.seed)
        shards = make_shards(planned, options.seed)
        if options.dry_run:
            log.info("%d files: %s", len(planned), count_by(p.header.kind for p in planned))
            log.info("shards: %s", ", ".join(f"{len(chunks)} {split}" for split, chunks in shards.items()))
            sizes = {s: sum(len(p.header.frames) for chunk in shards[s] for p in chunk) for s in shards}
            return _counts(listing.rows, rejects, sizes)

        parts = local / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        tasks = [(s, parts / f"{s}-{i:05d}", chunk) for s in shards for i, chunk in enumerate(shards[s])]
        _write_shards(tasks, options.settings, dataset, key, len(planned), run)

    results = {(split, part): json.loads(Path(f"{part}.json").read_text()) for split, part, _ in tasks}
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


def _describe(options: BuildOptions, dataset: str, listing, key: bytes) -> dict:
    """prep.json without its counts; equal content means that a build would give the same bytes."""
    names = "\n".join(
        f"{row.name}\t{row.path.stat().st_size}\t{row.labels}\t{row.split}" for row in listing.rows
    )
    return {
        "schema_version": records.SCHEMA_VERSION,
        "settings": asdict(options.settings)
        | {"source": options.source, "dataset": dataset, "seed": options.seed, "split": list(options.split)},
        "inputs": hash_id(key, dataset, "inputs", names),  # tells whether files came or went
        "terms": {dataset: listing.terms},
        "versions": merge.versions(),
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
    for what, old, new in (
        *((name, built["settings"].get(name), value) for name, value in prep["settings"].items()),
        ("inputs (files, sizes, labels, key)", built["inputs"], prep["inputs"]),
    ):
        if json.loads(json.dumps(new)) != old:
            shown = "" if what.startswith("inputs") else f": {old} there, {new} now"
            raise UserError(
                f"{output} is already built with other {what}{shown}; give a new output folder or delete it"
            )
    prep["counts"] = built["counts"]
    return True


def _counts(rows: list[Row], rejects: list[dict], splits: dict[str, int]) -> dict:
    return {"inputs": len(rows), "records": sum(splits.values()), "rejects": len(rejects), **splits}


def _reject(number: int, row: Row, code: str, detail: str) -> dict:
    return {"number": number, "path": str(row.path), "code": code, "detail": detail}


def _scan_headers(rows: list[Row], kind: str, run: Callable) -> tuple[dict[int, Header], list[dict]]:
    """Headers of the usable files by number, and the rejects."""
    headers, rejects = {}, []
    chunks = [
        [(n, rows[n].path) for n in range(i, min(i + _SCAN_CHUNK, len(rows)))]
        for i in range(0, len(rows), _SCAN_CHUNK)
    ]
    with tqdm(total=len(rows), desc="headers", unit="file", mininterval=1) as bar:
        for found in run(_scan_chunk, [(chunk, kind) for chunk in chunks], bar, False):
            for number, header, code, detail in found:
                if header is None:
                    rejects.append(_reject(number, rows[number], code, detail))
                else:
                    headers[number] = header
    return dict(sorted(headers.items())), rejects


def _scan_chunk(chunk: list[tuple[int, Path]], kind: str) -> list[tuple]:
    found = []
    for number, path in chunk:
        try:
            found.append(
                (number, replace(scan(path, kind), voi={}), "", "")
            )  # look-up tables stay in the worker
        except Reject as reject:
            found.append((number, None, reject.code, reject.detail))
    return found


def _write_shards(
    tasks: list[tuple], settings: Settings, dataset: str, key: bytes, files: int, run: Callable
) -> None:
    calls = [
        (part, [_item(p, dataset, key) for p in chunk], settings, dataset, key) for _, part, chunk in tasks
    ]
    with tqdm(total=files, desc="images", unit="file", mininterval=1) as bar:
        for _ in run(write_shard, calls, bar, True):
            pass


def _item(p: Planned, dataset: str, key: bytes) -> Item:
    return Item(
        number=p.number, path=str(p.row.path), original=p.image,
        patient_id=hash_id(key, dataset, "patient", p.patient),
        study_id=hash_id(key, dataset, "study", p.study),
        laterality=p.row.laterality, view=p.row.view,
    )  # fmt: skip


_counter = None  # in a worker: files finished so far, shared with the parent's progress bar


def _start_worker(counter) -> None:
    global _counter
    _counter = counter


def _call(function: Callable, arguments: tuple, counts: bool):
    return function(*arguments, counter=_counter) if counts else function(*arguments)


@contextmanager
def _pool(workers: int) -> Iterator[Callable]:
    """Yield run(function, calls, bar, counts): an iterator of results, in no fixed order.

    One worker runs in this process. A worker that dies (out of memory, killed) ends the build with an error.
    """
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    if workers <= 1:
        _start_worker(counter)
        yield functools.partial(_run_here, counter)
        return
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as executor:
        try:
            yield functools.partial(_run_pool, executor, counter)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (out of memory?); nothing was built, try fewer --workers"
            ) from error
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _run_here(counter, function: Callable, calls: list[tuple], bar: tqdm, counts: bool) -> Iterator:
    for arguments in calls:
        result = _call(function, arguments, counts)
        bar.update(counter.value - bar.n if counts else len(result))
        yield result


def _run_pool(executor, counter, function: Callable, calls: list[tuple], bar: tqdm, counts: bool) -> Iterator:
    pending = {executor.submit(_call, function, arguments, counts) for arguments in calls}
    while pending:
        done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if not counts:
                bar.update(len(result))
            yield result
        if counts:
            bar.update(counter.value - bar.n)
