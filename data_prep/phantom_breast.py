"""A synthetic breast in 3D, and its compression for a mammographic view.

One breast is one model: power-law fibroglandular tissue thresholded to a density class, Cooper's ligaments as
thin sheets, skin, nipple, pectoral muscle and stiff lesions. Compression is a smooth map between the breast
and a slab 22 to 29 mm thick (thin for a real breast; it keeps volumes small).

Breast coordinates in mm: u lateral, v superior, a anterior of the chest wall; A, V, U its grid. View
coordinates in mm: z along the beam (0 = mid-slab), y down the image, x from the chest wall. Slabs: K slices
of 1 mm, Y rows, X columns from the chest wall, whatever the side.
"""

import dataclasses
import math

import cv2
import numpy as np

from data_prep.phantom_dicom import VENDORS, Vendor

FAT, GLAND = 0.0456, 0.0802  # linear attenuation at 20 keV in 1/mm (Johns and Yaffe 1987)
GLAND_SHARE = (0.04, 0.14, 0.34, 0.60)  # of the volume in density A-D; ours, spread to be told apart
DETECTOR_MM = (240, 180)  # rows, columns
SKIN_MM = 1.5
GRID_MM = 0.85  # of the tissue fields


@dataclasses.dataclass(frozen=True)
class Lesion:
    category: str  # mass | calcification: a cluster of microcalcifications
    malignant: bool
    place: tuple[float, float, float]  # u, v, a in mm
    radius: float  # mm, of the mass or of the cluster


@dataclasses.dataclass(frozen=True)
class Patient:
    seed: int
    number: int  # 0-based
    name: str
    density: int  # 0-3 for A-D
    vendor: Vendor
    tomo: tuple[str, str]  # laterality and view of the tomosynthesis volume
    radius: float  # mm, half height of the compressed breast
    depth: float  # mm, chest wall to nipple
    half: float  # mm, half compressed thickness
    angles: dict[str, float]  # of the beam from the vertical, radians by view
    lesion_side: str
    lesions: tuple[Lesion, ...]


@dataclasses.dataclass(frozen=True)
class Breast:
    patient: Patient
    seed: tuple[int, ...]
    fields: np.ndarray  # f32 [A, V, U, 2]: fibroglandular power-law field, ligament field
    grid: float  # mm
    threshold: float  # of field + prior: tissue above is fibroglandular
    lesions: tuple[Lesion, ...]


@dataclasses.dataclass
class Slab:
    path: np.ndarray  # f32 [K, Y, X]: attenuation of each 1 mm of the beam
    thickness: np.ndarray  # f32 [Y, X] in mm; 0 is air
    mm: float
    specks: list = dataclasses.field(default_factory=list)  # (z, y, x, diameter) mm; too fine for `path`
    findings: list = dataclasses.field(default_factory=list)  # (Lesion, box [2, 3]: lowest, highest z, y, x)


def make_patient(seed: int, number: int) -> Patient:
    """Draw patient `number` (0-based). Density, status and vendor are balanced apart from each other."""

    def balanced(what: int, values: tuple):  # each len(values) successive patients hold each value once
        block, place = divmod(number, len(values))
        return values[np.random.default_rng([seed, what, block]).permutation(len(values))[place]]

    rng = np.random.default_rng([seed, 10, number])
    radius = rng.uniform(58, 82)
    depth = radius * rng.uniform(1.0, 1.3)
    status = balanced(2, ("healthy",) * 3 + ("benign",) * 2 + ("malignant",) * 3)
    lesions = []
    for malignant in [status == "malignant"] + [False] * int(rng.random() < 0.3):
        category = "mass" if rng.random() < 0.6 else "calcification"
        small = category == "mass" and rng.random() < 0.4  # 2 to 5 mm across, else up to 15 mm
        size = rng.uniform(1.0, 2.5) if small else rng.uniform(3.0, 7.5)
        place = rng.uniform((-0.38, -0.38, 0.3), (0.38, 0.38, 0.68)) * (radius, radius, depth)
        lesions.append(Lesion(category, malignant, tuple(place), size))
    return Patient(
        seed=seed, number=number, name=f"PHANTOM-{number + 1:04d}", density=balanced(1, (0, 1, 2, 3)),
        vendor=balanced(3, VENDORS), tomo=(("L", "CC"), ("R", "MLO"), ("L", "MLO"), ("R", "CC"))[number % 4],
        radius=radius, depth=depth, half=int(rng.integers(22, 30)) / 2,
        angles={"CC": 0.0, "MLO": math.radians(rng.uniform(42, 55))}, lesion_side="LR"[rng.integers(2)],
        lesions=() if status == "healthy" else tuple(lesions),
    )  # fmt: skip


def make_breast(patient: Patient, laterality: str, coarsen: float = 1.0) -> Breast:
    """Grow one breast; both sides of a patient share size and density, not texture."""
    seed = (patient.seed, 20, patient.number, "LR".index(laterality))
    mm = GRID_MM * coarsen
    fields = _tissue_fields(np.random.default_rng(seed), mm)
    a, v, u = np.meshgrid(*(np.arange(0, n, 2) * mm for n in fields.shape[:3]), indexing="ij", sparse=True)
    v, u = v - fields.shape[1] * mm / 2, u - fields.shape[2] * mm / 2
    inside = (u * u + v * v) / patient.radius**2 + (a / patient.depth) ** 2 < 1
    score = fields[::2, ::2, ::2, 0] + _prior(patient, u, v, a)
    threshold = float(np.quantile(score[inside], 1 - GLAND_SHARE[patient.density]))
    lesions = patient.lesions if laterality == patient.lesion_side else ()
    return Breast(patient, seed, fields, mm, threshold, lesions)


def _tissue_fields(rng: np.random.Generator, mm: float) -> np.ndarray:
    """Two Gaussian fields of unit variance, f32 [A, V, U, 2]: for gland and for ligaments. The first has an
    f^-3.3 power spectrum, flat below 1/35 mm; thresholded and projected, the exponent is about 3 from 0.1 to
    0.8 per mm, as that of mammograms (Burgess, Jacobson and Judy 2001)."""
    shape = [2 * round(mm_side / mm / 2) for mm_side in (110, 164, 164)]
    fa, fv, fu = (np.fft.fftfreq(n, mm).astype(np.float32) for n in shape)
    fu = np.abs(fu[: shape[2] // 2 + 1])
    # Strands run towards the nipple: the field varies less along a.
    f = np.sqrt((1.8 * fa[:, None, None]) ** 2 + fv[:, None] ** 2 + fu**2)
    fields = np.empty((*shape, 2), np.float32)
    for i, amplitude in enumerate(((f * f + 1 / 35**2) ** -0.825, np.exp(-((f - 1 / 12) ** 2) / 0.0018))):
        noise = rng.standard_normal((*f.shape, 2), dtype=np.float32).view(np.complex64)[..., 0] * amplitude
        noise[0, 0, 0] = 0
        field = np.fft.irfftn(noise, s=shape, axes=(0, 1, 2))
        fields[..., i] = field / field.std()
    return fields


def _prior(patient: Patient, u, v, a) -> np.ndarray:
    """Where fibroglandular tissue grows: a disc behind the nipple, rather up and out; not under the skin."""
    u, v, a = u / patient.radius, v / patient.radius, a / patient.depth
    size = (0.9, 0.95, 1.05, 1.25)[patient.density]
    disc = ((u - 0.12) ** 2 + (v - 0.08) ** 2) / (0.62 * size) ** 2 + ((a - 0.55) / (0.50 * size)) ** 2
    return -0.8 * disc - 9 * np.clip(np.sqrt(u * u + v * v + a * a) - 0.74, 0, 0.5)


def compress(breast: Breast, view: str, mm: float) -> Slab:
    """Compress a breast for a view, CC or MLO; pixels of mm. K is the compressed thickness in mm."""
    patient, half = breast.patient, breast.patient.half
    rows, columns = (round(side / mm) for side in DETECTOR_MM)
    nipple = DETECTOR_MM[0] * (0.5 if view == "CC" else 0.6)
    y, x = np.float32(np.arange(rows) * mm - nipple), np.float32(np.arange(columns) * mm)
    z = np.arange(2 * half, dtype=np.float32) + 0.5 - half
    inside = (x < _outline(patient, view, y)[:, None]).astype(np.uint8)
    # Padded: no skin at the chest wall and the frame's top. Blurred: the outline is finer than its pixels.
    padded = cv2.copyMakeBorder(inside, rows, 0, columns, 1, cv2.BORDER_REPLICATE)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[rows:, columns:-1] * np.float32(mm)
    rim = np.clip(1 - cv2.GaussianBlur(depth, None, 1.2) / half, 0, 1)
    thickness = np.where(inside, 2 * half * np.sqrt(1 - rim**2), 0).astype(np.float32)
    path = np.zeros((columns, len(z), rows), np.float32)
    for j in np.flatnonzero(inside.any(0)):
        ys = slice(*(np.flatnonzero(inside[:, j])[[0, -1]] + [0, 1]))
        path[j, :, ys] = _column(breast, view, float(x[j]), y[None, ys], z[:, None], rim[ys, j])
    slab = Slab(np.ascontiguousarray(path.transpose(1, 2, 0)), thickness, mm)
    for i, lesion in enumerate(breast.lesions):
        # Lesions are stiff: they move with the tissue (as in _column), keep their shape, stay under the skin.
        (u, v, x), c, s = lesion.place, math.cos(patient.angles[view]), math.sin(patient.angles[view])
        y, w = nipple - c * u - s * v, s * u - c * v
        z = half / 3 * math.asinh(w / patient.radius * math.sinh(3))
        room = thickness[round(y / mm), round(x / mm)] / 2 - SKIN_MM - lesion.radius
        center = np.array([np.clip(z, -room, room), y, x])
        draw = _mass if lesion.category == "mass" else _cluster
        rng = np.random.default_rng([*breast.seed, 2, i])
        slab.findings.append((lesion, draw(slab, lesion, center, rng)))
    return slab


def _outline(patient: Patient, view: str, y: np.ndarray) -> np.ndarray:
    """Breast edge x in mm at rows y mm (relative to the nipple), nipple bump included."""
    bulge = np.clip(1 - np.abs(y / patient.radius) ** 2.3, 0, None) ** 0.5
    if view == "MLO":  # the axillary tail runs out of the frame's top
        bulge = np.where(y < 0, 0.5 + 0.5 * np.clip(1 - np.abs(y / 150) ** 1.9, 0, None) ** 1.3, bulge)
    return patient.depth * bulge + np.where(bulge > 0.9, 5.0 * np.exp(-((y / 4.5) ** 4)), 0)


def _column(breast: Breast, view: str, x: float, y, z, rim) -> np.ndarray:
    """Path [K, Y] of the slab's plane at x mm; y [1, Y] from the nipple, z [K, 1] in mm, rim [Y] 0..1."""
    patient, grid, angle = breast.patient, breast.grid, breast.patient.angles[view]
    c, s = math.cos(angle), math.sin(angle)
    # Compression is strongest near the paddles (fat is soft), slight in the core.
    w = patient.radius * np.sinh(3 * z / patient.half) / math.sinh(3)
    u, v = -c * y + s * w, -s * y - c * w
    # Lobes and ducts converge on the nipple: the field shrinks towards it.
    scale = grid * (1.2 - 0.7 * min(x / patient.depth, 1.0) ** 1.5)
    planes, rows, columns, _ = breast.fields.shape
    i, fraction = divmod(min(x / grid, planes - 1.001), 1)
    plane = cv2.addWeighted(breast.fields[int(i)], 1 - fraction, breast.fields[int(i) + 1], fraction, 0)
    at = (np.float32(u / scale + columns / 2), np.float32(v / scale + rows / 2))
    field, ligament = np.moveaxis(cv2.remap(plane, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), -1, 0)
    score = field + _prior(patient, u, v, x) - breast.threshold
    gland = (0.5 + 0.5 * np.tanh(score / 0.3)) * (0.85 + 0.15 * np.tanh(score))
    share = np.maximum(gland, 0.6 * np.exp(-((ligament / 0.09) ** 2)))
    if view == "MLO":  # pectoral muscle: a wedge down to the nipple's level, slanted along the beam
        height = np.clip((10 - y) / 155, 0, 1)
        edge = 0.42 * patient.depth * height**0.85 - 4 + 0.5 * z * np.minimum(3 * height, 1)
        share = np.maximum(share, (0.8 + 0.1 * field) / (1 + np.exp(np.clip((x - edge) / 0.8, -30, 30))))
    below = patient.half * (1 - np.sqrt(rim**2 + (z / patient.half) ** 2))  # mm under the surface
    # Slices are 1 mm: surfaces are softened over 1 mm, or they would show as contour lines.
    share += np.clip(SKIN_MM - below + 0.5, 0, 1) * (0.9 - share)
    return (FAT + (GLAND - FAT) * share) * np.clip(below + 0.5, 0, 1)


def _mass(slab: Slab, lesion: Lesion, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a mass at center (z, y, x) mm and return its box: round, sharp, of gland's density if benign;
    irregular, spiculated, denser if malignant."""
    bad, size = lesion.malignant, lesion.radius
    mu, margin, rough = (1.25 * GLAND, 1.0, 0.10) if bad else (1.03 * GLAND, 0.5, 0.03)  # 1/mm, mm, of size
    spacing, middle = np.array([1, slab.mm, slab.mm]), np.array([(len(slab.path) - 1) / 2, 0, 0])
    ends = ((center + way * (3 * size + margin)) / spacing + middle for way in (-1, 1))
    low, high = (end.round().clip(0, slab.path.shape).astype(int) for end in ends)
    part = slab.path[tuple(map(slice, low, high + 1))]
    offset = np.float32((np.moveaxis(np.indices(part.shape), 0, -1) + low - middle) * spacing - center)
    distance = np.linalg.norm(offset, axis=-1)
    way = offset / np.maximum(distance, 1e-3)[..., None]
    lumps = np.cos(way @ rng.normal(0, 2.5, (3, 6)) + rng.uniform(0, 6.3, 6)).sum(-1)
    edge = size * (1 + rough * lumps)
    weight = np.clip((edge - distance) / (2 * margin) + 0.5, 0, 1) * (part > 0)
    part += weight * np.maximum(mu - part, 0)
    for _ in range(30 if bad else 0):  # spicules: rays that start in the mass, thin out and end
        way = rng.standard_normal(3)
        along = offset @ np.float32(way / np.linalg.norm(way))
        fade = np.clip(1 - along / (size * rng.uniform(1.6, 3)), 0, 1) * (along > 0.7 * size) * (part > 0)
        part += 0.12 * fade * np.exp((along**2 - distance**2) / 0.2)
    return center + np.array([[-1], [1]]) * size * (1.4 if bad else 1.1)


def _cluster(slab: Slab, lesion: Lesion, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As `_mass`, of calcified specks: many and varied if malignant; few and alike if benign."""
    count = rng.integers(20, 45) if lesion.malignant else rng.integers(5, 10)
    size = rng.uniform(0.2, 0.5, count) if lesion.malignant else np.full(count, rng.uniform(0.4, 0.65))
    at = center + np.clip(rng.standard_normal((count, 3)), -2, 2) * lesion.radius / [3, 2.2, 2.2]
    slab.specks.extend(np.column_stack([at, size]))
    return np.array([at.min(0) - 1, at.max(0) + 1])
