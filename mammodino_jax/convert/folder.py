"""Exported encoders: a folder of weights, their description, and what a PyTorch user must know."""

import dataclasses
import json
from pathlib import Path

from safetensors.numpy import save_file

from mammodino_jax.convert.foreign import tensors
from mammodino_jax.convert.hf import config_json, from_hf, to_hf
from mammodino_jax.convert.hub import from_hub, hub_shapes, to_hub
from mammodino_jax.encoder import Encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.vit import ViTConfig

FORMATS = ("hf", "hub")

_CARD = """---
library_name: {library}
tags: [mammography, dinov2, self-supervised]
---
# {name}

A ViT-{dim}x{depth}/{patch} encoder of mammograms, pretrained with mammodino_jax {version}: an independent,
unofficial implementation of MammoDINO (arXiv 2510.11883). Research only, not a medical device.

Pretrained on: {sources}. Terms of the sources: {terms}.{foreign}

Input: grey records as `python -m data_prep build` writes them (breast box, 8 bit, background 0),
scaled to [0, 1], {channels}, then (x - mean) / std with mean {mean} and std {std}.
Trained on {size}-pixel crops.

{usage}
"""
_USAGE = {
    "hf": """```python
from transformers import AutoModel
model = AutoModel.from_pretrained("{folder}")
features = model(pixel_values=x).last_hidden_state[:, 0]  # CLS; x float32 [B, {c}, {size}, {size}]
```
At other sizes than {size} pixels Hugging Face resamples positions in its own way: features differ there.""",
    "hub": """`model.safetensors` holds the state dict of facebookresearch/dinov2's `DinoVisionTransformer`:
```python
from safetensors.torch import load_file
model.load_state_dict(load_file("{folder}/model.safetensors"))
```""",
}


def export(encoder: Encoder, form: str, output: Path, version: str) -> None:
    """Write an encoder as a folder: model.safetensors, config.json, mammodino.json, README.md.

    Args:
      encoder: what to write.
      form: "hf" (transformers' Dinov2Model) or "hub" (facebookresearch/dinov2's state dict).
      output: a folder that does not exist or is empty.
      version: of mammodino_jax.

    Raises:
      UserError: the folder is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    vit, hub = encoder.vit, to_hub(encoder.params)
    weights = to_hf(hub) if form == "hf" else hub
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    if form == "hf":
        (output / "config.json").write_text(json.dumps(config_json(vit), indent=1))
    about = {
        "name": encoder.name,
        "format": form,
        "version": version,
        "vit": dataclasses.asdict(vit),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "provenance": encoder.provenance,
    }
    (output / "mammodino.json").write_text(json.dumps(about, indent=1))
    facts, seen = dict(folder=output.name, c=vit.channels, size=vit.image_size), encoder.provenance
    card = _CARD.format(
        library="transformers" if form == "hf" else "pytorch",
        name=encoder.name, dim=vit.dim, depth=vit.depth, patch=vit.patch_size,
        version=version, size=vit.image_size, mean=encoder.mean, std=encoder.std,
        sources="; ".join(" ".join(s) for s in seen.get("sources", [])) or "nothing recorded",
        terms="; ".join(f"{k}: {v}" for k, v in seen.get("terms", {}).items()) or "none recorded",
        foreign="".join(f" Started from {name}, whose terms apply, too." for name in seen.get("foreign", [])),
        channels="repeated to 3 channels" if vit.channels == 3 else "one channel",
        usage=_USAGE[form].format(**facts),
    )  # fmt: skip
    (output / "README.md").write_text(card)


def load(folder: Path) -> Encoder:
    """Read back a folder written by `export`, in either format.

    Raises:
      UserError: it was not, or its weights do not fit its description.
    """
    path = Path(folder) / "mammodino.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has weights but no mammodino.json: not a folder that mammodino_jax exported; "
            f"give a Hugging Face folder as hf:{folder}"
        )
    about = json.loads(path.read_text())
    vit = ViTConfig(**about["vit"])
    weights = tensors(Path(folder) / "model.safetensors")
    if about["format"] == "hf":
        weights = from_hf(weights)
    if {k: a.shape for k, a in weights.items()} != hub_shapes(vit):
        raise UserError(f"{folder}/model.safetensors does not hold the weights that mammodino.json describes")
    mean, std = tuple(about["mean"]), tuple(about["std"])
    return Encoder(about["name"], vit, from_hub(weights), mean, std, about["provenance"])
