"""The data set writer and real film records for the tests of the input pipeline."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def make():
    """The module make_dataset.py (tests are not a package)."""
    spec = importlib.util.spec_from_file_location("make_dataset", Path(__file__).with_name("make_dataset.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _film_record(path):
    """A film scan as a box record at half size: background is what lies below 0.2 x Otsu's threshold."""
    image = cv2.resize(
        cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA
    )
    threshold, _ = cv2.threshold(image, 0, 255, cv2.THRESH_OTSU)
    rough = (cv2.GaussianBlur(image, (0, 0), 1) > 0.2 * threshold).astype(np.uint8)
    rough = cv2.morphologyEx(rough, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(rough)
    mask = labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    columns = np.flatnonzero(mask.any(0))
    box_x = slice(columns[0], columns[-1] + 1)
    rows = np.flatnonzero(mask[:, box_x].mean(1) >= 0.05)
    box = (slice(rows[0], rows[-1] + 1), box_x)
    return np.where(mask[box], np.maximum(image[box], 1), 0).astype(np.uint8)


@pytest.fixture(scope="session")
def film_records(shared):
    """Every mini-MIAS image as a record, u8 [H, W] each."""
    paths = sorted((shared / "data/minimias/images").glob("*.png"))
    if not paths:
        pytest.skip("mini-MIAS images are not on this machine")
    return [_film_record(path) for path in paths]
