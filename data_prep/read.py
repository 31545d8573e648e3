"""Medical file -> frames of stored pixel values, one at a time, and the header's facts.

DICOM of any transfer syntax that imagecodecs or an installed pydicom plug-in decodes, and PNG, JPEG, PGM,
TIFF of 8 or 16 bits. Only one frame is in memory at a time. Fast decoders come first and are not trusted: a
stream that claims another size than the header is not decoded, a result of the wrong shape, with bits above
BitsStored, or constant where the stream is too long for that is refused and the next decoder is asked; how
often is counted. Every file that yields no frames raises `Reject` with a reason code; no other exception
leaves this module.
"""

import functools
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import PIL.Image
import pydicom
from pydicom import pixels, uid
from pydicom.encaps import get_frame

from data_prep.header import MAX_PIXELS, MAX_SIDE, Header, read_header
from data_prep.reject import Reject
from data_prep.settings import Settings

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it quotes header values
INFLATED_MAX = 1 << 29  # bytes of a deflated file: pydicom holds three copies of them
MAX_TILES = 4096  # of a JPEG 2000 stream; decoders keep some kB for each
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"P5": "pgm", b"P2": "pgm",
          b"II*\0": "tiff", b"MM\0*": "tiff"}  # fmt: skip
_ENDINGS = {"png": b"IEND", "jpeg": b"\xff\xd9"}  # a file without its end marker was cut off

_JPEG = (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes)
_J2K = (uid.JPEG2000Lossless, uid.JPEG2000,  # part 2 of the standard is not decoded
        uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)  # fmt: skip
_MARKED = (*_JPEG, *_J2K)  # streams that end with FFD9; without it half an image decodes, of HTJ2K too
_NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian,
           uid.DeflatedExplicitVRLittleEndian)  # fmt: skip
_CODECS = (  # of imagecodecs; jpeg8 reads all of JPEG, jpeg2k also HTJ2K
    (uid.JPEGTransferSyntaxes, "jpeg8"),
    (uid.JPEGLSTransferSyntaxes, "jpegls"),
    (_J2K, "jpeg2k"),
)


@contextmanager
def rejecting(code: str, notes: list[str] | None = None) -> Iterator[None]:
    """Whatever a parser or a decoder throws at a broken file becomes a `Reject`. Warnings go to `notes`: they
    quote header values, which must not reach a log."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        if notes is not None:
            notes += [f"{w.category.__name__}: {str(w.message)[:120]}" for w in caught[:3]]
    except Reject:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the disk; parsers raise OSError without a number
            raise Reject("unreadable", error.strerror) from error
        raise Reject(code, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def is_j2k(header: Header) -> bool:
    return header.syntax in _J2K


def scan(path: Path, settings: Settings) -> Header:
    """Read the header of one file without its pixels.

    Raises:
      Reject: the file is no mammogram that we can use, or that `settings` does not want.
    """
    if not path.is_file():
        raise Reject("missing", "listed in the tables, but not there")
    with rejecting("not_dicom"):
        is_dicom = _sniff(path) == "dicom"
    if not is_dicom:
        return Header(kind=settings.kind, rows=0, columns=0)
    with rejecting("truncated"):
        _check_syntax(path)
        header = read_header(
            pydicom.dcmread(path, force=True, stop_before_pixels=True), settings.vendor_table
        )
    if "burned_in" in header.flags and settings.burned_in == "reject":
        raise Reject("burned_in", "BurnedInAnnotation is YES: text that may identify the patient")
    if header.for_processing and settings.for_processing == "reject":
        raise Reject("for_processing", "raw exposure, excluded by --for-processing reject")
    return header


class Frames:
    """The frames of one file, decoded one at a time.

    `frames[i]` is slice i (in slice order, not file order) as u16 [H, W]: stored values, with 2^(bits-1)
    added where they are signed, so that one look-up table serves all. `fallbacks` counts refused decodes,
    `decoder` names the last decoder used, `notes` holds warnings (not for logs).

    Args:
      path, header: the file, as scanned.
      halvings: decode JPEG 2000 at 1 / 2^halvings of its size where Pillow can; frames are smaller then.
    """

    def __init__(self, path: Path, header: Header, halvings: int = 0):
        self.path, self.header, self.halvings = path, header, halvings
        self.decoder, self.fallbacks, self.notes = "", 0, []
        self._last = None, None  # (index, frame): a 2D image is asked for twice, for its mask and its record
        if header.syntax:
            with rejecting("truncated", self.notes):
                self._find_pixels()

    def __len__(self) -> int:
        return len(self.header.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._last[0] != index:
            with rejecting("decode_error", self.notes):
                self._last = index, self._read(self.header.frames[index])
        return self._last[1]

    def _find_pixels(self) -> None:
        """Find where the pixel data begin, and check that all of them are there."""
        header, file = self.header, open(self.path, "rb")  # noqa: SIM115 (lives as long as we do)
        ds = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        implicit, little = ds.original_encoding
        if header.syntax == uid.DeflatedExplicitVRLittleEndian:
            data = pydicom.dcmread(self.path).get("PixelData") or b""
            file, start, length = io.BytesIO(data), 0, len(data)
        else:
            head, order = file.read(8 if implicit else 12), "<" if little else ">"
            if len(head) < (8 if implicit else 12) or struct.unpack(f"{order}HH", head[:4]) != (0x7FE0, 0x10):
                raise Reject("truncated", "no pixel data")
            start, length = file.tell(), struct.unpack(f"{order}I", head[-4:])[0]
        self._file, self._start = file, start
        there, count = file.seek(0, 2) - start, len(header.frames)
        self._tables = ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths")
        if uid.UID(header.syntax).is_encapsulated:
            if (found := _fragments(file, start)) < count:
                raise Reject("truncated", f"{found} fragments of {count} frames")
            return
        if length == 0xFFFFFFFF:
            raise Reject("unsupported_syntax", "compressed pixel data under the name of uncompressed ones")
        size = header.rows * header.columns * header.bits_allocated // 8 * count
        if min(length, there) < size:
            raise Reject("truncated", f"{min(length, there)} of {size} bytes of pixel data")
        if length > size + size % 2:
            self.notes.append(f"{length - size} bytes of pixel data more than the header says")

    def _read(self, number: int) -> np.ndarray:
        header = self.header
        if not header.syntax:
            self.decoder = "opencv"
            return _read_image(self.path, _sniff(self.path)).astype(np.uint16)
        encapsulated = uid.UID(header.syntax).is_encapsulated
        stored = self._decode(number) if encapsulated else self._native(number)
        stored = stored.astype(np.uint16, copy=False)
        if header.signed:  # two's complement of `bits` bits -> 0..2^bits-1
            return (stored & (2 * header.offset - 1)) ^ header.offset
        return stored

    def _native(self, number: int) -> np.ndarray:
        header, self.decoder = self.header, "native"
        order = ">" if header.syntax == uid.ExplicitVRBigEndian else "<"
        stored = np.empty((header.rows, header.columns), f"{order}u{header.bits_allocated // 8}")
        self._file.seek(self._start + number * stored.nbytes)
        if self._file.readinto(stored.reshape(-1).view(np.uint8).data) != stored.nbytes:
            raise Reject("truncated", "the file became shorter while it was read")
        stored = stored.astype(np.uint16, copy=False)
        shift, top = header.high_bit + 1 - header.bits, (1 << header.bits) - 1
        if shift or int(stored.max()) > top:  # overlay bits stored beside the pixels
            stored = (stored >> shift) & top
        return stored

    def _encoded(self, number: int) -> bytes:
        self._file.seek(self._start)
        tables = self._tables if all(self._tables) else None
        return get_frame(
            self._file, number, extended_offsets=tables, number_of_frames=len(self.header.frames)
        )

    def _decode(self, number: int) -> np.ndarray:
        """One compressed frame by the first decoder whose result stands the checks."""
        header, data = self.header, self._encoded(number)
        if header.high_bit != header.bits - 1:
            raise Reject("highbit", f"compressed with HighBit {header.high_bit} and BitsStored {header.bits}")
        if header.syntax in _MARKED and b"\xff\xd9" not in data[-16:]:
            raise Reject("truncated", "no end-of-image marker")
        _check_claims(data, header)
        reasons = []
        for name, decoder in self._decoders(number):
            try:
                stored = np.asarray(decoder(data))
                problem = _problem(stored, header, len(data), self.halvings if name == "pillow" else 0)
            except Exception as error:
                problem = f"{type(error).__name__} {' '.join(str(error).split())[:80]}"
            if problem is None:
                self.decoder, self.fallbacks = name, self.fallbacks + len(reasons)
                return stored
            reasons.append(f"{name}: {problem}")
        if not reasons:
            raise Reject("unsupported_syntax", uid.UID(header.syntax).name)
        raise Reject("decode_error", f"{uid.UID(header.syntax).name}; {'; '.join(reasons)}")

    def _decoders(self, number: int) -> Iterator[tuple[str, Callable]]:
        """Decoders of one frame, fastest first.

        Left out on purpose: imagecodecs' jpegsof3 and ljpeg, which ignore the point transform and return
        wrong values; its htj2k, which prints the error of a broken stream and returns memory it never wrote;
        and pylibjpeg for JPEG, which returns half an image from a truncated stream without an error.
        """
        header = self.header
        if self.halvings and is_j2k(header) and not header.signed:
            yield "pillow", functools.partial(_pillow_reduced, bits=header.bits, halvings=self.halvings)
        for syntaxes, name in _CODECS:
            if header.syntax in syntaxes:
                yield name, getattr(imagecodecs, f"{name}_decode")
        if header.syntax == uid.RLELossless:
            dtype, shape = np.dtype(f"<u{header.bits_allocated // 8}"), (header.rows, header.columns)
            rle = functools.partial(imagecodecs.dicomrle_decode, dtype=dtype)
            yield "rle", lambda data: np.frombuffer(rle(data), dtype).reshape(shape)
        try:
            plugins = pixels.get_decoder(uid.UID(header.syntax)).available_plugins
        except NotImplementedError:  # a syntax that pydicom does not know
            return
        for plugin in plugins:
            if plugin != "pylibjpeg" or header.syntax not in _MARKED:
                decode = functools.partial(
                    pixels.pixel_array, self.path, index=number, raw=True, decoding_plugin=plugin
                )
                yield f"pydicom-{plugin}", lambda data, decode=decode: decode()


class Stack:
    """A volume of one file a slice, with the interface of `Frames`; one file is open at a time. What goes
    wrong in a file raises a `Reject` whose `member` is its place in `paths`."""

    def __init__(self, paths: list[Path], headers: list[Header], header: Header, halvings: int = 0):
        self.paths, self.headers, self.header, self.halvings = paths, headers, header, halvings
        self.decoder, self.fallbacks, self.notes = "", 0, []

    def __len__(self) -> int:
        return len(self.header.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        place = self.header.places[index]
        try:
            frames = Frames(self.paths[place], self.headers[place], self.halvings)
            frame = frames[0]
        except Reject as reject:
            raise Reject(reject.code, reject.detail, place) from reject
        self.decoder, self.fallbacks = frames.decoder, self.fallbacks + frames.fallbacks
        self.notes += frames.notes
        return frame


def _check_syntax(path: Path) -> None:
    """Refuse a syntax that nothing here decodes, and a deflated file that inflates to more than INFLATED_MAX,
    without holding it."""
    with open(path, "rb") as file:
        # As dcmread does it: a bomb must not be able to look like another file to us than to it.
        pydicom.filereader.read_preamble(file, force=True)
        syntax = pydicom.filereader._read_file_meta_info(file).get("TransferSyntaxUID")
        if syntax and syntax not in (*_NATIVE, *_MARKED, uid.RLELossless):
            raise Reject("unsupported_syntax", f"{uid.UID(syntax).name[:80]}")
        if syntax != uid.DeflatedExplicitVRLittleEndian:
            return
        inflate, total, data = zlib.decompressobj(-zlib.MAX_WBITS), 0, b""
        while total <= INFLATED_MAX and (data := inflate.unconsumed_tail or file.read(1 << 20)):
            total += len(inflate.decompress(data, 1 << 24))
        if total > INFLATED_MAX:
            raise Reject("too_large", f"inflates to more than {INFLATED_MAX >> 20} MB")


def _fragments(file, start: int) -> int:
    """The number of fragments of encapsulated pixel data; all must be whole, up to the delimiter."""
    end, at, count = file.seek(0, 2), start, -1  # the first item is the offset table
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            raise Reject("truncated", "encapsulated pixel data end without their delimiter")
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return count
        at += 8 + length
        if (group, element) != (0xFFFE, 0xE000) or at > end:
            raise Reject("truncated", f"fragment {count + 1} is not whole")
        count += 1


def _check_claims(data: bytes, header: Header) -> None:
    """Raise Reject where the stream claims another size than the header: decoders allocate what it claims."""
    claim, expected = None, (header.rows, header.columns, 1)
    if header.syntax in _J2K:
        at = data.find(b"\xff\x4f\xff\x51")  # SOC, SIZ
        if at >= 0 and len(data) >= at + 42:
            x1, y1, x0, y0, width, height = struct.unpack(">6I", data[at + 8 : at + 32])
            claim = y1 - y0, x1 - x0, struct.unpack(">H", data[at + 40 : at + 42])[0]
            if min(width, height) < 1 or -(-x1 // width) * -(-y1 // height) > MAX_TILES:
                raise Reject("decode_error", f"stream of tiles of {height} x {width}")
    elif header.syntax in _JPEG:
        at = 2
        while claim is None and at + 10 <= len(data) and data[at] == 0xFF:
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                claim = struct.unpack(">HHB", data[at + 5 : at + 10])
            at += 1 if marker == 0xFF else 2 + length
    else:
        return
    if claim != expected:
        raise Reject("decode_error", f"stream of rows, columns, components {claim}, header {expected}")


def _pillow_reduced(data: bytes, bits: int, halvings: int) -> np.ndarray:
    """JPEG 2000 at a lower resolution. Pillow returns values of more than 8 bits shifted up to 16."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.reduce = halvings
        image.load()
        stored = np.asarray(image)
    return stored >> (16 - bits) if bits > 8 else stored


def _problem(stored: np.ndarray, header: Header, length: int, halvings: int) -> str | None:
    """Why a decoded frame cannot be right, or None."""
    expected = tuple(-(-side // (1 << halvings)) for side in (header.rows, header.columns))
    if stored.shape != expected:
        return f"shape {stored.shape}, expected {expected}"
    if stored.dtype.kind not in "ui":
        return f"dtype {stored.dtype}"
    low, high = int(stored.min()), int(stored.max())
    # A slice may really be blank, but then its stream is short: JPEG needs a bit a pixel, the others less.
    blank = 1.2 if header.syntax in uid.JPEGTransferSyntaxes else 0.3
    if low == high and 8 * length > blank * header.rows * header.columns + 4096:
        return "constant"
    if low < -header.offset or high >= 1 << header.bits:
        return f"values {low}..{high} in {header.bits} bits"
    return None


def _sniff(path: Path) -> str:
    """png | jpeg | pgm | tiff | dicom by the first bytes; a name says nothing."""
    with open(path, "rb") as file:
        head = file.read(132)
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    # Without preamble a file must at least begin with an element of group 0002 or 0008.
    if head[128:132] == b"DICM" or head[:2] in (b"\x02\0", b"\x08\0"):
        return "dicom"
    raise Reject("not_dicom", "neither DICOM nor PNG, JPEG, PGM or TIFF")


def _read_image(path: Path, kind: str) -> np.ndarray:
    """A PNG, JPEG, PGM or TIFF as u8 or u16 [H, W]."""
    data = path.read_bytes()
    if _ENDINGS.get(kind, b"") not in data[-4096:]:
        raise Reject("truncated", f"{kind} without its end marker")
    if kind == "tiff" and (pages := cv2.imcount(str(path))) > 1:
        raise Reject("unsupported_class", f"tiff of {pages} pages, expected one image")
    try:
        with PIL.Image.open(io.BytesIO(data)) as claim:  # reads the header only
            width, height = claim.size
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            raise Reject("too_large", f"{height} x {width}")
    except PIL.Image.DecompressionBombError as error:
        raise Reject("too_large", str(error)) from error
    except OSError:
        pass  # OpenCV may still know the format
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise Reject("decode_error", f"unreadable {kind}")
    if image.ndim == 3:
        if image.shape[2] not in (3, 4) or not (image[..., :1] == image[..., 1:3]).all():
            raise Reject("not_monochrome", f"{image.shape[2]} colour channels")
        image = np.ascontiguousarray(image[..., 0])
    if image.dtype not in (np.uint8, np.uint16):
        raise Reject("highbit", f"{kind} of {image.dtype}, expected 8 or 16 bits")
    return image
