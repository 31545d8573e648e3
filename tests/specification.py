"""DINOv2's init, parameter groups, schedules and drop-path as tables beside what our code does.

The specified values are written out from reference/learning.md 1.1, 1.8 and 1.9 (read off dinov2's own code).
"""

import dataclasses
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np

from mammodino_jax.convert.hub import to_hub
from mammodino_jax.model.head import HeadConfig, init_params
from mammodino_jax.model.vit import ViTConfig, residual
from mammodino_jax.optimizer import OptimConfig, multipliers, path_names
from mammodino_jax.recipe import InitConfig, LossConfig
from mammodino_jax.train import schedule


@dataclasses.dataclass(frozen=True)
class Row:
    what: str
    specified: str
    ours: str
    ok: bool


def show(title: str, rows: list[Row]) -> None:
    widths = [max(len(getattr(r, f)) for r in rows) for f in ("what", "specified", "ours")]
    print(f"\n{title}\n{'':{widths[0]}}  {'specified':{widths[1]}}  ours")
    for r in rows:
        verdict = "" if r.ok else "  DIFFERS"
        print(f"{r.what:{widths[0]}}  {r.specified:{widths[1]}}  {r.ours:{widths[2]}}{verdict}")


# parameters (hub names, regular expressions) and their distribution: ("normal", std), ("uniform", bound) or
# ("constant", value)
def _distributions(vit: ViTConfig, head: HeadConfig) -> dict[str, tuple[str, float]]:
    patch = 1 / math.sqrt(vit.channels * vit.patch_size**2)
    return {
        r"backbone\.cls_token": ("normal", 1e-6),
        r"backbone\.register_tokens": ("normal", 1e-6),
        r"backbone\.pos_embed": ("normal", 0.02),
        r"backbone\.mask_token": ("constant", 0.0),
        r"backbone\.patch_embed\.proj\.weight": ("uniform", patch),
        r"backbone\.patch_embed\.proj\.bias": ("uniform", patch),
        r"backbone\.blocks\.\d+\.attn\.qkv\.weight": ("normal", 0.02),
        r"backbone\.blocks\.\d+\.attn\.proj\.weight": ("normal", 0.02),
        r"backbone\.blocks\.\d+\.mlp\.fc1\.weight": ("normal", 0.02),
        r"backbone\.blocks\.\d+\.mlp\.fc2\.weight": ("normal", 0.02),
        r"backbone\.blocks\.\d+\.(attn|mlp)\.\w+\.bias": ("constant", 0.0),
        r"backbone\.blocks\.\d+\.ls[12]\.gamma": ("constant", 1e-5),
        r"backbone\.(blocks\.\d+\.)?norm[12]?\.weight": ("constant", 1.0),
        r"backbone\.(blocks\.\d+\.)?norm[12]?\.bias": ("constant", 0.0),
        r"(dino|ibot)_head\.mlp\.[024]\.weight": ("normal", 0.02),
        r"(dino|ibot)_head\.mlp\.[024]\.bias": ("constant", 0.0),
        r"(dino|ibot)_head\.last_layer\.weight_v": ("uniform", 1 / math.sqrt(head.bottleneck)),
        r"(dino|ibot)_head\.last_layer\.weight_g": ("constant", 1.0),
    }


def init_table(vit: ViTConfig, head: HeadConfig, seed: int = 0) -> list[Row]:
    """Sample statistics within 5 standard errors; normals reach past 2.5 sigma, uniforms end at their bound."""
    params = to_hub(init_params(vit, head, seed))
    distributions, rows, seen = _distributions(vit, head), [], set()
    for pattern, (kind, size) in distributions.items():
        names = [k for k in params if re.fullmatch(pattern, k)]
        seen.update(names)
        x = np.concatenate([params[k].ravel() for k in names]).astype(np.float64)
        mean, std, top = x.mean(), x.std(), np.abs(x).max()
        if kind == "constant":
            specified, ok = f"{size:g}", bool((x == np.float32(size)).all())
        else:
            sigma = size if kind == "normal" else size / math.sqrt(3)
            ok = abs(mean) < 5 * sigma / math.sqrt(x.size) and abs(std / sigma - 1) < 5 / math.sqrt(
                2 * x.size
            )
            ok = ok and (top > 2.5 * sigma if kind == "normal" else 0.98 * size < top <= size)
            specified = f"N(0, {size:g}^2)" if kind == "normal" else f"U(+-{size:.5f}), std {sigma:.5f}"
        what = pattern.replace("\\", "").replace("d+", "*").replace("w+", "*")
        rows.append(Row(what, specified, f"mean {mean:+.1e} std {std:.4g} max {top:.4g} n {x.size}", ok))
    missing = params.keys() - seen
    assert not missing, f"no distribution is specified for {sorted(missing)}"
    return rows


# learning-rate factors of ViT-B's blocks 0..11, layer decay 0.9
_BLOCKS = (
    0.28243, 0.31381, 0.34868, 0.38742, 0.43047, 0.47830, 0.53144, 0.59049, 0.6561, 0.729, 0.81, 0.9,
)  # fmt: skip


def group_table() -> list[Row]:
    """ViT-B's learning-rate and weight-decay factors; one row for all parameters that share both."""
    specified = {r"backbone\.(cls_token|register_tokens|pos_embed|mask_token)": (0.25419, 1)}
    specified[r"backbone\.patch_embed\.proj\.kernel"] = (0.05084, 1)
    specified[r"backbone\.patch_embed\.proj\.bias"] = (0.05084, 0)
    for i, lr in enumerate(_BLOCKS):
        block = rf"backbone\.blocks\.{i}\."
        specified[block + r"(attn|mlp)\.\w+\.kernel"] = (lr, 1)
        specified[block + r"(norm[12]\.scale|ls[12]\.gamma|[\w.]+\.bias)"] = (lr, 0)
    specified[r"backbone\.norm\.(scale|bias)"] = (1, 0)
    specified[r"(dino|ibot)_head\.mlp\.[024]\.kernel"] = (1, 1)
    specified[r"(dino|ibot)_head\.mlp\.[024]\.bias"] = (1, 0)
    specified[r"(dino|ibot)_head\.last_layer\.weight_[gv]"] = (1, 1)

    vit = ViTConfig(dim=6, depth=12, heads=1, image_size=28, registers=4)
    params = jax.eval_shape(lambda: init_params(vit, HeadConfig(8, 4, 4, separate_ibot=True), 0))
    lr, decay, last = (
        {".".join(path_names(path)): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in multipliers(params, OptimConfig(), 12)
    )
    rows, seen = [], set()
    for pattern, (want_lr, want_decay) in specified.items():
        names = [k for k in lr if re.fullmatch(pattern, k)]
        seen.update(names)
        found = sorted({(float(lr[k]), float(decay[k])) for k in names})
        ok = len(found) == 1 and abs(found[0][0] - want_lr) < 6e-6 and found[0][1] == want_decay
        ok = ok and all(last[k] == ("last_layer" in k) for k in names)
        ours = ", ".join(f"lr x {a:.5f} wd x {b:g}" for a, b in found)
        what = pattern.replace("\\", "").replace("w+", "*")
        rows.append(Row(f"{what} ({len(names)})", f"lr x {want_lr:.5f} wd x {want_decay}", ours, ok))
    missing = lr.keys() - seen
    assert not missing, f"no factors are specified for {sorted(missing)}"
    return rows


def schedule_table() -> list[Row]:
    """DINOv2's 1-day recipe: 125,000 steps of batch 2048. Every row as a Python int and as a traced step."""
    peak = 4e-3 * math.sqrt(2)  # base_lr * sqrt(2048 / 1024)
    half = lambda a, b: (a + b) / 2  # noqa: E731
    specified = {
        "lr": {0: 0.0, 6250: peak * 6250 / 12_499, 12_499: peak, 12_500: peak,
               68_750: half(peak, 1e-6), 125_000: 1e-6},
        "last_layer_lr": {0: 0.0, 1249: 0.0, 1250: peak * 1250 / 12_499, 12_499: peak},
        "weight_decay": {0: 0.04, 62_500: half(0.04, 0.4), 125_000: 0.4},
        "momentum": {0: 0.992, 62_500: half(0.992, 1.0), 125_000: 1.0},
        "teacher_temp": {0: 0.04, 18_750: 0.04 + 0.03 * 18_750 / 37_499, 37_499: 0.07, 124_999: 0.07},
    }  # fmt: skip
    recipe = types.SimpleNamespace(
        optim=OptimConfig(), init=InitConfig(), loss=LossConfig(), steps=125_000, batch_size=2048
    )
    rows = []
    for name, values in specified.items():
        for step, value in values.items():
            ours = float(schedule(recipe, step)[name])
            traced = float(jax.jit(lambda s, n=name: schedule(recipe, s)[n])(jnp.int32(step)))
            ok = math.isclose(ours, value, rel_tol=1e-12) and math.isclose(traced, value, rel_tol=2e-5)
            rows.append(Row(f"{name} at {step}", f"{value:.9g}", f"{ours:.9g} (traced {traced:.7g})", ok))
    # the last step is not yet at the final value
    last = float(schedule(recipe, 124_999)["lr"])
    value = 1e-6 + 0.5 * (peak - 1e-6) * (1 + math.cos(math.pi * 112_499 / 112_500))
    ok = last > 1e-6 and math.isclose(last, value, rel_tol=1e-12)
    return [*rows, Row("lr at 124999", f"{value:.12g}", f"{last:.12g}", ok)]


def drop_path_table() -> list[Row]:
    """Rows that run a residual branch, and its scale, for groups of rows and rates."""
    kept = {(8, 0.3): 5, (64, 0.3): 44, (128, 0.3): 89, (10, 0.1): 9, (2, 0.9): 1}
    rows = []
    for (group, rate), subset in kept.items():
        x = jnp.zeros((2 * group, 3, 4))  # two groups: each draws its own subset
        y = np.asarray(residual(x, jnp.ones_like, jax.random.key(0), rate, group))
        ran = (y != 0).all(axis=(1, 2)).reshape(2, group)
        counts, scale = set(ran.sum(1).tolist()), float(y.max())
        ok = counts == {subset} and math.isclose(scale, group / subset, rel_tol=1e-6)
        ours = f"{'/'.join(map(str, sorted(counts)))} rows, scale {scale:.6f}"
        rows.append(Row(f"{group} rows, rate {rate}", f"{subset} rows, scale {group / subset:.6f}", ours, ok))
    return rows
