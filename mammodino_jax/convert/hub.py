"""Our parameters <-> DINOv2's PyTorch state dict (hub names). Module names agree, so only layouts change."""

import functools

import jax
import numpy as np

from mammodino_jax.model.head import HeadConfig, init_params
from mammodino_jax.model.vit import ViTConfig


def _views(node, names=()):
    """(hub name, float32 view in PyTorch's layout) of every array below a node of nested parameters."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _views(child, (*names, str(key)))
        return
    a, leaf = np.asarray(node, np.float32), names[-1]
    if leaf == "kernel":
        leaf, a = "weight", a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T  # HWIO -> OIHW, IO -> OI
    elif leaf == "scale":
        leaf = "weight"
    yield ".".join([*names[:-1], leaf]), a


def to_hub(params: dict) -> dict[str, np.ndarray]:
    """Nested parameters to a float32 state dict in PyTorch layouts: `blocks.0.attn.qkv.weight` [out, in]."""
    return {name: np.ascontiguousarray(a) for name, a in _views(params)}


def from_hub(weights: dict[str, np.ndarray]) -> dict:
    """The inverse of `to_hub`."""
    params = {}
    for name, a in weights.items():
        *scope, leaf = name.split(".")
        a = np.asarray(a, np.float32)
        if leaf == "weight" and a.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf, a = "kernel", a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T
        node = params
        for i, part in enumerate(scope):
            # nnx.List counts with ints; the head's mlp keeps torch's names "0", "2", "4"
            node = node.setdefault(int(part) if i and scope[i - 1] == "blocks" else part, {})
        node[leaf] = np.ascontiguousarray(a)
    return params


@functools.cache
def hub_shapes(vit: ViTConfig, head: HeadConfig | None = None) -> dict[str, tuple[int, ...]]:
    """{hub name: shape} of what `init_params(vit, head, seed)` makes, without initialising it."""
    abstract = jax.eval_shape(lambda: init_params(vit, head, 0))
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), abstract)
    return {name: a.shape for name, a in _views(zeros)}
