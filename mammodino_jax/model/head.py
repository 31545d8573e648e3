"""DINOv2's projection head, and the network that a student or a teacher is: backbone and heads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mammodino_jax.model.vit import ViT, ViTConfig, normal_02


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Shape of the projection heads (dinov2 `DINOHead`; defaults of its ssl_default_config)."""

    prototypes: int = 65_536
    bottleneck: int = 256
    hidden: int = 2048
    separate_ibot: bool = (
        False  # a second head for patches; the paper does not say, DINOv2's small recipe shares
    )


class LastLayer(nnx.Module):
    """Weight-normalised linear layer without bias; magnitude and direction are parameters of their own."""

    def __init__(self, c: HeadConfig, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(
            c.bottleneck
        )  # torch's Linear default: DINOv2 makes this layer after its init pass
        v = jax.random.uniform(rngs.params(), (c.prototypes, c.bottleneck), jnp.float32, -bound, bound)
        self.weight_v = nnx.Param(v)
        self.weight_g = nnx.Param(jnp.ones((c.prototypes, 1)))

    def weight(self):
        """Prototypes float32 [K, bottleneck], of length weight_g."""
        v, g = self.weight_v[...], self.weight_g[...]
        return g * v / jnp.linalg.norm(v, axis=1, keepdims=True)

    def __call__(self, x, dtype):
        return similarities(x.astype(dtype), self.weight().astype(dtype))


class DINOHead(nnx.Module):
    def __init__(self, dim: int, c: HeadConfig, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        sizes = {
            "0": (dim, c.hidden),
            "2": (c.hidden, c.hidden),
            "4": (c.hidden, c.bottleneck),
        }  # torch's names
        self.mlp = nnx.Dict(
            {
                k: nnx.Linear(i, o, kernel_init=normal_02, dtype=dtype, rngs=rngs)
                for k, (i, o) in sizes.items()
            }
        )
        self.last_layer = LastLayer(c, rngs)

    def __call__(self, x):
        """Tokens [..., D] to logits float32 [..., K]."""
        return self.last_layer(project(self.mlp, x), self.dtype)


def similarities(z, prototypes):
    """Logits float32 [..., K] of unit vectors [..., bottleneck]."""
    return jnp.einsum("...d,kd->...k", z, prototypes, preferred_element_type=jnp.float32)


def project(mlp: nnx.Dict, x):
    """Tokens [..., D] through the head's MLP to unit vectors float32 [..., bottleneck]."""
    x = jax.nn.gelu(mlp["0"](x), approximate=False)
    x = jax.nn.gelu(mlp["2"](x), approximate=False)
    x = mlp["4"](x).astype(jnp.float32)
    # rsqrt of a floored square keeps the gradient finite at x = 0, where norm's is not
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Network(nnx.Module):
    """Backbone and heads; the names are those of DINOv2's training checkpoints."""

    def __init__(self, vit: ViTConfig, head: HeadConfig, rngs: nnx.Rngs):
        self.backbone = ViT(vit, rngs)
        self.dino_head = DINOHead(vit.dim, head, vit.dtype, rngs)
        if head.separate_ibot:
            self.ibot_head = DINOHead(vit.dim, head, vit.dtype, rngs)


@functools.cache
def _graphdef(vit: ViTConfig, head: HeadConfig | None):
    """Structure without arrays: parameters live in plain dicts outside the modules."""
    make = (lambda: ViT(vit, nnx.Rngs(0))) if head is None else (lambda: Network(vit, head, nnx.Rngs(0)))
    return nnx.graphdef(nnx.eval_shape(make))


def init_params(vit: ViTConfig, head: HeadConfig | None, seed: int) -> dict:
    """Parameters as a plain nested dict: the whole network's, or the backbone's where head is None."""
    rngs = nnx.Rngs(seed)
    module = ViT(vit, rngs) if head is None else Network(vit, head, rngs)
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(params: dict, vit: ViTConfig, head: HeadConfig | None = None):
    """The module with these parameters: `bind(student, vit, head).backbone(images)`."""
    return nnx.merge(_graphdef(vit, head), params)
