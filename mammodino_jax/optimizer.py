"""AdamW as DINOv2 uses it: clipping per sub-module, layer-wise learning rates, no decay on biases and norms.

Parameter groups follow dinov2/utils/param_groups.py; Adam itself is optax's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Not published by the paper; the defaults are DINOv2's ssl_default_config."""

    base_lr: float = 4e-3  # at batch 1024, scaled by sqrt(batch / 1024)
    final_lr: float | None = 1e-6  # None: constant after the warmup
    warmup_steps: int = 12_500  # 10 "epochs" of 1250 steps
    freeze_last_layer_steps: int = 1250  # the prototypes do not move while the teacher is still noise
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.992  # of the teacher
    final_momentum: float = 1.0
    teacher_temp: float = 0.07
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_steps: int = 37_500
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    clip: float = 3.0
    beta1: float = 0.9
    beta2: float = 0.999


def adam(c: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=c.beta1, b2=c.beta2, eps=1e-8)


def path_names(path) -> tuple[str, ...]:
    """Names along a pytree path; list positions come as digits."""
    return tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


def multipliers(params: dict, c: OptimConfig, depth: int) -> tuple[dict, dict, dict]:
    """Trees of floats beside `params`: learning-rate factor, weight-decay factor, 1 where the last layer is.

    Tokens and positions count as layer 0, block i as layer i + 1, the final norm and the heads as depth + 1.
    """

    def lr(path, _):
        names = path_names(path)
        if names[0] != "backbone" or names[1] == "norm":
            return 1.0
        layer = int(names[2]) + 1 if names[1] == "blocks" else 0
        return c.layer_decay ** (depth + 1 - layer) * (c.patch_embed_lr if names[1] == "patch_embed" else 1.0)

    def decay(path, _):
        names = path_names(path)
        return 0.0 if names[-1] in ("bias", "scale", "gamma") else 1.0

    def last(path, _):
        return 1.0 if "last_layer" in path_names(path) else 0.0

    return tuple(jax.tree_util.tree_map_with_path(f, params) for f in (lr, decay, last))


def clip_by_module(grads: dict, limit: float) -> tuple[dict, dict]:
    """Scale each sub-module's gradients (backbone, dino_head, ibot_head) to a norm of at most `limit`.

    Returns (clipped gradients, {sub-module: norm before}); a limit of 0 does not clip.
    """
    norms = {name: optax.tree.norm(g) for name, g in grads.items()}
    if not limit:
        return grads, norms
    # torch's clip_grad_norm_ adds 1e-6 to the norm
    scale = {name: jnp.minimum(1.0, limit / (norm + 1e-6)) for name, norm in norms.items()}
    return {name: jax.tree.map(lambda g, s=scale[name]: g * s, g) for name, g in grads.items()}, norms


def adamw_update(
    params: dict,
    grads: dict,
    opt,
    c: OptimConfig,
    depth: int,
    *,
    lr,
    last_layer_lr,
    weight_decay,
    body_lr=None,
):
    """One AdamW step; the decay of a parameter is multiplied by its own learning rate.

    `body_lr` is the rate of the backbone without its patch embedding, which continuation freezes at first
    (Adam's moments accumulate all the while); None: lr.

    Returns (new parameters, new optimizer state).
    """
    lr_tree, decay_tree, last_tree = multipliers(params, c, depth)
    direction, opt = adam(c).update(grads, opt, params)
    body_lr = lr if body_lr is None else body_lr

    def step(path, p, u, lr_factor, decay_factor, last):
        names = path_names(path)
        body = names[0] == "backbone" and names[1] != "patch_embed"
        rate = (last_layer_lr if last else body_lr if body else lr) * lr_factor
        return p - rate * (u + weight_decay * decay_factor * p)

    return jax.tree_util.tree_map_with_path(step, params, direction, lr_tree, decay_tree, last_tree), opt
