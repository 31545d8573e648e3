"""One training step equals one unmodified step of DINOv2 (../shared/golden, see reference/learning.md).

If this fails after a change on purpose: it may not. The algorithm is DINOv2's: make the change optional.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mammodino_jax.augment import AugmentConfig
from mammodino_jax.convert.hub import from_hub, to_hub
from mammodino_jax.data.crops import CropConfig
from mammodino_jax.data.masking import MaskConfig
from mammodino_jax.data.pairs import PairConfig
from mammodino_jax.data.pipeline import DataConfig
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig
from mammodino_jax.objective import loss_fn, move_centers
from mammodino_jax.optimizer import OptimConfig, adam
from mammodino_jax.recipe import InitConfig, LossConfig, Recipe, RunConfig
from mammodino_jax.train import apply_gradients


def golden_folder() -> Path:
    shared = os.environ.get("MAMMODINO_SHARED", Path(__file__).resolve().parents[2].parent / "shared")
    return Path(os.environ.get("MAMMODINO_GOLDEN", Path(shared) / "golden"))


GOLDEN = sorted(golden_folder().glob("step_*.npz"))


def recipe_of(z) -> Recipe:
    separate = any(k.startswith("p0/student.ibot_head") for k in z.files)
    centering = any(k.startswith("center/") for k in z.files)
    dim = z["p0/student.backbone.cls_token"].shape[-1]
    depth = 1 + max(int(k.split(".")[3]) for k in z.files if k.startswith("p0/student.backbone.blocks."))
    v = z["p0/student.dino_head.last_layer.weight_v"]
    size = z["in/collated_global_crops"].shape[-1]
    return Recipe(
        seed=0, steps=100, batch_size=len(z["in/collated_global_crops"]) // 2, dbt_rows=0, accumulate=1, fsdp=1, init=InitConfig(),
        model=ViTConfig(
            dim=dim, depth=depth, heads=3, image_size=size, pos_antialias=False, pos_offset=0.1,
        ),
        head=HeadConfig(
            prototypes=v.shape[0], bottleneck=v.shape[1], separate_ibot=separate,
            hidden=z["p0/student.dino_head.mlp.0.weight"].shape[0],
        ),
        loss=LossConfig(centering="centering" if centering else "sinkhorn"),
        optim=OptimConfig(), augment=AugmentConfig(), data=DataConfig(sources=()), crops=CropConfig(),
        mask=MaskConfig(), pairs=PairConfig(), run=RunConfig(),
    )  # fmt: skip


def views_of(z) -> dict:
    """Crop-major PyTorch batch to image-major views; the flat list of masked patches to slots per image."""

    def image_major(a, views):
        return jnp.asarray(a.reshape(views, -1, *a.shape[1:]).swapaxes(0, 1).transpose(0, 1, 3, 4, 2))

    masks = z["in/collated_masks"]
    images, patches = len(masks) // 2, masks.shape[1]
    masks = masks.reshape(2, images, patches).swapaxes(0, 1).reshape(images, 2 * patches)
    slots = masks.sum(1).max() + 3  # some slots stay empty
    index, weight = np.zeros((images, slots), np.int32), np.zeros((images, slots), np.float32)
    for i, row in enumerate(masks):
        where = np.flatnonzero(row)
        index[i, : len(where)] = where
        per_view = row.reshape(2, patches).sum(1)
        weight[i, : len(where)] = 1 / per_view[where // patches]
    return {
        "global": image_major(z["in/collated_global_crops"], 2),
        "local": image_major(z["in/collated_local_crops"], len(z["in/collated_local_crops"]) // images),
        "mask_index": jnp.asarray(index),
        "mask_weight": jnp.asarray(weight),
        "patient": jnp.arange(images),
    }


LIMITS = {
    "losses, relative": 1e-5,
    "gradients / their maximum": 1e-4,
    "clip norms, relative": 1e-5,
    "update / learning rate": 0.02,
    "AdamW of the reference's gradients / learning rate": 1e-3,
    "EMA": 1e-6,
    "centers": 1e-6,
}


def step_errors(path: Path) -> dict[str, tuple[float, str]]:
    """Our step on the batch and parameters of a golden file: worst error of each kind, and where it is."""
    z = np.load(path)
    r = recipe_of(z)
    names = {side: [k for k in z.files if k.startswith(f"p0/{side}.")] for side in ("student", "teacher")}
    params = {s: from_hub({k.removeprefix(f"p0/{s}."): z[k] for k in ks}) for s, ks in names.items()}
    center = {}
    if r.loss.centering == "centering":
        center = {k: jnp.zeros(r.head.prototypes) for k in ("dino", "ibot")}
    state = {"step": jnp.int32(0), **params, "opt": adam(r.optim).init(params["student"]), "center": center}

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=(6,))
    values = {"teacher_temp": float(z["hp/teacher_temp"])}
    (_, (sums, metrics)), grads = step(
        params["student"], params["teacher"], center, views_of(z), None, values, r
    )
    center = move_centers(center, sums)
    values = {
        "lr": float(z["hp/lr"]), "last_layer_lr": float(z["hp/last_layer_lr"]),
        "weight_decay": float(z["hp/wd"]), "momentum": float(z["hp/mom"]),
        "body_lr": float(z["hp/lr"]),
    }  # fmt: skip
    apply = jax.jit(apply_gradients, static_argnums=(4,))
    new, norms = apply(state, grads, center, values, r)
    given = from_hub({k.removeprefix("g/"): z[k] for k in z.files if k.startswith("g/")})
    given = to_hub(apply(state, given, center, values, r)[0]["student"])
    grads, student, teacher = to_hub(grads), to_hub(new["student"]), to_hub(new["teacher"])
    assert {f"g/{k}" for k in grads} == {k for k in z.files if k.startswith("g/")}
    assert {f"center/{k}" for k in new["center"]} == {k for k in z.files if k.startswith("center/")}

    errors = dict.fromkeys(LIMITS, (0.0, "nothing to compare"))

    def note(kind, where, ours, reference, unit=1.0):
        error = float(np.max(np.abs(np.asarray(ours) - reference), initial=0) / unit)
        errors[kind] = max(errors[kind], (error if np.isfinite(error) else np.inf, where))

    # DINOv2 logs half of what it optimises for these two
    scale = {"dino_global": 1, "dino_local": 1, "koleo": r.loss.koleo_weight, "ibot": 0.5}
    logged = {"dino_global": "dino_global_crops_loss", "dino_local": "dino_local_crops_loss"}
    for ours, factor in scale.items():
        reference = z[f"loss/{logged.get(ours, ours + '_loss')}"]
        note("losses, relative", ours, float(metrics[ours]) * factor, reference, abs(reference))
    for name, g in grads.items():
        reference = z[f"g/{name}"]
        note("gradients / their maximum", name, g, reference, np.abs(reference).max() + 1e-8)
    for name, norm in norms.items():
        reference = z[f"gnorm/{name}"]
        note("clip norms, relative", name, float(norm), reference, abs(reference))
    for name, p in student.items():
        reference = z[f"p1/student.{name}"]
        big = np.abs(z[f"g/{name}"]) > 1e-7  # below, Adam's first step is a sign of rounding noise
        note("update / learning rate", name, p[big], reference[big], values["lr"])
        kind = "AdamW of the reference's gradients / learning rate"
        note(kind, name, given[name], reference, values["lr"])
    for name, p in teacher.items():
        note("EMA", name, p, z[f"p1/teacher.{name}"])
    for name, c in new["center"].items():
        note("centers", name, c, z[f"center/{name}"].ravel())
    return errors


@pytest.mark.parametrize("path", GOLDEN or [None], ids=lambda p: p.stem if p else "none")
def test_one_step_equals_dinov2(path):
    if path is None:
        pytest.skip(f"no step_*.npz under {golden_folder()} (MAMMODINO_GOLDEN)")
    for kind, (error, where) in step_errors(path).items():
        assert error <= LIMITS[kind], f"{kind}: {error:.2e} at {where}"
