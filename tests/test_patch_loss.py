"""iBOT-M in chunks equals its plain statement: value, gradients, what moves the center."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from heads_memory import Sizes, temporaries

from mammodino_jax import losses
from mammodino_jax.model.head import DINOHead, HeadConfig
from mammodino_jax.patch_loss import patch_loss

B, M, D, K, TEMP = 4, 10, 24, 40, 0.06
GRAPH, PARAMS = nnx.split(DINOHead(D, HeadConfig(K, 16, 32), "float32", nnx.Rngs(0)))
_, PARAMS_T = nnx.split(DINOHead(D, HeadConfig(K, 16, 32), "float32", nnx.Rngs(1)))


def inputs(empty: bool = False):
    rng = np.random.default_rng(0)
    weight = np.zeros((B, M), np.float32)
    for row, count in enumerate([0] * B if empty else [M, 3, 0, 7]):
        weight[row, :count] = 1 / max(count, 1)
    tokens, tokens_t = rng.normal(size=(2, B, M, D)).astype(np.float32)
    return jnp.asarray(tokens), jnp.asarray(tokens_t), jnp.asarray(weight)


def plain(params, tokens, tokens_t, weight, center):
    logits, logits_t = (nnx.merge(GRAPH, p)(x) for p, x in ((params, tokens), (PARAMS_T, tokens_t)))
    rows = logits_t.reshape(-1, K)
    if center is None:
        target = losses.sinkhorn(rows, TEMP, weight.ravel())
    else:
        target = losses.center_softmax(rows, center, TEMP)
    valid = weight.ravel() > 0
    entropy = jnp.sum(losses.entropies(target) * valid) / jnp.maximum(valid.sum(), 1)
    total, count = losses.center_sum(rows, weight.ravel())
    return losses.ibot_loss(target.reshape(logits.shape), logits, weight), {
        "entropy": entropy, "sum": total, "rows": count,
    }  # fmt: skip


def chunked(chunk, mesh=None):
    def loss(params, tokens, tokens_t, weight, center):
        heads = nnx.merge(GRAPH, params), nnx.merge(GRAPH, PARAMS_T)
        return patch_loss(*heads, tokens, tokens_t, weight, center, TEMP, chunk=chunk, mesh=mesh)

    return loss


def run(loss, center, empty=False):
    return jax.jit(
        jax.value_and_grad(
            lambda p, x, *rest: (lambda v, a: (3 * v, a))(*loss(p, x, *rest)), (0, 1), has_aux=True
        )
    )(PARAMS, *inputs(empty), center)


@pytest.mark.parametrize("center", [None, jnp.linspace(-0.1, 0.1, K)], ids=["sinkhorn", "centering"])
@pytest.mark.parametrize("chunk", [0, 3, 5, 16], ids=["all", "uneven", "even", "larger"])
def test_chunks_equal_the_plain_loss(chunk, center):
    expected, got = run(plain, center), run(chunked(chunk), center)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-6 * float(jnp.abs(a).max()) + 1e-9)
    assert (
        float(expected[0][0]) > 1
        and max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[1])) > 1e-2
    )


@pytest.mark.parametrize("center", [None, jnp.zeros(K)], ids=["sinkhorn", "centering"])
def test_a_batch_without_any_masked_patch_is_finite(center):
    (value, figures), grads = run(chunked(4), center, empty=True)
    assert value == 0 and figures["rows"] == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_logits_of_the_teacher_do_not_overflow():
    """A logit / temperature of some hundreds overflows where Sinkhorn-Knopp exponentiates first."""
    scaled = jax.tree.map(lambda a: a, PARAMS_T)
    scaled["last_layer"]["weight_g"][...] = 100.0 * jnp.ones((K, 1))
    heads = nnx.merge(GRAPH, PARAMS), nnx.merge(GRAPH, scaled)
    loss, figures = patch_loss(*heads, *inputs(), None, 0.04, chunk=4)
    assert np.isfinite(loss) and np.isfinite(figures["entropy"])


def test_memory_grows_with_the_chunk_not_with_the_slots():
    """Acceptance line 4 of scale, small."""
    sizes = Sizes(images=4, width=32, head=HeadConfig(4096, 32, 64), local_views=2, dtype="float32")
    few, many, whole = (temporaries(sizes, *s) for s in ((32, 16), (256, 16), (256, 0)))
    assert many < 1.1 * few and many < whole / 4
