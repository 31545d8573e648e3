"""The next step from stored checkpoints on several numbers of fake devices; a program of its own.

    python tests/next_step.py CONFIG.json CHECKPOINTS OUT.json STEP:DEVICES:DEVICES...

OUT holds, for each argument, [largest relative difference of a loss, largest difference of an update in
learning rates where the gradient exceeds 1e-7] between the two numbers of devices.
"""

import json
import os
import sys
from pathlib import Path


def main(config_path, checkpoints, out_path, *pairs):
    pairs = [tuple(map(int, pair.split(":"))) for pair in pairs]
    most = max(max(a, b) for _, a, b in pairs)
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={most}"
    )
    import jax
    import numpy as np
    from compare_devices import differences

    from mammodino_jax import checkpoint
    from mammodino_jax.convert.hub import to_hub
    from mammodino_jax.data.pipeline import make_batches
    from mammodino_jax.recipe import from_config
    from mammodino_jax.sharding import make_mesh, put_batch
    from mammodino_jax.train import abstract_state, jit_step

    recipe = from_config(json.loads(Path(config_path).read_text()))

    def prepare(devices):
        mesh = make_mesh(devices=jax.devices()[:devices])
        return mesh, abstract_state(recipe, mesh), jit_step(recipe, mesh)

    ready = {n: prepare(n) for n in sorted({n for _, *both in pairs for n in both})}

    def next_step(step, devices):
        mesh, target, train_step = ready[devices]
        state = checkpoint.ocp.load_checkpointables(Path(checkpoints) / str(step), {"state": target})["state"]
        batch = next(
            make_batches(
                recipe.data, recipe.crops, recipe.mask, recipe.pairs, batch_size=recipe.batch_size,
                dbt_rows=recipe.dbt_rows, steps=recipe.steps, seed=recipe.seed, start_step=step,
            )
        )  # fmt: skip
        before = {f"mu/{k}": v for k, v in to_hub(jax.device_get(state["opt"].mu)).items()}
        new, metrics = train_step(state, put_batch(batch, mesh))
        out = {f"metric/{k}": np.asarray(v) for k, v in metrics.items()}
        out |= {f"student/{k}": v for k, v in to_hub(jax.device_get(new["student"])).items()}
        return before, out | {f"mu/{k}": v for k, v in to_hub(jax.device_get(new["opt"].mu)).items()}

    found = []
    for step, a, b in pairs:
        (before, one), (_, other) = next_step(step, a), next_step(step, b)
        found.append(differences(one, other, before))
    Path(out_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
