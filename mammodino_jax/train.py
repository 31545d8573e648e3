"""Pretraining: a pure train step, and one linear `train()`."""

import contextlib
import functools
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
from mammodino_jax.compile_cache import compile_cache
from mammodino_jax.convert.pretrained import load_pretrained, merge
from mammodino_jax.data.index import full_frames
from mammodino_jax.data.pipeline import empty_batch, make_batches
from mammodino_jax.data.statistics import tissue_statistics
from mammodino_jax.diagnostics import Watch
from mammodino_jax.errors import UserError, refuse_bucket
from mammodino_jax.held_out import HeldOut
from mammodino_jax.metrics import MetricsWriter, read
from mammodino_jax.model.head import init_params
from mammodino_jax.objective import gradients
from mammodino_jax.optimizer import adam, adamw_update, clip_by_module
from mammodino_jax.pictures import draw_batch
from mammodino_jax.preemption import preemption
from mammodino_jax.profiling import Profile, steps_of
from mammodino_jax.recipe import Recipe, check_devices, from_config
from mammodino_jax.schedules import Cosine, scaled_lr
from mammodino_jax.sharding import ROWS, make_mesh, put_batch, state_shardings
from mammodino_jax.workdir import check_workdir, claim_workdir


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


def starting_point(recipe: Recipe, saved: dict | None) -> tuple[dict | None, dict]:
    """Parameters to start from (None: random ones, or a checkpoint's), and the provenance of the run.

    `saved` is the provenance of the checkpoint that the run goes on from; None: it starts.
    """
    c, look, seen = recipe.init, recipe.augment, provenance.collect(recipe.data)
    if saved is not None:
        return None, provenance.join(seen, saved)
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


def fresh_state(recipe: Recipe, mesh, loaded: dict | None = None) -> dict:
    """`init_state`, laid over a mesh."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, mesh))
    return jax.jit(functools.partial(init_state, recipe), out_shardings=shardings)(loaded)


def train(config, workdir: str) -> dict:
    """Train as `config` says, in `workdir`; the same call again resumes from the newest checkpoint.

    On SIGTERM the state is saved at the end of the running step. Returns the last train state.

    Raises:
      UserError: config, data or workdir do not fit (nothing has been written then), no checkpoint can be
        read, a record cannot be read, or the last state cannot be saved.
      DataError: a data worker was killed, or failed otherwise.
      FloatingPointError: three steps in a row were not finite.
    """
    refuse_bucket(workdir, "workdir")
    config = with_statistics(config)
    recipe, workdir = from_config(config), Path(workdir).absolute()
    check_devices(recipe)
    mesh = make_mesh(recipe.fsdp)
    check_workdir(config, workdir)
    start, state, saved = checkpoint.restore(workdir / "checkpoints", abstract_state(recipe, mesh))
    loaded, seen = starting_point(recipe, saved)
    batches = make_batches(
        recipe.data, recipe.crops, recipe.mask, recipe.pairs,
        batch_size=recipe.batch_size, dbt_rows=recipe.dbt_rows, steps=max(recipe.steps, start),
        seed=recipe.seed, start_step=start,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    every = recipe.run.diagnose_every
    held_out = HeldOut(recipe, mesh) if every else None

    claim_workdir(config, workdir)
    first_process = jax.process_index() == 0
    checkpoints = Checkpoints(workdir / "checkpoints", keep=recipe.run.keep_checkpoints)
    profile = Profile(workdir / "profile", steps_of(recipe.profile_steps) if first_process else range(0))
    writer = MetricsWriter(workdir, start, recipe, active=first_process)
    watch = Watch(
        recipe, read(workdir / "metrics.jsonl"), held_out, active=first_process,
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
            folder = workdir / "bad" / str(step)
            try:
                checkpoint.dump(folder, state, batch)
                told = f"lie in {folder}"
            except Exception as error:  # a full disk; whatever it is must not hide why the run stops
                logging.warning("%s could not be written: %s", folder, error)
                told = "could not be written"
            raise FloatingPointError(
                f"loss or gradients were not finite in steps {step - 2} to {step}; the last batch and the "
                f"state {told}, checkpoints are as they were: the same command goes on from them"
            )

    with contextlib.ExitStack() as stack:
        preempted = stack.enter_context(preemption())  # undone last: a second SIGTERM interrupts no closing
        for used in (batches, checkpoints, writer, profile):
            stack.enter_context(contextlib.closing(used))
        stack.enter_context(compile_cache(workdir / "compile_cache"))
        logging.info("jax %s, %d processes, devices: %s", jax.__version__, jax.process_count(), jax.devices())
        state, step_fn = state or fresh_state(recipe, mesh, loaded), jit_step(recipe, mesh)
        for step in range(start, recipe.steps):
            with writer.waiting():
                batch = next(batches)
            if step == 0 and first_process:
                draw_batch(batch, workdir / "samples", recipe.model.patch_size)
            looked = held_out(state["teacher"]) if every and step % every == 0 else {}  # before the step
            state, metrics = profile(step, step_fn, state, put_batch(batch, mesh))
            if pending:
                settle(*pending)
            pending = (step, metrics | looked, batch)
            stop = preempted()
            due = stop or (step + 1) % recipe.run.checkpoint_every == 0 or step + 1 == recipe.steps
            if due and checkpoints.wait():  # the save before has failed
                pending[1]["checkpoint_failed"] = 1.0
            if due or bad == 2:  # a third bad step is read before the next one moves the state
                settle(*pending)
                pending = None
            if due:  # with the metrics up to here on disk: on resuming, those of later steps are dropped
                checkpoints.save(step + 1, state, seen, first=writer.flush)
            if stop or (due and preempted()):  # told while saving: there is no need for another step
                break
        step = int(state["step"])
        if reason := checkpoints.wait():
            raise UserError(
                f"the state of step {step} could not be saved ({reason}); make room under {workdir}: the "
                "same command goes on from the newest checkpoint"
            )
    if step < recipe.steps:
        logging.info("SIGTERM: stopped at step %d, which is saved; the same command resumes", step)
    else:
        logging.info("trained to step %d; checkpoints in %s", step, workdir / "checkpoints")
    return state
