"""Images per second, MFU and peak memory of the train step, beside the same step written plainly in PyTorch.

    python -m benchmarks.train_step --recipes vits14_98 --batch 8 --dtype float32,bfloat16 --peer torch
    python -m benchmarks.train_step --recipes vitb14_518,vits14_518,vitl14_518,vitb14_224,vitl14_224 \\
        --attention xla,cudnn --remat none,block --batch 16,32 --peer torch --output FILE.md   (on a GPU)

Every combination is a case, run in a process of its own, one after the other (the peak memory of a process
never falls), on synthetic uint8 crops that lie on the device already. A case that runs out of memory, fails
or finds no time left within --seconds is a row that says so; FILE.md and FILE.json are rewritten after each.

- Time: median of --steps steps after three, each waited for; compiling is not in it. State is donated.
- images/s: images of the batch a second. An image is its 2 global and its local crops; a quarter of them
  bring a slice pair. TFLOP/s = images/s x model FLOPs an image (mammodino_jax/flops.py).
- MFU = TFLOP/s over the device's peak. Model FLOPs: matrix products of teacher and student, all rows (no
  discount for drop-path), no recomputation, the mean number of masked patches. Peak: dense bf16 by the data
  sheet (flops.CHIPS), whatever the dtype; on a CPU the fastest square matrix product in that dtype in this
  run, by either framework. HFU counts what is executed: rows kept by drop-path, recomputation, all slots.
- Peak memory: the device's own count (PyTorch's: its allocator's). On a CPU ours is what the compiler
  assigned (arguments, outputs, temporaries), PyTorch's the whole process, libraries included: not comparable.
- The peer is benchmarks/torch_step.py; what it leaves out of our step is said there. Its "block" is
  activation checkpointing. The ratio is to its fastest row of the same recipe, dtype and batch.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # of the cases: `machine` sets one thread for this process
ENVIRONMENT.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name of what `run` sets; not both
from benchmarks import machine  # noqa: E402, isort: skip
from benchmarks.jax_step import recipe_of  # noqa: E402
from mammodino_jax import flops  # noqa: E402

ROOT = Path(__file__).parents[1]
FIELDS = ("recipe", "dtype", "batch")  # what a row and its peer have in common


def cases(args) -> list[dict]:
    """All combinations, each group with its peers after its first case: they are not to run out of time."""
    found = []
    for recipe, dtype, batch in itertools.product(args.recipes, args.dtype, args.batch):
        same = {"recipe": recipe, "dtype": dtype, "batch": batch, "steps": args.steps}
        ours = [
            {"step": "ours", **same, "attention": attention, "remat": remat}
            for attention, remat in itertools.product(args.attention, args.remat)
        ]
        again = ["none", "block"] if set(args.remat) - {"", "none"} else ["none"]
        peers = [
            {"step": "torch", **same, "attention": "sdpa", "remat": remat, "compile": args.compile}
            for remat in (again if args.peer else ())
        ]
        found += [ours[0], *peers, *ours[1:]]
    return found


def run(case: dict, seconds: float) -> dict:
    """The case with its figures, or with "failed": why there are none."""
    if seconds < 1:
        return case | {"failed": "not run: no time left"}
    module = {"ours": "jax_step", "torch": "torch_step"}[case["step"]]
    environment = ENVIRONMENT | {"XLA_CLIENT_MEM_FRACTION": "0.92"}  # as much of a GPU as PyTorch takes
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps(case)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return case | {"failed": "not finished: no time left"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return case | {"failed": lines[-1][:200]}
    return case | json.loads(done.stdout.splitlines()[-1])


def add_rates(rows: list[dict]) -> None:
    """Fill in what follows from the times: images/s, TFLOP/s, MFU, HFU, and the ratio to the peer."""
    measured = [row for row in rows if "failed" not in row]
    for row in measured:
        ours = {k: v for k, v in row.items() if row["step"] == "ours" or k not in ("attention", "remat")}
        work = flops.step_flops(recipe_of(ours, row["devices"]))
        chip = flops.chip(row["device"])
        peak = max(r["matmul"] for r in measured if r["dtype"] == row["dtype"])
        row["peak_flops"] = row["devices"] * (chip.flops if chip else peak)
        row["flops_per_image"] = work["model_per_image"]
        row["images_per_s"] = row["batch"] * row["devices"] / row["seconds"]
        row["flops_per_s"] = row["images_per_s"] * row["flops_per_image"]
        row["mfu"] = row["flops_per_s"] / row["peak_flops"]
        if row["step"] == "ours":
            row["hfu"] = row["images_per_s"] * work["executed_per_image"] / row["peak_flops"]
    for row in measured:
        peers = [
            r["images_per_s"]
            for r in measured
            if r["step"] == "torch" and all(r[f] == row[f] for f in FIELDS)
        ]
        if peers and row["step"] == "ours":
            row["ratio"] = row["images_per_s"] / row["devices"] / max(peers)


def report(rows: list[dict], command: str) -> str:
    """The rows as a Markdown table, with machine, versions, command and conventions."""

    def percent(share):
        return "" if share is None else f"{100 * share:.1f} %"

    lines = []
    for row in rows:
        name = {"ours": "ours", "torch": "PyTorch, compiled" if row.get("compile") else "PyTorch"}[
            row["step"]
        ]
        line = [row["recipe"], name, row["dtype"], row["attention"] or "recipe's", row["remat"] or "recipe's"]
        line.append(row["batch"])
        if "failed" in row:
            lines.append([*line, row["failed"], *[""] * 8])
            continue
        lines.append([
            *line, f"{row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f})",
            f"{row['images_per_s']:.2f}", f"{row['flops_per_s'] / 1e12:.2f}", percent(row["mfu"]),
            percent(row.get("hfu")), f"{row['peak_bytes'] / 2**30:.2f}", f"{row['compile_s']:.0f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "", f"{row['loss']:.2f}",
        ])  # fmt: skip
    columns = ["recipe", "step", "dtype", "attention", "recompute", "batch a device", "s/step", "images/s"]
    columns += ["TFLOP/s", "MFU", "HFU", "peak GiB", "compile s", "ratio to PyTorch", "loss"]
    peer = any(row["step"] == "torch" and "failed" not in row for row in rows)
    versions = ["jax", "jaxlib", "flax", "numpy"] + (["torch", "timm"] if peer else [])
    text = machine.head(command, versions)
    peaks = {(r["devices"], r["device"], r["dtype"], r["peak_flops"]) for r in rows if "failed" not in r}
    for devices, device, dtype, peak in sorted(peaks):
        text += f"{devices} x {device}, {dtype}: peak {peak / 1e12:.4g} TFLOP/s.\n"
    text += "Synthetic uint8 batches; conventions: head of `benchmarks/train_step.py`.\n\n"
    text += machine.table(columns, lines) + "\n"
    return text + "".join(best(rows))


def best(rows: list[dict]):
    """Lines that compare the best of ours with the best of PyTorch, whatever batch and recomputation."""
    for recipe, dtype in dict.fromkeys((row["recipe"], row["dtype"]) for row in rows):
        found = {}
        for row in rows:
            if "failed" not in row and (row["recipe"], row["dtype"]) == (recipe, dtype):
                rate = row["images_per_s"] / row["devices"]
                found[row["step"]] = max(found.get(row["step"], 0.0), rate)
        if len(found) == 2:
            ours, torch = found["ours"], found["torch"]
            yield (
                f"- {recipe}, {dtype}, best of each: {ours:.2f} images/s a device, PyTorch {torch:.2f}: "
                f"{ours / torch:.2f} x.\n"
            )


def words(text: str) -> list[str]:
    return text.split(",")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=words, required=True, help="nano, vits14, vitb14, vitl14 and _SIZE")
    parser.add_argument(
        "--attention", type=words, default=[""], help="of model.attention; default the recipe's"
    )
    parser.add_argument("--remat", type=words, default=[""], help="of model.remat; default the recipe's")
    parser.add_argument("--dtype", type=words, default=["bfloat16"], help="bfloat16, float32")
    parser.add_argument(
        "--batch", type=lambda t: [int(n) for n in t.split(",")], default=[16], help="a device"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peer", choices=["torch"])
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the peer; default: on a GPU"
    )
    parser.add_argument("--seconds", type=float, default=560, help="no case starts, or goes on, after these")
    parser.add_argument("--output", type=Path, help="FILE.md; FILE.json is written beside it")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.seconds
    command = machine.command("benchmarks.train_step", arguments)
    planned = cases(args)
    for case in planned:  # a name that does not exist is better known before an hour of cases
        recipe_of(
            {k: v for k, v in case.items() if case["step"] == "ours" or k not in ("attention", "remat")}
        )
    rows = []
    for case in planned:
        rows.append(run(case, end - time.monotonic()))
        print(" ".join(str(v) for v in rows[-1].values()), file=sys.stderr, flush=True)
        add_rates(rows)
        if args.output:
            args.output.write_text(report(rows, command))
            args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    print(report(rows, command))


if __name__ == "__main__":
    main()
