"""Where the time of a train step goes: its parts as programs of their own, beside their FLOPs by formula.

    python -m benchmarks.parts --recipe nano --batch 8 --dtype float32 --output FILE.md

In one program parts overlap and share what they read; here each stands alone, so shares are estimates.

- augment: photometrics and normalisation of all crops.
- figures of the crops: their contrast, and how alike slice pairs are.
- teacher, student: the backbones on all views, the student's with its backward pass.
- heads and losses: what is left of the whole step.
- optimizer: clipping, AdamW, the teacher's moving average.

Fastest of --steps runs, in turns, each waited for; compiling is not in them. Synthetic uint8 batch.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import machine
from benchmarks.jax_step import recipe_of, synthetic_batch, timed
from mammodino_jax.flops import step_flops
from mammodino_jax.model.head import bind
from mammodino_jax.objective import gradients, make_views, watch_pixels
from mammodino_jax.train import apply_gradients, init_state, schedule, train_step


def measure(case: dict) -> dict:
    """Seconds of each part and of the whole step, and the model FLOPs of the parts by formula."""
    recipe = recipe_of(case)
    c, state, batch = recipe.model, init_state(recipe), jax.device_put(synthetic_batch(recipe))
    key = jax.random.key(0) if c.drop_path else None
    values = schedule(recipe, 0)

    def features(params, views, training):
        """Sum over the features of all views, so that every token has a gradient."""
        seen, pairs = [views["global"]], views.get("adjacent")
        if pairs is not None and not (training and pairs.shape[1] == 1):  # else reused from the global views
            side = 0 if training else -1
            seen.append(pairs if recipe.pairs.symmetric else pairs[:, side][:, None])
        images = jnp.concatenate([v.reshape(-1, *v.shape[2:]) for v in seen])
        net, k = bind(params, c, recipe.head).backbone, key if training else None
        out = [net(images, None, k)]
        if training:
            local = views["local"]
            out.append(net(local.reshape(-1, *local.shape[2:]), None, k))
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

    views = jax.jit(lambda b: make_views(b, recipe))(batch)
    grads, center, _ = jax.jit(lambda s, b: gradients(s, b, key, values, recipe))(state, batch)
    parts = {
        "augment": (lambda b: make_views(b, recipe), batch),
        "figures of the crops": (lambda b: watch_pixels(b, recipe), batch),
        "teacher": (lambda p, v: features(p, v, False), state["teacher"], views),
        "student": (jax.grad(lambda p, v: features(p, v, True)), state["student"], views),
        "optimizer": (lambda s, g: apply_gradients(s, g, center, values, recipe), state, grads),
        "whole step": (lambda s, b: train_step(s, b, recipe=recipe), state, batch),
    }
    programs = {name: (jax.jit(f).lower(*args).compile(), args) for name, (f, *args) in parts.items()}
    found = dict.fromkeys(parts, float("inf"))
    for _ in range(case["steps"] + 1):
        for name, (program, args) in programs.items():
            once = timed(lambda p=program, a=args: jax.block_until_ready(p(*a)), 1, warmup=0)
            found[name] = min(found[name], once["seconds"])
    step = found.pop("whole step")
    found["heads and losses"] = step - sum(found.values())
    return {"parts": found, "step": step, "flops": step_flops(recipe), "batch": recipe.batch_size}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    case = {k: getattr(args, k) for k in ("recipe", "batch", "dtype", "steps")}
    found = measure(case)
    rows = [[name, f"{s:.4f}", f"{100 * s / found['step']:.0f} %"] for name, s in found["parts"].items()]
    rows.append(["whole step", f"{found['step']:.4f}", "100 %"])
    work, total = found["flops"]["parts"], found["flops"]["model_per_image"]
    text = machine.head(machine.command("benchmarks.parts", arguments), ("jax", "jaxlib", "flax", "numpy"))
    text += f"{args.recipe}, batch {args.batch}, {args.dtype}, {jax.devices()[0].device_kind}.\n\n"
    text += machine.table(["part", "s", "share of the step"], rows) + "\nModel FLOPs an image by formula: "
    shares = (f"{name} {100 * value / total:.0f} %" for name, value in work.items())
    machine.finish(text + f"{total / 1e9:.4g} GFLOP, " + ", ".join(shares) + ".\n", args.output)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
