"""One image or volume -> its record images. Runs in the workers.

Order of the pixel chain: decode, thumbnail, mask, box, area resize of the stored values, one look-up table,
CLAHE at the output size, mask again. All slices of a volume share mask, box, window, CLAHE grid and flip; a
volume is decoded a slice at a time and never held as a whole in floating point.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_prep import window
from data_prep.header import MAX_SIDE, Header, stack_headers
from data_prep.mask import Tissue, find_tissue, thumbnail
from data_prep.plan import Row, with_table
from data_prep.read import Frames, Stack, is_j2k, scan
from data_prep.reject import Reject
from data_prep.settings import Settings

cv2.setNumThreads(1)  # the pool has one process a core; a second layer of threads only slows it down

SAMPLED_SLICES = 9  # of a volume, evenly spaced: enough for its common mask and window
CLAHE_TILES = (8, 8)  # of the record; part of the recipe, since tiles change every pixel
MIN_TISSUE = 0.02  # of the frame
_SIDES = {"L": "left", "R": "right"}
_HEADER_COLUMNS = (
    "kind", "laterality", "view", "view_modifier", "manufacturer", "model", "implant", "slice_mm", "slab_mm",
    "pixel_mm_source",
)  # fmt: skip


@dataclass
class Prepared:
    """An image or a volume, ready to be stored: `images()` yields u8 [H, W] slice by slice (one for 2D),
    `facts(i)` its columns."""

    header: Header
    settings: Settings
    frames: Frames | Stack
    shown: np.ndarray  # u16 [h, w]: the thumbnail that the mask was found on, denser is greater
    tissue: Tissue
    source_shape: tuple[int, int]
    box: tuple[int, int, int, int]  # y0, x0, y1, x1 in source pixels
    mask: np.ndarray  # bool [H, W] of the record, before the flips
    table: np.ndarray  # u8 [65536]
    window: tuple[float, float]
    flipped: bool  # left-right
    flags: list[str]

    def images(self) -> Iterator[np.ndarray]:
        clahe = cv2.createCLAHE(self.settings.clahe, CLAHE_TILES) if self.settings.clahe > 0 else None
        height, width = self.mask.shape
        for index in range(len(self.frames)):
            frame = self.frames[index]
            y, x = (there / said for there, said in zip(frame.shape, self.source_shape, strict=True))
            y0, x0, y1, x1 = (round(v * s) for v, s in zip(self.box, (y, x, y, x), strict=True))
            how = cv2.INTER_AREA if height < y1 - y0 or width < x1 - x0 else cv2.INTER_LINEAR
            image = self.table[cv2.resize(frame[y0:y1, x0:x1], (width, height), interpolation=how)]
            image[~self.mask] = 0  # labels outside must not take part in the equalisation
            if clahe is not None:
                image = clahe.apply(image)
            image = np.where(self.mask, np.maximum(image, 1), np.uint8(0))  # CLAHE lifts the zeros
            image = image[::-1] if "upside_down" in self.flags else image
            yield np.ascontiguousarray(image[:, ::-1] if self.flipped else image)

    def facts(self, index: int) -> dict:
        """The index columns of slice `index` that need neither ids nor tables."""
        header, (y0, x0, y1, x1) = self.header, self.box
        height, width = self.mask.shape
        pixel_mm = header.pixel_mm and round(header.pixel_mm * (y1 - y0) / height, 6)
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


def prepare(paths: list[Path], settings: Settings, row: Row | None = None) -> Prepared:
    """Read an image or a volume and fix its mask, box, window and flips.

    Args:
      paths: one file, or the files of a volume that has one a slice.
      settings: the recipe.
      row: what the data set's tables say of it.

    Raises:
      Reject: it yields no record; the code says why. `member` is the place of the file at fault.
    """
    headers = []
    for place, path in enumerate(paths):
        try:
            headers.append(with_table(scan(path, settings), row))
        except Reject as reject:
            raise Reject(reject.code, reject.detail, place) from reject
    header = headers[0] if len(headers) == 1 else stack_headers(headers)
    halvings = _halvings(header, settings)
    frames = (
        Frames(paths[0], header, halvings) if len(paths) == 1 else Stack(paths, headers, header, halvings)
    )
    count, thumbs, lowest, highest = len(frames), [], 65535, 0
    for i in np.linspace(0, count - 1, min(count, SAMPLED_SLICES)):
        frame = _without_border(frames[round(i)], settings.border)
        if settings.window == "minmax":
            lowest, highest = min(lowest, int(frame.min())), max(highest, int(frame.max()))
        thumbs.append(thumbnail(frame))
    mean = np.rint(np.mean(thumbs, axis=0)).astype(np.uint16) if count > 1 else thumbs[0]
    shown, padding = window.display(mean, header), window.is_padding(mean, header)
    tissue = find_tissue(shown, padding, settings.mask, settings.tau)
    _check_tissue(tissue, shown)

    source = (header.rows, header.columns) if header.rows else frames[count - 1].shape
    box, part = _box(tissue.mask, frame, source, header, settings)
    height, width = _output_size(box, header, settings)
    small = tissue.mask[part].astype(np.uint8) * 255
    mask = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) > 127

    inside = tissue.mask & ~tissue.foreign if tissue.foreign.sum() < 0.5 * tissue.mask.sum() else tissue.mask
    inside = inside if padding is None else inside & ~padding
    voi = window.choose_voi(header, settings.voi_index) if settings.window == "tag" else None
    if voi:
        table, limits = window.voi_table(header, voi), window.voi_limits(voi)
    else:
        low, high = lowest, max(highest, lowest + 1)
        if settings.window != "minmax":
            low, high = window.tissue_percentiles(np.concatenate([thumb[inside] for thumb in thumbs]))
        table = window.linear_table(header, low, high)
        limits = tuple(sorted((window.rescaled(header, low), window.rescaled(header, high))))
    flipped, upside_down, conflict = _orientation(tissue, header, row, settings)
    seen = {"mask_suspect": tissue.suspect, "laterality_conflict": conflict, "upside_down": upside_down}
    seen |= dict.fromkeys(tissue.marks, True)
    seen["window_fallback"] = settings.window == "tag" and voi is None
    flags = [name for name, present in seen.items() if present]
    return Prepared(header, settings, frames, shown, tissue, source, box, mask, table, limits, flipped, flags)


def _halvings(header: Header, settings: Settings) -> int:
    """How often JPEG 2000 may be halved: twice the record's size is left."""
    if not (settings.fast_j2k and is_j2k(header)):
        return 0
    target = max(settings.size or (settings.long_side,))
    if settings.mm_per_px and header.pixel_mm:
        target = max(header.rows, header.columns) * header.pixel_mm / settings.mm_per_px
    return max(0, min(5, int(np.log2(max(header.rows, header.columns) / (2 * target)))))


def _without_border(frame: np.ndarray, border: int) -> np.ndarray:
    return frame[border : frame.shape[0] - border, border : frame.shape[1] - border] if border else frame


def _check_tissue(tissue: Tissue, shown: np.ndarray) -> None:
    """Reject what cannot be a breast: no tissue, no contrast, no structure."""
    area = float(tissue.mask.mean())
    if area == 0:
        raise Reject("empty_tissue", "no tissue found")
    if area < MIN_TISSUE:
        needed = f"expected at least {MIN_TISSUE:.0%}"
        raise Reject("tissue_fraction", f"tissue covers {area:.1%} of the frame, {needed}")
    needed = max(8, (1 << int(shown.max()).bit_length()) // 128)
    columns = np.flatnonzero(tissue.mask.any(0))
    columns = slice(columns[0], columns[-1] + 1)  # no other is looked at from here on
    mask, shown = tissue.mask[:, columns], shown[:, columns]
    low, high = np.percentile(shown[mask], window.PERCENTILES)
    if high - low < needed:
        raise Reject("low_contrast", f"tissue spans {high - low:.0f} grey levels, expected at least {needed}")
    both = mask[:, 1:] & mask[:, :-1]
    similar = np.corrcoef(shown[:, 1:][both], shown[:, :-1][both])[0, 1]
    if similar < 0.5:  # breasts are above 0.9
        raise Reject("qc", f"no tissue structure: correlation of neighbouring pixels {similar:.2f}")


def _box(mask: np.ndarray, frame: np.ndarray, source: tuple[int, int], header: Header, settings: Settings):
    """The part of the frame that becomes the record: (y0, x0, y1, x1) in source pixels, and its place in the
    mask's thumbnail as slices."""
    if settings.box == "varying":
        small = _varying_box(frame, header)
        shape = frame.shape
    else:
        small = _tissue_box(mask) if settings.box == "tissue" else (0, 0, *mask.shape)
        shape = mask.shape
    y0, x0, y1, x1 = small
    if settings.size and settings.fit == "center":  # short side to `size`, then the central part
        height, width = y1 - y0, x1 - x0
        aspect = settings.size[0] / settings.size[1]
        cut_y, cut_x = max(0, height - round(width * aspect)), max(0, width - round(height / aspect))
        y0, x0 = y0 + cut_y // 2, x0 + cut_x // 2
        y1, x1 = y0 + height - cut_y, x0 + width - cut_x
    b = settings.border
    y, x = (source[0] - 2 * b) / shape[0], (source[1] - 2 * b) / shape[1]
    box = tuple(round(v * s) + b for v, s in zip((y0, x0, y1, x1), (y, x, y, x), strict=True))
    y, x = mask.shape[0] / shape[0], mask.shape[1] / shape[1]
    return box, (slice(round(y0 * y), round(y1 * y)), slice(round(x0 * x), round(x1 * x)))


def _tissue_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The mask's box, trimmed of end rows where the mask is narrower than 5 % of the box."""
    columns = np.flatnonzero(mask.any(0))
    rows = np.flatnonzero(mask.sum(1) >= 0.05 * (columns[-1] + 1 - columns[0]))
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[y0:y1].any(0))
    return y0, int(columns[0]), y1, int(columns[-1]) + 1


def _varying_box(frame: np.ndarray, header: Header) -> tuple[int, int, int, int]:
    """Mammo-CLIP's crop: of the frame in 0..255 with <= 40 as 0, the longest run of columns that are not
    constant in the central 80 % of rows, and of rows in the central 80 % of columns."""
    table = window.linear_table(header, int(frame.min()), max(int(frame.max()), int(frame.min()) + 1))
    image = table[frame]
    image[image <= 40] = 0
    height, width = image.shape
    rows = image[height // 2 - int(0.4 * height) : height // 2 + int(0.4 * height)]
    columns = image[:, width // 2 - int(0.4 * width) : width // 2 + int(0.4 * width)]
    x0, x1 = _longest_run(rows.max(0) != rows.min(0))
    y0, y1 = _longest_run(columns.max(1) != columns.min(1))
    return y0, x0, y1, x1


def _longest_run(on: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    if not starts.size:
        raise Reject("empty_tissue", "every row or column is constant")
    longest = int((ends - starts).argmax())
    return int(starts[longest]), int(ends[longest])


def _output_size(box: tuple[int, int, int, int], header: Header, settings: Settings) -> tuple[int, int]:
    """(height, width) of the record. --long-side never enlarges; --mm-per-px is one scale for all."""
    height, width = box[2] - box[0], box[3] - box[1]
    if settings.size:
        return settings.size
    if settings.mm_per_px is None:
        scale = min(1.0, settings.long_side / max(height, width))
    elif header.pixel_mm is None:
        raise Reject("no_spacing", "pixel spacing unknown, needed by --mm-per-px")
    else:
        scale = header.pixel_mm / settings.mm_per_px
        if max(height, width) * scale > MAX_SIDE:
            raise Reject("too_large", f"a record of {max(height, width) * scale:.0f} px")
    return max(1, round(height * scale)), max(1, round(width * scale))


def _orientation(tissue: Tissue, header: Header, row: Row | None, settings: Settings) -> tuple:
    """(mirror left-right, turn upside down, whether table, header and pixels disagree). The pixels decide on
    which side the chest wall is, but for `Row.upright`: there the table does, and the image is turned by 180
    degrees (both mirrors) where the pixels say otherwise."""
    table, seen = row and row.laterality, tissue.chest_wall
    if settings.flip == "none":
        return False, False, False
    if row and row.upright and table:
        where = _SIDES[table]
        turned, conflict = seen not in (None, where), False
    else:
        said, turned = header.chest_wall or _SIDES.get(table), False
        conflict = None not in (table, header.laterality) and table != header.laterality
        if said in ("top", "bottom"):
            return False, False, conflict  # lying images (stereo) are left as they are
        where = seen or said
        conflict |= None not in (seen, said) and seen != said
    wanted = "left" if settings.flip == "chest_wall" else _SIDES.get(table or header.laterality, where)
    return (where is not None and where != wanted) != turned, turned, conflict
