"""Pretrain: python main.py --config=configs/nano.py --workdir=DIR [--config.optim.base_lr=1e-3]."""

import logging as stdlib_logging
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from mammodino_jax.commandline import parse
from mammodino_jax.errors import DataError, UserError

config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/vitb14_518.py.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and pictures go; the same command resumes.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster is detected.")
flags.DEFINE_integer("processes", None, "Processes that train together; 1: no cluster is looked for.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def ours_or_error(record) -> bool:
    """Console lines are ours; libraries show errors only (a checkpoint logs dozens of lines).

    Where a checkpoint cannot be read or written, our line says why; Orbax and asyncio add pages.
    """
    ours = "mammodino_jax" in record.pathname or record.filename == "main.py"
    pages = "orbax" in record.pathname or "asyncio" in record.pathname
    return ours or (record.levelno >= stdlib_logging.ERROR and not pages)


def main(_):
    from mammodino_jax.hosts import connect, leave  # imports jax: here, as data workers re-import this module
    from mammodino_jax.train import train

    logging.get_absl_handler().addFilter(ours_or_error)
    try:
        connect(flags.FLAGS.coordinator, flags.FLAGS.processes, flags.FLAGS.process)
        train(flags.FLAGS.config, flags.FLAGS.workdir)
    except (UserError, DataError) as error:  # of the second, another try may help
        leave(f"error: {error}", 2 if isinstance(error, UserError) else 1)
    except Exception:
        leave(traceback.format_exc(), 1)


if __name__ == "__main__":
    example = "main.py --config=configs/nano.py --workdir=DIR"
    app.run(main, flags_parser=lambda argv: parse(argv, ("config", "workdir"), example))
