"""Pretrain: python main.py --config=configs/nano.py --workdir=DIR [--config.optim.base_lr=1e-3]."""

import logging as stdlib_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mammodino_jax.errors import UserError

config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/vitb14_518.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go; the same command resumes.")


def parse(argv):
    """Parse flags; a mistyped one is one clear line and exit code 2, not a traceback."""
    try:
        rest = flags.FLAGS(argv)
        for name in ("config", "workdir"):
            if flags.FLAGS[name].value is None:
                raise UserError(
                    f"--{name} is required: python main.py --config=configs/nano.py --workdir=DIR"
                )
        return rest
    except (UserError, flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        if "help" in str(argv[1:]):
            raise
        message = error.args[0] if isinstance(error, KeyError) else error  # a KeyError prints quoted
        print("error:", " ".join(str(message).split()), file=sys.stderr)
        sys.exit(2)


def main(argv):
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}")
    import jax  # imported here: data workers re-import this module

    from mammodino_jax.train import train

    logging.get_absl_handler().addFilter(from_us_or_serious)
    logging.info("jax %s", jax.__version__)
    train(flags.FLAGS.config, flags.FLAGS.workdir)


def from_us_or_serious(record) -> bool:
    """Console lines are ours; libraries show errors only (a checkpoint logs dozens of lines)."""
    return (
        record.levelno >= stdlib_logging.ERROR
        or "mammodino_jax" in record.pathname
        or record.filename == "main.py"
    )


def run(argv):
    try:
        main(argv)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(run, flags_parser=parse)
