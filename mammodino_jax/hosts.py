"""Which processes train together: found by JAX on a cluster, given by flags elsewhere, else one alone."""

import os
import sys
import threading
import time

import jax
from absl import logging

from mammodino_jax.errors import UserError

MEET_SECONDS = 300  # for all processes to come together
LEAVE_SECONDS = 60  # a process that is done waits so long for the others
LAST_SECONDS = 10  # process 0 stays so long after an error: without it the others abort, theirs unsaid


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None,
    timeout: int = MEET_SECONDS,
) -> None:  # fmt: skip
    """Join the other processes of a run. Call before anything touches a device.

    With no argument JAX looks for a cluster (TPU slice, Slurm, Open MPI, Kubernetes with the `kubernetes`
    package); where it finds none, this process trains alone. `processes=1` alone does not even look. Where
    the processes do not meet within `timeout` seconds, this one prints why and exits with code 2 (JAX itself
    would abort with a stack trace, which cannot be caught). Process 0 logs for all; others show errors only.

    Args:
      coordinator: HOST:PORT that process 0 listens on and all others reach.
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      UserError: only some are given, they do not fit together, or a cluster was found that cannot be joined.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    lacking = [name for name, value in flags.items() if value is None]
    if processes == 1 and coordinator is None and not process:
        return
    if lacking and len(lacking) < len(flags):
        given = ", ".join(name for name in flags if name not in lacking)
        raise UserError(
            f"{given} without {' and '.join(lacking)}; a run of several processes needs "
            "--coordinator=HOST:PORT --processes=N --process=I on each, one process none of them"
        )
    if not lacking:
        if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator is {coordinator!r}, expected HOST:PORT of process 0")
        if not 0 <= process < processes:
            raise UserError(
                f"--process is {process}, expected 0 to {processes - 1} with --processes={processes}"
            )
    where = f"{coordinator} (process {process} of {processes})" if not lacking else "the cluster JAX detected"
    watch = threading.Timer(timeout, _give_up, (where, timeout))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=2 * timeout,
            shutdown_timeout_seconds=LEAVE_SECONDS,
            cluster_detection_method=None if lacking else "deactivate",
        )  # fmt: skip
    except Exception as error:  # detection asks metadata servers and the Kubernetes API: errors of any kind
        if lacking and str(error).startswith("coordinator_address should be defined"):  # there is no cluster
            return _alone()
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise UserError(
            f"cannot join {where}: {reason}. Give --coordinator=HOST:PORT --processes=N --process=I, or "
            "--processes=1 to train alone"
        ) from None
    finally:
        watch.cancel()
    if "JAX_LOCAL_DEVICE_IDS" not in os.environ and _own_gpus(os.environ):
        # Under Slurm and Open MPI, JAX takes one GPU a process, numbered by the process's place on its host:
        # too few where the process has the host for itself, the wrong one where it is shown no other.
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", "all")
    if jax.process_index():
        logging.set_verbosity(logging.ERROR)


def leave(why: str, code: int) -> None:
    """Say why a process failed and end it with this exit code; the others notice that it is gone.

    Where it is one of several, not by Python's way out: on it JAX waits for the others, and aborts (exit code
    134) when they do not come. Nor where the console cannot be written (its file may lie on the full disk
    that ended the run): Python would end with 120.
    """
    try:
        print(why, file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        os._exit(code)
    if not jax.distributed.is_initialized():
        sys.exit(code)
    try:
        if jax.process_index() == 0 and jax.process_count() > 1:
            time.sleep(LAST_SECONDS)
    finally:  # devices that could not be opened raise here once more
        os._exit(code)


def _own_gpus(env) -> bool:
    """Whether Slurm or Open MPI gave this process a host, or the one GPU that it sees, for itself."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in env:
        alone = env["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    elif "SLURM_NTASKS" in env:
        alone = env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
    else:
        return False
    return alone or env.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0


def _give_up(where: str, timeout: int) -> None:
    try:
        print(
            f"error: the processes did not meet at {where} within {timeout} s: start all of them, with the "
            "same number of processes; the port of process 0 must be open to the others",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    finally:  # stderr may be closed
        os._exit(2)


def _alone() -> None:
    """Raise where this is plainly one of several: they would all train the same run."""
    if int(os.environ.get("JOB_COMPLETION_INDEX", 0)):  # of an indexed Job of Kubernetes
        raise UserError(
            "this is pod JOB_COMPLETION_INDEX="
            f"{os.environ['JOB_COMPLETION_INDEX']} of an indexed Job, but no cluster was found: give "
            "--coordinator=HOST:PORT --processes=N --process=$JOB_COMPLETION_INDEX (docs/launch.md), or "
            "--processes=1 if each pod trains a run of its own"
        )
