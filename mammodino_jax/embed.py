"""Features of any mammogram files: python -m mammodino_jax.embed --encoder E --input PATH... --output F

Reads files and folders as `python -m data_prep build` does and writes a row an accepted image (a 2D image, or
a whole tomosynthesis volume: the mean over its slices) to F, a .parquet or .npz file: ids, kind, side, view,
flags, scale, and the features `cls` and `mean` (patch tokens weighted by the tissue they show). What knows a
path lies in F.local/ (not for sharing): manifest.jsonl (path, ids) and rejects.jsonl (path, reason code,
detail). Finished parts of a run that was killed wait there too and are not computed again.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep import merge
from data_prep.__main__ import mapping
from data_prep.build import BuildOptions, Earlier, describe, list_inputs, locked, plan_inputs
from data_prep.executors import executor
from data_prep.identity import hash_id, load_key
from data_prep.plan import Listing, Planned, count_by, reject_line
from data_prep.reject import Reject
from data_prep.settings import PRESETS, Settings
from data_prep.shards import make_records
from mammodino_jax import __version__
from mammodino_jax.data import records
from mammodino_jax.errors import UserError, run_command

# Images and slices of a part, at least: what a kill costs, and what is put into batches together.
PART = 64
BATCH = 8  # images at once on an accelerator's device: larger batches are filled less often within a part
_INDEX = (  # columns that are those of index.parquet; of a volume those of its first slice
    "patient_id", "study_id", "volume_id", "dataset", "kind", "laterality", "view", "view_modifier",
    "manufacturer", "model", "site", "slice_index", "num_slices", "pixel_mm", "pixel_mm_source", "height",
    "width", "flipped", "coverage", "window_lo", "window_hi", "mask_recipe", "pixel_hash", "flags",
    "duplicate_of",
)  # fmt: skip
SCHEMA = pa.schema([
    ("id", pa.string()),  # image_id of index.parquet; of a whole volume its volume_id
    *(records.INDEX.field(name) for name in _INDEX),
    ("mm_per_px", pa.float32()),  # of the encoder's input; null where unknown
    ("decoder", pa.string()), ("number", pa.int64()),  # place of the (first) file in the sorted inputs
    ("cls", pa.list_(pa.float32())), ("mean", pa.list_(pa.float32())),
])  # fmt: skip


def preprocessing(encoder, preset: str | None = None, foreign: bool = False) -> tuple[Settings, str]:
    """The settings to read files with, and a few words on where they come from.

    Args:
      encoder: its `made_for` gives the settings; where that is empty, the preset `mammodino`.
      preset: one of PRESETS, instead.
      foreign: take the preset although the encoder was made for another.

    Raises:
      UserError: the encoder was made for another preset, or for builds with a table of vendors (prep.json has
        only a hash of it), and not `foreign`.
    """
    from mammodino_jax.evaluate.entries import mismatch

    made_for = {f.name: encoder.made_for[f.name] for f in fields(Settings) if f.name in encoder.made_for}
    table = made_for.pop("vendor_table", "")
    if made_for.get("size"):
        made_for["size"] = tuple(made_for["size"])  # JSON has lists
    settings = Settings(preset=preset, **PRESETS[preset]) if preset else Settings(**made_for)
    differ = mismatch(made_for, asdict(settings)) + ["a table of vendors (--vendors)"] * bool(table)
    if differ and not foreign:
        raise UserError(
            f"{encoder.name} was made for other preprocessing: {'; '.join(differ)}; give the --preset "
            "that it was made for, if there is one, or pass --foreign-preprocessing"
        )
    origin = f"preset {preset}" if preset else f"that of the builds {encoder.name} was made for"
    if not preset and not made_for:
        origin = f"preset mammodino ({encoder.name} names none)"
    return settings, origin + f"; foreign to the encoder: {'; '.join(differ)}" * bool(differ)


def embed(encoder, options: BuildOptions, long_side: int = 0, batch_size: int = 0, per_slice: bool = False,
          images: Path | None = None) -> dict:  # fmt: skip
    """Write the features of files to `options.output`.

    Args:
      encoder: as in encoder.py.
      options: inputs, output, columns, workers, dataset, key and settings are used.
      long_side: of the encoder's input in pixels; 0: the encoder's own.
      batch_size: images at once; 0: as many as memory allows, at most BATCH a device, and 1 on a CPU.
      per_slice: a row a slice of a volume.
      images: folder for the encoder's inputs, as <id>.png, and slices of a volume that is one row as
        <id>-<slice index>.png. The encoder's features of an image's picture, with the picture as the whole
        canvas, are the row's.

    Returns:
      {"rows", "inputs": number of files, "parts", "kept": parts that an earlier run had finished,
      "rejects": {code: count}}

    Raises:
      UserError: bad paths, no usable file, or the output is of other inputs or settings.
    """
    import jax

    from mammodino_jax.data.eval import check_long_side
    from mammodino_jax.evaluate.features import batches_of, encoder_extractor

    output, local = options.output, merge.local_folder(options.output)
    if output.suffix not in (".parquet", ".npz"):
        raise UserError(f"--output {output}: expected a file that ends in .parquet or .npz")
    long_side = long_side or encoder.long_side
    if encoder.vit:
        check_long_side(long_side, encoder.patch_size)
    if images and images.exists() and not images.is_dir():
        raise UserError(f"--save-images {images}: expected a folder")
    listing = list_inputs(options, local, *([images] if images else []))
    dataset = options.dataset or options.source
    key = load_key(options.key, output, local)
    earlier = Earlier((), key, dataset)
    prep = describe(options, dataset, listing, key, earlier)
    times = [row.path.is_file() and row.path.stat().st_mtime_ns for row in listing.rows]
    about = {
        "encoder": encoder.name, "fingerprint": encoder.fingerprint, "long_side": long_side,
        "no_release": encoder.provenance.get("no_release", []), "per_slice": per_slice,
        "save_images": str(images.resolve()) if images else "",
        "inputs": hash_id(key, dataset, "inputs", f"{prep['inputs']} {times}"),
        "part": PART, "version": __version__,
    } | {f"preprocessing.{name}": value for name, value in prep["settings"].items()}  # fmt: skip
    with locked(output, local):
        done = _earlier_run(output, local / "embed.json", about)
        if done:
            return done | {"kept": done["parts"]}
        for folder in (local / "parts", *([images] if images else [])):
            folder.mkdir(parents=True, exist_ok=True)
        for left in local.glob("records-*"):
            shutil.rmtree(left, ignore_errors=True)
        # of its own name: worker processes that outlive a kill must not write into it
        place = tempfile.TemporaryDirectory(dir=local, prefix="records-")
        with place as folder, executor(options.workers, None) as run:
            planned, rejects = plan_inputs(listing, options, earlier, run)
            work = functools.partial(
                read_records, settings=options.settings, dataset=dataset, key=key, folder=Path(folder)
            )
            run = functools.partial(run, died=functools.partial(_crashed, folder=Path(folder)))
            fit = batches_of(encoder)
            pad = encoder.patch_size if encoder.vit else 1  # a ViT's images end in whole patches
            most = 1 if jax.default_backend() == "cpu" else BATCH * jax.local_device_count()
            extractor = replace(
                encoder_extractor(encoder), batch_size=lambda n: batch_size or min(fit(n), most)
            )
            parts = {local / f"parts/{i:05d}.parquet": part for i, part in enumerate(_parts(planned))}
            todo = {path: part for path, part in parts.items() if not path.is_file()}
            with tqdm(total=len(planned), desc="images", unit="image", mininterval=1) as bar:
                bar.update(len(planned) - sum(map(len, todo.values())))
                for path, ready in zip(todo, _ahead(run, work, list(todo.values())), strict=True):
                    features = _features(ready, extractor, long_side, images, pad, per_slice)
                    _write_part(path, ready, features, per_slice, long_side)
                    bar.update(len(ready))
        done = _finish(output, local, list(parts), rejects, listing, about)
        done |= {"inputs": len(listing.rows), "parts": len(parts)}
        merge.write_json(local / "embed.json", {"about": about, "done": done})
        shutil.rmtree(local / "parts")
    return done | {"kept": len(parts) - len(todo)}


def _earlier_run(output: Path, path: Path, about: dict) -> dict:
    """What an earlier run with this output came to, {} where it did not end. Where there was none its
    description is written."""
    if not path.is_file():
        if output.exists():
            raise UserError(f"{output} exists and was not written by embed; give another --output")
        merge.write_json(path, {"about": about, "done": {}})
        return {}
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}); to begin again delete {output} and {path.parent}"
        ) from error
    for name, value in json.loads(json.dumps(about)).items():
        if name != "encoder" and (old := earlier["about"].get(name)) != value:
            what = f"{name}: {old} there, {value} now"
            what = "inputs (files, sizes, times, tables, key)" if name == "inputs" else what
            raise UserError(
                f"{output} was begun with other {what}; give another --output, or delete it and {path.parent}"
            )
    return earlier["done"] if output.is_file() else {}


def _parts(planned: list[Planned]) -> Iterator[list[Planned]]:
    """Runs of files with at least PART images and slices together."""
    part, count = [], 0
    for p in planned:
        part.append(p)
        count += len(p.header.frames)
        if count >= PART:
            yield part
            part, count = [], 0
    if part:
        yield part


def _ahead(run, work, parts: list[list[Planned]]) -> Iterator[list[dict]]:
    """`work` on all of a part; the worker processes are at the next part meanwhile."""
    coming = run(work, parts[0]) if parts else ()
    for following in [*parts[1:], []][: len(parts)]:
        ready = list(coming)
        coming = run(work, following)
        yield ready


def read_records(p: Planned, settings: Settings, dataset: str, key: bytes, folder: Path) -> dict:
    """An image or a volume -> its records in a file of `folder`, slice after slice. Runs in a worker.

    Returns:
      {"rows": a row a slice as for index.parquet, empty where it is unusable, "path": of u8 [slices, H, W],
      "files", "rejects" and "used" as write_shard has them}
    """
    rejects, path = [], folder / f"{p.number}.u8"
    with open(path, "wb") as file:

        def store(row: dict, image: np.ndarray) -> None:
            try:
                if not row["slice_index"]:  # another copy may take over
                    file.seek(0)
                    file.truncate()
                file.write(image.tobytes())
            except OSError as error:
                raise UserError(f"cannot write to {folder.parent} ({error.strerror})") from error

        found, files = make_records(p, settings, dataset, key, rejects, store)
    used = sorted({f["number"] for f in files} - {m.number for m in p.members or [p]})
    return {"rows": [row for row, _ in found], "path": path, "files": files, "rejects": rejects, "used": used}


def _crashed(p: Planned, folder: Path) -> dict:
    """What read_records would have returned of files that kill the process that reads them."""
    rejects = [reject_line(m.number, m.row, Reject("crashed")) for m in p.members or [p]]
    return {"rows": [], "path": folder / f"{p.number}.u8", "files": [], "rejects": rejects, "used": []}


def _features(ready: list[dict], extractor, long_side: int, images: Path | None, pad: int,
              per_slice: bool) -> dict:  # fmt: skip
    """f32 {"cls", "mean": [n, D]} of all slices of a part; their pictures, padded to multiples of `pad`, go
    to `images`. Its batches are its own, so a part has the same bits however often a run was interrupted."""
    from mammodino_jax.data.eval import make_eval_batches

    slices = [(r, i) for r in ready for i in range(len(r["rows"]))]
    shapes = [(r["rows"][0]["height"], r["rows"][0]["width"]) for r, _ in slices]

    def read(place: int) -> np.ndarray:
        (r, i), (height, width) = slices[place], shapes[place]
        size = height * width
        return np.fromfile(r["path"], np.uint8, size, offset=i * size).reshape(height, width)

    found = {}
    settings = dict(long_side=long_side, patch=extractor.patch, batch_size=extractor.batch_size)
    for batch in make_eval_batches(read, shapes, **settings):
        for name, x in extractor.function(batch["image"], batch["size"], batch["tissue"], None).items():
            found.setdefault(name, np.zeros((len(slices), x.shape[1]), np.float32))
            for i, place in enumerate(batch["row"]):
                if place >= 0:
                    found[name][place] = x[i]
        for i, place in enumerate(batch["row"] if images else ()):
            if place >= 0:
                height, width = -(-batch["size"][i] // pad) * pad
                r, s = slices[place]
                row = r["rows"][s]
                whole = row["volume_id"] and not per_slice
                name = f"{row['volume_id']}-{row['slice_index']}" if whole else row["image_id"]
                if not cv2.imwrite(str(images / f"{name}.png"), batch["image"][i, :height, :width]):
                    raise UserError(f"cannot write to {images}; give another --save-images")
    return found


def _write_part(path: Path, ready: list[dict], features: dict, per_slice: bool, long_side: int) -> None:
    """Write the rows of a part; beside them, and before, what manifest and rejects need."""
    rows, said, first = [], {"rejects": [], "used": [], "files": []}, 0
    for r in ready:
        mine = {name: x[first : first + len(r["rows"])] for name, x in features.items()}
        first += len(r["rows"])
        found = _rows(r["rows"], mine, per_slice, long_side) if r["rows"] else []
        rows += found
        for file in r["files"]:
            ids = [f["id"] for f in found if len(found) == 1 or f["number"] == file["number"]]
            said["files"].append(file | {"ids": ids})
        said["rejects"] += r["rejects"]
        said["used"] += r["used"]
        r["path"].unlink(missing_ok=True)
    path.with_suffix(".json").write_text(json.dumps(said))
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _rows(rows: list[dict], features: dict[str, np.ndarray], per_slice: bool, long_side: int) -> list[dict]:
    """The rows of an image or a volume, from those of its slices."""
    if rows[0]["volume_id"] and not per_slice:
        pixels = hashlib.sha256("".join(row["pixel_hash"] for row in rows).encode()).hexdigest()[:32]
        flags = sorted({flag for row in rows for flag in row["flags"]})
        whole = {"image_id": rows[0]["volume_id"], "slice_index": None, "pixel_hash": pixels, "flags": flags}
        rows = [rows[0] | whole]
        features = {name: x.mean(axis=0, keepdims=True, dtype=np.float64) for name, x in features.items()}
    found = []
    for i, row in enumerate(rows):
        mm = row["pixel_mm"] and row["pixel_mm"] * max(row["height"], row["width"]) / long_side
        of_row = {name: x[i] for name, x in features.items()}
        found.append(row | of_row | {"id": row["image_id"], "mm_per_px": mm})
    return found


def _finish(output: Path, local: Path, parts: list[Path], rejects: list[dict], listing: Listing,
            about: dict) -> dict:  # fmt: skip
    """Finished parts -> output, manifest and rejects, part by part."""
    failed, used, seen, count = {r["number"]: r for r in rejects}, set(), {}, 0
    shared = json.dumps(about | {"save_images": bool(about["save_images"])})  # without its path
    table, schema = local / "table.tmp", SCHEMA.with_metadata({"mammodino_jax.embed": shared})
    place = SCHEMA.get_field_index("duplicate_of")
    with pq.ParquetWriter(table, schema) as writer, open(local / "manifest.jsonl", "w") as manifest:
        for path in parts:
            part = pq.read_table(path)
            columns = (part[name].to_pylist() for name in ("id", "volume_id", "pixel_hash"))
            same = []
            for name, volume, pixels in zip(*columns, strict=True):
                other, of = seen.setdefault(pixels, (name, volume))
                # as in a build: slices of one volume may be equal
                same.append(other if name != other and (volume is None or volume != of) else None)
            writer.write_table(
                part.set_column(place, SCHEMA.field(place), pa.array(same, pa.string())).cast(schema)
            )
            count += len(part)
            said = json.loads(path.with_suffix(".json").read_text())
            failed |= {r["number"]: r for r in said["rejects"]}
            used |= set(said["used"])
            for line in said["files"]:
                where = str(listing.rows[line["number"]].path.absolute())
                manifest.write(json.dumps(line | {"path": where}) + "\n")
    rejects = [failed[number] for number in sorted(failed.keys() - used)]
    merge.write_lines(local / "rejects.jsonl", rejects)
    if not count:
        raise UserError(
            f"none of {len(listing.rows)} input files is usable ({count_by(r['code'] for r in rejects)}); "
            f"reasons are in {local / 'rejects.jsonl'}"
        )
    if output.suffix == ".npz":
        _write_npz(table, count, local / "arrays.tmp")
        table.unlink()
        table = local / "arrays.tmp"
    table.replace(output)
    return {"rows": count, "rejects": dict(Counter(r["code"] for r in rejects).most_common())}


def _write_npz(table: Path, rows: int, output: Path) -> None:
    """The same as an .npz of an array a column, features as f32 [rows, D]; of these only a part is in memory.
    Unknown text is "", unknown numbers are NaN, flags are joined by commas."""
    source, npy = pq.ParquetFile(table), np.lib.format
    with zipfile.ZipFile(output, "w") as archive:
        for field in source.schema_arrow:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as file:
                if field.name not in ("cls", "mean"):
                    column = source.read([field.name])[field.name]
                    npy.write_array(file, _plain(column), allow_pickle=False)
                    continue
                for i, batch in enumerate(source.iter_batches(1024, columns=[field.name])):
                    values = batch[field.name].flatten().to_numpy().astype("<f4")
                    if i == 0:
                        header = dict(
                            descr="<f4", fortran_order=False, shape=(rows, len(values) // len(batch))
                        )
                        npy.write_array_header_1_0(file, header)
                    file.write(values.tobytes())
        about = source.schema_arrow.metadata[b"mammodino_jax.embed"].decode()
        no_release = np.array(json.loads(about)["no_release"], str)
        for name, value in {"about": np.array(about), "no_release": no_release}.items():
            with archive.open(f"{name}.npy", "w") as file:
                npy.write_array(file, value, allow_pickle=False)


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_list(column.type):
        return np.array([",".join(flags or ()) for flags in column.to_pylist()])
    if pa.types.is_string(column.type):
        return np.array([text or "" for text in column.to_pylist()])
    return column.to_numpy()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser("python -m mammodino_jax.embed", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--encoder", required=True, help="workdir, exported folder, or weights of others (see the README)")
    add("--input", required=True, nargs="+", action="extend", type=Path, metavar="PATH", dest="inputs",
        help="files and folders")  # fmt: skip
    add("--output", required=True, type=Path, metavar="F", help="F.parquet or F.npz")
    add("--preset", choices=tuple(PRESETS), help="preprocessing (default: what the encoder was made for)")
    add("--foreign-preprocessing", action="store_true", help="allow another than the encoder was made for")
    add("--long-side", type=int, default=0, metavar="PX", help="of its input (default: the encoder's own)")
    add("--batch-size", type=int, default=0, help="images at once (default: up to 8 a device, on a CPU 1)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that read files")
    add("--per-slice", action="store_true", help="a row a slice instead of a row a tomosynthesis volume")
    add("--save-images", type=Path, metavar="DIR", help="write the encoder's inputs as 8-bit PNG files, too")
    add("--columns", type=mapping, default={}, metavar="OURS=THEIRS,...",
        help="of a folder's labels.csv, as in data_prep build; without it: --input DIR/*.dcm")  # fmt: skip
    add("--dataset", default="",
        help="name in the ids (default: folder); they are those of a build where --key, --dataset, --columns "
        "and --input are equal")  # fmt: skip
    add("--key", metavar="FILE", help="key of the ids (default: ~/.config/mammodino/key)")
    args = parser.parse_args(argv)
    for name in ("long_side", "batch_size"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    from mammodino_jax.encoder import load_encoder

    encoder = load_encoder(args.encoder)
    settings, origin = preprocessing(encoder, args.preset, args.foreign_preprocessing)
    print(f"preprocessing: {origin}")
    given = {f.name: getattr(args, f.name) for f in fields(BuildOptions) if hasattr(args, f.name)}
    options = BuildOptions(**given, settings=settings)
    done = embed(encoder, options, args.long_side, args.batch_size, args.per_slice, args.save_images)
    if done["kept"]:
        print(f"{done['kept']} of {done['parts']} parts were there already")
    rejects = ", ".join(f"{n} {code}" for code, n in done["rejects"].items()) or "none"
    print(f"wrote {done['rows']} rows from {done['inputs']} files to {args.output}; rejected: {rejects}")
    if forbidding := encoder.provenance.get("no_release"):
        print(
            f"the encoder was trained on {', '.join(forbidding)}: the terms forbid publishing these features"
        )


if __name__ == "__main__":
    run_command(main)
