"""Acceptance of evaluation, line 1 (encoders of the field) and the weight files of line 8. Each prints its figures.

    python -m pytest -s -m accept tests/acceptance/test_evaluation_parity.py

A few minutes on two cores; needs torch, timm, transformers and efficientnet-pytorch. Weights are random, in the
layout of the published files: nothing here says that the published weights were read. Scaled-down twins:
tests/convert/test_foreign.py.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mammodino_jax.encoder import ARCHITECTURES, load_encoder
from mammodino_jax.errors import UserError

torch = pytest.importorskip("torch", reason="torch modules are the oracles of these tests")
pytest.importorskip("efficientnet_pytorch", reason="an oracle of these tests")
field = pytest.importorskip("oracle_encoders")

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]

S, B, L = (ARCHITECTURES[name] for name in ("vits14", "vitb14", "vitl14"))
G = dataclasses.replace(ARCHITECTURES["vitg14"], depth=2)  # of 40 blocks, each at full width


def registers(vit):
    return dataclasses.replace(vit, registers=4)


OWN, OTHER = (518, 518), (364, 238)
CASES = {  # name: (what writes the file and computes the features, sizes in pixels)
    "DINOv2 ViT-S/14, hub": (lambda at: field.hub(at, S), (OWN, OTHER)),
    "DINOv2 ViT-B/14, hub": (lambda at: field.hub(at, B), (OWN, OTHER)),
    "DINOv2 ViT-L/14, hub": (lambda at: field.hub(at, L), (OWN, OTHER)),
    "DINOv2 ViT-g/14 of 2 blocks, hub": (lambda at: field.hub(at, G), (OWN, OTHER)),
    "DINOv2 ViT-S/14 with registers, hub": (lambda at: field.hub(at, registers(S)), (OWN, OTHER)),
    "DINOv2 ViT-B/14 with registers, timm": (lambda at: field.timm(at, registers(B)), (OWN, OTHER)),
    "DINOv2 ViT-L/14 with registers, HF": (lambda at: field.hugging_face(at, registers(L)), (OWN, OTHER)),
    "DINOv2 ViT-g/14 of 2 blocks with registers, HF": (
        lambda at: field.hugging_face(at, registers(G)),
        (OWN, OTHER),
    ),
    "DINOv2 ViT-g/14 of 2 blocks, timm": (lambda at: field.timm(at, G), (OWN, OTHER)),
    "RAD-DINO, HF": (lambda at: field.hugging_face(at, B, field.RAD), (OWN, OTHER)),
    "DBT-DINO, .pth": (lambda at: field.dbt_dino(at, B), (OWN, OTHER)),
    "DBT-DINO, .pth of 4 block chunks": (lambda at: field.dbt_dino(at, B, chunks=4), (OWN,)),
    "BiomedCLIP, open_clip folder": (field.biomedclip, ((224, 224), (224, 144))),
    "Mammo-CLIP EfficientNet-B5, .tar": (field.mammoclip, ((1520, 912), (760, 480))),
    "Mammo-CLIP EfficientNet-B2, .tar": (lambda at: field.mammoclip(at, "efficientnet-b2"), ((1520, 912),)),
}


@pytest.mark.parametrize("name", CASES)
def test_line_1_parity(name, tmp_path):
    """Largest difference of features from the PyTorch module: random weights, fp32, limit 1e-4."""
    make, sizes = CASES[name]
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # gone before the next
        case = make(Path(folder))
        images = np.random.default_rng(1).integers(0, 256, (1, *sizes[-1]), np.uint8)
        scale = np.mean([a.std() for a in case.features(images).values()])
        errors = {size: case.error(*size) for size in sizes}
        made = load_encoder(case.spec).made_for.get("preset", "any")
    figures = ", ".join(f"{h} x {w}: {error:.1e}" for (h, w), error in errors.items())
    print(
        f"\n  {name}: {figures} (features deviate by {scale:.2f}; build: {made}; layout-tested)", flush=True
    )
    assert max(errors.values()) <= 1e-4


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_line_8_weight_files(tmp_path):
    ran, vit = tmp_path / "ran", dataclasses.replace(S, depth=1, image_size=98)
    case = field.hub(tmp_path, vit)
    whole = (tmp_path / "hub.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    field.timm(tmp_path, vit)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "timm.safetensors").read_bytes()[:100_000])
    torch.save({"teacher": field.hub_weights(vit), "config": Malicious(ran)}, tmp_path / "code.pth")
    wide = field.hub_weights(vit) | {"blocks.0.attn.proj.weight": torch.zeros(384, 512)}
    torch.save(wide, tmp_path / "wide.pth")
    files = {
        "wrong format for the kind": f"hf:{tmp_path}/hub.pth",
        "another encoder's kind": f"mammoclip:{tmp_path}/hub.pth",
        "mismatched architecture": f"hub:{tmp_path}/wide.pth",
        "truncated .pth": f"hub:{tmp_path}/cut.pth",
        "truncated safetensors": f"timm:{tmp_path}/cut.safetensors",
        "code in a .pth": f"dbt-dino:{tmp_path}/code.pth",
        "missing file": f"hub:{tmp_path}/gone.pth",
        "unknown kind": f"dino:{tmp_path}/hub.pth",
    }
    print()
    for what, spec in files.items():
        with pytest.raises(UserError) as error:
            load_encoder(spec)
        print(f"  {what}: {str(error.value).replace(str(tmp_path), 'DIR')}")
    print(f"  the code in code.pth ran: {ran.exists()}")
    assert not ran.exists() and load_encoder(case.spec).dim == 384
