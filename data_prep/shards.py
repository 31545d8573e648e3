"""One file -> its record images (`prepare`), one task -> one shard (`write_shard`). Runs in the workers.

Order of the pixel chain: decode, thumbnail, mask, box, area resize of the stored values, one look-up table,
CLAHE at the output size, mask again. All slices of a volume share mask, box, window, CLAHE grid and flip; a
volume is decoded a slice at a time and never held as a whole in floating point.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import window
from data_prep.header import Header, Reject
from data_prep.identity import hash_id
from data_prep.mask import Tissue, find_tissue, thumbnail
from data_prep.plan import Planned, reject_line
from data_prep.read import Frames, scan
from mammodino_jax.data import records

cv2.setNumThreads(1)  # the pool has one process a core; a second layer of threads only slows it down

SAMPLED_SLICES = 9  # of a volume, evenly spaced: enough for its common mask and window
CLAHE_TILES = (8, 8)  # of the record; part of the recipe, since tiles change every pixel
MIN_TISSUE = 0.02  # of the frame
_HEADER_COLUMNS = (
    "kind", "laterality", "view", "view_modifier", "manufacturer", "model", "implant", "slice_mm", "slab_mm",
    "pixel_mm_source",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides a record's pixels. The same settings give the same bytes."""

    kind: str = "2d"  # of files that are no DICOM
    box: str = "tissue"  # tissue | full
    long_side: int = 1024  # px; 518 / sqrt(0.32) = 916 would do for global crops without upsampling
    mm_per_px: float | None = None  # instead of long_side
    mask: str = "robust"  # robust | percentile | none
    window: str = "percentile"  # percentile | tag
    clahe: float = 2.0  # clip limit; 0: none


@dataclass
class Prepared:
    """One file, ready to be stored: `images()` yields u8 [H, W] slice by slice (one for 2D), `facts(i)` its
    columns."""

    header: Header
    settings: Settings
    frames: Frames
    box: tuple[int, int, int, int]  # y0, x0, y1, x1 in source pixels
    mask: np.ndarray  # bool [H, W] of the record, before the flip
    table: np.ndarray  # u8 [65536]
    window: tuple[float, float]
    flipped: bool
    flags: list[str]

    def images(self) -> Iterator[np.ndarray]:
        clahe = cv2.createCLAHE(self.settings.clahe, CLAHE_TILES) if self.settings.clahe > 0 else None
        y0, x0, y1, x1 = self.box
        height, width = self.mask.shape
        how = cv2.INTER_AREA if height < y1 - y0 or width < x1 - x0 else cv2.INTER_LINEAR
        for index in range(len(self.frames)):
            crop = np.ascontiguousarray(self.frames[index][y0:y1, x0:x1])
            image = self.table[cv2.resize(crop, (width, height), interpolation=how)]
            image[~self.mask] = 0  # labels outside must not take part in the equalisation
            if clahe is not None:
                image = clahe.apply(image)
            image = np.where(self.mask, np.maximum(image, 1), np.uint8(0))  # CLAHE lifts the zeros
            yield np.ascontiguousarray(image[:, ::-1]) if self.flipped else image

    def facts(self, index: int) -> dict:
        """The index columns of slice `index` that need neither ids nor tables."""
        header, (y0, x0, y1, x1) = self.header, self.box
        height, width = self.mask.shape
        pixel_mm = header.pixel_mm and round(header.pixel_mm * max(y1 - y0, x1 - x0) / max(height, width), 6)
        dbt = header.kind == "dbt"
        refused = ["decoder_fallback"] if self.frames.fallbacks else []  # known only when slices are decoded
        return {name: getattr(header, name) for name in _HEADER_COLUMNS} | {
            "slice_index": index if dbt else None, "num_slices": len(self.frames) if dbt else None,
            "slice_position_mm": header.positions_mm[index] if dbt else None, "pixel_mm": pixel_mm,
            "height": height, "width": width, "box_y0": y0, "box_x0": x0, "box_y1": y1, "box_x1": x1,
            "flipped": self.flipped, "coverage": round(float(self.mask.mean()), 6),
            "window_lo": self.window[0], "window_hi": self.window[1], "mask_recipe": self.settings.mask,
            "flags": sorted({*header.flags, *self.flags, *refused}),
        }  # fmt: skip


def prepare(path: Path, settings: Settings, laterality: str | None = None) -> Prepared:
    """Read one file and fix its mask, box, window and flip.

    Args:
      path: a medical file.
      settings: the recipe.
      laterality: L | R from a table, where the header has none.

    Raises:
      Reject: the file yields no record; the code says why.
    """
    header = scan(path, settings.kind)
    frames = Frames(path, header)
    count, thumbs = len(frames), []
    for i in np.linspace(0, count - 1, min(count, SAMPLED_SLICES)):
        frame = frames[round(i)]
        thumbs.append(thumbnail(frame))
    mean = np.rint(np.mean(thumbs, axis=0)).astype(np.uint16)
    shown, padding = window.display(mean, header), window.is_padding(mean, header)
    tissue = find_tissue(shown, padding, settings.mask)
    _check_tissue(tissue, shown)

    y0, x0, y1, x1 = _tissue_box(tissue.mask) if settings.box == "tissue" else (0, 0, *tissue.mask.shape)
    scale_y, scale_x = frame.shape[0] / mean.shape[0], frame.shape[1] / mean.shape[1]
    box = (round(y0 * scale_y), round(x0 * scale_x), round(y1 * scale_y), round(x1 * scale_x))
    height, width = _output_size(box, header, settings)
    small = tissue.mask[y0:y1, x0:x1].astype(np.uint8) * 255
    mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) > 127

    inside = tissue.mask if padding is None else tissue.mask & ~padding
    low, high = window.tissue_percentiles(np.concatenate([thumb[inside] for thumb in thumbs]))
    table = window.tag_table(header) if settings.window == "tag" else None
    from_tissue = table is None
    if from_tissue:
        table = window.percentile_table(header, low, high)
        limits = tuple(sorted((window.rescaled(header, low), window.rescaled(header, high))))
    else:
        limits = window.tag_limits(header)
    flipped, conflict = _orientation(tissue, header, laterality)
    seen = {"mask_suspect": tissue.suspect, "laterality_conflict": conflict}
    seen["window_fallback"] = settings.window == "tag" and from_tissue
    flags = [name for name, present in seen.items() if present]
    return Prepared(header, settings, frames, box, mask, table, limits, flipped, flags)


def _check_tissue(tissue: Tissue, shown: np.ndarray) -> None:
    """Reject what cannot be a breast: no tissue, no contrast, no structure."""
    area = float(tissue.mask.mean())
    if area == 0:
        raise Reject("empty_tissue", "no tissue found")
    if area < MIN_TISSUE:
        needed = f"expected at least {MIN_TISSUE:.0%}"
        raise Reject("tissue_fraction", f"tissue covers {area:.1%} of the frame, {needed}")
    low, high = np.percentile(shown[tissue.mask].astype(np.float32), window.PERCENTILES)
    needed = max(8, (1 << int(shown.max()).bit_length()) // 128)
    if high - low < needed:
        raise Reject("low_contrast", f"tissue spans {high - low:.0f} grey levels, expected at least {needed}")
    both = tissue.mask[:, 1:] & tissue.mask[:, :-1]
    similar = np.corrcoef(shown[:, 1:][both], shown[:, :-1][both])[0, 1]
    if similar < 0.5:  # breasts are above 0.9
        raise Reject("qc", f"no tissue structure: correlation of neighbouring pixels {similar:.2f}")


def _tissue_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The mask's box, trimmed of end rows where the mask is narrower than 5 % of the box."""
    columns = np.flatnonzero(mask.any(0))
    rows = np.flatnonzero(mask.sum(1) >= 0.05 * (columns[-1] + 1 - columns[0]))
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[y0:y1].any(0))
    return y0, int(columns[0]), y1, int(columns[-1]) + 1


def _output_size(box: tuple[int, int, int, int], header: Header, settings: Settings) -> tuple[int, int]:
    """(height, width) of the record. --long-side never enlarges; --mm-per-px is one scale for all."""
    height, width = box[2] - box[0], box[3] - box[1]
    if settings.mm_per_px is None:
        scale = min(1.0, settings.long_side / max(height, width))
    elif header.pixel_mm is None:
        raise Reject("no_spacing", "pixel spacing unknown, needed by --mm-per-px")
    else:
        scale = header.pixel_mm / settings.mm_per_px
    return max(1, round(height * scale)), max(1, round(width * scale))


def _orientation(tissue: Tissue, header: Header, laterality: str | None) -> tuple[bool, bool]:
    """(flip so that the chest wall is on the left, table, header and pixels disagree). The pixels decide."""
    said, seen = header.chest_wall or {"L": "left", "R": "right"}.get(laterality), tissue.chest_wall
    conflict = None not in (laterality, header.laterality) and laterality != header.laterality
    if said in ("top", "bottom"):
        return False, conflict  # lying images (stereo) are left as they are
    return (seen or said) == "right", conflict or (None not in (seen, said) and seen != said)


def write_shard(part: Path, files: list[Planned], settings: Settings, dataset: str, key: bytes) -> int:
    """Write the records of `files` to `part`.array_record and their index rows to `part`.json.

    The .json comes last and at once, so that its presence means a complete shard. Files that turn out
    unusable are listed in it as rejects. Returns the number of files.
    """
    rows, rejects = [], []
    writer = ArrayRecordWriter(f"{part}.array_record", "group_size:1")
    for p in files:
        try:
            found = list(_records(p, settings, dataset, key))
        except Exception as error:  # one odd file must not end a build of a million
            if not isinstance(error, Reject):
                error = Reject("failed", f"{type(error).__name__}: {error}")
            rejects.append(reject_line(p.number, p.row, error))
            continue
        # Only now: a volume that breaks off in its last slice leaves nothing behind, and a disk that is full
        # ends the build.
        for row, record in found:
            rows.append(row)
            writer.write(record)
    writer.close()
    Path(f"{part}.tmp").write_text(json.dumps({"rows": rows, "rejects": rejects}))
    Path(f"{part}.tmp").replace(f"{part}.json")
    return len(files)


def _records(p: Planned, settings: Settings, dataset: str, key: bytes) -> Iterator[tuple[dict, bytes]]:
    """(index row, record) of the image, or of each slice."""
    prepared = prepare(p.row.path, settings, p.row.laterality)
    header = prepared.header
    dbt = header.kind == "dbt"
    file_row = {
        "number": p.number, "split": p.split, "dataset": dataset, "laterality": p.laterality, "view": p.view,
        "patient_id": hash_id(key, dataset, "patient", p.patient),
        "study_id": hash_id(key, dataset, "study", p.study),
        "volume_id": hash_id(key, dataset, "volume", p.image) if dbt else None,
    }  # fmt: skip
    for index, image in enumerate(prepared.images()):
        frame = header.frames[index]
        image_id = hash_id(key, dataset, "image", f"{p.image}#{frame}" if dbt else p.image)
        pixel_hash = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:32]
        row = prepared.facts(index) | file_row | {
            "image_id": image_id, "pixel_hash": pixel_hash, "source_frame": frame,
            "decoder": prepared.frames.decoder,
        }  # fmt: skip
        yield row, records.encode(image, image_id)
