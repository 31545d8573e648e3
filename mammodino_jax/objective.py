"""The objective: from a batch to the sum of all loss terms, with the figures that watch them.

B images of a (micro-)batch, V views, L local views, N patches a view, M masked-patch slots, A slice pairs,
D width, K prototypes, S side, C channels, G blocks of images with their slice pair (_join).
"""

import jax
import jax.numpy as jnp

from mammodino_jax import losses
from mammodino_jax.augment import photometric, photometric_pairs
from mammodino_jax.model.head import bind
from mammodino_jax.patch_loss import patch_loss
from mammodino_jax.recipe import Recipe
from mammodino_jax.sharding import gathered, spread_rows


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


def _join(global_BVSSC, adjacent_ASSSC=None):
    """Global views and slice pairs as [G, V, S, S, C], for one call of the backbone.

    Without pairs G = B and V = 2. With them pair i joins its B/A images: G = A, V = 2B/A + sides. A device
    holds whole blocks of this kind: nothing is sent. All views have the side S.
    """
    if adjacent_ASSSC is None:
        return global_BVSSC
    A = adjacent_ASSSC.shape[0]
    return jnp.concatenate([global_BVSSC.reshape(A, -1, *global_BVSSC.shape[2:]), adjacent_ASSSC], axis=1)


def _part(x_GVX, B: int):
    """What _join joined, of features: of the global views [B, 2, ...] and of the pairs [A, sides, ...]."""
    views = 2 * B // x_GVX.shape[0]
    return x_GVX[:, :views].reshape(B, 2, *x_GVX.shape[2:]), x_GVX[:, views:]


def _encode(net, views_GVSSC, mesh, mask=None, key=None, group: int = 0):
    """Backbone on [G, V, S, S, C]: CLS [G, V, D], patches [G, V, N, D]; `group` views drop paths together."""
    G, V = views_GVSSC.shape[:2]
    out = net.backbone(views_GVSSC.reshape(G * V, *views_GVSSC.shape[2:]), mask, key, group, mesh=mesh)
    return tuple(out[name].reshape(G, V, *out[name].shape[1:]) for name in ("cls", "patches"))


def _gather(tokens_BVND, index_BM):
    tokens_BND = tokens_BVND.reshape(tokens_BVND.shape[0], -1, tokens_BVND.shape[-1])
    return jnp.take_along_axis(tokens_BND, index_BM[..., None], axis=1)


def _whole(params: dict, mesh) -> dict:
    """All parameters gathered but the blocks': the backbone gathers these one by one."""
    backbone = {k: v if k == "blocks" else gathered(v, mesh) for k, v in params["backbone"].items()}
    return {**gathered({k: v for k, v in params.items() if k != "backbone"}, mesh), "backbone": backbone}


def _targets(logits_B2K, logits_ASK, center, temp, c):
    """Teacher probabilities of the global CLS [B, 2, K] and of the pairs' [A, sides, K] (or None).

    `c` is the LossConfig.
    """
    B, K, adjacent = logits_B2K.shape[0], logits_B2K.shape[-1], None
    if c.centering == "centering":
        target = losses.center_softmax(logits_B2K, center["dino"], temp)
    elif logits_ASK is not None and c.adjacent_sinkhorn:
        joined_GVK = _join(logits_B2K, logits_ASK)
        target, adjacent = _part(
            losses.sinkhorn(joined_GVK.reshape(-1, K), temp).reshape(joined_GVK.shape), B
        )
    else:
        target = losses.sinkhorn(logits_B2K.reshape(-1, K), temp).reshape(logits_B2K.shape)
    if logits_ASK is not None and "dino" in center:
        adjacent = losses.center_softmax(logits_ASK, center["dino"], temp)
    return target, adjacent


def loss_fn(
    student: dict, teacher: dict, center: dict, views: dict, key, values: dict, recipe: Recipe, mesh=None
):
    """All loss terms of one (micro-)batch.

    Args:
      student, teacher: parameters.
      center: {"dino": [K], "ibot": [K]}; with Sinkhorn-Knopp {}, or "dino" alone for centred slice pairs.
      views: float "global" [B,2,S,S,C] and "local" [B,L,s,s,C], "mask_index" and "mask_weight" [B,M],
        "patient" [B], optionally "adjacent" [A,2,S,S,C] (or [A,1,S,S,C]: teacher only) and "adjacent_offset"
        [A], the place of each pair's distance in pairs.offsets.
      key: drop-path key, or None for none.
      values: of the schedules: "teacher_temp", and "adjacent_weight" where there are slice pairs.
      mesh: that the views lie on; None: one device.

    Returns:
      (loss, ({center: (sum [K], rows)}, metrics)).
    """
    c = recipe.loss
    net, net_t = (bind(_whole(p, mesh), recipe.model, recipe.head) for p in (student, teacher))
    ibot_head, ibot_head_t = (getattr(n, "ibot_head", n.dino_head) for n in (net, net_t))
    index, weight = views["mask_index"], views["mask_weight"]
    B, _, S = views["global"].shape[:3]
    patches = (S // recipe.model.patch_size) ** 2
    masked = jax.vmap(lambda i, w: jnp.zeros(2 * patches, bool).at[i].max(w > 0))(index, weight)
    keys = (None, None) if key is None else jax.random.split(key)
    seen = seen_t = views.get("adjacent")
    # one view: the student's is global view 0 of row i * B/A
    reuse = seen is not None and seen.shape[1] == 1
    if seen is not None and not recipe.pairs.symmetric:  # else slices k and k +- d teach each other
        seen, seen_t = (None if reuse else seen[:, :1]), seen[:, -1:]

    # 1. The teacher sees the unmasked global views, and slice k +- d; its targets.
    joined_t = _join(views["global"], seen_t)
    cls_GVD, patch_GVND = _encode(net_t, joined_t, mesh)
    cls_t, adjacent_cls_t = _part(cls_GVD, B)
    logits_t, adjacent_logits_t = _part(net_t.dino_head(cls_GVD), B)
    adjacent_logits_t = None if seen_t is None else adjacent_logits_t
    tokens_t = _gather(_part(patch_GVND, B)[0], index)
    target, adjacent_target = _targets(logits_t, adjacent_logits_t, center, values["teacher_temp"], c)

    # 2. The student sees masked global views, slice k, and all local views.
    joined = _join(views["global"], seen)
    mask = masked.reshape(B, 2, patches)
    if seen is not None:
        mask = _join(mask, jnp.zeros((*seen.shape[:2], patches), bool))
    group = c.drop_path_group * joined.shape[0] * joined.shape[1] // B  # views of drop_path_group images
    cls_GVD, patch_GVND = _encode(net, joined, mesh, mask.reshape(-1, patches), keys[0], group)
    cls_local, _ = _encode(
        net, views["local"], mesh, None, keys[1], c.drop_path_group * views["local"].shape[1]
    )
    cls, adjacent_cls = _part(cls_GVD, B)
    logits, adjacent_logits = _part(net.dino_head(cls_GVD), B)
    logits_local = net.dino_head(cls_local)
    tokens = _gather(_part(patch_GVND, B)[0], index)

    # 3. The terms.
    dino_global, dino_local = losses.dino_loss(target, logits, logits_local)
    ibot, of_patches = patch_loss(
        ibot_head, ibot_head_t, tokens, tokens_t, weight, center.get("ibot"), values["teacher_temp"],
        chunk=c.patch_chunk, mesh=mesh,
    )  # fmt: skip
    koleo, same = zip(
        *(losses.koleo_loss(cls[:, v], c.koleo_group, views["patient"]) for v in (0, 1)), strict=True
    )
    spread, dead = losses.prototype_use(target.reshape(-1, target.shape[-1]))
    metrics = {
        "dino_global": dino_global,
        "dino_local": dino_local,
        "ibot": ibot,
        "koleo": sum(koleo) / 2,
        "koleo_same_patient": sum(same) / 2,
        "teacher_entropy": losses.entropy(target),
        "teacher_entropy_patch": of_patches["entropy"],
        "prototype_kl": spread,
        "prototypes_dead": dead,
        "cls_cosine": losses.mean_cosine(cls_t[:, 0]),
        "teacher_distance": 1 - losses.cosine(cls, cls_t).mean(),
    }
    loss = c.dino_weight * (dino_global + dino_local) + c.ibot_weight * ibot + c.koleo_weight * sum(koleo)
    if seen_t is not None:
        A = len(seen_t)
        if reuse:
            adjacent_cls, adjacent_logits = (x[:: B // A, :1] for x in (cls, logits))
        metrics["adjacent"] = losses.adjacent_loss(adjacent_target[:, ::-1], adjacent_logits)
        loss = loss + values["adjacent_weight"] * metrics["adjacent"]
        gap = losses.pair_gap(adjacent_cls[:, 0], adjacent_cls_t[:, -1])
        metrics |= by_offset("pair_gap", gap, views["adjacent_offset"], recipe.pairs)
    # 4. What moves the centers, which lag one step; slice pairs do only with loss.adjacent_updates_center.
    drag = seen_t is not None and c.adjacent_updates_center
    rows = _join(logits_t, adjacent_logits_t) if drag else logits_t
    sums = {
        "dino": losses.center_sum(rows.reshape(-1, rows.shape[-1])),
        "ibot": (of_patches["sum"], of_patches["rows"]),
    }
    return loss, ({name: sums[name] for name in center}, {"loss": loss, **metrics})


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
            state["student"], state["teacher"], state["center"], views, key, values, recipe, mesh
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
