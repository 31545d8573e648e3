"""Synthetic mammograms with known truth: `python -m data_prep phantom`.

Each breast is one 3D model (phantom_breast.py). Its 2D views are projections of the compressed model, its
tomosynthesis volume is shift-and-add of eleven filtered projections of the same slab, parallel beams sweeping
along the chest wall. One energy, no scatter, quantum noise only. Fictional vendors (phantom_dicom.py) display
and write the images.
"""

import csv
import dataclasses
import functools
import json
import math
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_prep import phantom_breast as anatomy
from data_prep import phantom_dicom as dicom
from data_prep.phantom_breast import FAT, Breast, Finding, Slab
from mammodino_jax.errors import UserError

CALC = 1.6  # 1/mm at 20 keV: calcium phosphate, taken as porous
NOISE_2D, NOISE_TOMO = 0.022, 0.030  # of the log of an unattenuated pixel, per projection
TOMO_ANGLES = np.radians(np.linspace(-20, 20, 11))

LABELS = {
    "label_density": {
        "classes": list(anatomy.DENSITY_CLASSES),
        "rule": f"simulated: fibroglandular share of the breast's volume about {anatomy.GLAND_FRACTION}",
        "level": "exam",
    },
    "label_cancer": {
        "classes": ["no cancer", "cancer"],
        "rule": "simulated: a spiculated mass or a pleomorphic cluster lies in the imaged breast",
        "level": "image",
    },
    "label_lesion": {
        "classes": ["no finding", "finding"],
        "rule": "simulated: any mass or cluster, benign or malignant, lies in the imaged breast",
        "level": "image",
    },
}
LABEL_COLUMNS = ("file", "patient_id", "study_id", "laterality", "view", *LABELS)
BOX_COLUMNS = ("y0", "x0", "y1", "x1", "slice_index")
FINDING_COLUMNS = ("file", "category", "birads", "pathology", "shape", *BOX_COLUMNS)
README = """SYNTHETIC digital breast phantoms: python -m data_prep phantom --patients {patients} --seed {seed}

No real patient, no real device: anatomy, names, dates and vendors are simulated. A patient has four 2D views
and one tomosynthesis volume, all from one 3D model of each breast. Scores on these images are not clinical
performance.

labels.csv    a row a file: side, view, and the labels that labels.json explains
findings.csv  a row a lesion in a file: box in the file's pixels (end exclusive), 0-based slice of its centre
"""


# ---- imaging ----


def project(slab: Slab, even_out: float, rng: np.random.Generator) -> np.ndarray:
    """The 2D image of a slab.

    Args:
      slab: the compressed breast.
      even_out: share of the fat path that peripheral equalisation takes away.
      rng: of the noise.

    Returns:
      f32 [2Y, 2X], log attenuation per mm of half thickness.
    """
    size = (2 * slab.path.shape[2], 2 * slab.path.shape[1])
    path = np.maximum(cv2.resize(slab.path.sum(0), size, interpolation=cv2.INTER_CUBIC), 0)
    # cv2.resize aligns pixel edges; the slab's origin is a pixel's centre: a quarter of a slab pixel apart.
    path += _speck_path(slab.specks + np.float32([0, slab.mm / 4, slab.mm / 4, 0]), path.shape, slab.mm / 2)
    path = cv2.GaussianBlur(_noisy(path, NOISE_2D, rng), None, 0.6)
    return _equalise(path, slab, even_out)


def tomosynthesis(slab: Slab, even_out: float, rng: np.random.Generator) -> np.ndarray:
    """Slices f32 [K, Y, X] by shift-and-add of filtered projections; arguments and unit as `project`."""
    layers = slab.path.copy()
    slices, rows, columns = layers.shape
    z = np.arange(slices) - (slices - 1) / 2
    nearest = np.clip(np.round(slab.specks[:, 0] + (slices - 1) / 2), 0, slices - 1)
    for k in np.unique(nearest).astype(int):
        layers[k] += _speck_path(slab.specks[nearest == k], (rows, columns), slab.mm)
    volume = np.zeros_like(layers)
    for angle in TOMO_ANGLES:
        shifts = z * math.tan(angle) / slab.mm
        path = _noisy(sum(map(_shift, layers, shifts)), NOISE_TOMO, rng)
        # Ramp-like along the sweep; low frequencies stay, for the look of a mammogram.
        smooth = cv2.GaussianBlur(path, (1, 0), sigmaX=1e-3, sigmaY=3.0 / slab.mm)
        path = cv2.GaussianBlur(path + 1.2 * (path - smooth), None, 0.5)
        for k, shift in enumerate(shifts):
            volume[k] += _shift(path, -shift)
    return np.stack([_equalise(image / len(TOMO_ANGLES), slab, even_out) for image in volume])


def _shift(image: np.ndarray, rows: float) -> np.ndarray:
    """Move an image down by a fractional number of rows, the border replicated."""
    move, size = np.float32([[1, 0, 0], [0, 1, rows]]), image.shape[::-1]
    return cv2.warpAffine(image, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _noisy(path: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """The log image with quantum noise, its standard deviation `level` x exp(path / 2)."""
    return path + level * np.exp(path / 2) * rng.standard_normal(path.shape, dtype=np.float32)


def _equalise(path: np.ndarray, slab: Slab, even_out: float) -> np.ndarray:
    """Peripheral equalisation: take away most of a fatty breast's path, as presentation processing does."""
    thickness = cv2.GaussianBlur(slab.thickness, None, 2.0 / slab.mm)
    thickness = cv2.resize(thickness, path.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return (path - even_out * FAT * thickness) * (2 / len(slab.path))


def _speck_path(specks: np.ndarray, shape: tuple[int, int], mm: float) -> np.ndarray:
    """Path f32 [Y, X] through calcified spheres, averaged over each pixel (5 x 5 samples)."""
    path, fine = np.zeros(shape, np.float32), 5
    for _, y, x, diameter in specks:
        reach = math.ceil(diameter / 2 / mm) + 1
        row, column, size = round(y / mm) - reach, round(x / mm) - reach, 2 * reach + 1
        grid = (np.arange(size * fine) + 0.5) / fine - 0.5
        dy, dx = (grid + row) * mm - y, (grid + column) * mm - x
        chord = 2 * np.sqrt(np.clip(diameter**2 / 4 - dy[:, None] ** 2 - dx**2, 0, None))
        chord = chord.reshape(size, fine, size, fine).mean((1, 3))
        path[row : row + size, column : column + size] += CALC * chord
    return path


# ---- files ----


def write_phantoms(output: Path, patients: int, seed: int, workers: int = 1, coarsen: float = 1.0) -> dict:
    """Write synthetic exams as DICOM files, with their truth as CSV.

    Patient i depends on the seed and i alone: more patients add files and change none. The same seed gives
    the same bytes whatever `workers`. All is written to OUTPUT.partial, which is renamed when complete.

    Args:
      output: folder to make; may exist if empty.
      patients: how many, at least 1.
      seed: not negative.
      workers: processes.
      coarsen: multiplies every pixel size; above 1 only for tests.

    Returns:
      Counts {"patients", "files", "volumes", "findings"}.

    Raises:
      UserError: the output is not an empty folder, or a number is out of range.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} is not an empty folder; name a new one, or empty it first")
    for name, value, least in (("patients", patients, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")
    partial = output.absolute().with_name(output.absolute().name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    partial.mkdir(parents=True)
    job = functools.partial(_write_patient, partial, seed, coarsen)
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (1,)) as pool:
            labels, findings = _gather(pool.imap, job, patients)
    else:
        labels, findings = _gather(map, job, patients)
    _write_csv(partial / "labels.csv", LABEL_COLUMNS, labels)
    _write_csv(partial / "findings.csv", FINDING_COLUMNS, findings)
    (partial / "labels.json").write_text(json.dumps(LABELS, indent=1) + "\n")
    (partial / "README.txt").write_text(README.format(patients=patients, seed=seed))
    partial.replace(output)
    return {"patients": patients, "files": len(labels), "volumes": patients, "findings": len(findings)}


def _gather(run: Callable, job: Callable, patients: int) -> tuple[list[dict], list[dict]]:
    labels, findings = [], []
    for rows, boxes in tqdm(run(job, range(patients)), total=patients, desc="phantoms", unit="patient"):
        labels += rows
        findings += boxes
    return labels, findings


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_patient(root: Path, seed: int, coarsen: float, number: int) -> tuple[list[dict], list[dict]]:
    """Image one patient: four 2D views and a volume. Returns the label and the finding rows of its files."""
    patient = anatomy.make_patient(seed, number)
    (root / f"P{number + 1:04d}").mkdir()
    labels, findings = [], []
    for laterality in "LR":
        breast = anatomy.make_breast(patient, laterality, seed, coarsen)
        for view in ("CC", "MLO"):
            rows, boxes = _write_view(root, seed, coarsen, breast, view)
            labels += rows
            findings += boxes
    return labels, findings


def _write_view(root: Path, seed: int, coarsen: float, breast: Breast, view: str) -> tuple[list, list]:
    """Compress once; write the 2D image and, where it is this view's turn, the volume of the same slab."""
    patient, side, vendor = breast.patient, breast.laterality, breast.patient.vendor
    mm = vendor.mm * coarsen
    slab = anatomy.compress(breast, view, round(vendor.rows / coarsen), round(vendor.columns / coarsen), mm)
    rng = np.random.default_rng([*breast.seed, 3, len(view)])
    angle, thickness = anatomy.view_angle(patient, view), 2 * patient.half
    shot = dicom.Shot(seed, patient.number, side, view, vendor, mm / 2, angle, thickness)
    folder, name = f"P{patient.number + 1:04d}", f"{side}_{view}"

    image = project(slab, vendor.even_out, rng)
    air = cv2.resize(slab.thickness, image.shape[::-1]) == 0
    stored = dicom.finish_2d(dicom.display(image, air, vendor, mm / 2, rng), shot)
    # One view of one vendor is run-length encoded, so that readers meet a compressed file too.
    rle = vendor.border > 0 and name == "R_MLO"
    dicom.save(dicom.dataset_2d(stored, shot, name), root / folder / f"{name}.dcm", rle)
    files = [(f"{folder}/{name}.dcm", 2)]
    if (side, view) == patient.tomo:
        volume = tomosynthesis(slab, vendor.even_out, rng)
        volume = np.stack([dicom.display(v, slab.thickness == 0, vendor, mm, rng) for v in volume])
        volume = np.round(volume if side == "L" else volume[..., ::-1]).astype(np.uint16)
        name += "_tomo"
        shot = dataclasses.replace(shot, mm=mm)
        dicom.save(dicom.dataset_tomo(volume, shot, name), root / folder / f"{name}.dcm")
        files.append((f"{folder}/{name}.dcm", 1))

    cancer = any(finding.lesion.malignant for finding in slab.findings)
    truth = (patient.density, int(cancer), int(bool(slab.findings)))
    row = (shot.patient_id, shot.uid("study"), side, view, *truth)
    labels = [dict(zip(LABEL_COLUMNS, (file, *row), strict=True)) for file, _ in files]
    boxes = [_finding_row(file, scale, slab, found, side) for file, scale in files for found in slab.findings]
    return labels, boxes


def _finding_row(file: str, scale: int, slab: Slab, finding: Finding, laterality: str) -> dict:
    """The finding's box in the pixels of a file; scale is 2 for a 2D image, 1 for a volume's slices."""
    slices, rows, columns = slab.path.shape
    y0, x0 = np.floor(scale * (finding.low[1:] / slab.mm + 0.5)).clip(0).astype(int)
    y1, x1 = np.ceil(scale * (finding.high[1:] / slab.mm + 0.5)).astype(int)
    y1, x1 = min(y1, scale * rows), min(x1, scale * columns)
    if laterality == "R":
        x0, x1 = scale * columns - x1, scale * columns - x0
    malignant = finding.lesion.malignant
    middle = min(max(round(float(finding.center[0]) + (slices - 1) / 2), 0), slices - 1)
    birads, pathology = (5, "malignant") if malignant else (2, "benign")
    head = (file, finding.lesion.category, birads, pathology, "box")
    return dict(zip(FINDING_COLUMNS, (*head, y0, x0, y1, x1, middle if scale == 1 else ""), strict=True))
