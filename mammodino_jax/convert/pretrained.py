"""Weights in, as the start of pretraining: from foreign files and own runs, fitted to a recipe's shapes."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from absl import logging

from mammodino_jax import checkpoint
from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.convert.foreign import check, split, tensors
from mammodino_jax.convert.hub import from_hub, hub_shapes, to_hub
from mammodino_jax.encoder import Encoder, load_encoder, read_recipe
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import HeadConfig, bind, init_params
from mammodino_jax.model.vit import ViTConfig


def load_pretrained(
    spec: str,
    heads: str,
    vit: ViTConfig,
    head: HeadConfig,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> dict:
    """Parameters to start pretraining from, fitted to a recipe.

    Args:
      spec: a training workdir (teacher of its newest checkpoint, with its heads) or a checkpoint of one, a
        folder that mammodino_jax.export wrote, `hub:FILE` (backbone only), `timm:FILE`, `hf:DIR`,
        `biomedclip:DIR` or `dbt-dino:FILE` (the teacher's backbone and heads), see convert.foreign.read.
      heads: "" or a file with a DINO head, which replaces those of `spec`.
      vit, head: the recipe's shapes.
      mean, std: the recipe's input statistics; the patch embedding is adapted where the weights have others.

    Returns:
      Nested numpy float32 parameters in the layout of `init_params`: "backbone", and "dino_head" and
      "ibot_head" where found. `merge` them over fresh ones.

    Raises:
      UserError: unreadable weights, or weights that do not fit the recipe.
    """
    source = load_encoder(spec)
    if source.vit is None:
        raise UserError(f"{spec} is not a ViT: pretraining starts from a ViT's weights only")
    params = {"backbone": _fit(source, spec, vit, mean, std)}
    found = split(tensors(Path(heads))) if heads else read_heads(spec, asked=False)
    if heads and "dino_head" not in found:
        raise UserError(f"{heads} has no DINO head (dino_head.mlp.0.weight and so on)")
    for name in ("dino_head", "ibot_head") if head.separate_ibot else ("dino_head",):
        if name in found:
            params[name] = _fit_head(found[name], f"{heads or spec}: {name}", vit, head)
        else:
            logging.warning("%s: no %s there, it starts fresh", heads or spec, name)
    if "ibot_head" in found and not head.separate_ibot:
        logging.warning("%s: ibot_head is not used: config.head.separate_ibot is False", heads or spec)
    return params


def read_heads(spec: str, asked: bool = True) -> dict[str, dict[str, np.ndarray]]:
    """Projection heads that come with an encoder.

    Args:
      spec: as in `load_pretrained`; a workdir's are its teacher's.
      asked: False: not those of `hub` files and exported folders, which start pretraining bare.

    Returns:
      {"dino_head": {hub name: array}, "ibot_head": ...}, as far as there; {} where there are none.
    """
    kind, _, path = spec.partition(":")
    file = Path(path or spec)
    if asked and file.is_dir():  # an exported folder, whatever the kind
        file /= "heads.safetensors"
    if kind == "dbt-dino" or (asked and file.is_file() and (kind == "hub" or not path)):
        parts = split(tensors(file))
        return {name: weights for name, weights in parts.items() if name != "backbone"}
    return _workdir_heads(Path(spec)) if checkpoint.workdir_of(Path(spec)) else {}


def merge(fresh: dict, loaded: dict) -> dict:
    """Nested parameters `fresh` with those of `loaded` in their place.

    Raises:
      ValueError: a loaded array has no place there, or another shape.
    """
    out = dict(fresh)
    for key, value in loaded.items():
        if isinstance(value, dict):
            out[key] = merge(fresh.get(key, {}), value)
        elif key not in fresh or fresh[key].shape != value.shape:
            raise ValueError(f"{key!r} of shape {value.shape} does not fit the fresh parameters")
        else:
            out[key] = value
    return out


def _fit(source: Encoder, spec: str, vit: ViTConfig, mean, std) -> dict:
    """A backbone's parameters in the recipe's shapes, without register_tokens where they start fresh."""
    here, hub = source.vit, to_hub(source.params)
    fields = ("dim", "depth", "heads", "mlp_ratio", "ffn", "patch_size")
    wrong = [f"--config.model.{f}={getattr(here, f)}" for f in fields if getattr(here, f) != getattr(vit, f)]
    if here.channels < vit.channels:
        wrong.append(f"--config.model.channels={here.channels}")
    if here.registers > vit.registers:
        wrong.append(f"--config.model.registers={here.registers}")
    if wrong:
        hint = f"; set {' '.join(wrong)}, or start from other weights"
        fits = dataclasses.replace(  # what can be fitted is not to be named
            vit,
            image_size=here.grid * vit.patch_size,
            channels=max(here.channels, vit.channels),
            registers=min(here.registers, vit.registers),
        )
        check(spec, hub, hub_shapes(fits), hint)
        raise UserError(f"{spec}: blocks.0.attn.qkv.weight has {here.heads} heads, not {vit.heads}{hint}")
    if here.registers < vit.registers:
        logging.warning("%s: %d registers, the recipe's %d start fresh", spec, here.registers, vit.registers)
        hub.pop("register_tokens", None)
    if here.grid != vit.grid:
        how = dataclasses.replace(here, pos_antialias=vit.pos_antialias, pos_offset=vit.pos_offset)
        hub["pos_embed"] = np.asarray(bind(source.params, how).positions(vit.grid, vit.grid))
        logging.info("%s: positions resampled from %d to %d patches a side", spec, here.grid, vit.grid)
    ours, theirs = ((c.pos_antialias, c.pos_offset) for c in (vit, here))
    if ours != theirs:  # a frozen encoder keeps its own way; training settles into the recipe's
        logging.info("%s: resampled positions as %s (antialias, offset), now as %s", spec, theirs, ours)
    target = (tuple(mean[: vit.channels]), tuple(std[: vit.channels]))
    if (source.mean, source.std) != target:
        logging.info("%s: patch embedding adapted to inputs of mean %s, std %s", spec, *target)
        leaves = ("patch_embed.proj.weight", "patch_embed.proj.bias")
        fitted = refit_input(*(hub[leaf] for leaf in leaves), (source.mean, source.std), target)
        hub |= zip(leaves, fitted, strict=True)
    return from_hub(hub)


def refit_input(kernel: np.ndarray, bias: np.ndarray, source: tuple, target: tuple):
    """The patch embedding that gives on grey (g - M) / S what the old one gave on (g - m_c) / s_c, exactly.

    Args:
      kernel: [D, C, p, p], bias: [D].
      source: (means m_c, deviations s_c) of its C channels.
      target: (M, S) of the new channels: as many, one into which all fold, or more, which share equally.

    Returns:
      kernel [D, len(M), p, p] and bias [D], float32.
    """
    (m, s), (M, S) = np.array(source, np.float64), np.array(target, np.float64)
    if len(M) > len(m):
        kernel = np.repeat(kernel / len(M), len(M), axis=1)
    bias = bias + np.einsum("dcyx,c->d", kernel, (M - m) / s)
    kernel = kernel * (S / s)[:, None, None]
    if len(M) < len(m):
        kernel = kernel.sum(axis=1, keepdims=True)
    return kernel.astype(np.float32), bias.astype(np.float32)


def with_channels(encoder: Encoder, channels: int) -> Encoder:
    """The same features from 1 channel (3 folded; the first's statistics) or 3 (ImageNet's statistics)."""
    if encoder.vit is None or encoder.vit.channels == channels:  # None: export says so
        return encoder
    mean, std = (encoder.mean[:1], encoder.std[:1]) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    hub, leaves = to_hub(encoder.params), ("patch_embed.proj.weight", "patch_embed.proj.bias")
    fitted = refit_input(*(hub[leaf] for leaf in leaves), (encoder.mean, encoder.std), (mean, std))
    params = from_hub(hub | dict(zip(leaves, fitted, strict=True)))
    vit = dataclasses.replace(encoder.vit, channels=channels)
    return dataclasses.replace(encoder, vit=vit, params=params, mean=mean, std=std)


def _workdir_heads(path: Path) -> dict[str, dict[str, np.ndarray]]:
    recipe = read_recipe(checkpoint.workdir_of(path))
    heads = jax.eval_shape(functools.partial(init_params, recipe.model, recipe.head, 0))
    del heads["backbone"]
    teacher = checkpoint.load(path, "state", {"teacher": heads})["teacher"]
    return {name: to_hub(params) for name, params in teacher.items()}


def _fit_head(found: dict[str, np.ndarray], where: str, vit: ViTConfig, head: HeadConfig) -> dict:
    """A head's parameters, in the recipe's shapes."""
    bare = dataclasses.replace(vit, depth=1, image_size=vit.patch_size)
    shapes = hub_shapes(bare, dataclasses.replace(head, separate_ibot=False))
    expected = {n.removeprefix("dino_head."): s for n, s in shapes.items() if n.startswith("dino_head.")}
    hint = "; take other heads, or the backbone alone (hub:FILE, or an exported folder)"
    v, first = (found.get(name, np.empty(0)) for name in ("last_layer.weight_v", "mlp.0.weight"))
    if v.ndim == 2 and first.ndim == 2 and first.shape[1] == vit.dim:
        hint = (
            f"; set --config.head.prototypes={v.shape[0]} --config.head.bottleneck={v.shape[1]} "
            f"--config.head.hidden={first.shape[0]}, or" + hint.removeprefix(";")
        )
    check(where, found, expected, hint)
    return from_hub(found)
