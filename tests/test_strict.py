"""The loop does what is expensive to get wrong at scale: no recompilation, no transfer that nobody asked for."""

import shutil

import jax
import pytest
from tiny import tiny, tiny_dataset

from mammodino_jax import train as train_module


def test_no_recompilation_after_the_first_step_and_no_implicit_transfer(tmp_path, monkeypatch):
    """Across logging, looks at held-out images, checkpoints and, in a second run, a restored state."""
    calls = []
    original = train_module.jit_step

    def strict(*args):
        step = original(*args)

        def run(state, batch):
            calls.append(len(calls))
            with jax.transfer_guard("disallow"):
                if len(calls) == 1:
                    return step(state, batch)
                with jax.no_tracing():
                    return step(state, batch)

        return run

    monkeypatch.setattr(train_module, "jit_step", strict)
    c = tiny(
        tiny_dataset(tmp_path / "data"),
        batch_size=16,
        dbt_rows=8,
        steps=6,
        run={"checkpoint_every": 2, "diagnose_every": 2},
    )
    with jax.transfer_guard("disallow"):
        train_module.train(c, tmp_path / "run")
    assert len(calls) == 6
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    calls.clear()
    with jax.transfer_guard("disallow"):
        train_module.train(c, tmp_path / "run")
    assert len(calls) == 2


def test_the_guards_can_fail():
    f = jax.jit(lambda x: x + 1)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device"):
        f(1.0)
    with jax.no_tracing(), pytest.raises(Exception, match="trac"):
        f(jax.numpy.zeros(3))
