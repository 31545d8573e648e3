"""Whose a workdir is: its config.json, which a run and its continuation share, and all processes see."""

import json
import os
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from mammodino_jax.checkpoint import SHARED_SECONDS
from mammodino_jax.errors import UserError

# Fields (or their beginnings) in which a run and its continuation may differ: results change by rounding.
MAY_DIFFER = (
    "run.", "data.workers", "data.threads", "fsdp", "profile_steps", "model.remat", "model.scan",
    "model.attention", "loss.patch_chunk",
)  # fmt: skip


def check_workdir(config, workdir: Path) -> None:
    """Raise a UserError where the workdir belongs to another config (`run` and data workers may differ)."""
    path = workdir / "config.json"
    if not path.exists():
        return
    there, here = (dict(_flatten(c)) for c in (json.loads(path.read_text()), _jsonable(config)))
    names = sorted(name for name in there.keys() | here.keys() if not name.startswith(MAY_DIFFER))
    changed = [name for name in names if there.get(name) != here.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"workdir {workdir} belongs to another config: {name} is {there.get(name)} there and "
            f"{here.get(name)} here ({len(changed)} fields differ); give another --workdir or the same config"
        )


def claim_workdir(config, workdir: Path) -> None:
    """Process 0 writes config.json; the others wait for it, and see that they share folder and config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be made: {error.strerror}") from None
    path = workdir / "config.json"
    if jax.process_index() == 0:
        write_whole(path, json.dumps(_jsonable(config), indent=1))
    multihost_utils.sync_global_devices("config.json")
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: checkpoints "
                "need a workdir that all hosts share (NFS, Lustre, or a mounted bucket: docs/launch.md)"
            )
        time.sleep(1)
    check_workdir(config, workdir)


def _jsonable(config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def _flatten(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_whole(path: Path, text: str) -> None:
    """Replace a file; who is killed meanwhile leaves the old one, not half of the new one.

    Raises:
      UserError: it cannot be written (a full disk).
    """
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
