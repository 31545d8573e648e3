"""The ViT computes what transformers, timm and Meta's hub compute, at every size and with their positions."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is the oracle of these tests")
pytest.importorskip("timm", reason="timm is the oracle of these tests")
pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

import torch
import torch.nn.functional as F
from oracle_vit import CASES, CONVENTIONS, case_id, forward_error

from mammodino_jax.model.vit import ViTConfig, resize_matrix

VIT = ViTConfig(dim=48, depth=3, heads=3, image_size=518)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward_equals(case):
    assert forward_error(case, VIT) <= 1e-4


@pytest.mark.parametrize("project", CONVENTIONS)
def test_another_resampling_is_seen(project):
    case = (project, 0, (224, 224), False)
    for other in set(CONVENTIONS) - {project}:
        assert forward_error(case, VIT, convention=other) > 0.01, other


@pytest.mark.parametrize(("grid", "size"), [(37, 16), (37, 7), (37, 28), (16, 37), (16, 7)])
@pytest.mark.parametrize("convention", CONVENTIONS.values())
def test_resize_matrix_equals_torch(grid, size, convention):
    antialias, offset = convention
    x = np.random.default_rng(0).normal(size=(grid, grid)).astype(np.float32)
    how = dict(scale_factor=(size + offset) / grid) if offset else dict(size=(size, size))
    theirs = F.interpolate(torch.from_numpy(x)[None, None], mode="bicubic", antialias=antialias, **how)[0, 0]
    matrix = resize_matrix(grid, size, antialias, offset)
    np.testing.assert_allclose(matrix @ x @ matrix.T, theirs, atol=1e-5, rtol=0)
