"""FLOPs of a train step by formula, and what chips offer: for the plan, the benchmarks and their MFU.

Matrix products only, a multiply-add counts as two; elementwise work, losses and the optimizer are left out.
XLA's own count (cost_analysis) is no substitute: it counts the body of a loop once.

- "model": what the algorithm needs (the convention of MFU). Forward of the teacher, three times the forward
  for the student (its backward costs two), no discount for drop-path, no recomputation, and the mean number
  of masked patches at `mask.ratio` if all patches held tissue.
- "executed": what the program does (HFU). Blocks on the rows that drop-path keeps, the forward that `remat`
  repeats in the backward pass, and all M patch slots, also the empty ones.
"""

import dataclasses

from mammodino_jax.data.masking import slots
from mammodino_jax.model.head import HeadConfig
from mammodino_jax.model.vit import ViTConfig
from mammodino_jax.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of a chip, as its maker states them."""

    flops: float  # dense bf16 FLOP/s
    hbm: float  # bytes
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s that a chip sends over all its links to other chips; as much comes in


# By the start of jax.Device.device_kind, longer names first. TPUs: docs.cloud.google.com/tpu/docs/v5e (v5p,
# v6e), whose link rates (400, 1200 and 800 GB/s) are of both directions. GPUs: NVIDIA's data sheets of the
# SXM cards, without sparsity, NVLink in one direction.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95e9, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1640e9, 400e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 300e9),
}


def chip(device_kind: str) -> Chip | None:
    """The chip of a jax device; None: not in the table (a CPU, for one)."""
    return next((c for name, c in CHIPS.items() if device_kind.startswith(name)), None)


def backbone_flops(c: ViTConfig, size: int) -> tuple[float, float]:
    """Forward FLOPs of one image with sides of `size` pixels: (patch embedding, all blocks)."""
    patches = (size // c.patch_size) ** 2
    T, D = 1 + c.registers + patches, c.dim
    hidden = int(D * c.mlp_ratio)
    ffn = 2 * hidden
    if c.ffn == "swiglu":  # two inputs and an output of two thirds of the width (vit.SwiGLU)
        ffn = 3 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    block = 2 * T * D * (4 * D + ffn) + 4 * T * T * D  # linear layers; scores and their use
    return 2 * patches * c.channels * c.patch_size**2 * D, c.depth * block


def head_flops(dim: int, c: HeadConfig) -> float:
    """Forward FLOPs of a projection head for one token."""
    return 2 * (dim * c.hidden + c.hidden**2 + c.hidden * c.bottleneck + c.bottleneck * c.prototypes)


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
    rows, pairs = recipe.batch_size // recipe.accumulate, recipe.dbt_rows // recipe.accumulate
    mode = recipe.pairs.mode if recipe.dbt_rows else "none"
    sides = {"none": 0, "reuse": 1, "dedicated": 2 if recipe.pairs.symmetric else 1}[mode]  # of the teacher
    taught = sides if mode == "dedicated" else 0  # slices that the student sees besides its global views
    share = recipe.dbt_rows / recipe.batch_size
    patches = (crops.global_size // m.patch_size) ** 2
    masked = sum(recipe.mask.ratio) / 2 * patches
    M = slots(recipe.mask, patches)
    token = head_flops(m.dim, recipe.head)

    def student(views: int, size: int, group: int) -> tuple[float, float]:
        """(model, executed) of `views` images; `group` of them share a draw of drop-path."""
        embed, blocks = backbone_flops(m, size)
        runs = (4 if m.remat else 3) * kept(m.drop_path, group)
        return 3 * views * (embed + blocks), views * (3 * embed + runs * blocks)

    group = loss.drop_path_group
    view = sum(backbone_flops(m, crops.global_size))
    L, cls = crops.local_number, 2 + share * sides
    student_cls = 2 + L + share * max(taught, sides)
    parts = {
        "teacher": (2 * view,) * 2,
        "student global": student(2, crops.global_size, 2 * (group or rows)),
        "student local": student(L, crops.local_size, L * (group or rows)),
        "heads": tuple(token * (cls + n + 3 * (student_cls + n)) for n in (masked, M)),
    }
    if sides:
        model, executed = student(taught, crops.global_size, (taught or 1) * min(group or pairs, pairs))
        parts["slice pairs"] = (share * (sides * view + model), share * (sides * view + executed))
    model, executed = map(sum, zip(*parts.values(), strict=True))
    return {
        "model": model * recipe.batch_size,
        "executed": executed * recipe.batch_size,
        "model_per_image": model,
        "executed_per_image": executed,
        "parts": {name: value for name, (value, _) in parts.items()},
    }
