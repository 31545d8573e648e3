"""A small labelled data set, and an encoder that compiles in a second."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def labelled():
    """The module make_labelled.py (tests are not a package)."""
    spec = importlib.util.spec_from_file_location(
        "make_labelled", Path(__file__).with_name("make_labelled.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def data(labelled, tmp_path_factory):
    """20 patients of 2 images and a volume of 3 slices each; density is the grey level, cancer is nothing."""
    return labelled.write(tmp_path_factory.mktemp("labelled") / "data", labelled.items(20))


@pytest.fixture(scope="session")
def encoder():
    """A ViT of width 12 and one block, for 28-pixel images, with random weights."""
    from mammodino_jax.encoder import Encoder
    from mammodino_jax.model.head import init_params
    from mammodino_jax.model.vit import ViTConfig

    vit = ViTConfig(dim=12, depth=1, heads=1, image_size=28)
    return Encoder("tiny", vit, init_params(vit, None, seed=1))
