"""Plan a run without the machine: compile the train step for it, and say what it needs.

    python -m mammodino_jax.plan --config=configs/vitb14_518.py --topology v5e:16x16
    python -m mammodino_jax.plan --config=configs/vitl14.py --config.fsdp=16 --topology v5e:16x16 --largest

Prints memory of a chip, FLOPs, what chips send to each other, and an estimate of the speed. A TPU topology
(GENERATION:SHAPE as libtpu names them: v5e:4x4, v6e:4x4, v5p:4x4x4) needs libtpu (`pip install .[tpu]`) and
no TPU; without --topology the plan is for the devices that are here. Config flags are those of main.py; data
are not needed. Compiling takes minutes on a few cores; --quick takes a fraction and overestimates memory.

Memory, and what is sent, are the compiler's; FLOPs are by formula (flops.py). The time is an estimate, not
measured: the largest of (a) executed FLOPs at half the peak rate, (b) bytes through the chip's memory at its
full rate and (c) bytes sent over the chip's links at their full rate (hlo.py) if all three overlap
perfectly, their sum if nothing does. Waiting for data, evaluation and checkpoints are left out.
"""

import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mammodino_jax import hlo
from mammodino_jax.commandline import parse
from mammodino_jax.errors import UserError, run_command, suggest
from mammodino_jax.flops import GIB, Chip, chip, step_flops
from mammodino_jax.recipe import Recipe, check_devices, from_config
from mammodino_jax.sharding import make_mesh
from mammodino_jax.train import abstract_batch, abstract_state, jit_step

PEAK_SHARE = 0.5  # of a chip's FLOP/s that matrix products of these sizes may reach
EXAMPLES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v6e:16x16", "v5p:2x2x2", "v5p:4x4x4")


def topology_devices(name: str) -> list:
    """The devices of a TPU topology, which need not exist.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise UserError(
            f"--topology {name} is compiled for by libtpu, which is not installed here (it needs no TPU): "
            "pip install .[tpu]; without --topology the plan is for the devices of this machine"
        )
    # Unless told not to, libtpu asks the cloud what machine this is, and locks the TPU for itself. The type
    # has no effect here; without it libtpu complains.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    # what is traced must not depend on a GPU that happens to be here
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    one_chip = name.endswith(":1x1")
    try:
        return topologies.get_topology_desc(
            name, platform="tpu", **({"chips_per_host_bounds": (1, 1, 1)} if one_chip else {})
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--topology {name}: {str(error).splitlines()[0]}. Expected GENERATION:SHAPE, such as "
            f"{', '.join(EXAMPLES)}.{suggest(name, EXAMPLES)}"
        ) from None


def unit(config) -> int:
    """Images a chip come in multiples of it: dbt_rows keep their share, in every micro-batch."""
    return config.accumulate * config.batch_size // math.gcd(config.batch_size, config.dbt_rows)


def fit_batch(config, chips: int, images: int | None) -> Recipe:
    """The recipe; with `images` a chip in place of batch_size, and the same share of dbt_rows.

    Raises:
      UserError: the batch, or the share, cannot be laid over the chips.
    """
    config = ConfigDict(config.to_dict())
    if images is not None:
        if images < 1 or images % unit(config):
            raise UserError(
                f"--images-per-chip {images} is not a multiple of {unit(config)}: each of "
                f"{config.accumulate} micro-batches holds the same share of rows of volumes on every chip, "
                f"config.dbt_rows {config.dbt_rows} of config.batch_size {config.batch_size}"
            )
        rows = config.dbt_rows * images * chips // config.batch_size
        config.batch_size, config.dbt_rows = images * chips, rows
    recipe = from_config(config)
    check_devices(recipe, chips)
    return recipe


def compile_step(recipe: Recipe, mesh, quick: bool):
    """(compiled train step, None), or (None, bytes needed of a chip) where the compiler finds no room."""
    lowered = jit_step(recipe, mesh).lower(abstract_state(recipe, mesh), abstract_batch(recipe, mesh))
    options = {"exec_time_optimization_effort": -1.0} if quick else None
    try:
        return lowered.compile(compiler_options=options), None
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return None, needed


def needed_bytes(error: str) -> int | None:
    """What a TPU's compiler says it would need of a chip's memory; None: it failed for another reason."""
    used = re.search(r"RESOURCE_EXHAUSTED: Ran out of memory.*?([\d.]+)([KMGT])\b", error, re.DOTALL)
    return used and int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2]))))


def plan(recipe: Recipe, devices: list, quick: bool = False) -> dict:
    """Compile the train step for the devices.

    Returns the figures of the module's head, JSON-able: bytes, seconds, counts. "collectives" and "seconds"
    are missing where the step does not fit, "seconds" also where the chip is unknown.
    """
    kind, chips = devices[0].device_kind, len(devices)
    mesh, known, flops = make_mesh(recipe.fsdp, devices), chip(kind), step_flops(recipe)
    start = time.monotonic()
    compiled, needed = compile_step(recipe, mesh, quick)
    report = {
        "chip": kind,
        "chips": chips,
        "mesh": dict(mesh.shape),
        "batch_size": recipe.batch_size,
        "dbt_rows": recipe.dbt_rows,
        "images_per_chip": recipe.batch_size // chips,
        "quick": quick,
        "compile_seconds": round(time.monotonic() - start, 1),
        "flops": flops,
        "hbm": memory_limit(devices[0]),
        "warnings": batch_warnings(recipe, chips),
    }
    if compiled is None:
        return report | {"memory": {"total": needed}, "fits": False}
    report["memory"] = memory = memory_of(compiled)
    # a TPU's compiler has placed every array; elsewhere the sum decides
    limit = report["hbm"]
    report["fits"] = True if devices[0].platform == "tpu" else limit and memory["total"] <= limit
    program = hlo.parse(compiled.as_text())
    sent = hlo.collectives(program, chips)
    report["collectives"] = {
        name: {
            "count": sum(c.times for c in sent if c.kind == name),
            "bytes": sum(c.times * c.bytes for c in sent if c.kind == name),
        }
        for name in hlo.COLLECTIVES
        if any(c.kind == name for c in sent)
    }
    report["large_collectives"] = large(sent, recipe, mesh)
    report["unknown_loops"] = sum(op.code == "while" and not program.trips(op) for op, *_ in program.walk())
    if known:
        seconds = estimate(known, flops["executed"] / chips, hlo.hbm_bytes(program), sent)
        report["seconds"] = seconds
        report["images_per_second"] = [recipe.batch_size / seconds[k] for k in ("unhidden", "step")]
        report["days"] = [recipe.steps * seconds[k] / 86_400 for k in ("step", "unhidden")]
    return report


def memory_limit(device) -> int | None:
    """Bytes that a program may use of a device: what JAX has of one that is here, else the maker's figure."""
    stats = device.memory_stats() if device in jax.local_devices() else None  # None of a CPU, too
    known = chip(device.device_kind)
    return stats["bytes_limit"] if stats else known and known.hbm


def memory_of(compiled) -> dict:
    m = compiled.memory_analysis()
    parts = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "donated": -m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def estimate(known: Chip, flops: float, hbm_bytes: float, sent: list[hlo.Collective]) -> dict:
    """Seconds of a step on one chip: the module's head says how."""
    parts = {
        "compute": flops / (PEAK_SHARE * known.flops),
        "hbm": hbm_bytes / known.hbm_rate,
        "links": sum(c.sent for c in sent) / known.link_rate,
    }
    return parts | {"step": max(parts.values()), "unhidden": sum(parts.values())}


def large(sent: list[hlo.Collective], recipe: Recipe, mesh) -> list[dict]:
    """Collectives of arrays as large as a chip's masked patch tokens, or its CLS logits over the prototypes.

    Parameters and their gradients are not meant: arrays of their sizes are left out, whole, sharded, or with
    those of all blocks together.
    """
    images = recipe.batch_size // recipe.accumulate // mesh.size
    K, B = recipe.head.prototypes, recipe.batch_size
    sizes = {math.prod(a.shape) for a in jax.tree.leaves(abstract_state(recipe, mesh)["student"])}
    sizes = {n * size // m for size in sizes for n in (1, recipe.model.depth) for m in (1, recipe.fsdp)}
    slots = abstract_batch(recipe, mesh)["mask_index"].shape[1]
    tokens = max(images * slots, 2 * B) * recipe.model.dim  # KoLeo gathers B CLS tokens of a view: few
    found = []
    for c in sent:
        for array in c.arrays:
            size = math.prod(array.shape)
            logits = K in array.shape and size >= 2 * images * K
            if size not in sizes and (logits or size >= tokens):
                what = "prototype logits" if logits else "patch tokens"
                found.append(
                    {"kind": c.kind, "shape": list(array.shape), "dtype": array.dtype, "times": c.times,
                     "as_large_as": what, "where": c.where}
                )  # fmt: skip
    return found


def batch_warnings(recipe: Recipe, chips: int) -> list[str]:
    images, group = recipe.batch_size // recipe.accumulate // chips, recipe.loss.drop_path_group
    found = []
    if recipe.model.drop_path and chips > 1 and (not group or images % group):
        name = group or "0 (the global batch)"
        found.append(
            f"config.loss.drop_path_group {name} does not divide the {images} images of a chip: rows that "
            "drop-path draws are sent between chips"
        )
    if recipe.steps * recipe.batch_size >= 2**31:
        found.append(
            f"config.steps {recipe.steps} x batch_size {recipe.batch_size} is 2^31 samples or more, which "
            "training refuses"
        )
    return found


def largest(config, devices: list, quick: bool, say=print) -> dict:
    """The plan of the largest batch per chip that fits: compiles at few sizes, chosen on a line between them.

    Sizes are those that keep the share of dbt_rows and split no group of drop-path or KoLeo between chips.

    Raises:
      UserError: the chip's memory is unknown, or not even the smallest size fits.
    """
    limit, chips, recipe = memory_limit(devices[0]), len(devices), from_config(config)
    if limit is None:
        raise UserError(f"--largest: the memory of {devices[0].device_kind} is unknown; give a --topology")
    groups = (recipe.loss.drop_path_group, recipe.loss.koleo_group)
    step = math.lcm(unit(config), *(group * recipe.accumulate or 1 for group in groups))
    plans = {}

    def fits(n: int) -> bool:
        plans[n] = plan(fit_batch(config, chips, n * step), devices, quick)
        need = plans[n]["memory"]["total"] / GIB
        verdict = "fits" if plans[n]["fits"] else "does not fit"
        say(f"{n * step} images a chip: {need:.2f} GiB, {verdict} ({plans[n]['compile_seconds']:.0f} s)")
        return plans[n]["fits"]

    if not fits(1):
        need = plans[1]["memory"]["total"] / GIB
        raise UserError(
            f"{step} images a chip need {need:.1f} GiB of {limit / GIB:.0f}: shard parameters with "
            "--config.fsdp, lower config.loss.drop_path_group, or take a larger chip"
        )
    low, high = 1, None
    while high is None or high - low > 1:
        guess = 2
        if len(plans) > 1:
            a, b = sorted(plans)[-2:] if high is None else (low, high)
            need = {n: plans[n]["memory"]["total"] for n in (a, b)}
            slope = max((need[b] - need[a]) / (b - a), 1)
            guess = int(a + (limit - need[a]) / slope)
        guess = max(low + 1, guess if high is None else min(guess, high - 1))
        low, high = (guess, high) if fits(guess) else (low, guess)
    return plans[low]


def render(report: dict) -> str:
    """The report as text for a terminal."""

    def gib(n):
        return f"{n / GIB:10.3f} GiB"

    r, flops, memory = report, report["flops"], report["memory"]
    lines = [
        f"{r['chips']} x {r['chip']}, mesh {' x '.join(f'{k} {v}' for k, v in r['mesh'].items())}; batch "
        f"{r['batch_size']}: {r['images_per_chip']} images a chip, {r['dbt_rows']} rows of volumes in all",
        "",
        f"Memory of a chip, by the compiler{' in a hurry' if r['quick'] else ''}:",
        *(f"  {name:12}{gib(size)}" for name, size in memory.items()),
    ]
    if r["hbm"]:
        verdict = {True: "fits", False: "DOES NOT FIT", None: ""}[r["fits"]]
        lines.append(f"  {'of':12}{gib(r['hbm'])}  {verdict}")
    lines += [
        "",
        "TFLOP of an image, by formula (XLA's own count takes the body of a loop once):",
        *(f"  {name:24}{n / 1e12:8.3f}" for name, n in flops["parts"].items()),
        f"  {'model (MFU)':24}{flops['model_per_image'] / 1e12:8.3f}",
        f"  {'executed (HFU)':24}{flops['executed_per_image'] / 1e12:8.3f}",
    ]
    if "collectives" in r:
        lines += ["", "Sent between chips in a step (arrays as a chip holds them, loops counted):"]
        lines += [
            f"  {name:20}{c['count']:6d} times {c['bytes'] / 1e6:12.3f} MB"
            for name, c in r["collectives"].items()
        ] or ["  nothing"]
        if r["unknown_loops"]:
            lines.append(f"  the bodies of {r['unknown_loops']} loops of unknown length are counted once")
    if "seconds" in r:
        s = r["seconds"]
        slow, fast = (f"{n:.0f}" for n in r["images_per_second"])
        lines += [
            "",
            "Estimate, not measured (assumptions: python -m mammodino_jax.plan --help):",
            f"  compute {s['compute']:.3f} s at {PEAK_SHARE:.0%} of the peak, memory {s['hbm']:.3f} s, links "
            f"{s['links']:.3f} s",
            f"  a step takes {s['step']:.3f} s if they overlap to {s['unhidden']:.3f} s if not: {slow} to "
            f"{fast} images/s, {r['days'][0]:.1f} to {r['days'][1]:.1f} days for all steps",
        ]
    warnings = r["warnings"] + [
        f"{c['kind']} of {c['dtype']}{c['shape']}, as large as {c['as_large_as']}, {c['times']} times: "
        f"{c['where']}"
        for c in r.get("large_collectives", ())
    ]
    lines += ["", *(f"warning: {text}" for text in warnings)] if warnings else []
    lines += ["", f"compiled in {r['compile_seconds']:.0f} s"]
    return "\n".join(lines)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Recipe, e.g. configs/vitb14_518.py.", lock_config=True)
    flags.DEFINE_string("topology", None, "TPU slice, e.g. v5e:16x16; none: the devices that are here.")
    flags.DEFINE_integer("images-per-chip", None, "In place of config.batch_size; dbt_rows keep their share.")
    flags.DEFINE_bool("largest", False, "Find the largest number of images a chip that fits.")
    flags.DEFINE_bool("quick", False, "Compile with the least effort; memory is overestimated.")
    flags.DEFINE_string("json", None, "Write the figures to this file, too.")


def main() -> None:
    f = {
        name: flags.FLAGS[name].value for name in ("topology", "images-per-chip", "largest", "quick", "json")
    }
    config = flags.FLAGS.config
    if f["largest"] and f["images-per-chip"] is not None:
        raise UserError("--largest finds --images-per-chip: give one of them")
    from_config(config)  # a bad recipe is told before libtpu is asked for
    devices = topology_devices(f["topology"]) if f["topology"] else jax.devices()
    if f["largest"]:
        report = largest(config, devices, f["quick"])
    else:
        report = plan(fit_batch(config, len(devices), f["images-per-chip"]), devices, f["quick"])
    print(render(report))
    if f["json"]:
        Path(f["json"]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    example = "python -m mammodino_jax.plan --config=configs/vitb14_518.py --topology v5e:16x16"
    app.run(lambda _: run_command(main), flags_parser=lambda argv: parse(argv, ("config",), example))
