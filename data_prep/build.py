"""Files -> shards + index: list, scan headers, plan, write shards in worker processes, merge.

The output folder gets its first file when every shard is finished, and prep.json last: a folder with
prep.json is complete. Finished shards of a build that was killed wait in DIR.local/parts and are not made
again; the bytes are those of a build that was not. Everything that knows a path lies in DIR.local/.
"""

import fcntl
import functools
import importlib
import itertools
import json
import logging
import pkgutil
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import cv2
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep import merge, plan, sources, vendors
from data_prep.executors import executor
from data_prep.header import Header
from data_prep.identity import hash_id, load_key
from data_prep.plan import Listing, Planned, Row, count_by, reject_line
from data_prep.read import scan
from data_prep.reject import Reject
from data_prep.settings import Settings
from data_prep.shards import is_written, write_shard
from mammodino_jax import __version__
from mammodino_jax.data import records
from mammodino_jax.errors import UserError, suggest

__all__ = ["BuildOptions", "Settings", "build"]

log = logging.getLogger("data_prep")
_SCAN_CHUNK = 64


@dataclass(frozen=True)
class BuildOptions:
    """Everything of a build but the pixels' recipe."""

    inputs: tuple[Path, ...]
    output: Path
    source: str = "folder"
    columns: dict[str, str] = field(default_factory=dict)  # of --source folder: our column -> theirs
    dataset: str = ""  # its name in the index and in the ids; empty: the source's name
    previous: tuple[Path, ...] = ()  # earlier deliveries: their patients keep their splits
    workers: int = 1
    dask: str | None = None  # local, or the address of a scheduler
    seed: int = 0
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test where the source gives none
    key: str | None = None
    dry_run: bool = False
    settings: Settings = field(default_factory=Settings)


def build(options: BuildOptions) -> dict:
    """Build a data set; where it is built already and only labels differ, write its tables again.

    Returns:
      Counts: {"inputs", "records", "rejects", "train", "val", "test"}; and "already_built" where
      nothing was done.

    Raises:
      UserError: an input is missing or empty, nothing in it is usable, or the output is of other settings.
    """
    if not options.output.absolute().name:
        raise UserError(f"--output {options.output}: give a folder of its own")
    local = merge.local_folder(options.output)
    vendors.check(options.settings.vendor_table)
    listing = list_inputs(options, local)
    dataset = options.dataset or options.source
    key = load_key(options.key, options.output, local, make=not options.dry_run)
    earlier = Earlier(options.previous, key, dataset)
    prep = describe(options, dataset, listing, key, earlier)
    built = _already_built(options.output, prep)
    if built and built["labels"] == prep["labels"]:
        return built["counts"] | {"already_built": True}
    with executor(options.workers, options.dask) as run:
        if options.dry_run:
            return _dry_run(listing, options, earlier, run)
        with locked(options.output, local):
            options.output.mkdir(exist_ok=True)
            if options.settings.vendor_table:
                (local / "vendors.csv").write_text(options.settings.vendor_table)
            planned, rejects = plan_inputs(listing, options, earlier, run)
            if built:
                return _relabel(options.output, local, planned, listing, built | {"labels": prep["labels"]})
            chunks = _open_parts(local / "parts", prep, plan.make_shards(planned, options.seed))
            write = functools.partial(write_shard, settings=options.settings, dataset=dataset, key=key)
            _write_shards(chunks, write, run, len(rejects))
            return _merge(options.output, local, chunks, planned, rejects, listing, prep, earlier)


def _dry_run(listing: Listing, options: BuildOptions, earlier: "Earlier", run: Callable) -> dict:
    planned, rejects = plan_inputs(listing, options, earlier, run)
    shards = plan.make_shards(planned, options.seed)
    log.info("%d images and volumes: %s", len(planned), count_by(p.header.kind for p in planned))
    log.info("rejected: %s", count_by(r["code"] for r in rejects) or "none")
    log.info("shards: %s", ", ".join(f"{len(chunks)} {split}" for split, chunks in shards.items()))
    sizes = {s: sum(len(p.header.frames) for chunk in shards[s] for p in chunk) for s in shards}
    return _counts(listing.rows, rejects, sizes)


@contextmanager
def locked(output: Path, local: Path) -> Iterator[None]:
    """Make DIR.local, and let one run write there at a time: two would mix their parts."""
    try:
        local.mkdir(parents=True, exist_ok=True)
        (local / "lock").touch()
    except OSError as error:
        raise UserError(f"cannot write to {output} ({error.strerror}); give another --output") from error
    with open(local / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing {output}; wait for it") from error
        try:
            yield
        finally:
            with suppress(OSError):
                output.rmdir()  # an empty folder: the build failed


def _write_shards(chunks: dict[Path, list[Planned]], write: Callable, run: Callable, failed: int) -> None:
    """Write the parts that are not there yet."""
    todo = {part: chunk for part, chunk in chunks.items() if not is_written(part)}
    count = {part: sum(len(p.members or [p]) for p in chunk) for part, chunk in chunks.items()}
    start = sum(count.values()) - sum(count[part] for part in todo)
    with tqdm(total=sum(count.values()), initial=start, desc="images", unit="file", mininterval=1) as bar:
        for done in run(write, list(todo), list(todo.values())):
            failed += done["rejects"]
            bar.set_postfix(rejected=failed, refresh=False)
            bar.update(done["files"])


def _merge(output: Path, local: Path, chunks: dict[Path, list[Planned]], planned: list[Planned],
           rejects: list[dict], listing: Listing, prep: dict, earlier: "Earlier") -> dict:  # fmt: skip
    """Finished parts -> data set, part by part: all rows at once would not fit. Returns the counts."""
    parts, used, fallbacks, failed = {}, set(), 0, {r["number"]: r for r in rejects}
    for part in chunks:
        result = json.loads(Path(f"{part}.json").read_text())
        parts[part] = result["rows"][0]["split"] if result["rows"] else "", len(result["rows"])
        failed |= {r["number"]: r for r in result["rejects"]}
        used |= set(result["used"])
        fallbacks += sum("decoder_fallback" in row["flags"] for row in result["rows"])
    rejects = [failed[number] for number in sorted(failed.keys() - used)]
    merge.write_lines(local / "rejects.jsonl", rejects)
    for reject in rejects:
        log.warning("input %d rejected: %s", reject["number"], reject["code"])
    if fallbacks:
        log.warning("%d records: the first decoder's result was refused (flag decoder_fallback)", fallbacks)
    sizes = {s: sum(count for split, count in parts.values() if split == s) for s in records.SPLITS}
    if not sum(sizes.values()):
        shutil.rmtree(local / "parts")
        raise UserError(
            f"none of {len(listing.rows)} input files is usable ({count_by(r['code'] for r in rejects)}); "
            f"reasons are in {local / 'rejects.jsonl'}"
        )
    prep["counts"] = _counts(listing.rows, rejects, sizes)
    prep["rejects"] = dict(sorted(Counter(reject["code"] for reject in rejects).items()))
    by_number, first = _by_number(planned), dict(earlier.pixels)

    def groups() -> Iterator[list[dict]]:
        with open(local / "manifest.jsonl.tmp", "w") as manifest:
            for part in chunks:
                result = json.loads(Path(f"{part}.json").read_text())
                for line in merge.manifest(result["rows"], result["files"], listing.rows):
                    manifest.write(json.dumps(line) + "\n")
                yield merge.index_rows(result["rows"], by_number, first)
        (local / "manifest.jsonl.tmp").replace(local / "manifest.jsonl")

    merge.finish(output, parts, groups(), by_number, listing, prep)
    shutil.rmtree(local / "parts")
    return prep["counts"]


class Earlier:
    """What earlier deliveries say: the splits of their patients, and their pixels."""

    def __init__(self, folders: tuple[Path, ...], key: bytes, dataset: str):
        self.key, self.dataset, self.splits, self.pixels = key, dataset, {}, {}
        for folder in folders:
            prep = records.read_prep(folder)
            name, other = prep["settings"]["dataset"], ""
            if name != dataset:
                other = f"of --dataset {name}, this is {dataset}"
            elif prep.get("key_check") != _key_check(key):
                other = "built with another --key"
            if other:
                raise UserError(
                    f"--previous {folder} is {other}: one patient would get two ids; deliveries of one "
                    "archive need one name and one key"
                )
            columns = ["patient_id", "split", "pixel_hash", "image_id", "volume_id"]
            for batch in pq.ParquetFile(folder / "index.parquet").iter_batches(columns=columns):
                for row in batch.to_pylist():
                    self.splits.setdefault(row["patient_id"], row["split"])
                    self.pixels.setdefault(row["pixel_hash"], (row["image_id"], row["volume_id"]))

    def split(self, patient: str) -> str | None:
        return self.splits.get(hash_id(self.key, self.dataset, "patient", patient)) if self.splits else None


def _key_check(key: bytes) -> str:
    """Equal where two data sets have ids of one key."""
    return hash_id(key, "", "key check", "")


def plan_inputs(
    listing: Listing, options: BuildOptions, earlier: Earlier, run: Callable
) -> tuple[list[Planned], list[dict]]:
    """Scan headers and settle duplicates, volumes and splits. Returns what to build, and the rejects."""
    headers, rejects = _scan_headers(listing.rows, options.settings, run)
    files = [plan.identify(number, listing.rows[number], header) for number, header in headers.items()]
    planned, repeats = plan.drop_repeats(files, options.settings.for_processing == "keep")
    plan.assign_splits(planned, options.split, options.seed, earlier.split)
    for p in planned:
        for spare in p.spares:
            spare.split, spare.patient, spare.study = p.split, p.patient, p.study
    return plan.group_slices(planned), rejects + repeats


def _by_number(planned: list[Planned]) -> dict[int, Planned]:
    """Every file that may have become records, by its number. Spares have the row of what they stand in for,
    slices of a volume have the volume's labels."""
    found = {}
    for p in planned:
        found[p.number] = p
        known = {"labels": p.row.labels, "findings": p.row.findings}
        for spare in p.spares:
            found[spare.number] = replace(spare, row=replace(spare.row, **known))
        for one in (one for member in p.members for one in (member, *member.spares)):
            found[one.number] = replace(one, row=replace(one.row, labels=p.row.labels))
    return found


def _open_parts(folder: Path, prep: dict, shards: dict) -> dict[Path, list[Planned]]:
    """The parts to write. Those of an interrupted build stay if it was the same build."""
    same = hash_id(b"plan", "", "", json.dumps(prep | {"labels": None}, sort_keys=True))
    if not (folder / "plan").is_file() or (folder / "plan").read_text() != same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "plan").write_text(same)
    return {folder / f"{s}-{i:05d}": chunk for s in shards for i, chunk in enumerate(shards[s])}


def _relabel(output: Path, local: Path, planned: list[Planned], listing: Listing, prep: dict) -> dict:
    """Write index, findings and labels of a built data set again; the shards stay."""
    if not (local / "manifest.jsonl").is_file():
        raise UserError(f"{output} is built with other labels, and {local} is gone; give a new output folder")
    origin = {}
    for line in (local / "manifest.jsonl").read_text().splitlines():
        line = json.loads(line)
        for image_id, frame in zip(line["image_ids"], line["frames"], strict=True):
            origin[image_id] = {"number": line["number"], "source_frame": frame, **line["source"]}
    by_number = _by_number(planned)
    if lost := sorted({source["number"] for source in origin.values()} - by_number.keys()):
        raise UserError(
            f"{output} is built with other labels, but {len(lost)} of its files are no longer usable (the "
            f"first is input {lost[0]}); give a new output folder"
        )

    def groups() -> Iterator[list[dict]]:
        index = pq.ParquetFile(output / "index.parquet")
        for part in range(index.num_row_groups):  # one a shard: volumes are whole
            rows = [row | origin[row["image_id"]] for row in index.read_row_group(part).to_pylist()]
            plain = [{k: v for k, v in row.items() if not k.startswith("label_")} for row in rows]
            yield [row | by_number[row["number"]].row.labels for row in plain]

    merge.write_tables(output, groups(), by_number, listing, prep)
    log.info("only labels differ: index, findings and labels are written again, the shards stay")
    return prep["counts"]


def list_inputs(options: BuildOptions, *written: Path) -> Listing:
    """What the source lists, in the order of names, so that the order of --input makes no difference.

    Raises:
      UserError: bad inputs, or the output or one of the folders `written` lies in one.
    """
    source = _source(options.source)
    if options.columns and options.source != "folder":
        raise UserError(f"--columns is for --source folder; {options.source} has its own columns")
    for path, output in itertools.product(map(Path, options.inputs), (options.output, *written)):
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise UserError(f"output {output} lies in the input {path}, of which it would become a part")
    extra = (options.columns,) if options.columns else ()
    listing = source.list_files([Path(p) for p in options.inputs], *extra)
    listing.rows.sort(key=lambda row: row.name)
    return listing


def _source(name: str):
    known = sorted(m.name for m in pkgutil.iter_modules(sources.__path__))
    if name not in known:
        raise UserError(f"unknown source {name}; there are: {', '.join(known)}.{suggest(name, known)}")
    return importlib.import_module(f"data_prep.sources.{name}")


def describe(options: BuildOptions, dataset: str, listing: Listing, key: bytes, earlier: Earlier) -> dict:
    """prep.json without its counts; equal content means that a build would give the same bytes."""
    # Sizes in place of paths: the input folder may move.
    size = {row.path: row.path.stat().st_size if row.path.is_file() else None for row in listing.rows}
    listed = [vars(row) | {"path": size[row.path], "labels": 0, "findings": 0} for row in listing.rows]
    labels = [(row.labels, row.findings) for row in listing.rows]
    packages = ("numpy", "pydicom", "imagecodecs", "array-record", "tensorflow-datasets")
    settings = asdict(options.settings)
    settings |= {"source": options.source, "dataset": dataset, "seed": options.seed, "split": options.split}
    if options.settings.vendor_table:  # the user's words stay with the user: DIR.local/vendors.csv
        settings["vendor_table"] = hash_id(b"table", "", "", options.settings.vendor_table)
    before = sorted(earlier.splits.items()), sorted(earlier.pixels)
    return {
        "schema_version": records.SCHEMA_VERSION,
        "settings": json.loads(json.dumps(settings)),
        "inputs": hash_id(key, dataset, "inputs", repr((listed, before))),
        "labels": hash_id(key, dataset, "labels", repr((labels, listing.labels))),
        "terms": {dataset: listing.terms},
        "no_release": [dataset] if listing.no_release else [],
        "key_check": _key_check(key),
        "versions": {
            "mammodino_jax": __version__,
            "opencv": cv2.__version__,
            "python": platform.python_version(),
        }
        | {name: version(name) for name in packages},
    }


def _already_built(output: Path, prep: dict) -> dict | None:
    """prep.json of `output` where it is complete and of the same settings and inputs.

    Raises:
      UserError: it is complete but differs, or is a folder that is not ours.
    """
    if not (output / "prep.json").is_file():
        foreign = [p for p in output.iterdir() if not merge.is_ours(p.name)] if output.is_dir() else []
        if foreign or (output.exists() and not output.is_dir()):
            raise UserError(f"output {output} is not empty and no data set of ours; give a new folder")
        return None
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
    return built


def _counts(rows: list[Row], rejects: list[dict], splits: dict[str, int]) -> dict:
    return {"inputs": len(rows), "records": sum(splits.values()), "rejects": len(rejects), **splits}


def _scan_headers(rows: list[Row], settings: Settings, run: Callable) -> tuple[dict[int, Header], list[dict]]:
    """Headers of the usable files by number, and the rejects."""
    found: list[Header | Reject] = []
    chunks = [
        [(row.path, row.reject) for row in rows[i : i + _SCAN_CHUNK]]
        for i in range(0, len(rows), _SCAN_CHUNK)
    ]
    scan_chunk = functools.partial(_scan_chunk, settings=settings)

    def died(chunk: list) -> list[Header | Reject]:
        if len(chunk) == 1:
            return [Reject("crashed")]
        return [one for part in run(scan_chunk, [[file] for file in chunk], died=died) for one in part]

    with tqdm(total=len(rows), desc="headers", unit="file", mininterval=1) as bar:
        for part in run(scan_chunk, chunks, died=died):
            found += part
            bar.update(len(part))
    headers = {number: header for number, header in enumerate(found) if isinstance(header, Header)}
    return headers, [reject_line(n, rows[n], found[n]) for n in range(len(rows)) if n not in headers]


def _scan_chunk(files: list[tuple[Path, tuple | None]], settings: Settings) -> list[Header | Reject]:
    found = []
    for path, excluded in files:
        try:
            if excluded:
                raise Reject(*excluded)
            found.append(replace(scan(path, settings), voi=()))  # look-up tables stay in the worker
        except Reject as reject:
            found.append(Reject(*reject.args))  # without its traceback, which would keep the file's header
    return found
