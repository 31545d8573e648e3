"""The rows of an evaluation's table: baselines and encoders, each with the build that it reads."""

import dataclasses
from pathlib import Path

import numpy as np

from mammodino_jax.data.records import read_prep
from mammodino_jax.errors import UserError
from mammodino_jax.evaluate.baselines import BASELINES, extractor
from mammodino_jax.evaluate.features import (
    Extractor,
    Remembered,
    encoder_extractor,
    mm_per_px,
    record_features,
    untrained,
)
from mammodino_jax.evaluate.items import Rows, read_rows
from mammodino_jax.provenance import hashes

# settings of a build that decide what an encoder sees; its resolution is not among them, mm per px is stated
PIXELS = ("border", "mask", "box", "window", "size", "fit", "clahe", "flip")
# foreign weights that were measured here; all other foreign rows are layout-tested on random weights only
MEASURED = {("hub", 384, 0)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Features that the table has rows of.

    Attributes:
      name: how the table calls it; unique.
      rows: the records that it reads, in the order of those of --data.
      long_side: px; None: the majority class, which needs no features.
      encoder: None for baselines.
      spec: of the encoder, as given.
      remarks: what a reader of its rows must know.
    """

    name: str
    rows: Rows
    kind: str = "baseline"
    extractor: Extractor | None = None
    long_side: int | None = None
    encoder: object = None
    spec: str | None = None
    remarks: tuple[str, ...] = ()

    def features(self, cache: Path | None, tiles: bool) -> dict[str, np.ndarray]:
        """{part: f32 [r, F]} of every record."""
        return record_features(self.rows, self.extractor, self.long_side, cache, tiles, self.name)

    def mm(self, records: np.ndarray) -> float | None:
        """Median size in mm of an input pixel over some records; None where it is unknown."""
        found = mm_per_px(self.rows.take(records), self.long_side) if self.long_side else np.array([np.nan])
        return float(np.nanmedian(found)) if np.isfinite(found).any() else None


def plan(args, rows: Rows, tested: np.ndarray, memory: Path | None = None) -> list[Entry]:
    """The rows of the table, baselines first; these read what the first encoder reads.

    Args:
      args: of the command line: encoder, builds, long_side, batch_size, seed, transductive,
        foreign_preprocessing.
      rows: the records of --data; tested: places of those that test.
      memory: a folder in which encoders keep their patch tokens (features.Remembered).

    Raises:
      UserError: an encoder that does not load, saw what tests it, or was made for another build.
    """
    from mammodino_jax.encoder import load_encoder

    def remember(encoder):
        return Remembered(encoder, memory) if memory else encoder

    builds = _builds(args.builds, rows)
    entries, architectures = [Entry("majority class", rows)], set()
    for spec in args.encoder:
        encoder = load_encoder(spec)
        seen = seen_in_pretraining(encoder, rows, tested, args.transductive)
        remarks = [r for r in (_layout(encoder), seen) if r]
        mine, foreign = _read_from(encoder, rows, builds, args.foreign_preprocessing)
        runs = [(encoder.name, encoder, mine, [*remarks, *([foreign] if foreign else [])])]
        if encoder.kind in ("workdir", "export") and "raw" in builds and builds["raw"] is not mine:
            runs.append(
                (f"{encoder.name} on raw", encoder, builds["raw"], [*remarks, "foreign preprocessing: raw"])
            )
        for side in args.long_side or [encoder.long_side]:
            at = f" @ {side}" if len(args.long_side or ()) > 1 else ""
            if not any(e.name == f"hand-made{at}" for e in entries):
                for name in BASELINES:
                    read = extractor(name, encoder.patch_size)
                    entries.append(Entry(name + at, mine, "baseline", read, side))
            trained = encoder.vit and encoder.kind != "random"
            if trained and (encoder.vit, side) not in architectures:
                architectures.add((encoder.vit, side))
                number = len({vit for vit, _ in architectures})
                name = "random init" if number == 1 else f"random init {number}"
                blank = remember(untrained(encoder, args.seed))
                read = encoder_extractor(blank, args.batch_size)
                entries.append(Entry(name + at, mine, "random", read, side, blank))
            for name, loaded, build, said in runs:
                name += at
                while name in {entry.name for entry in entries}:
                    name += "'"
                loaded = remember(loaded)
                read = encoder_extractor(loaded, args.batch_size)
                entries.append(Entry(name, build, loaded.kind, read, side, loaded, spec, tuple(said)))
    return entries


def seen_in_pretraining(encoder, rows: Rows, tested: np.ndarray, transductive: bool) -> str:
    """What to say of tested patients and pixels in pretraining; "" where it saw none.

    Raises:
      UserError: it saw some, and `transductive` is not set.
    """
    if encoder.kind == "random" or encoder.name.startswith("random:"):
        return ""
    unknown = "pretraining patients unknown"
    if not encoder.provenance:
        return unknown
    patients = hashes(rows.columns["patient_id"][tested]) & set(encoder.provenance["patients"])
    pixels = hashes(rows.columns["pixel_hash"][tested]) & set(encoder.provenance["pixels"])
    if (patients or pixels) and not transductive:
        raise UserError(
            f"{encoder.name} saw {len(patients)} test patients and {len(pixels)} test images in pretraining; "
            "test on others, or pass --transductive to have it said in the table"
        )
    if patients or pixels:
        return f"transductive: pretraining saw {len(patients)} test patients, {len(pixels)} test images"
    return unknown if encoder.provenance.get("foreign") else ""


def _layout(encoder) -> str:
    """Foreign weights whose real files were never measured here are called layout-tested."""
    vit = encoder.vit
    if encoder.kind in ("", "workdir", "export", "random"):
        return ""
    if vit and (encoder.kind, vit.dim, vit.registers) in MEASURED:
        return ""
    return "layout tested on random weights only"


def _builds(folders, rows: Rows) -> dict[str, Rows]:
    """{preset: its records}, in the order of `rows`, of further builds of the same files."""
    by_preset: dict[str, list[Path]] = {}
    for folder in folders:
        by_preset.setdefault(_settings(folder).get("preset", "mammodino"), []).append(folder)
    out = {}
    for preset, of in by_preset.items():
        found = read_rows(of)
        place = {image: i for i, image in enumerate(found.columns["image_id"])}
        missing = [image for image in rows.columns["image_id"] if image not in place]
        if missing:
            raise UserError(
                f"--builds {' '.join(map(str, of))}: {len(missing)} of the {len(rows)} records of --data are "
                "not there; build the same files with the same --key and --dataset"
            )
        out[preset] = found.take(np.array([place[image] for image in rows.columns["image_id"]]))
    return out


def _settings(folder: Path) -> dict:
    return read_prep(folder).get("settings", {})


def mismatch(made_for: dict, settings: dict) -> list[str]:
    """In words, the settings that decide pixels and differ between two builds, as far as both say them."""
    plain = lambda v: tuple(v) if isinstance(v, list) else v  # noqa: E731
    return [
        f"{field} {settings[field]}, not {made_for[field]}"
        for field in PIXELS
        if field in made_for and field in settings and plain(made_for[field]) != plain(settings[field])
    ]


def _read_from(encoder, rows: Rows, builds: dict[str, Rows], foreign: bool) -> tuple[Rows, str]:
    """The build that an encoder reads: that of --data, or the one of --builds that it was made for.

    Raises:
      UserError: there is none that it was made for, and `foreign` is not set.
    """
    if not encoder.made_for:
        return rows, ""
    for candidate in (rows, *builds.values()):
        differ = [d for folder in candidate.folders for d in mismatch(encoder.made_for, _settings(folder))]
        if not differ:
            return candidate, ""
    differ = sorted({d for folder in rows.folders for d in mismatch(encoder.made_for, _settings(folder))})
    if not foreign:
        raise UserError(
            f"{encoder.name} was made for another build than --data: {'; '.join(differ)}; give its build as "
            f"--builds (python -m data_prep build --preset {encoder.made_for.get('preset', 'mammodino')}), "
            "or pass --foreign-preprocessing to have it said in the table"
        )
    return rows, f"foreign preprocessing: {'; '.join(differ)}"
