"""Masks against known breasts, and against the reference masks of real film."""

import cv2
import numpy as np
import pytest

from data_prep.mask import find_tissue, thumbnail


def dice(a, b) -> float:
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


@pytest.mark.parametrize("background", ["zero", "noisy", "gradient"])
@pytest.mark.parametrize("share", [0.12, 0.3, 0.5])
def test_robust_mask_for_any_size_and_background(breast, share, background):
    image = breast(800, 640, share=share).astype(float)
    truth = image > 0
    if background == "noisy":
        image += np.clip(np.random.default_rng(1).normal(200, 12, image.shape), 0, None)
    if background == "gradient":
        image += np.linspace(20, 90, image.shape[1])
    found = find_tissue(np.clip(image, 0, 4095).astype(np.uint16))
    assert dice(found.mask, truth) > 0.97
    assert found.chest_wall == "left" and not found.suspect


def test_labels_and_film_edges_are_left_out(breast):
    image = breast(800, 640, share=0.3, side="right")
    truth = image > 0
    cv2.putText(label := np.zeros(image.shape, np.uint8), "R MLO", (40, 120), 0, 2, 255, 12)
    image[label > 0] = 4095
    image[:8] = 4095  # a bright film edge that touches the breast's side of the frame
    image[700:, 600:612] = 3000  # a strip hanging below the breast
    found = find_tissue(image)
    assert dice(found.mask, truth) > 0.97 and not (found.mask & (label > 0)).any()
    assert found.chest_wall == "right"


def test_clean_digital_background_is_not_taken_for_tissue_fog(breast):
    """Dark fat around bright glands on exact zero: the darkest tissue must not become the background."""
    image = breast(800, 640, share=0.35)
    truth = image > 0
    glands = np.zeros(image.shape, np.uint8)
    cv2.circle(glands, (150, 400), 120, 1, -1)
    image = np.where(truth, 300 + image // 3, 0) + np.where(truth & (glands > 0), 3000, 0)
    assert dice(find_tissue(image.astype(np.uint16)).mask, truth) > 0.97


def test_paper_percentile_and_none(breast):
    image = breast(400, 320, share=0.25)
    assert dice(find_tissue(image, recipe="percentile").mask, image > 0) > 0.95  # exact zeros: the easy case
    noisy = np.clip(image + np.random.default_rng(0).normal(100, 8, image.shape), 0, 4095).astype(np.uint16)
    assert find_tissue(noisy, recipe="percentile").mask.mean() > 0.3  # takes 40 % whatever the breast
    assert find_tissue(image, recipe="none").mask.all()


def test_empty_and_padded(breast):
    assert not find_tissue(np.zeros((100, 80), np.uint16)).mask.any()
    image = breast(400, 320, share=0.3)
    padding = np.zeros(image.shape, bool)
    padding[:, 280:] = True
    image[padding] = 4000  # padding brighter than tissue, said by the header
    assert not find_tissue(image, padding).mask[padding].any()


def test_thumbnail_never_enlarges(breast):
    assert thumbnail(breast(300, 200)).shape == (300, 200)
    assert thumbnail(breast(3000, 2000)).shape == (1024, 683)


@pytest.mark.slow
def test_dice_on_real_film(shared):
    """The reference is clipped to the columns with more than 2 % non-zero pixels: the rest is padding."""
    folder = shared / "data/minimias"
    scores = []
    for path in sorted((folder / "images").glob("*.png")):
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        reference = cv2.imread(str(folder / "masks" / path.name), cv2.IMREAD_UNCHANGED) > 0
        reference &= ((image > 0).mean(0) > 0.02)[None]
        scores.append(dice(find_tissue(image.astype(np.uint16)).mask, reference))
    assert len(scores) == 238
    median, fifth, worst = np.median(scores), np.percentile(scores, 5), min(scores)
    print(f"mask Dice on 238 films: median {median:.4f}, 5th percentile {fifth:.4f}, worst {worst:.4f}")
    assert median >= 0.97 and fifth >= 0.94 and worst >= 0.85
