"""What the header says of a mammogram: the few facts we need, or the reason why the file is not for us.

Nothing leaves this module but the fields of `Header`. The original ids among them are hashed before they
are written anywhere (shards.py); everything else in a DICOM header (names, dates, free text) is never kept.
Sources: DICOM PS3.3 (C.8.11 mammography, C.8.31 tomosynthesis functional groups), PS3.16 CID 4014 and 4015.
"""

import itertools
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from data_prep import vendors
from data_prep.reject import Reject

MAX_SIDE, MAX_PIXELS, MAX_FRAMES = 20_000, 100_000_000, 400  # larger claims are corrupt headers
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


@dataclass(frozen=True)
class Header:
    """Header facts of one image or volume. Lengths are in mm, padding in stored pixel values."""

    kind: str  # 2d | synthetic2d | dbt | film
    rows: int  # 0 where the file is no DICOM: its pixels have to be decoded to know
    columns: int
    frames: tuple[int, ...] = (0,)  # frame numbers of the file in slice order
    positions_mm: tuple[float | None, ...] = (None,)  # along the slice normal, in the order of `frames`
    places: tuple[int, ...] = ()  # a volume of one file a slice: which file each slice is in; else empty
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
    exposure_log: bool = False  # FOR PROCESSING: the logarithm has been taken already
    exposure_sign: int = 1  # FOR PROCESSING: 1: greater values are more exposure, -1: less
    slope: float = 1.0
    intercept: float = 0.0
    padding: tuple[int, int] | None = None
    voi: tuple[dict, ...] = ()  # LUTs first, then windows: lut, first, bits; or centre, width, function
    patient: str = ""  # original ids
    study: str = ""
    series: str = ""
    instance: str = ""
    number: int = 0  # InstanceNumber: orders slices that have no position

    @property
    def offset(self) -> int:
        """What `Frames` adds to stored values so that none is negative."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def reversed(self) -> bool:
        """True where greater stored values are darker on the display."""
        return self.inverted != (self.slope < 0)


def read_header(ds: pydicom.Dataset, vendor_table: str = "") -> Header:
    """Turn a DICOM data set into a `Header`; `vendor_table` is the text of --vendors.

    Raises:
      Reject: the object is no mammogram that we can use; the code says why.
    """
    kind = _kind(ds)
    rows, columns, count = (int(_number(ds, name) or 0) for name in ("Rows", "Columns", "NumberOfFrames"))
    if not rows or not columns:
        raise Reject("truncated", "no Rows or Columns")
    count = max(count, 1)  # 0 and absent both mean one frame
    if max(rows, columns) > MAX_SIDE or rows * columns > MAX_PIXELS or count > MAX_FRAMES:
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
    laterality, view, conflicts = _side_and_view(ds)
    flags += conflicts
    texts = [str(ds.get(k) or "") for k in ("Manufacturer", "ManufacturerModelName", "SeriesDescription")]
    vendor = vendors.look_up(*texts, vendor_table)
    syntax = getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None)
    if not syntax:  # as pydicom guessed from the first element; explicit and implicit pixels are the same
        big = ds.original_encoding == (False, False)
        syntax = ExplicitVRBigEndian if big else ImplicitVRLittleEndian
    return Header(
        kind=kind, rows=rows, columns=columns, frames=frames, positions_mm=positions,
        laterality=laterality, view=view, view_modifier=modifiers[0] if modifiers else None,
        manufacturer=vendor["name"], model=vendor["model"],
        implant={"YES": True, "NO": False}.get(_text(ds, "BreastImplantPresent")),
        slice_mm=gap or spacing if kind == "dbt" else None, slab_mm=slab if kind == "dbt" else None,
        pixel_mm=pixel_mm, pixel_mm_source=pixel_mm_source, flags=flags,
        chest_wall=_chest_wall(ds, laterality),
        syntax=str(syntax), bits_allocated=allocated, bits=bits, high_bit=high_bit, signed=signed,
        inverted=(photometric == "MONOCHROME1") != vendor["invert"],
        slope=_number(transform, "RescaleSlope") or 1.0,
        for_processing=(intent or _class(ds)) in ("FOR PROCESSING", _FOR_PROCESSING),
        exposure_log=_text(ds, "PixelIntensityRelationship") == "LOG",
        exposure_sign=-1 if _number(ds, "PixelIntensityRelationshipSign") == -1 else 1,
        intercept=_number(transform, "RescaleIntercept") or 0.0,
        padding=_padding(ds, bits, signed), voi=_voi(ds, vendor),
        patient=str(ds.get("PatientID") or ""), study=str(ds.get("StudyInstanceUID") or ""),
        series=str(ds.get("SeriesInstanceUID") or ""), instance=str(ds.get("SOPInstanceUID") or ""),
        number=int(_number(ds, "InstanceNumber") or 0),
    )  # fmt: skip


def stack_headers(headers: list[Header]) -> Header:
    """The header of a volume that lies in one file a slice: slices by position, else by InstanceNumber.

    `places[i]` of the result is the place of slice i's file in `headers`.
    """
    depths = [h.positions_mm[0] for h in headers]
    known = None not in depths and len(set(depths)) == len(depths)
    order = sorted(range(len(headers)), key=lambda i: depths[i] if known else headers[i].number)
    positions = tuple(depths[i] if known else None for i in order)
    gap = _median_gap(positions) if known else None
    frames, flags = (0,) * len(headers), tuple({flag: None for h in headers for flag in h.flags})
    return replace(
        headers[order[0]], frames=frames, places=tuple(order), positions_mm=positions, flags=flags,
        slice_mm=gap or headers[0].slice_mm,
    )  # fmt: skip


def _kind(ds) -> str:
    """2d | synthetic2d | dbt | film from class, image type and description; rejects what is no mammogram."""
    sop, modality = _class(ds), _text(ds, "Modality")
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
        if "TOMO" in image_type and "GENERATED_2D" not in image_type:
            return "dbt"  # one slice a file, as older archives export volumes
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


def _class(ds) -> str:
    """The SOP class; that of the meta group where the data set names none, as in a DICOMDIR."""
    meta = getattr(ds, "file_meta", None) or {}
    return str(ds.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")


def _flags_or_reject(ds, modifiers: list[str]) -> tuple[str, ...]:
    if _text(ds, "QualityControlImage") == "YES":
        raise Reject("qc", "QualityControlImage is YES")
    if "SPECIMEN" in _views(ds)[:1]:
        raise Reject("specimen", "specimen radiograph")
    magnification = _number(ds, "EstimatedRadiographicMagnificationFactor") or 1.0
    enlarged = [name for name in modifiers if name in ("spot", "magnification")]
    if enlarged or magnification > 1.2:
        raise Reject("spot_mag", enlarged[0] if enlarged else f"magnification factor {magnification:g}")
    flags = {
        "stereo": "STEREO" in _text(ds, "ImageType"),  # biopsy guidance: nothing else tells it from screening
        "implant": _text(ds, "BreastImplantPresent") == "YES" or "implant_displaced" in modifiers,
        "lossy": _text(ds, "LossyImageCompression") == "01",
        "burned_in": _text(ds, "BurnedInAnnotation") == "YES",
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
    return tuple(order), positions, _median_gap(positions)


def _median_gap(positions: tuple[float, ...]) -> float | None:
    gaps = sorted(b - a for a, b in itertools.pairwise(positions))
    return round(gaps[len(gaps) // 2], 4) or None if gaps else None


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
    else:
        ends = [v - 65536 if v > 32767 else v for v in ends]  # and the other way round
    return min(ends), max(ends)


def _voi(ds, vendor: dict) -> tuple[dict, ...]:
    """The VOI LUTs and then the windows of the header, in its order, without invalid ones. A window or a
    number that the table of vendors gives goes first."""
    if vendor["window"]:
        return ({"centre": vendor["window"][0], "width": vendor["window"][1], "function": "LINEAR"},)
    found = []
    for lut in ds.get("VOILUTSequence") or []:
        if lut.get("LUTDescriptor") and lut.get("LUTData"):
            count, first, bits = (int(v) for v in lut.LUTDescriptor)
            data = lut.LUTData
            if isinstance(data, bytes):
                data = np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist()
            if len(data) >= (count or 65536) and 8 <= bits <= 16:
                values = [int(v) for v in data[: count or 65536]]
                found.append({"lut": values, "first": first, "bits": bits})
    group = _group(ds, "FrameVOILUTSequence")
    centres, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
    if len(centres) == len(widths):  # else it cannot be known which belong together
        function = _text(group, "VOILUTFunction") or "LINEAR"
        least = 1 if function == "LINEAR" else 0  # PS3.3 C.11.2.1.2: a LINEAR width of 1 is a step
        for centre, width in zip(centres, widths, strict=True):
            if width > 0 and width >= least:
                found.append({"centre": centre, "width": width, "function": function})
    preferred = vendor["voi_index"] or 0
    return tuple(found[preferred : preferred + 1] + found[:preferred] + found[preferred + 1 :])


def _side_and_view(ds) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Laterality and view by the most reliable source that has them, and the flags of sources that
    disagree."""
    sides, views = _lateralities(ds), _views(ds)
    conflicts = {"laterality_conflict": len(set(sides)) > 1, "view_conflict": len(set(views)) > 1}
    flags = tuple(name for name, present in conflicts.items() if present)
    return next(iter(sides), None), next(iter(views), None), flags


def _lateralities(ds) -> list[str]:
    """What tags, functional groups, ViewPosition and description say, most reliable first."""
    frame = _group(ds, "FrameAnatomySequence")
    tags = (_text(ds, "ImageLaterality"), _text(frame, "FrameLaterality"), _text(ds, "Laterality"))
    found = [text for text in tags if text in ("L", "R")]
    for keyword in ("ViewPosition", "SeriesDescription"):
        sides = re.findall(r"\b(L(?:EFT)?|R(?:IGHT)?)(?=\b|[ -]?(?:CC|MLO|ML|LM|XCC))", _text(ds, keyword))
        if len({side[0] for side in sides}) == 1:
            found.append(sides[0][0])
    return found


def _views(ds) -> list[str]:
    """What ViewPosition, the view code and the free texts say, most reliable first."""
    position = _text(ds, "ViewPosition")
    found = [position] if position in (*VIEWS, "SPECIMEN") else []
    code = _text(_first(ds, "ViewCodeSequence"), "CodeValue")
    if code in _VIEW_CODES:
        found.append(_VIEW_CODES[code])
    # Some converted films carry the view in PatientOrientation; others only in the description.
    for text in (_text(ds, "PatientOrientation"), position, _text(ds, "SeriesDescription")):
        words = re.findall(rf"(?<![A-Z])[LR]?({'|'.join(VIEWS)})(?![A-Z])", text)
        if len(set(words)) == 1:
            found.append(words[0])
    return found


def _view_modifiers(ds) -> list[str]:
    codes = _first(ds, "ViewCodeSequence").get("ViewModifierCodeSequence") or []
    return [_MODIFIER_CODES[v] for v in (_text(code, "CodeValue") for code in codes) if v in _MODIFIER_CODES]


def _chest_wall(ds, laterality: str | None) -> str | None:
    """The side of the chest wall: from PatientOrientation (rows, columns point to A or P), else from the
    side."""
    ends = [str(value)[:1].upper() for value in _values(ds, "PatientOrientation")]
    along_row, along_column = ends if len(ends) == 2 else ("", "")
    said = {"A": "left", "P": "right"}.get(along_row) or {"A": "top", "P": "bottom"}.get(along_column)
    return said or {"L": "left", "R": "right"}.get(laterality)


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


def _numbers(ds, keyword: str) -> list[float]:
    """The values of a numeric attribute; empty where absent, blank or not numbers."""
    try:
        return [number for number in map(float, _values(ds, keyword)) if math.isfinite(number)]
    except (TypeError, ValueError):
        return []


def _number(ds, keyword: str) -> float | None:
    return next(iter(_numbers(ds, keyword)), None)
