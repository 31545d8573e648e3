"""What a run has seen: sources, their terms, and salted hashes of patients and pixels.

They travel in every checkpoint so that an evaluation can refuse test patients or pixels seen in pretraining.
"""

import hashlib
from pathlib import Path

from mammodino_jax.data.index import open_split
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.data.records import read_prep

SALT = "mammodino-seen-1"


def digest(value: str) -> str:
    """Salted SHA-256, first 8 bytes in hexadecimal."""
    return hashlib.sha256(f"{SALT}:{value}".encode()).hexdigest()[:16]


def hashes(values) -> set[str]:
    """Digests of the given strings."""
    return {digest(v) for v in values if v}


def collect(data: DataConfig) -> dict:
    """Provenance of the sources of a training run, as JSON.

    Returns:
      {"sources": [[folder, split, kinds, weight], ...], "terms": {data set: terms}, "no_release": [data
      sets whose terms forbid publishing weights or embeddings], "salt": str, "patients": [hash, ...],
      "pixels": [hash, ...], "foreign": [name of weights that it started from and that do not say what they
      saw], "builds": [settings of a build]}, all sorted.
    """
    patients, pixels, terms, no_release, builds = set(), set(), {}, set(), []
    for folder, split, *_ in data.sources:
        prep = read_prep(folder)
        terms |= prep.get("terms", {})
        no_release |= set(prep.get("no_release", []))
        if prep.get("settings", {}) not in builds:
            builds.append(prep.get("settings", {}))
        _, table = open_split(folder, split, ["patient_id", "pixel_hash"])
        patients |= hashes(table["patient_id"].to_pylist())
        pixels |= hashes(table["pixel_hash"].to_pylist())
    sources = [[_text(field) for field in source] for source in data.sources]
    seen = {"patients": sorted(patients), "pixels": sorted(pixels)}
    about = {
        "sources": sources,
        "terms": terms,
        "no_release": sorted(no_release),
        "salt": SALT,
        "foreign": [],
        "builds": builds,
    }
    return about | seen


def inherited(weights: str, heads: str = "") -> dict:
    """Provenance of the weights that a run starts from: what they saw, or, under "foreign", their names."""
    from mammodino_jax.convert.folder import origin
    from mammodino_jax.encoder import FOREIGN, load_encoder

    kind, _, file = weights.partition(":")
    if file and kind in FOREIGN:  # without reading the weights: their files are large
        seen = origin(Path(file))
    else:
        seen = load_encoder(weights).provenance or {"foreign": [Path(file or weights).name]}
    return join(seen, origin(Path(heads)) if heads else {})


def join(one: dict, other: dict) -> dict:
    """Both provenances together; either may lack fields."""
    sources = one.get("sources", [])
    out = dict(one, terms={**other.get("terms", {}), **one.get("terms", {})})
    out["sources"] = sources + [s for s in other.get("sources", []) if s not in sources]
    for name in ("no_release", "patients", "pixels", "foreign"):
        out[name] = sorted({*one.get(name, []), *other.get(name, [])})
    return out


def _text(value) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
