"""Small breasts and small DICOM files, written by the tests themselves."""

from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

MG = "1.2.840.10008.5.1.4.1.1.1.2"
TOMO = "1.2.840.10008.5.1.4.1.1.13.1.3"
ENCODERS = {
    "1.2.840.10008.1.2.4.70": lambda a: imagecodecs.jpeg8_encode(a, lossless=True, bitspersample=12),
    "1.2.840.10008.1.2.4.80": imagecodecs.jpegls_encode,
    "1.2.840.10008.1.2.4.90": lambda a: imagecodecs.jpeg2k_encode(a, codecformat="j2k", level=0),
}


def half_ellipse(height: int, width: int, share: float, side: str = "left") -> np.ndarray:
    """bool [H, W]: a breast of about that share of the frame, its chest wall on `side`."""
    y, x = np.mgrid[:height, :width]
    x = x if side == "left" else width - 1 - x
    a = 0.45 * height
    b = 2 * share * height * width / (np.pi * a)
    return ((y - height / 2) / a) ** 2 + (x / b) ** 2 < 1


@pytest.fixture(scope="session")
def breast():
    """breast(height, width, side, background, noise, seed) -> u16 12-bit image with smooth texture."""

    def make(height=320, width=256, side="left", background=0, noise=0.0, seed=0, share=0.35) -> np.ndarray:
        rng = np.random.default_rng(seed)
        inside = half_ellipse(height, width, share, side)
        texture = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), 6)
        thickness = np.clip(cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5) / 12, 0.25, 1)
        image = np.where(inside, (2000 + 400 * texture / texture.std()) * thickness, 0) + background
        image += noise * rng.normal(0, 1, image.shape)
        return np.clip(image, 0, 4095).astype(np.uint16)

    return make


@pytest.fixture(scope="session")
def write_dicom():
    """write_dicom(path, pixels, syntax=..., **attributes) -> path. Pixels u16 [H, W] or [frames, H, W]."""

    def write(
        path: Path, pixels: np.ndarray, syntax=ExplicitVRLittleEndian, positions=None, **attributes
    ) -> Path:
        frames = pixels if pixels.ndim == 3 else pixels[None]
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = TOMO if pixels.ndim == 3 else MG, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        ds.PatientID, ds.PatientName, ds.Modality, ds.BodyPartExamined = "P-1", "Doe^Jane", "MG", "BREAST"
        ds.PresentationIntentType, ds.ImageLaterality, ds.ViewPosition = "FOR PRESENTATION", "L", "MLO"
        ds.Rows, ds.Columns = frames.shape[1:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        if pixels.ndim == 3:
            ds.NumberOfFrames = len(frames)
        if positions is not None:
            ds.PerFrameFunctionalGroupsSequence = Sequence()
            for z in positions:
                plane, axes, group = Dataset(), Dataset(), Dataset()
                plane.ImagePositionPatient, axes.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
                group.PlanePositionSequence, group.PlaneOrientationSequence = [plane], [axes]
                ds.PerFrameFunctionalGroupsSequence.append(group)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = UID(syntax)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        if syntax in ENCODERS:
            ds.PixelData = encapsulate([ENCODERS[syntax](np.ascontiguousarray(frame)) for frame in frames])
            ds["PixelData"].is_undefined_length = True
        else:
            order = ">" if syntax == "1.2.840.10008.1.2.2" else "<"
            ds.PixelData = frames.astype(f"{order}u2").tobytes()
        ds["PixelData"].VR = "OW"
        for name, value in attributes.items():
            setattr(ds, name, value)
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        return path

    return write
