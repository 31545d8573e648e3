"""What the golden step does not show of the objective: micro-batches, slice pairs, their centers and weights."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nano
from mammodino_jax import losses
from mammodino_jax.errors import UserError
from mammodino_jax.objective import gradients, loss_fn, make_views
from mammodino_jax.recipe import from_config
from mammodino_jax.train import init_state, schedule, train_step

B, A, PATCHES = 8, 4, 9
OF_A_BATCH = ("prototype_kl", "prototypes_dead", "cls_cosine", "teacher_entropy_patch")  # not means over rows


def recipe(**changes):
    """One block of width 32 on 42-px views: compiles in seconds."""
    c = nano.get_config("none")
    c.batch_size, c.dbt_rows, c.steps = B, A, 20
    c.crops.update(global_size=42, local_size=14, local_number=1)
    c.model.update(dim=32, depth=1, heads=2)
    c.head.update(prototypes=48, bottleneck=16, hidden=32)
    c.optim.update(warmup_steps=0, freeze_last_layer_steps=0)
    c.augment.update(jitter_prob=0.0, blur_prob=(0.0,) * 3)
    c.update(changes)
    return from_config(c)


def uint8_batch(pair_views=2):
    rng = np.random.default_rng(0)

    def u8(*shape):
        return rng.integers(1, 256, shape, dtype=np.uint8)

    weight = np.zeros((B, 4), np.float32)
    for row, count in enumerate(rng.integers(1, 5, B)):
        weight[row, :count] = 1 / count
    return {
        "global_crops": u8(B, 2, 42, 42), "local_crops": u8(B, 1, 14, 14),
        "mask_index": np.stack([rng.permutation(2 * PATCHES)[:4] for _ in range(B)]).astype(np.int32),
        "mask_weight": weight, "sample": np.arange(B, dtype=np.int32), "patient": np.arange(B, dtype=np.int32),
        "adjacent_crops": u8(A, pair_views, 42, 42),
        "adjacent_gap_mm": np.ones(A, np.float32), "adjacent_offset": np.array([0, 1, 1, 0], np.int32),
    }  # fmt: skip


def random_state(r):
    """A state whose teacher and centers differ from their start, so that nothing is equal by chance."""
    state = init_state(r)
    other = init_state(dataclasses.replace(r, seed=1))["student"]
    center = {k: 0.1 * jax.random.normal(jax.random.key(3), v.shape) for k, v in state["center"].items()}
    return {**state, "teacher": other, "center": center}


def run(r, batch, state=None):
    """Gradients, centers and metrics of a batch."""
    state = random_state(r) if state is None else state
    step = jax.jit(lambda s, b: gradients(s, b, None, schedule(r, 3), r))
    return step(state, batch)


@pytest.mark.parametrize("mode", ["dedicated", "reuse"])
def test_two_micro_batches_equal_one_step_of_the_double_batch(mode):
    """Centering, no drop-path, KoLeo within a micro-batch, the same masks: to 1e-5."""
    batch = uint8_batch(2 if mode == "dedicated" else 1)
    changes = {"loss": {"centering": "centering", "koleo_group": 4}, "pairs": {"mode": mode}}
    one, two = (recipe(**changes, accumulate=n) for n in (1, 2))
    (g1, c1, m1), (g2, c2, m2) = run(one, batch), run(two, batch)
    for name in m1:
        if name not in OF_A_BATCH and "pair_gap" not in name:
            np.testing.assert_allclose(m2[name], m1[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves((g1, c1)), jax.tree.leaves((g2, c2)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()) + 1e-12)
    # it could fail: a KoLeo over all rows is another loss
    assert float(run(recipe(**changes | {"loss": {"centering": "centering"}}), batch)[2]["koleo"]) != pytest.approx(float(m1["koleo"]), rel=1e-3)  # fmt: skip


@pytest.mark.slow
def test_symmetric_pairs_are_the_mean_of_both_directions():
    batch = uint8_batch()
    turned = batch | {"adjacent_crops": batch["adjacent_crops"][:, ::-1]}
    changes = {"augment": {"adjacent_jitter": 0.0}, "loss": {"centering": "centering"}}
    one = recipe(**changes)
    there, back = (float(run(one, b)[2]["adjacent"]) for b in (batch, turned))
    both = float(run(recipe(**changes, pairs={"symmetric": True}), batch)[2]["adjacent"])
    assert there != pytest.approx(back, rel=1e-4) and both == pytest.approx((there + back) / 2, rel=1e-5)
    with pytest.raises(UserError, match="symmetric"):
        recipe(pairs={"symmetric": True, "mode": "reuse"})


def targets(r, monkeypatch):
    """The targets that the loss terms receive: global CLS [B, 2, K] and pairs [A, 1, K]."""
    seen = {}
    for name in ("dino_loss", "adjacent_loss"):
        original = getattr(losses, name)

        def spy(target, *rest, name=name, original=original):
            jax.debug.callback(lambda t: seen.update({name: np.asarray(t)}), target)
            return original(target, *rest)

        monkeypatch.setattr(losses, name, spy)
    jax.block_until_ready(run(r, uint8_batch()))
    jax.effects_barrier()
    monkeypatch.undo()
    return seen["dino_loss"], seen["adjacent_loss"]


@pytest.mark.slow
def test_sinkhorn_joins_the_pairs_rows_or_centres_them_only(monkeypatch):
    joined, centred, without = (
        recipe(loss={"centering": "sinkhorn", "adjacent_sinkhorn": j}, pairs={"mode": m})
        for j, m in ((True, "dedicated"), (False, "dedicated"), (True, "none"))
    )
    assert init_state(joined)["center"] == {} and set(init_state(centred)["center"]) == {"dino"}
    rows, pairs = targets(joined, monkeypatch)
    # three rounds: columns are nearly balanced over all rows together, not over the global rows alone
    every = np.concatenate([rows.reshape(2 * B, -1), pairs.reshape(A, -1)])
    assert np.ptp(every.sum(0)) < np.ptp(rows.reshape(2 * B, -1).sum(0))
    alone, centred_pairs = targets(centred, monkeypatch)
    batch = {k: v for k, v in uint8_batch().items() if not k.startswith("adjacent")}
    plain = run(without, batch)[2]
    assert float(run(centred, uint8_batch())[2]["dino_global"]) == pytest.approx(
        float(plain["dino_global"]), rel=1e-5
    )
    assert np.abs(rows - alone).max() > 1e-4 and np.abs(centred_pairs - pairs).max() > 1e-4
    np.testing.assert_allclose(centred_pairs.sum(-1), 1, rtol=1e-5)


def test_pairs_move_the_center_only_where_told():
    batch = uint8_batch()
    other = batch | {"adjacent_crops": batch["adjacent_crops"] // 2}
    still, moved = (
        recipe(loss={"centering": "centering", "adjacent_updates_center": u}) for u in (False, True)
    )
    for r, equal in ((still, True), (moved, False)):
        a, b = run(r, batch)[1]["dino"], run(r, other)[1]["dino"]
        assert bool(jnp.allclose(a, b, atol=1e-7)) == equal


def test_metrics_of_pairs_are_kept_apart_by_distance():
    _, _, metrics = run(recipe(), uint8_batch())
    assert {"pair_gap/1", "pair_gap/2"} <= metrics.keys()
    x = jax.random.normal(jax.random.key(0), (3, 5))
    y = jax.random.normal(jax.random.key(1), (3, 5))
    cos = np.array([[float(losses.cosine(a, b)) for b in y] for a in x])
    expected = [cos[i, i] - np.delete(cos[i], i).mean() for i in range(3)]
    np.testing.assert_allclose(losses.pair_gap(x, y), expected, rtol=1e-5)
    assert np.isnan(losses.pair_gap(x[:1], y[:1])).all()
    assert float(losses.mean_cosine(x)) == pytest.approx(
        np.mean([float(losses.cosine(x[i], x[j])) for i in range(3) for j in range(3) if i != j]), rel=1e-5
    )


@pytest.mark.slow
def test_weight_of_the_pairs_follows_its_schedule():
    r = recipe(loss={"adjacent_weight": 2.0, "final_adjacent_weight": 1.0, "adjacent_warmup_steps": 5})
    got = [float(schedule(r, s)["adjacent_weight"]) for s in range(20)]
    assert got[0] == 0 and got[4] == 2 and got[2] == pytest.approx(1.0) and got[19] < 1.02
    assert all(a >= b for a, b in itertools.pairwise(got[5:]))
    state, views = random_state(r), make_views(uint8_batch(), r)
    step = jax.jit(lambda values: loss_fn(*parts, views, None, values, r))
    parts = state["student"], state["teacher"], state["center"]

    def total(weight):
        loss, (_, metrics) = step({"teacher_temp": 0.05, "adjacent_weight": weight})
        return float(loss), float(metrics["adjacent"])

    (zero, term), (two, _) = total(0.0), total(2.0)
    assert two - zero == pytest.approx(2 * term, rel=1e-4)


def test_frozen_backbone_moves_only_its_patch_embedding_until_it_thaws():
    r = recipe(init={"weights": "hub:never read", "freeze_steps": 3, "unfreeze_steps": 4})
    rates = [float(schedule(r, s)["body_lr"] / schedule(r, s)["lr"]) for s in range(9)]
    np.testing.assert_allclose(rates, [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-5)
    step = jax.jit(functools.partial(train_step, recipe=r))
    state = init_state(r)
    for _ in range(2):
        new, _ = step(state, uint8_batch())
        before, after = state["student"], new["student"]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert moved["backbone"]["patch_embed"]["proj"]["kernel"]
        assert moved["dino_head"]["mlp"]["0"]["kernel"]
        body = [v for k, v in moved["backbone"].items() if k != "patch_embed"]
        assert not any(jax.tree.leaves(body))
        state = new
    thawed, _ = step({**state, "step": jnp.int32(6)}, uint8_batch())
    assert (thawed["student"]["backbone"]["cls_token"] != state["student"]["backbone"]["cls_token"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2, "loss": {"centering": "sinkhorn"}}, "sinkhorn"),
        ({"accumulate": 3, "loss": {"centering": "centering"}}, "accumulate 3 does not divide"),
        ({"accumulate": 2, "loss": {"centering": "centering", "koleo_group": 8}}, "koleo_group 8"),
    ],
)
def test_accumulation_that_cannot_be_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_without_slice_pairs_the_step_costs_what_it_costs_without_the_term():
    def flops(r, batch):
        step = jax.jit(functools.partial(train_step, recipe=r))
        cost = step.lower(jax.eval_shape(lambda: init_state(r)), batch).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    batch = uint8_batch()
    plain = {k: v for k, v in batch.items() if not k.startswith("adjacent")}
    no_rows = flops(recipe(dbt_rows=0), plain)
    no_term = flops(recipe(pairs={"mode": "none"}), plain)
    assert no_rows == no_term < 0.95 * flops(recipe(), batch)
