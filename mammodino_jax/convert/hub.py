"""Our parameters <-> DINOv2's PyTorch state dict (hub names). Module names agree, so only layouts change."""

import numpy as np


def to_hub(params: dict) -> dict[str, np.ndarray]:
    """Nested parameters to a float32 state dict in PyTorch layouts: `blocks.0.attn.qkv.weight` [out, in]."""
    out = {}

    def walk(node, names):
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, [*names, str(key)])
            return
        a, leaf = np.asarray(node, np.float32), names[-1]
        if leaf == "kernel":
            leaf, a = "weight", a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T  # HWIO -> OIHW, IO -> OI
        elif leaf == "scale":
            leaf = "weight"
        out[".".join([*names[:-1], leaf])] = np.ascontiguousarray(a)

    walk(params, [])
    return out


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
