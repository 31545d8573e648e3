"""Weights out: python -m mammodino_jax.export --workdir DIR --format hf --output DIR."""

import argparse
from pathlib import Path

from mammodino_jax import __version__
from mammodino_jax.convert.folder import FORMATS, export
from mammodino_jax.encoder import load_encoder
from mammodino_jax.errors import UserError, run_command


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mammodino_jax.export", description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="a training workdir")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    args = parser.parse_args(argv)
    if not (args.workdir / "checkpoints").is_dir():
        raise UserError(f"{args.workdir} is not a training workdir (no checkpoints/)")
    export(load_encoder(str(args.workdir)), args.format, args.output, __version__)
    print(f"wrote {args.output} ({args.format})")


if __name__ == "__main__":
    run_command(main)
