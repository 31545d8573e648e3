"""Schedules at the steps that matter, against DINOv2's numpy arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax.schedules import Cosine, scaled_lr


def dinov2_array(base, final, total, warmup=0, start=0.0):
    """The schedule as an array, from its definition (linspace warmup, then a cosine)."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(start, base, warmup), cosine])


@pytest.mark.parametrize("args", [(4e-3, 1e-6, 1000, 100), (0.04, 0.4, 1000), (0.07, 0.07, 1000, 300, 0.04)])
def test_every_step_equals_dinov2(args):
    expected, schedule = dinov2_array(*args), Cosine(*args)
    np.testing.assert_allclose([schedule(i) for i in range(1000)], expected, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(schedule(jnp.arange(1000)), expected, rtol=2e-5, atol=2e-9)
    assert schedule(1000) == schedule(5000) == args[1]


def test_first_rate_is_zero_and_last_warmup_rate_the_peak():
    schedule = Cosine(1e-3, 1e-6, 100, 10)
    assert schedule(0) == 0 and schedule(9) == pytest.approx(1e-3)


def test_rate_scales_with_the_root_of_the_batch():
    assert scaled_lr(4e-3, 1024) == 4e-3
    assert scaled_lr(4e-3, 256) == 2e-3
