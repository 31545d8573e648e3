"""The share of an MLO record that is pectoral muscle: an estimate for the quality report, never used to crop.

The muscle is the bright wedge in the upper corner at the chest wall, and its border is nearly straight
(Karssemeijer 1998, "Automated classification of parenchymal patterns in mammograms"). So a straight line is
searched along which the corner's side is brighter than the other.
"""

import cv2
import numpy as np

HEIGHT = 256  # px that a record is reduced to
SAMPLES = 48  # points along a line
OFFSETS = (3, 6, 9)  # px on either side of it: wide enough to step over the blurred border
CLIP = 40.0  # grey levels: one white gland must not outweigh a long faint border
MIN_STEP, MIN_SHARE = 9.0, 0.8  # mean step across the border, share of it where the corner's side is brighter
MAX_SHARE = 0.35  # of the tissue; more is no muscle


def pectoral_line(image: np.ndarray) -> tuple[float, float] | None:
    """Border of the muscle in a record u8 [H, W] with the chest wall at left.

    Returns:
      (x, y): where the line meets the top and the left side, as shares of H; None without a clear border.
    """
    width = max(1, round(image.shape[1] * HEIGHT / image.shape[0]))
    small = cv2.resize(image, (width, HEIGHT), interpolation=cv2.INTER_AREA)
    tissue = small > 0
    smooth = cv2.GaussianBlur(small.astype(np.float32), (0, 0), 2)
    x, y = np.meshgrid(np.arange(0.12, 0.9, 0.01) * HEIGHT, np.arange(0.15, 1.3, 0.02) * HEIGHT)
    x, y = x.ravel()[:, None], y.ravel()[:, None]  # [lines, 1]
    along = np.linspace(0.03, 0.97, SAMPLES)
    normal = np.stack([y, x]) / np.hypot(x, y)  # (x, y) away from the corner

    def sample(offset: float) -> tuple[np.ndarray, np.ndarray]:
        at_x = np.rint(x * (1 - along) + offset * normal[0]).astype(int)
        at_y = np.rint(y * along + offset * normal[1]).astype(int)
        there = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < HEIGHT)
        at_x, at_y = at_x.clip(0, width - 1), at_y.clip(0, HEIGHT - 1)
        return smooth[at_y, at_x], there & tissue[at_y, at_x]

    step, known = 0.0, True
    for offset in OFFSETS:
        (inside, a), (outside, b) = sample(-offset), sample(offset)
        step, known = step + (inside - outside) / len(OFFSETS), known & a & b
    count = known.sum(1)
    mean = (np.clip(step, -CLIP, CLIP) * known).sum(1) / np.maximum(count, 1)
    brighter = ((step > 0) & known).sum(1) / np.maximum(count, 1)
    x, y = x[:, 0], y[:, 0]
    length = np.hypot(x, y) * count / SAMPLES
    # the wedge's area, less what lies beyond the right and the lower side
    area = (x * y - np.maximum(x - width, 0) ** 2 * y / x - np.maximum(y - HEIGHT, 0) ** 2 * x / y) / 2
    clear = (mean > MIN_STEP) & (brighter > MIN_SHARE) & (count > SAMPLES // 2)
    clear &= area <= MAX_SHARE * tissue.sum()
    if not clear.any():
        return None
    best = int(np.where(clear, mean * np.sqrt(length), 0).argmax())
    return float(x[best]) / HEIGHT, float(y[best]) / HEIGHT


def pectoral_share(image: np.ndarray) -> float | None:
    """Estimated share of the tissue of a record u8 [H, W] that lies behind the muscle's border; None
    without a clear border."""
    line = pectoral_line(image)
    if line is None:
        return None
    height, width = image.shape
    corners = np.array([[0, 0], [line[0] * height, 0], [0, line[1] * height]])
    wedge = cv2.fillPoly(np.zeros((height, width), np.uint8), [np.rint(corners).astype(np.int32)], 1) > 0
    return float((wedge & (image > 0)).sum() / (image > 0).sum())
