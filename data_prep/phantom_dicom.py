"""DICOM files of fictional mammography vendors, who differ in what trips readers of real files: pixel size,
matrix, polarity, background, padding. Dates, names and numbers are invented and fixed."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pydicom.uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

WHITE = 4095  # 12 bits
CENTER, WIDTH = 2050, 3700  # of the window on the MONOCHROME2 scale
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}


@dataclasses.dataclass(frozen=True)
class Vendor:
    name: str
    mm: float  # pixel size of a tomosynthesis slice; the 2D detector is twice as fine
    photometric: str  # of 2D images; tomosynthesis is always MONOCHROME2 (PS3.3 C.8.21.1)
    background: tuple[float, float]  # grey level of air and its noise; (0, 0) cuts air out exactly
    border: float  # mm of collimator shadow in 2D, marked by PixelPaddingValue
    gamma: float


VENDORS = (
    Vendor("Phantom A", 0.400, "MONOCHROME2", (0, 0), 0, 0.85),
    Vendor("Phantom B", 0.440, "MONOCHROME1", (130, 9), 0, 1.00),
    Vendor("Phantom C", 0.375, "MONOCHROME2", (260, 16), 2.6, 0.70),
)


def uid(what: str, *ids) -> str:
    return uids.generate_uid(entropy_srcs=["mammodino phantom", what, *map(str, ids)])


def _code(value: str, meaning: str) -> dict:
    return {"CodeValue": value, "CodingSchemeDesignator": "SCT", "CodeMeaning": meaning}


BREAST = _code("76752008", "Breast")
RESCALE = {"RescaleIntercept": "0", "RescaleSlope": "1", "RescaleType": "US"}
FIXED = {
    "SpecificCharacterSet": "ISO_IR 192", "StudyDate": "20200101", "ContentDate": "20200101",
    "StudyTime": "120000", "ContentTime": "120000", "AccessionNumber": "", "ReferringPhysicianName": "",
    "Modality": "MG", "BodyPartExamined": "BREAST", "DeviceSerialNumber": "0", "SoftwareVersions": "1",
    "StudyDescription": "SYNTHETIC digital breast phantom, no real patient", "PatientBirthDate": "",
    "PatientSex": "F", "StudyID": "1", "SeriesNumber": 1, "InstanceNumber": 1, "BreastImplantPresent": "NO",
    "LossyImageCompression": "00", "AcquisitionContextSequence": [], "SamplesPerPixel": 1,
    "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0,
}  # fmt: skip


def write_dicom(path: Path, pixels: np.ndarray, patient, laterality: str, view: str, mm: float) -> None:
    """Write u16 stored pixels, mm wide, of a phantom_breast.Patient. [Y, X] makes a Digital Mammography X-Ray
    Image For Presentation (PS3.3 A.27), [K, Y, X] a Breast Tomosynthesis Image (PS3.3 A.55) of slices 1 mm
    apart along the beam."""
    ids, vendor = (patient.seed, patient.number, path.stem), patient.vendor.name
    tags = _volume_tags if pixels.ndim == 3 else _image_tags
    ds = _dataset(FIXED | {
        "StudyInstanceUID": uid("study", *ids[:2]), "SeriesInstanceUID": uid("series", *ids),
        "SOPInstanceUID": uid("instance", *ids), "SeriesDescription": f"SYNTHETIC {laterality} {view}",
        "PatientID": patient.name, "PatientName": f"{patient.name}^SYNTHETIC",
        "Manufacturer": vendor, "ManufacturerModelName": f"{vendor} simulator",
        "ViewCodeSequence": [_code(*VIEW_CODES[view]) | {"ViewModifierCodeSequence": []}],
        "Rows": pixels.shape[-2], "Columns": pixels.shape[-1],
    } | tags(pixels.shape, patient, laterality, view, mm))  # fmt: skip
    ds.add_new("PixelData", "OW", np.ascontiguousarray(pixels, "<u2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    # One view of one vendor is run-length encoded, so that readers meet a compressed file too.
    if patient.vendor.border and path.stem == "R_MLO":
        ds.compress(uids.RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)


def _dataset(tags: dict) -> Dataset:
    """Keywords and values as a data set; a sequence is a list of such dictionaries."""
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, [_dataset(item) for item in value] if keyword.endswith("Sequence") else value)
    return ds


def _image_tags(shape: tuple[int, int], patient, laterality: str, view: str, mm: float) -> dict:
    inverse = patient.vendor.photometric == "MONOCHROME1"
    away, medial = ("A", "R") if laterality == "L" else ("P", "L")
    padding = {"PixelPaddingValue": 0} if patient.vendor.border else {}
    return padding | RESCALE | {
        "SOPClassUID": uids.DigitalMammographyXRayImageStorageForPresentation, "ViewPosition": view,
        "ImageType": ["DERIVED", "PRIMARY"], "PresentationIntentType": "FOR PRESENTATION",
        "PhotometricInterpretation": patient.vendor.photometric, "BurnedInAnnotation": "NO",
        "PresentationLUTShape": "INVERSE" if inverse else "IDENTITY", "ImageLaterality": laterality,
        "PatientOrientation": [away, medial if view == "CC" else "F" + medial], "DetectorType": "DIRECT",
        "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": 1 if inverse else -1,
        "WindowCenter": WHITE - CENTER if inverse else CENTER, "WindowWidth": WIDTH, "OrganExposed": "BREAST",
        "AnatomicRegionSequence": [BREAST], "ImagerPixelSpacing": [mm, mm], "PositionerType": "MAMMOGRAPHIC",
        "PositionerPrimaryAngle": round(math.degrees(patient.angles[view])),
    }  # fmt: skip


def _volume_tags(shape: tuple[int, int, int], patient, laterality: str, view: str, mm: float) -> dict:
    """Patient axes point left, back and up. An image row runs away from the chest wall in L and towards it in
    R; columns run medially (CC) or medially and down (MLO); slices follow the beam."""
    slices, rows, columns = shape
    angle, side = patient.angles[view], -1 if laterality == "L" else 1
    along, down = np.array([0, side, 0]), np.array([side * math.cos(angle), 0, -math.sin(angle)]).round(6)
    corner = [-side * 90, 0, 0] - down * (rows - 1) * mm / 2 - along * (side + 1) / 2 * (columns - 1) * mm
    positions = [corner + np.cross(along, down) * (k - (slices - 1) / 2) for k in range(slices)]
    ids, kind = (patient.seed, patient.number), ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]
    content = {"PixelPresentation": "MONOCHROME", "VolumetricProperties": "VOLUME"}
    content["VolumeBasedCalculationTechnique"] = "TOMOSYNTHESIS"
    spacing = {"PixelSpacing": [mm, mm], "SliceThickness": 1, "SpacingBetweenSlices": 1}
    stack = {"DimensionOrganizationUID": uid("stack", *ids)}
    frames = [{
        "XRay3DFrameTypeSequence": [{"FrameType": kind} | content],
        "PlanePositionSequence": [{"ImagePositionPatient": position.round(4).tolist()}],
        "FrameContentSequence": [{"StackID": "1", "InStackPositionNumber": k, "DimensionIndexValues": [1, k]}]
    } for k, position in enumerate(positions, 1)]  # fmt: skip
    return content | {
        "SOPClassUID": uids.BreastTomosynthesisImageStorage, "ImageType": kind,
        "PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "IDENTITY",
        "BurnedInAnnotation": "NO", "ContentQualification": "RESEARCH", "NumberOfFrames": slices,
        "FrameOfReferenceUID": uid("frame of reference", *ids), "PositionReferenceIndicator": "",
        "DimensionOrganizationSequence": [stack],
        "DimensionIndexSequence": [  # Stack ID and In-Stack Position Number, of the Frame Content Sequence
            stack | {"DimensionIndexPointer": tag, "FunctionalGroupPointer": 0x00209111}
            for tag in (0x00209056, 0x00209057)
        ],
        "PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": [{
            "PixelMeasuresSequence": [spacing],
            "PlaneOrientationSequence": [{"ImageOrientationPatient": [*along, *down]}],
            "FrameAnatomySequence": [{"FrameLaterality": laterality, "AnatomicRegionSequence": [BREAST]}],
            "FrameVOILUTSequence": [{"WindowCenter": CENTER, "WindowWidth": WIDTH}],
            "PixelValueTransformationSequence": [RESCALE],
        }],
    }  # fmt: skip
