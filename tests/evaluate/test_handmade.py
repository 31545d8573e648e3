import numpy as np
import pytest

from mammodino_jax.evaluate.handmade import BINS, SCALES, handmade

SIZE = 5


def ellipse(grey, height=80, width=50):
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / (height / 2)) ** 2 + (x / width) ** 2 < 0.8
    return np.where(inside, grey, 0).astype(np.uint8)


def test_the_amount_and_place_of_background_do_not_matter(labelled):
    image = labelled.breast(120, 0)
    framed = np.pad(image, ((13, 40), (7, 29)))
    np.testing.assert_allclose(handmade(framed), handmade(image), rtol=1e-5, atol=1e-6)


def test_the_edge_of_the_breast_is_no_texture():
    flat = handmade(ellipse(150))
    texture = flat[SIZE + BINS + 8 :]
    contrast, gradient = texture[: 7 * len(SCALES)], texture[7 * len(SCALES) : 7 * len(SCALES) + 7]
    np.testing.assert_allclose(contrast, 0, atol=1e-3)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_grey_level_and_texture_show(labelled):
    smooth, rough = labelled.breast(120, 0, roughness=3), labelled.breast(120, 0, roughness=30)
    assert handmade(labelled.breast(60, 0))[SIZE + BINS] < handmade(labelled.breast(160, 0))[SIZE + BINS] - 80
    first_contrast = SIZE + BINS + 8
    assert handmade(rough)[first_contrast] > 5 * handmade(smooth)[first_contrast]


def test_histogram_and_patterns_are_shares(labelled):
    features = handmade(labelled.breast(120, 0))
    assert features[SIZE : SIZE + BINS].sum() == pytest.approx(1, abs=1e-5)
    assert features[-10:].sum() == pytest.approx(1, abs=1e-5)


def test_size_is_in_millimetres():
    image = np.zeros((60, 40), np.uint8)
    image[10:50, 5:25] = 99
    area, height, width, share, roundness = handmade(image, 0.5)[:SIZE]
    assert (area, height, width, share) == (200, 20, 10, 1)
    assert roundness == handmade(image, 2.0)[4]  # a shape has no scale


def test_a_blank_image_gives_zeros():
    blank = handmade(np.zeros((28, 28), np.uint8))
    assert blank.shape == handmade(ellipse(100)).shape
    assert not blank.any()
