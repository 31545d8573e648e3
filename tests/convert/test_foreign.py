"""Encoders of the field give the features of their own PyTorch modules, or say why they do not load."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_prep.settings import PRESETS, Settings
from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.convert import folder, mammoclip
from mammodino_jax.convert.foreign import made_for
from mammodino_jax.convert.hf import config_json, from_hf, to_hf
from mammodino_jax.convert.hub import hub_shapes, to_hub
from mammodino_jax.convert.pretrained import load_pretrained
from mammodino_jax.encoder import ARCHITECTURES, load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig

torch = pytest.importorskip("torch", reason="torch modules are the oracles of these tests")
field = pytest.importorskip("oracle_encoders")

TINY = ViTConfig(dim=128, depth=2, heads=2, image_size=98)
GATED = dataclasses.replace(TINY, dim=192, heads=3, ffn="swiglu")  # timm does not round other widths as Meta
SHAPES = {
    "plain": TINY,
    "registers": dataclasses.replace(TINY, registers=4),
    "swiglu": GATED,
    "swiglu-registers": dataclasses.replace(GATED, registers=4),
}
SIZES = ((98, 98), (70, 98))  # the trained one, and another
TINY_CNN = (0.5, 0.3, 90)  # width, depth, side: of 640 features
MAKERS = {
    "hub": field.hub,
    "timm": field.timm,
    "hf": field.hugging_face,
    "dbt-dino": field.dbt_dino,
    "dbt-dino-chunks": lambda path, vit: field.dbt_dino(path, vit, chunks=2),
}


CASES = [(maker, shape) for maker in ("hub", "timm", "hf") for shape in SHAPES]


@pytest.mark.parametrize("maker, shape", [*CASES, ("dbt-dino", "plain"), ("dbt-dino-chunks", "registers")])
def test_vision_transformers(tmp_path, maker, shape):
    case = MAKERS[maker](tmp_path, SHAPES[shape])
    sizes = SIZES[1:] if "swiglu" in shape else SIZES
    assert max(case.error(*size, batch=2) for size in sizes) < 1e-4
    encoder = load_encoder(case.spec)
    kind = case.spec.partition(":")[0]
    fields = ("dim", "depth", "heads", "mlp_ratio", "ffn", "registers", "image_size")
    assert {k: getattr(encoder.vit, k) for k in fields} == {k: getattr(SHAPES[shape], k) for k in fields}
    assert (encoder.kind, encoder.long_side) == (kind, 98 if kind == "dbt-dino" else 196)
    assert (encoder.mean, encoder.std) == case.statistics
    assert encoder.made_for.get("preset") == ("dbt-dino" if kind == "dbt-dino" else None)
    file = case.spec.partition(":")[2]
    assert encoder.provenance == {"foreign": [file.rpartition("/")[2]], "patients": [], "pixels": []}


def test_swiglu_rounds_its_width_as_meta_does(tmp_path):
    case = field.hugging_face(tmp_path, dataclasses.replace(TINY, ffn="swiglu"))  # 341 1/3 becomes 344
    assert case.error(98, 98) < 1e-4
    assert load_encoder(case.spec).vit.mlp_ratio == 4


def test_vit_g_has_the_shapes_of_meta():
    shapes = hub_shapes(dataclasses.replace(ARCHITECTURES["vitg14"], depth=1))
    assert shapes["blocks.0.mlp.w12.weight"] == (8192, 1536)
    assert shapes["blocks.0.mlp.w3.weight"] == (1536, 4096)
    assert (ARCHITECTURES["vitg14"].depth, ARCHITECTURES["vitg14"].heads) == (40, 24)


def test_swiglu_converts_back_and_starts_a_recipe(tmp_path):
    case = field.hub(tmp_path, GATED)
    encoder = load_encoder(case.spec)
    hub = to_hub(encoder.params)
    back = from_hf(to_hf(hub))
    assert back.keys() == hub.keys() and all((back[k] == a).all() for k, a in hub.items())
    assert config_json(GATED)["use_swiglu_ffn"] and not config_json(TINY)["use_swiglu_ffn"]
    head = HeadConfig(prototypes=8, bottleneck=4, hidden=8)
    assert load_pretrained(case.spec, "", encoder.vit, head).keys() == {"backbone"}
    with pytest.raises(UserError, match=r"--config\.model\.ffn=swiglu"):
        load_pretrained(case.spec, "", dataclasses.replace(encoder.vit, ffn="mlp"), head)


@pytest.mark.parametrize("heads", [1, 4])
def test_hugging_face_says_how_many_heads(tmp_path, heads):
    case = field.hugging_face(tmp_path, dataclasses.replace(TINY, heads=heads))  # not of width 64
    assert case.error(70, 98) < 1e-4
    assert load_encoder(case.spec).vit.heads == heads
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layer_norm_eps": 1e-12}, r"config\.json: layer_norm_eps is 1e-12, expected 1e-06"),
        ({"hidden_act": "relu"}, r"hidden_act is relu, expected gelu"),
        ({"num_attention_heads": 3}, "expected 3 heads"),
        ({"num_attention_heads": "x"}, r"config\.json is no config\.json of transformers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_encoder(case.spec)
    (tmp_path / "config.json").unlink()
    assert load_encoder(case.spec).vit.heads == 2


def test_rad_dino_is_known_by_its_statistics(tmp_path):
    case = field.hugging_face(tmp_path / "weights", TINY, field.RAD)
    assert max(case.error(*size) for size in SIZES) < 1e-4
    encoder = load_encoder(case.spec)
    assert (encoder.mean, encoder.std) == field.RAD
    assert encoder.made_for == {"preset": "rad-dino"} | PRESETS["rad-dino"]
    assert encoder.long_side == 98  # its processor's: the whole image as one training crop
    named = field.hugging_face(tmp_path / "rad-dino", TINY)
    assert load_encoder(named.spec).made_for["preset"] == "rad-dino"
    file = load_encoder(f"{case.spec}/model.safetensors")
    assert (file.mean, file.made_for, file.fingerprint) == (
        encoder.mean,
        encoder.made_for,
        encoder.fingerprint,
    )


def test_biomedclip(tmp_path):
    case = field.biomedclip(tmp_path, embed_dim=128, depth=2, num_heads=2, img_size=64)
    assert max(case.error(*size, batch=2) for size in ((64, 64), (64, 48))) < 1e-4
    encoder = load_encoder(case.spec)
    assert (encoder.kind, encoder.patch_size, encoder.long_side, encoder.made_for) == (
        "biomedclip",
        16,
        64,
        {},
    )
    assert (encoder.mean, encoder.std) == field.CLIP
    file = load_encoder(f"{case.spec}/open_clip_model.safetensors")
    assert file.fingerprint == encoder.fingerprint
    torch.save(
        {k: torch.from_numpy(a) for k, a in load_file(tmp_path / "open_clip_model.safetensors").items()},
        tmp_path / "open_clip_pytorch_model.bin",
    )
    (tmp_path / "open_clip_model.safetensors").unlink()
    assert load_encoder(case.spec).fingerprint == encoder.fingerprint
    (tmp_path / "open_clip_config.json").unlink()
    assert load_encoder(case.spec).fingerprint == encoder.fingerprint  # CLIP's statistics are the default
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"mean": [0.5, 0.5]}}))
    with pytest.raises(UserError, match=r"open_clip_config\.json does not give the mean and std of three"):
        load_encoder(case.spec)


@pytest.fixture
def tiny_cnn(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_pytorch", reason="Mammo-CLIP's module is the oracle of this test")
    monkeypatch.setitem(mammoclip.VARIANTS, 640, TINY_CNN)
    width, depth, side = TINY_CNN
    shape = dict(width_coefficient=width, depth_coefficient=depth, image_size=side)
    return field.mammoclip(tmp_path, "efficientnet-b0", **shape)


def test_mammoclip(tiny_cnn, tmp_path):
    # its own side, where the fixed padding is "same"; others, where it is not; the canvas; and a constant
    sizes = [(90, 90), (95, 57), (96, 64), (128, 96), (32, 32)]
    canvas = np.random.default_rng(0).integers(0, 256, (5, 128, 96), np.uint8)  # what lies beyond is not seen
    canvas[4] = 7
    encoder = load_encoder(tiny_cnn.spec)
    ours = {k: np.asarray(a) for k, a in encoder(canvas, sizes).items()}
    assert ours["patches"].shape == (5, 4 * 3, 640) and np.isfinite(ours["cls"]).all()
    for i, (height, width) in enumerate(sizes[:4]):
        theirs = tiny_cnn.cells(canvas[i : i + 1, :height, :width])[0]
        rows, cols = theirs.shape[:2]
        np.testing.assert_allclose(ours["cls"][i], theirs.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(ours["patches"][i].reshape(4, 3, -1)[:rows, :cols], theirs, atol=1e-6)
    about = (encoder.kind, encoder.vit, encoder.patch_size, encoder.dim, encoder.long_side)
    assert about == ("mammoclip", None, 32, 640, 1520)
    assert encoder.made_for == {"preset": "mammoclip"} | PRESETS["mammoclip"]
    tower = torch.load(tmp_path / "mammoclip.tar", weights_only=True)["model"]
    bare = {k.removeprefix("image_encoder."): a.numpy() for k, a in tower.items() if "image_encoder" in k}
    for name, arrays in (("bare", bare), ("prefixed", {f"image_encoder.{k}": a for k, a in bare.items()})):
        save_file(arrays, tmp_path / f"{name}.safetensors")
        again = load_encoder(f"mammoclip:{tmp_path / name}.safetensors")
        assert (again.name, again.fingerprint) == (name, encoder.fingerprint)
    with pytest.raises(UserError, match="not a ViT"):
        load_pretrained(tiny_cnn.spec, "", TINY, HeadConfig())


@pytest.mark.parametrize("name, features", [("efficientnet-b5", 2048), ("efficientnet-b2", 1408)])
def test_mammoclip_has_the_layers_of_its_module(name, features):
    package = pytest.importorskip(
        "efficientnet_pytorch", reason="Mammo-CLIP's module is the oracle of this test"
    )
    with torch.device("meta"):
        model = package.EfficientNet.from_name(name)
    theirs = {k: tuple(a.shape) for k, a in model.state_dict().items()}
    theirs = {k: s for k, s in theirs.items() if not k.startswith("_fc") and "num_batches" not in k}
    assert mammoclip.shapes(features) == theirs


def test_presets_name_fields_of_a_build():
    names = {f.name for f in dataclasses.fields(Settings)}
    for preset in ("mammoclip", "dbt-dino", "rad-dino"):
        made = made_for(preset)
        assert made.keys() <= names and made["size"] == PRESETS[preset]["size"]
    assert made_for("") == {}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["hub", "dbt-dino", "mammoclip", "timm", "hf", "biomedclip"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, kind, form):
    ran, path = tmp_path / "ran", tmp_path / "w.pth"
    content = {"model": {"cls_token": torch.zeros(1, 1, 64)}, "config": Malicious(ran)}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["config"], protocol=2))
    with pytest.raises(
        UserError, match=r"w\.pth holds more than tensors: \w+\.system.*not loaded.*save_file"
    ):
        load_encoder(f"{kind}:{path}")
    assert not ran.exists()
    pickle.loads(pickle.dumps(content["config"]))
    assert ran.exists()  # where it is allowed to run, it would have


def test_objects_in_a_checkpoint_are_refused_by_name(tmp_path):
    torch.save({"model": {}, "config": TINY}, tmp_path / "w.tar")  # as a run's config object would be
    with pytest.raises(
        UserError, match=r"w\.tar holds more than tensors: mammodino_jax\.model\.vit\.ViTConfig"
    ):
        load_encoder(f"mammoclip:{tmp_path / 'w.tar'}")


def test_a_pytorch_that_runs_code_is_not_used(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match=r"PyTorch 2\.5\.1\+cpu runs code.*torch>=2\.6"):
        load_encoder(f"hub:{tmp_path / 'w.pth'}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_named(tmp_path, suffix, share):
    path = tmp_path / f"w{suffix}"
    arrays = {"cls_token": np.zeros((1, 1, 4096), np.float32)}
    if suffix == ".pth":
        torch.save({k: torch.from_numpy(a) for k, a in arrays.items()}, path)
    else:
        save_file(arrays, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=rf"w\{suffix} is no.*cut off"):
        load_encoder(f"hub:{path}")


def test_a_truncated_export_is_named(tmp_path):
    encoder = load_encoder(field.hub(tmp_path, TINY).spec)
    folder.export(encoder, "hub", tmp_path / "out", "test")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is no readable safetensors"):
        load_encoder(str(tmp_path / "out"))
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is not a file"):
        load_encoder(str(tmp_path / "out"))


@pytest.mark.parametrize("text", ["", "[]", '{"image_mean": "no"}', '{"image_mean": [1, 2]}'])
def test_a_bad_preprocessor_config_is_named(tmp_path, text):
    field.hugging_face(tmp_path, TINY)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=r"preprocessor_config\.json does not give the mean and std"):
        load_encoder(f"hf:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert load_encoder(f"hf:{tmp_path}").mean == IMAGENET_MEAN
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_encoder(f"hf:{tmp_path}").std == IMAGENET_STD


@pytest.mark.parametrize(
    "kind, change, message",
    [
        (
            "hub",
            {"blocks.1.attn.qkv.bias": None},
            r"blocks\.1\.attn\.qkv\.bias is missing, expected \(384,\)",
        ),
        ("hub", {"blocks.1.mlp.w12.bias": (3,)}, r"blocks\.1\.mlp\.w12\.bias is \(3,\), expected no tensor"),
        ("timm", {"fc_norm.weight": (128,)}, r"fc_norm\.weight is \(128,\), expected no tensor of this name"),
        ("biomedclip", {}, r"no visual\.trunk\.\*"),
        ("hf", {}, "DINOv2's own names"),
    ],
)
def test_other_architectures_are_named(tmp_path, kind, change, message):
    weights = {k: a.numpy() for k, a in field.hub_weights(TINY).items()}
    for name, shape in change.items():
        weights.pop(name, None)
        if shape:
            weights[name] = np.zeros(shape, np.float32)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_encoder(f"{kind}:{tmp_path / 'w.safetensors'}")
    assert "w.safetensors" in str(error.value)


def test_a_gap_in_the_convolutions_is_named(tiny_cnn, tmp_path):
    named = torch.load(tmp_path / "mammoclip.tar", weights_only=True)["model"]
    del named["image_encoder._blocks.2._bn1.running_var"]
    torch.save({"model": named}, tmp_path / "gap.tar")
    with pytest.raises(UserError, match=r"gap\.tar: _blocks\.2\._bn1\.running_var is missing, expected"):
        load_encoder(f"mammoclip:{tmp_path / 'gap.tar'}")


@pytest.mark.parametrize("kind", ["hub", "timm", "hf", "dbt-dino", "biomedclip", "mammoclip"])
def test_missing_files_are_named(tmp_path, kind):
    with pytest.raises(UserError, match=r"gone\.pth is not a file"):
        load_encoder(f"{kind}:{tmp_path / 'gone.pth'}")
    if kind in ("hf", "biomedclip"):
        with pytest.raises(UserError, match=r"model\.safetensors is not a file"):
            load_encoder(f"{kind}:{tmp_path}")
