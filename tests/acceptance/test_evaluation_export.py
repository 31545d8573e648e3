"""Acceptance of evaluation, line 6 and the conversions of line 1. A test a line; each prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_evaluation_export.py

A few minutes on two cores. Line 6 makes a fresh environment with pip and needs a package index. Scaled-down
twins run in `make test` (tests/test_export.py).
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from make_dataset import breast
from safetensors.numpy import load_file
from test_export import normalised_nchw, random_encoder, run_example

from mammodino_jax.convert import folder
from mammodino_jax.convert.hub import to_hub
from mammodino_jax.convert.pretrained import with_channels
from mammodino_jax.data.index import open_split
from mammodino_jax.encoder import Encoder, load_encoder
from mammodino_jax.model.vit import ViTConfig

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
REPO = Path(__file__).resolve().parents[2]
VIT_S = ViTConfig(dim=384, depth=12, heads=6, image_size=518)
SHAPES = {"ViT-S/14": VIT_S, "ViT-S/14, 4 registers": dataclasses.replace(VIT_S, registers=4)}
SIZES = [(518, 518), (518, 392)]


def run(*command) -> None:
    out = subprocess.run(list(map(str, command)), cwd=REPO, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]


def convert(source, form: str, output: Path, *flags) -> Path:
    run(
        sys.executable,
        "-m",
        "mammodino_jax.export",
        "--encoder",
        source,
        "--format",
        form,
        "--output",
        output,
        *flags,
    )
    return output


def images(size) -> np.ndarray:
    """Two textured half-ellipses [2, H, W]."""
    return np.stack([breast(*size, seed=seed) for seed in (0, 1)])


def error(ours: dict, cls, patches) -> float:
    return max(float(np.abs(ours["cls"] - cls).max()), float(np.abs(ours["patches"] - patches).max()))


@pytest.mark.parametrize("name", SHAPES)
def test_line_1_conversions(tmp_path, name):
    torch = pytest.importorskip("torch", reason="torch is an oracle of this test")
    timm = pytest.importorskip("timm", reason="timm is an oracle of this test")
    encoder = random_encoder(SHAPES[name])
    folder.export(encoder, "hub", tmp_path / "hub", "test")
    hf = convert(tmp_path / "hub", "hf", tmp_path / "hf")
    (hf / "mammodino.json").unlink()  # read by its names, as the file of another
    back = convert(f"hf:{hf}", "hub", tmp_path / "back")
    a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "hub", back))
    assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    print(f"\n1. {name}: hub -> HF -> hub: {len(a)} tensors, all bit-exact")
    grey = load_encoder(str(convert(tmp_path / "hub", "hub", tmp_path / "grey", "--channels", 1)))
    three = load_encoder(str(convert(tmp_path / "grey", "hub", tmp_path / "three", "--channels", 3)))
    model = timm.create_model(f"local-dir:{convert(back, 'timm', tmp_path / 'timm')}", pretrained=True).eval()
    for size in SIZES:
        x = images(size)
        ours = {k: np.asarray(v) for k, v in encoder(x).items()}
        with torch.no_grad():
            tokens = model.forward_features(normalised_nchw(encoder, x)).numpy()
        errors = {
            "timm": error(ours, tokens[:, 0], tokens[:, 1 + encoder.vit.registers :]),
            "3 channels folded into 1": error(ours, *grey(x).values()),
            "and back to 3": error(ours, *three(x).values()),
        }
        print(
            f"   at {size[0]} x {size[1]} (limit 1e-5): "
            + ", ".join(f"{k} {e:.1e}" for k, e in errors.items())
        )
        assert max(errors.values()) <= 1e-5


def test_line_6_a_pytorch_users_path(tmp_path):
    """A fresh environment with three packages; a phantom, prepared as the model card says."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "torch==2.13.0")
    run(python, "-m", "pip", "install", "--quiet", "safetensors", "transformers")
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    print("\n6. the environment:", ", ".join(listed.split()))
    assert "jax" not in listed and "mammodino" not in listed
    run(
        sys.executable,
        "-m",
        "data_prep",
        "phantom",
        "--output",
        tmp_path / "dicom",
        "--patients",
        1,
        "--seed",
        0,
    )
    run(sys.executable, "-m", "data_prep", "build", "--source", "folder", "--input", tmp_path / "dicom", "--output",
        tmp_path / "data", "--key", tmp_path / "key", "--split", "1,0,0", "--kind", "2d")  # fmt: skip
    shards, _ = open_split(tmp_path / "data", "train")
    record = shards.read(0)
    for name, vit in SHAPES.items():
        for form, channels in (("hf", 3), ("hub", 3), ("hf", 1)):
            encoder: Encoder = with_channels(random_encoder(vit), channels)
            work = tmp_path / f"{form}-{channels}-{vit.registers}"
            work.mkdir()
            worst = run_example(encoder, form, work, record, python=(python,))
            files = ", ".join(sorted(f.name for f in (work / form).iterdir()))
            print(f"   {name}, {form}, {channels} channels, record {record.shape} at {encoder.long_side} px: "
                  f"largest difference {worst:.1e} (limit 1e-3); {files}")  # fmt: skip
            assert worst <= 1e-3
            assert to_hub(load_encoder(str(work / form)).params).keys() == to_hub(encoder.params).keys()
    embedded(tmp_path, python)


def embedded(tmp_path: Path, python: Path) -> None:
    """One DICOM by `embed`, and by example.py on the image that it saved (as .npy: no Pillow there)."""
    folder.export(random_encoder(VIT_S), "hf", tmp_path / "encoder", "test")
    source = next((tmp_path / "dicom").rglob("*.dcm"))
    run(sys.executable, "-m", "mammodino_jax.embed", "--encoder", tmp_path / "encoder", "--input", source,
        "--output", tmp_path / "features.npz", "--save-images", tmp_path / "images", "--key", tmp_path / "key")  # fmt: skip
    found = np.load(tmp_path / "features.npz")
    image = cv2.imread(str(next((tmp_path / "images").glob("*.png"))), cv2.IMREAD_GRAYSCALE)
    np.save(tmp_path / "image.npy", image)
    run(python, tmp_path / "encoder/example.py", tmp_path / "image.npy", tmp_path / "theirs.npz")
    theirs = np.load(tmp_path / "theirs.npz")
    cls = float(np.abs(theirs["cls"] - found["cls"][0]).max())
    mean = float(np.abs(theirs["tissue_mean"] - found["mean"][0]).max())
    print(
        f"   {source.name} by embed ({image.shape[0]} x {image.shape[1]} px): CLS {cls:.1e}, mean of tissue {mean:.1e}"
    )
    assert max(cls, mean) <= 1e-3
