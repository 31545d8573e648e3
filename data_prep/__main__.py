"""python -m data_prep phantom | build | inspect | report: from mammogram files to training shards."""

import argparse
import functools
import logging
import os
from dataclasses import fields
from pathlib import Path

from mammodino_jax.errors import UserError, run_command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    phantom = commands.add_parser("phantom", help="write DICOM phantoms with known truth (synthetic)")
    phantom.add_argument("--patients", type=_positive, default=8)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.set_defaults(run=_phantom)
    build = commands.add_parser("build", help="mammogram files to shards and an index")
    _add_build(build)
    for command in (phantom, build):
        command.add_argument("--output", required=True, type=Path, metavar="DIR")
        command.add_argument("--workers", type=_positive, default=os.cpu_count() or 1)
    inspect = commands.add_parser("inspect", help="one line a file: how it is read, or why it is rejected")
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.set_defaults(run=_inspect)
    report = commands.add_parser("report", help="quality report on a built data set, as one HTML page")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--output", type=Path, metavar="FILE", help="(default: DIR.local/report.html)")
    report.add_argument("--samples", type=_positive, default=24, help="pictures in a group")
    report.set_defaults(run=_report)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parsed.run(parsed)


def _add_build(parser: argparse.ArgumentParser) -> None:
    """Flags are named as the fields of `BuildOptions` and `Settings` are."""
    from data_prep.settings import PRESETS

    add = parser.add_argument
    add("--source", default="folder", help="which data set's layout the input has (default: folder)")
    add("--input", required=True, nargs="+", action="extend", type=Path, metavar="PATH", dest="inputs")
    add("--columns", type=mapping, default={}, metavar="OURS=THEIRS,...",
        help="columns of the folder's labels.csv, as in patient_id=PatNr,label_cancer=malign")  # fmt: skip
    add("--dataset", default="",
        help="name in the index and in the ids (default: the source's); builds and embed give equal ids "
        "where --key, --dataset, --columns and --input are equal")  # fmt: skip
    add("--previous", nargs="+", type=Path, default=(), metavar="DIR",
        help="earlier deliveries of the same archive: their patients keep their splits")  # fmt: skip
    add("--dask", metavar="ADDRESS", help="run on a Dask scheduler; local: on a cluster of --workers here")
    add("--key", metavar="FILE", help="key of the ids (default: ~/.config/mammodino/key)")
    add("--seed", type=int, default=0, help="of splits and shard order")
    add("--split", type=_shares, default=(0.7, 0.1, 0.2), metavar="TRAIN,VAL,TEST")
    add("--dry-run", action="store_true", help="scan headers and plan, decode and write nothing")
    recipe = parser.add_argument_group("recipe", "given flags go before the preset's values")
    recipe.add_argument("--preset", choices=tuple(PRESETS), default="mammodino",
                        help="the chain of a published encoder (default: mammodino, ours)")  # fmt: skip
    add = functools.partial(recipe.add_argument, default=argparse.SUPPRESS)
    kinds = ("2d", "synthetic2d", "dbt", "film")
    add("--kind", choices=kinds, help="what files without a DICOM header are")
    add("--box", choices=("tissue", "full"))
    add("--long-side", type=_positive, metavar="PX", help="of a record, at most (1024)")
    add("--mm-per-px", type=_above_zero, metavar="MM", help="one scale for all records instead")
    add("--mask", choices=("robust", "percentile", "none"))
    add("--tau", type=_percentile, help="of --mask percentile (60; the paper gives none)")
    add("--window", choices=("percentile", "tag", "minmax"), help="tag: the header's VOI LUT or window")
    add("--voi-index", type=_index, help="which of the header's VOI LUTs and windows, from 0")
    add("--clahe", type=_not_negative, metavar="LIMIT", help="clip limit (2); 0: none")
    add("--burned-in", choices=("reject", "keep"), help="images with BurnedInAnnotation=YES (reject)")
    add("--for-processing", choices=("auto", "reject", "keep"),
        help="raw exposures (auto: unless the presentation image is there)")  # fmt: skip
    add("--fast-j2k", action="store_true", help="JPEG 2000 at half resolution where that suffices")
    add("--vendors", type=_text_file, dest="vendor_table", metavar="FILE",
        help="CSV of windows and polarities by device; columns as in data_prep/vendors.csv")  # fmt: skip
    parser.set_defaults(run=_build)


def _phantom(args: argparse.Namespace) -> int:
    from data_prep.phantom import write_phantoms

    write_phantoms(args.output, args.patients, args.seed, args.workers)
    return 0


def _build(args: argparse.Namespace) -> int:
    from data_prep.build import BuildOptions, build
    from data_prep.settings import PRESETS, Settings

    given = {"preset": args.preset} | PRESETS[args.preset] | vars(args)
    if "long_side" in vars(args) and "mm_per_px" in vars(args):
        raise UserError("--long-side and --mm-per-px exclude each other")
    if {"long_side", "mm_per_px"} & vars(args).keys():
        given["size"] = None
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings) if f.name in given})
    options = {f.name: given[f.name] for f in fields(BuildOptions) if f.name in given}
    counts = build(BuildOptions(settings=settings, **options))
    done = "would build up to" if args.dry_run else "already built:" if "already_built" in counts else "built"
    print(
        f"{done} {counts['records']} records from {counts['inputs']} files ({counts['rejects']} rejected): "
        f"{counts['train']} train, {counts['val']} val, {counts['test']} test in {args.output}"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """May print paths: the user typed them."""
    from data_prep.prepare import prepare
    from data_prep.reject import Reject
    from data_prep.settings import Settings

    for path in args.files:
        if not path.is_file():
            raise UserError(f"{path} is not a file; give one or more files")
        try:
            p = prepare([path], Settings())
            list(p.images())  # every slice can be decoded
        except Reject as reject:
            print(f"{path}: rejected, {reject}")
            continue
        h, facts = p.header, p.facts(0)
        spacing = f"{h.pixel_mm:.3g} mm ({h.pixel_mm_source})" if h.pixel_mm else "spacing unknown"
        print(
            f"{path}: {h.kind} {h.laterality or '?'} {h.view or '?'}, {len(p.frames)} frame(s), {spacing}, "
            f"{h.manufacturer or 'unknown vendor'}, decoder {p.frames.decoder}, "
            f"box {p.box[0]}:{p.box[2]} x {p.box[1]}:{p.box[3]}, tissue {facts['coverage']:.0%} of it, "
            f"window {p.window[0]:g}..{p.window[1]:g}, record {facts['height']} x {facts['width']}"
            f"{', flipped' if p.flipped else ''}; flags: {', '.join(facts['flags']) or 'none'}"
        )
    return 0


def _report(args: argparse.Namespace) -> int:
    from data_prep.report import write_report

    path = write_report(args.folder, args.output, args.samples)
    print(f"wrote {path}; its pictures may show text that is burned into the images")
    return 0


def _checked(convert, fits, expected: str):
    """A parser of one flag: `convert` the text, and check that it `fits`."""

    def parse(text: str):
        try:
            value = convert(text)
            if fits(value):
                return value
        except (ValueError, OSError):
            pass
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return parse


_positive = _checked(int, lambda v: v > 0, "a whole number above 0")
_index = _checked(int, lambda v: v >= 0, "a whole number from 0")
_above_zero = _checked(float, lambda v: 0 < v < float("inf"), "a number above 0")
_not_negative = _checked(float, lambda v: 0 <= v < float("inf"), "a number from 0")
_percentile = _checked(float, lambda v: 0 < v < 100, "a percentile between 0 and 100")
_text_file = _checked(lambda text: Path(text).read_text(encoding="utf-8-sig"), bool, "a CSV file")
_shares = _checked(
    lambda text: tuple(float(part) for part in text.split(",")),
    lambda v: len(v) == 3 and min(v) >= 0 and abs(sum(v) - 1) < 1e-6,
    "three shares that sum to 1, as in 0.7,0.1,0.2",
)
mapping = _checked(
    lambda text: dict(part.split("=", 1) for part in text.split(",")), bool, "OURS=THEIRS pairs"
)


if __name__ == "__main__":
    run_command(main)
