"""Encoders of the field as PyTorch modules with random weights, written as their authors' files are.

Each maker returns a Case: the spec that `load_encoder` takes, and the module's own features.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.convert.hub import hub_shapes
from mammodino_jax.encoder import load_encoder
from mammodino_jax.model.vit import ViTConfig

NO_SCALING = (0.0,) * 3, (1.0,) * 3  # DBT-DINO
RAD = (0.5307,) * 3, (0.2583,) * 3  # RAD-DINO
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Case:
    spec: str
    tokens: Callable  # of normalised [B, C, H, W]: [B, 1 + registers + N, D]
    registers: int = 0
    statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD)

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        mean, std = (torch.tensor(s).reshape(-1, 1, 1) for s in self.statistics)
        with torch.no_grad():
            tokens = self.tokens((torch.from_numpy(images)[:, None] / 255 - mean) / std).numpy()
        return {"cls": tokens[:, 0], "patches": tokens[:, 1 + self.registers :]}

    def error(self, height: int, width: int, batch: int = 1) -> float:
        """Largest difference of our features from theirs at a size in pixels."""
        images = np.random.default_rng(1).integers(0, 256, (batch, height, width), np.uint8)
        ours, theirs = load_encoder(self.spec)(images), self.features(images)
        assert all(ours[k].shape == a.shape and a.std() > 0.01 for k, a in theirs.items())
        return max(float(np.abs(ours[k] - a).max()) for k, a in theirs.items())


def value(name: str, shape, generator: torch.Generator) -> torch.Tensor:
    """A tensor that matters: matrices keep the variance, gains are near 1, LayerScale is not, 0.1 the rest."""
    a = torch.randn(shape, generator=generator)
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    if name.endswith("weight") and len(shape) > 1:
        return a * np.prod(shape[1:]) ** -0.5
    if "pos_embed" in name or "position_embeddings" in name:
        return a * 0.5
    return a * 0.1 + (name.endswith("weight"))


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and statistic of the module drawn anew; evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, a in [*module.named_parameters(), *module.named_buffers()]:
        if a.is_floating_point():
            a.data = value(name, a.shape, generator)
    return module.eval()


def hugging_face(folder: Path, vit: ViTConfig, statistics=(IMAGENET_MEAN, IMAGENET_STD)) -> Case:
    """transformers' Dinov2Model or Dinov2WithRegistersModel, written by save_pretrained."""
    import transformers

    kind = "Dinov2WithRegisters" if vit.registers else "Dinov2"
    shape = {"num_register_tokens": vit.registers} if vit.registers else {}
    config = getattr(transformers, kind + "Config")(
        hidden_size=vit.dim, num_hidden_layers=vit.depth, num_attention_heads=vit.heads,
        image_size=vit.image_size, patch_size=vit.patch_size, use_swiglu_ffn=vit.ffn == "swiglu", **shape,
    )  # fmt: skip
    model = randomise(getattr(transformers, kind + "Model")(config))
    model.save_pretrained(folder)
    about = dict(zip(("image_mean", "image_std"), map(list, statistics), strict=True))
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return Case(f"hf:{folder}", lambda x: model(x).last_hidden_state, vit.registers, statistics)


def timm_model(vit: ViTConfig, **options) -> torch.nn.Module:
    import timm

    name = {"swiglu": "vit_giant", "mlp": "vit_base"}[vit.ffn] + "_patch14" + "_reg4" * bool(vit.registers)
    shape = dict(embed_dim=vit.dim, depth=vit.depth, num_heads=vit.heads, num_classes=0)
    return timm.create_model(f"{name}_dinov2", **shape, **options).eval()


def timm(folder: Path, vit: ViTConfig) -> Case:
    """timm's DINOv2 model, as its file on the Hub."""
    model = randomise(timm_model(vit, img_size=vit.image_size, dynamic_img_size=True))
    save_file(model.state_dict(), folder / "timm.safetensors")
    return Case(f"timm:{folder}/timm.safetensors", model.forward_features, vit.registers)


def hub(folder: Path, vit: ViTConfig) -> Case:
    """Meta's released backbone, dinov2_vit*_pretrain.pth; its network is timm's by timm's own conversion."""
    weights = hub_weights(vit)
    torch.save(weights, folder / "hub.pth")
    return Case(f"hub:{folder}/hub.pth", functools.partial(_hub_tokens, vit, weights), vit.registers)


def dbt_dino(folder: Path, vit: ViTConfig, chunks: int = 0) -> Case:
    """DBT-DINO's checkpoint: the teacher of Meta's training code, in block chunks where it was sharded."""
    weights, teacher = hub_weights(vit), {"dino_head.mlp.0.weight": torch.ones(8, vit.dim)}
    for name, a in weights.items():
        if chunks and name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = f"blocks.{number * chunks // vit.depth}.{name.removeprefix('blocks.')}"
        teacher["backbone." + name] = a
    torch.save({"teacher": teacher}, folder / "dbt_dino.pth")
    tokens = functools.partial(_hub_tokens, vit, weights)
    return Case(f"dbt-dino:{folder}/dbt_dino.pth", tokens, vit.registers, NO_SCALING)


def hub_weights(vit: ViTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: value(name, shape, generator) for name, shape in hub_shapes(vit).items()}


def _hub_tokens(vit: ViTConfig, weights: dict, x_BCHW):
    """timm's network; without registers, with positions that PyTorch resamples as Meta's code asks it to."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    size, grid = tuple(x_BCHW.shape[2:]), vit.grid
    if vit.registers or size == (vit.image_size,) * 2:
        model = timm_model(vit, img_size=vit.image_size, dynamic_img_size=True)
    else:
        pos, model = weights["pos_embed"], timm_model(vit, img_size=size)
        patches = pos[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = [(s // vit.patch_size + 0.1) / grid for s in size]
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        weights = weights | {"pos_embed": torch.cat([pos[:, :1], patches.flatten(2).transpose(1, 2)], 1)}
    model.load_state_dict(checkpoint_filter_fn(dict(weights), model))
    return model.forward_features(x_BCHW)


def biomedclip(folder: Path, **shape) -> Case:
    """BiomedCLIP's folder: open_clip's names around timm's vit_base_patch16_224."""
    import timm

    options = dict(num_classes=0, dynamic_img_size=True) | shape
    trunk = randomise(timm.create_model("vit_base_patch16_224", **options))
    named = {f"visual.trunk.{k}": a for k, a in trunk.state_dict().items()}
    named |= {"visual.head.proj.weight": torch.ones(8, trunk.embed_dim), "logit_scale": torch.ones(())}
    save_file(named, folder / "open_clip_model.safetensors")
    about = {"mean": CLIP[0], "std": CLIP[1]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": about}))
    return Case(f"biomedclip:{folder}", trunk.forward_features, 0, CLIP)


class MammoClipCase(Case):
    def cells(self, images: np.ndarray) -> np.ndarray:
        """The last feature map [B, h, w, D]."""
        x = images.astype(np.float32)
        for image in x:  # as the authors' data sets do it
            image -= image.min()
            image /= image.max()
        x = torch.from_numpy((x - 0.3089279) / 0.25053555408335154).float()
        with torch.no_grad():
            return self.tokens(x[:, None].expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).numpy()

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        cells = self.cells(images)
        return {"cls": cells.mean((1, 2)), "patches": cells.reshape(len(cells), -1, cells.shape[-1])}


def mammoclip(folder: Path, name: str = "efficientnet-b5", **shape) -> Case:
    """Mammo-CLIP's checkpoint: EfficientNet-PyTorch's module, which the authors copied, without its _fc."""
    from efficientnet_pytorch import EfficientNet

    model = randomise(EfficientNet.from_name(name, **shape))
    named = {f"image_encoder.{k}": a for k, a in model.state_dict().items() if not k.startswith("_fc")}
    named["text_encoder.weight"] = torch.ones(3)
    config = {"model": {"image_encoder": {"source": "cnn", "name": "tf_efficientnet_b5_ns-detect"}}}
    torch.save({"model": named, "config": config, "epoch": 1}, folder / "mammoclip.tar")
    return MammoClipCase(f"mammoclip:{folder}/mammoclip.tar", model.extract_features)
