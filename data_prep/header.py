"""What the header says of a mammogram: the few facts we need, or the reason why the file is not for us.

Nothing leaves this module but the fields of `Header`. The four original ids among them are hashed before they
are written anywhere (build.py); everything else in a DICOM header (names, dates, free text) is never kept.
Sources: DICOM PS3.3 (C.8.11 mammography, C.8.31 tomosynthesis functional groups), PS3.16 CID 4014 and 4015.
"""

import itertools
import re
from dataclasses import dataclass, field

import pydicom
from pydicom.uid import UID

MAX_SIDE, MAX_FRAMES = 20_000, 400  # larger claims are corrupt headers, not detectors
VIEWS = ("CC", "MLO", "ML", "LM", "LMO", "XCCL", "XCCM", "FB", "SIO", "ISO", "AT")

_MG = "1.2.840.10008.5.1.4.1.1.1.2"
_FOR_PROCESSING = f"{_MG}.1"
_TOMOSYNTHESIS = "1.2.840.10008.5.1.4.1.1.13.1.3"
_PROJECTIONS = ("1.2.840.10008.5.1.4.1.1.13.1.4", "1.2.840.10008.5.1.4.1.1.13.1.5")
_CT = "1.2.840.10008.5.1.4.1.1.2"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"

# CID 4014 and 4015: SCT codes, and the SRT codes that older files use.
_VIEW_CODES = {
    "399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO",
    "399260004": "ML", "R-10224": "ML",
    "399352003": "LM", "R-10228": "LM", "399099002": "LMO", "R-10230": "LMO", "399192008": "XCCL",
    "R-1024A": "XCCL", "399101009": "XCCM", "R-1024B": "XCCM", "399196006": "FB", "R-10244": "FB",
    "399188001": "SIO", "R-102D0": "SIO", "441555000": "ISO", "R-40AAA": "ISO",
    "127457009": "SPECIMEN", "G-8310": "SPECIMEN",
}  # fmt: skip
_MODIFIER_CODES = {
    "399163009": "magnification", "R-102D6": "magnification", "399055006": "spot", "R-102D7": "spot",
    "399209000": "implant_displaced", "R-102D5": "implant_displaced", "399110001": "tangential",
    "R-102C2": "tangential", "399011000": "axillary_tail", "R-102D1": "axillary_tail",
    "399161006": "cleavage", "R-102D2": "cleavage",
    "414493004": "rolled", "R-102CA": "rolled", "415670009": "rolled", "R-102C9": "rolled",
    "399197002": "rolled", "R-102D3": "rolled", "399226006": "rolled", "R-102D4": "rolled",
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
    voi: dict = field(
        default_factory=dict, hash=False
    )  # centre, width, function, or lut with its first value
    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""


def read_header(ds: pydicom.Dataset) -> Header:
    """Turn a DICOM data set into a `Header`.

    Raises:
      Reject: the object is no mammogram that we can use; the code says why.
    """
    syntax = UID(
        getattr(getattr(ds, "file_meta", None), "TransferSyntaxUID", None)
        or pydicom.uid.ImplicitVRLittleEndian
    )
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
    modifier = _view_modifier(ds)
    flags = _flags_or_reject(ds, modifier)
    frames, positions = _slice_order(ds, count)
    allocated, bits, high_bit, signed = _pixel_format(ds)
    measures = _group(ds, "PixelMeasuresSequence")
    pixel_mm, pixel_mm_source = _spacing(ds, measures)
    spacing = _number(measures, "SpacingBetweenSlices") or _number(ds, "SpacingBetweenSlices")
    slab = _number(measures, "SliceThickness") or _number(ds, "SliceThickness")
    transform = _group(ds, "PixelValueTransformationSequence")  # tomosynthesis; elsewhere `ds` itself
    slope = _number(transform, "RescaleSlope") or 1.0
    return Header(
        kind=kind, rows=rows, columns=columns, frames=frames, positions_mm=positions,
        laterality=_laterality(ds), view=_view(ds), view_modifier=modifier,
        manufacturer=_label(ds, "Manufacturer"), model=_label(ds, "ManufacturerModelName"),
        implant={"YES": True, "NO": False}.get(_text(ds, "BreastImplantPresent")),
        slice_mm=_gap(positions) or spacing if kind == "dbt" else None,
        slab_mm=slab if kind == "dbt" else None,
        pixel_mm=pixel_mm, pixel_mm_source=pixel_mm_source, flags=flags, chest_wall=_chest_wall(ds),
        syntax=str(syntax), bits_allocated=allocated, bits=bits, high_bit=high_bit, signed=signed,
        inverted=photometric == "MONOCHROME1", for_processing=_for_processing(ds),
        slope=slope, intercept=_number(transform, "RescaleIntercept") or 0.0,
        padding=_padding(ds, bits, signed), voi=_voi(ds),
        patient=str(ds.get("PatientID", "") or ""), study=str(ds.get("StudyInstanceUID", "") or ""),
        series=str(ds.get("SeriesInstanceUID", "") or ""), instance=str(ds.get("SOPInstanceUID", "") or ""),
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
    if sop.startswith(_SECONDARY_CAPTURE):
        if any(element.tag.group == 0x7E01 for element in ds):
            raise Reject(
                "hologic_sco",
                "proprietary Hologic container; export it as Breast Tomosynthesis Image Storage",
            )
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


def _flags_or_reject(ds, modifier: str | None) -> tuple[str, ...]:
    if _text(ds, "QualityControlImage") == "YES":
        raise Reject("qc", "QualityControlImage is YES")
    if _view(ds) == "SPECIMEN":
        raise Reject("specimen", "specimen radiograph")
    magnification = _number(ds, "EstimatedRadiographicMagnificationFactor") or 1.0
    if modifier in ("spot", "magnification") or magnification > 1.2:
        raise Reject("spot_mag", modifier or f"magnification factor {magnification:g}")
    flags = []
    if "STEREO" in _text(ds, "ImageType"):
        flags.append("stereo")  # biopsy guidance: no other attribute tells it from a screening view
    if _text(ds, "BreastImplantPresent") == "YES" or modifier == "implant_displaced":
        flags.append("implant")
    if _text(ds, "LossyImageCompression") == "01":
        flags.append("lossy")
    return tuple(flags)


def _pixel_format(ds) -> tuple[int, int, int, bool]:
    allocated = int(_number(ds, "BitsAllocated") or 0)
    bits = int(_number(ds, "BitsStored") or allocated)
    high_bit = ds.get("HighBit")
    high_bit = bits - 1 if high_bit in (None, "") else int(high_bit)
    if allocated not in (8, 16) or not 1 < bits <= allocated or not bits - 1 <= high_bit < allocated:
        raise Reject("highbit", f"BitsAllocated {allocated}, BitsStored {bits}, HighBit {high_bit}")
    return allocated, bits, high_bit, int(_number(ds, "PixelRepresentation") or 0) == 1


def _for_processing(ds) -> bool:
    intent = _text(ds, "PresentationIntentType")
    return intent == "FOR PROCESSING" or (not intent and str(ds.get("SOPClassUID", "")) == _FOR_PROCESSING)


def _slice_order(ds, count: int) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Frame numbers sorted along the slice normal, with positions in mm (None where the header has none)."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    sources = [_first(group, "PlanePositionSequence") for group in per_frame] if per_frame else [ds]
    places = [_numbers(source, "ImagePositionPatient") for source in sources]
    axes = _numbers(_group(ds, "PlaneOrientationSequence"), "ImageOrientationPatient")
    if len(places) != count or any(len(place) != 3 for place in places) or len(axes) != 6:
        return tuple(range(count)), (None,) * count
    (a, b, c), (d, e, f) = axes[:3], axes[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    depth = [sum(n * p for n, p in zip(normal, place, strict=True)) for place in places]
    order = sorted(range(count), key=lambda i: (depth[i], i))
    return tuple(order), tuple(round(depth[i], 4) for i in order)


def _gap(positions: tuple[float | None, ...]) -> float | None:
    """Median distance of neighbouring slices."""
    if len(positions) < 2 or positions[0] is None:
        return None
    gaps = sorted(b - a for a, b in itertools.pairwise(positions))
    return round(gaps[len(gaps) // 2], 4) or None


def _spacing(ds, measures) -> tuple[float | None, str | None]:
    """Row spacing in mm and the attribute it came from. ImagerPixelSpacing is that of the detector plane."""
    choices = [(ds, "ImagerPixelSpacing", "imager"), (ds, "PixelSpacing", "pixel_spacing"),
               (ds, "NominalScannedPixelSpacing", "nominal_scanned")]  # fmt: skip
    if measures is not ds:
        choices.insert(0, (measures, "PixelSpacing", "pixel_measures"))
    for source, keyword, name in choices:
        values = _numbers(source, keyword)
        if values and values[0] > 0:
            return values[0], name
    return None, None


def _padding(ds, bits: int, signed: bool) -> tuple[int, int] | None:
    """Range of padding values as stored, low first: MONOCHROME1 files give the limit below the value."""
    values = [_number(ds, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    values = [int(v) for v in values if v is not None]
    if ds.get("PixelPaddingValue") is None or not values:
        return None
    if not signed:
        values = [v & ((1 << bits) - 1) for v in values]  # unsigned pixels, but written with a signed VR
    return min(values), max(values)


def _voi(ds) -> dict:
    """The first window or VOI LUT of the header; empty where it has none that is valid."""
    group = _group(ds, "FrameVOILUTSequence")
    lut = _first(ds, "VOILUTSequence")
    if lut is not ds and lut.get("LUTDescriptor") and lut.get("LUTData"):
        count, first, bits = (int(v) for v in lut.LUTDescriptor)
        data = lut.LUTData
        if isinstance(data, bytes):
            data = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
        if len(data) >= (count or 65536):
            return {"lut": [int(v) for v in data], "first": first, "bits": bits}
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
    found = set(re.findall(r"\b(?:(L)(?:EFT)?|(R)(?:IGHT)?)(?=\b|[ -]?(?:CC|MLO|ML|LM|XCC))", words))
    sides = {left or right for left, right in found}
    return sides.pop() if len(sides) == 1 else None


def _view(ds) -> str | None:
    position = _text(ds, "ViewPosition")
    if position in (*VIEWS, "SPECIMEN"):
        return position
    codes = _first(ds, "ViewCodeSequence")
    if codes is not ds and str(codes.get("CodeValue", "")) in _VIEW_CODES:
        return _VIEW_CODES[str(codes.CodeValue)]
    # Some converted films carry the view in PatientOrientation; others only in the description.
    for text in (_text(ds, "PatientOrientation"), position, _text(ds, "SeriesDescription")):
        for word in re.findall(r"[A-Z]+", text):
            word = word[1:] if word[:1] in "LR" and word[1:] in VIEWS else word
            if word in VIEWS:
                return word
    return None


def _view_modifier(ds) -> str | None:
    for code in (ds.get("ViewCodeSequence") or [])[:1]:
        for modifier in code.get("ViewModifierCodeSequence") or []:
            name = _MODIFIER_CODES.get(str(modifier.get("CodeValue", "")))
            if name:
                return name
    return None


def _chest_wall(ds) -> str | None:
    """The side of the chest wall: from PatientOrientation (rows, columns point to A or P), else from the
    side."""
    orientation = ds.get("PatientOrientation")
    if orientation is not None and not isinstance(orientation, str) and len(orientation) == 2:
        along_row, along_column = (str(v).upper() for v in orientation)
        for text, anterior, posterior in ((along_row, "left", "right"), (along_column, "top", "bottom")):
            if text[:1] in ("A", "P"):
                return anterior if text[0] == "A" else posterior
    return {"L": "left", "R": "right"}.get(_laterality(ds))


def _group(ds, sequence: str):
    """The functional group `sequence` of the shared, else of the first frame's groups; `ds` where there is
    none."""
    for outer in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        groups = ds.get(outer) or []
        if groups and groups[0].get(sequence):
            return groups[0].get(sequence)[0]
    return ds


def _first(ds, sequence: str):
    items = ds.get(sequence) or []
    return items[0] if items else ds


def _text(ds, keyword: str) -> str:
    value = ds.get(keyword)
    if value is None:
        return ""
    parts = [value] if isinstance(value, str) else value if hasattr(value, "__iter__") else [value]
    return "\\".join(str(part).strip().upper() for part in parts)


def _label(ds, keyword: str) -> str | None:
    return str(ds.get(keyword) or "").strip()[:64] or None


def _numbers(ds, keyword: str) -> list[float]:
    """The values of a numeric attribute; empty where absent, blank or not numbers."""
    value = ds.get(keyword)
    if value is None or value == "":
        return []
    try:
        numbers = [
            float(v)
            for v in (value if hasattr(value, "__iter__") and not isinstance(value, str) else [value])
        ]
    except (TypeError, ValueError):
        return []
    return [n for n in numbers if n == n and abs(n) != float("inf")]


def _number(ds, keyword: str) -> float | None:
    values = _numbers(ds, keyword)
    return values[0] if values else None
