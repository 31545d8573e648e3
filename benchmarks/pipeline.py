"""Images per second of the input pipeline, from shards to batch, stage by stage, beside PIL and torchvision.

    python -m benchmarks.pipeline --output table.md

Recipe: configs/vitb14_518.py (2 crops of 518 px, 8 of 98 px, masks; with slice pairs for a quarter of the
rows). Records of 1024 px: synthetic breasts unless --data names a built data set. Medians of CPU time on one
core with one thread, files in the page cache; worker processes by the clock, on all cores.

- ours, by stage: the functions of a batch, each over all images of it; "rest" is the whole less these.
- peer: DINOv2's augmentation in torchvision, on PIL images, one thread: RandomResizedCrop (bicubic) and flip;
  with photometrics color jitter, grayscale, blur, solarize; to tensor, normalise. RGB as DINOv2 loads its
  images; "grey" is what a user gains who keeps one channel.
- geometry: from the same decoded array in memory to the crops of a batch in uint8. Ours includes finding
  windows with enough tissue and keeping the background 0; the peer's includes its conversion to RGB.
- from file: ours with masks and counters; the peer decodes a PNG of the same pixels, and draws no masks.
- Ours normalises and jitters on the device; here the device is one CPU core, too.
"""

import argparse
import dataclasses
import functools
import io
import os
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

from benchmarks import machine  # isort: skip (before numpy: it sets the number of threads)
import jax
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import flags

from benchmarks.preprocess import synthetic_mammogram, write_dicom
from configs import vitb14_518
from data_prep.build import BuildOptions, build
from mammodino_jax import augment
from mammodino_jax.data import pipeline, records
from mammodino_jax.data.crops import crop, integral_image
from mammodino_jax.recipe import Recipe, from_config

BATCH = 32
REPEAT = 32  # synthetic records are listed so often: grain's shuffle is slow for sets of a few dozen
VERSIONS = (
    "numpy",
    "opencv-python-headless",
    "array-record",
    "grain",
    "jax",
    "pillow",
    "torch",
    "torchvision",
)


def synthetic(folder: Path, images: int, volumes: int) -> Path:
    """A built data set of synthetic breasts, 1024 px long and 0.4 to 0.7 as wide as long."""
    files, built, data = (folder / name for name in ("files", "built", "data"))
    files.mkdir()
    for i in range(images + volumes):
        width = int(1152 * (0.8 + 0.7 * i / (images + volumes)))
        slices = [synthetic_mammogram(1152, width, 9 * i + s) for s in range(1 if i < images else 4)]
        write_dicom(files / f"{i}.dcm", slices[0] if i < images else np.stack(slices))
    build(BuildOptions((files,), built, split=(1.0, 0.0, 0.0), key=str(folder / "key")))
    data.mkdir()
    shutil.copy(built / "prep.json", data)
    index, shards, parts = pq.read_table(built / "index.parquet"), records.shard_paths(built, "train"), []
    for turn in range(REPEAT):
        for s, shard in enumerate(shards, turn * len(shards)):
            (data / records.shard_name("train", s, REPEAT * len(shards))).symlink_to(shard)
        volume = pc.binary_join_element_wise(index["volume_id"], str(turn), "-")
        parts.append(index.set_column(index.schema.get_field_index("volume_id"), "volume_id", volume))
    pq.write_table(pa.concat_tables(parts), data / "index.parquet")
    return data


def recipe(data: Path, batch: int, dbt_rows: int) -> Recipe:
    c = vitb14_518.get_config(f"data={data},photometrics=dinov2")  # the peer's strengths
    c.update(batch_size=batch, dbt_rows=dbt_rows, steps=100_000)
    c.loss.drop_path_group = 0
    c.data.update(workers=0, threads=1)
    return from_config(c)


def batches(r: Recipe):
    return pipeline.make_batches(
        r.data, r.crops, r.mask, r.pairs, batch_size=r.batch_size, dbt_rows=r.dbt_rows, steps=r.steps, seed=0
    )


def maker(r: Recipe):
    """What makes the batch of a step, by itself."""
    with mock.patch.object(pipeline, "iterate", lambda build, *_: build):
        return batches(r)


def stages(make) -> tuple[list[np.ndarray], dict]:
    """The images of a batch without pairs, and a function for each stage of making it."""
    c, shards, B = make.crops, make.records.shards, make.batch_size
    places = [int(make.flat[i]) for i in range(B)]
    raw = [shards[make.records.source[p]].source[int(make.records.record[p])] for p in places]
    images = [records.decode(record)["image"] for record in raw]
    batch = make(0)

    def draw(r: int):
        integral = integral_image(images[r] > 0)
        kinds = (("global", range(2)), ("local", range(2, 2 + c.local_number)))
        return integral, *(make._windows(batch, r, r, places[r], integral, *kind) for kind in kinds)

    drawn = [draw(r) for r in range(B)]

    def crops(kind: str, windows: int):
        for r in range(B):
            for view, window in enumerate(drawn[r][windows]):
                batch[f"{kind}_crops"][r, view] = crop(images[r], window, getattr(c, f"{kind}_size"))

    return images, {
        "draw records": lambda: [int(make.flat[i]) for i in range(B)],
        "read": lambda: [shards[make.records.source[p]].source[int(make.records.record[p])] for p in places],
        "decode": lambda: [records.decode(record) for record in raw],
        "integral image, windows": lambda: [draw(r) for r in range(B)],
        f"2 crops of {c.global_size} px": functools.partial(crops, "global", 1),
        f"{c.local_number} crops of {c.local_size} px": functools.partial(crops, "local", 2),
        "mask": lambda: [make._mask_row(batch, r, r, places[r], i, g) for r, (i, g, _) in enumerate(drawn)],
    }


def torchvision():
    """torchvision. Its wheel is a CUDA build; beside a CPU torch its operators are missing, and the import
    fails on declaring gradients for them. The transforms call none: a declaration is enough."""
    import torch

    torch.set_num_threads(1)
    try:
        import torchvision.transforms as T
    except RuntimeError:
        torchvision.library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            torchvision.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.transforms as T
    return torch, T


def peer(c, look) -> dict:
    """Functions of a list of images (u8 [H, W], or PNG bytes), a batch each, by name."""
    torch, T = torchvision()

    def geometry(kind: str) -> list:
        size, scale = getattr(c, f"{kind}_size"), getattr(c, f"{kind}_scale")
        bicubic = T.InterpolationMode.BICUBIC
        return [T.RandomResizedCrop(size, scale, c.ratio, bicubic), T.RandomHorizontalFlip(c.hflip)]

    def photometrics(view: int) -> list:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        blur = T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], (1.0, 0.1, 0.5)[min(view, 2)])
        return [jitter, T.RandomGrayscale(0.2), blur] + [T.RandomSolarize(128, 0.2)] * (view == 1)

    def run(mode: str, after, images: list) -> list:
        views = [
            T.Compose(geometry(kind) + after(v)) for kind, v in (("global", 0), ("global", 1), ("local", 2))
        ]
        views += [views[2]] * (c.local_number - 1)
        opened = (
            PIL.Image.open(io.BytesIO(i)) if isinstance(i, bytes) else PIL.Image.fromarray(i) for i in images
        )
        rows = [[view(image.convert(mode)) for view in views] for image in opened]
        return [
            torch.stack([row[v] for row in rows for v in part]) for part in (range(2), range(2, len(views)))
        ]

    floats = [T.ToTensor(), T.Normalize(look.mean, look.std)]
    return {
        "geometry": functools.partial(run, "RGB", lambda view: [T.PILToTensor()]),
        "grey": functools.partial(run, "L", lambda view: [T.PILToTensor()]),
        "normalised": functools.partial(run, "RGB", lambda view: floats),
        "photometrics": functools.partial(run, "RGB", lambda view: photometrics(view) + floats),
    }


def device(r: Recipe):
    """Functions of a batch: what the train step does to its crops, compiled for this CPU."""
    key, channels = jax.random.key(0), r.model.channels

    def normalised(crops, sample, view: int):
        return augment.normalise(crops.astype(np.float32) / 255, r.augment, channels)

    def photometrics(crops, sample, view: int):
        return augment.photometric(crops, sample, key, r.augment, channels, view)

    def run(compiled, batch: dict):
        parts = (("global_crops", 0), ("local_crops", 2))
        return jax.block_until_ready([compiled(batch[name], batch["sample"], view) for name, view in parts])

    return [functools.partial(run, jax.jit(f, static_argnums=2)) for f in (normalised, photometrics)]


def by_clock(r: Recipe, workers: int, threads: int, steps: int) -> float:
    """Images a second, of `steps` batches after the first ones."""
    data = dataclasses.replace(r.data, workers=workers, threads=threads)
    iterator = batches(dataclasses.replace(r, data=data))
    warm = 2 * (workers + threads) + 2  # more than what can have been made ahead
    for _ in range(warm):
        next(iterator)
    began = time.perf_counter()
    for _ in range(steps):
        next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return steps * r.batch_size / seconds


def in_order(*functions):
    return lambda: [function() for function in functions]


def measure(data: Path, batch: int = BATCH, repeats: int = 7) -> tuple[dict, dict, dict]:
    """Milliseconds an image on one core: (of our stages and the whole, of ours, of the peer)."""
    r = recipe(data, batch, 0)
    make, paired = maker(r), maker(recipe(data, batch, batch // 4))
    images, stage = stages(make)
    normalise, jitter = device(r)
    theirs, made, pngs = peer(r.crops, r.augment), make(0), []
    for image in images:
        PIL.Image.fromarray(image).save(png := io.BytesIO(), "png")
        pngs.append(png.getvalue())
    whole, crops = (
        functools.partial(make, 0),
        [f for name, f in stage.items() if "crops" in name or "windows" in name],
    )
    ours = {
        "geometry": in_order(*crops),
        "file": whole,
        "normalised": in_order(whole, functools.partial(normalise, made)),
        "photometrics": in_order(whole, functools.partial(jitter, made)),
        "pairs": functools.partial(paired, 0),
    }
    others = {
        "geometry": functools.partial(theirs["geometry"], images),
        "grey": functools.partial(theirs["grey"], images),
        "file": functools.partial(theirs["geometry"], pngs),
        "normalised": functools.partial(theirs["normalised"], pngs),
        "photometrics": functools.partial(theirs["photometrics"], pngs),
    }
    groups, cores = (stage | {"whole": whole}, ours, others), os.sched_getaffinity(0)
    machine.pin()
    seconds = iter(machine.cpu_seconds(repeats, *(f for group in groups for f in group.values())))
    os.sched_setaffinity(0, cores)
    return tuple({name: next(seconds) / batch * 1e3 for name in group} for group in groups)


def report(args) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic(Path(folder), *args.synthetic)
        stage, ours, theirs = measure(data, args.batch, args.repeats)
        flat, pairs = (recipe(data, args.batch, rows) for rows in (0, args.batch // 4))
        clock = [
            [f"{workers} processes" if workers else "this process", threads,
             *(f"{by_clock(r, workers, threads, args.steps):.0f}" for r in (flat, pairs))]
            for workers, threads in ((0, 1), (0, 2), (2, 1))
        ]  # fmt: skip
        index = pq.read_table(Path(data) / "index.parquet", columns=["height", "width", "coverage"])
    height, width, tissue = (np.median(index[name]) for name in ("height", "width", "coverage"))
    kind = "Records of --data" if args.data else "Synthetic records"
    text = "## Host pipeline\n\nWhat is measured is in the head of `benchmarks/pipeline.py`.\n\n"
    text += machine.head(args.command, VERSIONS).replace("\n", "  \n")
    text += f"{kind}, median {height:.0f} x {width:.0f} px, {100 * tissue:.0f} % tissue.\n\n"
    rest = stage["whole"] - sum(ms for name, ms in stage.items() if name != "whole")
    rows = [*stage.items(), ("rest: counters, copies", rest)]
    rows = [[name, f"{ms:.2f}", f"{100 * ms / stage['whole']:.0f} %"] for name, ms in rows if name != "whole"]
    whole = [
        ["**whole, without pairs**", f"{stage['whole']:.2f}", f"{1e3 / stage['whole']:.0f} images/s/core"]
    ]
    whole += [
        ["**whole, pairs for 1/4**", f"{ours['pairs']:.2f}", f"{1e3 / ours['pairs']:.0f} images/s/core"]
    ]
    text += machine.table(["stage", "ms/image", "share"], rows + whole) + "\n"
    rows = [
        [what, f"{ours[mine]:.2f}", f"{theirs[other]:.2f}", f"{theirs[other] / ours[mine]:.1f}"]
        for what, mine, other in (
            ("geometry, from decoded arrays", "geometry", "geometry"),
            ("geometry, the peer in grey", "geometry", "grey"),
            ("from file to uint8 crops", "file", "file"),
            ("from file to normalised float32", "normalised", "normalised"),
            ("from file, photometrics and normalised", "photometrics", "photometrics"),
        )
    ]
    text += machine.table(["CPU time, one core", "ours, ms/image", "PIL/torchvision", "ratio"], rows) + "\n"
    columns = ["by the clock, images/s", "threads each", "without pairs", "pairs for 1/4"]
    text += machine.table(columns, clock) + "\n"
    return (
        text
        + "Photometrics are DINOv2's on both sides; ours run on the device in training, on a core here.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a built data set with volumes; default: a synthetic one")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="batches measured by the clock")
    parser.add_argument("--output", type=Path, help="write the Markdown here too")
    parser.add_argument("--quick", action="store_true", help="few records, one repeat: for a test")
    args = parser.parse_args(arguments)
    args.synthetic = (4, 2) if args.quick else (32, 8)
    if args.quick:
        args.batch, args.repeats, args.steps = 4, 1, 2
    args.command = machine.command("benchmarks.pipeline", arguments)
    machine.finish(report(args), args.output)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # grain reads an absl flag when it starts worker processes
    main()
