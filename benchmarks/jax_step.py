"""Our train step, timed in a process of its own: a case of benchmarks.train_step.

    python -m benchmarks.jax_step '{"recipe": "vits14_98", "batch": 8, "dtype": "float32", "steps": 10}'

Prints one line of JSON. A case: "recipe" (recipe_of), "batch" (images a device), "dtype", "steps", and where
they are not to be the recipe's own "attention" and "remat".
"""

import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

BASES = {"nano": "nano", "vits14": "vits14", "vitb14": "vitb14_518", "vitl14": "vitl14"}  # configs/
MATMUL = 2048  # side of the square product that stands for the peak of a device without a data sheet


def recipe_of(case: dict, devices: int = 1):
    """The Recipe of a case: configs/ at another size and batch, a quarter of the rows with slice pairs.

    "vitb14_224" is ViT-B/14 at 224 px with local crops of 98 px (42 px below 224).
    """
    from mammodino_jax.recipe import from_config

    found = re.fullmatch(r"([a-z0-9]+?)(?:_(\d+))?", case["recipe"])
    if not found or found[1] not in BASES:
        raise ValueError(f"recipe is {case['recipe']!r}, expected one of {', '.join(BASES)} and _SIZE")
    c = importlib.import_module(f"configs.{BASES[found[1]]}").get_config()
    if found[2]:
        c.crops.update(global_size=int(found[2]), local_size=98 if int(found[2]) >= 224 else 42)
    c.batch_size = case["batch"] * devices
    c.dbt_rows = c.batch_size // next(n for n in (4, 3, 2, 1) if case["batch"] % n == 0)  # a quarter, or near
    every = c.batch_size // c.dbt_rows
    c.loss.drop_path_group = every * math.gcd(c.loss.drop_path_group, c.batch_size // every)
    c.model.dtype = case["dtype"]
    for field in ("attention", "remat"):
        if case.get(field):
            c.model.update({field: case[field]})
    return from_config(c)


def synthetic_batch(recipe) -> dict[str, np.ndarray]:
    """A batch of the loader's shapes (data/pipeline.py): noise in the crops, every mask slot in use."""
    from mammodino_jax.data.pipeline import empty_batch

    rng = np.random.default_rng(0)
    batch = empty_batch(recipe.crops, recipe.mask, recipe.pairs, recipe.batch_size, recipe.dbt_rows)
    for name, value in batch.items():
        if name.endswith("_crops"):
            batch[name] = rng.integers(1, 256, value.shape, dtype=np.uint8)
        elif name in ("sample", "patient"):
            batch[name] = np.arange(len(value), dtype=np.int32)
    B, M = batch["mask_index"].shape
    patches = (recipe.crops.global_size // recipe.model.patch_size) ** 2
    view = patches * rng.integers(0, 2, (B, 1))  # one view of each image is masked
    batch["mask_index"] = (rng.permuted(np.tile(np.arange(patches), (B, 1)), axis=1)[:, :M] + view).astype(
        np.int32
    )
    batch["mask_weight"] = np.full((B, M), 1 / M, np.float32)
    if "adjacent_offset" in batch:
        batch["adjacent_offset"][:], batch["adjacent_gap_mm"][:] = 0, 1
    return batch


def timed(run: Callable[[], object], steps: int, warmup: int = 3) -> dict:
    """Seconds of a call that waits for its result: median, fastest, slowest of `steps`, after `warmup`."""
    times = []
    for i in range(warmup + steps):
        start = time.perf_counter()
        run()
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def measure(case: dict) -> dict:
    """Run a case: seconds a step, peak memory, time to compile, the device and what it makes of a matmul."""
    import functools

    import jax
    import jax.numpy as jnp

    from mammodino_jax.sharding import make_mesh, put_batch
    from mammodino_jax.train import abstract_state, init_state, jit_step

    recipe = recipe_of(case, jax.device_count())
    mesh, device = make_mesh(recipe.fsdp), jax.devices()[0]
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, mesh))
    state = jax.jit(functools.partial(init_state, recipe), out_shardings=shardings)()
    batch = put_batch(synthetic_batch(recipe), mesh)
    start = time.perf_counter()
    step = jit_step(recipe, mesh).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    held = {"state": state, "loss": []}
    del state

    def run():
        held["state"], metrics = jax.block_until_ready(step(held["state"], batch))
        held["loss"].append(float(metrics["loss"]))

    times = timed(run, case["steps"])
    m = step.memory_analysis()
    compiled = (
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    )
    seen = device.memory_stats() or {}
    held.pop("state")
    a = jnp.ones((MATMUL, MATMUL), case["dtype"])
    product = jax.jit(jnp.dot)
    rate = 2 * MATMUL**3 / timed(lambda: product(a, a).block_until_ready(), 3, warmup=1)["fastest"]
    return {
        **times, "compile_s": compile_s, "matmul": rate, "device": device.device_kind,
        "devices": jax.device_count(), "loss": held["loss"][-1], "compiled_bytes": compiled,
        "peak_bytes": seen.get("peak_bytes_in_use", compiled),
    }  # fmt: skip


def main(run: Callable[[dict], dict], out_of_memory: Callable[[Exception], bool]) -> None:
    """Measure the case given on the command line and print the result; running out of memory is a result."""
    try:
        result = run(json.loads(sys.argv[1]))
    except Exception as error:
        if not out_of_memory(error):
            raise
        result = {"failed": "out of memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main(measure, lambda error: "RESOURCE_EXHAUSTED" in str(error))
