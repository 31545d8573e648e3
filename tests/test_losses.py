"""Properties of the losses that the golden step does not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax import losses


def logits(rows, prototypes=16, scale=1.0, seed=0):
    return scale * jax.random.normal(jax.random.key(seed), (rows, prototypes))


def test_sinkhorn_equals_the_exponential_form_and_its_marginals():
    x = logits(12)
    q = np.exp(np.asarray(x, np.float64) / 0.05).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    np.testing.assert_allclose(losses.sinkhorn(x, 0.05), (q * q.shape[1]).T, atol=1e-5)
    np.testing.assert_allclose(losses.sinkhorn(x, 0.05).sum(1), 1, atol=1e-5)


def test_sinkhorn_ignores_empty_slots():
    x = logits(12)
    weight = jnp.arange(12) < 8
    np.testing.assert_allclose(losses.sinkhorn(x, 0.05, weight)[:8], losses.sinkhorn(x[:8], 0.05), atol=1e-6)
    assert np.isfinite(losses.sinkhorn(x, 0.05, jnp.zeros(12))).all()  # a batch without any masked patch


def test_sinkhorn_survives_logits_that_overflow_the_exponential_form():
    assert np.isfinite(losses.sinkhorn(logits(12, scale=100.0), 0.04)).all()


def test_center_moves_by_valid_rows_only():
    x, weight = logits(6), jnp.array([1, 1, 0, 0, 0.5, 0])
    expected = 0.1 * x[np.array([0, 1, 4])].mean(0)
    np.testing.assert_allclose(
        losses.update_center(jnp.zeros(16), *losses.center_sum(x, weight)), expected, rtol=1e-5
    )
    center = jnp.ones(16)
    np.testing.assert_allclose(
        losses.update_center(center, *losses.center_sum(x, jnp.zeros(6))), center
    )  # nothing masked: no move


def test_dino_loss_counts_every_pair_of_different_views_once():
    B, L, K = 3, 4, 16
    teacher = jax.nn.softmax(logits(B * 2, K).reshape(B, 2, K))
    student, local = logits(B * 2, K, seed=1).reshape(B, 2, K), logits(B * L, K, seed=2).reshape(B, L, K)
    total = 0.0
    for b in range(B):
        for t in range(2):
            for s in [student[b, 1 - t], *local[b]]:
                total += float(losses.cross_entropy(teacher[b, t], s)) / B
    global_term, local_term = losses.dino_loss(teacher, student, local)
    np.testing.assert_allclose(float(global_term + local_term), total / (2 + 2 * L), rtol=1e-5)


def test_ibot_averages_over_masked_patches_then_views():
    teacher, student = jax.nn.softmax(logits(8).reshape(2, 4, 16)), logits(8, seed=1).reshape(2, 4, 16)
    ce = losses.cross_entropy(teacher, student)
    weight = jnp.array([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    expected = (ce[0, :2].mean() + ce[1, 0]) / 4  # two images, four views, two of them without a mask
    np.testing.assert_allclose(losses.ibot_loss(teacher, student, weight), expected, rtol=1e-5)


def test_koleo_skips_neighbours_of_the_same_patient():
    x = jnp.array([[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 0, 1]])
    plain, _ = losses.koleo_loss(x)
    apart, share = losses.koleo_loss(x, patient_B=jnp.array([1, 1, 2, 3]))
    assert share == pytest.approx(0.5)  # rows 0 and 1 are each other's nearest
    assert apart < plain
    alone, _ = losses.koleo_loss(x, patient_B=jnp.ones(4, int))
    assert alone == 0.0


def test_koleo_groups_are_independent_and_identical_rows_finite():
    x = logits(8, 6)
    groups = [losses.koleo_loss(x[:4])[0], losses.koleo_loss(x[4:])[0]]
    np.testing.assert_allclose(losses.koleo_loss(x, group=4)[0], sum(groups) / 2, rtol=1e-5)
    value, gradient = jax.value_and_grad(lambda x: losses.koleo_loss(x)[0])(jnp.ones((4, 6)))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(lambda x: losses.koleo_loss(x)[0])(jnp.zeros((4, 6)))).all()


def test_entropy_is_in_units_of_ln_k():
    np.testing.assert_allclose(losses.entropy(jnp.full((3, 16), 1 / 16)), 1, rtol=1e-5)
    np.testing.assert_allclose(losses.entropy(jnp.eye(16)), 0, atol=1e-6)
