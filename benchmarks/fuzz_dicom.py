"""Break DICOM files at random and check that the reader survives them: python benchmarks/fuzz_dicom.py
--files F... --count 3000 --seed 0

Each mutant is prepared in a worker process (started again when it dies or hangs). A mutant fails when it
crashes the worker, takes over LIMIT_S seconds, lets the worker's resident memory grow by over LIMIT_GB,
raises anything but `Reject`, is accepted although a decoder printed an error and went on, or although pixel
data were cut off. Flipped bits in pixel data may be accepted: nothing but a checksum tells them from a real
image. Failing mutants are kept with --keep DIR.
"""

import argparse
import logging
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.prepare import prepare
from data_prep.reject import Reject
from data_prep.settings import Settings

LIMIT_S, LIMIT_GB = 20, 2.0
_LONG_VRS = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
_CLAIMED = (
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "SamplesPerPixel",
    "PixelRepresentation",
)


@dataclass
class Layout:
    """Where things are in a DICOM file, found without the reader under test."""

    data: bytes
    elements: list[tuple[int, int, int, str]]  # start, place of the length, its size, keyword; by place
    values: dict[str, int]  # keyword: place of the value
    pixels: int  # start of the pixel data element
    items: list[tuple[int, int]]  # encapsulated: place of each fragment's length, and the length
    frames: int
    needed: int  # end of the last byte that an image needs

    @classmethod
    def of(cls, path: Path) -> "Layout":
        data, elements, values = path.read_bytes(), [], {}
        with open(path, "rb") as file:
            ds = pydicom.dcmread(file, force=True, stop_before_pixels=True)
            pixels = file.tell()
        for tag in ds.keys():  # noqa: SIM118 (values would parse the elements and lose their places)
            raw = ds.get_item(tag)
            place = getattr(raw, "value_tell", None) or raw.file_tell
            long = not ds.original_encoding[0] and raw.VR in _LONG_VRS
            size = 4 if long or ds.original_encoding[0] else 2
            name = pydicom.datadict.keyword_for_tag(tag)
            elements.append((place - (12 if long else 8), place - size, size, name))
            values[name] = place
        start = pixels + (8 if ds.original_encoding[0] else 12)
        items, at, frames = [], start, int(ds.get("NumberOfFrames") or 1)
        if ds.file_meta.TransferSyntaxUID.is_encapsulated:
            while data[at : at + 4] == b"\xfe\xff\x00\xe0":
                length = struct.unpack("<I", data[at + 4 : at + 8])[0]
                items.append((at + 4, length))
                at += 8 + length
            needed = len(data[:at].rstrip(b"\0"))
        else:
            needed = start + ds.Rows * ds.Columns * ds.BitsAllocated // 8 * frames
        return cls(data, sorted(elements), values, pixels, items, frames, needed)


def mutate(layout: Layout, rng: np.random.Generator) -> tuple[str, bytes, bool]:
    """(what was done, the bytes, whether pixel data are missing now)."""
    data, missing = bytearray(layout.data), False
    choices = ["header_bits", "pixel_bits", "cut", "delete_tag", "length", "claim", "frames", "bytes"]
    choices += ["stream_head", "stream_size", "stream_cut", "fragment"] * bool(layout.items)
    what = str(rng.choice(choices))
    huge = int(rng.choice([0, 1, 2, 255, 4097, 20001, 32768, 60000, 65535]))
    if what in ("header_bits", "pixel_bits", "bytes"):
        low, high = (layout.pixels, len(data)) if what == "pixel_bits" else (0, layout.pixels + 200)
        for at in rng.integers(low, min(high, len(data)), rng.integers(1, 9)):
            data[at] = int(rng.integers(256)) if what == "bytes" else data[at] ^ (1 << int(rng.integers(8)))
    elif what == "cut":
        span = len(data) if rng.random() < 0.5 else min(len(data), 400)
        at = len(data) - int(rng.integers(1, span + 1))
        data, missing = data[:at], at < layout.needed
    elif what == "delete_tag":
        i = int(rng.integers(len(layout.elements)))
        ends = [element[0] for element in layout.elements[1:]] + [layout.pixels]
        del data[layout.elements[i][0] : ends[i]]
    elif what == "length":
        place = (layout.pixels, layout.pixels + 8, 4, "") if rng.random() < 0.2 else None
        _, at, size, _ = place or layout.elements[int(rng.integers(len(layout.elements)))]
        now = int.from_bytes(data[at : at + size], "little")
        new = int(
            rng.choice([0, 1, now + 1, now + 2, now * 2 + 8, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
        )
        data[at : at + size] = (new & (256**size - 1)).to_bytes(size, "little")
    elif what == "claim":
        at = layout.values[str(rng.choice([name for name in _CLAIMED if name in layout.values]))]
        data[at : at + 2] = struct.pack("<H", huge)
    elif what == "frames":
        at = next(e[0] for e in layout.elements if e[3] == "Rows")
        text = str(rng.choice(["0", "2", "-1", "400", "99999", "1e9", "nan", "2147483647"])).encode()
        text += b" " * (len(text) % 2)
        data[at:at] = b"\x28\0\x08\0IS" + struct.pack("<H", len(text)) + text
    else:
        at, length = layout.items[int(rng.integers(1, len(layout.items)))]
        if what == "fragment":
            data[at : at + 4] = struct.pack(
                "<I", int(rng.choice([0, 2, length - 2, length + 2, 0x7FFFFFF0, 2**32 - 1]))
            )
        elif what == "stream_cut":  # whole as a file, but the stream in it is not: as an encoder leaves it
            if len(layout.items) - 1 != layout.frames:  # a hole between two fragments is as bit rot
                at, length = layout.items[-1]
            keep = max(0, length - 2 - int(rng.integers(1, length if rng.random() < 0.5 else 200))) // 2 * 2
            data[at : at + 4 + length] = struct.pack("<I", keep) + data[at + 4 : at + 4 + keep]
            missing = True
        else:
            head = data[at + 4 : at + 4 + min(length, 200)]
            marks = [
                i for m in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc3", b"\xff\x51") if (i := head.find(m)) >= 0
            ]
            if what == "stream_size" and marks:
                jpeg, place = head[marks[0] + 1] != 0x51, at + 4 + marks[0]
                place += int(rng.choice([5, 7] if jpeg else [6, 10, 14, 18, 22, 26]))
                data[place : place + (2 if jpeg else 4)] = struct.pack(">H" if jpeg else ">I", huge)
            else:
                data[at + 4 + int(rng.integers(len(head)))] = int(rng.integers(256))
    return what, bytes(data), missing


def work(pipe, first: Path) -> None:
    """Prepare the files whose paths come in; send (outcome, peak resident GB of this process) back. `first`,
    an unbroken file, sets the base line."""
    warnings.simplefilter("ignore")
    logging.disable()
    swallowed, path = [], first
    sys.unraisablehook = lambda found: swallowed.append(repr(found.exc_value))  # of decoders that go on
    while path:
        swallowed.clear()
        try:
            outcome = "record" if list(prepare([path], Settings()).images()) else "NO IMAGE"
        except Reject as reject:
            outcome = reject.code
        except BaseException as error:
            outcome = f"EXCEPTION {type(error).__name__}: {str(error)[:200]}"
        if swallowed and outcome == "record":
            outcome = f"SWALLOWED {swallowed[0]}"
        pipe.send((outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))
        path = pipe.recv()


class Worker:
    def __init__(self, path: Path, first: Path):
        context = multiprocessing.get_context("spawn")
        self.path, self.task = path, None
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, first), daemon=True)
        self.process.start()
        other.close()  # so that a dead worker is an end of file
        self.base = self.peak = self.pipe.recv()[1]

    def give(self, data: bytes, *task) -> None:
        self.path.write_bytes(data)
        self.task = *task, time.monotonic()
        self.pipe.send(self.path)

    def take(self) -> tuple[str, float] | None:
        """(outcome, seconds) of the task, None while it runs."""
        seconds = time.monotonic() - self.task[-1]
        if not self.pipe.poll():
            return ("HANG", seconds) if seconds > LIMIT_S else None
        try:
            outcome, self.peak = self.pipe.recv()
        except (EOFError, OSError):
            return "CRASH", seconds
        if self.peak - self.base > LIMIT_GB:
            outcome = f"MEMORY: {self.peak - self.base:.1f} GB more"
        return outcome, seconds

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(files: list[Path], count: int, seed: int, processes: int = 2, keep: Path | None = None) -> dict:
    """Returns {"outcomes": Counter, "failures": [str], "worst_s": (s, mutant), "worst_gb": (growth, mutant),
    "peak_gb": of the largest worker}."""
    layouts, first = [Layout.of(path) for path in files], max(files, key=lambda path: path.stat().st_size)
    result = {
        "outcomes": Counter(),
        "failures": [],
        "worst_s": (0.0, ""),
        "worst_gb": (0.0, ""),
        "peak_gb": 0.0,
    }
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(Path(folder, f"{i}.dcm"), first) for i in range(processes)]
        numbers, done = iter(range(count)), 0
        while done < count:
            for i, worker in enumerate(workers):
                before = worker.peak
                if worker.task and (found := worker.take()):
                    (number, what, missing, _), (outcome, seconds) = worker.task, found
                    worker.task, done = None, done + 1
                    if missing and outcome == "record":
                        outcome = "ACCEPTED without all pixel data"
                    name = f"mutant {number}, {what} of {files[number % len(files)].name}"
                    if outcome[0].isupper():
                        result["failures"].append(f"{name}: {outcome}")
                        print(result["failures"][-1], flush=True)
                        if keep:
                            keep.mkdir(parents=True, exist_ok=True)
                            (keep / f"{number}-{what}.dcm").write_bytes(worker.path.read_bytes())
                    result["outcomes"][outcome.split(":")[0]] += 1
                    result["worst_s"] = max(result["worst_s"], (seconds, name))
                    if worker.peak > before:
                        result["worst_gb"] = max(result["worst_gb"], (worker.peak - worker.base, name))
                    result["peak_gb"] = max(result["peak_gb"], worker.peak)
                    if outcome.startswith(("HANG", "CRASH", "MEMORY")):
                        worker.stop()
                        worker = workers[i] = Worker(worker.path, first)
                if worker.task is None and (number := next(numbers, None)) is not None:
                    rng = np.random.default_rng([seed, number])
                    what, data, missing = mutate(layouts[number % len(files)], rng)
                    worker.give(data, number, what, missing)
            wait([worker.pipe for worker in workers if worker.task], timeout=0.5 if done < count else 0)
        for worker in workers:
            worker.stop()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--files", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the mutants that fail")
    options = parser.parse_args()
    start = time.monotonic()
    found = fuzz(options.files, options.count, options.seed, options.processes, options.keep)
    for outcome, number in found["outcomes"].most_common():
        print(f"{number:6d} {outcome}")
    print(f"longest: {found['worst_s'][0]:.1f} s, {found['worst_s'][1]}")
    print(f"most memory: {found['worst_gb'][0]:.2f} GB above the base line, {found['worst_gb'][1]}; "
          f"largest worker {found['peak_gb']:.2f} GB")  # fmt: skip
    print(f"{len(found['failures'])} failures of {options.count}, {time.monotonic() - start:.0f} s")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
