"""Weight files of others, read as they are: vision transformers in five kinds of names, and DINO heads.

Everything is renamed to hub names first; shapes are then checked in one place, in PyTorch's layout.
"""

import dataclasses
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

STATISTICS = {  # mean and std where no file beside the weights has them; others: ImageNet's
    "dbt-dino": ((0.0,) * 3, (1.0,) * 3),  # QTIM-Lab/DBT-DINO's extract_embeddings.py feeds [0, 1]
    "biomedclip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP's
}
RAD_DINO = (0.5307,), (0.2583,)  # statistics of chest radiographs
FOLDERS = {  # what describes the weights in a folder, and files that may hold them
    "hf": ("preprocessor_config.json", "model.safetensors", "pytorch_model.bin"),
    "biomedclip": ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
TRUNK = "visual.trunk."  # of the image tower in open_clip's names


def read(spec: str) -> Encoder:
    """A foreign image encoder, frozen; its shape is inferred from the weights.

    Features are those after the final norm, so for BiomedCLIP those before the projection to its texts.

    Args:
      spec: one of FOREIGN, a colon and a file; for `hf` and `biomedclip` a folder, too. Its
        preprocessor_config.json or open_clip_config.json, where there is one, gives the input statistics, and
        config.json of `hf` the number of heads. What mammodino_jax.export wrote is read as an export,
        whatever the kind: with its provenance, statistics and positions.
        `dbt-dino` takes its input unscaled; other checkpoints of Meta's training code are `hub`, and their
        heads the same file.

    Raises:
      UserError: nothing readable there, or no encoder in the names that the kind promises.
    """
    from mammodino_jax.convert import folder, mammoclip

    kind, _, given = spec.partition(":")
    path = Path(given)
    if ours := folder.exported(path):
        return folder.load(ours)
    if kind == "mammoclip":
        encoder = mammoclip.read(path)
        return dataclasses.replace(encoder, provenance=folder.origin(path))
    whole, heads = path, 0
    name = path.resolve().name if path.is_dir() else path.stem
    mean, std = STATISTICS.get(kind, (IMAGENET_MEAN, IMAGENET_STD))
    if kind in FOLDERS:
        described, *files = FOLDERS[kind]
        beside = path if path.is_dir() else path.parent
        mean, std = _statistics(beside / described, mean, std)
        heads = _hf_heads(beside / "config.json") if kind == "hf" else 0
        if path.is_dir():
            path = next((path / f for f in files if (path / f).is_file()), path / files[0])
    named = tensors(path)
    if kind == "biomedclip":
        if not any(n.startswith(TRUNK) for n in named):
            raise UserError(
                f"{path}: no {TRUNK}* in there, expected BiomedCLIP's files or others of open_clip with a "
                f"timm ViT; first names there: {', '.join(list(named)[:3])}"
            )
        named = {n.removeprefix(TRUNK): a for n, a in named.items() if n.startswith(TRUNK)}
    hub = split(named)["backbone"]
    if kind == "hf":
        if "patch_embed.proj.weight" in hub:  # would pass, with another way of resampling positions
            raise UserError(f"{path} has DINOv2's own names, not Hugging Face's: give hub:{path}")
        hub = from_hf(hub)
    if kind in ("timm", "biomedclip"):
        hub = from_timm(hub)
    if kind == "biomedclip" and "cls_token" in hub:  # it has no LayerScale: ours is one, exactly
        blocks = {n.split(".")[1] for n in hub if n.startswith("blocks.")}
        hub |= {
            f"blocks.{i}.ls{k}.gamma": np.ones(hub["cls_token"].shape[-1]) for i in blocks for k in (1, 2)
        }
    if "mask_token" not in hub and "cls_token" in hub:
        logging.info("%s has no mask_token (hub's own files have): zeros, as at DINOv2's start", path)
        hub["mask_token"] = np.zeros((1, hub["cls_token"].shape[-1]), np.float32)
    vit = _infer(path, kind, hub, heads)
    if not vit.registers:
        hub.pop("register_tokens", None)
    hint = f"; no ViT that we know: if its names are of another kind, give that ({', '.join(FOREIGN)})"
    check(path, hub, hub_shapes(vit), hint)
    rad = np.allclose((mean[0], std[0]), np.ravel(RAD_DINO), atol=1e-4) or "rad-dino" in name.lower()
    preset = "dbt-dino" if kind == "dbt-dino" else "rad-dino" if kind == "hf" and rad else ""
    made, side = made_for(preset), vit.image_size if preset or kind == "biomedclip" else 0
    mean, std = mean[: vit.channels], std[: vit.channels]
    return Encoder(name, vit, from_hub(hub), mean, std, folder.origin(whole), kind, made, side)


def made_for(preset: str) -> dict:
    """Settings of the builds of a preset, as far as it has any of its own; of "" any."""
    from data_prep.settings import PRESETS

    return {"preset": preset, **PRESETS[preset]} if preset else {}


def _statistics(path: Path, mean: tuple, std: tuple) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of preprocessor_config.json or open_clip_config.json; the given ones where it has none."""
    if not path.is_file():
        logging.info("no %s: taking mean %s, std %s", path, mean, std)
        return mean, std
    try:
        about = json.loads(path.read_text())
        about = about.get("preprocess_cfg", about)  # open_clip's
        mean = about.get("image_mean") or about.get("mean") or mean
        std = about.get("image_std") or about.get("std") or std
        return tuple(map(float, np.broadcast_to(mean, 3))), tuple(map(float, np.broadcast_to(std, 3)))
    except (ValueError, AttributeError, TypeError) as error:  # JSON's error is a ValueError
        raise UserError(f"{path} does not give the mean and std of three channels: {error}") from None


def _hf_heads(path: Path) -> int:
    """Attention heads by transformers' config.json; 0 where it does not say.

    Raises:
      UserError: it cannot be read, or describes a ViT that computes otherwise than ours.
    """
    if not path.is_file():
        return 0
    try:
        about = json.loads(path.read_text())
        for field, ours in (("layer_norm_eps", 1e-6), ("hidden_act", "gelu")):
            if about.get(field, ours) != ours:
                raise UserError(f"{path}: {field} is {about[field]}, expected {ours}: no DINOv2")
        return int(about.get("num_attention_heads", 0))
    except (ValueError, AttributeError, TypeError) as error:  # JSON's error is a ValueError
        raise UserError(f"{path} is no config.json of transformers: {error}") from None


def tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors or PyTorch file (of a training checkpoint the teacher's), float32, finite.

    A PyTorch file is read with weights_only: code in it does not run.

    Raises:
      UserError: unreadable, PyTorch is needed and not there, or a value is not finite.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy has no name for
            raise UserError(f"{path} is no readable safetensors file (cut off?): {error}") from None
    else:
        found = _torch_tensors(path)
    found = {name: np.asarray(a, np.float32) for name, a in found.items()}
    for name, a in found.items():
        if not np.isfinite(a).all():
            raise UserError(f"{path}: {name} holds NaN or infinity: damaged, or its training diverged")
    return found


def _torch_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read: pip install torch, or save its state dict with "
            "safetensors.torch.save_file where PyTorch is, and give that file"
        ) from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise UserError(
            f"PyTorch {torch.__version__} runs code in files made for it, weights_only or not "
            f"(CVE-2025-32434), so it does not read {path}: pip install 'torch>=2.6'"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common error for what a damaged or unsafe file does
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:  # torch's own text advises to run it
            raise UserError(
                f"{path} holds more than tensors: {code[1]}, which may run any code and was not loaded. If "
                "you trust its authors, load it in their environment, save its state dict (mostly under "
                "'model' or 'teacher') with safetensors.torch.save_file, and give that file"
            ) from None
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0][:80]
        raise UserError(
            f"{path} is not readable as PyTorch weights ({reason}): cut off, or of another format? Get it "
            "again, or give a safetensors file"
        ) from None
    for key in ("teacher", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(a, torch.Tensor) for a in found.values()):
        raise UserError(f"{path} holds no state dict (names to tensors), nor one under 'teacher' or 'model'")
    return {name: a.detach().float().numpy() for name, a in found.items()}


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


def _infer(path: Path, kind: str, hub: dict[str, np.ndarray], heads: int) -> ViTConfig:
    """The shape that the backbone's own tensors say it has; `heads` they do not say, 0: of width 64."""
    gated = "blocks.0.mlp.w12.weight" in hub
    ndims = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    ndims |= {f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight": 2}
    for name, ndim in ndims.items():
        shape = hub[name].shape if name in hub else "missing"
        if shape == "missing" or len(shape) != ndim:
            raise UserError(
                f"{path}: {name} is {shape}, expected {ndim} dimensions in a ViT of {kind} names (others: "
                f"{', '.join(FOREIGN)}); first names there: {', '.join(list(hub)[:3])}"
            )
    cls, pos, patch, ffn = (hub[name].shape for name in ndims)
    dim, grid = cls[2], math.isqrt(pos[1] - 1)
    if dim % (heads or 64) or grid**2 != pos[1] - 1:
        want = f"{heads} heads" if heads else "heads of 64"
        raise UserError(
            f"{path}: cls_token is {cls}, pos_embed {pos}; expected {want} and 1 + side^2 positions"
        )
    registers = hub["register_tokens"].size // dim if "register_tokens" in hub else 0
    # hf: where they are, be they 0, positions are antialiased
    legacy = "register_tokens" not in hub and kind not in ("timm", "biomedclip")
    return ViTConfig(
        dim=dim,
        depth=1 + max(int(n.split(".")[1]) for n in hub if re.match(r"blocks\.\d+\.", n)),
        heads=heads or dim // 64,
        mlp_ratio=round(1.5 * ffn[1] / dim) if gated else ffn[1] / dim,
        ffn="swiglu" if gated else "mlp",
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
