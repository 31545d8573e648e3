"""Exported weights give our features in transformers and in a plain PyTorch ViT."""

import json

import numpy as np
import pytest

from mammodino_jax.convert import folder
from mammodino_jax.convert.hub import from_hub, to_hub
from mammodino_jax.encoder import Encoder, load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import init_params
from mammodino_jax.model.vit import ViTConfig

VIT = ViTConfig(dim=48, depth=3, heads=3, image_size=98, layerscale=0.5)


def random_encoder(vit: ViTConfig) -> Encoder:
    """An encoder whose every parameter is random, so that no swapped or dropped tensor goes unseen."""
    rng = np.random.default_rng(0)
    hub = to_hub(init_params(vit, None, seed=1))
    return Encoder("random", vit, from_hub({k: a + rng.normal(0, 0.1, a.shape) for k, a in hub.items()}))


def images(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size), dtype=np.uint8)


def normalised_nchw(encoder: Encoder, grey: np.ndarray):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    channels = [(grey / 255 - m) / s for m, s in zip(encoder.mean, encoder.std, strict=True)]
    return torch.from_numpy(np.stack(channels, 1).astype(np.float32))


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_folder_gives_our_features(tmp_path, registers):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    encoder = random_encoder(ViTConfig(dim=48, depth=3, heads=3, image_size=98, registers=registers))
    folder.export(encoder, "hf", tmp_path / "hf", "test")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = images(98)
    with torch.no_grad():
        out = model.eval()(pixel_values=normalised_nchw(encoder, x)).last_hidden_state.numpy()
    ours = encoder(x)
    np.testing.assert_allclose(ours["cls"], out[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours["patches"], out[:, 1 + registers :], atol=1e-4, rtol=0)


def plain_torch_vit(weights, x, heads):
    """DINOv2's forward pass on a hub state dict, in plain PyTorch operations, at the trained size."""
    import torch
    import torch.nn.functional as F

    w = {k: torch.from_numpy(a) for k, a in weights.items()}
    dim = w["cls_token"].shape[-1]
    t = (
        F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
        .flatten(2)
        .transpose(1, 2)
    )
    t = torch.cat([w["cls_token"].expand(len(x), 1, dim), t], 1) + w["pos_embed"]
    for i in range(1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks"))):
        p = {k.removeprefix(f"blocks.{i}."): a for k, a in w.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(t, (dim,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = F.linear(y, p["attn.qkv.weight"], p["attn.qkv.bias"])
        q, k, v = qkv.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(t.shape)
        t = t + p["ls1.gamma"] * F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.layer_norm(t, (dim,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"])),
            p["mlp.fc2.weight"],
            p["mlp.fc2.bias"],
        )
        t = t + p["ls2.gamma"] * y
    return F.layer_norm(t, (dim,), w["norm.weight"], w["norm.bias"], 1e-6)


def test_hub_state_dict_gives_our_features_in_plain_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    from safetensors.numpy import load_file

    encoder = random_encoder(VIT)
    folder.export(encoder, "hub", tmp_path / "hub", "test")
    x = images(98)
    with torch.no_grad():
        weights = load_file(tmp_path / "hub" / "model.safetensors")
        out = plain_torch_vit(weights, normalised_nchw(encoder, x), VIT.heads).numpy()
    np.testing.assert_allclose(encoder(x)["cls"], out[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(encoder(x)["patches"], out[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", folder.FORMATS)
def test_exported_folder_loads_back_bit_exact(tmp_path, form):
    encoder = random_encoder(VIT)
    folder.export(encoder, form, tmp_path / form, "test")
    again = load_encoder(str(tmp_path / form))
    assert (again.vit, again.mean, again.std) == (encoder.vit, encoder.mean, encoder.std)
    ours, theirs = to_hub(encoder.params), to_hub(again.params)
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        np.testing.assert_array_equal(a, theirs[name], err_msg=name)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor random"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r'Did you mean "vitb14"\?'):
        load_encoder("random:vitb16")
    encoder = random_encoder(VIT)
    folder.export(encoder, "hub", tmp_path / "hub", "test")
    with pytest.raises(UserError, match="not empty"):
        folder.export(encoder, "hub", tmp_path / "hub", "test")
    about = json.loads((tmp_path / "hub" / "mammodino.json").read_text())
    about["vit"]["depth"] = 2
    (tmp_path / "hub" / "mammodino.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not hold the weights"):
        load_encoder(str(tmp_path / "hub"))
