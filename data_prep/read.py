"""Medical file -> frames of stored pixel values, one at a time, and the header's facts.

DICOM of any transfer syntax that imagecodecs or an installed pydicom plug-in decodes, and PNG, JPEG, PGM,
TIFF of 8 or 16 bits. Fast decoders come first and are not trusted: a result of the wrong shape, with bits
above BitsStored, or constant is refused and the next decoder is asked; how often is counted. Every file that
yields no frames raises `Reject` with a reason code; no other exception leaves this module.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pydicom
from pydicom import pixels, uid
from pydicom.encaps import generate_frames

from data_prep.header import Header, Reject, read_header

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"P5": "pgm", b"P2": "pgm",
          b"II*\0": "tiff", b"MM\0*": "tiff"}  # fmt: skip
_ENDINGS = {"png": b"IEND", "jpeg": b"\xff\xd9"}  # a file without its end marker was cut off

_MARKED = (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes)  # streams that end with FFD9
_CODECS = (  # of imagecodecs; jpeg8 reads all of JPEG, htj2k is tried before jpeg2k
    (uid.JPEGTransferSyntaxes, "jpeg8"),
    (uid.JPEGLSTransferSyntaxes, "jpegls"),
    ((uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), "htj2k"),
    (uid.JPEG2000TransferSyntaxes, "jpeg2k"),
)


@contextmanager
def _rejecting(code: str) -> Iterator[None]:
    """Whatever a parser or a decoder throws at a broken file becomes a `Reject`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote header values, which must not reach a log
            yield
    except Reject:
        raise
    except OSError as error:
        raise Reject("unreadable", error.strerror or type(error).__name__) from error
    except Exception as error:
        raise Reject(code, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def scan(path: Path, kind: str = "2d") -> Header:
    """Read the header of one file without its pixels.

    Args:
      path: any file.
      kind: what a PNG, JPEG, PGM or TIFF is; DICOM files say it themselves.

    Raises:
      Reject: the file is no mammogram that we can use.
    """
    with _rejecting("not_dicom"):
        is_dicom = _sniff(path) == "dicom"
    if not is_dicom:
        return Header(kind=kind, rows=0, columns=0)
    with _rejecting("truncated"):
        return read_header(pydicom.dcmread(path, force=True, stop_before_pixels=True))


class Frames:
    """The frames of one file, decoded one at a time.

    `frames[i]` is slice i (in slice order, not file order) as u16 [H, W]: stored values, with 2^(bits-1)
    added where they are signed, so that one look-up table serves all. `fallbacks` counts refused decodes,
    `decoder` names the last decoder used.
    """

    def __init__(self, path: Path, header: Header):
        self.path, self.header = path, header
        self.decoder, self.fallbacks = "", 0
        self._last = None, None  # (index, frame): a 2D image is asked for twice, for its mask and its record
        self._encoded = None
        if not header.syntax:
            return
        with _rejecting("truncated"):
            self._ds = pydicom.dcmread(path, force=True)
            data, count = self._ds.get("PixelData"), len(header.frames)
            if not data:
                raise Reject("truncated", "no pixel data")
            if uid.UID(header.syntax).is_encapsulated:
                self._encoded = list(generate_frames(data, number_of_frames=count))
                if len(self._encoded) < count:
                    raise Reject("truncated", f"{len(self._encoded)} of {count} frames")
            elif len(data) < (size := header.rows * header.columns * header.bits_allocated // 8 * count):
                raise Reject("truncated", f"{len(data)} of {size} bytes of pixel data")

    def __len__(self) -> int:
        return len(self.header.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._last[0] != index:
            with _rejecting("decode_error"):
                self._last = index, self._read(self.header.frames[index])
        return self._last[1]

    def _read(self, number: int) -> np.ndarray:
        header = self.header
        if not header.syntax:
            self.decoder = "opencv"
            return _read_image(self.path, _sniff(self.path)).astype(np.uint16)
        stored = self._native(number) if self._encoded is None else self._decode(number)
        stored = stored.astype(np.uint16, copy=False)
        if header.signed:  # two's complement of `bits` bits -> 0..2^bits-1
            return (stored & (2 * header.offset - 1)) ^ header.offset
        return stored

    def _native(self, number: int) -> np.ndarray:
        header, self.decoder = self.header, "native"
        order = ">" if header.syntax == uid.ExplicitVRBigEndian else "<"
        dtype = np.dtype(f"{order}u{header.bits_allocated // 8}")
        count = header.rows * header.columns
        stored = np.frombuffer(self._ds.PixelData, dtype, count, number * count * dtype.itemsize)
        stored = stored.reshape(header.rows, header.columns).astype(np.uint16)
        # Drops overlay bits stored beside the pixels.
        return (stored >> (header.high_bit + 1 - header.bits)) & ((1 << header.bits) - 1)

    def _decode(self, number: int) -> np.ndarray:
        """One compressed frame by the first decoder whose result stands the checks."""
        header, data = self.header, self._encoded[number]
        if header.high_bit != header.bits - 1:
            raise Reject("highbit", f"compressed with HighBit {header.high_bit} and BitsStored {header.bits}")
        if header.syntax in _MARKED and b"\xff\xd9" not in data[-16:]:
            raise Reject("truncated", "no end-of-image marker")
        reasons, constants = [], []
        for name, decoder in _decoders(header, self._ds, number):
            try:
                stored = np.asarray(decoder(data))
                problem = _problem(stored, header)
            except Exception as error:
                problem = f"{type(error).__name__} {' '.join(str(error).split())[:80]}"
            if problem is None:
                self.decoder, self.fallbacks = name, self.fallbacks + len(reasons)
                return stored
            if problem == "constant":
                constants.append(stored)
            reasons.append(f"{name}: {problem}")
        # A slice may really be blank: believed only where two decoders say so with the same value.
        if len(constants) > 1 and all(np.array_equal(constants[0], other) for other in constants[1:]):
            self.decoder = "agreement"
            return constants[0]
        if not reasons:
            raise Reject("unsupported_syntax", uid.UID(header.syntax).name)
        raise Reject("decode_error", f"{uid.UID(header.syntax).name}; {'; '.join(reasons)}")


def _decoders(header: Header, ds: pydicom.Dataset, number: int) -> Iterator[tuple[str, Callable]]:
    """Decoders of one frame, fastest first.

    imagecodecs' jpegsof3 and ljpeg are left out on purpose: they ignore the point transform and return wrong
    values. pylibjpeg is left out for JPEG: it returns half an image from a truncated stream without an error.
    """
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
            decode = functools.partial(pixels.pixel_array, ds, index=number, raw=True, decoding_plugin=plugin)
            yield f"pydicom-{plugin}", lambda data, decode=decode: decode()


def _problem(stored: np.ndarray, header: Header) -> str | None:
    """Why a decoded frame cannot be right, or None."""
    if stored.shape != (header.rows, header.columns):
        return f"shape {stored.shape}, expected {(header.rows, header.columns)}"
    if stored.dtype.kind not in "ui":
        return f"dtype {stored.dtype}"
    low, high = int(stored.min()), int(stored.max())
    if low == high:
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
