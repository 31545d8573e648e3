"""One file -> its record images (`prepare`), one task -> one shard (`write_shard`). Runs in the workers.

Order of the pixel chain: decode, thumbnail, mask, box, area resize of the stored values, one look-up table,
CLAHE at the output size, mask again. All slices of a volume share mask, box, window, CLAHE grid and flip; a
volume is decoded a slice at a time and never held as a whole in floating point.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import window
from data_prep.header import Header, Reject
from data_prep.identity import hash_id
from data_prep.mask import Tissue, find_tissue, thumbnail
from data_prep.read import Frames, scan
from mammodino_jax.data import records

cv2.setNumThreads(1)  # the pool has one process a core; a second layer of threads only slows it down

SAMPLED_SLICES = 9  # of a volume, evenly spaced: enough for its common mask and window
CLAHE_TILES = (8, 8)  # of the record; part of the recipe, since tiles change every pixel
MIN_TISSUE = 0.02  # of the frame


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
    tissue: Tissue
    box: tuple[int, int, int, int]  # y0, x0, y1, x1 in source pixels
    mask: np.ndarray  # bool [H, W] of the record, before the flip
    table: np.ndarray  # u8 [65536]
    window: tuple[float, float]
    flipped: bool
    flags: list[str] = field(default_factory=list)

    def images(self) -> Iterator[np.ndarray]:
        clahe = cv2.createCLAHE(self.settings.clahe, CLAHE_TILES) if self.settings.clahe > 0 else None
        y0, x0, y1, x1 = self.box
        height, width = self.mask.shape
        shrinks = height < y1 - y0 or width < x1 - x0
        for index in range(len(self.frames)):
            crop = np.ascontiguousarray(self.frames[index][y0:y1, x0:x1])
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
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
        return {
            "kind": header.kind, "laterality": header.laterality, "view": header.view,
            "view_modifier": header.view_modifier, "manufacturer": header.manufacturer, "model": header.model,
            "implant": header.implant, "slice_index": index if dbt else None,
            "num_slices": len(self.frames) if dbt else None,
            "slice_position_mm": header.positions_mm[index] if dbt else None, "slice_mm": header.slice_mm,
            "slab_mm": header.slab_mm, "pixel_mm": pixel_mm, "pixel_mm_source": header.pixel_mm_source,
            "height": height, "width": width, "box_y0": y0, "box_x0": x0, "box_y1": y1, "box_x1": x1,
            "flipped": self.flipped, "coverage": round(float(self.mask.mean()), 6),
            "window_lo": self.window[0], "window_hi": self.window[1], "mask_recipe": self.settings.mask,
            "flags": sorted({*header.flags, *self.flags}),
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
    header = scan(Path(path), settings.kind)
    frames = Frames(Path(path), header)
    count = len(frames)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, SAMPLED_SLICES))})
    first = frames[chosen[0]]
    source_hw = first.shape
    thumbs = [thumbnail(first)] + [thumbnail(frames[i]) for i in chosen[1:]]
    del first
    mean = thumbs[0] if len(thumbs) == 1 else np.rint(np.mean(thumbs, axis=0)).astype(np.uint16)
    shown, padding = window.display(mean, header), window.is_padding(mean, header)
    tissue = find_tissue(shown, padding, settings.mask)
    _check_tissue(tissue, shown)
    flags = ["mask_suspect"] if tissue.suspect else []
    if frames.fallbacks:
        flags.append("decoder_fallback")

    small_box = _tissue_box(tissue.mask) if settings.box == "tissue" else (0, 0, *tissue.mask.shape)
    y0, x0, y1, x1 = small_box
    scale_y, scale_x = source_hw[0] / mean.shape[0], source_hw[1] / mean.shape[1]
    box = (round(y0 * scale_y), round(x0 * scale_x), round(y1 * scale_y), round(x1 * scale_x))
    height, width = _output_size(box, header, settings)
    small = tissue.mask[y0:y1, x0:x1].astype(np.uint8) * 255
    mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) > 127

    inside = tissue.mask if padding is None else tissue.mask & ~padding
    low, high = window.tissue_percentiles(np.concatenate([thumb[inside] for thumb in thumbs]))
    table = window.tag_table(header) if settings.window == "tag" else None
    if table is None:
        if settings.window == "tag":
            flags.append("window_fallback")
        table = window.percentile_table(header, low, high)
        limits = sorted((window.rescaled(header, low), window.rescaled(header, high)))
    else:
        limits = window.tag_limits(header)
    flipped, conflict = _orientation(tissue, header, laterality)
    if conflict:
        flags.append("laterality_conflict")
    return Prepared(header, settings, frames, tissue, box, mask, table, tuple(limits), flipped, flags)


def _check_tissue(tissue: Tissue, shown: np.ndarray) -> None:
    """Reject what cannot be a breast: no tissue, no contrast, no structure."""
    area = float(tissue.mask.mean())
    if area == 0:
        raise Reject("empty_tissue", "no tissue found")
    if area < MIN_TISSUE:
        raise Reject(
            "tissue_fraction", f"tissue covers {area:.1%} of the frame, expected at least {MIN_TISSUE:.0%}"
        )
    values = shown[tissue.mask].astype(np.float32)
    low, high = np.percentile(values, window.PERCENTILES)
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
    """(height, width) of the record. --long-side never enlarges; --mm-per-px gives every record the same
    scale."""
    height, width = box[2] - box[0], box[3] - box[1]
    if settings.mm_per_px is None:
        scale = min(1.0, settings.long_side / max(height, width))
    elif header.pixel_mm is None:
        raise Reject("no_spacing", "pixel spacing unknown, needed by --mm-per-px")
    else:
        scale = header.pixel_mm / settings.mm_per_px
    return max(1, round(height * scale)), max(1, round(width * scale))


def _orientation(tissue: Tissue, header: Header, laterality: str | None) -> tuple[bool, bool]:
    """(flip so that the chest wall is on the left, header and pixels disagree). The pixels decide."""
    said = header.chest_wall or {"L": "left", "R": "right"}.get(laterality)
    if said in ("top", "bottom"):
        return False, False  # lying images (stereo) are left as they are
    seen = tissue.chest_wall
    return (seen or said) == "right", seen is not None and said is not None and seen != said


@dataclass(frozen=True)
class Item:
    """One file of the plan with its hashed ids and the original id from which image ids are made."""

    number: int
    path: str
    original: str
    patient_id: str
    study_id: str
    laterality: str | None = None
    view: str | None = None


def write_shard(
    part: Path, items: list[Item], settings: Settings, dataset: str, key: bytes, counter=None
) -> None:
    """Write the records of `items` to `part`.array_record and their index rows to `part`.json.

    Both appear under temporary names first; the .json comes last, so that its presence means a complete
    shard. Files that turn out unusable are listed in the .json as rejects.
    """
    rows, rejects = [], []
    temporary = f"{part}.array_record.tmp"
    writer = ArrayRecordWriter(temporary, "group_size:1")
    for item in items:
        try:
            rows += _write_item(writer, item, settings, dataset, key)
        except Exception as error:  # one odd file must not end a build of a million
            if not isinstance(error, Reject):
                error = Reject("failed", f"{type(error).__name__}: {error}")
            rejects.append(
                {"number": item.number, "path": item.path, "code": error.code, "detail": error.detail}
            )
        if counter is not None:
            with counter.get_lock():
                counter.value += 1
    writer.close()
    os.replace(temporary, f"{part}.array_record")
    Path(f"{part}.json.tmp").write_text(json.dumps({"rows": rows, "rejects": rejects}))
    os.replace(f"{part}.json.tmp", f"{part}.json")


def _write_item(writer, item: Item, settings: Settings, dataset: str, key: bytes) -> list[dict]:
    prepared = prepare(Path(item.path), settings, item.laterality)
    dbt = prepared.header.kind == "dbt"
    rows, encoded = [], []
    for index, image in enumerate(prepared.images()):
        original = f"{item.original}#{prepared.header.frames[index]}" if dbt else item.original
        row = prepared.facts(index) | {
            "number": item.number, "dataset": dataset,
            "patient_id": item.patient_id, "study_id": item.study_id,
            "image_id": hash_id(key, dataset, "image", original),
            "volume_id": hash_id(key, dataset, "volume", item.original) if dbt else None,
            "pixel_hash": hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:32],
            "source_frame": prepared.header.frames[index], "decoder": prepared.frames.decoder,
        }  # fmt: skip
        row["laterality"] = item.laterality or row["laterality"]
        row["view"] = item.view or row["view"]
        if item.laterality and prepared.header.laterality not in (None, item.laterality):
            row["flags"] = sorted({*row["flags"], "laterality_conflict"})
        rows.append(row)
        encoded.append(records.encode(image, row["image_id"]))
    for record in encoded:  # only now: a volume that breaks off in its last slice leaves nothing behind
        writer.write(record)
    return rows
