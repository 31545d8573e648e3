"""Features of one mammogram in plain PyTorch: python example.py RECORD [FEATURES.npz]

RECORD is a grey uint8 image, .npy or (with Pillow) PNG, with background 0, already at the size to read it at:
`python -m mammodino_jax.embed --save-images DIR` writes such files. Needs torch and safetensors only: the
forward pass of DINOv2's ViT is written out.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

folder, file = Path(__file__).parent, sys.argv[1]
about = json.loads((folder / "mammodino.json").read_text())
vit, w = about["vit"], load_file(folder / "model.safetensors")


def linear(x, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def attention(x, name):
    q, k, v = linear(x, f"{name}.qkv").unflatten(-1, (3, vit["heads"], -1)).permute(2, 0, 3, 1, 4)
    return linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{name}.proj")


def mlp(x, name):
    if f"{name}.fc1.weight" in w:
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")
    gate, up = linear(x, f"{name}.w12").chunk(2, dim=-1)  # SwiGLU of ViT-g
    return linear(F.silu(gate) * up, f"{name}.w3")


def positions(rows, cols):
    pos, side = w["pos_embed"], vit["image_size"] // vit["patch_size"]
    if (rows, cols) == (side, side):
        return pos
    size, offset = {"size": (rows, cols)}, vit["pos_offset"]
    if offset:
        size = {"scale_factor": ((rows + offset) / side, (cols + offset) / side)}
    grid = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, mode="bicubic", antialias=vit["pos_antialias"], **size)
    return torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def encode(x):
    """Normalised [1, C, H, W] to tokens [1, 1 + N, D]: CLS first."""
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=vit["patch_size"])
    x = torch.cat([w["cls_token"], x.flatten(2).transpose(1, 2)], dim=1) + positions(*x.shape[2:])
    x = torch.cat([x[:, :1], w.get("register_tokens", x[:, :0]), x[:, 1:]], dim=1)
    for i in range(vit["depth"]):
        x = x + w[f"blocks.{i}.ls1.gamma"] * attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        x = x + w[f"blocks.{i}.ls2.gamma"] * mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    x = norm(x, "norm")
    return torch.cat([x[:, :1], x[:, 1 + vit["registers"] :]], dim=1)


if file.endswith(".npy"):
    record = np.load(file)
else:
    from PIL import Image

    record = np.asarray(Image.open(file))
patch, (height, width) = vit["patch_size"], record.shape
record = np.pad(record, [(0, -height % patch), (0, -width % patch)])  # background below and to the right
mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
with torch.no_grad():
    x = (torch.from_numpy(record) / 255 - mean) / std  # [C, H, W]: grey is repeated to the C channels
    tokens = encode(x[None])[0]
cls, patches = tokens[0], tokens[1:]
rows, cols = record.shape[0] // patch, record.shape[1] // patch
tissue = torch.from_numpy(record > 0).float().reshape(rows, patch, cols, patch).mean((1, 3)).flatten()
tissue_mean = tissue @ patches / tissue.sum()
print("CLS", cls[:4].tolist(), "mean of tissue patches", tissue_mean[:4].tolist())
if len(sys.argv) > 2:
    np.savez(sys.argv[2], cls=cls, patches=patches, tissue_mean=tissue_mean)
