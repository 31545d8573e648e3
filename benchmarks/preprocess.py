"""Images per second of the preprocessing by transfer syntax: the whole chain, the bare decode, and medip.

    python -m benchmarks.preprocess --files SHARED/data/dicom/*.dcm --medip-env ENV --output table.md

For each syntax of a synthetic mammogram (4096 x 3328, 12 bit, 31 % tissue, its noise such that JPEG lossless
makes about 5.5 MB of it):

- decode: the fastest decoder alone, called on a frame's bytes that are in memory already; for native files
  the file's read and numpy.frombuffer; for fast_j2k Pillow at half size.
- chain: all that a build does with a file: header (twice: to plan, to build), decode, mask, box, window,
  resize to 1024, CLAHE, flip, record, index row, SHA-256 of the file; not the writing of shards (3 ms each).
- medip: its defaults, one worker, in an environment of its own; (time of N files - of one) / (N - 1), so
  without its start. It writes a 16-bit PNG of full size and a JSON; it does not resize.
  Its extra `jpeg` is installed without pylibjpeg-libjpeg (GPL); python-gdcm takes the place of that.

Medians of CPU time (user and system) on one core, files in the page cache.
"""

import argparse
import dataclasses
import functools
import io
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine  # isort: skip (before numpy: it sets the number of threads)
import cv2
import imagecodecs
import numpy as np
import PIL.Image
import pydicom
from pydicom import encaps, uid
from pydicom.dataset import Dataset, FileMetaDataset

from data_prep import shards
from data_prep.plan import Row, identify
from data_prep.prepare import prepare
from data_prep.read import scan
from data_prep.reject import Reject
from data_prep.settings import Settings

NATIVE, J2K = uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless
ENCODERS = {
    uid.JPEGLosslessSV1: functools.partial(imagecodecs.jpeg8_encode, lossless=True, bitspersample=12),
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    J2K: functools.partial(imagecodecs.jpeg2k_encode, codecformat="j2k", level=0, bitspersample=12),
    uid.HTJ2KLossless: imagecodecs.htj2k_encode,
}
CASES = {  # of the table: (transfer syntax, fast_j2k)
    "native": (NATIVE, False), "RLE": (uid.RLELossless, False),
    "JPEG lossless SV1": (uid.JPEGLosslessSV1, False), "JPEG-LS lossless": (uid.JPEGLSLossless, False),
    "JPEG 2000 lossless": (J2K, False), "JPEG 2000 lossless, fast_j2k": (J2K, True),
    "HTJ2K lossless": (uid.HTJ2KLossless, False),
}  # fmt: skip
MEDIP = ("medip", "pylibjpeg", "pylibjpeg-openjpeg", "python-gdcm")
VERSIONS = ("numpy", "opencv-python-headless", "imagecodecs", "pydicom", "pillow")


def synthetic_mammogram(height: int, width: int, seed: int = 0, bits: int = 12) -> np.ndarray:
    """u16 [H, W]: a half ellipse of tissue on exact zeros, chest wall on the left. Levels, texture and noise
    are about those of a GE Senographe Essential image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    depth = 1 - np.sqrt(((y / height - 0.5) / 0.46) ** 2 + (x / width / 0.43) ** 2)
    texture = 0
    for scale in (8, 32, 128):  # coarse to fine, each as strong as it is coarse
        small = rng.normal(0, 1, (scale * 4, scale * 3)).astype(np.float32)
        texture = texture + cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC) / np.sqrt(scale)
    image = 2300 * np.clip(depth / 0.08, 0.05, 1) + 450 * texture + rng.normal(0, 30, depth.shape)
    return np.where(depth > 0, np.clip(image, 1, 4095), 0).astype(np.uint16) >> (12 - bits)


def write_dicom(
    path: Path, pixels: np.ndarray, syntax: uid.UID = NATIVE, bits: int = 12, **attributes
) -> Path:
    """Write u16 [H, W] as a mammogram, [frames, H, W] as a tomosynthesis volume."""
    volume = pixels.ndim == 3
    frames = pixels if volume else pixels[None]
    ds = Dataset()
    ds.SOPClassUID = (
        uid.BreastTomosynthesisImageStorage
        if volume
        else uid.DigitalMammographyXRayImageStorageForPresentation
    )
    ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID = (uid.generate_uid() for _ in range(3))
    ds.PatientID, ds.Modality, ds.Manufacturer = "SYNTHETIC", "MG", "SYNTHETIC"
    ds.PresentationIntentType, ds.ImageLaterality, ds.ViewPosition = "FOR PRESENTATION", "L", "CC"
    ds.ImagerPixelSpacing = [0.07, 0.07]
    ds.Rows, ds.Columns = frames.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    if volume:
        ds.NumberOfFrames = len(frames)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax if syntax in ENCODERS else NATIVE
    data = frames.astype("<u2").tobytes()
    if syntax in ENCODERS:
        data = encaps.encapsulate([ENCODERS[syntax](np.ascontiguousarray(frame)) for frame in frames])
    ds.add_new("PixelData", "OW", data)
    ds["PixelData"].is_undefined_length = syntax in ENCODERS
    if syntax == uid.RLELossless:
        ds.compress(syntax)
    for name, value in attributes.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def chain(path: Path, settings: Settings) -> list[bytes]:
    """All that a build does with one file: its records, in memory, and the file's facts."""
    planned = identify(0, Row(path, path.name), scan(path, settings))
    found, _ = shards.make_records(planned, settings, "benchmark", b"k" * 32, [])
    return [record for _, record in found]


def decode_alone(path: Path, settings: Settings):
    """A function that decodes the first frame, and its decoder's name: the fastest there is, which but for
    HTJ2K is what the chain uses (OpenJPH returns garbage for broken streams without an error)."""
    frames = prepare([path], settings).frames
    ds = pydicom.dcmread(path)
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        count = ds.Rows * ds.Columns
        return lambda: np.frombuffer(path.read_bytes(), "<u2", count, path.stat().st_size - 2 * count), "read"
    data = next(encaps.generate_frames(ds.PixelData, number_of_frames=int(ds.get("NumberOfFrames") or 1)))

    def pillow():
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.reduce = frames.halvings
            image.load()

    name = "htj2k" if ds.file_meta.TransferSyntaxUID == uid.HTJ2KLossless else frames.decoder
    name = "dicomrle" if name == "rle" else name
    if name == "pillow":
        return pillow, name
    decoder, dtype = getattr(imagecodecs, f"{name}_decode"), {"dtype": "<u2"} if name == "dicomrle" else {}
    return functools.partial(decoder, data, **dtype), name


def install_medip(folder: Path) -> str:
    """An environment with medip; returns what is in it."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "medip").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *MEDIP], check=True)
    code = (
        "import importlib.metadata as m, sys; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    )
    return subprocess.run(
        [python, "-c", code, *MEDIP], check=True, text=True, capture_output=True
    ).stdout.strip()


def medip_seconds(env: Path, path: Path, folder: Path, files: int) -> float | None:
    """CPU time for each further file; None where it fails on it."""

    def run(count: int) -> float | None:
        source, target = folder / "medip_in", folder / "medip_out"
        for part in (source, target):
            shutil.rmtree(part, ignore_errors=True)
        source.mkdir()
        for i in range(count):
            shutil.copy(path, source / f"{i}.dcm")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [env / "bin" / "medip", "run", "-i", source, "-o", target, "-j", "1"]
        subprocess.run(command, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if len(list(target.glob("**/*.png"))) < count:
            return None
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    one, many = run(1), run(files)
    return None if one is None or many is None else (many - one) / (files - 1)


def fidelity(path: Path) -> tuple[float, float, int]:
    """Half-size against full decoding of a JPEG 2000 file: rms difference of records without CLAHE where both
    have tissue, as they are and within the same box, in grey levels; how many source pixels the box moved."""
    full, fast = (prepare([path], Settings(clahe=0, fast_j2k=halved)) for halved in (False, True))
    aligned = dataclasses.replace(fast, box=full.box, mask=full.mask)
    one, *others = (next(prepared.images()) for prepared in (full, fast, aligned))
    rms = []
    for other in others:
        if other.shape != one.shape:
            other = cv2.resize(other, one.shape[::-1], interpolation=cv2.INTER_AREA)
        both = (one > 0) & (other > 0)
        rms.append(float(np.sqrt(((one[both].astype(float) - other[both]) ** 2).mean())))
    return *rms, max(abs(a - b) for a, b in zip(full.box, fast.box, strict=True))


def measure(path: Path, settings: Settings, repeats: int) -> tuple[float, float, str]:
    """(seconds of the decode alone, of the chain, the decoder's name)."""
    decode, name = decode_alone(path, settings)
    return *machine.cpu_seconds(repeats, decode, lambda: chain(path, settings)), name


def speeds(alone: float, whole: float, decoder: str) -> list[str]:
    return [
        f"{alone * 1e3:.1f} ({decoder})",
        f"{whole * 1e3:.1f}",
        f"{1 / whole:.1f}",
        f"{whole / alone:.2f}",
    ]


def synthetic(args, folder: Path) -> tuple[list[list], list[str]]:
    """Rows of the table of syntaxes, and lines below it."""
    image = synthetic_mammogram(*args.shape)
    rows, times = [], {}
    for name, (syntax, fast) in CASES.items():
        path = folder / f"{syntax}.dcm"
        if not path.exists():
            write_dicom(path, image, syntax)
        alone, whole, decoder = measure(path, Settings(fast_j2k=fast), args.repeats)
        times[name] = alone, whole
        row = [
            name,
            f"{path.stat().st_size / 1e6:.1f}",
            f"{alone * 1e3:.1f} ({decoder})",
            f"{whole * 1e3:.1f}",
        ]
        row += [f"{1 / whole:.1f}", f"{whole / alone:.2f}"]
        if args.medip_env:
            other = medip_seconds(args.medip_env, path, folder, args.medip_files)
            row += ["does not decode it", ""] if other is None else [f"{other:.2f} s", f"{other / whole:.1f}"]
        rows.append(row)
    ll, full, fast = (
        times[name] for name in ("JPEG lossless SV1", "JPEG 2000 lossless", "JPEG 2000 lossless, fast_j2k")
    )
    lines = [
        f"JPEG lossless: the chain takes {ll[1] / ll[0]:.2f} x the fastest decode alone.",
        f"fast_j2k against full decoding: {full[1] / fast[1]:.1f} x as fast in the whole chain "
        f"({full[0] / fast[0]:.1f} x in decoding).",
    ]
    files = [path for path in args.files if "J2K" in path.name]
    for seed in range(args.seeds):
        path = folder / f"j2k_{seed}.dcm"
        files.append(write_dicom(path, synthetic_mammogram(*args.shape, seed), J2K))
    for path in files:
        rms, aligned, moved = fidelity(path)
        lines.append(
            f"fast_j2k, {path.name}: records (no CLAHE) differ by {rms:.2f} grey levels rms; within the "
            f"same box by {aligned:.2f}; the box moved by {moved} of the file's pixels."
        )
    return rows, lines


def volumes(args, folder: Path) -> list[list]:
    rows, cut = [], args.shape[0] < 4096
    shape = (614, 472) if cut else (2457, 1890)
    slices = np.stack([synthetic_mammogram(*shape, seed, bits=10) for seed in range(4)] * (1 if cut else 6))
    for name in ("native", "JPEG lossless SV1"):
        path = write_dicom(folder / "volume.dcm", slices, CASES[name][0], bits=10)
        repeats = max(1, args.repeats // 3)
        (seconds,) = machine.cpu_seconds(repeats, lambda path=path: chain(path, Settings()))
        size = f"{path.stat().st_size / 1e6:.0f}"
        rows.append([name, len(slices), size, f"{seconds:.2f}", f"{len(slices) / seconds:.1f}"])
    return rows


def real(args) -> list[list]:
    rows = []
    for path in args.files:
        try:
            header = scan(path, Settings())
            alone, whole, decoder = measure(path, Settings(), args.repeats)
        except Reject as reject:
            rows.append([path.name, f"rejected: {reject.code}", "", "", "", "", ""])
            continue
        size = f"{header.rows} x {header.columns} x {len(header.frames)}"
        name = uid.UID(header.syntax).name.split(",")[0].removesuffix(" Image Compression")
        rows.append([path.name, name, size, *speeds(alone, whole, decoder)])
    return rows


def report(args) -> str:
    contents = install_medip(args.medip_env) if args.medip_env else ""
    with tempfile.TemporaryDirectory() as folder:
        rows, lines = synthetic(args, Path(folder))
        columns = ["syntax", "MB", "decode, ms", "chain, ms", "images/s/core", "chain / decode"]
        columns += ["medip", "speed / medip"] if args.medip_env else []
        text = machine.head(args.command, VERSIONS) + "One core, one thread, CPU time.\n"
        text += f"\nSynthetic, {args.shape[0]} x {args.shape[1]}, 12 bit, long side of the record 1024:\n\n"
        text += machine.table(columns, rows) + "\n" + "".join(f"- {line}\n" for line in lines)
        text += f"- In medip's environment: {contents}.\n" if contents else ""
        columns = ["synthetic tomosynthesis volume, 10 bit", "slices", "MB", "chain, s", "slices/s/core"]
        text += "\n" + machine.table(columns, volumes(args, Path(folder)))
        if args.files:
            columns = [
                "real file",
                "syntax",
                "size",
                "decode, ms",
                "chain, ms",
                "files/s/core",
                "chain / decode",
            ]
            text += "\n" + machine.table(columns, real(args))
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="real DICOM files")
    parser.add_argument("--medip-env", type=Path, help="folder of medip's environment, made if absent")
    parser.add_argument("--medip-files", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=4, help="synthetic images for the fidelity of fast_j2k")
    parser.add_argument("--output", type=Path, help="write the Markdown here too")
    parser.add_argument("--quick", action="store_true", help="small images, one repeat, no medip: for a test")
    args = parser.parse_args(arguments)
    args.shape = (1024, 832) if args.quick else (4096, 3328)
    if args.quick:
        args.repeats, args.seeds, args.medip_env = 1, 1, None
    args.command = machine.command("benchmarks.preprocess", arguments)
    machine.pin()
    machine.finish(report(args), args.output)


if __name__ == "__main__":
    main()
