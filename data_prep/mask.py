"""Tissue masks: which pixels of a mammogram are breast.

All recipes work on a thumbnail of at most 1024 pixels long side, in display order (denser is greater), and
end with 9x9 closing and opening (the paper's) and one filled component. `robust` is ours and the default,
`percentile` is the paper's, `none` takes the whole frame.
"""

from dataclasses import dataclass

import cv2
import numpy as np

THUMBNAIL = 1024  # px; fixed, so that a mask does not depend on the record's size
PAPER_PERCENTILE = 60.0  # the paper does not give its threshold
MARGIN = 0.04  # of the grey range above the background: skin starts about there, film fog ends below
NECK = 16  # px of the thumbnail: what hangs on the breast by a thinner bridge is a label or a film edge
SPUR = 16  # px: how far thin protrusions that are real (the nipple) may stand out of the body
_KERNEL = np.ones((9, 9), np.uint8)


@dataclass(frozen=True)
class Tissue:
    """What `find_tissue` found on a thumbnail."""

    mask: np.ndarray  # bool [h, w]
    suspect: bool  # the mask should be looked at
    chest_wall: str | None  # left | right | None: unclear


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Area-average an image to at most 1024 pixels long side; smaller ones are returned as they are."""
    height, width = image.shape
    scale = THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image if scale >= 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def find_tissue(thumb: np.ndarray, padding: np.ndarray | None = None, recipe: str = "robust") -> Tissue:
    """Segment the breast on a thumbnail.

    Args:
      thumb: u16 [h, w], denser tissue is greater.
      padding: bool [h, w], pixels the header calls padding: never tissue, left out of all statistics.
      recipe: robust | percentile | none.

    Returns:
      Tissue; its mask is empty where nothing qualifies.
    """
    known = np.ones(thumb.shape, bool) if padding is None else ~padding
    if recipe == "none":
        return Tissue(np.ones(thumb.shape, bool), False, _chest_wall(known & (thumb > thumb.min())))
    level = _threshold(thumb, known) if recipe == "robust" else np.percentile(thumb, PAPER_PERCENTILE)
    mask = _body((thumb > level) & known, cut_necks=recipe == "robust")
    return Tissue(mask, _suspect(mask, thumb, known), _chest_wall(mask))


def _threshold(thumb: np.ndarray, known: np.ndarray) -> float:
    """Grey level between background and tissue: mode of the background + max(6 sigma, MARGIN of the range).

    Exact zeros (or another constant floor) are padding beside the film on some scans and the true background
    on others, so the mode is searched above the floor. It is believed only where it is a sharp peak: the
    darkest tissue, which is all there is above the floor of a clean digital image, spreads evenly.
    """
    floor, span, counts = _histogram(thumb, known)
    counts[0] = 0  # the floor itself
    dark = np.convolve(counts, np.ones(5) / 5, mode="same")[: max(4, int(0.6 * _otsu(counts)))]
    peak = int(dark.argmax())
    near, beyond = counts[max(0, peak - 4) : peak + 5].sum(), counts[peak + 9 : peak + 27].sum()
    background, sigma = 0.0, 0.0  # in bins
    if near > 0.05 * thumb.size and near > 2 * beyond:
        background, below = peak + 0.5, counts[: peak + 1]
        sigma = np.sqrt((below * (peak - np.arange(peak + 1)) ** 2).sum() / max(1, below.sum()))
    return floor + (background + max(6 * min(sigma, 5), MARGIN * 256)) * span / 256


def _histogram(thumb: np.ndarray, known: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(floor, span, counts [256]) of the known pixels from their minimum to their 99.5th percentile."""
    counts = np.bincount(thumb[known], minlength=2)
    levels = np.flatnonzero(counts)
    if levels.size == 0:
        return 0.0, 1.0, np.zeros(256)
    total = np.cumsum(counts)
    span = max(int(np.searchsorted(total, 0.995 * total[-1])) - int(levels[0]), 1)
    bins = np.minimum((levels - levels[0]) * 256 // span, 255)
    return float(levels[0]), float(span), np.bincount(bins, weights=counts[levels], minlength=256)


def _otsu(counts: np.ndarray) -> int:
    """Bin of Otsu's threshold of a histogram: the cut with the greatest variance between the classes."""
    weights, sums = np.cumsum(counts), np.cumsum(counts * np.arange(len(counts)))
    products = np.maximum(weights * (weights[-1] - weights), 1)
    return int(((sums[-1] * weights / max(weights[-1], 1) - sums) ** 2 / products).argmax())


def _body(above: np.ndarray, cut_necks: bool) -> np.ndarray:
    """Smooth by 9x9 closing, then opening (OpenCV's border does not eat the chest wall), and take the
    breast's component, filled. With `cut_necks` what hangs on it by a thin bridge is dropped first."""
    mask = above.astype(np.uint8)
    for step in (cv2.MORPH_CLOSE, cv2.MORPH_OPEN):
        mask = cv2.morphologyEx(mask, step, _KERNEL)
    if cut_necks:
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        core = _pick((_distance(padded) > NECK)[1:-1, 1:-1])
        if core.any():
            mask = mask & (_distance(~core) <= NECK + SPUR)
    contours = _outline(_pick(mask))
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED) > 0


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest zero: erosion and dilation by any disc at the price of one."""
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)


def _pick(mask: np.ndarray) -> np.ndarray:
    """The component with most pixels; one that touches no side counts for a third."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count < 2:
        return np.zeros(mask.shape, bool)
    left, width, area = stats[1:, cv2.CC_STAT_LEFT], stats[1:, cv2.CC_STAT_WIDTH], stats[1:, cv2.CC_STAT_AREA]
    touches = (left <= 1) | (left + width >= mask.shape[1] - 1)
    return labels == 1 + int(np.where(touches, area, area / 3).argmax())


def _outline(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    return cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]


def _chest_wall(mask: np.ndarray) -> str | None:
    """left | right: where the outer fifth of the mask's box holds clearly more tissue; None: unclear."""
    columns = np.flatnonzero(mask.any(0))
    if columns.size == 0:
        return None
    box = mask[:, columns[0] : columns[-1] + 1]
    fifth = max(1, box.shape[1] // 5)
    left, right = float(box[:, :fifth].mean()), float(box[:, -fifth:].mean())
    if max(left, right) < 1.25 * min(left, right):
        return None
    return "left" if left > right else "right"


def _suspect(mask: np.ndarray, thumb: np.ndarray, known: np.ndarray) -> bool:
    """True where the mask's area or outline is unlike a breast, or a second recipe (0.2 x Otsu) disagrees."""
    if not 0.02 <= mask.mean() <= 0.95:
        return True
    if mask.sum() < 0.75 * cv2.contourArea(cv2.convexHull(np.concatenate(_outline(mask)))):
        return True
    floor, span, counts = _histogram(thumb, known)
    second = _body((thumb > floor + 0.2 * _otsu(counts) * span / 256) & known, cut_necks=False)
    return (mask & second).sum() < 0.75 * (mask | second).sum()
