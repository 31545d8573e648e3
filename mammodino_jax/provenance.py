"""What a run has seen: sources, their terms, and salted hashes of patients and pixels.

They travel in every checkpoint so that an evaluation can refuse test patients or pixels seen in pretraining.
"""

import hashlib

from mammodino_jax.data.index import open_split
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.data.records import read_prep

SALT = "mammodino-seen-1"


def hashes(values) -> set[str]:
    """Salted SHA-256 of the given strings, first 8 bytes in hexadecimal."""
    return {hashlib.sha256(f"{SALT}:{v}".encode()).hexdigest()[:16] for v in values if v}


def collect(data: DataConfig) -> dict:
    """Provenance of the sources of a training run, as JSON.

    Returns:
      {"sources": [[folder, split, kinds, weight], ...], "terms": {data set: terms}, "no_release": [data
      sets whose terms forbid publishing weights or embeddings], "salt": str, "patients": [hash, ...],
      "pixels": [hash, ...]}, all sorted.
    """
    patients, pixels, terms, no_release = set(), set(), {}, set()
    for folder, split, *_ in data.sources:
        prep = read_prep(folder)
        terms |= prep.get("terms", {})
        no_release |= set(prep.get("no_release", []))
        _, table = open_split(folder, split, ["patient_id", "pixel_hash"])
        patients |= hashes(table["patient_id"].to_pylist())
        pixels |= hashes(table["pixel_hash"].to_pylist())
    sources = [[_text(field) for field in source] for source in data.sources]
    seen = {"patients": sorted(patients), "pixels": sorted(pixels)}
    about = {"sources": sources, "terms": terms, "no_release": sorted(no_release), "salt": SALT}
    return about | seen


def _text(value) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
