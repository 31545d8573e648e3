"""Pretraining: a pure train step, and one linear `train()`.

B images a global batch, V views, L local views, N patches a view, M masked-patch slots, A slice pairs,
D width, K prototypes, S side, C channels.
"""

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

from mammodino_jax import checkpoint, losses, provenance
from mammodino_jax.augment import photometric, photometric_pairs
from mammodino_jax.checkpoint import Checkpoints
from mammodino_jax.data.pipeline import make_batches
from mammodino_jax.errors import UserError
from mammodino_jax.metrics import MetricsWriter
from mammodino_jax.model.head import bind, init_params
from mammodino_jax.optimizer import adam, adamw_update, clip_by_module
from mammodino_jax.pictures import draw_batch
from mammodino_jax.recipe import Recipe, check_devices, from_config
from mammodino_jax.schedules import Cosine, scaled_lr
from mammodino_jax.sharding import make_mesh, put_batch, state_shardings


def init_state(recipe: Recipe) -> dict:
    """The train state at step 0: plain dicts of arrays, the teacher equal to the student, no random state."""
    student = init_params(recipe.model, recipe.head, recipe.seed)
    center = {}
    if recipe.loss.centering == "centering":
        center = {name: jnp.zeros(recipe.head.prototypes) for name in ("dino", "ibot")}
    teacher = jax.tree.map(jnp.copy, student)
    opt = adam(recipe.optim).init(student)
    return {"step": jnp.int32(0), "student": student, "teacher": teacher, "opt": opt, "center": center}


def schedule(recipe: Recipe, step) -> dict:
    """Values of all schedules at a step (int or traced)."""
    c, total = recipe.optim, recipe.steps
    peak = scaled_lr(c.base_lr, recipe.batch_size)
    lr = Cosine(peak, c.final_lr, total, c.warmup_steps)(step)
    temp = Cosine(c.teacher_temp, c.teacher_temp, total, c.warmup_teacher_temp_steps, c.warmup_teacher_temp)
    return {
        "lr": lr,
        "last_layer_lr": lr * (step >= c.freeze_last_layer_steps),
        "weight_decay": Cosine(c.weight_decay, c.final_weight_decay, total)(step),
        "momentum": Cosine(c.momentum, c.final_momentum, total)(step),
        "teacher_temp": temp(step),
    }


def make_views(batch: dict, recipe: Recipe) -> dict:
    """Augmented, normalised float views of a uint8 batch; draws depend on (seed, sample, view) alone."""
    c, channels = recipe.augment, recipe.model.channels
    key = jax.random.key(recipe.seed)
    views = {
        "global": photometric(batch["global_crops"], batch["sample"], key, c, channels, first_view=0),
        "local": photometric(batch["local_crops"], batch["sample"], key, c, channels, first_view=2),
        **{name: batch[name] for name in ("mask_index", "mask_weight", "patient")},
    }
    if "adjacent_crops" in batch:
        pairs = batch["adjacent_crops"].shape[0]
        sample = batch["sample"][:: batch["sample"].shape[0] // pairs]
        views["adjacent"] = photometric_pairs(
            batch["adjacent_crops"], sample, jax.random.fold_in(key, 1), c, channels
        )
    return views


def _encode(net, views_BVSSC, mask=None, key=None, group=0):
    """Backbone on [B, V, S, S, C]: CLS [B, V, D] and patch tokens [B, V*N, D]."""
    B, V = views_BVSSC.shape[:2]
    out = net.backbone(views_BVSSC.reshape(B * V, *views_BVSSC.shape[2:]), mask, key, group * V)
    return out["cls"].reshape(B, V, -1), out["patches"].reshape(B, -1, out["patches"].shape[-1])


def _gather(tokens_BND, index_BM):
    return jnp.take_along_axis(tokens_BND, index_BM[..., None], axis=1)


def loss_fn(student: dict, teacher: dict, center: dict, views: dict, key, teacher_temp, recipe: Recipe):
    """All loss terms of one batch.

    Args:
      student, teacher: parameters.
      center: {"dino": [K], "ibot": [K]}, or {} with Sinkhorn-Knopp.
      views: float "global" [B,2,S,S,C] and "local" [B,L,s,s,C], "mask_index" and "mask_weight" [B,M],
        "patient" [B], optionally "adjacent" [A,2,S,S,C] (or [A,1,S,S,C]: teacher only).
      key: drop-path key, or None for none.

    Returns:
      (loss, (new center, metrics)).
    """
    c = recipe.loss
    net = bind(student, recipe.model, recipe.head)
    net_t = bind(teacher, recipe.model, recipe.head)
    ibot_head, ibot_head_t = (getattr(n, "ibot_head", n.dino_head) for n in (net, net_t))
    index, weight = views["mask_index"], views["mask_weight"]
    B, S = views["global"].shape[0], views["global"].shape[2]
    patches = (S // recipe.model.patch_size) ** 2
    masked = jax.vmap(lambda i, w: jnp.zeros(2 * patches, bool).at[i].max(w > 0))(index, weight)
    keys = (None, None, None) if key is None else jax.random.split(key, 3)

    # 1. The teacher sees the unmasked global views.
    cls_t, patch_t = _encode(net_t, views["global"])
    logits_t = net_t.dino_head(cls_t).reshape(2 * B, -1)
    patch_logits_t = ibot_head_t(_gather(patch_t, index)).reshape(weight.size, -1)
    adjacent_logits_t = None
    if "adjacent" in views:
        adjacent_logits_t = net_t.dino_head(_encode(net_t, views["adjacent"][:, -1:])[0][:, 0])

    # 2. Its targets; a center lags one step, and slice pairs do not move it.
    if c.centering == "centering":
        target = losses.center_softmax(logits_t, center["dino"], teacher_temp)
        patch_target = losses.center_softmax(patch_logits_t, center["ibot"], teacher_temp)
        if adjacent_logits_t is not None:
            adjacent_target = losses.center_softmax(adjacent_logits_t, center["dino"], teacher_temp)
        center = {
            "dino": losses.update_center(center["dino"], logits_t),
            "ibot": losses.update_center(center["ibot"], patch_logits_t, weight.ravel()),
        }
    else:
        rows = logits_t if adjacent_logits_t is None else jnp.concatenate([logits_t, adjacent_logits_t])
        target, adjacent_target = jnp.split(losses.sinkhorn(rows, teacher_temp), [2 * B])
        patch_target = losses.sinkhorn(patch_logits_t, teacher_temp, weight.ravel())

    # 3. The student sees masked global views and all local views.
    mask = masked.reshape(B * 2, patches)
    cls, patch = _encode(net, views["global"], mask, keys[0], c.drop_path_group)
    cls_local, _ = _encode(net, views["local"], None, keys[1], c.drop_path_group)
    logits, logits_local = net.dino_head(cls), net.dino_head(cls_local)
    patch_logits = ibot_head(_gather(patch, index))

    # 4. The terms.
    dino_global, dino_local = losses.dino_loss(target.reshape(B, 2, -1), logits, logits_local)
    ibot = losses.ibot_loss(patch_target.reshape(*weight.shape, -1), patch_logits, weight)
    koleo, same = zip(
        *(losses.koleo_loss(cls[:, v], c.koleo_group, views["patient"]) for v in (0, 1)), strict=True
    )
    metrics = {
        "dino_global": dino_global,
        "dino_local": dino_local,
        "ibot": ibot,
        "koleo": sum(koleo) / 2,
        "koleo_same_patient": sum(same) / 2,
        "teacher_entropy": losses.entropy(target),
        "teacher_entropy_patch": losses.entropy(patch_target, weight.ravel()),
    }
    loss = c.dino_weight * (dino_global + dino_local) + c.ibot_weight * ibot + c.koleo_weight * sum(koleo)
    if "adjacent" in views:
        pairs = views["adjacent"].shape[0]
        if views["adjacent"].shape[1] == 1:  # reuse: pair i belongs to row i * B / A, view 0
            logits_adjacent = logits[:: B // pairs, 0]
        else:
            group = min(c.drop_path_group, pairs)
            cls_adjacent, _ = _encode(net, views["adjacent"][:, :1], None, keys[2], group)
            logits_adjacent = net.dino_head(cls_adjacent[:, 0])
        metrics["adjacent"] = losses.adjacent_loss(adjacent_target, logits_adjacent)
        loss = loss + c.adjacent_weight * metrics["adjacent"]
    return loss, (center, {"loss": loss, **metrics})


def apply_gradients(
    state: dict, grads: dict, center: dict, values: dict, recipe: Recipe
) -> tuple[dict, dict]:
    """AdamW on the student, then the teacher's moving average with this step's momentum.

    Returns (new state, {sub-module: gradient norm before clipping}).
    """
    grads, norms = clip_by_module(grads, recipe.optim.clip)
    student, opt = adamw_update(
        state["student"], grads, state["opt"], recipe.optim, recipe.model.depth,
        lr=values["lr"], last_layer_lr=values["last_layer_lr"], weight_decay=values["weight_decay"],
    )  # fmt: skip
    teacher = optax.incremental_update(student, state["teacher"], 1 - values["momentum"])
    step = state["step"] + 1
    return {"step": step, "student": student, "teacher": teacher, "opt": opt, "center": center}, norms


def train_step(state: dict, batch: dict, *, recipe: Recipe) -> tuple[dict, dict]:
    """One step on a uint8 batch; one that is not finite keeps all but the step number (metric `bad`)."""
    step = state["step"]
    values = schedule(recipe, step)
    # drop-path draws by step; photometrics by sample (make_views), so neither depends on the device count
    key = jax.random.fold_in(jax.random.key(recipe.seed + 1), step) if recipe.model.drop_path else None
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (center, metrics)), grads = gradient(
        state["student"], state["teacher"], state["center"], make_views(batch, recipe), key,
        values["teacher_temp"], recipe,
    )  # fmt: skip
    new, norms = apply_gradients(state, grads, center, values, recipe)
    finite = jnp.isfinite(loss)
    for norm in norms.values():
        finite &= jnp.isfinite(norm)
    kept = {"step": new["step"], **{k: v for k, v in state.items() if k != "step"}}
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
    metrics |= {
        f"data/{k.removeprefix('count/')}": jnp.nanmean(v) for k, v in batch.items() if k.startswith("count/")
    }
    return new, {**metrics, **values, "bad": 1.0 - finite.astype(jnp.float32)}


def check_workdir(config, workdir: Path) -> None:
    """Raise a UserError where the workdir belongs to another config (`run` and data workers may differ)."""
    path = workdir / "config.json"
    if not path.exists():
        return
    there, here = (dict(_flatten(c)) for c in (json.loads(path.read_text()), _jsonable(config)))
    free = ("run.", "data.workers", "data.threads", "fsdp", "model.remat")
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


def start_or_resume(recipe: Recipe, mesh, checkpoints: Checkpoints):
    """The state to go on from (the newest checkpoint's, else step 0) and the compiled train step."""
    abstract = jax.eval_shape(functools.partial(init_state, recipe))
    shardings = state_shardings(abstract, mesh)
    replicated = NamedSharding(mesh, P())
    step_fn = jax.jit(
        functools.partial(train_step, recipe=recipe), donate_argnums=0, out_shardings=(shardings, replicated)
    )
    if checkpoints.latest is None:
        return jax.jit(functools.partial(init_state, recipe), out_shardings=shardings)(), step_fn
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    return checkpoints.restore(target), step_fn


def train(config, workdir: str) -> dict:
    """Train as `config` says, in `workdir`; the same call again resumes from the newest checkpoint.

    Returns the final train state.

    Raises:
      UserError: config, data or workdir do not fit; nothing has been written then.
      FloatingPointError: three steps in a row were not finite.
    """
    recipe, workdir = from_config(config), Path(workdir).absolute()
    check_devices(recipe)
    mesh = make_mesh(recipe.fsdp)
    check_workdir(config, workdir)
    seen = provenance.collect(recipe.data)
    start = max(checkpoint.steps(workdir / "checkpoints"), default=0)
    batches = make_batches(
        recipe.data, recipe.crops, recipe.mask, recipe.pairs,
        batch_size=recipe.batch_size, dbt_rows=recipe.dbt_rows, steps=max(recipe.steps, start),
        seed=recipe.seed, start_step=start,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip

    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(json.dumps(_jsonable(config), indent=1))
    logging.info("process %d of %d, devices: %s", jax.process_index(), jax.process_count(), jax.devices())
    checkpoints = Checkpoints(workdir / "checkpoints", keep=recipe.run.keep_checkpoints)
    state, step_fn = start_or_resume(recipe, mesh, checkpoints)
    if int(state["step"]) != start:
        raise UserError(
            f"the newest checkpoint holds step {int(state['step'])}, its folder's name says {start}"
        )
    writer = MetricsWriter(workdir, start, recipe, active=jax.process_index() == 0)
    bad, pending = 0, None

    def settle(step: int, metrics: dict):
        """Read the metrics of a step (after the next one was dispatched) and stop after three bad steps."""
        nonlocal bad
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        writer.write(step, metrics)
        bad = bad + 1 if metrics["bad"] else 0
        if bad == 3:
            raise FloatingPointError(f"loss or gradients were not finite in steps {step - 2} to {step}")

    with contextlib.closing(batches), contextlib.closing(checkpoints), contextlib.closing(writer):
        for step in range(start, recipe.steps):
            with writer.waiting():
                batch = next(batches)
            if step == 0 and jax.process_index() == 0:
                draw_batch(batch, workdir / "samples", recipe.model.patch_size)
            state, metrics = step_fn(state, put_batch(batch, mesh))
            if pending:
                settle(*pending)
            pending = (step, metrics)
            if (step + 1) % recipe.run.checkpoint_every == 0 or step + 1 == recipe.steps:
                settle(*pending)
                pending = None
                checkpoints.save(step + 1, state, seen)
    logging.info("trained to step %d; checkpoints in %s", int(state["step"]), workdir / "checkpoints")
    return state
