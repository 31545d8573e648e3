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
    """The rows of the table, baselines before the first encoder.

    Baselines read the first build that has a tissue mask, which is what most of them are about.

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
    masked = [c for c in (rows, *builds) if all(_settings(f).get("mask") != "none" for f in c.folders)]
    unmasked = () if masked else ("no build with a tissue mask: the outline is the frame's",)
    entries, architectures = [Entry("majority class", rows)], []
    for spec in args.encoder:
        encoder = load_encoder(spec)
        seen = seen_in_pretraining(encoder, rows, tested, args.transductive)
        remarks = [r for r in (_layout(encoder), seen) if r]
        mine, foreign = _read_from(encoder, rows, builds, args.foreign_preprocessing)
        runs = [(encoder.name, encoder, mine, [*remarks, *([foreign] if foreign else [])])]
        raw = next((b for b in builds if _settings(b.folders[0]).get("preset") == "raw"), None)
        if encoder.kind in ("workdir", "export") and raw is not None and raw is not mine:
            said = [*remarks, "foreign preprocessing: raw"]
            runs.append((f"{encoder.name} on raw", encoder, raw, said))
        shape = encoder.vit or type(encoder).__name__ + str(encoder.dim)
        if encoder.kind != "random" and shape not in architectures:
            architectures.append(shape)
            number = f" {len(architectures)}" if len(architectures) > 1 else ""
            runs.insert(0, (f"random init{number}", untrained(encoder, args.seed), mine, []))
        for asked in args.long_side or [encoder.long_side]:
            at = f" @ {asked}" if len(args.long_side or ()) > 1 else ""
            side = asked
            if encoder.vit:
                side = max(1, round(asked / encoder.patch_size)) * encoder.patch_size
            if not any(e.name == f"hand-made{at}" for e in entries):
                for name in BASELINES:
                    read = extractor(name, encoder.patch_size)
                    entries.append(
                        Entry(name + at, (masked or [rows])[0], "baseline", read, side, remarks=unmasked)
                    )
            for name, loaded, build, said in runs:
                name += at
                while name in {entry.name for entry in entries}:
                    name += "'"
                loaded = remember(loaded)
                read = encoder_extractor(loaded, args.batch_size)
                said = (*said, *_size_remarks(build, asked, side))
                of = None if name.startswith("random init") else spec
                entries.append(Entry(name, build, loaded.kind, read, side, loaded, of, said))
    return entries


def _size_remarks(rows: Rows, asked: int, side: int) -> list[str]:
    """What to say of a long side that is not the one asked for, or finer than the records."""
    there = np.median(np.maximum(rows.columns["height"], rows.columns["width"]))
    said = [f"{asked} px is no multiple of its patch size"] if side != asked else []
    return said + ([f"upsampled: records have {there:.0f} px"] if side > 1.1 * there else [])


def seen_in_pretraining(encoder, rows: Rows, tested: np.ndarray, transductive: bool) -> str:
    """What to say of tested patients and pixels in pretraining; "" where it saw none.

    Raises:
      UserError: it saw some, and `transductive` is not set.
    """
    if encoder.kind == "random":
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


def _builds(folders, rows: Rows) -> list[Rows]:
    """Records of further builds, in the order of `rows`; builds of equal settings together."""
    alike: dict[str, list[Path]] = {}
    for folder in folders:
        alike.setdefault(repr([_settings(folder).get(field) for field in PIXELS]), []).append(folder)
    out = []
    for of in alike.values():
        found = read_rows(of, everything=True)  # --data decides what is left out
        place = {image: i for i, image in enumerate(found.columns["image_id"])}
        missing = [image for image in rows.columns["image_id"] if image not in place]
        if missing:
            raise UserError(
                f"--builds {' '.join(map(str, of))}: {len(missing)} of the {len(rows)} records of --data are "
                "not there; build the same files with the same --key and --dataset"
            )
        out.append(found.take(np.array([place[image] for image in rows.columns["image_id"]])))
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


def _read_from(encoder, rows: Rows, builds: list[Rows], foreign: bool) -> tuple[Rows, str]:
    """The build that an encoder reads: that of --data, or the one of --builds that it was made for.

    Raises:
      UserError: there is none that it was made for, and `foreign` is not set.
    """
    if not encoder.made_for:
        return rows, ""
    for candidate in (rows, *builds):
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
