"""python -m data_prep phantom | build | inspect: from mammogram files to training shards."""

import argparse
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
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return parsed.run(parsed)


def _add_build(parser: argparse.ArgumentParser) -> None:
    """Flags are named as the fields of `BuildOptions` and `Settings` are."""
    add = parser.add_argument
    add("--source", default="folder", help="which data set's layout the input has (default: folder)")
    add("--input", required=True, nargs="+", type=Path, metavar="PATH", dest="inputs")
    add("--dataset", default="", help="name in the index and in the ids (default: the source's)")
    kinds = ("2d", "synthetic2d", "dbt", "film")
    add("--kind", choices=kinds, default="2d", help="what files without a DICOM header are")
    add("--box", choices=("tissue", "full"), default="tissue")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--long-side", type=_positive, default=1024, metavar="PX", help="of a record, at most")
    size.add_argument("--mm-per-px", type=float, metavar="MM", help="one scale for all records instead")
    add("--mask", choices=("robust", "percentile", "none"), default="robust")
    add("--window", choices=("percentile", "tag"), default="percentile")
    add("--clahe", type=float, default=2.0, metavar="LIMIT", help="clip limit; 0: none")
    add("--key", metavar="FILE", help="key of the ids (default: ~/.config/mammodino/key)")
    add("--seed", type=int, default=0, help="of splits and shard order")
    add("--split", type=_shares, default=(0.7, 0.1, 0.2), metavar="TRAIN,VAL,TEST")
    add("--dry-run", action="store_true", help="scan headers and plan, write nothing")
    parser.set_defaults(run=_build)


def _phantom(args: argparse.Namespace) -> int:
    from data_prep.phantom import write_phantoms

    write_phantoms(args.output, args.patients, args.seed, args.workers)
    return 0


def _build(args: argparse.Namespace) -> int:
    from data_prep.build import BuildOptions, Settings, build

    for name, value in (("--mm-per-px", args.mm_per_px), ("--clahe", args.clahe or None)):
        if value is not None and not value > 0:
            raise UserError(f"{name} {value:g}: expected a positive number")
    given = vars(args)
    settings = Settings(**{f.name: given[f.name] for f in fields(Settings)})
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
    from data_prep.read import Reject
    from data_prep.shards import Settings, prepare

    for path in args.files:
        if not path.is_file():
            raise UserError(f"{path} is not a file; give one or more files")
        try:
            p = prepare(path, Settings())
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return value


def _shares(text: str) -> tuple[float, float, float]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text}: expected three shares that sum to 1, as in 0.7,0.1,0.2")
    return shares


if __name__ == "__main__":
    run_command(main)
