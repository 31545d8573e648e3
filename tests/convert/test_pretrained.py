"""Weights of others and our own start pretraining and serve as frozen encoders, or say why they do not."""

import dataclasses
import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import nano
from mammodino_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from mammodino_jax.checkpoint import Checkpoints
from mammodino_jax.convert import folder
from mammodino_jax.convert.hf import from_hf, to_hf
from mammodino_jax.convert.hub import from_hub, hub_shapes, to_hub
from mammodino_jax.convert.pretrained import load_pretrained, merge
from mammodino_jax.encoder import Encoder, load_encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import HeadConfig, init_params
from mammodino_jax.model.vit import ViTConfig

VIT = ViTConfig(dim=128, depth=2, heads=2, image_size=98)
REG = dataclasses.replace(VIT, registers=4)
LEGACY = dict(pos_antialias=False, pos_offset=0.1)
HEAD = HeadConfig(prototypes=32, bottleneck=16, hidden=24)
SEPARATE = dataclasses.replace(HEAD, separate_ibot=True)


@functools.cache
def weights(vit: ViTConfig, head: HeadConfig | None = None) -> dict:
    """Hub names with every value random, so that no swapped or dropped tensor goes unseen."""
    rng = np.random.default_rng(0)
    return {k: rng.normal(0.02, 0.1, s).astype(np.float32) for k, s in hub_shapes(vit, head).items()}


def abstract(vit: ViTConfig, head: HeadConfig) -> dict:
    """What `init_params` makes, without the seconds that it takes."""
    return jax.eval_shape(lambda: init_params(vit, head, 0))


def to_timm(hub: dict) -> dict:
    out = {k: a for k, a in hub.items() if k != "mask_token"}
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def chunked(network: dict) -> dict:
    """Names of Meta's training checkpoints: module.backbone.blocks.CHUNK.INDEX."""
    return {"module." + k.replace("backbone.blocks.", "backbone.blocks.1."): a for k, a in network.items()}


def save(path, arrays: dict) -> str:
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, path)
    return str(path)


def save_torch(path, arrays: dict, wrap=None, dtype=None) -> str:
    torch = pytest.importorskip("torch", reason="writes a PyTorch file")
    named = {k: torch.from_numpy(a.copy()).to(dtype or torch.float32) for k, a in arrays.items()}
    torch.save({wrap: named, "iteration": 3} if wrap else named, path)
    return str(path)


def images(size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, size, size), dtype=np.uint8)


def same(ours: dict, hub: dict) -> None:
    ours = to_hub(ours)
    assert ours.keys() == hub.keys()
    for name, a in hub.items():
        np.testing.assert_array_equal(ours[name], a, err_msg=name)


def close(a: dict, b: dict, atol=1e-4) -> None:
    for name in ("cls", "patches"):
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("vit", [VIT, REG], ids=["plain", "registers"])
@pytest.mark.parametrize("kind", ["hub", "timm", "hf", "dbt-dino"])
def test_every_kind_of_names_gives_the_same_backbone(tmp_path, kind, vit):
    hub = weights(vit)
    named = {"timm": to_timm, "hf": to_hf}.get(kind, dict)(hub)
    spec = f"{kind}:{save(tmp_path / 'model.safetensors', named)}"
    statistics = ((0.0,) * 3, (1.0,) * 3) if kind == "dbt-dino" else (IMAGENET_MEAN, IMAGENET_STD)
    params = load_pretrained(spec, "", vit, HEAD, *statistics)
    assert params.keys() == {"backbone"}
    expected = dict(hub)
    if kind == "timm":
        expected["mask_token"] = np.zeros((1, vit.dim), np.float32)
        if vit.registers:  # only the sum of the class token and its position is known
            expected["cls_token"] = hub["cls_token"] + hub["pos_embed"][:, :1]
            expected["pos_embed"] = hub["pos_embed"].copy()
            expected["pos_embed"][:, 0] = 0
    same(params["backbone"], expected)
    encoder = load_encoder(spec)
    how = {"hub": (False, 0.1), "dbt-dino": (False, 0.1), "hf": (False, 0.0), "timm": (True, 0.0)}
    antialias, offset = (True, 0.0) if vit.registers else how[kind]
    assert encoder.vit == dataclasses.replace(vit, pos_antialias=antialias, pos_offset=offset)
    assert (encoder.name, encoder.kind, encoder.mean, encoder.std) == ("model", kind, *statistics)
    own = Encoder("own", encoder.vit, from_hub(hub), *statistics)
    close(encoder(images(98)), own(images(98)), 1e-5)


def test_names_of_hugging_face_convert_back():
    hub = weights(REG)
    back = from_hf(to_hf(hub))
    assert back.keys() == hub.keys() and all((back[k] == a).all() for k, a in hub.items())
    assert from_hf({"classifier.weight": hub["norm.weight"]}).keys() == {"classifier.weight"}


def nchw(grey: np.ndarray, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    import torch

    channels = [(grey / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    return torch.from_numpy(np.stack(channels, 1).astype(np.float32))


def test_statistics_beside_hugging_face_weights_are_taken(tmp_path):
    save(tmp_path / "model.safetensors", to_hf(weights(VIT)))
    about = {"image_mean": [0.53, 0.53, 0.53], "image_std": [0.26, 0.26, 0.26]}  # as RAD-DINO has its own
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    encoder = load_encoder(f"hf:{tmp_path}")
    assert (encoder.mean, encoder.std) == ((0.53,) * 3, (0.26,) * 3)
    for channels in (1, 3):  # the recipe normalises with ImageNet's: the patch embedding makes up for it
        vit = dataclasses.replace(encoder.vit, channels=channels)
        params = load_pretrained(f"hf:{tmp_path}", "", vit, HEAD)["backbone"]
        started = Encoder("started", vit, params, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels])
        close(started(images(98)), encoder(images(98)), 1e-4)


@pytest.mark.parametrize("separate", [False, True])
def test_training_checkpoints_of_meta_bring_their_heads(tmp_path, separate):
    network = weights(VIT, SEPARATE if separate else HEAD)
    path = save_torch(tmp_path / "t.pth", chunked(network), wrap="teacher")
    unscaled = (0.0,) * 3, (1.0,) * 3  # as DBT-DINO takes its input: the patch embedding stays as it is
    params = load_pretrained(f"dbt-dino:{path}", "", VIT, SEPARATE if separate else HEAD, *unscaled)
    same(params, network)
    fresh = abstract(VIT, SEPARATE if separate else HEAD)
    merged = merge(fresh, params)
    assert jax.tree.structure(merged) == jax.tree.structure(fresh)
    same(merged, network)
    assert load_encoder(f"dbt-dino:{path}").vit == dataclasses.replace(VIT, **LEGACY)
    assert load_pretrained(f"hub:{path}", "", VIT, HEAD).keys() == {"backbone"}  # the way to leave heads out


def test_one_head_of_two_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    shared, two = weights(VIT, HEAD), weights(VIT, SEPARATE)
    params = load_pretrained(f"dbt-dino:{save(tmp_path / 'a.safetensors', shared)}", "", VIT, SEPARATE)
    assert params.keys() == {"backbone", "dino_head"} and "no ibot_head there, it starts fresh" in caplog.text
    params = load_pretrained(f"dbt-dino:{save(tmp_path / 'b.safetensors', two)}", "", VIT, HEAD)
    assert params.keys() == {"backbone", "dino_head"} and "ibot_head is not used" in caplog.text


@pytest.mark.parametrize("prefix", ["", "dino_head.", "module.dino_head."])
def test_a_head_has_a_file_of_its_own(tmp_path, prefix):
    backbone = save(tmp_path / "b.safetensors", weights(VIT))
    network = weights(VIT, HEAD)
    bare = {k.removeprefix("dino_head."): a for k, a in network.items() if k.startswith("dino_head.")}
    file = save(tmp_path / "dino_head.safetensors", {prefix + k: a for k, a in bare.items()})
    params = load_pretrained(f"hub:{backbone}", file, VIT, HEAD)
    same(params["dino_head"], bare)
    lightly = dict(bare)
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        lightly[f"last_layer.parametrizations.weight.{new}"] = lightly.pop(f"last_layer.{old}")
    file = save(tmp_path / "lightly.safetensors", {prefix + k: a for k, a in lightly.items()})
    same(load_pretrained(f"hub:{backbone}", file, VIT, HEAD)["dino_head"], bare)


def test_heads_that_do_not_fit_name_the_fields(tmp_path):
    spec = "hub:" + save(tmp_path / "b.safetensors", weights(VIT))
    other = HeadConfig(prototypes=48, bottleneck=8, hidden=40)
    head = {k: a for k, a in weights(VIT, other).items() if k.startswith("dino_head.")}
    file = save(tmp_path / "head.safetensors", head)
    fields = "prototypes=48 --config.head.bottleneck=8 --config.head.hidden=40"
    with pytest.raises(UserError, match=fields):
        load_pretrained(spec, file, VIT, HEAD)
    assert load_pretrained(spec, file, VIT, other).keys() == {"backbone", "dino_head"}
    wide = ViTConfig(dim=192, depth=1, heads=3, image_size=28)
    head = {k: a for k, a in weights(wide, HEAD).items() if k.startswith("dino_head.")}
    with pytest.raises(
        UserError, match=r"mlp\.0\.weight is \(24, 192\), expected \(24, 128\); take other heads"
    ):
        load_pretrained(spec, save(tmp_path / "wide.safetensors", head), VIT, HEAD)
    with pytest.raises(UserError, match="has no DINO head"):
        load_pretrained(spec, spec.removeprefix("hub:"), VIT, HEAD)


def write_workdir(path, head: HeadConfig, channels: int = 3):
    """A finished run without training: config.json and one checkpoint."""
    config = nano.get_config(str(path / "data"))
    config.model.update(dim=128, depth=2, heads=2, image_size=98, channels=channels)
    config.head.update(dataclasses.asdict(head))
    vit = ViTConfig(**config.model)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config.to_json())
    network = weights(dataclasses.replace(VIT, channels=channels), head)
    checkpoints = Checkpoints(path / "checkpoints")
    state = jax.tree.map(jax.numpy.asarray, {"step": np.int32(7), "teacher": from_hub(network)})
    checkpoints.save(7, state, {"sources": [["x"]]})
    checkpoints.close()
    return vit, network


def test_an_own_run_starts_another(tmp_path):
    vit, network = write_workdir(tmp_path / "run", SEPARATE)
    same(load_pretrained(str(tmp_path / "run"), "", vit, SEPARATE), network)
    folder.export(load_encoder(str(tmp_path / "run")), "hf", tmp_path / "hf", "test")
    params = load_pretrained(str(tmp_path / "hf"), "", vit, SEPARATE)
    assert params.keys() == {"backbone"}
    same({"backbone": params["backbone"]}, {k: a for k, a in network.items() if k.startswith("backbone.")})
    with pytest.raises(UserError, match=r"--config\.head\.prototypes=32"):
        load_pretrained(str(tmp_path / "run"), "", vit, dataclasses.replace(HEAD, prototypes=64))


def test_a_checkpoint_of_a_run_can_be_named(tmp_path):
    run, builds = tmp_path / "run", [{"box": "tissue", "clahe": 2.0}, {"box": "full", "clahe": 2.0}]
    vit, network = write_workdir(run, HEAD)
    checkpoints = Checkpoints(run / "checkpoints")
    newer = jax.tree.map(lambda a: jax.numpy.asarray(a + 1), from_hub(network))
    checkpoints.save(8, {"step": jax.numpy.int32(8), "teacher": newer}, {"sources": [], "builds": builds})
    checkpoints.close()
    old, new = str(run / "checkpoints/7"), load_encoder(str(run))
    same(load_pretrained(old, "", vit, HEAD), network)
    assert (load_encoder(old).name, load_encoder(old).kind) == ("run-7", "workdir")
    assert new.fingerprint == load_encoder(str(run / "checkpoints/8")).fingerprint
    assert new.fingerprint != load_encoder(old).fingerprint
    assert new.made_for == {"clahe": 2.0}  # what the builds share
    with pytest.raises(UserError, match="checkpoints/9' is neither a folder"):
        load_encoder(str(run / "checkpoints/9"))


def test_the_long_side_follows_the_training_crops(tmp_path):
    write_workdir(tmp_path / "run", HEAD)
    edit_config(tmp_path / "run", "crops", global_size=56)
    assert (load_encoder(str(tmp_path / "run")).long_side, load_encoder(str(tmp_path / "run")).vit.image_size) == (112, 98)  # fmt: skip


def edit_config(run, section: str, **values) -> None:
    config = json.loads((run / "config.json").read_text())
    config[section].update(values)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda run: edit_config(run, "model", depth=1), r"checkpoints/7: mismatched architecture: .*blocks\.1\..* is \(128,\) there, but no array .*config\.json"),
        (lambda run: edit_config(run, "model", depth=3), r"mismatched architecture: .*blocks\.2\..* is missing there, but \(128,\)"),
        (lambda run: edit_config(run, "model", dim=64, heads=1), r"is \(128,\) there, but \(64,\)"),
        (lambda run: (run / "config.json").unlink(), r"config\.json is not the configuration of a run"),
        (lambda run: (run / "config.json").write_text('{"seed":'), r"config\.json is not the configuration"),
        (lambda run: (run / "config.json").write_text("[]"), "config lacks seed"),
        (lambda run: (run / "checkpoints/7/state/_METADATA").write_text("{"), "checkpoints/7 does not read as"),
        (lambda run: [f.write_bytes(f.read_bytes()[:99]) for f in (run / "checkpoints/7/state/d").iterdir()], "checkpoints/7 does not read as a checkpoint"),
        (lambda run: shutil.rmtree(run / "checkpoints/7/provenance"), "checkpoints/7 does not read as a checkpoint"),
    ],
)  # fmt: skip
def test_a_workdir_that_is_damaged_is_named(tmp_path, damage, message):
    write_workdir(tmp_path / "run", HEAD)
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path / "run"))


def test_heads_of_another_shape_than_the_config_are_named(tmp_path):
    vit, _ = write_workdir(tmp_path / "run", HEAD)
    edit_config(tmp_path / "run", "head", prototypes=64)
    with pytest.raises(
        UserError, match=r"mismatched architecture: teacher\.dino_head\.last_layer.* is \(32, 1\) there"
    ):
        load_pretrained(str(tmp_path / "run"), "", vit, HEAD)


def test_a_missing_mask_token_is_zeros_and_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    hub = {k: a for k, a in weights(VIT).items() if k != "mask_token"}
    params = load_pretrained("hub:" + save(tmp_path / "w.safetensors", hub), "", VIT, HEAD)
    assert not params["backbone"]["mask_token"].any() and "no mask_token" in caplog.text


@pytest.mark.parametrize("how", [dict(), LEGACY], ids=["antialias", "legacy"])
def test_positions_are_resampled_once_as_the_recipe_would_each_time(tmp_path, caplog, how):
    caplog.set_level("INFO", logger="absl")
    spec = "hub:" + save(tmp_path / "w.safetensors", weights(VIT))
    small = dataclasses.replace(VIT, image_size=42, **how)
    params = load_pretrained(spec, "", small, HEAD)["backbone"]
    assert params["pos_embed"].shape == (1, 10, 128) and "from 7 to 3 patches a side" in caplog.text
    whole = Encoder("whole", dataclasses.replace(VIT, **how), from_hub(weights(VIT)))
    close(Encoder("small", small, params)(images(42)), whole(images(42)), 1e-5)


def test_registers(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    none, four = (save(tmp_path / f"{v.registers}.safetensors", weights(v)) for v in (VIT, REG))
    params = load_pretrained(f"hub:{none}", "", REG, HEAD)
    assert "register_tokens" not in params["backbone"] and "recipe's 4 start fresh" in caplog.text
    fresh = abstract(REG, HEAD)
    merged = merge(fresh, params)
    assert jax.tree.structure(merged) == jax.tree.structure(fresh)
    assert merged["backbone"]["register_tokens"] is fresh["backbone"]["register_tokens"]
    eight = dataclasses.replace(VIT, registers=8)
    assert "register_tokens" not in load_pretrained(f"hub:{four}", "", eight, HEAD)["backbone"]
    with pytest.raises(UserError, match=r"register_tokens is \(1, 4, 128\).*--config\.model\.registers=4"):
        load_pretrained(f"hub:{four}", "", VIT, HEAD)


@pytest.mark.parametrize("origin", ["hub", "workdir"])
def test_three_channels_fold_into_one_exactly(tmp_path, origin):
    if origin == "hub":
        spec = "hub:" + save(tmp_path / "w.safetensors", weights(VIT))
    else:
        write_workdir(tmp_path / "run", HEAD)
        spec = str(tmp_path / "run")
    three = load_encoder(spec)
    one = dataclasses.replace(three.vit, channels=1)
    params = load_pretrained(spec, "", one, HEAD)["backbone"]
    assert params["patch_embed"]["proj"]["kernel"].shape == (14, 14, 1, 128)
    close(Encoder("one", one, params, IMAGENET_MEAN[:1], IMAGENET_STD[:1])(images(98)), three(images(98)))


def test_one_channel_stays_one(tmp_path):
    one = dataclasses.replace(VIT, channels=1)
    spec = "hub:" + save(tmp_path / "w.safetensors", weights(one))
    same(load_pretrained(spec, "", one, HEAD)["backbone"], weights(one))
    assert load_encoder(spec).mean == IMAGENET_MEAN[:1]
    with pytest.raises(UserError, match=r"is \(128, 1, 14, 14\), expected \(128, 3, 14, 14\).*channels=1"):
        load_pretrained(spec, "", VIT, HEAD)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="writes a PyTorch file")
    path = save_torch(tmp_path / "w.pt", weights(VIT), dtype=getattr(torch, dtype))
    from safetensors.torch import save_file as save_torch_file

    save_torch_file(torch.load(path), tmp_path / "w.safetensors")
    a, b = (load_pretrained(f"hub:{f}", "", VIT, HEAD) for f in (path, tmp_path / "w.safetensors"))
    same(a, to_hub(b))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(a))
    np.testing.assert_allclose(to_hub(a["backbone"])["pos_embed"], weights(VIT)["pos_embed"], rtol=1e-2)


@pytest.mark.parametrize(
    "change, fields",
    [
        (dict(dim=192, heads=3), "--config.model.dim=128 --config.model.heads=2"),
        (dict(depth=3), "blocks.2.*missing.*--config.model.depth=2"),
        (dict(depth=1), "blocks.1.*no tensor of this name; set --config.model.depth=2"),
        (dict(mlp_ratio=2.0), r"\(512,\), expected \(256,\); set --config.model.mlp_ratio=4"),
        (dict(patch_size=7, image_size=49), r"\(128, 3, 14, 14\), expected \(128, 3, 7, 7\).*patch_size=14"),
        (dict(heads=4), "has 2 heads, not 4; set --config.model.heads=2"),
    ],
)
def test_another_shape_names_the_fields_to_set(tmp_path, change, fields):
    spec = "hub:" + save(tmp_path / "w.safetensors", weights(VIT))
    with pytest.raises(UserError, match=fields) as error:
        load_pretrained(spec, "", dataclasses.replace(VIT, **change), HEAD)
    assert "w.safetensors" in str(error.value)


def without(name):
    return {k: a for k, a in weights(VIT).items() if k != name}


@pytest.mark.parametrize(
    "kind, make, message",
    [
        ("hub", lambda: without("norm.bias"), r"norm\.bias is missing, expected \(128,\)"),
        ("hub", lambda: {**weights(VIT), "fc.weight": np.ones(3, np.float32)}, "fc.weight.*no tensor of this"),
        ("hub", lambda: to_hf(weights(VIT)), "cls_token is missing.*hub names.*first names there: .*embeddings"),
        ("hf", lambda: weights(VIT), "own names, not Hugging Face's: give hub:"),
        ("hf", lambda: to_hf(weights(VIT)) | {"x": np.ones(1, np.float32)}, "x is .*no tensor of this name"),
        ("hub", lambda: {**weights(VIT), "blocks.1.mlp.fc2.weight": np.ones((128, 9), np.float32)}, r"fc2.*\(128, 9\), expected \(128, 512\)"),
        ("biomedclip", lambda: weights(VIT), r"no visual\.trunk\.\*.*expected BiomedCLIP"),
        ("mammoclip", lambda: weights(VIT), r"_conv_head\.weight has no features, expected 2048 or 1408: Mammo-CLIP"),
        ("dbt-dino", lambda: to_hf(weights(VIT)), "of dbt-dino names"),
        ("hub", lambda: {**weights(VIT), "norm.bias": np.full(128, np.nan, np.float32)}, "norm.bias holds NaN"),
        ("hub", lambda: {**weights(VIT), "pos_embed": np.ones((1, 49, 128), np.float32)}, r"1 \+ side\^2"),
        ("hub", lambda: {**weights(VIT), "cls_token": np.ones(128, np.float32)}, "expected 3 dimensions"),
        ("hub", lambda: {**weights(VIT), "cls_token": np.ones((1, 1, 100), np.float32)}, "heads of 64"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, kind, make, message):
    spec = f"{kind}:{save(tmp_path / 'w.safetensors', make())}"
    with pytest.raises(UserError, match=message) as error:
        load_encoder(spec)
    assert "w.safetensors" in str(error.value)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"cut\.safetensors is no readable safetensors"):
        load_encoder(f"hub:{tmp_path / 'cut.safetensors'}")
    with pytest.raises(UserError, match="none is not a file"):
        load_encoder(f"hub:{tmp_path / 'none'}")
    with pytest.raises(UserError, match=r"model\.safetensors is not a file"):
        load_encoder(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=r"neither a folder nor random:ARCH, hub:FILE.*mammoclip:FILE"):
        load_encoder(str(tmp_path / "cut.safetensors"))
    save(tmp_path / "model.safetensors", to_hf(weights(VIT)))
    with pytest.raises(UserError, match="give a Hugging Face folder as hf:"):
        load_encoder(str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"nothing")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"w\.pth needs PyTorch.*pip install torch"):
        load_encoder(f"hub:{tmp_path / 'w.pth'}")


def test_unreadable_torch_files_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="writes PyTorch files")
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not readable as PyTorch weights"):
        load_encoder(f"hub:{tmp_path / 'w.pth'}")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        load_encoder(f"hub:{tmp_path / 'list.pth'}")


def test_merge_refuses_what_has_no_place():
    fresh = abstract(VIT, HEAD)
    with pytest.raises(ValueError, match="does not fit"):
        merge(fresh, {"backbone": {"mask_token": np.zeros((2, 128), np.float32)}})
    with pytest.raises(ValueError, match="does not fit"):
        merge(fresh, {"backbone": {"mask": np.zeros((2, 128), np.float32)}})


@pytest.fixture(scope="module")
def vits14(shared) -> str:
    path = shared / "weights" / "dinov2_vits14_hub_fp16.safetensors"
    if not path.is_file():
        pytest.skip("no DINOv2 weights here")
    return str(path)


def mammogram(shared, size: int) -> np.ndarray:
    import cv2

    path = sorted((shared / "data" / "minimias" / "images").iterdir())[0]
    return cv2.resize(cv2.imread(str(path), 0), (size, size), interpolation=cv2.INTER_AREA)[None]


def test_dinov2_reads_a_mammogram(vits14, shared):
    encoder = load_encoder(f"hub:{vits14}")
    shape = dict(dim=384, depth=12, heads=6, image_size=518, registers=0)
    assert {k: getattr(encoder.vit, k) for k in shape} == shape
    assert encoder.name == "dinov2_vits14_hub_fp16"
    patches = np.asarray(encoder(mammogram(shared, 98))["patches"])
    assert patches.shape == (1, 49, 384) and np.isfinite(patches).all() and patches.std(axis=1).mean() > 0.1


@pytest.mark.slow
def test_dinov2_at_its_own_size_is_that_of_transformers(vits14, shared, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    encoder, image = load_encoder(f"hub:{vits14}"), mammogram(shared, 518)
    folder.export(encoder, "hf", tmp_path / "hf", "test")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        theirs = model(pixel_values=nchw(image)).last_hidden_state.numpy()
    ours = encoder(image)
    close(ours, {"cls": theirs[:, 0], "patches": theirs[:, 1:]}, 1e-3)
    assert np.asarray(ours["patches"]).std(axis=1).mean() > 0.1


def test_dinov2_starts_a_recipe_of_other_shape(vits14):
    vit = ViTConfig(dim=384, depth=12, heads=6, image_size=98, channels=1, registers=4, **LEGACY)
    params = load_pretrained(f"hub:{vits14}", "", vit, HEAD)
    fresh = abstract(vit, HEAD)
    assert jax.tree.structure(merge(fresh, params)) == jax.tree.structure(fresh)
