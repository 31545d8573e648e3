"""Hub names <-> names of timm's vit_*_patch14_[reg4_]dinov2, and the config.json that timm builds from."""

import math

import numpy as np

from mammodino_jax.model.vit import ViTConfig

_SIZES = {768: "base", 1024: "large"}  # small otherwise: every figure that differs is an argument


def to_timm(hub: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hub state dict of a backbone to timm's.

    timm has no mask_token and, where there are registers, no position of the class token: it is added to it.
    """
    timm = {n.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): a for n, a in hub.items()}
    del timm["mask_token"]
    if "register_tokens" in timm:
        timm["reg_token"] = timm.pop("register_tokens")
        timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
        timm["pos_embed"] = np.ascontiguousarray(timm["pos_embed"][:, 1:])
    return timm


def from_timm(timm: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hub names; of class token and its position only the sum is known where there are registers."""
    hub = {"register_tokens" if name == "reg_token" else name: a for name, a in timm.items()}
    fc1, fc2 = (timm.get(f"blocks.0.mlp.fc{i}.weight", np.empty((0, 0))) for i in (1, 2))
    if len(fc1) == 2 * fc2.shape[-1]:  # SwiGLUPacked
        hub = {n.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): a for n, a in hub.items()}
    pos = hub.get("pos_embed")
    if pos is not None and math.isqrt(pos.shape[1]) ** 2 == pos.shape[1]:
        hub["pos_embed"] = np.concatenate([np.zeros_like(pos[:, :1]), pos], axis=1)
    return hub


def config_json(vit: ViTConfig, weights: dict[str, np.ndarray], mean, std) -> dict:
    """config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`; `weights` in timm's names."""
    size = "giant" if vit.ffn == "swiglu" else _SIZES.get(vit.dim, "small")
    args = dict(
        img_size=vit.image_size,
        patch_size=vit.patch_size,
        in_chans=vit.channels,
        embed_dim=vit.dim,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=(len(weights["blocks.0.mlp.fc1.bias"]) + 0.5) / vit.dim,  # timm rounds the product down
        num_classes=0,
        dynamic_img_size=True,
    )
    if vit.registers:
        args["reg_tokens"] = vit.registers
    return {
        "architecture": f"vit_{size}_patch14_{'reg4_' if vit.registers else ''}dinov2",
        "num_classes": 0,
        "num_features": vit.dim,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [vit.channels, vit.image_size, vit.image_size],
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
        },
    }
