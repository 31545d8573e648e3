"""How the ViT is computed changes nothing: blocks in a loop or as a scan, what is recomputed, attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax.model.head import bind, init_params
from mammodino_jax.model.vit import REMAT, ViTConfig, attend

VIT = ViTConfig(dim=32, depth=3, heads=2, image_size=42, registers=1, layerscale=1.0, drop_path=0.25)
PARAMS = init_params(VIT, None, 0)
IMAGES = jax.random.normal(jax.random.key(1), (8, 42, 42, 3))
MASK = jax.random.bernoulli(jax.random.key(2), 0.3, (8, 9))


def gradients(key, **changes):
    vit = dataclasses.replace(VIT, **changes)

    def loss(params):
        out = bind(params, vit)(IMAGES, MASK, key, 4)
        return jnp.sum(out["cls"] ** 3) + jnp.sum(out["patches"] ** 3)

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(PARAMS))


@pytest.mark.parametrize("remat", list(REMAT))
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["eval", "drop-path"])
def test_scan_and_recomputation_change_nothing(scan, remat, key):
    for a, b in zip(gradients(key), gradients(key, scan=scan, remat=remat), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-5 * float(jnp.abs(a).max()))


def memory(remat: str) -> int:
    """Bytes of temporaries of a backward pass at 20 x 20 patches."""
    vit = ViTConfig(dim=64, depth=6, heads=4, image_size=280, remat=remat, scan=True)
    params = jax.eval_shape(lambda: init_params(vit, None, 0))
    images = jax.ShapeDtypeStruct((2, 280, 280, 3), jnp.float32)
    grad = jax.jit(jax.grad(lambda p, x: bind(p, vit)(x)["cls"].sum()))
    return grad.lower(params, images).compile().memory_analysis().temp_size_in_bytes


def test_recomputing_more_keeps_less():
    sizes = [memory(remat) for remat in REMAT]
    assert sizes[0] > 1.5 * sizes[1] > sizes[2] > 1.2 * sizes[3], dict(zip(REMAT, sizes, strict=True))


def reference(q, k, v):
    """Attention written out in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") / np.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v, precision="highest")


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize("tokens", [50, 257, 1370])
def test_attention_equals_the_reference_to_half_precision(implementation, tokens):
    """Values and gradients, at the token counts of 98, 224 and 518 px; bfloat16 resolves 2^-8."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN attention needs a GPU")
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 1, tokens, 2, 64)).astype(jnp.bfloat16)

    def run(attention):
        out, pull = jax.vjp(attention, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(cotangent.astype(out.dtype)))]

    for remat in (False, True):
        got = run(lambda q, k, v, r=remat: attend(q, k, v, implementation=implementation, remat=r))
        for a, b in zip(run(reference), got, strict=True):
            assert np.abs(a - b).max() <= 2**-6 * np.abs(a).max()


@pytest.mark.parametrize(
    ("backend", "dtype", "masked", "expected"),
    [("gpu", "bfloat16", False, "cudnn"), ("gpu", "float32", False, "xla"), ("gpu", "bfloat16", True, "xla"),
     ("cpu", "bfloat16", False, "xla"), ("tpu", "bfloat16", False, "xla")],
)  # fmt: skip
def test_auto_takes_cudnn_where_it_can_be_used(monkeypatch, backend, dtype, masked, expected):
    seen = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **named: seen.update(named) or q)
    x = jnp.zeros((2, 5, 2, 64), dtype)
    attend(x, x, x, jnp.ones((2, 5), bool) if masked else None)
    assert seen["implementation"] == expected


@pytest.mark.parametrize("tokens", [50, 257])
def test_cudnn_is_asked_for_an_even_number_of_tokens(monkeypatch, tokens):
    """JAX differentiates cuDNN's attention at even T only; what is added must not be seen. Without a GPU XLA
    stands in for cuDNN."""
    original = jax.nn.dot_product_attention

    def even(q, *rest, implementation, **named):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        return original(q, *rest, implementation="xla", **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even)
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, tokens, 2, 8))
    out, pull = jax.vjp(lambda *x: attend(*x, implementation="cudnn"), q, k, v)
    expected, pull_expected = jax.vjp(reference, q, k, v)
    for a, b in zip((expected, *pull_expected(cotangent)), (out, *pull(cotangent)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def flops(rate: float) -> float:
    vit = dataclasses.replace(VIT, drop_path=rate)
    grad = jax.jit(jax.grad(lambda p, key: bind(p, vit)(IMAGES, None, key, 4)["cls"].sum()))
    return grad.lower(PARAMS, jax.random.key(0)).compile().cost_analysis()["flops"]


def test_drop_path_saves_the_compute_that_it_drops():
    assert flops(0.5) < 0.65 * flops(0.0)  # the rest is the patch embedding and the tokens' gathers
