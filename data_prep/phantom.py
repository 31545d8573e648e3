"""Synthetic mammograms with known truth: `python -m data_prep phantom`.

Each breast is one 3D model (phantom_breast.py). Its 2D views are projections of the compressed model, its
tomosynthesis volume is shift-and-add of eleven filtered projections of the same slab, parallel beams sweeping
along the chest wall. One energy, no scatter, quantum noise only.
"""

import contextlib
import csv
import functools
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data_prep import phantom_breast as anatomy
from data_prep.phantom_breast import FAT, Lesion, Patient, Slab
from data_prep.phantom_dicom import WHITE, uid, write_dicom
from mammodino_jax.errors import UserError

CALC = 1.6  # 1/mm at 20 keV: calcium phosphate, taken as porous
NOISE_2D, NOISE_TOMO = 0.022, 0.030  # quantum noise of the log of an unattenuated pixel, per projection
TOMO_ANGLES = np.radians(np.linspace(-20, 20, 11))

LABELS = {
    "label_density": {"classes": list("ABCD"), "level": "exam", "rule":
                      f"simulated: fibroglandular share of the breast about {anatomy.GLAND_SHARE}"},
    "label_cancer": {"classes": ["no cancer", "cancer"], "level": "image", "rule":
                     "simulated: a spiculated mass or a pleomorphic cluster lies in the imaged breast"},
    "label_lesion": {"classes": ["no finding", "finding"], "level": "image", "rule":
                     "simulated: any mass or cluster, benign or malignant, lies in the imaged breast"},
}  # fmt: skip
LABEL_COLUMNS = ("file", "patient_id", "study_id", "laterality", "view", *LABELS)
FINDING_COLUMNS = ("file", "category", "birads", "pathology", "shape", "y0", "x0", "y1", "x1", "slice_index")
README = """SYNTHETIC digital breast phantoms: python -m data_prep phantom --patients {patients} --seed {seed}
No real patient, no real device; scores on these images are not clinical performance. A patient has four 2D
views and one tomosynthesis volume, all from one 3D model of each breast.
labels.csv    a row a file: side, view, and the labels that labels.json explains
findings.csv  a row a lesion in a file: box in the file's pixels (end exclusive), 0-based slice of its centre
"""


def project(slab: Slab, rng: np.random.Generator) -> np.ndarray:
    """The 2D image of a slab, f32 [2Y, 2X] log attenuation; rng is the noise's."""
    path = cv2.resize(slab.path.sum(0), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC).clip(0)
    # cv2.resize aligns pixel edges; the slab's origin is a pixel's centre: a quarter of a slab pixel apart.
    for _, y, x, diameter in slab.specks:
        _add_speck(path, y + slab.mm / 4, x + slab.mm / 4, diameter, slab.mm / 2)
    path += NOISE_2D * np.exp(path / 2) * rng.standard_normal(path.shape, dtype=np.float32)
    return cv2.GaussianBlur(path, None, 0.6)


def tomosynthesis(slab: Slab, rng: np.random.Generator) -> np.ndarray:
    """Slices f32 [K, Y, X] by shift-and-add of filtered projections; unit and rng as `project`."""
    layers, slices = slab.path.copy(), len(slab.path)
    for z, y, x, diameter in slab.specks:
        _add_speck(layers[round(z + (slices - 1) / 2)], y, x, diameter, slab.mm)
    volume = np.zeros_like(layers)
    for angle in TOMO_ANGLES:
        shifts = (np.arange(slices) - (slices - 1) / 2) * math.tan(angle) / slab.mm
        path = sum(map(_shift, layers, shifts))
        path += NOISE_TOMO * np.exp(path / 2) * rng.standard_normal(path.shape, dtype=np.float32)
        # Ramp-like along the sweep; low frequencies stay, for the look of a mammogram.
        smooth = cv2.GaussianBlur(path, (1, 0), sigmaX=1e-3, sigmaY=3.0 / slab.mm)
        path = cv2.GaussianBlur(path + 1.2 * (path - smooth), None, 0.5)
        volume += [_shift(path, -shift) for shift in shifts]
    return volume / len(TOMO_ANGLES)


def _shift(image: np.ndarray, rows: float) -> np.ndarray:
    """Move an image down by a fractional number of rows, the border replicated."""
    move, size = np.float32([[1, 0, 0], [0, 1, rows]]), image.shape[::-1]
    return cv2.warpAffine(image, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _add_speck(path: np.ndarray, y: float, x: float, diameter: float, mm: float) -> None:
    """Add to a path image [Y, X] a calcified sphere: its attenuation, spread by its and the pixel's width."""
    variance = diameter**2 / 20 + mm**2 / 12
    reach = math.ceil(3 * math.sqrt(variance) / mm)
    rows, columns = (round(at / mm) + np.arange(-reach, reach + 1) for at in (y, x))
    spread = np.exp(-((rows[:, None] * mm - y) ** 2 + (columns * mm - x) ** 2) / (2 * variance))
    path[np.ix_(rows, columns)] += CALC * math.pi / 6 * diameter**3 / mm**2 * spread / spread.sum()


def present(path: np.ndarray, slab: Slab, patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """The vendor's presentation processing of a log attenuation f32 [Y, X]: greys f32 [Y, X], 0..4095."""
    mm = slab.mm * slab.path.shape[1] / len(path)
    # Peripheral equalisation takes away most of a fatty breast's path.
    thickness = cv2.resize(cv2.GaussianBlur(slab.thickness, None, 2.0 / slab.mm), path.shape[::-1])
    image = (path - 0.80 * FAT * thickness) * (2 / len(slab.path))
    image += 0.5 * (image - cv2.GaussianBlur(image, None, 4.0 / mm))
    level, noise = patient.vendor.background
    grey = level + (WHITE - level) * np.clip(image / 0.11, 0, 1) ** patient.vendor.gamma
    haze = level + noise * rng.standard_normal(image.shape, dtype=np.float32)
    tissue = cv2.resize(slab.thickness, path.shape[::-1]) > 0
    return np.maximum(grey * tissue, haze).clip(0, WHITE)


def _finish_2d(image: np.ndarray, patient: Patient, laterality: str, view: str, mm: float) -> np.ndarray:
    """Shade the border (not at the chest wall), turn to the side, burn the label in, set the polarity."""
    vendor, rows, left = patient.vendor, len(image), laterality == "L"
    edge = round(vendor.border / mm)
    if edge:
        image = cv2.copyMakeBorder(np.maximum(image, 1)[edge:-edge, :-edge], edge, edge, 0, edge, 0)
    image = image if left else image[:, ::-1]
    text, font, margin = f"{laterality} {view}", cv2.FONT_HERSHEY_SIMPLEX, rows // 20
    (width, height), _ = cv2.getTextSize(text, font, rows / 700, rows // 400 + 1)
    at = (image.shape[1] - margin - width if left else margin, margin + height)  # away from the chest wall
    label = np.zeros(image.shape, np.uint8)  # OpenCV 5 draws text on uint8 only
    cv2.putText(label, text, at, font, rows / 700, 255, rows // 400 + 1, cv2.LINE_AA)
    image = np.maximum(image, label * np.float32(WHITE / 255))
    return WHITE - image if vendor.photometric == "MONOCHROME1" else image


def write_phantoms(output: Path, patients: int, seed: int, workers: int = 1, coarsen: float = 1.0) -> dict:
    """Write synthetic exams as DICOM files, with their truth as CSV.

    Patient i depends on the seed and i alone: more patients add files and change none. The same seed gives
    the same bytes whatever `workers`. All is written to OUTPUT.partial, which is renamed when complete.
    `coarsen` multiplies every pixel size; above 1 only for tests. Returns the counts {"patients", "files",
    "volumes", "findings"}. Raises UserError: the output is not an empty folder, or a number out of range.
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
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (1,))
            run = stack.enter_context(pool).imap
        rows = list(tqdm(run(job, range(patients)), total=patients, desc="phantoms", unit="patient"))
    labels, findings = ([row for part in parts for row in part] for parts in zip(*rows, strict=True))
    for name, rows in (("labels", [LABEL_COLUMNS, *labels]), ("findings", [FINDING_COLUMNS, *findings])):
        with (partial / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    (partial / "labels.json").write_text(json.dumps(LABELS, indent=1) + "\n")
    (partial / "README.txt").write_text(README.format(patients=patients, seed=seed))
    partial.replace(output)
    return {"patients": patients, "files": len(labels), "volumes": patients, "findings": len(findings)}


def _write_patient(root: Path, seed: int, coarsen: float, number: int) -> tuple[list[tuple], list[tuple]]:
    """Image one patient: four 2D views and a volume. Returns the label and the finding rows of its files."""
    patient = anatomy.make_patient(seed, number)
    folder, labels, findings = f"P{number + 1:04d}", [], []
    (root / folder).mkdir()
    mm = patient.vendor.mm * coarsen
    for side in "LR":
        breast = anatomy.make_breast(patient, side, coarsen)
        for view in ("CC", "MLO"):
            slab = anatomy.compress(breast, view, mm)
            rng = np.random.default_rng([*breast.seed, 3, len(view)])
            image = present(project(slab, rng), slab, patient, rng)
            files = [(f"{side}_{view}", _finish_2d(image, patient, side, view, mm / 2), mm / 2)]
            if (side, view) == patient.tomo:
                volume = np.stack([present(path, slab, patient, rng) for path in tomosynthesis(slab, rng)])
                files.append((f"{side}_{view}_tomo", volume if side == "L" else volume[..., ::-1], mm))
            malignant = [int(lesion.malignant) for lesion, _ in slab.findings]
            truth = (patient.density, max(malignant, default=0), int(bool(malignant)))
            for name, image, pixel in files:
                file = f"{folder}/{name}.dcm"
                write_dicom(root / file, np.round(image).astype(np.uint16), patient, side, view, pixel)
                labels.append((file, patient.name, uid("study", seed, number), side, view, *truth))
                findings += [_finding(file, image.shape, slab, *found, side) for found in slab.findings]
    return labels, findings


def _finding(file: str, shape: tuple, slab: Slab, lesion: Lesion, box: np.ndarray, laterality: str) -> tuple:
    """The row of a lesion in a file of shape [Y, X] or [K, Y, X], its box in that file's pixels."""
    (rows, columns), scale = shape[-2:], shape[-2] / slab.path.shape[1]
    y0, x0 = np.floor(scale * (box[0, 1:] / slab.mm + 0.5)).clip(0).astype(int)
    y1, x1 = np.ceil(scale * (box[1, 1:] / slab.mm + 0.5)).clip(0, (rows, columns)).astype(int)
    if laterality == "R":
        x0, x1 = columns - x1, columns - x0
    middle = round(box[:, 0].mean() + (len(slab.path) - 1) / 2) if len(shape) == 3 else ""
    birads, pathology = (5, "malignant") if lesion.malignant else (2, "benign")
    return file, lesion.category, birads, pathology, "box", y0, x0, y1, x1, middle
