"""Pretraining: a pure train step, and one linear `train()`."""

import contextlib
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mammodino_jax import checkpoint, provenance
from mammodino_jax.checkpoint import Checkpoints
from mammodino_jax.convert.pretrained import load_pretrained, merge
from mammodino_jax.data.index import full_frames
from mammodino_jax.data.pipeline import empty_batch, make_batches
from mammodino_jax.data.statistics import tissue_statistics
from mammodino_jax.diagnostics import Watch
from mammodino_jax.errors import UserError
from mammodino_jax.held_out import HeldOut
from mammodino_jax.metrics import MetricsWriter, read
from mammodino_jax.model.head import init_params
from mammodino_jax.objective import gradients
from mammodino_jax.optimizer import adam, adamw_update, clip_by_module
from mammodino_jax.pictures import draw_batch
from mammodino_jax.recipe import Recipe, check_devices, from_config
from mammodino_jax.schedules import Cosine, scaled_lr
from mammodino_jax.sharding import ROWS, make_mesh, put_batch, state_shardings


def init_state(recipe: Recipe, loaded: dict | None = None) -> dict:
    """The train state at step 0: plain dicts of arrays, the teacher equal to the student, no random state.

    `loaded` are parameters that replace the random ones (convert.pretrained).
    """
    student = merge(init_params(recipe.model, recipe.head, recipe.seed), loaded or {})
    if recipe.loss.centering == "centering":
        centers = ("dino", "ibot")
    else:  # Sinkhorn needs none, but for slice pairs that are only centred
        centers = () if recipe.loss.adjacent_sinkhorn else ("dino",)
    center = {name: jnp.zeros(recipe.head.prototypes) for name in centers}
    teacher = jax.tree.map(jnp.copy, student)
    opt = adam(recipe.optim).init(student)
    return {"step": jnp.int32(0), "student": student, "teacher": teacher, "opt": opt, "center": center}


def schedule(recipe: Recipe, step) -> dict:
    """Values of all schedules at a step (int or traced)."""
    c, total = recipe.optim, recipe.steps
    peak = scaled_lr(c.base_lr, recipe.batch_size)
    lr = Cosine(peak, peak if c.final_lr is None else c.final_lr, total, c.warmup_steps)(step)
    frozen, thaw = recipe.init.freeze_steps, recipe.init.unfreeze_steps
    ramp = jnp.clip((step - frozen + 1) / (thaw + 1), 0, 1) if frozen or thaw else 1.0
    term = recipe.loss
    adjacent = Cosine(term.adjacent_weight, term.final_adjacent_weight, total, term.adjacent_warmup_steps)
    temp = Cosine(c.teacher_temp, c.teacher_temp, total, c.warmup_teacher_temp_steps, c.warmup_teacher_temp)
    return {
        "lr": lr,
        "last_layer_lr": lr * (step >= c.freeze_last_layer_steps),
        "body_lr": lr * ramp,
        "weight_decay": Cosine(c.weight_decay, c.final_weight_decay, total)(step),
        "momentum": Cosine(c.momentum, c.final_momentum, total)(step),
        "teacher_temp": temp(step),
        "adjacent_weight": adjacent(step),
    }


def apply_gradients(
    state: dict, grads: dict, center: dict, values: dict, recipe: Recipe
) -> tuple[dict, dict]:
    """AdamW on the student, then the teacher's moving average with this step's momentum.

    Returns (new state, {sub-module: gradient norm before clipping}).
    """
    grads, norms = clip_by_module(grads, recipe.optim.clip)
    student, opt = adamw_update(
        state["student"], grads, state["opt"], recipe.optim, recipe.model.depth,
        **{k: values[k] for k in ("lr", "last_layer_lr", "body_lr", "weight_decay")},
    )  # fmt: skip
    teacher = optax.incremental_update(student, state["teacher"], 1 - values["momentum"])
    step = state["step"] + 1
    return {"step": step, "student": student, "teacher": teacher, "opt": opt, "center": center}, norms


def train_step(state: dict, batch: dict, *, recipe: Recipe, mesh=None) -> tuple[dict, dict]:
    """One step on a uint8 batch; one that is not finite keeps all but the step number (metric `bad`).

    `mesh` is the one that state and batch lie on; None: a single device.
    """
    step = state["step"]
    values = schedule(recipe, step)
    # drop-path draws by step; photometrics by sample (make_views), so neither depends on the device count
    key = jax.random.fold_in(jax.random.key(recipe.seed + 1), step) if recipe.model.drop_path else None
    grads, center, metrics = gradients(state, batch, key, values, recipe, mesh)
    new, norms = apply_gradients(state, grads, center, values, recipe)
    finite = jnp.isfinite(metrics["loss"])
    for norm in norms.values():
        finite &= jnp.isfinite(norm)
    kept = {"step": new["step"], **{k: v for k, v in state.items() if k != "step"}}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
    if clip := recipe.optim.clip:
        metrics |= {f"clipped/{name}": norm > clip for name, norm in norms.items()}
    metrics |= {
        f"data/{k.removeprefix('count/')}": jnp.nanmean(v) for k, v in batch.items() if k.startswith("count/")
    }
    if "adjacent_gap_mm" in batch:
        metrics["data/adjacent_gap_mm"] = jnp.nanmean(batch["adjacent_gap_mm"])
    return new, {**metrics, **values, "bad": 1.0 - finite.astype(jnp.float32)}


def check_workdir(config, workdir: Path) -> None:
    """Raise a UserError where the workdir belongs to another config (`run` and data workers may differ)."""
    path = workdir / "config.json"
    if not path.exists():
        return
    there, here = (dict(_flatten(c)) for c in (json.loads(path.read_text()), _jsonable(config)))
    free = (
        "run.",
        "data.workers",
        "data.threads",
        "fsdp",
        "model.remat",
        "model.scan",
        "model.attention",
        "loss.patch_chunk",
    )
    names = sorted(name for name in there.keys() | here.keys() if not name.startswith(free))
    changed = [name for name in names if there.get(name) != here.get(name)]
    if changed:
        name = changed[0]
        raise UserError(
            f"workdir {workdir} belongs to another config: {name} is {there.get(name)} there and "
            f"{here.get(name)} here ({len(changed)} fields differ); give another --workdir or the same config"
        )


def _jsonable(config) -> dict:
    return json.loads(json.dumps(config.to_dict()))


def _flatten(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def with_statistics(config):
    """`config` with mean and std measured on the training records, where `augment.normalise` asks for it."""
    recipe = from_config(config)
    if recipe.augment.normalise != "tissue":
        return config
    measured = ConfigDict(config.to_dict())
    mean, std = tissue_statistics(recipe.data, recipe.dbt_rows / recipe.batch_size)
    logging.info("tissue of the training records: mean %.4f, deviation %.4f", mean, std)
    measured.augment.update(mean=(mean,) * recipe.model.channels, std=(std,) * recipe.model.channels)
    return measured


def starting_point(recipe: Recipe, workdir: Path, start: int) -> tuple[dict | None, dict]:
    """Parameters to start from (None: random ones, or a checkpoint's), and the provenance of the run."""
    c, look, seen = recipe.init, recipe.augment, provenance.collect(recipe.data)
    if start:
        return None, provenance.join(seen, checkpoint.load(workdir, "provenance"))
    if not c.weights:
        return None, seen
    loaded = load_pretrained(c.weights, c.heads, recipe.model, recipe.head, look.mean, look.std)
    return loaded, provenance.join(seen, provenance.inherited(c.weights, c.heads))


def abstract_state(recipe: Recipe, mesh) -> dict:
    """Shapes, dtypes and shardings of the train state; nothing is allocated."""
    abstract = jax.eval_shape(functools.partial(init_state, recipe))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract,
        state_shardings(abstract, mesh),
    )


def abstract_batch(recipe: Recipe, mesh) -> dict:
    """Shapes, dtypes and shardings of a global batch (make_batches' contract, records without findings)."""
    rows = NamedSharding(mesh, ROWS)
    one = empty_batch(recipe.crops, recipe.mask, recipe.pairs, 1, min(recipe.dbt_rows, 1))

    def whole(name, x):
        first = recipe.dbt_rows if name.startswith("adjacent") else recipe.batch_size
        return jax.ShapeDtypeStruct((first, *x.shape[1:]), x.dtype, sharding=rows)

    return {name: whole(name, x) for name, x in one.items()}


def jit_step(recipe: Recipe, mesh):
    """`train_step` as it runs: on the mesh, with its state donated."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, mesh))
    return jax.jit(
        functools.partial(train_step, recipe=recipe, mesh=mesh),
        donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())),
    )  # fmt: skip


def start_or_resume(recipe: Recipe, mesh, checkpoints: Checkpoints, loaded: dict | None = None) -> dict:
    """The state to go on from: the newest checkpoint's, else step 0."""
    target = abstract_state(recipe, mesh)
    if checkpoints.latest is None:
        shardings = jax.tree.map(lambda a: a.sharding, target)
        return jax.jit(functools.partial(init_state, recipe), out_shardings=shardings)(loaded)
    return checkpoints.restore(target)


def train(config, workdir: str) -> dict:
    """Train as `config` says, in `workdir`; the same call again resumes from the newest checkpoint.

    Returns the final train state.

    Raises:
      UserError: config, data or workdir do not fit; nothing has been written then.
      FloatingPointError: three steps in a row were not finite.
    """
    config = with_statistics(config)
    recipe, workdir = from_config(config), Path(workdir).absolute()
    check_devices(recipe)
    mesh = make_mesh(recipe.fsdp)
    check_workdir(config, workdir)
    start = max(checkpoint.steps(workdir / "checkpoints"), default=0)
    loaded, seen = starting_point(recipe, workdir, start)
    batches = make_batches(
        recipe.data, recipe.crops, recipe.mask, recipe.pairs,
        batch_size=recipe.batch_size, dbt_rows=recipe.dbt_rows, steps=max(recipe.steps, start),
        seed=recipe.seed, start_step=start,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    every = recipe.run.diagnose_every
    held_out = HeldOut(recipe, mesh) if every else None

    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(_jsonable(config), indent=1))
    logging.info("process %d of %d, devices: %s", jax.process_index(), jax.process_count(), jax.devices())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=recipe.run.keep_checkpoints)
    state, step_fn = start_or_resume(recipe, mesh, checkpoints, loaded), jit_step(recipe, mesh)
    if int(state["step"]) != start:
        raise UserError(
            f"the newest checkpoint holds step {int(state['step'])}, its folder's name says {start}"
        )
    writer = MetricsWriter(workdir, start, recipe, active=jax.process_index() == 0)
    watch = Watch(
        recipe, read(workdir / "metrics.jsonl"), held_out, active=jax.process_index() == 0,
        full=any(full_frames(folder) for folder, *_ in recipe.data.sources),
    )  # fmt: skip
    bad, pending = 0, None

    def settle(step: int, metrics: dict, batch: dict):
        """Read the metrics of a step (after the next one was dispatched) and stop after three bad steps."""
        nonlocal bad
        metrics = watch(step, {k: float(v) for k, v in jax.device_get(metrics).items()})
        writer.write(step, metrics)
        bad = bad + 1 if metrics["bad"] else 0
        if bad == 3:
            folder = checkpoint.dump(workdir / "bad" / str(step), state, batch)
            raise FloatingPointError(
                f"loss or gradients were not finite in steps {step - 2} to {step}; the last batch and the "
                f"state lie in {folder}, checkpoints are as they were: the same command goes on from them"
            )

    with contextlib.closing(batches), contextlib.closing(checkpoints), contextlib.closing(writer):
        for step in range(start, recipe.steps):
            with writer.waiting():
                batch = next(batches)
            if step == 0 and jax.process_index() == 0:
                draw_batch(batch, workdir / "samples", recipe.model.patch_size)
            looked = held_out(state["teacher"]) if every and step % every == 0 else {}  # before the step
            state, metrics = step_fn(state, put_batch(batch, mesh))
            if pending:
                settle(*pending)
            pending = (step, metrics | looked, batch)
            due = (step + 1) % recipe.run.checkpoint_every == 0 or step + 1 == recipe.steps
            if due or bad == 2:  # a third bad step is read before the next one moves the state
                settle(*pending)
                pending = None
            if due:
                checkpoints.save(step + 1, state, seen)
    logging.info("trained to step %d; checkpoints in %s", int(state["step"]), workdir / "checkpoints")
    return state
