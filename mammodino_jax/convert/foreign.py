"""Weight files of others, read as they are: DINOv2 backbones in four kinds of names, and DINO heads.

Everything is renamed to hub names first; shapes are then checked in one place, in PyTorch's layout.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from absl import logging
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.convert.hf import from_hf
from mammodino_jax.convert.hub import from_hub, hub_shapes
from mammodino_jax.convert.timm import from_timm
from mammodino_jax.encoder import FOREIGN, Encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.vit import ViTConfig

_SWIGLU = "; backbones with SwiGLU (ViT-g) do not load"


def read(spec: str) -> Encoder:
    """A foreign backbone as a frozen encoder; its shape is inferred from the weights.

    Args:
      spec: one of FOREIGN, a colon and a file; for `hf` a folder too; its preprocessor_config.json, where
        there is one, gives the input statistics. Everything else has ImageNet's.

    Raises:
      UserError: nothing readable there, or not a DINOv2 backbone in the names that the kind promises.
    """
    kind, _, given = spec.partition(":")
    path, mean, std = Path(given), IMAGENET_MEAN, IMAGENET_STD
    name = path.resolve().name if path.is_dir() else path.stem
    if kind == "hf":
        described = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
        if described.is_file():
            about = json.loads(described.read_text())
            mean, std = tuple(about.get("image_mean") or mean), tuple(about.get("image_std") or std)
        if path.is_dir():
            files = [path / f for f in ("model.safetensors", "pytorch_model.bin")]
            path = next((f for f in files if f.is_file()), files[0])
    hub = split(tensors(path))["backbone"]
    if kind == "hf":
        if "patch_embed.proj.weight" in hub:  # would pass, with another way of resampling positions
            raise UserError(f"{path} has DINOv2's own names, not Hugging Face's: give hub:{path}")
        hub = from_hf(hub)
    if kind == "timm":
        hub = from_timm(hub)
    if "mask_token" not in hub and "cls_token" in hub:
        logging.info("%s has no mask_token (hub's own files have): zeros, as at DINOv2's start", path)
        hub["mask_token"] = np.zeros((1, hub["cls_token"].shape[-1]), np.float32)
    vit = _infer(path, kind, hub)
    if not vit.registers:
        hub.pop("register_tokens", None)
    check(path, hub, hub_shapes(vit))
    return Encoder(name, vit, from_hub(hub), mean[: vit.channels], std[: vit.channels])


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors or PyTorch file (of a training checkpoint the teacher's), float32, finite.

    Raises:
      UserError: unreadable, PyTorch is needed and not there, or a value is not finite.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy has no name for
            raise UserError(f"{path} is no readable safetensors file: {error}") from None
    else:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{path} needs PyTorch to be read: pip install torch, or save its state dict with "
                "safetensors.torch.save_file where PyTorch is, and give that file"
            ) from None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no common error for what a damaged or unsafe file does
            raise UserError(f"{path} is not readable as PyTorch weights: {error}") from None
        for key in ("teacher", "model", "state_dict"):
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                found = found[key]
        if not isinstance(found, dict) or not all(isinstance(a, torch.Tensor) for a in found.values()):
            raise UserError(f"{path} holds no state dict (names to tensors), nor one under 'teacher'")
        found = {name: a.detach().float().numpy() for name, a in found.items()}
    found = {name: np.asarray(a, np.float32) for name, a in found.items()}
    for name, a in found.items():
        if not np.isfinite(a).all():
            raise UserError(f"{path}: {name} holds NaN or infinity: damaged, or its training diverged")
    return found


def split(named: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{"backbone": ..., and the heads that are there}, without the names' prefixes and block chunks."""
    parts = {"backbone": {}}
    for name, a in named.items():
        name = re.sub(r"^(module\.)?(backbone\.)?", "", name)
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # blocks.CHUNK.INDEX.
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):  # torch's newer weight_norm
            name = name.replace(f"parametrizations.weight.{old}", new)
        part, _, rest = name.partition(".")
        if part in ("dino_head", "ibot_head"):
            parts.setdefault(part, {})[rest] = a
        elif part in ("mlp", "last_layer"):
            parts.setdefault("dino_head", {})[name] = a
        else:
            parts["backbone"][name] = a
    return parts


def _infer(path: Path, kind: str, hub: dict[str, np.ndarray]) -> ViTConfig:
    """The shape that the backbone's own tensors say it has."""
    ndims = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    ndims |= {"blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.fc2.weight": 2}
    for name, ndim in ndims.items():
        shape = hub[name].shape if name in hub else "missing"
        if shape == "missing" or len(shape) != ndim:
            raise UserError(
                f"{path}: {name} is {shape}, expected {ndim} dimensions in a DINOv2 backbone of {kind} names "
                f"(others: {', '.join(FOREIGN)}); first names there: {', '.join(list(hub)[:3])}{_SWIGLU}"
            )
    cls, pos, patch, fc1, fc2 = (hub[name].shape for name in ndims)
    if fc1 != fc2[::-1]:
        raise UserError(f"{path}: blocks.0.mlp.fc1.weight is {fc1}, fc2 {fc2}{_SWIGLU}")
    dim, grid = cls[2], math.isqrt(pos[1] - 1)
    if dim % 64 or grid**2 != pos[1] - 1:
        raise UserError(
            f"{path}: cls_token is {cls}, pos_embed {pos}; expected heads of 64 and 1 + side^2 positions"
        )
    registers = hub["register_tokens"].size // dim if "register_tokens" in hub else 0
    legacy = "register_tokens" not in hub and kind != "timm"  # hf: 0 of them say "antialias"
    return ViTConfig(
        dim=dim,
        depth=1 + max(int(n.split(".")[1]) for n in hub if re.match(r"blocks\.\d+\.", n)),
        heads=dim // 64,
        mlp_ratio=fc1[0] / dim,
        patch_size=patch[-1],
        image_size=grid * patch[-1],
        channels=patch[1],
        registers=registers,
        pos_antialias=not legacy,
        pos_offset=0.1 if legacy and kind != "hf" else 0.0,
    )


def check(where, got: dict[str, np.ndarray], expected: dict, hint: str = "") -> None:
    """Raise a UserError at the first tensor that is missing, unexpected or of another shape."""
    for name in [*expected, *got]:
        shape = got[name].shape if name in got else "missing"
        if shape != expected.get(name):
            want = expected.get(name, "no tensor of this name")
            raise UserError(f"{where}: {name} is {shape}, expected {want}{hint}")
