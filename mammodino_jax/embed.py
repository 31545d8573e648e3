"""Features of any mammogram files: python -m mammodino_jax.embed --encoder E --input PATH... --output F

Reads files and folders as `python -m data_prep build` does and writes a row an accepted image (a 2D image, or a
whole tomosynthesis volume: the mean over its slices) to F, a .parquet or .npz file: ids, kind, side, view,
flags, scale, and the features `cls` and `mean` (patch tokens weighted by the tissue they show). What knows a
path lies in F.local/ (not for sharing): manifest.jsonl (path, ids), rejects.jsonl (path, reason code, detail).
Finished parts of a run that was killed wait there too and are not computed again.
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
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep import merge
from data_prep.build import BuildOptions, Earlier, describe, list_inputs, locked, plan_inputs
from data_prep.executors import executor
from data_prep.identity import load_key
from data_prep.plan import Planned, count_by
from data_prep.settings import PRESETS, Settings
from data_prep.shards import make_records
from mammodino_jax.data import records
from mammodino_jax.data.eval import network_input
from mammodino_jax.errors import UserError, run_command

PART = 64  # images and slices of a part, at least: what a kill costs, and what is batched together
_INDEX = (  # columns that are those of index.parquet; of a volume those of its first slice
    "patient_id", "study_id", "volume_id", "dataset", "kind", "laterality", "view", "view_modifier", "manufacturer",
    "model", "site", "slice_index", "num_slices", "pixel_mm", "pixel_mm_source", "height", "width", "flipped",
    "coverage", "window_lo", "window_hi", "mask_recipe", "pixel_hash", "flags", "duplicate_of",
)  # fmt: skip
SCHEMA = pa.schema([
    ("id", pa.string()),  # image_id of index.parquet; of a whole volume its volume_id
    *(records.INDEX.field(name) for name in _INDEX),
    ("mm_per_px", pa.float32()),  # of the encoder's input; null where unknown
    ("input_height", pa.int32()), ("input_width", pa.int32()),  # of the encoder's input, in whole patches
    ("decoder", pa.string()), ("number", pa.int64()),  # place of the (first) file in the sorted inputs
    ("cls", pa.list_(pa.float32())), ("mean", pa.list_(pa.float32())),
])  # fmt: skip
# Fields of Settings that say which files are taken, or are names only: they change no pixel.
_NO_PIXELS = ("preset", "kind", "burned_in", "for_processing")


def preprocessing(encoder, preset: str | None = None, foreign: bool = False) -> tuple[Settings, str]:
    """The settings to read files with, and a few words on where they come from.

    Args:
      encoder: its `made_for` gives the settings; where that is empty, the preset `mammodino`.
      preset: one of PRESETS, instead.
      foreign: take the preset although the encoder was made for another.

    Raises:
      UserError: the encoder was made for other settings.
    """
    made_for = {f.name: encoder.made_for[f.name] for f in fields(Settings) if f.name in encoder.made_for}
    if made_for.get("size"):
        made_for["size"] = tuple(made_for["size"])  # JSON has lists
    own = Settings(**made_for)
    # prep.json has a table of vendors as a hash only
    used = Settings(preset=preset, **PRESETS[preset]) if preset else replace(own, vendor_table="")
    other = [n for n in made_for if n not in _NO_PIXELS and getattr(own, n) != getattr(used, n)]
    if other and not foreign:
        differ = ", ".join(f"{n} {getattr(own, n)!r} there, {getattr(used, n)!r} here" for n in other)
        raise UserError(
            f"{encoder.name} was made for other preprocessing ({differ}); leave --preset out, or pass "
            "--foreign-preprocessing"
        )
    if preset:
        return used, f"preset {preset}{', foreign to the encoder' if other else ''}"
    known = (
        f"that of the builds {encoder.name} was made for{', but for the table of vendors' if other else ''}"
    )
    return used, known if made_for else f"preset mammodino ({encoder.name} names no preprocessing)"


def embed(encoder, options: BuildOptions, long_side: int = 0, batch_size: int = 0, per_slice: bool = False,
          images: Path | None = None) -> dict:  # fmt: skip
    """Write the features of files to `options.output`.

    Args:
      encoder: as in encoder.py.
      options: inputs, output, workers, dataset, key and settings are used.
      long_side: of the encoder's input in pixels; 0: the encoder's own.
      batch_size: images at once; 0: 8 an accelerator, 1 a CPU.
      per_slice: a row a slice of a volume.
      images: folder for the encoder's inputs, as <image id>.png: its features of such a picture are the row's.

    Returns:
      {"rows", "inputs": number of files, "kept": parts that an earlier run had finished, "parts": all of
      them, "rejects": {code: count}}

    Raises:
      UserError: bad paths, no usable file, or the output is of other inputs or settings.
    """
    output, local = options.output, merge.local_folder(options.output)
    if output.suffix not in (".parquet", ".npz"):
        raise UserError(f"--output {output}: expected a file that ends in .parquet or .npz")
    long_side = long_side or encoder.long_side
    if long_side < encoder.patch_size:
        raise UserError(f"--long-side {long_side}: expected at least a patch, {encoder.patch_size} pixels")
    listing = list_inputs(options, local)
    dataset = options.dataset or options.source
    key = load_key(options.key, output, local)
    earlier = Earlier((), key, dataset)
    prep = describe(options, dataset, listing, key, earlier)
    about = {
        "encoder": encoder.name, "fingerprint": encoder.fingerprint, "long_side": long_side,
        "per_slice": per_slice, "save_images": images is not None, "inputs": prep["inputs"], **prep["settings"],
    }  # fmt: skip
    with locked(output, local):
        done = _earlier_run(output, local / "embed.json", about)
        if "rows" in done:
            return done | {"kept": done["parts"]}
        for folder in (local / "parts", *([images] if images else [])):
            folder.mkdir(parents=True, exist_ok=True)
        for left in local.glob("inputs-*"):
            shutil.rmtree(left, ignore_errors=True)
        with (
            executor(options.workers, None) as run,
            tempfile.TemporaryDirectory(dir=local, prefix="inputs-") as inputs,
        ):
            planned, rejects = plan_inputs(listing, options, earlier, run)
            work = functools.partial(
                prepare_inputs, settings=options.settings, dataset=dataset, key=key, long_side=long_side,
                patch=encoder.patch_size, folder=Path(inputs), images=images,
            )  # fmt: skip
            parts = {local / f"parts/{i:05d}.parquet": part for i, part in enumerate(_parts(planned))}
            todo = {path: part for path, part in parts.items() if not path.is_file()}
            with tqdm(total=len(planned), desc="images", unit="image", mininterval=1) as bar:
                bar.update(len(planned) - sum(map(len, todo.values())))
                for path, ready in zip(todo, _ahead(run, work, list(todo.values())), strict=True):
                    _write_part(path, ready, encoder, batch_size, per_slice, long_side)
                    bar.update(len(ready))
        done = _finish(output, local, list(parts), rejects, listing, about)
        done |= {"inputs": len(listing.rows), "parts": len(parts)}
        (local / "embed.json").write_text(json.dumps({"about": about, "done": done}, indent=1))
        shutil.rmtree(local / "parts")
    return done | {"kept": len(parts) - len(todo)}


def _earlier_run(output: Path, path: Path, about: dict) -> dict:
    """What an earlier run with this output came to, {} where it did not end; the description is written where
    there was none."""
    if not path.is_file():
        if output.exists():
            raise UserError(f"{output} exists and was not written by embed; give another --output")
        path.write_text(json.dumps({"about": about, "done": {}}, indent=1))
        return {}
    earlier = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(about)).items():
        if name != "encoder" and (old := earlier["about"].get(name)) != value:
            what = (
                "inputs (files, sizes, tables, key)"
                if name == "inputs"
                else f"{name}: {old} there, {value} now"
            )
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
    """`work` on all of a part, while the worker processes are at the next part."""
    coming = run(work, parts[0]) if parts else ()
    for after in [*parts[1:], []]:
        ready = list(coming)
        coming = run(work, after)
        yield ready


def prepare_inputs(p: Planned, settings: Settings, dataset: str, key: bytes, long_side: int, patch: int,
                   folder: Path, images: Path | None) -> dict:  # fmt: skip
    """An image or a volume -> its encoder inputs in a file of `folder`, slice after slice. Runs in a worker.

    Returns:
      {"rows": a row a slice as for index.parquet, empty where it is unusable, "path", "shape" of an input,
      "tissue" f16 [rows, columns] of patches, "files", "rejects" and "used" as write_shard}
    """
    rejects, path = [], folder / f"{p.number}.u8"
    try:
        with open(path, "wb") as file:

            def store(row: dict, image: np.ndarray) -> np.ndarray:
                if not row["slice_index"]:  # another copy takes over
                    file.seek(0)
                    file.truncate()
                x, tissue = network_input(image, long_side, patch)
                file.write(x.tobytes())
                if images:
                    temporary = images / f".{row['image_id']}.png"
                    if not cv2.imwrite(str(temporary), x):
                        raise UserError(f"cannot write pictures to {images}; give another --save-images")
                    temporary.replace(images / f"{row['image_id']}.png")
                return tissue  # of every slice: they share a mask

            found, files = make_records(p, settings, dataset, key, rejects, store)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error.strerror})") from error
    used = sorted({f["number"] for f in files} - {m.number for m in p.members or [p]})
    ready = {
        "rows": [row for row, _ in found],
        "path": path,
        "files": files,
        "rejects": rejects,
        "used": used,
    }
    if found:
        tissue = found[0][1]
        ready |= {"tissue": tissue, "shape": tuple(patch * n for n in tissue.shape)}
    return ready


def _write_part(
    path: Path, ready: list[dict], encoder, batch_size: int, per_slice: bool, long_side: int
) -> None:
    """Encode a part and write its rows; beside them, and before, what manifest and rejects need."""
    rows, said = [], {"rejects": [], "used": [], "manifest": []}
    features = _encode([r for r in ready if r["rows"]], encoder, batch_size)
    for r in ready:
        said["rejects"] += r["rejects"]
        said["used"] += r["used"]
        if r["rows"]:
            more = _rows(r, *next(features), per_slice, long_side)
            rows += more
            of_file = {}
            for row in r["rows"]:
                mine = row["image_id"] if len(more) == len(r["rows"]) and per_slice else more[0]["id"]
                of_file.setdefault(row["number"], {})[mine] = None
            said["manifest"] += [f | {"ids": list(of_file[f["number"]])} for f in r["files"]]
        r["path"].unlink()
    path.with_suffix(".json").write_text(json.dumps(said))
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _encode(ready: list[dict], encoder, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Features f32 {"cls", "mean": [slices, D]} of each of `ready`. Batches are of alike sizes, and the same
    for the same part: its features have the same bits however often the run was interrupted."""
    jobs = sorted((r["shape"], i, s) for i, r in enumerate(ready) for s in range(len(r["rows"])))
    found = [{"cls": [None] * len(r["rows"]), "mean": [None] * len(r["rows"])} for r in ready]
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        inputs = [
            np.fromfile(ready[i]["path"], np.uint8, h * w, offset=s * h * w).reshape(h, w)
            for (h, w), i, s in batch
        ]
        out = encode(encoder, inputs, [ready[i]["tissue"] for _, i, _ in batch], batch_size)
        for place, (_, i, s) in enumerate(batch):
            for name in ("cls", "mean"):
                found[i][name][s] = out[name][place]
    return ({name: np.stack(values) for name, values in f.items()} for f in found)


def encode(
    encoder, inputs: list[np.ndarray], tissues: list[np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Features of at most `batch_size` images of any sizes, on one canvas.

    Args:
      inputs, tissues: u8 [H, W] and the tissue share of each patch, of network_input.

    Returns:
      float32 {"cls", "mean": [images, D]}; mean is that of the patch tokens, weighted by their tissue.
    """
    import jax.numpy as jnp

    patch = encoder.patch_size
    step = 4 * patch  # few canvases: each is compiled
    height, width = (-(-max(x.shape[axis] for x in inputs) // step) * step for axis in (0, 1))
    images = np.zeros((batch_size, height, width), np.uint8)
    weight = np.zeros((batch_size, height // patch, width // patch), np.float32)
    sizes = np.full((batch_size, 2), patch, np.int32)
    for i, (x, tissue) in enumerate(zip(inputs, tissues, strict=True)):
        sizes[i] = x.shape
        images[i, : x.shape[0], : x.shape[1]] = x
        weight[i, : tissue.shape[0], : tissue.shape[1]] = tissue
    out = encoder(images, sizes)
    weight_BN = weight.reshape(batch_size, -1)
    weight_BN /= np.maximum(weight_BN.sum(axis=1, keepdims=True), 1e-6)
    mean_BD = jnp.einsum("bn,bnd->bd", weight_BN, out["patches"], precision="highest")
    count = len(inputs)
    return {"cls": np.asarray(out["cls"])[:count], "mean": np.asarray(mean_BD)[:count]}


def _rows(r: dict, features: dict[str, np.ndarray], per_slice: bool, long_side: int) -> list[dict]:
    """The rows of an image or a volume."""
    rows, (height, width) = r["rows"], r["shape"]
    if rows[0]["volume_id"] and not per_slice:
        pixels = hashlib.sha256("".join(row["pixel_hash"] for row in rows).encode()).hexdigest()[:32]
        flags = sorted({flag for row in rows for flag in row["flags"]})
        whole = {"image_id": rows[0]["volume_id"], "slice_index": None, "pixel_hash": pixels, "flags": flags}
        rows, features = [rows[0] | whole], {name: x.mean(axis=0)[None] for name, x in features.items()}
    found = []
    for i, row in enumerate(rows):
        mm = row["pixel_mm"] and row["pixel_mm"] * max(row["height"], row["width"]) / long_side
        size = {"mm_per_px": mm, "input_height": height, "input_width": width}
        found.append(row | {"id": row["image_id"]} | size | {name: x[i] for name, x in features.items()})
    return found


def _finish(output: Path, local: Path, parts: list[Path], rejects: list[dict], listing, about: dict) -> dict:
    """Finished parts -> output, manifest and rejects, part by part."""
    failed, used, first, rows = {r["number"]: r for r in rejects}, set(), {}, 0
    schema = SCHEMA.with_metadata({"mammodino_jax.embed": json.dumps(about)})
    table, manifest = local / "table.parquet", local / "manifest.jsonl"
    with pq.ParquetWriter(table, schema) as writer, open(manifest, "w") as lines:
        for path in parts:
            part = pq.read_table(path, schema=SCHEMA)
            same = [first.setdefault(h, i) for h, i in zip(part["pixel_hash"], part["id"], strict=True)]
            same = [None if a == b else a for a, b in zip(same, part["id"], strict=True)]
            place = SCHEMA.get_field_index("duplicate_of")
            writer.write_table(
                part.set_column(place, SCHEMA.field(place), pa.array(same, pa.string())).cast(schema)
            )
            rows += len(part)
            said = json.loads(path.with_suffix(".json").read_text())
            failed |= {r["number"]: r for r in said["rejects"]}
            used |= set(said["used"])
            for line in said["manifest"]:
                line["path"] = str(listing.rows[line["number"]].path.absolute())
                lines.write(json.dumps(line) + "\n")
    rejects = [failed[number] for number in sorted(failed.keys() - used)]
    merge.write_lines(local / "rejects.jsonl", rejects)
    if not rows:
        raise UserError(
            f"none of {len(listing.rows)} input files is usable ({count_by(r['code'] for r in rejects)}); "
            f"reasons are in {local / 'rejects.jsonl'}"
        )
    if output.suffix == ".npz":
        _write_npz(table, rows, local / "table.npz")
        table.unlink()
        table = local / "table.npz"
    table.replace(output)
    counts = Counter(r["code"] for r in rejects)
    return {"rows": rows, "rejects": dict(counts.most_common())}


def _write_npz(table: Path, rows: int, output: Path) -> None:
    """The same as an .npz of an array a column, features as f32 [rows, D]; of these only a part is in memory.
    Unknown text is "", unknown numbers are NaN, flags are joined by commas."""
    source = pq.ParquetFile(table)
    with zipfile.ZipFile(output, "w") as archive:
        for field in source.schema_arrow:
            with archive.open(f"{field.name}.npy", "w", force_zip64=True) as file:
                if field.name not in ("cls", "mean"):
                    np.lib.format.write_array(
                        file, _plain(source.read([field.name])[field.name]), allow_pickle=False
                    )
                    continue
                for i, batch in enumerate(source.iter_batches(1024, columns=[field.name])):
                    values = batch[field.name].flatten().to_numpy().astype("<f4")
                    if i == 0:
                        shape = (rows, len(values) // len(batch))
                        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(values.tobytes())
        with archive.open("about.npy", "w") as file:
            about = source.schema_arrow.metadata[b"mammodino_jax.embed"].decode()
            np.lib.format.write_array(file, np.array(about), allow_pickle=False)


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
    add(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        type=Path,
        metavar="PATH",
        help="files and folders",
    )
    add("--output", required=True, type=Path, metavar="F", help="F.parquet or F.npz")
    add("--preset", choices=tuple(PRESETS), help="preprocessing (default: what the encoder was made for)")
    add("--foreign-preprocessing", action="store_true", help="allow another than the encoder was made for")
    add(
        "--long-side",
        type=int,
        default=0,
        metavar="PX",
        help="of the encoder's input (default: the encoder's)",
    )
    add("--batch-size", type=int, default=0, help="images at once (default: 8 an accelerator, 1 a CPU)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that read files")
    add("--per-slice", action="store_true", help="a row a slice instead of a row a tomosynthesis volume")
    add("--save-images", type=Path, metavar="DIR", help="write the encoder's inputs as 8-bit PNG files, too")
    add("--dataset", default="", help="name in the ids, as in data_prep build (default: folder)")
    add("--key", metavar="FILE", help="key of the ids (default: ~/.config/mammodino/key)")
    args = parser.parse_args(argv)
    for name in ("long_side", "batch_size"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    from mammodino_jax.encoder import load_encoder

    encoder = load_encoder(args.encoder)
    settings, origin = preprocessing(encoder, args.preset, args.foreign_preprocessing)
    print(f"preprocessing: {origin}")
    options = BuildOptions(
        tuple(args.input),
        args.output,
        dataset=args.dataset,
        workers=args.workers,
        key=args.key,
        settings=settings,
    )
    done = embed(encoder, options, args.long_side, args.batch_size, args.per_slice, args.save_images)
    if done["kept"]:
        print(f"{done['kept']} of {done['parts']} parts were there already")
    rejects = ", ".join(f"{n} {code}" for code, n in done["rejects"].items()) or "none"
    print(f"wrote {done['rows']} rows from {done['inputs']} files to {args.output}; rejected: {rejects}")


if __name__ == "__main__":
    run_command(main)
