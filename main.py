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
                raise UserError(f"--{name} is required: main.py --config=configs/nano.py --workdir=DIR")
        flags.FLAGS.config.keys()  # a file that failed to load is only reported on use
        if rest[1:]:
            raise UserError(f"unexpected argument {rest[1]!r}")
        return rest
    except (UserError, flags.Error, AttributeError, ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, AttributeError):  # the config library's, quoted twice: 'NAME'\nDid you mean ...
            text = "config has no field " + text.replace("\\'", "").replace("\\n", ". ").strip("'\"")
        print("error:", " ".join(text.split()), file=sys.stderr)
        sys.exit(2)


def ours_or_error(record) -> bool:
    """Console lines are ours; libraries show errors only (a checkpoint logs dozens of lines).

    Where a checkpoint cannot be read or written, our line says why; Orbax and asyncio add pages.
    """
    ours = "mammodino_jax" in record.pathname or record.filename == "main.py"
    pages = "orbax" in record.pathname or "asyncio" in record.pathname
    return ours or (record.levelno >= stdlib_logging.ERROR and not pages)


def main(_):
    import jax  # imported here: data workers re-import this module

    from mammodino_jax.train import train

    logging.get_absl_handler().addFilter(ours_or_error)
    logging.info("jax %s", jax.__version__)
    try:
        train(flags.FLAGS.config, flags.FLAGS.workdir)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
