"""Features that an encoder has to beat: the outline of the breast, hand-made texture, raw pixels."""

import hashlib
from pathlib import Path

import cv2
import numpy as np

from mammodino_jax.data.crops import resample
from mammodino_jax.evaluate import handmade
from mammodino_jax.evaluate.features import Extractor

PIXELS = 32  # side of the thumbnail whose grey values are the raw-pixel features
LEVELS = 16  # heights at which the outline's width is taken


def geometry(image: np.ndarray, mm: float) -> np.ndarray:
    """Of the tissue mask alone: area, extent, compactness, Hu moments, width at 16 heights. f32 [28]."""
    mask = image > 0
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return np.zeros(12 + LEVELS, np.float32)
    mask = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    hu = cv2.HuMoments(cv2.moments(mask.astype(np.uint8), binaryImage=True)).ravel()
    widths = np.array([part.sum(axis=1).mean() for part in np.array_split(mask, LEVELS) if len(part)]) * mm
    widths = np.interp(np.linspace(0, 1, LEVELS), np.linspace(0, 1, len(widths)), widths)
    logs = -np.sign(hu) * np.log10(np.abs(hu) + 1e-30)
    return np.r_[handmade.size(np.pad(mask, 1), mm), logs, widths].astype(np.float32)


def pixels(image: np.ndarray, mm: float) -> np.ndarray:
    """Grey values of the tissue's box, without regard to its aspect, at 32 x 32. f32 [1024]."""
    mask = image > 0
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return np.zeros(PIXELS**2, np.float32)
    box = image[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
    return resample(np.ascontiguousarray(box), (PIXELS, PIXELS)).ravel().astype(np.float32) / 255


BASELINES = {"mask geometry": geometry, "hand-made": handmade.handmade, "raw pixels": pixels}
CODE = hashlib.sha256(b"".join(Path(f).read_bytes() for f in (__file__, handmade.__file__))).hexdigest()[:16]


def extractor(name: str, patch: int) -> Extractor:
    """A baseline as an extractor of the images that an encoder of this patch size sees."""

    def function(image, size, tissue, mm):
        cut = [i[:h, :w] for i, (h, w) in zip(image, size, strict=True)]
        return {"x": np.stack([BASELINES[name](i, m) for i, m in zip(cut, mm, strict=True)])}

    return Extractor(f"{name} {CODE}", patch, function, lambda tokens: 16)
