"""FLOPs of a train step by formula, and what chips offer: for the plan, the benchmarks and their MFU.

Matrix products only, a multiply-add counts as two; elementwise work, losses and the optimizer are left out.
XLA's own count (cost_analysis) is no substitute: it counts the body of a loop once.

- "model": what the algorithm needs (the convention of MFU). Forward of the teacher, three times the forward
  for the student (its backward costs two), no discount for drop-path, no recomputation, and the mean number
  of masked patches at `mask.ratio` if all patches held tissue.
- "executed": what the program does (HFU). Blocks on the rows that drop-path keeps, what `remat` repeats in
  the backward pass, all M patch slots, also the empty ones, and Sinkhorn-Knopp's repeated teacher logits.
"""

import dataclasses

from mammodino_jax.data.masking import slots
from mammodino_jax.losses import SINKHORN_ITERATIONS
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig
from mammodino_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of a chip, as its maker states them."""

    flops: float  # dense bf16 FLOP/s
    hbm: float  # bytes: makers' GB of memory are 2^30
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s that a chip sends over all its links to other chips; as much comes in


GIB = 2**30
# By the start of jax.Device.device_kind, longer names first. TPUs: docs.cloud.google.com/tpu/docs/v5e (v5p,
# v6e), whose link rates (400, 1200 and 800 GB/s) are of both directions. GPUs: NVIDIA's data sheets of the
# SXM cards, without sparsity, NVLink in one direction.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, 400e9),
    "NVIDIA H200": Chip(989e12, 141 * GIB, 4800e9, 450e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3350e9, 450e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2039e9, 300e9),
}


def chip(device_kind: str) -> Chip | None:
    """The chip of a jax device; None: not in the table (a CPU, for one)."""
    return next((c for name, c in CHIPS.items() if device_kind.startswith(name)), None)


def backbone_flops(c: ViTConfig, size: int) -> tuple[float, float, float]:
    """Forward FLOPs of one image with sides of `size` pixels: patch embedding, linear layers, attention."""
    patches = (size // c.patch_size) ** 2
    T, D = 1 + c.registers + patches, c.dim
    hidden = int(D * c.mlp_ratio)
    ffn = 2 * hidden
    if c.ffn == "swiglu":  # two inputs and an output of two thirds of the width (vit.SwiGLU)
        ffn = 3 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    linear, attention = 2 * T * D * (4 * D + ffn), 4 * T * T * D  # attention: scores, and their use
    return 2 * patches * c.channels * c.patch_size**2 * D, c.depth * linear, c.depth * attention


def head_flops(dim: int, c: HeadConfig) -> tuple[float, float]:
    """Forward FLOPs of a projection head for one token: MLP, prototypes."""
    mlp = 2 * (dim * c.hidden + c.hidden**2 + c.hidden * c.bottleneck)
    return mlp, 2 * c.bottleneck * c.prototypes


# What the backward pass computes again (vit.REMAT), as shares of the linear layers and of attention; of the
# latter "attention" needs the scores alone. Flash attention's own recomputation is not counted.
AGAIN = {"none": (0, 0), "attention": (0, 0.5), "dots": (0, 1), "block": (1, 1)}


def kept(rate: float, group: int) -> float:
    """Share of the rows of a group on which drop-path runs a branch (vit.residual)."""
    return max(int(group * (1 - rate)), 1) / group if rate else 1.0


def step_flops(recipe: Recipe) -> dict:
    """FLOPs of one step on the global batch.

    Returns:
      {"model", "executed"}: of the step; {"model_per_image", "executed_per_image"}: divided by batch_size;
      "parts": {part: model FLOPs per image}, which add up to "model_per_image".
    """
    m, crops, loss = recipe.model, recipe.crops, recipe.loss
    rows = recipe.batch_size // recipe.accumulate
    mode = recipe.pairs.mode if recipe.dbt_rows else "none"
    sides = {"none": 0, "reuse": 1, "dedicated": 2 if recipe.pairs.symmetric else 1}[mode]  # of the teacher
    taught = sides if mode == "dedicated" else 0  # slices that the student sees besides its global views
    share = recipe.dbt_rows / recipe.batch_size
    group = loss.drop_path_group or rows
    view = sum(backbone_flops(m, crops.global_size))

    def student(views: float, size: int, together: float) -> tuple[float, float]:
        """(model, executed) of `views` images; those of `together` share a draw of drop-path."""
        embed, linear, attention = backbone_flops(m, size)
        more = [3 + again for again in AGAIN[m.remat]]
        run = kept(m.drop_path, round(together * group)) * (more[0] * linear + more[1] * attention)
        return 3 * views * (embed + linear + attention), views * (3 * embed + run)

    patches = (crops.global_size // m.patch_size) ** 2
    M = slots(recipe.mask, patches)
    chunk = min(loss.patch_chunk or M, M)
    mlp, prototypes = head_flops(m.dim, recipe.head)
    cls = (2 + share * sides + 3 * (2 + crops.local_number + share * taught)) * (mlp + prototypes)
    # Sinkhorn-Knopp computes the teacher's logits anew in each iteration (patch_loss.py)
    anew = SINKHORN_ITERATIONS * prototypes if loss.centering == "sinkhorn" else 0
    joined, L = 2 + share * taught, crops.local_number
    parts = {
        "teacher": (2 * view,) * 2,
        "student, global views": student(2, crops.global_size, joined),
        "student, local views": student(L, crops.local_size, L),
        "slice pairs": tuple(share * (sides * view + n) for n in student(taught, crops.global_size, joined)),
        "heads": (
            cls + sum(recipe.mask.ratio) / 2 * patches * 4 * (mlp + prototypes),
            cls + -(-M // chunk) * chunk * (4 * (mlp + prototypes) + anew),
        ),
    }
    model, executed = map(sum, zip(*parts.values(), strict=True))
    return {
        "model": model * recipe.batch_size,
        "executed": executed * recipe.batch_size,
        "model_per_image": model,
        "executed_per_image": executed,
        "parts": {name: value for name, (value, _) in parts.items()},
    }
