"""Hand-made features: grey-level histogram, texture and size of the tissue. The baseline to beat.

On scanned film such features rival DINOv2 for breast density, so every table shows them.
"""

import cv2
import numpy as np
from skimage.feature import local_binary_pattern

BINS = 32
SCALES = (1, 2, 4, 8)  # half widths in pixels of the windows of local contrast
LBP_RADII = (1, 3)
LBP_CODES = 10  # of 8 points, uniform patterns: 0..8 bright neighbours, and "not uniform"


def handmade(image: np.ndarray, mm_per_px: float = 1.0) -> np.ndarray:
    """Features of one image, of its tissue only.

    Args:
      image: u8 [H, W], background exactly 0.
      mm_per_px: pixel size; 1 where it is unknown, sizes are then in pixels.

    Returns:
      float32 [F]; zeros where there is no tissue.
    """
    mask = image > 0
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(ys):  # a frame of background: the mask's edge is an edge there too
        image = np.pad(image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1], 1)
    parts = [size(image > 0, mm_per_px), _histogram(image)]
    parts += [_contrast(image, half) for half in SCALES]
    parts += [_gradient(image)]
    parts += [_patterns(image, radius) for radius in LBP_RADII]
    return np.concatenate(parts).astype(np.float32)


def size(mask, mm: float) -> list[float]:
    """Area (mm2), height, width (mm), share of the bounding box, and perimeter squared over area."""
    area = float(mask.sum())
    if not area:
        return [0.0] * 5
    height, width = mask.shape[0] - 2, mask.shape[1] - 2
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    perimeter = sum(cv2.arcLength(c, True) for c in contours)
    return [area * mm**2, height * mm, width * mm, area / (height * width), perimeter**2 / area]


def _summary(values) -> list[float]:
    """Mean, deviation and five percentiles; zeros for no values."""
    if not values.size:
        return [0.0] * 7
    return [values.mean(), values.std(), *np.percentile(values, [5, 25, 50, 75, 95])]


def _histogram(image) -> np.ndarray:
    tissue = image[image > 0].astype(np.float64)
    counts, _ = np.histogram(tissue, bins=BINS, range=(1, 256))
    spread = max(tissue.std(), 1e-6) if tissue.size else 1.0
    skew = (((tissue - tissue.mean()) / spread) ** 3).mean() if tissue.size else 0.0
    return np.r_[counts / max(tissue.size, 1), _summary(tissue), skew]


def _inside(mask, reach: int):
    """Mask pixels further than `reach` pixels from background, so that the skin line is no texture."""
    square = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    eroded = cv2.erode(mask.astype(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return eroded.astype(bool)


def _contrast(image, half: int) -> list[float]:
    """Local standard deviation in windows of 2 * half + 1 pixels, of tissue pixels alone."""
    mask = (image > 0).astype(np.float64)
    window = (2 * half + 1, 2 * half + 1)
    moments = (mask, mask * image, mask * image * image)
    share, mean, square = (cv2.blur(m, window, borderType=cv2.BORDER_CONSTANT) for m in moments)
    share = np.maximum(share, 1e-9)
    deviation = np.sqrt(np.maximum(square / share - (mean / share) ** 2, 0))
    return _summary(deviation[image > 0])


def _gradient(image) -> list[float]:
    dy, dx = (cv2.Sobel(image.astype(np.float64), cv2.CV_64F, i, 1 - i) / 8 for i in (0, 1))
    return _summary(np.hypot(dy, dx)[_inside(image > 0, 1)])


def _patterns(image, radius: int) -> np.ndarray:
    """Shares of uniform local binary patterns (Ojala et al. 2002) of 8 points."""
    codes = local_binary_pattern(image, 8, radius, "uniform")[_inside(image > 0, radius)]
    return np.bincount(codes.astype(int), minlength=LBP_CODES) / max(codes.size, 1)
