"""FLOPs by formula against figures derived elsewhere, and against XLA's count of the traced step."""

import functools

import jax
import pytest
from tiny import shrink

from configs import nano, vitb14_518, vitl14, vits14
from mammodino_jax.flops import backbone_flops, chip, head_flops, step_flops
from mammodino_jax.recipe import from_config
from mammodino_jax.sharding import make_mesh
from mammodino_jax.train import abstract_batch, init_state, train_step


def tera(module, **changes) -> float:
    """Model TFLOP of an image."""
    c = module.get_config()
    c.update(changes)
    return step_flops(from_config(c))["model_per_image"] / 1e12


def test_figures_of_the_known_backbones():
    """Derived by hand from the layers' sizes, before this code was written."""
    r = from_config(vitb14_518.get_config())
    assert sum(backbone_flops(r.model, 518)) / 1e9 == pytest.approx(303.1, abs=0.1)
    assert sum(backbone_flops(r.model, 98)) / 1e9 == pytest.approx(8.63, abs=0.01)
    assert sum(head_flops(768, r.head)) / 1e6 == pytest.approx(46, abs=0.5)
    assert tera(vitb14_518, dbt_rows=0) == pytest.approx(2.71, abs=0.005)
    assert tera(vits14, dbt_rows=0) == pytest.approx(0.874, abs=0.001)
    assert tera(vitl14, dbt_rows=0, head=dict(prototypes=65_536, bottleneck=256)) == pytest.approx(
        8.92, abs=0.01
    )
    assert tera(vitb14_518, dbt_rows=0, crops=dict(global_size=224)) == pytest.approx(0.593, abs=0.01)
    every = dict(dbt_rows=1024)  # a slice pair for every image
    assert tera(vitb14_518, **every) == pytest.approx(3.92, abs=0.005)
    assert tera(vitb14_518, **every, pairs=dict(mode="reuse")) == pytest.approx(3.01, abs=0.005)
    assert tera(vitb14_518, **every, pairs=dict(symmetric=True)) == pytest.approx(5.14, abs=0.005)
    assert tera(vitb14_518, **every, pairs=dict(mode="none")) == tera(vitb14_518, dbt_rows=0)


def test_parts_add_up_and_accumulation_changes_nothing():
    c = vitb14_518.get_config()
    whole = step_flops(from_config(c))
    assert sum(whole["parts"].values()) == pytest.approx(whole["model_per_image"])
    assert whole["model"] == whole["model_per_image"] * 1024
    c.loss.centering, c.accumulate = "centering", 4
    assert step_flops(from_config(c))["model"] == whole["model"]


CASES = {
    "plain": {},
    "reuse, remat, sinkhorn": dict(
        pairs=dict(mode="reuse"), model=dict(remat="attention"), loss=dict(centering="sinkhorn")
    ),
    "symmetric, remat": dict(pairs=dict(symmetric=True), model=dict(remat="block")),
    "drop-path, remat": dict(model=dict(drop_path=0.3, remat="dots"), loss=dict(drop_path_group=4)),
    "swiglu, no pairs": dict(dbt_rows=0, model=dict(ffn="swiglu")),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_executed_flops_are_those_of_the_traced_step(changes):
    """Of one block, so that no loop hides any; XLA also counts what is not a matrix product."""
    c = shrink(nano.get_config("unread"))
    c.model.update(dim=192, depth=1, heads=3)
    c.head.update(prototypes=1024, bottleneck=64, hidden=256)
    c.crops.update(global_size=98, local_size=42)
    c.update(changes)
    r = from_config(c)
    step = jax.jit(functools.partial(train_step, recipe=r))
    state = jax.eval_shape(functools.partial(init_state, r))
    counted = step.lower(state, abstract_batch(r, make_mesh())).cost_analysis()["flops"]
    assert step_flops(r)["executed"] == pytest.approx(counted, rel=0.03)


def test_chips_are_found_by_the_names_that_devices_have():
    assert chip("TPU v5 lite").flops == 197e12 and chip("TPU v5").flops == 459e12
    assert chip("TPU v6 lite").hbm == 32 * 2**30 and chip("NVIDIA H100 80GB HBM3").flops == 989e12
    assert chip("cpu") is None
