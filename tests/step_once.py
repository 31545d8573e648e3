"""One train step from step `START` of a fresh state on a stored batch; run as a program on N fake devices.

    python tests/step_once.py CONFIG.json BATCH.npz OUT.npz DEVICES FSDP

OUT holds the metrics ("metric/..."), the student after the step ("student/...") and Adam's first moments
("mu/..."), which after one step are 0.1 of the clipped gradients.
"""

import functools
import json
import os
import sys

START = 40  # after the warmup: the first learning rate is 0


def main(config_path, batch_path, out_path, devices, fsdp):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flags
    import jax
    import numpy as np

    from mammodino_jax import sharding
    from mammodino_jax.convert.hub import to_hub
    from mammodino_jax.recipe import from_config
    from mammodino_jax.train import init_state, train_step

    sharding.MIN_BYTES = 1024  # so that small test parameters are sharded too
    with open(config_path) as f:
        recipe = from_config(json.load(f) | {"fsdp": int(fsdp)})
    mesh = sharding.make_mesh(recipe.fsdp)
    assert jax.device_count() == int(devices)
    state = init_state(recipe) | {"step": jax.numpy.int32(START)}
    shardings = sharding.state_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    batch = sharding.put_batch(dict(np.load(batch_path)), mesh)
    new, metrics = jax.jit(
        functools.partial(train_step, recipe=recipe, mesh=mesh), out_shardings=(shardings, None)
    )(state, batch)
    out = {f"metric/{k}": np.asarray(v) for k, v in metrics.items()}
    out |= {f"student/{k}": v for k, v in to_hub(jax.device_get(new["student"])).items()}
    out |= {f"mu/{k}": v for k, v in to_hub(jax.device_get(new["opt"].mu)).items()}
    np.savez(out_path, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
