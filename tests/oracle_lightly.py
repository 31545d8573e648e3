"""Losses and head of lightly (MIT), where its definitions are DINOv2's; each function returns errors.

Where they differ, and what is compared:
- DINOLoss is one mean over all pairs of different views: the sum of our global and local terms.
- IBOTPatchLoss takes a flat list of masked patches; ours takes slots, some empty (weight 0).
- KoLeoLoss excludes a row from its own neighbours with -2, DINOv2 and ours with -1: they part only where every
  other row is exactly opposite, which real features are not. Same-patient exclusion and groups are ours alone.
- DINOProjectionHead freezes weight_g unless norm_last_layer=False (DINO's choice; DINOv2 trains it).
- swav_loss.sinkhorn is the exponential form, which overflows; ours is the same in the log domain.
- cosine_schedule reaches its end at max_steps - 1, DINOv2's one step later: its max_steps is our span + 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules import DINOProjectionHead, DINOv2ProjectionHead
from lightly.utils.scheduler import cosine_schedule

from mammodino_jax import losses
from mammodino_jax.convert.hub import from_hub, to_hub
from mammodino_jax.model.head import DINOHead, HeadConfig
from mammodino_jax.schedules import Cosine

TEMP = 0.05


def error(ours, theirs) -> float:
    """Largest difference in units of the largest value of the reference."""
    theirs = np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def leaf(a) -> torch.Tensor:
    return torch.tensor(np.asarray(a), requires_grad=True)


def dino(B=5, L=8, K=64) -> dict[str, float]:
    rng = np.random.default_rng(0)
    teacher_BVK, global_BVK, local_BLK = (
        rng.normal(size=(B, n, K)).astype(np.float32) for n in (2, 2, L)
    )  # fmt: skip
    center_K = rng.normal(0, 0.3, K).astype(np.float32)

    reference = DINOLoss(K, center_momentum=0.9)
    reference.center.copy_(torch.from_numpy(center_K))
    global_t, local_t = leaf(global_BVK), leaf(local_BLK)
    student = [*global_t.unbind(1), *local_t.unbind(1)]
    value_t = reference([*torch.from_numpy(teacher_BVK).unbind(1)], student, teacher_temp=TEMP)
    value_t.backward()

    def loss(global_BVK, local_BLK):
        target = losses.center_softmax(teacher_BVK, center_K, TEMP)
        return sum(losses.dino_loss(target, global_BVK, local_BLK))

    value, grads = jax.value_and_grad(loss, (0, 1))(global_BVK, local_BLK)
    center = losses.update_center(center_K, *losses.center_sum(teacher_BVK.reshape(-1, K)), momentum=0.9)
    return {
        "loss": error(value, value_t),
        "gradient of global logits": error(grads[0], global_t.grad),
        "gradient of local logits": error(grads[1], local_t.grad),
        "center": error(center, reference.center.ravel()),
    }


def ibot(B=3, grid=4, K=64) -> dict[str, float]:
    rng = np.random.default_rng(1)
    N, counts = grid * grid, [5, 0, 3, 1, 0, 7]  # masked patches of each of the 2B views
    mask = np.zeros((2 * B, N), bool)
    for row, count in zip(mask, counts, strict=True):
        row[rng.permutation(N)[:count]] = True
    teacher, student = (rng.normal(size=(mask.sum(), K)).astype(np.float32) for _ in range(2))
    center_K = rng.normal(0, 0.3, K).astype(np.float32)

    reference = IBOTPatchLoss(K, center_momentum=0.9)
    reference.center.center.copy_(torch.from_numpy(center_K))
    student_t, mask_t = leaf(student), torch.from_numpy(mask.reshape(2 * B, grid, grid))
    value_t = reference(torch.from_numpy(teacher), student_t, mask_t, teacher_temp=TEMP)
    value_t.backward()

    per_image = [sum(counts[2 * i : 2 * i + 2]) for i in range(B)]
    slots = max(per_image) + 2
    weight_BM = np.zeros((B, slots), np.float32)
    where = np.zeros((B, slots), bool)
    for i, count in enumerate(per_image):
        where[i, :count] = True
        weights = [np.full(c, 1 / max(c, 1)) for c in counts[2 * i : 2 * i + 2]]
        weight_BM[i, :count] = np.concatenate(weights)
    teacher_BMK, student_BMK = (
        rng.normal(size=(B, slots, K)).astype(np.float32) for _ in range(2)
    )  # fmt: skip
    teacher_BMK[where], student_BMK[where] = teacher, student  # what lies in empty slots must not count

    def loss(student_BMK):
        return losses.ibot_loss(losses.center_softmax(teacher_BMK, center_K, TEMP), student_BMK, weight_BM)

    value, grad = jax.value_and_grad(loss)(student_BMK)
    center = losses.update_center(
        center_K, *losses.center_sum(teacher_BMK.reshape(-1, K), weight_BM.ravel()), momentum=0.9
    )
    return {
        "loss": error(value, value_t),
        "gradient": error(np.asarray(grad)[where], student_t.grad),
        "gradient of empty slots": float(np.abs(np.asarray(grad)[~where]).max()),
        "center": error(center, reference.center.value.ravel()),
    }


def koleo(B=12, D=48) -> dict[str, float]:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(B, D)).astype(np.float32)
    close = (rng.normal(size=D) + 5e-2 * rows).astype(np.float32)  # cosines over 0.99, as early in training
    out = {}
    for name, x in {"far rows": rows, "close rows": close}.items():
        x_t = leaf(x)
        value_t = KoLeoLoss()(x_t)
        value_t.backward()
        value, grad = jax.value_and_grad(lambda x: losses.koleo_loss(x)[0])(x)
        out |= {f"loss, {name}": error(value, value_t), f"gradient, {name}": error(grad, x_t.grad)}
    for name, x in {"identical rows": np.repeat(rows[:1], B, 0), "one row": rows[:1]}.items():
        out[f"loss, {name}"] = error(losses.koleo_loss(x)[0], KoLeoLoss()(torch.from_numpy(x)))
    return out


def head(kind=DINOv2ProjectionHead, B=6, D=48) -> dict[str, float]:
    shape = dict(input_dim=D, hidden_dim=96, bottleneck_dim=32, output_dim=128)
    reference = kind(**shape, **({"norm_last_layer": False} if kind is DINOProjectionHead else {}))
    graphdef, state = nnx.split(DINOHead(D, HeadConfig(128, 32, 96), "float32", nnx.Rngs(0)), nnx.Param)
    rng = np.random.default_rng(3)
    hub = to_hub(nnx.to_pure_dict(state))
    hub = {k: (a + rng.normal(0, 0.1, a.shape)).astype(np.float32) for k, a in hub.items()}
    names = {k.replace("mlp.", "layers."): k for k in hub}
    reference.load_state_dict({k: torch.from_numpy(hub[name]) for k, name in names.items()})
    x, weight_BK = rng.normal(size=(B, D)).astype(np.float32), rng.normal(size=(B, 128)).astype(np.float32)

    x_t = leaf(x)
    logits_t = reference(x_t)
    (logits_t * torch.from_numpy(weight_BK)).sum().backward()

    def run(params, x):
        logits = nnx.merge(graphdef, params)(x)
        return (logits * weight_BK).sum(), logits

    grads, logits = jax.jit(jax.grad(run, (0, 1), has_aux=True))(from_hub(hub), x)
    ours, theirs = to_hub(grads[0]), {names[k]: p.grad for k, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    return {
        "logits": error(logits, logits_t),
        "gradient of the input": error(grads[1], x_t.grad),
        "gradients of parameters": max(error(g, theirs[k]) for k, g in ours.items()),
    }


def teacher_by_sinkhorn(B=24, K=64) -> dict[str, float]:
    x = np.random.default_rng(4).normal(size=(B, K)).astype(np.float32)
    theirs = sinkhorn(torch.from_numpy(x), iterations=3, epsilon=TEMP)
    return {"probabilities": error(losses.sinkhorn(jnp.asarray(x), TEMP), theirs)}


def cosine(total=1000) -> dict[str, float]:
    schedule = Cosine(0.04, 0.4, total)
    theirs = np.array([cosine_schedule(i, total + 1, 0.04, 0.4) for i in range(total + 1)])
    return {"every step": error([schedule(i) for i in range(total + 1)], theirs)}


COMPARISONS = {
    "DINOLoss": dino,
    "IBOTPatchLoss": ibot,
    "KoLeoLoss": koleo,
    "DINOv2ProjectionHead": head,
    "DINOProjectionHead": lambda: head(DINOProjectionHead),
    "sinkhorn": teacher_by_sinkhorn,
    "cosine_schedule": cosine,
}
