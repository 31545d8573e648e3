"""Simulated mammography devices: display processing of phantom images, and their DICOM files.

The vendors are fictional and differ in what trips readers of real files: pixel size, matrix, polarity,
window, background, burned-in label. Dates, names and numbers are invented and fixed.
"""

import dataclasses
import math
from pathlib import Path

import cv2
import numpy as np
import pydicom.uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

WHITE = 4095  # 12 bits
VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}


@dataclasses.dataclass(frozen=True)
class Vendor:
    """A fictional device. rows, columns, mm: of a tomosynthesis slice; the 2D detector is twice as fine."""

    name: str
    rows: int
    columns: int
    mm: float
    photometric: str  # of 2D images; tomosynthesis is always MONOCHROME2 (PS3.3 C.8.21.1)
    background: tuple[float, float]  # grey level of air and its noise; (0, 0) cuts air out exactly
    border: int  # 2D pixels of collimator shadow, marked by PixelPaddingValue
    gamma: float
    sharpen: float
    even_out: float  # share of the fat path that peripheral equalisation takes away
    window: tuple[int, int]  # center and width on the MONOCHROME2 scale
    voi_function: str
    label: str
    label_admitted: str  # BurnedInAnnotation: real devices often say NO beside a burned-in label


VENDORS = (
    Vendor("Phantom A", 600, 448, 0.400, "MONOCHROME2", (0, 0), 0, 0.85, 0.5, 0.80,
           (2050, 3700), "LINEAR", "{0} {1}", "NO"),
    Vendor("Phantom B", 544, 416, 0.440, "MONOCHROME1", (130, 9), 0, 1.00, 0.3, 0.70,
           (2100, 3900), "LINEAR", "{0}-{1}", "YES"),
    Vendor("Phantom C", 640, 480, 0.375, "MONOCHROME2", (260, 16), 14, 0.70, 0.8, 0.88,
           (2000, 3000), "SIGMOID", "{0}{1}", "NO"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shot:
    """Who was imaged, and how."""

    seed: int
    patient: int  # 0-based
    laterality: str
    view: str
    vendor: Vendor
    mm: float  # pixel size of this file
    angle: float  # radians, of the beam from the vertical
    thickness: float  # mm

    @property
    def patient_id(self) -> str:
        return f"PHANTOM-{self.patient + 1:04d}"

    def uid(self, *what: str) -> str:
        return uids.generate_uid(entropy_srcs=["mammodino phantom", f"{self.seed} {self.patient}", *what])


# ---- display ----


def display(image: np.ndarray, air: np.ndarray, vendor: Vendor, mm: float, rng: np.random.Generator):
    """The vendor's presentation processing.

    Args:
      image: f32 [Y, X], log attenuation as `phantom.project` gives it.
      air: bool [Y, X].
      vendor: whose sharpening, curve and background.
      mm: pixel size.
      rng: of the background's noise.

    Returns:
      f32 [Y, X] on the MONOCHROME2 scale 0..4095.
    """
    image = image + vendor.sharpen * (image - cv2.GaussianBlur(image, None, 4.0 / mm))
    level, noise = vendor.background
    grey = level + (WHITE - level) * np.clip(image / 0.11, 0, 1) ** vendor.gamma
    haze = level + noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.where(air, haze, np.maximum(grey, haze)), 0, WHITE)


def finish_2d(image: np.ndarray, shot: Shot) -> np.ndarray:
    """Turn a displayed image to its side, burn the label in, shade the border; u16 [Y, X] as stored."""
    vendor = shot.vendor
    if shot.laterality == "R":
        image = image[:, ::-1]
    image = np.maximum(image, _label(image.shape, shot))
    if vendor.border:  # never at the chest wall
        edge = max(1, round(vendor.border * vendor.mm / 2 / shot.mm))
        inside = np.zeros(image.shape, bool)
        inside[edge:-edge, slice(0, -edge) if shot.laterality == "L" else slice(edge, None)] = True
        image = np.where(inside, np.maximum(image, 1), 0)
    stored = np.round(image).astype(np.uint16)
    return WHITE - stored if vendor.photometric == "MONOCHROME1" else stored


def _label(shape: tuple[int, int], shot: Shot) -> np.ndarray:
    """Side and view in white at the lateral (upper) corner away from the chest wall, f32 [Y, X]."""
    text, font = shot.vendor.label.format(shot.laterality, shot.view), cv2.FONT_HERSHEY_SIMPLEX
    scale, thick, margin = shape[0] / 700, max(1, shape[0] // 400), shape[0] // 20
    (width, height), _ = cv2.getTextSize(text, font, scale, thick)
    x = shape[1] - margin - width if shot.laterality == "L" else margin
    canvas = np.zeros(shape, np.uint8)  # OpenCV 5 draws text on uint8 only
    cv2.putText(canvas, text, (x, margin + height), font, scale, 255, thick, cv2.LINE_AA)
    return canvas.astype(np.float32) * (WHITE / 255)


# ---- headers ----


def _item(**tags) -> Dataset:
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def _code(value: str, meaning: str, **more) -> list[Dataset]:
    return [_item(CodeValue=value, CodingSchemeDesignator="SCT", CodeMeaning=meaning, **more)]


def _common(shot: Shot, sop_class: str, name: str, pixels: np.ndarray) -> Dataset:
    """Patient, study, series, equipment, view and pixel modules that both kinds of file share."""
    ds = _item(
        SpecificCharacterSet="ISO_IR 192", SOPClassUID=sop_class, SOPInstanceUID=shot.uid(name, "instance"),
        StudyDate="20200101", SeriesDate="20200101", ContentDate="20200101",
        StudyTime="120000", SeriesTime="120000", ContentTime="120000",
        AccessionNumber="", ReferringPhysicianName="", InstitutionName="SYNTHETIC", Modality="MG",
        Manufacturer=shot.vendor.name, ManufacturerModelName=f"{shot.vendor.name} simulator",
        DeviceSerialNumber="0", SoftwareVersions="1",
        StudyDescription="SYNTHETIC digital breast phantom, no real patient",
        SeriesDescription=f"SYNTHETIC {shot.laterality} {shot.view}", BodyPartExamined="BREAST",
        PatientName=f"PHANTOM^{shot.patient + 1:04d}", PatientID=shot.patient_id, PatientBirthDate="",
        PatientSex="F", PatientAge="055Y", StudyID="1", SeriesNumber=1, InstanceNumber=1,
        StudyInstanceUID=shot.uid("study"), SeriesInstanceUID=shot.uid(name, "series"),
        ViewCodeSequence=_code(*VIEW_CODES[shot.view], ViewModifierCodeSequence=[]),
        BreastImplantPresent="NO", QualityControlImage="NO", LossyImageCompression="00",
        AcquisitionContextSequence=[], SamplesPerPixel=1, Rows=pixels.shape[-2], Columns=pixels.shape[-1],
        BitsAllocated=16, BitsStored=12, HighBit=11, PixelRepresentation=0,
    )  # fmt: skip
    ds.add_new("PixelData", "OW", np.ascontiguousarray(pixels, "<u2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
    return ds


def dataset_2d(pixels: np.ndarray, shot: Shot, name: str) -> Dataset:
    """Digital Mammography X-Ray Image For Presentation (PS3.3 A.27) of stored u16 [Y, X] pixels."""
    vendor, inverse = shot.vendor, shot.vendor.photometric == "MONOCHROME1"
    ds = _common(shot, uids.DigitalMammographyXRayImageStorageForPresentation, name, pixels)
    center, width = vendor.window
    away, medial = ("A", "R") if shot.laterality == "L" else ("P", "L")
    ds.update(_item(
        ImageType=["DERIVED", "PRIMARY"], AcquisitionDate="20200101", AcquisitionTime="120000",
        PresentationIntentType="FOR PRESENTATION", BurnedInAnnotation=vendor.label_admitted,
        PhotometricInterpretation=vendor.photometric,
        PresentationLUTShape="INVERSE" if inverse else "IDENTITY",
        ImageLaterality=shot.laterality, ViewPosition=shot.view, OrganExposed="BREAST",
        PatientOrientation=[away, medial if shot.view == "CC" else "F" + medial],
        AnatomicRegionSequence=_code("76752008", "Breast"), ImagerPixelSpacing=[shot.mm, shot.mm],
        PixelIntensityRelationship="LOG", PixelIntensityRelationshipSign=1 if inverse else -1,
        RescaleIntercept="0", RescaleSlope="1", RescaleType="US", DetectorType="DIRECT", KVP="28",
        WindowCenter=str(WHITE - center if inverse else center), WindowWidth=str(width),
        WindowCenterWidthExplanation="NORMAL", VOILUTFunction=vendor.voi_function,
        PositionerType="MAMMOGRAPHIC", PositionerPrimaryAngle=f"{math.degrees(shot.angle):.1f}",
        BodyPartThickness=f"{shot.thickness:.0f}",
    ))  # fmt: skip
    if vendor.border:
        ds.PixelPaddingValue = 0
    return ds


def dataset_tomo(pixels: np.ndarray, shot: Shot, name: str) -> Dataset:
    """Breast Tomosynthesis Image (PS3.3 A.55) of stored u16 [K, Y, X] slices, 1 mm apart along the beam."""
    ds = _common(shot, uids.BreastTomosynthesisImageStorage, name, pixels)
    kind = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]
    content = {
        "PixelPresentation": "MONOCHROME",
        "VolumetricProperties": "VOLUME",
        "VolumeBasedCalculationTechnique": "TOMOSYNTHESIS",
    }
    orientation, positions = _geometry(pixels.shape, shot)
    group = 0x00209111  # Frame Content Sequence
    stack, (center, width) = shot.uid("stack"), shot.vendor.window
    shared = _item(
        PixelMeasuresSequence=[_item(
            PixelSpacing=[shot.mm, shot.mm], SliceThickness="1", SpacingBetweenSlices="1"
        )],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=orientation)],
        FrameAnatomySequence=[_item(
            FrameLaterality=shot.laterality, AnatomicRegionSequence=_code("76752008", "Breast")
        )],
        FrameVOILUTSequence=[_item(
            WindowCenter=str(center), WindowWidth=str(width), VOILUTFunction=shot.vendor.voi_function
        )],
        PixelValueTransformationSequence=[_item(RescaleIntercept="0", RescaleSlope="1", RescaleType="US")],
    )  # fmt: skip
    frames = [
        _item(
            FrameContentSequence=[_item(
                StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1]
            )],
            PlanePositionSequence=[_item(ImagePositionPatient=position)],
            XRay3DFrameTypeSequence=[_item(FrameType=kind, **content)],
        )
        for k, position in enumerate(positions)
    ]  # fmt: skip
    ds.update(_item(
        ImageType=kind, PhotometricInterpretation="MONOCHROME2", PresentationLUTShape="IDENTITY",
        BurnedInAnnotation="NO", ContentQualification="RESEARCH", NumberOfFrames=len(pixels),
        FrameOfReferenceUID=shot.uid(name, "frame of reference"), PositionReferenceIndicator="",
        DimensionOrganizationSequence=[_item(DimensionOrganizationUID=stack)],
        DimensionIndexSequence=[
            _item(DimensionOrganizationUID=stack, DimensionIndexPointer=tag, FunctionalGroupPointer=group)
            for tag in (0x00209056, 0x00209057)  # Stack ID, In-Stack Position Number
        ],
        SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=frames, **content,
    ))  # fmt: skip
    return ds


def _geometry(shape: tuple[int, int, int], shot: Shot) -> tuple[list[str], list[list[str]]]:
    """ImageOrientationPatient, and ImagePositionPatient of each slice, in mm.

    Patient axes point left, back and up. An image row runs away from the chest wall in L and towards it in R;
    columns run medially (CC) or medially and down (MLO); slices follow the beam.
    """
    slices, rows, columns = shape
    side = -1.0 if shot.laterality == "L" else 1.0
    along = np.array([0.0, side, 0.0])
    down = np.array([side * math.cos(shot.angle), 0.0, -math.sin(shot.angle)])
    beam = np.cross(along, down)
    corner = np.array([-side * 90.0, 0.0, 0.0]) - down * (rows - 1) * shot.mm / 2
    if shot.laterality == "R":
        corner -= along * (columns - 1) * shot.mm
    positions = [corner + beam * (k - (slices - 1) / 2) for k in range(slices)]
    return [f"{p:.6f}" for p in (*along, *down)], [[f"{p:.4f}" for p in place] for place in positions]


def save(ds: Dataset, path: Path, rle: bool = False) -> None:
    """Write a DICOM file, run-length encoded or plain little endian."""
    if rle:
        ds.compress(uids.RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
