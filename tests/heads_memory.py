"""Bytes of temporaries of heads and losses, compiled and not run: used by a fast test and the acceptance run."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mammodino_jax import losses
from mammodino_jax.model.head import DINOHead, HeadConfig
from mammodino_jax.patch_loss import patch_loss


@dataclasses.dataclass(frozen=True)
class Sizes:
    images: int = 8
    width: int = 768
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    local_views: int = 8
    dtype: str = "bfloat16"


def temporaries(s: Sizes, slots: int, chunk: int, center: bool = False) -> int:
    """Of loss and gradients of the DINO and iBOT terms, given tokens: one shared head, Sinkhorn or centering."""
    graph, params = nnx.split(nnx.eval_shape(lambda: DINOHead(s.width, s.head, s.dtype, nnx.Rngs(0))))

    def loss(params, params_t, cls, cls_t, tokens, tokens_t, weight, center_K):
        head, head_t = nnx.merge(graph, params), nnx.merge(graph, params_t)
        K = s.head.prototypes
        logits_t = head_t(cls_t).reshape(-1, K)
        target = (
            losses.center_softmax(logits_t, center_K, 0.07) if center else losses.sinkhorn(logits_t, 0.07)
        )
        views = head(cls)
        dino = losses.dino_loss(target.reshape(s.images, 2, K), views[:, :2], views[:, 2:])
        patches, _ = patch_loss(
            head, head_t, tokens, tokens_t, weight, center_K if center else None, 0.07, chunk=chunk
        )
        return sum(dino) + patches

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    B, D = s.images, s.width
    shapes = (
        params, params, f32(B, 2 + s.local_views, D), f32(B, 2, D), f32(B, slots, D), f32(B, slots, D),
        f32(B, slots), f32(s.head.prototypes),
    )  # fmt: skip
    compiled = jax.jit(jax.value_and_grad(loss, (0, 2, 4))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes
