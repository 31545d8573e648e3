"""Train steps on one layout of fake CPU devices; a program that compare_devices.py runs, once a process.

    python tests/step_once.py '{"config": FILE, "folder": DIR, "name": NAME, "processes": N, "process": I,
                                "coordinator": HOST:PORT, "devices": of a process, "fsdp": N, "restore": [NAME, ...]}'

The step from `START` of a fresh state, whose bytes are the same in every layout, and a checkpoint in DIR/NAME;
then the step after it from the checkpoint of each named layout, waiting for those that run beside. DIR gets
  NAME-rows-I.npz      the rows that process I feeds, "K/..." of step K
  NAME.npz, NAME-from-OTHER.npz   metrics ("metric/..."), the student after the step ("student/..."), Adam's first
                       moments ("mu/...") and a digest of the whole state
"""

import faulthandler
import hashlib
import json
import sys
import time
from pathlib import Path

START = 40  # after the nano recipe's warmup: the first learning rate is 0


def main(job: dict) -> None:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from mammodino_jax import checkpoint, sharding
    from mammodino_jax.convert.hub import to_hub
    from mammodino_jax.data.pipeline import make_batches
    from mammodino_jax.hosts import connect
    from mammodino_jax.recipe import from_config
    from mammodino_jax.train import abstract_state, init_state, jit_step

    folder, name, process = Path(job["folder"]), job["name"], job["process"]
    jax.config.update("jax_num_cpu_devices", job["devices"])
    if job["processes"] > 1:
        connect(job["coordinator"], job["processes"], process)
    sharding.MIN_BYTES = 1024  # so that small test parameters are sharded too
    recipe = from_config(json.loads(Path(job["config"]).read_text()) | {"fsdp": job["fsdp"]})
    mesh = sharding.make_mesh(recipe.fsdp)
    assert jax.device_count() == job["processes"] * job["devices"]
    target, step_fn = abstract_state(recipe, mesh), jit_step(recipe, mesh)
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))

    def result(state, metrics):
        """Arrays of a state after a step, on the host."""
        state, metrics = jax.device_get(everywhere((state, metrics)))
        digest = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(state)))
        out = {f"metric/{k}": v for k, v in metrics.items()} | {"state": digest.hexdigest()}
        out |= {f"student/{k}": v for k, v in to_hub(state["student"]).items()}
        return out | {f"mu/{k}": v for k, v in to_hub(state["opt"].mu).items()}

    def write(path, arrays, processes=(0,)):
        if process in processes:
            np.savez(folder / path, **arrays)

    batches = make_batches(
        recipe.data, recipe.crops, recipe.mask, recipe.pairs, batch_size=recipe.batch_size,
        dbt_rows=recipe.dbt_rows, steps=START + 2, seed=recipe.seed, start_step=START,
        process_index=process, process_count=job["processes"],
    )  # fmt: skip
    first, second = next(batches), next(batches)
    step_fn = step_fn.lower(target, sharding.put_batch(first, mesh)).compile()
    (folder / f"{name}-compiled-{process}").touch()
    for other in range(job["processes"]):  # the first collective waits no longer than 30 s for its peers
        wait_for(folder / f"{name}-compiled-{other}")
    rows = {f"{START + i}/{k}": v for i, b in enumerate((first, second)) for k, v in b.items()}
    write(f"{name}-rows-{process}.npz", rows, [process])
    fresh = jax.device_get(init_state(recipe)) | {"step": np.int32(START)}
    state = jax.tree.map(
        lambda a, t: jax.make_array_from_callback(a.shape, t.sharding, lambda at: np.asarray(a)[at]),
        fresh, target,
    )  # fmt: skip
    state, metrics = step_fn(state, sharding.put_batch(first, mesh))
    write(f"{name}.npz", result(state, metrics))
    checkpoints = checkpoint.Checkpoints(folder / name)
    checkpoints.save(START + 1, state, {"foreign": []})
    checkpoints.close()
    for other in job["restore"]:
        wait_for(folder / other / str(START + 1))
        _, state, _ = checkpoint.restore(folder / other, target)
        restored = result(state, {})["state"]
        state, metrics = step_fn(state, sharding.put_batch(second, mesh))
        write(f"{name}-from-{other}.npz", result(state, metrics) | {"restored": restored})


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.1)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(1500, exit=True)  # a process that waits in vain says where
    main(json.loads(sys.argv[1]))
