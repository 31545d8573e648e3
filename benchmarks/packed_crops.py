"""Does it pay that global and local crops share the linear layers? The blocks, packed against two calls.

    python -m benchmarks.packed_crops --recipes vits14_224,vits14_518 --batch 2 --output FILE.md

"two calls": blocks on the global crops [2B, T, D], then on the local crops [L*B, t, D], as the product does.
"packed": rows of all tokens of an image [B, 2T + L*t, D] go through LayerNorm, QKV, projection, MLP and the
residuals at once; static slices become [2B, T, D] and [L*B, t, D] around the attention only. The same
parameters, the same result (a test). Without drop-path, which packed rows could draw per image only, not per
view as DINOv2 does. Forward and backward of all blocks, as a loop over layers (scan) without recomputation.

Figures: seconds of a step (median, in turns), seconds to compile and temporary memory; FLOPs and bytes by the
compiler's analysis of a model of one block (it counts the body of a loop once).
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import machine
from benchmarks.jax_step import recipe_of
from mammodino_jax.model.head import bind, init_params
from mammodino_jax.model.vit import Block, attend


def packed_block(block: Block, x_BTD, shape):
    """The block on packed rows; `shape` lists (crops of an image, tokens of a crop)."""
    heads = block.attn.heads
    B, _, D = x_BTD.shape
    qkv = block.attn.qkv(block.norm1(x_BTD))
    seen, start = [], 0
    for crops, tokens in shape:
        part = qkv[:, start : start + crops * tokens].reshape(B * crops, tokens, 3, heads, D // heads)
        seen.append(attend(*jnp.unstack(part, axis=2)).reshape(B, crops * tokens, D))
        start += crops * tokens
    x_BTD = x_BTD + block.ls1(block.attn.proj(jnp.concatenate(seen, axis=1)))
    return x_BTD + block.ls2(block.mlp(block.norm2(x_BTD)))


def run_blocks(blocks: list[Block], run, x):
    """run(block, x) through all blocks, as one loop over stacked parameters."""
    if len(blocks) == 1:
        return run(blocks[0], x)
    graph, _ = nnx.split(blocks[0])
    layers = [nnx.to_pure_dict(nnx.state(block, nnx.Param)) for block in blocks]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    return jax.lax.scan(lambda x, layer: (run(nnx.merge(graph, layer), x), None), x, stacked)[0]


def both_ways(recipe):
    """({"two calls", "packed"}: (parameters, tokens) -> tokens of all crops [B, 2T + L*t, D]}, 2T + L*t)."""
    m, crops = recipe.model, recipe.crops
    shape = [(2, 1 + (crops.global_size // m.patch_size) ** 2)]
    shape.append((crops.local_number, 1 + (crops.local_size // m.patch_size) ** 2))

    def two_calls(params, x_BTD):
        blocks, out, start = bind(params, m).blocks, [], 0
        for count, tokens in shape:
            part = x_BTD[:, start : start + count * tokens].reshape(-1, tokens, m.dim)
            part = run_blocks(blocks, lambda block, x: block(x), part)
            out.append(part.reshape(x_BTD.shape[0], -1, m.dim))
            start += count * tokens
        return jnp.concatenate(out, axis=1)

    def packed(params, x_BTD):
        return run_blocks(bind(params, m).blocks, lambda block, x: packed_block(block, x, shape), x_BTD)

    return {"two calls": two_calls, "packed": packed}, sum(count * tokens for count, tokens in shape)


def compile_ways(recipe, params, batch: int):
    """(way, compiled gradient, its tokens, seconds to compile) of both."""
    ways, tokens = both_ways(recipe)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, recipe.model.dim), recipe.model.dtype)
    for way, function in ways.items():

        def loss(params, x, function=function):
            return jnp.mean(function(params, x).astype(jnp.float32) ** 2)

        start = time.perf_counter()
        program = jax.jit(jax.grad(loss)).lower(params, x).compile()
        yield way, program, x, time.perf_counter() - start


def measure(name: str, batch: int, dtype: str, repeats: int) -> list[dict]:
    """A row for each way, timed in turns."""
    recipe = recipe_of({"recipe": name, "batch": batch, "dtype": dtype, "remat": "none"})
    single = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, depth=1))
    rows = []
    for way, program, *_ in compile_ways(single, init_params(single.model, None, 0), batch):
        cost = program.cost_analysis()
        rows.append({"recipe": name, "dtype": dtype, "batch": batch, "way": way})
        rows[-1] |= {"flops": cost["flops"], "bytes": cost["bytes accessed"], "times": []}
    params = init_params(recipe.model, None, 0)
    compiled = list(compile_ways(recipe, params, batch))
    for row, (_, program, _, seconds) in zip(rows, compiled, strict=True):
        row |= {"compile_s": seconds, "temporary": program.memory_analysis().temp_size_in_bytes}
    for repeat in range(repeats + 1):
        for row, (_, program, x, _) in zip(rows, compiled, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(params, x))
            if repeat:
                row["times"].append(time.perf_counter() - start)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default="vits14_224,vits14_518")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rows = []
    for name in args.recipes.split(","):
        rows += measure(name, args.batch, args.dtype, args.repeats)
    columns = ["recipe", "dtype", "batch", "way", "s/step (fastest)", "compile s", "GiB temporary"]
    columns += ["GFLOP a block", "GB a block"]
    lines = []
    for r in rows:
        line = [r[k] for k in ("recipe", "dtype", "batch", "way")]
        line += [f"{statistics.median(r['times']):.2f} ({min(r['times']):.2f})", f"{r['compile_s']:.1f}"]
        line += [f"{r['temporary'] / 2**30:.2f}", f"{r['flops'] / 1e9:.2f}", f"{r['bytes'] / 1e9:.2f}"]
        lines.append(line)
    text = machine.head(machine.command("benchmarks.packed_crops", arguments), ("jax", "jaxlib", "flax"))
    machine.finish(text + "\n" + machine.table(columns, lines), args.output)


if __name__ == "__main__":
    main()
