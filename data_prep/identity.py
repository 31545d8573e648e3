"""Ids that cannot be turned back: HMAC-SHA256 with a key that stays with the data's owner.

The key is made on first use and never lies in a data folder. Builds with the same key give a patient the same
id.
"""

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from mammodino_jax.errors import UserError

log = logging.getLogger("data_prep")


def load_key(given: str | None, output: Path, local: Path, make: bool = True) -> bytes:
    """Read the key; make it (mode 600) where there is none.

    Args:
      given: the file of --key; else MAMMODINO_KEY_FILE, else ~/.config/mammodino/key.
      output, local: the folder that will be shared, and its DIR.local, which may be archived with it.
      make: False: without a key file, for a dry run, use an empty key.

    Raises:
      UserError: the key would lie inside `output`, is too short, or cannot be written.
    """
    path = Path(given or os.environ.get("MAMMODINO_KEY_FILE") or "~/.config/mammodino/key").expanduser()
    if {output.resolve(), local.resolve()} & set(path.resolve().parents):
        raise UserError(f"key file {path} lies in the output folder or beside it; choose another place")
    try:
        if not path.exists() and not make:
            return b""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        if path.stat().st_mode & 0o077:
            log.warning("key file %s can be read by others: chmod 600 it", path)
        key = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"key file {path}: {error.strerror}; give another one with --key FILE") from error
    if len(key) < 16:
        raise UserError(f"key file {path} holds {len(key)} characters, expected at least 16")
    return key


def hash_id(key: bytes, dataset: str, role: str, original: str) -> str:
    """32 hex digits for one original id. `role` (image, patient, ...) keeps equal originals apart."""
    return hmac.new(
        key, "\0".join((dataset, role, original)).encode(errors="surrogateescape"), hashlib.sha256
    ).hexdigest()[:32]
