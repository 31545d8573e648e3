"""The objective: from a batch to the sum of all loss terms, with the figures that watch them.

B images of a (micro-)batch, V views, L local views, N patches a view, M masked-patch slots, A slice pairs,
D width, K prototypes, S side, C channels.
"""

import jax
import jax.numpy as jnp

from mammodino_jax import losses
from mammodino_jax.augment import photometric, photometric_pairs
from mammodino_jax.model.head import bind
from mammodino_jax.recipe import Recipe
from mammodino_jax.sharding import spread_rows


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
        views["adjacent_offset"] = batch["adjacent_offset"]
    return views


def _encode(net, views_BVSSC, mask=None, key=None, group=0):
    """Backbone on [B, V, S, S, C]: CLS [B, V, D] and patch tokens [B, V*N, D]."""
    B, V = views_BVSSC.shape[:2]
    out = net.backbone(views_BVSSC.reshape(B * V, *views_BVSSC.shape[2:]), mask, key, group * V)
    return out["cls"].reshape(B, V, -1), out["patches"].reshape(B, -1, out["patches"].shape[-1])


def _gather(tokens_BND, index_BM):
    return jnp.take_along_axis(tokens_BND, index_BM[..., None], axis=1)


def _targets(logits_RK, logits_adjacent, patch_logits, weight_R, center, temp, recipe: Recipe):
    """Teacher probabilities of global CLS [R, K], slice-pair CLS (or None) and patches; sums for the centers.

    A center lags one step. Slice pairs move it only with `loss.adjacent_updates_center`.
    """
    c, adjacent = recipe.loss, None
    rows = logits_RK
    if logits_adjacent is not None and c.adjacent_updates_center:
        rows = jnp.concatenate([logits_RK, logits_adjacent])
    sums = {"dino": losses.center_sum(rows), "ibot": losses.center_sum(patch_logits, weight_R)}
    sums = {name: sums[name] for name in center}
    if c.centering == "centering":
        target = losses.center_softmax(logits_RK, center["dino"], temp)
        patch_target = losses.center_softmax(patch_logits, center["ibot"], temp)
    else:
        patch_target = losses.sinkhorn(patch_logits, temp, weight_R)
        joined = logits_adjacent is not None and c.adjacent_sinkhorn
        rows = jnp.concatenate([logits_RK, logits_adjacent]) if joined else logits_RK
        target, adjacent = jnp.split(losses.sinkhorn(rows, temp), [len(logits_RK)])
    if logits_adjacent is not None and "dino" in center:
        adjacent = losses.center_softmax(logits_adjacent, center["dino"], temp)
    return target, adjacent, patch_target, sums


def loss_fn(student: dict, teacher: dict, center: dict, views: dict, key, values: dict, recipe: Recipe):
    """All loss terms of one (micro-)batch.

    Args:
      student, teacher: parameters.
      center: {"dino": [K], "ibot": [K]}; with Sinkhorn-Knopp {}, or "dino" alone for centred slice pairs.
      views: float "global" [B,2,S,S,C] and "local" [B,L,s,s,C], "mask_index" and "mask_weight" [B,M],
        "patient" [B], optionally "adjacent" [A,2,S,S,C] (or [A,1,S,S,C]: teacher only) and "adjacent_offset"
        [A], the place of each pair's distance in pairs.offsets.
      key: drop-path key, or None for none.
      values: of the schedules: "teacher_temp", and "adjacent_weight" where there are slice pairs.

    Returns:
      (loss, ({center: (sum [K], rows)}, metrics)).
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
    both = recipe.pairs.symmetric  # slices k and k +- d teach each other

    # 1. The teacher sees the unmasked global views, and slice k +- d.
    cls_t, patch_t = _encode(net_t, views["global"])
    logits_t = net_t.dino_head(cls_t).reshape(2 * B, -1)
    patch_logits_t = ibot_head_t(_gather(patch_t, index)).reshape(weight.size, -1)
    adjacent_logits_t = None
    if "adjacent" in views:
        adjacent_cls_t, _ = _encode(net_t, views["adjacent"] if both else views["adjacent"][:, -1:])
        A, sides = adjacent_cls_t.shape[:2]
        adjacent_logits_t = net_t.dino_head(adjacent_cls_t).reshape(A * sides, -1)

    # 2. Its targets.
    target, adjacent_target, patch_target, sums = _targets(
        logits_t, adjacent_logits_t, patch_logits_t, weight.ravel(), center, values["teacher_temp"], recipe
    )

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
    spread, dead = losses.prototype_use(target)
    metrics = {
        "dino_global": dino_global,
        "dino_local": dino_local,
        "ibot": ibot,
        "koleo": sum(koleo) / 2,
        "koleo_same_patient": sum(same) / 2,
        "teacher_entropy": losses.entropy(target),
        "teacher_entropy_patch": losses.entropy(patch_target, weight.ravel()),
        "prototype_kl": spread,
        "prototypes_dead": dead,
        "cls_cosine": losses.mean_cosine(cls_t[:, 0]),
        "teacher_distance": 1 - losses.cosine(cls, cls_t).mean(),
    }
    loss = c.dino_weight * (dino_global + dino_local) + c.ibot_weight * ibot + c.koleo_weight * sum(koleo)
    if "adjacent" in views:
        if views["adjacent"].shape[1] == 1:  # reuse: pair i belongs to row i * B / A, view 0
            adjacent_cls = cls[:: B // A, :1]
        else:
            group = min(c.drop_path_group, A)
            seen = views["adjacent"] if both else views["adjacent"][:, :1]
            adjacent_cls, _ = _encode(net, seen, None, keys[2], group)
        adjacent_logits = net.dino_head(adjacent_cls)
        target_ASK = adjacent_target.reshape(A, sides, -1)[:, ::-1]
        metrics["adjacent"] = losses.adjacent_loss(target_ASK, adjacent_logits)
        loss = loss + values["adjacent_weight"] * metrics["adjacent"]
        gap = losses.pair_gap(adjacent_cls[:, 0], adjacent_cls_t[:, -1])
        metrics |= by_offset("pair_gap", gap, views["adjacent_offset"], recipe.pairs)
    return loss, (sums, {"loss": loss, **metrics})


def by_offset(name: str, value_A, offset_A, pairs) -> dict:
    """{"<name>/<d>": mean over the pairs at distance d}; NaN where the batch has none."""
    return {
        f"{name}/{d:g}{'mm' if pairs.unit == 'mm' else ''}": jnp.mean(value_A, where=offset_A == i)
        for i, d in enumerate(pairs.offsets)
    }


def watch_pixels(batch: dict, recipe: Recipe) -> dict:
    """Figures of the uint8 crops: contrast within the tissue (grey levels), likeness of slice pairs."""
    crops, tissue = batch["global_crops"].astype(jnp.float32), batch["global_crops"] > 0
    metrics = {"contrast": jnp.nanmean(jnp.std(crops, axis=(2, 3), where=tissue))}
    if "adjacent_crops" not in batch:
        return metrics
    other = batch["adjacent_crops"][:, -1]
    if recipe.pairs.mode == "reuse":
        one = batch["global_crops"][:: batch["global_crops"].shape[0] // other.shape[0], 0]
    else:
        one = batch["adjacent_crops"][:, 0]
    ncc, shift = losses.compare_pairs(one, other)
    by_distance = by_offset("pair_ncc", ncc, batch["adjacent_offset"], recipe.pairs)
    return metrics | {"pair_ncc": jnp.nanmean(ncc), "pair_shift": jnp.nanmean(shift), **by_distance}


def move_centers(center: dict, sums: dict) -> dict:
    """The centers of the next step, from the teacher's logits of this one."""
    return {name: losses.update_center(center[name], *sums[name]) for name in center}


def gradients(state: dict, batch: dict, key, values: dict, recipe: Recipe, mesh=None):
    """Gradients, new centers and metrics of a uint8 batch, in `recipe.accumulate` micro-batches.

    Micro-batch m holds rows m * B/n to (m + 1) * B/n - 1. All of them see the centers of the step's start, so
    n micro-batches equal one batch of n times the size where nothing couples images but the centers
    (centering, no drop-path, `koleo_group` a micro-batch).
    """
    step = jax.value_and_grad(loss_fn, has_aux=True)

    def one(micro, key):
        views = make_views(micro, recipe)
        (_, (sums, metrics)), grads = step(
            state["student"], state["teacher"], state["center"], views, key, values, recipe
        )
        return grads, sums, metrics | watch_pixels(micro, recipe)

    n = recipe.accumulate
    if n == 1:
        grads, sums, metrics = one(batch, key)
    else:
        needed = {k: v for k, v in batch.items() if not k.startswith("count/")}
        micro = spread_rows({k: v.reshape(n, -1, *v.shape[1:]) for k, v in needed.items()}, mesh)
        keys = None if key is None else jax.random.split(key, n)

        def add(total, xs):
            grads, sums, metrics = one(*xs)
            return jax.tree.map(jnp.add, total, (grads, sums)), metrics

        shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], (micro, keys)))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        (grads, sums), metrics = jax.lax.scan(add, zero, (micro, keys))
        grads = jax.tree.map(lambda g: g / n, grads)
        means = {True: jnp.nanmean, False: jnp.mean}  # a micro-batch may lack pairs at some distance
        metrics = {name: means[name.startswith("pair_")](v) for name, v in metrics.items()}
    return grads, move_centers(state["center"], sums), metrics
