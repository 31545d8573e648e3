"""Exported encoders: a folder of weights, their description, and what others must know to use them."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mammodino_jax import checkpoint
from mammodino_jax.convert import timm
from mammodino_jax.convert.foreign import check, tensors
from mammodino_jax.convert.hf import config_json, from_hf, has_registers, to_hf
from mammodino_jax.convert.hub import from_hub, hub_shapes, to_hub
from mammodino_jax.encoder import SCALE, Encoder
from mammodino_jax.errors import UserError
from mammodino_jax.model.head import init_params
from mammodino_jax.model.vit import ViTConfig

FORMATS = ("hub", "timm", "hf", "onnx", "safetensors", "orbax")

_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = {"hub": "hub.py", "hf": "hf.py", "onnx": "hf.py"}
_USAGE = {  # others: one of their name
    "hub": ("hub", "example"),
    "hf": ("hf", "example"),
    "onnx": ("hf", "example", "onnx"),
    "safetensors": ("ours",),
    "orbax": ("ours",),
}
_WEIGHTS = ("model.safetensors", "teacher_checkpoint.pth")  # files of the backbone, as written below
_PAPERS = "mammodino_jax"  # key of terms and no_release in a safetensors file's metadata
_LIBRARIES = {"hub": "pytorch", "timm": "timm", "hf": "transformers", "onnx": "transformers"}


def export(
    encoder: Encoder,
    form: str,
    output: Path,
    version: str,
    *,
    heads: dict[str, dict[str, np.ndarray]] | None = None,
    size: tuple[int, int] | None = None,
    private: bool = False,
) -> None:
    """Write an encoder as a folder: weights, mammodino.json, README.md, preprocessor_config.json, example.py.

    Args:
      encoder: what to write.
      form: one of FORMATS. "hub": facebookresearch/dinov2's state dict; "timm": a folder for
        `timm.create_model`; "hf": one for transformers' AutoModel; "onnx": that, and model.onnx;
        "safetensors": our parameters by dotted names; "orbax": our parameters.
      output: a folder that does not exist or is empty; nothing is left there where writing fails.
      version: of mammodino_jax.
      heads: hub names of the projection heads (pretrained.read_heads), written beside "hub".
      size: height and width in pixels of model.onnx; the training size by default.
      private: write weights whose sources forbid a release, too; the card says so.

    Raises:
      UserError: the folder is not empty, the sources forbid a release, or this encoder has no such format.
    """
    if encoder.vit is None:
        raise UserError(f"{encoder.name} is no vision transformer of DINOv2's kind: it is not converted")
    forbidding = encoder.provenance.get("no_release", [])
    if forbidding and not private:
        raise UserError(
            f"{encoder.name} was trained on {', '.join(forbidding)}, whose terms forbid publishing weights "
            "made from it; --private writes them for your own use"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; give another --output")
    if form == "onnx":
        size = size or (encoder.vit.image_size, encoder.vit.image_size)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(encoder, form, partial, size)
        if heads:
            _write_heads(encoder, heads, partial)
        _describe(encoder, form, partial, output.name, version, bool(heads), size)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(encoder: Encoder, form: str, folder: Path, size: tuple[int, int] | None) -> None:
    """The weights, and the config.json of the library that reads them."""
    vit, config = encoder.vit, None
    if form == "orbax":
        checkpoint.save_params(folder / "params", encoder.params)
        return
    if form == "safetensors":
        leaves = jax.tree_util.tree_leaves_with_path(encoder.params)
        weights = {_dotted(path): np.ascontiguousarray(a) for path, a in leaves}
    else:
        weights = to_hub(encoder.params)
    if form == "timm":
        weights = timm.to_timm(weights)
        config = timm.config_json(vit, weights, encoder.mean, encoder.std)
    elif form in ("hf", "onnx"):
        if has_registers(vit):  # also where their number is 0
            weights.setdefault("register_tokens", np.zeros((1, 0, vit.dim), np.float32))
        weights, config = to_hf(weights), config_json(vit)
    save_file(weights, folder / "model.safetensors", metadata=_metadata(encoder))
    if config:
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    if form == "onnx":
        from mammodino_jax.convert.onnx import write_onnx

        worst = write_onnx(folder, *size)
        print(f"model.onnx at {size[0]} x {size[1]} px: features equal PyTorch's to {worst:.1e}")


def _write_heads(encoder: Encoder, heads: dict, folder: Path) -> None:
    """Heads for our own continuation, and everything as Meta's training writes and reads it."""
    named = {f"{head}.{name}": a for head, weights in heads.items() for name, a in weights.items()}
    save_file(named, folder / "heads.safetensors", metadata=_metadata(encoder))
    try:
        import torch
    except ImportError:
        logging.warning("no teacher_checkpoint.pth is written: PyTorch is not installed")
        return
    backbone = {name: torch.tensor(a) for name, a in to_hub(encoder.params).items()}
    teacher = {f"backbone.{name}": a for name, a in backbone.items()}
    teacher |= {name: torch.tensor(a) for name, a in named.items()}
    torch.save({"teacher": teacher, "model": backbone}, folder / "teacher_checkpoint.pth")


def _metadata(encoder: Encoder) -> dict[str, str]:
    """Of a safetensors file: what must not be lost where the file is copied without its folder."""
    papers = {k: encoder.provenance[k] for k in ("terms", "no_release") if encoder.provenance.get(k)}
    return {"format": "pt", _PAPERS: json.dumps(papers)}


def _describe(encoder: Encoder, form: str, folder: Path, name: str, version: str, heads: bool, size) -> None:
    """What comes beside the weights; `name` is the folder's in the end."""
    vit, seen = encoder.vit, dict(encoder.provenance)
    if "sources" in seen:  # data sets have names, the paths to them are nobody's business
        seen["sources"] = [[Path(source[0]).name, *source[1:]] for source in seen["sources"]]
    about = {
        "name": encoder.name,
        "format": form,
        "version": version,
        "vit": dataclasses.asdict(vit),
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "side": encoder.side,
        "made_for": encoder.made_for,
        "provenance": seen,
    } | ({"onnx_size": list(size)} if size else {})
    (folder / "mammodino.json").write_text(json.dumps(about, indent=1))
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": vit.channels == 3,
        "do_resize": False,
        "do_center_crop": False,
        "size": {"shortest_edge": vit.image_size},
        "crop_size": {"height": vit.image_size, "width": vit.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    if form in _EXAMPLES:
        shutil.copy(_TEMPLATES / _EXAMPLES[form], folder / "example.py")
    (folder / "README.md").write_text(_card(encoder, form, name, version, seen, heads, size))


def _card(encoder: Encoder, form: str, name: str, version: str, seen: dict, heads: bool, size) -> str:
    vit, forbidding = encoder.vit, ", ".join(seen.get("no_release", []))
    facts = {
        "name": encoder.name,
        "folder": name,
        "dim": vit.dim,
        "depth": vit.depth,
        "heads": vit.heads,
        "mlp_ratio": vit.mlp_ratio,
        "ffn": {"mlp": "mlp", "swiglu": "swiglufused"}[vit.ffn],
        "patch": vit.patch_size,
        "size": vit.image_size,
        "registers": vit.registers,
        "registers_too": " and registers" if vit.registers else "",
        "antialias": vit.pos_antialias,
        "offset": vit.pos_offset,
        "onnx_size": " x ".join(map(str, size or ())),
    }
    origin, how = (
        f"Converted by mammodino_jax {version}; what it was trained on is not recorded.",
        "Converted",
    )
    crops = ""
    if seen.get("sources"):
        origin = (
            f"Pretrained with mammodino_jax {version}, an independent, unofficial implementation of "
            f"MammoDINO (arXiv 2510.11883), on: {'; '.join(' '.join(s) for s in seen['sources'])}."
        )
        how, crops = "Started", f"its training crops had {encoder.long_side // SCALE} px, "
    first, *others = seen.get("builds") or [{}]
    differ = sorted({k for b in others for k in {*b, *first} if b.get(k) != first.get(k)})
    settings = {k: v for k, v in encoder.made_for.items() if v not in (None, "")}
    warning = f"**Private: not for release.** The terms of {forbidding} forbid publishing these weights.\n\n"
    parts = [*_USAGE.get(form, (form,)), *(["heads"] if heads else [])]
    usage = "\n".join((_TEMPLATES / f"{part}.md").read_text() for part in parts)
    return (_TEMPLATES / "card.md").read_text().format(
        **facts,
        library=_LIBRARIES.get(form, "jax"),
        datasets=json.dumps(sorted(seen.get("terms", {}))),
        private="private: true\n" if forbidding else "",
        warning=warning if forbidding else "",
        origin=origin,
        terms="; ".join(f"{k}: {v}" for k, v in seen.get("terms", {}).items()) or "none recorded",
        foreign="".join(f" {how} from {name}, whose terms apply, too." for name in seen.get("foreign", [])),
        usage=usage.format(**facts, channels=vit.channels).rstrip() + _differing_positions(vit, form),
        settings=f"The build that it was made for: {', '.join(f'{k} {v}' for k, v in settings.items())}."
        if settings
        else "The build that it was made for is not recorded.",
        differ=f" It was trained on builds that differ in {', '.join(differ)}." if differ else "",
        crops=crops,
        long_side=encoder.long_side,
        channels="grey repeated to 3 channels" if vit.channels == 3 else "one channel",
        mean=", ".join(map(str, encoder.mean)),
        std=", ".join(map(str, encoder.std)),
    )  # fmt: skip


def _differing_positions(vit: ViTConfig, form: str) -> str:
    """Where the library resamples positions in another way than the encoder; "" where in the same."""
    ours = (vit.pos_antialias, vit.pos_offset)
    theirs = {"timm": (True, 0.0)}.get(form, ours)
    if form in ("hf", "onnx"):
        theirs = (has_registers(vit), 0.0)
    if ours == theirs:
        return ""
    how = "by little (DINOv2's offset of 0.1)" if ours[0] == theirs[0] else "(antialiasing)"
    return (
        f"\n\nAt other sizes than {vit.image_size} px features differ from ours {how}: this library "
        "resamples positions in its own way."
    )


def load(folder: Path) -> Encoder:
    """Read back a folder written by `export`, in any format.

    Raises:
      UserError: it was not, or its weights do not fit its description.
    """
    if not (Path(folder) / "mammodino.json").is_file():
        raise UserError(
            f"{folder} has weights but no mammodino.json: not a folder that mammodino_jax exported; "
            f"give a Hugging Face folder as hf:{folder}"
        )
    about = _read_description(folder)
    vit, form, stats = ViTConfig(**about["vit"]), about["format"], (about["mean"], about["std"])
    target = jax.eval_shape(functools.partial(init_params, vit, None, 0))
    if form == "orbax":
        params = checkpoint.load_params(Path(folder) / "params", target)
    else:
        file = Path(folder) / "model.safetensors"
        weights, expected = tensors(file), hub_shapes(vit)
        if form == "timm":
            weights = timm.from_timm(weights) | {"mask_token": np.zeros((1, vit.dim), np.float32)}
        elif form in ("hf", "onnx"):
            weights = {name: a for name, a in from_hf(weights).items() if a.size}  # 0 registers
        elif form == "safetensors":
            leaves = jax.tree_util.tree_leaves_with_path(target)
            expected = {_dotted(path): a.shape for path, a in leaves}
        check(file, weights, expected, "; mammodino.json describes other weights")
        if form == "safetensors":
            params = jax.tree_util.tree_map_with_path(lambda path, _: weights[_dotted(path)], target)
        else:
            params = from_hub(weights)
    mean, std = map(tuple, stats)
    made_for, side = about.get("made_for", {}), about.get("side", 0)
    return Encoder(about["name"], vit, params, mean, std, about["provenance"], "export", made_for, side)


def exported(path: Path) -> Path | None:
    """The folder that `export` wrote, where `path` is it or its weights; None otherwise."""
    folder = path if path.is_dir() else path.parent if path.name in _WEIGHTS else None
    return folder if folder and (folder / "mammodino.json").is_file() else None


def origin(path: Path) -> dict:
    """Provenance of a weight file or folder, without reading the weights.

    Returns:
      That of the exported folder it lies in; else its name under "foreign", and the terms and no_release that
      a safetensors file written by `export` carries.

    Raises:
      UserError: mammodino.json, or the file's head, is damaged.
    """
    seen = {"foreign": [(path.resolve() if path.is_dir() else path).name], "patients": [], "pixels": []}
    folder = path if path.is_dir() else path.parent
    if (folder / "mammodino.json").is_file():
        return _read_description(folder)["provenance"] or seen
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors" and file.is_file():
        try:
            with safe_open(file, "np") as opened:
                seen |= json.loads((opened.metadata() or {}).get(_PAPERS, "{}"))
        except (SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{file} is no readable safetensors file (cut off?): {error}") from None
    return seen


def _read_description(folder: Path) -> dict:
    """mammodino.json of an exported folder."""
    path = Path(folder) / "mammodino.json"
    try:
        about = json.loads(path.read_text())
        ViTConfig(**about["vit"])
        return {key: about[key] for key in ("name", "format", "mean", "std", "provenance")} | about
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no description that this version can read ({error}): export again"
        ) from None


def _dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
