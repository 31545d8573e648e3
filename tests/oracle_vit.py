"""Forward pass of DINOv2 in other projects, with random weights: transformers, timm, Meta's hub convention."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F

from mammodino_jax.convert import folder
from mammodino_jax.convert.hub import from_hub, to_hub
from mammodino_jax.encoder import Encoder
from mammodino_jax.model.head import bind, init_params
from mammodino_jax.model.vit import ViTConfig

# who resamples positions how without registers: (antialias, offset); with registers all are (True, 0)
CONVENTIONS = {"hub": (False, 0.1), "transformers": (False, 0.0), "timm": (True, 0.0)}
SIZES = [(518, 518), (224, 224), (98, 98), (518, 392)]
# project, registers, size, masked: the hub's own forward differs from timm's in the positions only, and only
# without registers; timm knows no mask token
CASES = [
    *[("transformers", r, size, False) for r in (0, 4) for size in SIZES],
    *[("transformers", r, size, True) for r in (0, 4) for size in SIZES[2:]],
    *[("timm", r, size, False) for r in (0, 4) for size in SIZES],
    *[("hub", 0, size, False) for size in SIZES],
]


def case_id(case) -> str:
    project, registers, (height, width), masked = case
    return f"{project}-reg{registers}-{height}x{width}{'-masked' if masked else ''}"


@functools.cache
def random_weights(vit: ViTConfig) -> dict[str, np.ndarray]:
    """A hub state dict whose every tensor matters: matrices keep the variance, the rest is off its init."""
    rng = np.random.default_rng(0)

    def draw(name, a):
        if name.endswith("weight") and a.ndim > 1:
            return rng.normal(0, np.prod(a.shape[1:]) ** -0.5, a.shape)
        return a + rng.normal(0, 0.5 if name == "pos_embed" else 0.1, a.shape)

    hub = to_hub(init_params(vit, None, seed=0))
    return {k: draw(k, a).astype(np.float32) for k, a in hub.items()}


def _transformers(vit, weights, x_BCHW, mask_BN):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not vit.registers:  # whatever ours does: Dinov2Model, as the weights of others are for
        vit = dataclasses.replace(vit, pos_antialias=False, pos_offset=0.0)
    encoder = Encoder("random", vit, from_hub(weights))
    with tempfile.TemporaryDirectory() as temporary:  # through our exporter: transformers renames in memory
        folder.export(encoder, "hf", Path(temporary) / "hf", "test")
        model = transformers.AutoModel.from_pretrained(Path(temporary) / "hf")
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if vit.registers else "Dinov2Model")
    return model.eval()(pixel_values=x_BCHW, bool_masked_pos=mask_BN).last_hidden_state


def _timm(vit, weights, x_BCHW, _, **kwargs):
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    name = "vit_small_patch14_reg4_dinov2" if vit.registers else "vit_small_patch14_dinov2"
    shape = dict(embed_dim=vit.dim, depth=vit.depth, num_heads=vit.heads, num_classes=0)
    kwargs = {"img_size": vit.image_size, "dynamic_img_size": True} | kwargs
    model = timm.create_model(name, pretrained=False, **shape, **kwargs)
    hub = {k: torch.from_numpy(a) for k, a in weights.items()}
    model.load_state_dict(checkpoint_filter_fn(hub, model))  # timm's own conversion of Meta's files
    return model.eval().forward_features(x_BCHW)


def _hub(vit, weights, x_BCHW, _):
    """timm's network at a fixed size, with positions that PyTorch resampled as the hub's code asks it to."""
    size, grid = x_BCHW.shape[2:], vit.grid
    pos = torch.from_numpy(weights["pos_embed"])
    if tuple(size) != (vit.image_size, vit.image_size):
        scale = [(s // vit.patch_size + 0.1) / grid for s in size]
        patches = pos[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        pos = torch.cat([pos[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    weights = weights | {"pos_embed": pos.numpy()}
    return _timm(vit, weights, x_BCHW, None, img_size=tuple(size), dynamic_img_size=False)


def forward_error(case, vit: ViTConfig, convention: str | None = None) -> float:
    """Largest difference over CLS and patch tokens (their scale is 1).

    Args:
      case: one of CASES.
      vit: width, depth and heads; the rest follows from the case.
      convention: whose position resampling ours uses; the case's project by default.
    """
    project, registers, (height, width), masked = case
    antialias, offset = (True, 0.0) if registers else CONVENTIONS[convention or project]
    vit = dataclasses.replace(vit, registers=registers)
    weights, rng = random_weights(vit), np.random.default_rng(1)
    vit = dataclasses.replace(vit, pos_antialias=antialias, pos_offset=offset)
    x_BHWC = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    patches = height * width // vit.patch_size**2
    mask_BN = rng.random((2, patches)) < 0.4 if masked else None
    oracle = {"transformers": _transformers, "timm": _timm, "hub": _hub}[project]
    with torch.no_grad():
        x_BCHW = torch.from_numpy(x_BHWC.transpose(0, 3, 1, 2).copy())
        theirs = oracle(vit, weights, x_BCHW, None if mask_BN is None else torch.from_numpy(mask_BN)).numpy()
    ours = jax.jit(lambda p, x, m: bind(p, vit)(x, m))(from_hub(weights), x_BHWC, mask_BN)
    assert theirs.shape == (2, 1 + registers + patches, vit.dim)
    tokens = np.concatenate([ours["cls"][:, None], ours["patches"]], axis=1)
    return float(np.abs(tokens - np.delete(theirs, np.s_[1 : 1 + registers], axis=1)).max())
