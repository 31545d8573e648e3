"""A synthetic breast in 3D, and its compression for a mammographic view.

One breast is one model: power-law fibroglandular tissue thresholded to a density class, Cooper's ligaments as
thin sheets, skin, vessels, nipple, pectoral muscle and stiff lesions. Compression is a smooth map between the
breast and a slab 22 to 29 mm thick (thin for a real breast; it keeps volumes small).

Breast coordinates in mm: u lateral, v superior, a anterior of the chest wall. View coordinates in mm: z along
the beam (0 = mid-slab), y down the image, x from the chest wall. Arrays: K slices of 1 mm, Y rows, X columns
from the chest wall; A, V, U the breast's grid.
"""

import dataclasses
import math

import cv2
import numpy as np

from data_prep.phantom_dicom import VENDORS, Vendor

# Linear attenuation at 20 keV in 1/mm (Johns and Yaffe 1987).
FAT, GLAND = 0.0456, 0.0802
DENSITY_CLASSES = ("A", "B", "C", "D")
GLAND_FRACTION = (0.04, 0.14, 0.34, 0.60)  # of the breast's volume; our choice, spread to be told apart
STATUSES = ("healthy",) * 3 + ("benign",) * 2 + ("malignant",) * 3
SKIN_MM = 1.5
GRID_MM = 0.85  # of the tissue fields


@dataclasses.dataclass(frozen=True)
class Lesion:
    """A mass or a cluster of microcalcifications at (u, v, a) mm of the breast."""

    category: str  # mass | calcification
    malignant: bool
    place: tuple[float, float, float]
    radius: float  # mm, of the mass or of the cluster
    seed: tuple[int, ...]  # of its shape, so that both views draw the same lesion


@dataclasses.dataclass(frozen=True)
class Finding:
    """Where a lesion lies in a view: f32 [3] (z, y, x) in mm from mid-slab and the first pixel's centre."""

    lesion: Lesion
    center: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Patient:
    number: int
    density: int  # index into DENSITY_CLASSES
    status: str
    vendor: Vendor
    tomo: tuple[str, str]  # laterality and view of the tomosynthesis volume
    radius: float  # mm, half height of the compressed breast
    depth: float  # mm, chest wall to nipple
    roundness: float  # exponent of the outline: 2 is an ellipse
    muscle: float  # mm of pectoral muscle in the CC view; none where negative
    half: float  # mm, half compressed thickness
    mlo_angle: float  # radians
    lesion_side: str


@dataclasses.dataclass(frozen=True)
class Breast:
    patient: Patient
    laterality: str
    fields: np.ndarray  # f32 [A, V, U, 2]: fibroglandular power-law field, ligament field
    grid: float  # mm
    threshold: float  # of field + prior: tissue above is fibroglandular
    center: tuple[float, float, float]  # of the fibroglandular disc, mm (u, v, a)
    lesions: tuple[Lesion, ...]
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slab:
    """A compressed breast, its chest wall at column 0 whatever the side."""

    path: np.ndarray  # f32 [K, Y, X]: attenuation of each 1 mm of the beam
    thickness: np.ndarray  # f32 [Y, X] in mm; 0 is air
    specks: np.ndarray  # f32 [N, 4]: z, y, x, diameter in mm; not in `path`, finer than its pixels
    findings: list[Finding]
    mm: float


def _block(seed: int, patient: int, what: int, values: tuple):
    """The patient's value, where each len(values) successive patients hold each value once."""
    block, place = divmod(patient, len(values))
    return values[np.random.default_rng([seed, what, block]).permutation(len(values))[place]]


def make_patient(seed: int, number: int) -> Patient:
    """Draw patient `number` (0-based). Density, status and vendor are balanced apart from each other."""
    rng = np.random.default_rng([seed, 10, number])
    radius = rng.uniform(58, 82)
    return Patient(
        number=number,
        density=_block(seed, number, 1, (0, 1, 2, 3)),
        status=_block(seed, number, 2, STATUSES),
        vendor=_block(seed, number, 3, VENDORS),
        tomo=(("L", "CC"), ("R", "MLO"), ("L", "MLO"), ("R", "CC"))[number % 4],
        radius=radius,
        depth=radius * rng.uniform(1.0, 1.3),
        roundness=rng.uniform(1.9, 2.7),
        muscle=rng.uniform(-8, 6),
        half=int(rng.integers(22, 30)) / 2,
        mlo_angle=math.radians(rng.uniform(42, 55)),
        lesion_side=str(rng.choice(["L", "R"])),
    )


def _tissue_fields(rng: np.random.Generator, mm: float) -> np.ndarray:
    """Two Gaussian fields of unit variance, f32 [A, V, U, 2]: for gland and for ligaments.

    The first has an f^-3.3 power spectrum, flat below 1/35 mm; thresholded and projected, the exponent is 2.6
    to 3.2 from 0.1 to 0.8 per mm; that of mammograms is about 3 (Burgess, Jacobson and Judy 2001).
    """
    shape = [2 * round(mm_side / mm / 2) for mm_side in (110, 164, 164)]
    fa, fv, fu = (np.fft.fftfreq(n, mm).astype(np.float32) for n in shape)
    fu = np.abs(fu[: shape[2] // 2 + 1])
    # Strands run towards the nipple: the field varies less along a.
    f = np.sqrt((1.8 * fa[:, None, None]) ** 2 + fv[:, None] ** 2 + fu**2)
    gland = (f * f + np.float32(1 / 35**2)) ** -0.825
    band = np.exp(-((f - 1 / 12) ** 2) / (2 * 0.03**2))
    fields = np.empty((*shape, 2), np.float32)
    for i, amplitude in enumerate((gland, band)):
        noise = rng.standard_normal((*f.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
        noise *= amplitude
        noise[0, 0, 0] = 0
        field = np.fft.irfftn(noise, s=shape, axes=(0, 1, 2))
        fields[..., i] = field / field.std()
    return fields


def _prior(u, v, a, patient: Patient, center) -> np.ndarray:
    """Where fibroglandular tissue grows: a disc behind the nipple, never in the fat under the skin."""
    size = (0.9, 0.95, 1.05, 1.25)[patient.density]
    disc = ((u - center[0]) ** 2 + (v - center[1]) ** 2) / (0.62 * size * patient.radius) ** 2
    disc = disc + ((a - center[2]) / (0.50 * size * patient.depth)) ** 2
    r = np.sqrt((u * u + v * v) / patient.radius**2 + (a / patient.depth) ** 2)
    return -0.8 * disc - 9 * np.clip(r - 0.74, 0, 0.5)


def make_breast(patient: Patient, laterality: str, seed: int, coarsen: float) -> Breast:
    """Grow one breast; both sides of a patient share size and density, not texture."""
    seeds = (seed, 20, patient.number, "LR".index(laterality))
    rng = np.random.default_rng(seeds)
    mm = GRID_MM * coarsen
    fields = _tissue_fields(rng, mm)
    center = (
        rng.uniform(0.05, 0.2) * patient.radius,  # mostly in the upper outer quadrant
        rng.uniform(0.0, 0.15) * patient.radius,
        rng.uniform(0.5, 0.6) * patient.depth,
    )
    step = max(1, round(4 / coarsen))
    a, v, u = (np.arange(0, n, step, dtype=np.float32) * mm for n in fields.shape[:3])
    a, v, u = a[:, None, None], (v - fields.shape[1] * mm / 2)[:, None], u - fields.shape[2] * mm / 2
    inside = (u * u + v * v) / patient.radius**2 + (a / patient.depth) ** 2 < 1
    score = fields[::step, ::step, ::step, 0] + _prior(u, v, a, patient, center)
    threshold = float(np.quantile(score[inside], 1 - GLAND_FRACTION[patient.density]))
    lesions = _draw_lesions(patient, rng, seeds) if laterality == patient.lesion_side else ()
    return Breast(patient, laterality, fields, mm, threshold, center, lesions, seeds)


def _draw_lesions(patient: Patient, rng: np.random.Generator, seeds: tuple[int, ...]) -> tuple[Lesion, ...]:
    if patient.status == "healthy":
        return ()
    malignant = [patient.status == "malignant"] + [False] * int(rng.random() < 0.3)
    lesions = []
    for i, bad in enumerate(malignant):
        category = "mass" if rng.random() < 0.6 else "calcification"
        small = rng.random() < 0.4  # 2 to 5 mm across, else up to 15 mm
        radius = rng.uniform(1.0, 2.5) if small and category == "mass" else rng.uniform(3.0, 7.5)
        a = rng.uniform(0.3, 0.75)
        r, phi = 0.6 * math.sqrt(rng.random() * (1 - a * a)), rng.uniform(0, 2 * math.pi)
        place = (r * math.cos(phi) * patient.radius, r * math.sin(phi) * patient.radius, a * patient.depth)
        lesions.append(Lesion(category, bad, place, radius, (*seeds, i)))
    return tuple(lesions)


# ---- compression: breast to view ----


def view_angle(patient: Patient, view: str) -> float:
    """Angle of the beam from the vertical, radians."""
    return 0.0 if view == "CC" else patient.mlo_angle


def _outline(patient: Patient, view: str, y: np.ndarray) -> np.ndarray:
    """Breast edge x in mm at rows y mm (relative to the nipple), nipple bump included."""
    s = y / patient.radius
    bulge = np.clip(1 - np.abs(s) ** patient.roundness, 0, None) ** 0.5
    if view == "MLO":  # the axillary tail runs out of the frame's top, the fold under the breast closes it
        tail = 0.5 + 0.5 * np.clip(1 - (np.abs(y) / 150) ** 1.9, 0, None) ** 1.3
        fold = np.clip(1 - np.abs(s) ** 2.6, 0, None) ** 0.55
        bulge = np.where(y < 0, tail, fold)
    return patient.depth * bulge + np.where(bulge > 0.9, 5.0 * np.exp(-((y / 4.5) ** 4)), 0)


def _material_half(patient: Patient, y, x) -> np.ndarray:
    """Half extent in mm, along the beam, of the uncompressed breast at (y, x)."""
    rest = 1 - (y / patient.radius) ** 2 - (x / patient.depth) ** 2
    return patient.radius * np.sqrt(np.clip(rest, 0.1, None))


def _uncompress(z, half, material_half) -> np.ndarray:
    """Uncompressed depth of slab depth z: 1.5 times z in the core, more near the paddles (fat is soft)."""
    core = np.minimum(1.5, material_half / half)
    return core * z + (material_half - core * half) * (z / half) ** 3


def _compress_place(patient: Patient, view: str, place) -> tuple[float, float, float]:
    """View coordinates (z, y, x) in mm of a place (u, v, a) of the breast."""
    u, v, a = place
    c, s = math.cos(view_angle(patient, view)), math.sin(view_angle(patient, view))
    y, w = -c * u - s * v, s * u - c * v
    z = np.linspace(-patient.half, patient.half, 201)
    return float(np.interp(w, _uncompress(z, patient.half, _material_half(patient, y, a)), z)), y, a


def compress(breast: Breast, view: str, rows: int, columns: int, mm: float) -> Slab:
    """Compress a breast for a view.

    Args:
      breast: the 3D model.
      view: CC or MLO.
      rows, columns: of the detector at slab resolution; the chest wall is column 0 whatever the side.
      mm: pixel size.

    Returns:
      The slab with its lesions, K = compressed thickness in mm.
    """
    patient = breast.patient
    y_nipple = rows * mm * (0.5 if view == "CC" else 0.6)
    y = (np.arange(rows) * mm - y_nipple).astype(np.float32)
    x = (np.arange(columns) * mm).astype(np.float32)
    z = np.arange(2 * patient.half, dtype=np.float32) + 0.5 - patient.half
    inside = (x < _outline(patient, view, y)[:, None]).astype(np.uint8)
    # Padded: no skin at the chest wall and the frame's top. Blurred: the outline is finer than its pixels.
    padded = cv2.copyMakeBorder(inside, rows, 0, columns, 1, cv2.BORDER_REPLICATE)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[rows:, columns:-1] * np.float32(mm)
    rim = np.clip(1 - cv2.GaussianBlur(depth, None, 1.2) / patient.half, 0, 1)
    thickness = np.where(inside, 2 * patient.half * np.sqrt(1 - rim**2), 0).astype(np.float32)

    path = np.zeros((columns, len(z), rows), np.float32)
    for j in np.flatnonzero(inside.any(0)):
        tissue = np.flatnonzero(inside[:, j])
        ys = slice(tissue[0], tissue[-1] + 1)
        path[j, :, ys] = _column(breast, view, float(x[j]), y[None, ys], z[:, None], rim[ys, j])
    path = np.ascontiguousarray(path.transpose(1, 2, 0))
    slab = Slab(path, thickness, np.zeros((0, 4), np.float32), [], mm)
    return _add_structures(slab, breast, view, y_nipple)


def _column(breast: Breast, view: str, x: float, y, z, rim) -> np.ndarray:
    """Path [K, Y] of the slab's plane at x mm; y [1, Y] from the nipple, z [K, 1] in mm, rim [Y] 0..1."""
    patient, grid = breast.patient, breast.grid
    c, s = math.cos(view_angle(patient, view)), math.sin(view_angle(patient, view))
    w = _uncompress(z, patient.half, _material_half(patient, y, x))
    u, v = -c * y + s * w, -s * y - c * w
    # Lobes and ducts converge on the nipple: the field shrinks towards it.
    scale = grid * (1.2 - 0.7 * min(x / patient.depth, 1.0) ** 1.5)
    planes, rows, columns, _ = breast.fields.shape
    i, fraction = divmod(min(x / grid, planes - 1.001), 1)
    plane = cv2.addWeighted(breast.fields[int(i)], 1 - fraction, breast.fields[int(i) + 1], fraction, 0)
    at = (np.float32(u / scale + columns / 2), np.float32(v / scale + rows / 2))
    field, ligament = np.moveaxis(cv2.remap(plane, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), -1, 0)

    score = field + _prior(u, v, x, patient, breast.center) - breast.threshold
    gland = (0.5 + 0.5 * np.tanh(score / 0.3)) * (0.85 + 0.15 * np.tanh(score))
    share = np.maximum(gland, 0.6 * np.exp(-((ligament / 0.09) ** 2)))
    share = np.maximum(share, _pectoral(patient, view, x, y, z) * (0.8 + 0.1 * field))
    below = patient.half * (1 - np.sqrt(rim**2 + (z / patient.half) ** 2))  # mm under the surface
    # Slices are 1 mm: surfaces are softened over 1 mm, or they would show as contour lines.
    share += np.clip(SKIN_MM - below + 0.5, 0, 1) * (0.9 - share)
    return (FAT + (GLAND - FAT) * share) * np.clip(below + 0.5, 0, 1)


def _pectoral(patient: Patient, view: str, x, y, z) -> np.ndarray:
    """Muscle share [K, Y]: MLO a wedge down to the nipple's level, slanted along the beam; CC a sliver."""
    if view == "CC":
        edge = patient.muscle - (y / 22) ** 2 + 0.2 * z
    else:
        height = np.clip((10 - y) / 155, 0, 1)
        edge = 0.42 * patient.depth * height**0.85 - 4 + 0.5 * z * np.minimum(3 * height, 1)
    return 1 / (1 + np.exp(np.clip((x - edge) / 0.8, -30, 30)))


# ---- structures drawn into the compressed slab ----


def _add_structures(slab: Slab, breast: Breast, view: str, y_nipple: float) -> Slab:
    rng = np.random.default_rng([*breast.seed, 1])
    for _ in range(4):
        points, diameter = _vessel(rng, breast.patient, view)
        _tube(slab, points + np.float32([0, y_nipple, 0]), diameter, GLAND - FAT, rng)
    specks, findings = [slab.specks], []
    for lesion in breast.lesions:
        z, y, x = _compress_place(breast.patient, view, lesion.place)
        y += y_nipple
        # Lesions are stiff: they move with the tissue, keep their shape and stay under the skin.
        room = slab.thickness[round(y / slab.mm), round(x / slab.mm)] / 2 - SKIN_MM
        z = float(np.clip(z, min(lesion.radius - room, 0), max(room - lesion.radius, 0)))
        center = np.float32([z, y, x])
        rng = np.random.default_rng([*lesion.seed, 2])
        if lesion.category == "mass":
            _mass(slab, lesion, center, rng)
            reach = lesion.radius * (1.4 if lesion.malignant else 1.1)
            low, high = center - reach, center + reach
        else:
            specks.append(_cluster(lesion, center, min(lesion.radius, room), rng))
            low, high = specks[-1][:, :3].min(0) - 1, specks[-1][:, :3].max(0) + 1
        findings.append(Finding(lesion, center, low, high))
    return dataclasses.replace(slab, specks=np.concatenate(specks).astype(np.float32), findings=findings)


def _vessel(rng: np.random.Generator, patient: Patient, view: str) -> tuple[np.ndarray, np.ndarray]:
    """A wavy vessel under the skin: points f32 [N, 3] (z, y, x; y from the nipple), diameters [N], in mm."""
    t = np.linspace(0, 1, 240)
    phi = rng.uniform(0, 2 * math.pi)
    wave = sum(rng.normal() / k * np.sin(k * math.pi * t + rng.uniform(0, 6.3)) for k in range(1, 7))
    a = (0.05 + rng.uniform(0.5, 0.75) * t) * patient.depth
    r = 0.72 * patient.radius * np.sqrt(1 - (a / patient.depth) ** 2)
    u, v = r * np.cos(phi + 0.25 * wave), r * np.sin(phi + 0.25 * wave)
    points = [_compress_place(patient, view, place) for place in zip(u, v, a, strict=True)]
    return np.float32(points), rng.uniform(1.2, 2.2) * (1 - 0.6 * t)


def _tube(slab: Slab, points: np.ndarray, diameter: np.ndarray, mu: float, rng: np.random.Generator) -> None:
    """Add a tube of extra attenuation `mu` (1/mm) along points [N, 3] in mm, sampled at random."""
    samples = 24
    step = np.linalg.norm(np.diff(points, axis=0, append=points[-1:]), axis=1)
    weight = mu * math.pi / 4 * diameter**2 * step / slab.mm**2 / samples
    offset = rng.standard_normal((samples, *points.shape)) * (diameter[:, None] / 4)
    index = (points + offset) / [1, slab.mm, slab.mm] + [(slab.path.shape[0] - 1) / 2, 0, 0]
    base = np.floor(index).astype(int)
    fraction = index - base
    for corner in np.ndindex(2, 2, 2):  # trilinear
        at = base + corner
        share = np.prod(np.where(corner, fraction, 1 - fraction), axis=-1) * weight
        ok = ((at >= 0) & (at < slab.path.shape)).all(-1)
        np.add.at(slab.path, tuple(at[ok].T), share[ok] * (slab.path[tuple(at[ok].T)] > 0))


def _mass(slab: Slab, lesion: Lesion, center: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a mass: round, sharp, of gland's density if benign; irregular, spiculated, denser if malignant."""
    bad = lesion.malignant
    waves, phases = rng.standard_normal((6, 3)) * (3.0 if bad else 1.2), rng.uniform(0, 6.3, 6)
    mu = GLAND * (rng.uniform(1.15, 1.35) if bad else rng.uniform(0.95, 1.1))
    margin = rng.uniform(0.8, 1.4) if bad else 0.5  # mm
    spacing, middle = np.array([1, slab.mm, slab.mm]), np.array([(slab.path.shape[0] - 1) / 2, 0, 0])
    reach = 1.6 * lesion.radius + margin
    low = np.maximum(np.floor((center - reach) / spacing + middle), 0).astype(int)
    high = np.ceil((center + reach) / spacing + middle).astype(int) + 1
    part = slab.path[tuple(slice(*ends) for ends in zip(low, high, strict=True))]
    offset = (np.moveaxis(np.indices(part.shape), 0, -1) + low - middle) * spacing - center
    distance = np.linalg.norm(offset, axis=-1)
    lumps = np.cos(offset / np.maximum(distance, 1e-3)[..., None] @ waves.T + phases).sum(-1)
    radius = lesion.radius * (1 + (0.10 if bad else 0.04) * lumps)
    weight = np.clip((radius - distance) / (2 * margin) + 0.5, 0, 1) * (part > 0)
    part += (weight * np.maximum(mu - part, 0)).astype(np.float32)
    for _ in range(30 if bad else 0):  # spicules
        way = rng.standard_normal(3)
        way /= np.linalg.norm(way)
        t = np.linspace(0.7, rng.uniform(1.4, 2.4), 40)[:, None]
        points = center + lesion.radius * (way * t + 0.06 * rng.standard_normal(3) * t**2)
        _tube(slab, points, np.linspace(1.2, 0.4, 40), 0.05, rng)


def _cluster(lesion: Lesion, center: np.ndarray, half: float, rng: np.random.Generator) -> np.ndarray:
    """Specks [N, 4] (z, y, x, diameter in mm): many and varied if malignant; few and alike if benign."""
    count = int(rng.integers(12, 30) if lesion.malignant else rng.integers(5, 10))
    spread = np.array([half / 3, lesion.radius / 2.2, lesion.radius / 2.2])
    at = center + np.clip(rng.standard_normal((count, 3)), -2, 2) * spread
    if not lesion.malignant:
        return np.column_stack([at, np.full(count, rng.uniform(0.3, 0.45))])
    size = rng.uniform(0.2, 0.5, count)
    chained = rng.random(count) < 0.35  # drawn out along a duct: chains of three grains
    way = rng.standard_normal((count, 3)) * [0.3, 1, 1]
    way *= (0.5 * size / np.linalg.norm(way, axis=1))[:, None]
    grains = np.concatenate([at, (at + way)[chained], (at - way)[chained]])
    return np.column_stack([grains, np.concatenate([size, 0.8 * size[chained], 0.7 * size[chained]])])
