"""Weights out: python -m mammodino_jax.export --workdir DIR --format hf --output DIR.

With --encoder, weights of others are converted: --encoder timm:FILE --format hf.
"""

import argparse
from pathlib import Path

from mammodino_jax import __version__
from mammodino_jax.convert.folder import FORMATS, export
from mammodino_jax.convert.pretrained import read_heads, with_channels
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError, run_command


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mammodino_jax.export", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="a training workdir")
    source.add_argument(
        "--encoder", help="weights of any kind: hub:FILE, timm:FILE, hf:DIR, a folder, RUN/checkpoints/STEP"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="input channels, if others than its own")
    parser.add_argument("--heads", action="store_true", help="with hub: heads, to continue pretraining")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="with onnx: input size (its training size)"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="for your own use, where terms of the data forbid a release",
    )
    args = parser.parse_args(argv)
    if args.workdir and not (args.workdir / "checkpoints").is_dir():
        raise UserError(f"{args.workdir} is not a training workdir (no checkpoints/)")
    for flag, given, form in (("--heads", args.heads, "hub"), ("--size", args.size, "onnx")):
        if given and args.format != form:
            raise UserError(f"{flag} goes with --format {form}, not {args.format}")
    spec = str(args.workdir or args.encoder)
    encoder, heads = load_encoder(spec), read_heads(spec) if args.heads else None
    if heads == {}:
        raise UserError(
            f"{spec} has no projection heads; training workdirs have, training checkpoints (hub:FILE, "
            "dbt-dino:FILE), and folders that were exported with --heads"
        )
    if args.channels:
        encoder = with_channels(encoder, args.channels)
    export(
        encoder, args.format, args.output, __version__, heads=heads, size=args.size, private=args.private
    )  # fmt: skip
    print(f"wrote {args.output} ({args.format})")


if __name__ == "__main__":
    run_command(main)
