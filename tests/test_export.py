"""Exported folders give our features where others work, load back, and say what one must know."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_dataset import breast
from safetensors.numpy import load_file

from mammodino_jax import provenance
from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.convert import folder
from mammodino_jax.convert.hub import from_hub, to_hub
from mammodino_jax.convert.pretrained import with_channels
from mammodino_jax.data.eval import letterbox
from mammodino_jax.encoder import Encoder, load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.export import main
from mammodino_jax.model.head import init_params
from mammodino_jax.model.vit import ViTConfig

VIT = ViTConfig(dim=48, depth=3, heads=3, image_size=98, layerscale=0.5)
REGISTERS = dataclasses.replace(VIT, registers=4)
SWIGLU = dataclasses.replace(VIT, ffn="swiglu")
PLAIN_HF = dataclasses.replace(VIT, pos_antialias=False)
LEGACY = dataclasses.replace(PLAIN_HF, pos_offset=0.1)
SIZES = [(98, 98), (154, 154), (70, 112)]


def random_encoder(vit: ViTConfig) -> Encoder:
    """An encoder whose every parameter is random, so that no swapped or dropped tensor goes unseen."""
    rng = np.random.default_rng(0)

    def draw(a):
        if (
            a.ndim in (2, 4) and len(a) > 1
        ):  # matrices keep the variance: features get a trained encoder's scale
            return rng.normal(0, np.prod(a.shape[1:]) ** -0.5, a.shape)
        return a + rng.normal(0, 0.1, a.shape)

    hub = to_hub(init_params(vit, None, seed=1))
    return Encoder("random", vit, from_hub({k: draw(a) for k, a in hub.items()}))


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, height, width), dtype=np.uint8)


def normalised_nchw(encoder: Encoder, grey: np.ndarray):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    channels = [(grey / 255 - m) / s for m, s in zip(encoder.mean, encoder.std, strict=True)]
    return torch.from_numpy(np.stack(channels, 1).astype(np.float32))


def close(ours: dict, tokens, registers: int = 0, atol: float = 1e-4) -> None:
    """Our features against the tokens of somebody else's model: CLS, registers, patches."""
    tokens = np.asarray(tokens)
    np.testing.assert_allclose(ours["cls"], tokens[:, 0], atol=atol, rtol=0)
    np.testing.assert_allclose(ours["patches"], tokens[:, 1 + registers :], atol=atol, rtol=0)


def same(one: Encoder, other: Encoder, but=()) -> None:
    ours, theirs = to_hub(one.params), to_hub(other.params)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(but):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("vit", [VIT, REGISTERS, SWIGLU, PLAIN_HF], ids=["plain", "reg", "swiglu", "hf"])
def test_hugging_face_folder_gives_our_features_at_every_size(tmp_path, vit):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    encoder = random_encoder(vit)
    folder.export(encoder, "hf", tmp_path / "hf", "test")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == ("Dinov2Model" if vit == PLAIN_HF else "Dinov2WithRegistersModel")
    for size in SIZES:
        with torch.no_grad():
            x = normalised_nchw(encoder, images(*size))
            out = model.eval()(pixel_values=x).last_hidden_state
        close(encoder(images(*size)), out, vit.registers)
    assert "features differ" not in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("vit", [VIT, REGISTERS, SWIGLU], ids=["plain", "registers", "swiglu"])
def test_timm_folder_gives_our_features_at_every_size(tmp_path, vit):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test")
    encoder = random_encoder(vit)
    folder.export(encoder, "timm", tmp_path / "timm", "test")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    weights = load_file(tmp_path / "timm/model.safetensors")
    assert model.state_dict().keys() == weights.keys()
    assert all((a.numpy() == weights[name]).all() for name, a in model.state_dict().items())
    for size in SIZES:
        with torch.no_grad():
            out = model.forward_features(normalised_nchw(encoder, images(*size)))
        close(encoder(images(*size)), out, vit.registers, 1e-5)
    assert json.loads((tmp_path / "timm/config.json").read_text())["pretrained_cfg"]["mean"] == [
        *encoder.mean
    ]


def test_timm_names_load_in_its_released_architectures(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    timm = pytest.importorskip("timm", reason="timm is the oracle of this test")
    for name, registers in (("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)):
        encoder = random_encoder(ViTConfig(dim=384, depth=1, heads=6, image_size=56, registers=registers))
        folder.export(encoder, "timm", tmp_path / name, "test")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architecture"] == name
        model = timm.create_model(name, num_classes=0, depth=1, img_size=56, dynamic_img_size=True).eval()
        weights = load_file(tmp_path / name / "model.safetensors")
        model.load_state_dict({k: torch.from_numpy(a) for k, a in weights.items()}, strict=True)
        for size in ((56, 56), (84, 70)):
            with torch.no_grad():
                out = model.forward_features(normalised_nchw(encoder, images(*size)))
            close(encoder(images(*size)), out, registers, 1e-5)


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
    encoder = random_encoder(VIT)
    folder.export(encoder, "hub", tmp_path / "hub", "test")
    x = images(98, 98)
    with torch.no_grad():
        weights = load_file(tmp_path / "hub" / "model.safetensors")
        out = plain_torch_vit(weights, normalised_nchw(encoder, x), VIT.heads).numpy()
    np.testing.assert_allclose(encoder(x)["cls"], out[:, 0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(encoder(x)["patches"], out[:, 1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["hub", "timm", "hf", "safetensors", "orbax"])
def test_exported_folder_loads_back_bit_exact(tmp_path, form):
    about = dict(made_for={"box": "tissue", "mm_per_px": None}, side=140, provenance={"pixels": ["aa"]})
    encoder = dataclasses.replace(random_encoder(REGISTERS), **about)
    folder.export(encoder, form, tmp_path / form, "test")
    again = load_encoder(str(tmp_path / form))
    for field in ("name", "vit", "mean", "std", *about, "long_side"):
        assert getattr(again, field) == getattr(encoder, field), field
    assert again.kind == "export"
    if form == "timm":  # only the sum of the class token and its position is known; no mask token
        same(again, encoder, but=("cls_token", "pos_embed", "mask_token"))
        close(again(images(98, 98)), np.concatenate([v if v.ndim == 3 else v[:, None] for v in encoder(images(98, 98)).values()], 1), atol=1e-5)  # fmt: skip
    else:
        same(again, encoder)
        assert again.fingerprint == encoder.fingerprint


@pytest.mark.parametrize("vit", [VIT, PLAIN_HF, REGISTERS], ids=["plain", "hf", "registers"])
def test_hub_to_hugging_face_and_back_is_bit_exact(tmp_path, vit):
    """By the command, from foreign file to foreign file; positions keep the way that Hugging Face has."""
    encoder = random_encoder(dataclasses.replace(vit, dim=64, heads=1))
    folder.export(encoder, "hf", tmp_path / "hf", "test")
    (tmp_path / "hf/mammodino.json").unlink()  # as others' files are
    hf = load_encoder(f"hf:{tmp_path / 'hf'}")
    assert dataclasses.replace(hf.vit, layerscale=0.5) == encoder.vit
    same(hf, encoder)
    main(["--encoder", f"hf:{tmp_path / 'hf'}", "--format", "hub", "--output", str(tmp_path / "hub")])
    (tmp_path / "hub/mammodino.json").unlink()
    spec = f"hub:{tmp_path / 'hub/model.safetensors'}"
    same(load_encoder(spec), encoder)
    assert "Converted from hf, whose terms apply" in (tmp_path / "hub/README.md").read_text()
    main(["--encoder", spec, "--format", "hf", "--output", str(tmp_path / "again")])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    for weights in (a, b):  # registers are absent, or there are 0 of them
        weights.pop("embeddings.register_tokens", None)
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_hub_offset_is_said_in_the_card_of_other_formats(tmp_path):
    hub = random_encoder(LEGACY)
    for form, text in (("hf", "differ from ours by little"), ("timm", "differ from ours (antialiasing)")):
        folder.export(hub, form, tmp_path / form, "test")
        assert text in (tmp_path / form / "README.md").read_text()
    folder.export(hub, "hub", tmp_path / "hub", "test")
    assert "interpolate_offset=0.1" in (tmp_path / "hub/README.md").read_text()


@pytest.mark.parametrize("stats", [(IMAGENET_MEAN, IMAGENET_STD), ((0.3, 0.3, 0.3), (0.25, 0.2, 0.3))])
def test_channels_fold_and_unfold(tmp_path, stats):
    three = dataclasses.replace(random_encoder(VIT), mean=stats[0], std=stats[1])
    one = with_channels(three, 1)
    assert (one.vit.channels, one.mean, one.std) == (1, three.mean[:1], three.std[:1])
    expected, x = three(images(98, 98)), images(98, 98)
    again = with_channels(one, 3)
    assert (again.mean, again.std) == (IMAGENET_MEAN, IMAGENET_STD)
    for other in (one, again):
        for name, a in expected.items():
            np.testing.assert_allclose(other(x)[name], a, atol=1e-5, rtol=0)
    assert with_channels(one, 1) is one
    for encoder, channels in ((three, 1), (one, 3)):  # and by the command
        folder.export(encoder, "safetensors", tmp_path / f"from{channels}", "test")
        out = tmp_path / f"to{channels}"
        main(["--encoder", str(tmp_path / f"from{channels}"), "--format", "hf", "--channels", str(channels), "--output", str(out)])  # fmt: skip
        assert json.loads((out / "config.json").read_text())["num_channels"] == channels
        got = load_encoder(str(out))
        np.testing.assert_allclose(got(x)["cls"], expected["cls"], atol=1e-5, rtol=0)


def test_onnx_gives_our_features(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the exported model")
    encoder = with_channels(random_encoder(VIT), 1)
    folder.export(encoder, "safetensors", tmp_path / "e", "test")
    main(["--encoder", str(tmp_path / "e"), "--format", "onnx", "--size", "98", "70", "--output", str(tmp_path / "o")])  # fmt: skip
    assert "98 x 70 px: features equal PyTorch's to" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "o/model.onnx", providers=["CPUExecutionProvider"])
    for x in (images(98, 70), images(98, 70)[:1]):
        cls, patches = session.run(None, {"pixel_values": normalised_nchw(encoder, x).numpy()})
        close(encoder(x), np.concatenate([cls[:, None], patches], axis=1))
    same(load_encoder(str(tmp_path / "o")), encoder)
    assert json.loads((tmp_path / "o/mammodino.json").read_text())["onnx_size"] == [98, 70]
    card = (tmp_path / "o/README.md").read_text()
    assert "H x W = 98 x 70 px only" in card and "Padding\nenters attention here" in card


def test_onnx_that_fails_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="ONNX export checks itself in onnxruntime")
    from mammodino_jax.convert import onnx

    encoder = random_encoder(dataclasses.replace(VIT, depth=1))
    with pytest.raises(UserError, match=r"--size 100 98 must be positive multiples of the patch size 14"):
        folder.export(encoder, "onnx", tmp_path / "o", "test", size=(100, 98))
    monkeypatch.setattr(onnx, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"onnxruntime's features differ from PyTorch's by .*nothing"):
        folder.export(encoder, "onnx", tmp_path / "o", "test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["torch", "onnxruntime", "onnxscript"])
def test_onnx_names_the_package_that_is_missing(tmp_path, monkeypatch, package):
    for name in ("onnxruntime", "onnxscript", "torch", "transformers"):
        if name != package:
            pytest.importorskip(name, reason="ONNX export needs it")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}.*pip install 'mammodino-jax\[onnx\]'"):
        folder.export(random_encoder(VIT), "onnx", tmp_path / "o", "test")
    assert not list(tmp_path.iterdir())


def test_onnx_names_a_transformers_that_cannot_build(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="ONNX export needs it")
    transformers = pytest.importorskip("transformers", reason="ONNX export needs it")

    def broken(folder):  # what a torchvision of another torch does
        raise ModuleNotFoundError("Could not import module 'Dinov2WithRegistersModel'")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", broken)
    with pytest.raises(UserError, match=r"transformers cannot build .*'Dinov2With.*torchvision"):
        folder.export(random_encoder(VIT), "onnx", tmp_path / "o", "test")


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_transformers_takes_a_whole_mlp_ratio_only(tmp_path, form):
    encoder = random_encoder(dataclasses.replace(VIT, mlp_ratio=2.5))
    with pytest.raises(UserError, match=r"whole mlp_ratio, not 2\.5"):
        folder.export(encoder, form, tmp_path / "o", "test")
    assert not list(tmp_path.iterdir())


def trained(**changes) -> Encoder:
    """An encoder with the papers of one that a run trained."""
    seen = {
        "sources": [["/home/somebody/vindr", "train", "2d", "1.0"]],
        "terms": {"vindr-mammo": "PhysioNet Credentialed Health Data License 1.5.0"},
        "no_release": [],
        "foreign": ["dinov2_vits14_pretrain.pth"],
    }
    made_for = {"preset": "mammodino", "box": "tissue", "clahe": 2.0, "mm_per_px": None}
    return dataclasses.replace(random_encoder(VIT), provenance=seen | changes, made_for=made_for)


@pytest.mark.parametrize("form", ["hub", "timm", "hf", "safetensors", "orbax"])
def test_the_card_says_what_one_must_know(tmp_path, form):
    folder.export(trained(), form, tmp_path / "out", "test")
    card = (tmp_path / "out/README.md").read_text()
    hub = pytest.importorskip("huggingface_hub", reason="reads the card's metadata")
    data = hub.ModelCard(card).data.to_dict()
    library = {"hub": "pytorch", "hf": "transformers", "timm": "timm"}.get(form, "jax")
    assert (data["license"], data["library_name"], data["datasets"]) == ("other", library, ["vindr-mammo"])
    assert data["pipeline_tag"] == "image-feature-extraction" and "mammography" in data["tags"]
    assert "private" not in data and "Private" not in card
    for text in ("PhysioNet Credentialed", "Started from dinov2_vits14_pretrain.pth, whose terms apply, too",
                 "preset mammodino, box tissue, clahe 2.0", "long side of 196 px", "0.485, 0.456, 0.406",
                 "on: vindr train 2d 1.0"):  # fmt: skip
        assert text in card
    assert not any("/home/somebody" in f.read_text() for f in (tmp_path / "out").glob("*.[jm][sd]*"))
    for i, code in enumerate(card.split("```python")[1:]):
        compile(code.split("```")[0], f"block {i}", "exec")


def test_weights_that_may_not_be_released_need_private(tmp_path):
    folder.export(trained(no_release=["embed"]), "safetensors", tmp_path / "mine", "test", private=True)
    command = ["--encoder", str(tmp_path / "mine"), "--format", "hf", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"trained on embed, whose terms forbid publishing.*--private"):
        main(command)
    assert not (tmp_path / "out").exists()
    main([*command, "--private"])
    card = (tmp_path / "out/README.md").read_text()
    assert "\nprivate: true\n---" in card and "**Private: not for release.** The terms of embed" in card


@pytest.mark.parametrize("form", ["hub", "timm", "hf"])
def test_an_export_named_by_the_kind_of_its_files_stays_an_export(tmp_path, form):
    seen = {"no_release": ["embed"], "patients": ["aa"], "pixels": ["bb"]}
    given = dataclasses.replace(trained(**seen), mean=(0.3,) * 3, std=(0.2,) * 3, side=140)
    folder.export(given, form, tmp_path / form, "test", private=True)
    file = tmp_path / form / "model.safetensors"
    for path in (file, file.parent):
        encoder = load_encoder(f"{form}:{path}")
        for field in ("name", "vit", "mean", "std", "side", "made_for"):
            assert getattr(encoder, field) == getattr(given, field), field
        assert encoder.kind == "export" and seen.items() <= encoder.provenance.items()
        assert provenance.inherited(f"{form}:{path}").items() >= seen.items()
    assert provenance.inherited("random:nano", str(file.parent / "heads.safetensors")).items() >= seen.items()
    with pytest.raises(UserError, match="trained on embed, whose terms forbid"):
        main(["--encoder", f"{form}:{file}", "--format", "orbax", "--output", str(tmp_path / "out")])


def test_a_copied_file_keeps_its_terms(tmp_path):
    given = random_encoder(dataclasses.replace(VIT, dim=64, heads=1))
    given = dataclasses.replace(given, provenance=trained(no_release=["embed"]).provenance)
    folder.export(given, "hub", tmp_path / "hub", "test", private=True)
    copy = (tmp_path / "hub/model.safetensors").rename(tmp_path / "mine.safetensors")
    seen = load_encoder(f"hub:{copy}").provenance
    assert (seen["no_release"], seen["foreign"]) == (["embed"], ["mine.safetensors"])
    assert provenance.inherited(f"hub:{copy}") == provenance.join(seen, {})
    command = ["--encoder", f"hub:{copy}", "--format", "hf", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="trained on embed, whose terms forbid"):
        main(command)
    main([*command, "--private"])
    card = (tmp_path / "out/README.md").read_text()
    assert "vindr-mammo: PhysioNet" in card and "Converted from mine.safetensors, whose terms apply" in card


def test_the_card_names_crops_and_builds_that_differ(tmp_path):
    builds = [{"box": "tissue", "clahe": 2.0}, {"box": "full", "clahe": 2.0}]
    encoder = dataclasses.replace(trained(builds=builds), side=140, made_for={"clahe": 2.0})
    folder.export(encoder, "hf", tmp_path / "out", "test")
    card = (tmp_path / "out/README.md").read_text()
    for text in ("made for: clahe 2.0. It was trained on builds that differ in box.", "the mean within about 1e-3",
                 "its training crops had 70 px, its positions are stored for 98 px"):  # fmt: skip
        assert text in card


def test_hugging_faces_image_processor_gives_our_input(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    pytest.importorskip("torch", reason="torch is the oracle of this test")
    image_module = pytest.importorskip("PIL.Image")
    for channels in (1, 3):
        encoder = with_channels(random_encoder(VIT), channels)
        folder.export(encoder, "hf", tmp_path / str(channels), "test")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / str(channels))
        x = images(98, 126)
        got = processor([image_module.fromarray(i) for i in x], return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(got, normalised_nchw(encoder, x), atol=1e-6)


# Runs a script as where torchvision is not installed: an import of it that fails would hide transformers' models.
BARE = "import runpy, sys; sys.modules['torchvision'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"


def run_example(
    encoder: Encoder, form: str, work: Path, record, python=(sys.executable, "-c", BARE)
) -> float:
    """The example beside exported weights, on a record fitted to the encoder's long side, against our features.

    Args:
      record: u8 [H, W].
      python: the command that the script follows; with Pillow the record is read from a PNG, else from .npy.

    Returns:
      The largest difference from our features and from the mean of their tissue patches.
    """
    folder.export(encoder, form, work / form, "test")
    patch, side = encoder.patch_size, encoder.long_side
    width = round(record.shape[1] * side / record.shape[0])
    image, _ = letterbox(record, side, -(-width // patch) * patch, patch)
    _, tissue = letterbox(image, *image.shape, patch)  # of the pixels that the example sees
    if len(python) > 1:
        from PIL import Image

        Image.fromarray(image).save(file := work / "record.png")
    else:
        np.save(file := work / "record.npy", image)
    command = [*python, work / form / "example.py", file, work / "features.npz"]
    quiet = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=quiet, cwd=work, capture_output=True, timeout=300)
    got, ours = np.load(work / "features.npz"), encoder(image[None], [[side, width]])
    weight = tissue.astype(np.float32).flatten() / tissue.sum(dtype=np.float32)
    errors = [got["cls"] - ours["cls"][0], got["patches"] - ours["patches"][0]]
    return max(float(np.abs(e).max()) for e in [*errors, got["tissue_mean"] - weight @ ours["patches"][0]])


@pytest.mark.slow
@pytest.mark.parametrize("vit", [VIT, REGISTERS, SWIGLU, LEGACY], ids=["plain", "reg", "swiglu", "legacy"])
def test_hub_example_gives_our_features(tmp_path, vit):
    pytest.importorskip("torch", reason="the example is PyTorch")
    assert run_example(random_encoder(vit), "hub", tmp_path, breast(120, 83, seed=1)) <= 1e-3


@pytest.mark.slow
def test_hugging_face_example_gives_our_features(tmp_path):
    pytest.importorskip("transformers", reason="the example needs it")
    encoder = with_channels(random_encoder(VIT), 1)
    assert run_example(encoder, "hf", tmp_path, breast(120, 83, seed=1)) <= 1e-3


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor random"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r'Did you mean "vitb14"\?'):
        load_encoder("random:vitb16")
    encoder = random_encoder(VIT)
    with pytest.raises(UserError, match="is no vision transformer"):  # Mammo-CLIP
        other = with_channels(dataclasses.replace(encoder, vit=None), 1)
        folder.export(other, "hub", tmp_path / "hub", "test")
    for form in ("hub", "safetensors", "orbax"):
        out = tmp_path / form
        folder.export(encoder, form, out, "test")
        with pytest.raises(UserError, match="not empty"):
            folder.export(encoder, form, out, "test")
        about = json.loads((out / "mammodino.json").read_text())
        about["vit"]["depth"] = 2
        (out / "mammodino.json").write_text(json.dumps(about))
        with pytest.raises(
            UserError, match=r"mammodino\.json describes other weights|does not hold the param"
        ):
            load_encoder(str(out))
        about["vit"]["depht"] = 2
        (out / "mammodino.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=r"no description that this version can read.*depht"):
            load_encoder(str(out))
    with pytest.raises(UserError, match=r"--heads goes with --format hub, not hf"):
        main(["--encoder", str(tmp_path), "--format", "hf", "--heads", "--output", str(tmp_path / "o")])
    with pytest.raises(UserError, match="not a training workdir"):
        main(["--workdir", str(tmp_path), "--format", "hf", "--output", str(tmp_path / "o")])
