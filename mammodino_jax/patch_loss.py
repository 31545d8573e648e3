"""iBOT-M's cross-entropy over the prototypes, a chunk of masked slots at a time.

Logits of all masked patches would be the largest array of a step: 180 MB an image at 684 slots and 65,536
prototypes, several times over. Here no more than `chunk` slots of an image have logits at once. The loss is
a scalar, so the gradient of a chunk is taken while its logits are there (custom_vjp), and nothing is computed
again in the backward pass. Every device runs over its own rows (shard_map); sums over prototypes, and
gradients, are added up once, at the end.

B images, M slots, b images of one device, n chunks of R rows, D width, Z bottleneck, K prototypes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mammodino_jax import losses
from mammodino_jax.model.head import DINOHead, project, similarities
from mammodino_jax.sharding import ROWS


def patch_loss(
    head: DINOHead,
    head_t: DINOHead,
    tokens_BMD,
    tokens_t_BMD,
    weight_BM,
    center_K,
    temp,
    *,
    chunk: int,
    mesh=None,
):
    """Cross-entropy of masked patches: a view's patches weigh 1/count; mean over all 2B views.

    Args:
      head, head_t: the iBOT heads of student and teacher.
      tokens_BMD, tokens_t_BMD: patch tokens in the slots, after the final norm.
      weight_BM: mask weights; 0: an empty slot, which counts nowhere.
      center_K: of the teacher's logits; None: Sinkhorn-Knopp over all rows of the global batch.
      temp: the teacher's temperature.
      chunk: slots of an image that have logits at the same time; 0: all.
      mesh: over whose devices axis B lies; None: one device.

    Returns:
      (loss, {"entropy": of the targets in units of ln K, "sum": teacher's logits summed over rows [K],
      "rows": their number}). Only the loss has a gradient, by the student's head and tokens.
    """
    mlp, params = nnx.split(head.mlp)
    mlp_t, params_t = nnx.split(head_t.mlp)
    run = functools.partial(
        _on_device, (mlp, mlp_t), head.dtype, chunk, () if mesh is None else mesh.axis_names
    )
    if mesh is not None:
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), ROWS, P(), ROWS, ROWS, P(), P()), out_specs=(P(), P(), ROWS),
            check_vma=False,
        )  # fmt: skip

    @jax.custom_vjp
    def loss(student, tokens, *rest):
        return run(student, tokens, *rest)[0]

    def forward(student, tokens, *rest):
        out, *grads = run(student, tokens, *rest)
        return out, grads

    def backward(grads, cotangent):
        scaled = jax.tree.map(lambda g: g * cotangent[0], grads)
        return (*scaled, None, None, None, None, None)

    loss.defvjp(forward, backward)
    student, teacher = (params, head.last_layer.weight()), (params_t, head_t.last_layer.weight())
    total, aux = loss(student, tokens_BMD, teacher, tokens_t_BMD, weight_BM, center_K, temp)
    return total / (2 * weight_BM.shape[0]), aux


def _on_device(
    graphs, dtype, chunk, axes, student, tokens_bMD, teacher, tokens_t_bMD, weight_bM, center_K, temp
):
    """((sum of the loss, figures), gradients of the student's head, gradients of its tokens [b, M, D])."""
    M, D = tokens_bMD.shape[1:]
    size = min(chunk, M) if chunk else M
    n = -(-M // size)  # the last chunk overlaps the one before where M is not a multiple of its size
    starts_n = jnp.minimum(jnp.arange(n) * size, M - size)

    def cut(a_bM, start):
        """A chunk's slots as rows."""
        part = jax.lax.dynamic_slice_in_dim(a_bM, start, size, axis=1)
        return part.reshape(-1, *part.shape[2:])

    def weights(i):
        return cut(jnp.where(jnp.arange(M) >= i * size, weight_bM, 0.0), starts_n[i])

    (params, prototypes_KZ), (params_t, prototypes_t_KZ) = student, teacher
    prototypes_KZ, prototypes_t_KZ = prototypes_KZ.astype(dtype), prototypes_t_KZ.astype(dtype)
    z_t_nRZ = jax.lax.map(
        lambda start: project(nnx.merge(graphs[1], params_t), cut(tokens_t_bMD, start)).astype(dtype),
        starts_n,
    )

    def teacher_logits(i):
        return similarities(z_t_nRZ[i], prototypes_t_KZ)

    shift_K = _sinkhorn_shift(n, teacher_logits, weights, temp, axes) if center_K is None else center_K / temp

    def cross_entropy(params, prototypes_KZ, x_RD, target_RK, weight_R):
        z_RZ = project(nnx.merge(graphs[0], params), x_RD).astype(dtype)
        return jnp.sum(losses.cross_entropy(target_RK, similarities(z_RZ, prototypes_KZ)) * weight_R)

    def one(carry, i):
        total, d_tokens_bMD = carry
        raw_RK, weight_R = teacher_logits(i), weights(i)
        target_RK = jax.nn.softmax(raw_RK / temp - shift_K, axis=-1)
        sum_K, rows = losses.center_sum(raw_RK, weight_R)
        value, (d_params, d_prototypes, d_x_RD) = jax.value_and_grad(cross_entropy, (0, 1, 2))(
            params, prototypes_KZ, cut(tokens_bMD, starts_n[i]), target_RK, weight_R
        )
        figures = {
            "entropy": jnp.sum(losses.entropies(target_RK), where=weight_R > 0),
            "sum": sum_K,
            "rows": rows,
        }
        new = (value, figures, (d_params, d_prototypes))
        total = jax.tree.map(lambda total, a: total + a.astype(total.dtype), total, new)
        there = jax.lax.dynamic_slice_in_dim(d_tokens_bMD, starts_n[i], size, axis=1)
        d_tokens_bMD = jax.lax.dynamic_update_slice_in_dim(
            d_tokens_bMD, there + d_x_RD.reshape(-1, size, D), starts_n[i], axis=1
        )
        return (total, d_tokens_bMD), None

    zero = (
        jnp.float32(0),
        {"entropy": jnp.float32(0), "sum": jnp.zeros(len(prototypes_KZ)), "rows": jnp.float32(0)},
        jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), student),
    )
    (total, d_tokens_bMD), _ = jax.lax.scan(one, (zero, jnp.zeros_like(tokens_bMD)), jnp.arange(n))
    value, figures, d_student = jax.lax.psum(total, axes) if axes else total
    figures["entropy"] /= jnp.maximum(figures["rows"], 1.0)
    return (value, figures), d_student, d_tokens_bMD


def _sinkhorn_shift(n: int, logits, weights, temp, axes):
    """What Sinkhorn-Knopp takes from the columns of logits / temp; its targets are the softmax of the rest.

    losses.sinkhorn with the rows' part left to that softmax; `logits(i)`, `weights(i)` are those of chunk i.
    Rows of weight 0 are left out of the columns.
    """
    K = jax.eval_shape(logits, 0).shape[1]
    shift_K = None
    for _ in range(losses.SINKHORN_ITERATIONS):

        def add(carry, i, shift_K=shift_K):
            """Streaming logsumexp of the columns."""
            high_K, total_K = carry
            l_RK = logits(i) / temp
            if shift_K is not None:
                l_RK -= jax.nn.logsumexp(l_RK - shift_K, axis=1, keepdims=True)
            l_RK = jnp.where((weights(i) > 0)[:, None], l_RK, -jnp.inf)
            new_K = jnp.maximum(high_K, l_RK.max(axis=0))
            total_K = total_K * jnp.exp(high_K - new_K) + jnp.exp(l_RK - new_K).sum(axis=0)
            return (new_K, total_K), None

        low = jnp.finfo(jnp.float32).min  # finite: -inf - -inf is not a number
        (high_K, total_K), _ = jax.lax.scan(add, (jnp.full(K, low), jnp.zeros(K)), jnp.arange(n))
        if axes:
            top_K = jax.lax.pmax(high_K, axes)
            high_K, total_K = top_K, jax.lax.psum(total_K * jnp.exp(high_K - top_K), axes)
        shift_K = jnp.where(total_K > 0, high_K + jnp.log(total_K), 0.0)  # no valid row at all: as it is
    return shift_K
