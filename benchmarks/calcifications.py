"""How small a calcification is still visible in records of which size.

    python -m benchmarks.calcifications --file SHARED/data/dicom/GH133.dcm --output table.md

Spheres are added to the stored pixels of a mammogram at places in its tissue, and the whole preprocessing
runs with and without them.

Contrast model (assumed): a sphere of d mm adds CONTRAST * local level * chord / 0.5 mm, the local level
being the mean of the stored values within 1 mm, the chord that of the beam through the sphere, averaged over
each detector pixel. So the peak of a sphere of 0.5 mm is 15 % of the level, that of 0.2 mm 6 %, less what the
pixel blurs; focus, motion and scatter are left out. Why 15 %: calcium phosphate taken as porous attenuates
1.6 /mm at 20 keV (data_prep.phantom), gland 0.08; 0.5 mm of it change the logarithm of the exposure by 0.76.
In an image of that logarithm (50 mm of tissue make about 3) this is 25 %, of which processing and scatter
leave an unknown part. The cells' ratios hardly depend on it; without CLAHE the CNR is proportional to it.

CNR: what an observer measures who knows the calcification's shape. A template is the planted signal as the
record's geometry shows it, less its mean; its product with (record with - record without) is the signal; its
products with the record without at all places within 6 mm have a standard deviation: the noise. So it counts
at the size of the calcification, and slow changes of the tissue do not (Rose's signal-to-noise ratio for
a background that is not white). Rose's criterion: visible from 3 to 5 on.

`16 bit` is what the table of 8 bits costs: the same mask, box and window, stored values resized, window in
float, rounded to 65,535 levels. CLAHE of 8 bits has no counterpart there.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import machine  # isort: skip (before numpy: it sets the number of threads)
import cv2
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian

from data_prep.prepare import Prepared, prepare
from data_prep.read import Frames, scan
from data_prep.settings import Settings

DIAMETERS = (0.2, 0.3, 0.5)  # mm
CONTRAST = 0.15  # of the local level, peak of a sphere of 0.5 mm
ROSE = 3
SIZES = {"518 px": dict(long_side=518), "1024 px": dict(long_side=1024), "2048 px": dict(long_side=2048),
         "0.1 mm/px": dict(mm_per_px=0.1)}  # fmt: skip
KINDS = ("8 bit, CLAHE", "8 bit, no CLAHE", "16 bit, no CLAHE")
AROUND_MM, EDGE_MM, APART_MM = (
    6,
    8,
    5,
)  # of a place: its background; from the tissue's edge; from the next place


def sphere(diameter: float, pixel_mm: float, shift: tuple[float, float]) -> np.ndarray:
    """f64 [2n+1, 2n+1]: mean chord in mm of a sphere at `shift` pixels from the central pixel's middle."""
    n, fine = int(np.ceil(diameter / 2 / pixel_mm)) + 1, 16
    at = ((np.arange((2 * n + 1) * fine) + 0.5) / fine - n - 0.5) * pixel_mm
    y, x = at[:, None] - shift[0] * pixel_mm, at - shift[1] * pixel_mm
    chord = 2 * np.sqrt(np.maximum(diameter**2 / 4 - y**2 - x**2, 0))
    return chord.reshape(2 * n + 1, fine, 2 * n + 1, fine).mean((1, 3))


def choose_places(prepared: Prepared, count: int, rng: np.random.Generator) -> np.ndarray:
    """(y, x) in source pixels, [count, 2]: well inside the tissue, apart from each other."""
    mask, (y0, x0, y1, _), mm = prepared.mask, prepared.box, prepared.header.pixel_mm
    scale = (y1 - y0) / mask.shape[0]
    inside = np.pad(mask, 1).astype(np.uint8)  # the frame's side is an edge too
    far = cv2.distanceTransform(inside, cv2.DIST_L2, 5)[1:-1, 1:-1] * scale * mm > EDGE_MM
    places = []
    for y, x in rng.permutation(np.argwhere(far)) * scale + (y0, x0):
        if all(np.hypot(y - v, x - u) * mm >= APART_MM for v, u in places):
            places.append((y, x))
        if len(places) == count:
            return np.array(places)
    raise SystemExit(f"only {len(places)} of {count} places fit into the tissue; use a larger breast")


def plant(stored: np.ndarray, places: np.ndarray, diameter: float, header) -> np.ndarray:
    """f64 [H, W]: what the spheres add to the stored values."""
    added, mm = np.zeros(stored.shape), header.pixel_mm
    for y, x in places:
        row, column = int(y), int(x)
        near = round(1 / mm)
        level = stored[row - near : row + near + 1, column - near : column + near + 1].mean()
        chord = sphere(diameter, mm, (y - row - 0.5, x - column - 0.5))
        n = len(chord) // 2
        part = added[row - n : row + n + 1, column - n : column + n + 1]
        part += CONTRAST * level * chord / 0.5 * (-1 if header.reversed else 1)
    return added


def write_copy(source: Path, stored: np.ndarray, path: Path) -> Path:
    """The source's header with other pixels, uncompressed."""
    ds = pydicom.dcmread(source)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    del ds.PixelData
    dtype = np.dtype(f"<u{ds.BitsAllocated // 8}")
    ds.add_new("PixelData", "OW", stored.astype(dtype).tobytes())
    ds.save_as(path, enforce_file_format=True)
    return path


def in_geometry(prepared: Prepared, frame: np.ndarray) -> np.ndarray:
    """A frame cropped and resized as the record is; not flipped."""
    (y0, x0, y1, x1), (height, width) = prepared.box, prepared.mask.shape
    how = cv2.INTER_AREA if height < y1 - y0 or width < x1 - x0 else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(frame[y0:y1, x0:x1]), (width, height), interpolation=how)


def record(prepared: Prepared, bits: int) -> np.ndarray:
    """f64 [H, W], not flipped. Of 16 bits: the window in float on resized stored values."""
    if bits == 8:
        image = next(prepared.images())[:, :: -1 if prepared.flipped else 1]
        return image[:: -1 if "upside_down" in prepared.flags else 1].astype(np.float64)
    header, (low, high) = prepared.header, prepared.window
    values = (
        header.slope * (in_geometry(prepared, prepared.frames[0]) - float(header.offset)) + header.intercept
    )
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 65535)


def cnr(
    with_: np.ndarray, without: np.ndarray, signal: np.ndarray, place: tuple[int, int], mm: float, diameter
):
    """See above. `place` in record pixels, mm: their size."""
    (y, x), n, around = place, int(np.ceil(0.75 * diameter / mm)) + 1, round(AROUND_MM / mm)
    here = slice(y - n, y + n + 1), slice(x - n, x + n + 1)
    template = signal[here] - signal[here].mean()
    difference = (template * (with_ - without)[here]).sum()
    background = without[y - around : y + around + 1, x - around : x + around + 1]
    noise = cv2.filter2D(background, cv2.CV_64F, template)[n:-n, n:-n].std()
    return difference / max(noise, 1e-9)


def measure(file: Path, count: int, seed: int) -> dict[tuple, np.ndarray]:
    """CNR of every place by (record size, kind, diameter)."""
    header = scan(file, Settings())
    if header.signed or header.for_processing or not header.pixel_mm or header.high_bit != header.bits - 1:
        raise SystemExit(f"{file.name}: needs unsigned FOR PRESENTATION pixels of a known size")
    stored = Frames(file, header)[0]
    places = choose_places(prepare([file], Settings()), count, np.random.default_rng(seed))
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = write_copy(file, stored, Path(folder) / "plain.dcm")
        for diameter in DIAMETERS:
            added = plant(stored, places, diameter, header)
            planted = np.clip(np.rint(stored + added), 0, (1 << header.bits) - 1)
            marked = write_copy(file, planted, Path(folder) / "marked.dcm")
            for size, fields in SIZES.items():
                for kind in KINDS:
                    bits, clahe = int(kind.split()[0]), 0.0 if "no CLAHE" in kind else 2.0
                    pair = [prepare([path], Settings(clahe=clahe, **fields)) for path in (marked, plain)]
                    if pair[0].box != pair[1].box:
                        raise SystemExit("the calcifications changed the tissue's box")
                    with_, without = (record(prepared, bits) for prepared in pair)
                    signal = in_geometry(pair[1], added) * (-1 if header.reversed else 1)
                    y0, x0, y1, _ = pair[1].box
                    scale = (y1 - y0) / without.shape[0]
                    at = ((places - (y0, x0)) / scale).astype(int)
                    mm = header.pixel_mm * scale
                    result[size, kind, diameter] = np.array(
                        [cnr(with_, without, signal, place, mm, diameter) for place in at]
                    )
    return result


def report(args) -> str:
    result = measure(args.file, args.places, args.seed)
    text = machine.head(
        machine.command("benchmarks.calcifications", args.words),
        ("numpy", "opencv-python-headless", "imagecodecs"),
    )
    text += (
        f"\nCNR: median of {args.places} places in {args.file.name} (share of them with CNR >= {ROSE}).\n\n"
    )
    rows = []
    for size in SIZES:
        cells = [result[size, kind, d] for kind in KINDS for d in DIAMETERS]
        rows.append([size, *(f"{np.median(c):.1f} ({(c >= ROSE).mean():.0%})" for c in cells)])
    text += machine.table(["record", *(f"{d} mm, {kind}" for kind in KINDS for d in DIAMETERS)], rows)
    text += f"\nSmallest diameter with a median CNR >= {ROSE}, of {', '.join(map(str, DIAMETERS))} mm:\n\n"
    rows = []
    for size in SIZES:
        seen = [[d for d in DIAMETERS if np.median(result[size, kind, d]) >= ROSE] for kind in KINDS]
        rows.append([size, *(f"{min(s)} mm" if s else "none" for s in seen)])
    return text + machine.table(["record", *KINDS], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", type=Path, required=True, help="DICOM file FOR PRESENTATION, spacing known")
    parser.add_argument("--places", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the Markdown here too")
    args = parser.parse_args(arguments)
    args.words = arguments
    machine.pin()
    machine.finish(report(args), args.output)


if __name__ == "__main__":
    main()
