"""Shared fixtures. Real images and golden files live beside the project in ../shared and are never committed."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from absl import flags

REPO = Path(__file__).resolve().parents[1]


def pytest_configure():
    flags.FLAGS.mark_as_parsed()  # grain reads an absl flag when it starts worker processes


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, golden files and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAMMODINO_SHARED", REPO.parent / "shared"))
    if not path.is_dir():
        pytest.skip("real test images and golden files (MAMMODINO_SHARED or ../shared) are not on this machine")
    return path
