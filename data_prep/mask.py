"""Tissue masks: which pixels of a mammogram are breast.

All recipes work on a thumbnail of at most 1024 pixels long side, in display order (denser is greater), and
end with 9x9 closing and opening (the paper's) and one filled component. `robust` is ours and the default,
`percentile` is the paper's, `none` takes the whole frame. Labels that touch the skin are taken out by their
sharp edges; markers and implants inside are found, so that they do not set the window. The pectoral muscle
stays, as in the paper.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

THUMBNAIL = 1024  # px; fixed, so that a mask does not depend on the record's size
MARGIN = 0.04  # of the grey range above the background: skin starts about there, film fog ends below
NECK = 16  # px of the thumbnail: what hangs on the breast by a thinner bridge is a label or a film edge
SPUR = 16  # px: how far thin protrusions that are real (the nipple) may stand out of the body
MARK = 0.6  # of the range above the background: the whole of labels and markers is brighter,
SATURATED = 0.25  # and this share of their pixels is at the top of it: bright glands and skin are not
SHARP = 0.4  # of a mark's height is left 2 to 6 px outside its edge: glands fade slowly, lead and ink do not
PLATEAU = 0.97  # of the range: saturated, by a marker or an implant
FADES = 0.8  # of a plateau's height is left 4 to 6 px outside it
SPECK = 40  # px of the thumbnail: a smaller plateau may be a calcification
IMPLANT = 0.04  # of the tissue: a larger plateau is an implant, a smaller one a marker
_KERNEL = np.ones((9, 9), np.uint8)


@dataclass(frozen=True)
class Tissue:
    """What `find_tissue` found on a thumbnail."""

    mask: np.ndarray  # bool [h, w]
    suspect: bool  # the mask should be looked at
    chest_wall: str | None  # left | right | None: unclear
    foreign: np.ndarray  # bool [h, w], inside the mask: markers and implants, no tissue to window
    marks: frozenset[str] = field(default_factory=frozenset)  # text_on_tissue, marker, implant


@dataclass(frozen=True)
class _Greys:
    """Histogram of a thumbnail's known pixels."""

    floor: float  # their minimum
    span: float  # from there to their 99.5th percentile
    counts: np.ndarray  # [256], over the span
    top: float  # their 99.95th percentile


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Area-average an image to at most 1024 pixels long side; smaller ones are returned as they are."""
    height, width = image.shape
    scale = THUMBNAIL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image if scale >= 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def find_tissue(
    thumb: np.ndarray, padding: np.ndarray | None = None, recipe: str = "robust", tau: float = 60.0
) -> Tissue:
    """Segment the breast on a thumbnail.

    Args:
      thumb: u16 [h, w], denser tissue is greater.
      padding: bool [h, w], pixels the header calls padding: never tissue, left out of all statistics.
      recipe: robust | percentile | none.
      tau: of `percentile`: the percentile of all pixels above which they are tissue.

    Returns:
      Tissue; its mask is empty where nothing qualifies.
    """
    known = np.ones(thumb.shape, bool) if padding is None else ~padding
    nothing = np.zeros(thumb.shape, bool)
    if recipe == "none":
        return Tissue(~nothing, False, _chest_wall(known & (thumb > thumb.min())), nothing)
    robust = recipe == "robust"
    greys = _histogram(thumb if known.all() else thumb[known])
    level = _threshold(greys, thumb.size) if robust else np.percentile(thumb, tau)
    above = (thumb > level) & known
    mask = _body(above, cut_necks=robust)
    foreign, marks = nothing, set()
    if robust and mask.any():
        for mark, place, at_skin in _sharp_marks(thumb, known, level, greys.top):
            if not (mark & mask[place]).any():
                continue
            if at_skin:
                above[place] &= ~mark
            else:
                foreign[place] |= mark
            marks.add("text_on_tissue" if at_skin else "marker")
        if "text_on_tissue" in marks:
            mask = _body(above, cut_necks=True)
        marks |= _add_plateaus(foreign, thumb, mask, level)
    suspect = _suspect(mask, thumb, known, greys)
    return Tissue(mask, suspect, _chest_wall(mask), foreign & mask, frozenset(marks))


def _sharp_marks(thumb: np.ndarray, known: np.ndarray, level: float, top: float) -> Iterator[tuple]:
    """Labels, letters and metal: bright components with sharp edges. Yields (bool [h, w] of the mark, filled
    and 5 px wider; its place in the thumbnail as slices; whether it lies at the skin or beside it, not in
    the breast). The ball that marks a nipple counts as in the breast."""
    bright = ((thumb >= level + MARK * (top - level)) & known).astype(np.uint8)
    full, most, (rows, columns) = float(thumb.max()) - level, 0.03 * thumb.size, _place(bright, 8)
    bright, thumb, known = (image[rows, columns] for image in (bright, thumb, known))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(bright, connectivity=8)
    for i in range(1, count):
        x, y, width, height, area = stats[i]
        # One-pixel lines are film edges; what is large is a breast.
        if area < 60 or min(width, height) < 4 or area > most:
            continue
        place = slice(max(0, y - 8), y + height + 8), slice(max(0, x - 8), x + width + 8)
        mark = (labels[place] == i).astype(np.uint8)
        filled = cv2.drawContours(np.zeros_like(mark), _outline(mark), -1, 1, cv2.FILLED)
        near, far = (cv2.dilate(filled, _disc(radius)) > 0 for radius in (2, 6))
        ring = far & ~near & known[place]
        if ring.any():
            inside, around = thumb[place][mark > 0] - level, thumb[place][ring] - level
            peak = np.median(inside)
            sharp = np.median(around) < SHARP * peak
            if sharp and peak > 0.85 * full and (inside > 0.95 * full).mean() > SATURATED:
                ball = max(width, height) <= 24 and min(width, height) >= 6 and area > 0.65 * width * height
                at_skin = not ball and (around < 0.2 * peak).mean() > 0.3
                place = tuple(
                    slice(a.start + b.start, a.stop + b.start)
                    for a, b in zip(place, (rows, columns), strict=True)
                )
                yield cv2.dilate(filled, _disc(5)) > 0, place, at_skin


def _add_plateaus(foreign: np.ndarray, thumb: np.ndarray, mask: np.ndarray, level: float) -> set[str]:
    """Add saturated flat areas of the mask to `foreign`; returns what they are."""
    top = float(thumb.max())
    if (mask & (thumb >= np.float32(level + PLATEAU * (top - level)))).sum() < SPECK:
        return set()
    values = thumb.astype(np.float32)
    flat = cv2.absdiff(cv2.dilate(values, np.ones((3, 3))), cv2.erode(values, np.ones((3, 3))))
    plateau = mask & (values >= level + PLATEAU * (top - level)) & (flat <= 0.004 * (top - level))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(plateau.astype(np.uint8), connectivity=8)
    found = set()
    for i in range(1, count):
        x, y, width, height, area = stats[i]
        if area < SPECK:
            continue
        place = slice(max(0, y - 8), y + height + 8), slice(max(0, x - 8), x + width + 8)
        one = (labels[place] == i).astype(np.uint8)
        ring = (cv2.dilate(one, _disc(6)) > 0) & (cv2.dilate(one, _disc(3)) == 0)
        if np.median(thumb[place][ring]) - level < FADES * (top - level):  # else saturated glands
            foreign[place] |= one > 0
            found.add("implant" if area > IMPLANT * mask.sum() else "marker")
    return found


def _disc(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _threshold(greys: _Greys, pixels: int) -> float:
    """Grey level between background and tissue: mode of the background + max(6 sigma, MARGIN of the range).

    Exact zeros (or another constant floor) are padding beside the film on some scans and the true background
    on others, so the mode is searched above the floor. It is believed only where it is a sharp peak: the
    darkest tissue, which is all there is above the floor of a clean digital image, spreads evenly.
    """
    counts = np.concatenate([[0], greys.counts[1:]])  # without the floor itself
    dark = np.convolve(counts, np.ones(5) / 5, mode="same")[: max(4, int(0.6 * _otsu(counts)))]
    peak = int(dark.argmax())
    near, beyond = counts[max(0, peak - 4) : peak + 5].sum(), counts[peak + 9 : peak + 27].sum()
    background, sigma = 0.0, 0.0  # in bins
    if near > 0.05 * pixels and near > 2 * beyond:
        background, below = peak + 0.5, counts[: peak + 1]
        sigma = np.sqrt((below * (peak - np.arange(peak + 1)) ** 2).sum() / max(1, below.sum()))
    return greys.floor + (background + max(6 * min(sigma, 5), MARGIN * 256)) * greys.span / 256


def _histogram(values: np.ndarray) -> _Greys:
    counts = np.bincount(values.ravel(), minlength=2)
    levels = np.flatnonzero(counts)
    if levels.size == 0:
        return _Greys(0.0, 1.0, np.zeros(256), 0.0)
    total = np.cumsum(counts)
    span = max(int(np.searchsorted(total, 0.995 * total[-1])) - int(levels[0]), 1)
    bins = np.minimum((levels - levels[0]) * 256 // span, 255)
    counts = np.bincount(bins, weights=counts[levels], minlength=256)
    rank = 0.9995 * (total[-1] - 1)  # np.percentile without its sorting
    below, above = np.searchsorted(total, [np.floor(rank), np.ceil(rank)], side="right")
    return _Greys(float(levels[0]), float(span), counts, float(below + (above - below) * (rank % 1)))


def _otsu(counts: np.ndarray) -> int:
    """Bin of Otsu's threshold of a histogram: the cut with the greatest variance between the classes."""
    weights, sums = np.cumsum(counts), np.cumsum(counts * np.arange(len(counts)))
    products = np.maximum(weights * (weights[-1] - weights), 1)
    return int(((sums[-1] * weights / max(weights[-1], 1) - sums) ** 2 / products).argmax())


def _body(above: np.ndarray, cut_necks: bool) -> np.ndarray:
    """Smooth by 9x9 closing, then opening (OpenCV's border does not eat the chest wall), and take the
    breast's component, filled. With `cut_necks` what hangs on it by a thin bridge is dropped first."""
    mask = above.astype(np.uint8)
    part = mask[_place(mask, 8)]  # a view: what is around it is zero and stays so
    for step in (cv2.MORPH_CLOSE, cv2.MORPH_OPEN):
        part[...] = cv2.morphologyEx(part, step, _KERNEL)
    if cut_necks:
        padded = cv2.copyMakeBorder(part, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        core = _pick((_distance(padded) > NECK)[1:-1, 1:-1])
        if core.any():
            part &= _distance(~core) <= NECK + SPUR
    contours = _outline(_pick(mask))
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED) > 0


def _distance(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest zero: erosion and dilation by any disc at the price of one."""
    return cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)


def _place(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the box of a u8 mask, wider by `margin`; of nothing where it is empty."""
    x, y, width, height = cv2.boundingRect(mask)
    rows = slice(max(0, y - margin), y + height + margin)
    return rows, slice(max(0, x - margin), x + width + margin)


def _pick(mask: np.ndarray) -> np.ndarray:
    """The component with most pixels; one that touches no side counts for a third."""
    mask = mask.astype(np.uint8)
    first = divmod(int(mask.argmax()), mask.shape[1])
    # Filling one component is much faster than the statistics of all, and there is rarely a choice.
    if cv2.floodFill(mask.copy(), None, first[::-1], 2)[0] == cv2.countNonZero(mask):
        return mask > 0
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if count < 2:
        return mask > 0
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


def _suspect(mask: np.ndarray, thumb: np.ndarray, known: np.ndarray, greys: _Greys) -> bool:
    """True where the mask's area, outline or contact with the frame's sides is unlike a breast, or a second
    recipe (0.2 x Otsu) disagrees."""
    if not 0.02 <= mask.mean() <= 0.95 or min(mask[:, :2].mean(), mask[:, -2:].mean()) > 0.6:
        return True
    if mask.sum() < 0.75 * cv2.contourArea(cv2.convexHull(np.concatenate(_outline(mask)))):
        return True
    second = _body(
        (thumb > greys.floor + 0.2 * _otsu(greys.counts) * greys.span / 256) & known, cut_necks=False
    )
    return (mask & second).sum() < 0.75 * (mask | second).sum()
