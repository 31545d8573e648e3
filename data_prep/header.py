"""What the header says of a mammogram: the few facts we need, or the reason why the file is not for us.

Nothing leaves this module but the fields of `Header`. The four original ids among them are hashed before they
are written anywhere (shards.py); everything else in a DICOM header (names, dates, free text) is never kept.
Sources: DICOM PS3.3 (C.8.11 mammography, C.8.31 tomosynthesis functional groups), PS3.16 CID 4014 and 4015.
"""

import itertools
import math
import re
from dataclasses import dataclass, field

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import UID, ImplicitVRLittleEndian

MAX_SIDE, MAX_FRAMES = 20_000, 400  # larger claims are corrupt headers, not detectors
VIEWS = ("CC", "MLO", "ML", "LM", "LMO", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT")

_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.2.1"
_TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"
_PROJECTIONS = ("1.2.840.10008.5.1.4.1.1.13.1.4", "1.2.840.10008.5.1.4.1.1.13.1.5")
_CT = "1.2.840.10008.5.1.4.1.1.2"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7."  # and its multi-frame kin 7.1 to 7.4
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"

# CID 4014 and 4015: SCT codes, and the SRT codes that older files use.
_VIEW_CODES = {
    "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO", "399260004": "ML",
    "R-10224": "ML", "399352003": "LM", "R-10228": "LM", "399099002": "LMO", "R-10230": "LMO",
    "399192008": "XCCL", "R-1024A": "XCCL", "399101009": "XCCM", "R-1024B": "XCCM", "399196006": "FB",
    "R-10244": "FB", "399188001": "SIO", "R-102D0": "SIO", "441555000": "ISO", "R-40AAA": "ISO",
    "127457009": "SPECIMEN", "G-8310": "SPECIMEN",
}  # fmt: skip
_MODIFIER_CODES = {
    "399163009": "magnification", "R-102D6": "magnification", "399055006": "spot", "R-102D7": "spot",
    "399209000": "implant_displaced", "R-102D5": "implant_displaced", "399110001": "tangential",
    "R-102C2": "tangential", "399011000": "axillary_tail", "R-102D1": "axillary_tail",
    "399161006": "cleavage", "R-102D2": "cleavage", "414493004": "rolled", "R-102CA": "rolled",
    "415670009": "rolled", "R-102C9": "rolled", "399197002": "rolled", "R-102D3": "rolled",
    "399226006": "rolled", "R-102D4": "rolled",
}  # fmt: skip
_SYNTHETIC = re.compile(r"C-?VIEW|SYNTH\w* ?2D|\bS-?2D|INTELLIGENT 2D|INSIGHT 2D|V-?PREVIEW")


class Reject(Exception):
    """A file that yields no record. `detail` is a sentence, `code` one of:

    File: not_dicom, unreadable, truncated, too_large, decode_error, unsupported_syntax, highbit,
    not_monochrome.
    Object: unsupported_class, secondary_capture, hologic_sco, projection, spot_mag, specimen, qc (also by its
    pixels: no tissue structure), for_processing (a FOR PRESENTATION sibling exists), duplicate, no_spacing.
    Pixels: empty_tissue, tissue_fraction, low_contrast. failed: an error of ours, to be reported.
    """

    def __init__(self, code: str, detail: str = ""):
        super().__init__(code, detail)  # both in args, so that the pair survives pickling between processes
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


@dataclass(frozen=True)
class Header:
    """Header facts of one image or volume. Lengths are in mm, padding in stored pixel values."""

    kind: str  # 2d | synthetic2d | dbt | film
    rows: int  # 0 where the file is no DICOM: its pixels have to be decoded to know
    columns: int
    frames: tuple[int, ...] = (0,)  # frame numbers of the file in slice order
    positions_mm: tuple[float | None, ...] = (None,)  # along the slice normal, in the order of `frames`
    laterality: str | None = None
    view: str | None = None
    view_modifier: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    implant: bool | None = None
    slice_mm: float | None = None  # distance between neighbouring slices
    slab_mm: float | None = None  # thickness of one slice
    pixel_mm: float | None = None
    pixel_mm_source: str | None = None
    flags: tuple[str, ...] = ()
    chest_wall: str | None = None  # the side on which the header puts it: left | right | top | bottom
    syntax: str = ""  # transfer syntax UID; empty for PNG, JPEG, PGM and TIFF
    bits_allocated: int = 16
    bits: int = 16
    high_bit: int = 15
    signed: bool = False
    inverted: bool = False  # MONOCHROME1
    for_processing: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    padding: tuple[int, int] | None = None
    voi: dict = field(default_factory=dict)  # centre, width, function, or lut with its first value and bits
    patient: str = ""  # original ids
    study: str = ""
    instance: str = ""

    @property
    def offset(self) -> int:
        """What `Frames` adds to stored values so that none is negative."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def reversed(self) -> bool:
        """True where greater stored values are darker on the display."""
        return self.inverted != (self.slope < 0)


def read_header(ds: pydicom.Dataset) -> Header:
    """Turn a DICOM data set into a `Header`.

    Raises:
      Reject: the object is no mammogram that we can use; the code says why.
    """
    kind = _kind(ds)
    rows, columns, count = (int(_number(ds, name) or 0) for name in ("Rows", "Columns", "NumberOfFrames"))
    if not rows or not columns:
        raise Reject("truncated", "no Rows or Columns")
    count = max(count, 1)  # 0 and absent both mean one frame
    if max(rows, columns) > MAX_SIDE or count > MAX_FRAMES:
        raise Reject("too_large", f"{count} frames of {rows} x {columns}")
    photometric = _text(ds, "PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(_number(ds, "SamplesPerPixel") or 1) != 1:
        raise Reject("not_monochrome", photometric or "no PhotometricInterpretation")
    if count > 1 and kind != "dbt":
        raise Reject("unsupported_class", f"{count} frames, but not a tomosynthesis object")
    modifiers = _view_modifiers(ds)
    flags = _flags_or_reject(ds, modifiers)
    frames, positions, gap = _slice_order(ds, count)
    allocated, bits, high_bit, signed = _pixel_format(ds)
    measures = _group(ds, "PixelMeasuresSequence")
    pixel_mm, pixel_mm_source = _spacing(ds, measures)
    spacing, slab = (
        _number(measures, name) or _number(ds, name) for name in ("SpacingBetweenSlices", "SliceThickness")
    )
    transform = _group(ds, "PixelValueTransformationSequence")  # tomosynthesis; elsewhere `ds` itself
    intent = _text(ds, "PresentationIntentType")
    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None) or ImplicitVRLittleEndian
    return Header(
        kind=kind, rows=rows, columns=columns, frames=frames, positions_mm=positions,
        laterality=_laterality(ds), view=_view(ds), view_modifier=modifiers[0] if modifiers else None,
        manufacturer=_label(ds, "Manufacturer"), model=_label(ds, "ManufacturerModelName"),
        implant={"YES": True, "NO": False}.get(_text(ds, "BreastImplantPresent")),
        slice_mm=gap or spacing if kind == "dbt" else None, slab_mm=slab if kind == "dbt" else None,
        pixel_mm=pixel_mm, pixel_mm_source=pixel_mm_source, flags=flags, chest_wall=_chest_wall(ds),
        syntax=str(syntax), bits_allocated=allocated, bits=bits, high_bit=high_bit, signed=signed,
        inverted=photometric == "MONOCHROME1", slope=_number(transform, "RescaleSlope") or 1.0,
        for_processing=(intent or ds.get("SOPClassUID")) in ("FOR PROCESSING", _FOR_PROCESSING),
        intercept=_number(transform, "RescaleIntercept") or 0.0,
        padding=_padding(ds, bits, signed), voi=_voi(ds),
        patient=str(ds.get("PatientID") or ""), study=str(ds.get("StudyInstanceUID") or ""),
        instance=str(ds.get("SOPInstanceUID") or ""),
    )  # fmt: skip


def _kind(ds) -> str:
    """2d | synthetic2d | dbt | film from class, image type and description; rejects what is no mammogram."""
    sop, modality = str(ds.get("SOPClassUID", "")), _text(ds, "Modality")
    image_type, description = _text(ds, "ImageType"), _text(ds, "SeriesDescription")
    breast = "BREAST" in _text(ds, "BodyPartExamined") or modality == "MG"
    if sop == _MEDIA_DIRECTORY:
        raise Reject("unsupported_class", "DICOMDIR")
    if sop in _PROJECTIONS or "TOMO_PROJ" in image_type:
        raise Reject("projection", "tomosynthesis projection, not a slice")
    if sop == _TOMOSYNTHESIS:
        return "dbt"
    if f"{sop}.".startswith(_SECONDARY_CAPTURE):
        if any(element.tag.group == 0x7E01 for element in ds):
            how = "export it as Breast Tomosynthesis Image Storage"
            raise Reject("hologic_sco", f"proprietary Hologic container; {how}")
        if not breast:
            raise Reject("secondary_capture", f"modality {modality or 'unknown'}")
        return "film"  # digitised films are stored as secondary captures
    if sop == _CT:
        if "TOMO" in image_type or "TOMO" in description:
            return "dbt"  # one slice a file, as some archives export volumes
        raise Reject("unsupported_class", "CT, not tomosynthesis")
    if not breast:
        raise Reject("unsupported_class", UID(sop).name if sop else "no SOP class")
    if "GENERATED_2D" in image_type or "TOMOSYNTHESIS" in image_type or _SYNTHETIC.search(description):
        return "synthetic2d"
    return "2d"


def _flags_or_reject(ds, modifiers: list[str]) -> tuple[str, ...]:
    if _text(ds, "QualityControlImage") == "YES":
        raise Reject("qc", "QualityControlImage is YES")
    if _view(ds) == "SPECIMEN":
        raise Reject("specimen", "specimen radiograph")
    magnification = _number(ds, "EstimatedRadiographicMagnificationFactor") or 1.0
    enlarged = [name for name in modifiers if name in ("spot", "magnification")]
    if enlarged or magnification > 1.2:
        raise Reject("spot_mag", enlarged[0] if enlarged else f"magnification factor {magnification:g}")
    flags = {
        "stereo": "STEREO" in _text(ds, "ImageType"),  # biopsy guidance: nothing else tells it from screening
        "implant": _text(ds, "BreastImplantPresent") == "YES" or "implant_displaced" in modifiers,
        "lossy": _text(ds, "LossyImageCompression") == "01",
    }
    return tuple(name for name, present in flags.items() if present)


def _pixel_format(ds) -> tuple[int, int, int, bool]:
    """BitsAllocated, BitsStored, HighBit, signed."""
    allocated = int(_number(ds, "BitsAllocated") or 0)
    bits = int(_number(ds, "BitsStored") or allocated)
    high_bit = next((int(v) for v in _numbers(ds, "HighBit")), bits - 1)
    if allocated not in (8, 16) or not 1 < bits <= allocated or not bits - 1 <= high_bit < allocated:
        raise Reject("highbit", f"BitsAllocated {allocated}, BitsStored {bits}, HighBit {high_bit}")
    return allocated, bits, high_bit, _number(ds, "PixelRepresentation") == 1


def _slice_order(ds, count: int) -> tuple[tuple[int, ...], tuple[float | None, ...], float | None]:
    """Frame numbers sorted along the slice normal, their positions in mm, and the median distance of
    neighbours (None where the header has no positions)."""
    groups = ds.get("PerFrameFunctionalGroupsSequence")
    sources = [_first(group, "PlanePositionSequence") for group in groups] if groups else [ds]
    places = [_numbers(source, "ImagePositionPatient") for source in sources]
    axes = _numbers(_group(ds, "PlaneOrientationSequence"), "ImageOrientationPatient")
    if len(places) != count or any(len(place) != 3 for place in places) or len(axes) != 6:
        return tuple(range(count)), (None,) * count, None
    depth = np.asarray(places) @ np.cross(axes[:3], axes[3:])
    order = np.argsort(depth, kind="stable").tolist()
    positions = tuple(round(float(depth[i]), 4) for i in order)
    gaps = sorted(b - a for a, b in itertools.pairwise(positions))
    return tuple(order), positions, round(gaps[len(gaps) // 2], 4) or None if gaps else None


def _spacing(ds, measures) -> tuple[float | None, str | None]:
    """Row spacing in mm and the attribute it came from. ImagerPixelSpacing is that of the detector plane."""
    choices = [(ds, "ImagerPixelSpacing", "imager"), (ds, "PixelSpacing", "pixel_spacing"),
               (ds, "NominalScannedPixelSpacing", "nominal_scanned")]  # fmt: skip
    if measures is not ds:
        choices.insert(0, (measures, "PixelSpacing", "pixel_measures"))
    for source, keyword, name in choices:
        if (value := _number(source, keyword) or 0) > 0:
            return value, name
    return None, None


def _padding(ds, bits: int, signed: bool) -> tuple[int, int] | None:
    """Range of padding values as stored, low first: MONOCHROME1 files give the limit below the value."""
    value = _number(ds, "PixelPaddingValue")
    if value is None:
        return None
    limit = _number(ds, "PixelPaddingRangeLimit")
    ends = [int(v) for v in (value, value if limit is None else limit)]
    if not signed:
        ends = [v & ((1 << bits) - 1) for v in ends]  # unsigned pixels, but written with a signed VR
    return min(ends), max(ends)


def _voi(ds) -> dict:
    """The first window or VOI LUT of the header; empty where it has none that is valid."""
    lut = _first(ds, "VOILUTSequence")
    if lut is not ds and lut.get("LUTDescriptor") and lut.get("LUTData"):
        count, first, bits = (int(v) for v in lut.LUTDescriptor)
        data = lut.LUTData
        if isinstance(data, bytes):
            data = np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist()
        if len(data) >= (count or 65536):
            return {"lut": [int(v) for v in data], "first": first, "bits": bits}
    group = _group(ds, "FrameVOILUTSequence")
    centres, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
    if not centres or len(centres) != len(widths) or widths[0] <= 0:
        return {}
    return {"centre": centres[0], "width": widths[0], "function": _text(group, "VOILUTFunction") or "LINEAR"}


def _laterality(ds) -> str | None:
    frame = _group(ds, "FrameAnatomySequence")
    for text in (_text(ds, "ImageLaterality"), _text(frame, "FrameLaterality"), _text(ds, "Laterality")):
        if text in ("L", "R"):
            return text
    words = f"{_text(ds, 'ViewPosition')} {_text(ds, 'SeriesDescription')}"
    sides = re.findall(r"\b(L(?:EFT)?|R(?:IGHT)?)(?=\b|[ -]?(?:CC|MLO|ML|LM|XCC))", words)
    return sides[0][0] if len({side[0] for side in sides}) == 1 else None


def _view(ds) -> str | None:
    position = _text(ds, "ViewPosition")
    if position in (*VIEWS, "SPECIMEN"):
        return position
    code = _text(_first(ds, "ViewCodeSequence"), "CodeValue")
    if code in _VIEW_CODES:
        return _VIEW_CODES[code]
    # Some converted films carry the view in PatientOrientation; others only in the description.
    words = f"{_text(ds, 'PatientOrientation')} {position} {_text(ds, 'SeriesDescription')}"
    found = re.search(rf"(?<![A-Z])[LR]?({'|'.join(VIEWS)})(?![A-Z])", words)
    return found and found[1]


def _view_modifiers(ds) -> list[str]:
    codes = _first(ds, "ViewCodeSequence").get("ViewModifierCodeSequence") or []
    return [_MODIFIER_CODES[v] for v in (_text(code, "CodeValue") for code in codes) if v in _MODIFIER_CODES]


def _chest_wall(ds) -> str | None:
    """The side of the chest wall: from PatientOrientation (rows, columns point to A or P), else from the
    side."""
    ends = [str(value)[:1].upper() for value in _values(ds, "PatientOrientation")]
    along_row, along_column = ends if len(ends) == 2 else ("", "")
    said = {"A": "left", "P": "right"}.get(along_row) or {"A": "top", "P": "bottom"}.get(along_column)
    return said or {"L": "left", "R": "right"}.get(_laterality(ds))


def _group(ds, sequence: str):
    """The functional group `sequence` of the shared, else of the first frame's groups, else `ds` itself."""
    for outer in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if items := _first(ds, outer).get(sequence):
            return items[0]
    return ds


def _first(ds, sequence: str):
    return (ds.get(sequence) or [ds])[0]


def _values(ds, keyword: str) -> list:
    """The values of an attribute; empty where it is absent or blank."""
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | MultiValue) else [value]


def _text(ds, keyword: str) -> str:
    return "\\".join(str(value).strip().upper() for value in _values(ds, keyword))


def _label(ds, keyword: str) -> str | None:
    return str(ds.get(keyword) or "").strip()[:64] or None


def _numbers(ds, keyword: str) -> list[float]:
    """The values of a numeric attribute; empty where absent, blank or not numbers."""
    try:
        return [number for number in map(float, _values(ds, keyword)) if math.isfinite(number)]
    except (TypeError, ValueError):
        return []


def _number(ds, keyword: str) -> float | None:
    return next(iter(_numbers(ds, keyword)), None)
