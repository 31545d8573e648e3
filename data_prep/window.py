"""From stored pixel values to 8 bit through one integer look-up table.

Rescale, window (tissue percentiles, or the header's own), MONOCHROME1 and the conversion to 8 bit are folded
into 65,536 bytes, so that no image is ever held as floats and the result does not depend on an image's own
maximum. Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (photometric
interpretation).
"""

import numpy as np

from data_prep.header import Header

PERCENTILES = (0.5, 99.5)  # of the tissue: the header's windows cut off tissue at the skin (18 % of it on GE)


def display(stored: np.ndarray, header: Header) -> np.ndarray:
    """Order values so that denser tissue is greater: u16 to u16, monotone, padding becomes 0.

    Masks are found on this. MONOCHROME1 and a negative rescale slope each reverse the order; FOR PROCESSING
    pixels are exposure, so their negative logarithm is taken.
    """
    ordered = stored
    if header.for_processing:
        scale = 65535 / np.log(65536.0)
        ordered = (np.log(65536.0 / (stored.astype(np.float32) + 1)) * scale).astype(np.uint16)
        if not header.inverted and header.slope < 0:
            ordered = 65535 - ordered
    elif header.reversed:
        ordered = ((1 << header.bits) - 1) - stored
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


def percentile_table(header: Header, low: int, high: int) -> np.ndarray:
    """u8 [65536]: stored low..high to 1..255 for the display; FOR PROCESSING through the logarithm."""
    table = np.arange(65536)
    if header.for_processing:
        table = display(table.astype(np.uint16), header).astype(np.int64)
    elif header.reversed:
        table = -table
    start, end = sorted((int(table[low]), int(table[min(high, 65535)])))
    return np.clip(np.rint((table - start) * 254 / max(1, end - start)) + 1, 1, 255).astype(np.uint8)


def tag_table(header: Header) -> np.ndarray | None:
    """u8 [65536] from the header's first window or VOI LUT (PS3.3 C.11.2.1.2); None where it has none."""
    voi = header.voi
    if not voi or header.for_processing:
        return None
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
    return np.clip(np.rint((1 - y if header.inverted else y) * 255), 1, 255).astype(np.uint8)


def rescaled(header: Header, stored: int | np.ndarray) -> float | np.ndarray:
    """Stored values (as `Frames` gives them) in the units of the header's rescale."""
    return header.slope * (stored - header.offset) + header.intercept


def tag_limits(header: Header) -> tuple[float, float]:
    """Ends of the header's window in rescaled units; those of the LUT's input range where it is a LUT."""
    voi = header.voi
    if "lut" in voi:
        return float(voi["first"]), float(voi["first"] + len(voi["lut"]) - 1)
    return voi["centre"] - voi["width"] / 2, voi["centre"] + voi["width"] / 2
