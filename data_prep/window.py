"""From stored pixel values to 8 bit through one integer look-up table.

Rescale, window (tissue percentiles, the header's own, or the frame's minimum and maximum), MONOCHROME1 and
the conversion to 8 bit are folded into 65,536 bytes, so that no image is ever held as floats and the result
does not depend on an image's own maximum. Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT),
C.7.6.3.1.2 (photometric interpretation).
"""

import numpy as np

from data_prep.header import Header

PERCENTILES = (0.5, 99.5)  # of the tissue: the header's windows cut off tissue at the skin (18 % of it on GE)


def display(stored: np.ndarray, header: Header) -> np.ndarray:
    """Order values so that denser tissue is greater: u16 to u16, monotone, padding becomes 0.

    Masks are found on this. MONOCHROME1 and a negative rescale slope each reverse the order. FOR PROCESSING
    pixels are exposure, of which the header says the direction and whether they are logarithms
    (PixelIntensityRelationship, PS3.3 C.8.11.3.1.2); else their negative logarithm is taken.
    """
    top, ordered = (1 << header.bits) - 1, stored
    if header.for_processing:
        exposure = stored if header.exposure_sign > 0 else np.maximum(top - stored.astype(np.int32), 0)
        if header.exposure_log:
            ordered = np.maximum(top - exposure.astype(np.int32), 0).astype(np.uint16)
        else:
            scale = 65535 / np.log(65536.0)
            ordered = (np.log(65536.0 / (exposure.astype(np.float32) + 1)) * scale).astype(np.uint16)
    elif header.reversed:
        ordered = top - stored
    padding = is_padding(stored, header)
    return ordered if padding is None else np.where(padding, np.uint16(0), ordered)


def is_padding(stored: np.ndarray, header: Header) -> np.ndarray | None:
    """bool [H, W] of the pixels that the header calls padding; None where it names none."""
    if header.padding is None:
        return None
    low, high = (value + header.offset for value in header.padding)
    return (stored >= low) & (stored <= high)


def tissue_percentiles(values: np.ndarray) -> tuple[int, int]:
    """The stored values at PERCENTILES of `values` (u16, tissue only); never equal."""
    counts = np.cumsum(np.bincount(values.ravel(), minlength=65536))
    low, high = (int(np.searchsorted(counts, counts[-1] * p / 100)) for p in PERCENTILES)
    return low, max(high, low + 1)


def linear_table(header: Header, low: int, high: int) -> np.ndarray:
    """u8 [65536]: stored low..high to 1..255 for the display; FOR PROCESSING through the logarithm."""
    table = np.arange(65536)
    if header.for_processing:
        table = display(table.astype(np.uint16), header).astype(np.int64)
    elif header.reversed:
        table = -table
    start, end = sorted((int(table[low]), int(table[min(high, 65535)])))
    return np.clip(np.rint((table - start) * 254 / max(1, end - start)) + 1, 1, 255).astype(np.uint8)


def choose_voi(header: Header, index: int) -> dict | None:
    """The header's VOI LUT or window number `index`: LUTs first, as pydicom prefers them, the last where it
    has fewer. None where it has none, and for raw exposure, which no window was meant for."""
    if not header.voi or header.for_processing:
        return None
    return header.voi[min(index, len(header.voi) - 1)]


def voi_curve(header: Header, voi: dict) -> np.ndarray:
    """f64 [65536] in 0..1: display value of each stored value (as `Frames` gives them) through a VOI LUT or a
    LINEAR, LINEAR_EXACT or SIGMOID window (PS3.3 C.11.2.1), inverted for MONOCHROME1."""
    x = rescaled(header, np.arange(65536))
    if "lut" in voi:
        lut = np.asarray(voi["lut"], np.float64)
        y = lut[np.clip(x - voi["first"], 0, len(lut) - 1).astype(np.int64)] / ((1 << voi["bits"]) - 1)
    elif voi["function"] == "SIGMOID":
        y = 1 / (1 + np.exp(np.clip(-4 * (x - voi["centre"]) / voi["width"], -700, 700)))
    elif voi["function"] == "LINEAR_EXACT":
        y = (x - voi["centre"]) / voi["width"] + 0.5
    else:
        y = (x - (voi["centre"] - 0.5)) / max(voi["width"] - 1, 1e-6) + 0.5
    y = np.clip(y, 0, 1)
    return 1 - y if header.inverted else y


def voi_table(header: Header, voi: dict) -> np.ndarray:
    """u8 [65536], 1..255, of `voi_curve`."""
    return np.clip(np.rint(voi_curve(header, voi) * 255), 1, 255).astype(np.uint8)


def rescaled(header: Header, stored: int | np.ndarray) -> float | np.ndarray:
    """Stored values (as `Frames` gives them) in the units of the header's rescale."""
    return header.slope * (stored - header.offset) + header.intercept


def voi_limits(voi: dict) -> tuple[float, float]:
    """Ends of a window in rescaled units; those of the LUT's input range where it is a LUT."""
    if "lut" in voi:
        return float(voi["first"]), float(voi["first"] + len(voi["lut"]) - 1)
    return voi["centre"] - voi["width"] / 2, voi["centre"] + voi["width"] / 2
