"""Hub names <-> names in Hugging Face's files of Dinov2Model and Dinov2WithRegistersModel; config.json.

transformers renames some of these in memory, but its files keep the names below.
"""

import re

import numpy as np

from mammodino_jax.errors import UserError
from mammodino_jax.model.vit import ViTConfig

_RENAMES = [  # hub name, Hugging Face name; {} is the block number
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.{}.norm1.", "encoder.layer.{}.norm1."),
    ("blocks.{}.attn.proj.", "encoder.layer.{}.attention.output.dense."),
    ("blocks.{}.ls1.gamma", "encoder.layer.{}.layer_scale1.lambda1"),
    ("blocks.{}.norm2.", "encoder.layer.{}.norm2."),
    ("blocks.{}.mlp.fc1.", "encoder.layer.{}.mlp.fc1."),
    ("blocks.{}.mlp.fc2.", "encoder.layer.{}.mlp.fc2."),
    ("blocks.{}.mlp.w12.", "encoder.layer.{}.mlp.weights_in."),
    ("blocks.{}.mlp.w3.", "encoder.layer.{}.mlp.weights_out."),
    ("blocks.{}.ls2.gamma", "encoder.layer.{}.layer_scale2.lambda1"),
    ("norm.", "layernorm."),
]
_QKV = ("query", "key", "value")


def _rename(name: str, source: int, target: int) -> str | None:
    """`name` of column `source` of _RENAMES in column `target`; None where it has no row."""
    block = re.search(r"\d+", name)
    for row in _RENAMES:
        here, there = (row[i].format(block[0] if block else "") for i in (source, target))
        if name == here or (here.endswith(".") and name.startswith(here)):
            return there + name[len(here) :]
    return None


def to_hf(hub: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hub state dict of a backbone to Hugging Face's; qkv is split into query, key and value."""
    out = {}
    for name, a in hub.items():
        if ".attn.qkv." in name:
            number, leaf = name.split(".")[1], name.split(".")[-1]
            for part, rows in zip(_QKV, np.split(a, 3), strict=True):
                out[f"encoder.layer.{number}.attention.attention.{part}.{leaf}"] = np.ascontiguousarray(rows)
        else:
            out[_rename(name, 0, 1)] = a
    return out


def from_hf(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_hf`; names that are not of a DINOv2 backbone stay as they are."""
    out, parts = {}, {}
    for name, a in hf.items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(\w+)\.(weight|bias)", name)
        if found and found[2] in _QKV:
            parts.setdefault(f"blocks.{found[1]}.attn.qkv.{found[3]}", {})[found[2]] = a
        else:
            out[_rename(name, 1, 0) or name] = a
    return out | {name: np.concatenate([qkv[k] for k in _QKV if k in qkv]) for name, qkv in parts.items()}


def has_registers(vit: ViTConfig) -> bool:
    """Whether it is written as Dinov2WithRegistersModel: that resamples positions with antialiasing.

    Dinov2Model does not, so that an encoder without registers is one with 0 of them.
    """
    return vit.registers > 0 or vit.pos_antialias


def config_json(vit: ViTConfig) -> dict:
    """config.json for `transformers.AutoModel.from_pretrained`.

    Raises:
      UserError: mlp_ratio is no whole number, as transformers wants it.
    """
    if vit.mlp_ratio % 1:
        raise UserError(
            f"transformers' DINOv2 has a whole mlp_ratio, not {vit.mlp_ratio:g}: take --format hub or timm"
        )
    config = {
        "architectures": ["Dinov2WithRegistersModel" if has_registers(vit) else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if has_registers(vit) else "dinov2",
        "hidden_size": vit.dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.heads,
        "mlp_ratio": int(vit.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.channels,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": vit.ffn == "swiglu",
        "torch_dtype": "float32",
    }
    return config | ({"num_register_tokens": vit.registers} if has_registers(vit) else {})
