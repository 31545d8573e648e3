"""Acceptance of the learning algorithm, lines 5 (cost) and 9: recipes. Each prints its figures.

On a tiny synthetic data set; scaled-down twins: tests/test_objective.py, tests/test_recipe.py.
"""

import functools
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_dataset

from configs import ablation, nano
from mammodino_jax import metrics
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.objective import gradients
from mammodino_jax.recipe import from_config
from mammodino_jax.train import init_state, schedule, train, train_step

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    margin = {"tissue": 0, "full": 40}
    return {box: tiny_dataset(folder / box, m, settings={"box": box}) for box, m in margin.items()}


def batch_of(recipe):
    return next(
        make_batches(
            recipe.data, recipe.crops, recipe.mask, recipe.pairs, batch_size=recipe.batch_size,
            dbt_rows=recipe.dbt_rows, steps=1, seed=recipe.seed,
        )
    )  # fmt: skip


def test_line_05_cost_without_dbt(data):
    flops = {}
    for name, changes in {
        "no DBT rows": {"dbt_rows": 0},
        "DBT rows without the term": {"pairs": {"mode": "none"}},
        "reuse": {"pairs": {"mode": "reuse"}},
        "dedicated": {},
        "dedicated, symmetric": {"pairs": {"symmetric": True}},
    }.items():
        c = nano.get_config(str(data["tissue"]))
        c.update(changes)
        recipe = from_config(c)
        step = jax.jit(functools.partial(train_step, recipe=recipe))
        cost = step.lower(jax.eval_shape(lambda r=recipe: init_state(r)), batch_of(recipe)).compile()
        cost = cost.cost_analysis()
        flops[name] = (cost[0] if isinstance(cost, list) else cost)["flops"]
    print("\n5. GFLOP of a compiled step of configs/nano.py, 8 of 32 rows from volumes (cost_analysis)")
    for name, value in flops.items():
        print(f"   {name}: {value / 1e9:.3f}")
    assert flops["no DBT rows"] == flops["DBT rows without the term"] < flops["reuse"] < flops["dedicated"]


def test_line_09_ablations_run(data, tmp_path):
    print("\n9. 20 steps each of configs/ablation.py:NAME,base=nano on a tiny synthetic data set, batch 16")
    print("   | ablation | loss, first and last | adjacent | tissue in globals | in masked patches | s |")
    for name in ablation.NAMES:
        box = "full" if name.endswith("_full") else "tissue"
        c = importlib.import_module("configs.ablation").get_config(f"{name},base=nano,data={data[box]}")
        c.steps, c.batch_size, c.dbt_rows = 20, 16, 4
        began = time.perf_counter()
        train(c, tmp_path / name)
        rows = metrics.read(tmp_path / name / "metrics.jsonl")
        assert len(rows) == 20 and not any(r["bad"] for r in rows)
        assert ("adjacent" in rows[0]) == (name in ("adj", "full"))
        mean = {k: np.mean([r[f"data/{k}"] for r in rows]) for k in ("global_coverage", "mask_coverage")}
        adjacent = f"{rows[0]['adjacent']:.2f} {rows[-1]['adjacent']:.2f}" if "adjacent" in rows[0] else "-"
        print(f"   | {name} | {rows[0]['loss']:.3f} {rows[-1]['loss']:.3f} | {adjacent} | "
              f"{mean['global_coverage']:.1%} | {mean['mask_coverage']:.1%} | "
              f"{time.perf_counter() - began:.0f} |")  # fmt: skip


def test_line_09_accumulation(data):
    """Two micro-batches against one step of the double batch, on a real batch of the nano recipe."""
    results = []
    for n in (1, 2):
        c = nano.get_config(str(data["tissue"]))
        c.loss.update(centering="centering", koleo_group=16)
        c.accumulate = n
        recipe = from_config(c)
        state = {**init_state(recipe), "step": jnp.int32(40)}
        step = jax.jit(lambda s, b, r=recipe: gradients(s, b, None, schedule(r, 40), r))
        results.append(step(state, batch_of(recipe)))
    (g1, c1, m1), (g2, c2, m2) = results
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), g1, g2)
    center = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), c1, c2)
    terms = ("loss", "dino_global", "dino_local", "ibot", "koleo", "adjacent")
    loss = {k: abs(float(m2[k]) / float(m1[k]) - 1) for k in terms}
    worst = max(jax.tree.leaves(relative))
    print(f"\n9. accumulation of 2 against one step: gradients within {worst:.1e} of each tensor's maximum, "
          f"losses {max(loss.values()):.1e} relative, centers {max(center.values()):.1e}")  # fmt: skip
    assert worst <= 1e-5 and max(loss.values()) <= 1e-5 and max(center.values()) <= 1e-6
