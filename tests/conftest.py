"""Shared fixtures. Real images and golden files lie beside the project in ../shared; none is committed."""

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # fits of tests are small: their threads would only wait
# the same small programs are compiled by many tests and subprocesses: compile each once a session
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if "XLA_FLAGS" not in os.environ:
    # XLA's CPU runtime may start independent collectives in another order on each device or process, which
    # then wait for each other without end (seen with jax 0.10.2)
    flags = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if "accept" not in sys.argv:  # acceptance runs long enough to be worth compiling well
        # tests compile more than they compute: a third of the time at the lowest level
        flags.append("--xla_backend_optimization_level=0")
        if importlib.metadata.version("jax").startswith("0.10."):  # unknown to later ones, which would abort
            flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)

import pytest
from absl import flags as absl_flags

try:  # before timm, lightly or transformers do: all of them import torchvision
    import torchvision
except ModuleNotFoundError:
    pass  # no torch for this Python: the tests that need it skip
except RuntimeError:
    # torchvision's wheel is a CUDA build; beside a CPU torch its operators are missing, and the import fails
    # on declaring gradients for them. No test calls them: a declaration is enough.
    import torch

    TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # kept: dropping it takes them back
    for name in ("nms", "qnms"):
        TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

REPO = Path(__file__).resolve().parents[1]


def pytest_configure():
    absl_flags.FLAGS.mark_as_parsed()  # grain reads an absl flag when it starts worker processes


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images, golden files and weights; tests that need it skip where it is absent."""
    path = Path(os.environ.get("MAMMODINO_SHARED", REPO.parent / "shared"))
    if not path.is_dir():
        pytest.skip("no real test images and golden files here (MAMMODINO_SHARED or ../shared)")
    return path
