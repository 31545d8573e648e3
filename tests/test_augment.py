"""Photometrics: background stays 0, draws depend on the sample and view alone, normalisation is right."""

import jax
import jax.numpy as jnp
import numpy as np

from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, photometric, photometric_pairs

PLAIN = dict(mean=(0.0,), std=(1.0,))
KEY = jax.random.key(0)


def crops(images=4, views=2, size=28):
    x = np.random.default_rng(0).integers(1, 256, (images, views, size, size), dtype=np.uint8)
    x[:, :, :10] = 0
    return jnp.asarray(x)


def test_background_stays_zero_through_every_operation():
    c = AugmentConfig(
        jitter_prob=1.0, blur_prob=(1.0,) * 3, blur_sigma=(1.0, 2.0), solarize_prob=(1.0,) * 3, **PLAIN
    )
    out = photometric(crops(), jnp.arange(4), KEY, c, 1, 0)
    assert float(jnp.abs(out[:, :, :10]).max()) == 0 and float(out[:, :, 10:].std()) > 0
    assert float(jnp.abs(photometric_pairs(crops(), jnp.arange(4), KEY, c, 1)[:, :, :10]).max()) == 0


def test_draws_depend_on_sample_and_view_not_on_the_row():
    c, x, sample = AugmentConfig(**PLAIN), crops(), jnp.array([7, 3, 9, 1])
    out = photometric(x, sample, KEY, c, 1, 0)
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_array_equal(photometric(x[order], sample[order], KEY, c, 1, 0), out[order])
    same = photometric(jnp.broadcast_to(x[:1, :1], x.shape), jnp.zeros(4, int), KEY, c, 1, 0)
    np.testing.assert_array_equal(same[0], same[1])
    assert float(jnp.abs(same[0, 0] - same[0, 1]).max()) > 0  # the two views differ


def test_nothing_drawn_is_plain_normalisation():
    c = AugmentConfig(jitter_prob=0.0, blur_prob=(0.0,) * 3)
    out = photometric(crops(), jnp.arange(4), KEY, c, 3, 0)
    expected = (np.asarray(crops())[..., None] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_probabilities_belong_to_view_roles():
    c = AugmentConfig(jitter_prob=0.0, blur_prob=(0.0,) * 3, solarize_prob=(0.0, 1.0, 0.0), **PLAIN)
    x = crops()
    expected = np.asarray(x)[..., None] / 255
    globals_, locals_ = (np.asarray(photometric(x, jnp.arange(4), KEY, c, 1, first)) for first in (0, 2))
    np.testing.assert_allclose(globals_[:, 0], expected[:, 0], atol=1e-6)
    assert np.abs(globals_[:, 1] - expected[:, 1]).max() > 0.3
    np.testing.assert_allclose(locals_, expected, atol=1e-6)
