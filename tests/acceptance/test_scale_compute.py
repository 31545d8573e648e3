"""Acceptance line 7 of scale: attention against the reference, recompilations and transfers."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax.model.vit import attend

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
REPO = Path(__file__).resolve().parents[2]


def reference(q, k, v):
    """Attention written out in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") / np.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v, precision="highest")


@pytest.mark.parametrize("side", [518, 224, 98])
def test_line_07_attention(side):
    """ViT-B/14's heads, 2 images, values and gradients in bfloat16, whose numbers are 2^-8 apart."""
    tokens = (side // 14) ** 2 + 1
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, tokens, 12, 64)).astype(jnp.bfloat16)

    def run(attention):
        out, pull = jax.vjp(attention, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(cotangent.astype(out.dtype)))]

    expected = run(reference)
    ways = ["xla", "xla, recomputed", *(["cudnn"] if jax.default_backend() == "gpu" else [])]
    for way in ways:
        name, remat = way.split(",")[0], way.endswith("recomputed")
        got = run(lambda q, k, v: attend(q, k, v, implementation=name, remat=remat))  # noqa: B023
        errors = [np.abs(a - b).max() / np.abs(a).max() for a, b in zip(expected, got, strict=True)]
        print(f"\n7. {side} px, {tokens} tokens, {way}: largest error of out, dq, dk, dv relative to their "
              f"largest value: {', '.join(f'{e:.4f}' for e in errors)} (2^-8 is {2**-8:.4f})")  # fmt: skip
        assert max(errors) <= 2**-6
    if len(ways) == 2:
        print("7. cuDNN was not run: no GPU here")


@pytest.mark.parametrize("devices", [1, 8])
def test_line_07_no_recompilation_no_implicit_transfer(devices):
    """tests/test_strict.py on 1 and on 8 devices: train() under transfer_guard, steps 2 and on under no_tracing."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_strict.py"],
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
    )
    print(f"\n7. {devices} devices: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-3000:]
