"""A tomosynthesis volume of the VICTRE anatomical phantom, for tests: an anatomy that is not ours.

The phantom (CC0; Badano et al. 2018, VICTRE; anatomy of Graff 2016) is a compressed breast as voxel labels.
What this is: attenuation per label at one energy; 15 parallel-beam projections over +-7.5 degrees, the sweep
along the chest wall, each a sum of planes shifted by height x tan(angle); quantum noise; a ramp-like filter
along the sweep; shift-and-add at every millimetre of height; a grey scale with the thickness evened out.
What it is not: no divergent beam, spectrum, scatter, detector or focal-spot blur, no oblique path length, no
iterative or true filtered back-projection. VICTRE's own pipeline (MC-GPU) has all of these. One volume says
nothing of patients.
"""

import dataclasses
import gzip
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from make_dataset import row, write_dataset

from data_prep.phantom import write_phantoms
from data_prep.phantom_breast import FAT, GLAND
from data_prep.prepare import CLAHE_TILES, prepare
from data_prep.settings import Settings

SHAPE, LABEL_MM = (258, 539, 331), 0.2  # z, y, x of pcl_1
PADDLE, MASS, CALCIFICATION = 50, 200, 250
# Linear attenuation in 1/mm at 20 keV. Fat, gland and (mass) infiltrating duct carcinoma: Johns and Yaffe
# 1987. Skin, nipple, ligament, blood: soft tissue and blood of ICRU-44, mass attenuation of NIST SRD 126
# (about 0.82 and 0.84 cm2/g) x density (1.09, 1.06), rounded. Calcification: calcium phosphate, porous, as
# data_prep.phantom takes it. Plausible, not measured: tissues vary by several per cent.
ATTENUATION = {
    0: 0.0, 1: FAT, 2: 0.089, 29: GLAND, 33: 0.089, PADDLE: 0.0, 88: 0.085, 95: GLAND, 125: GLAND,
    150: 0.089, MASS: 0.0844, 225: 0.089, CALCIFICATION: 1.6,
}  # fmt: skip
BIN = 2  # voxels a side are averaged before projection
ANGLES = np.radians(np.linspace(-7.5, 7.5, 15))
PHOTONS = 20_000  # per pixel and projection behind air


@dataclasses.dataclass(frozen=True)
class Volume:
    slices: np.ndarray  # u8 [K, H, W]: background 0, tissue 1..255, one mask for all; chest wall on the left
    position_mm: np.ndarray  # f64 [K] in the label volume: z of a voxel plane is 0.2 x its number
    corner_mm: tuple[float, float]  # (y, x) of the first pixel in the label volume
    pixel_mm: float


def load_labels(shared: Path) -> np.ndarray:
    """u8 [z, y, x]; skips the test where the phantom is absent."""
    path = shared / "data/dbt_phantom_cc0/pcl_1.raw.gz"
    if not path.is_file():
        pytest.skip(f"no VICTRE phantom here ({path})")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8).reshape(SHAPE)


def compression_axis(labels: np.ndarray) -> int:
    """The axis across which the paddles lie: some plane of it is nearly all paddle."""
    planes = (np.moveaxis(labels, axis, 0)[:, ::8, ::8] == PADDLE for axis in range(3))
    return int(np.argmax([plane.mean((1, 2)).max() for plane in planes]))


def attenuation(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of BIN^3 voxels: mean attenuation f32 [Z, Y, X] in 1/mm, and tissue share f32 [Z, Y, X].

    Compression becomes the first axis. Paddles are removed. Raises ValueError: an unknown label.
    """
    labels = np.moveaxis(labels, compression_axis(labels), 0)
    table = np.zeros((2, 256), np.float32)
    for label, mu in ATTENUATION.items():
        table[:, label] = mu, label not in (0, PADDLE)
    z, y, x = (n // BIN for n in labels.shape)
    out = np.zeros((2, z, y, x), np.float32)
    for i in range(z * BIN):  # a plane at a time: floats of all voxels would take 400 MB
        plane = np.ascontiguousarray(labels[i, : y * BIN, : x * BIN])
        present = np.flatnonzero(np.bincount(plane.ravel(), minlength=256)).tolist()
        if unknown := set(present) - set(ATTENUATION):
            raise ValueError(f"labels {sorted(unknown)} have no attenuation")
        for part, values in zip(out, table, strict=True):
            part[i // BIN] += cv2.resize(cv2.LUT(plane, values), (x, y), interpolation=cv2.INTER_AREA) / BIN
    return out[0], out[1]


def tomosynthesis(labels: np.ndarray, slice_mm: float = 1.0, seed: int = 0) -> Volume:
    """Project, reconstruct and present; see the head of this file. labels u8 [z, y, x] of LABEL_MM voxels."""
    mm = BIN * LABEL_MM
    mu, tissue = attenuation(labels)
    thickness = tissue.sum(0) * mm
    planes = np.flatnonzero(tissue.sum((1, 2)) > 0.01 * tissue.sum((1, 2)).max())
    z = (np.arange(len(mu)) + 0.5) * mm - LABEL_MM / 2  # mm; a label plane lies at its number x 0.2 mm
    low, high = z[planes[0]], z[planes[-1]]
    middle, count = (low + high) / 2, int((high - low) / slice_mm) + 1
    heights = middle + (np.arange(count) - (count - 1) / 2) * slice_mm
    rng, volume = np.random.default_rng(seed), np.zeros((count, *thickness.shape), np.float32)
    for angle in ANGLES:
        tilt = math.tan(angle) / mm  # rows per mm of height
        path = np.zeros(thickness.shape, np.float32)
        for i in planes:
            path += _shift(mu[i] * mm, (z[i] - middle) * tilt)
        path += rng.standard_normal(path.shape, dtype=np.float32) * np.exp(path / 2) / math.sqrt(PHOTONS)
        smooth = cv2.GaussianBlur(path, (1, 0), sigmaX=1e-3, sigmaY=3.0 / mm)
        path = path + 4 * (path - smooth)  # ramp-like: a structure out of its plane is smeared and weak
        for k, height in enumerate(heights):
            volume[k] += _shift(path, -(height - middle) * tilt) / len(ANGLES)
    mask = thickness >= 2.0  # mm: less is a rim of partial voxels
    volume -= 0.8 * FAT * cv2.GaussianBlur(thickness, None, 2.0 / mm)  # peripheral equalisation
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    volume, mask = volume[:, *box], mask[box]
    lo, hi = np.percentile(volume[:, mask], (0.5, 99.5))
    grey = np.where(mask, np.rint(1 + 254 * np.clip((volume - lo) / (hi - lo), 0, 1)), 0).astype(np.uint8)
    corner = tuple(float((part.start + 0.5) * mm - LABEL_MM / 2) for part in box)
    return Volume(grey, heights, corner, mm)


def _shift(image: np.ndarray, rows: float) -> np.ndarray:
    """Move an image f32 [Y, X] down by a fractional number of rows; air comes in."""
    move = np.float32([[1, 0, 0], [0, 1, rows]])
    return cv2.warpAffine(image, move, image.shape[::-1], flags=cv2.INTER_LINEAR)


def victre_items(labels: np.ndarray) -> list:
    """The volume as (image, index row), with data_prep's equalisation, as its records have it."""
    volume = tomosynthesis(labels)
    clahe, out = cv2.createCLAHE(Settings().clahe, CLAHE_TILES), []
    for k, (grey, position) in enumerate(zip(volume.slices, volume.position_mm, strict=True)):
        image = np.where(grey > 0, np.maximum(clahe.apply(grey), 1), 0).astype(np.uint8)
        columns = {
            "patient_id": "victre", "volume_id": "victre", "kind": "dbt", "view": "CC",
            "slice_index": k, "num_slices": len(volume.slices), "slice_position_mm": float(position),
            "slice_mm": 1.0, "pixel_mm": volume.pixel_mm,
        }  # fmt: skip
        out.append((image, row(image, f"victre-{k}", **columns)))
    return out


def phantom_items(folder: Path, patients: int, coarsen: float, long_side: int, seed: int = 0) -> list:
    """Volumes of our own phantoms, a patient each, through DICOM and data_prep's reading, as (image, row)."""
    out, settings = [], Settings(long_side=long_side)
    write_phantoms(folder, patients, seed, coarsen=coarsen)
    for path in sorted(folder.glob("*/*_tomo.dcm")):
        prepared, name = prepare([path], settings), path.parent.name
        for k, image in enumerate(prepared.images()):
            ids = {"patient_id": name, "volume_id": name}
            out.append((image, row(image, f"{name}-{k}", **ids, **prepared.facts(k))))
    return out


def write_volumes(folder: Path, labels: np.ndarray, phantoms=8, coarsen=1.0, long_side=256) -> Path:
    """Write one built data set, split train, kind dbt: the VICTRE volume and `phantoms` of ours."""
    items = victre_items(labels) + phantom_items(folder / "dicom", phantoms, coarsen, long_side)
    return write_dataset(folder / "data", items)
