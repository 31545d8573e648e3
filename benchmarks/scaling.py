"""What more devices and processes cost besides their work: weak scaling on fake CPU devices.

    python -m benchmarks.scaling --devices 1,2,4,8 --processes 1,2 --output FILE.md

Every device gets the same number of images (--batch), so N of them have N times the work of one. Fake devices
share the cores of this machine, so N times the step of one device is the ideal:

    overhead = seconds(N devices) / (N * seconds(1 device)) - 1

It holds collectives (copies in memory; Gloo over the loopback between processes), the waiting of devices for
each other, and small programs sharing the cores worse than a large one; a real network is not in it. Below 0,
one device does not fill the cores. Meshes: data (N, 1) and fsdp (1, N), where arrays of 64 KiB and more are
sharded so that the nano model has some. Median of --steps steps after three. Each layout runs in processes of
its own.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # of the workers: `machine` sets one thread for this process
from benchmarks import machine  # noqa: E402, isort: skip
from benchmarks.jax_step import recipe_of, synthetic_batch, timed  # noqa: E402

ROOT = Path(__file__).parents[1]


def work(case: dict) -> dict:
    """One process of a layout: time the step."""
    import jax

    devices, processes = case["devices"], case["processes"]
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(  # compiling starves heartbeats on few cores: they would end the run
            case["address"], processes, case["process"], heartbeat_timeout_seconds=3600
        )
    from mammodino_jax import sharding
    from mammodino_jax.train import abstract_state, init_state, jit_step

    sharding.MIN_BYTES = 64 * 2**10
    recipe = recipe_of(case, devices)
    mesh = sharding.make_mesh(devices if case["mesh"] == "fsdp" else 1)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(recipe, mesh))
    start = jax.jit(functools.partial(init_state, recipe), out_shardings=shardings).lower().compile()
    rows = {}
    for name, value in synthetic_batch(recipe).items():  # this process's part
        size = len(value) // processes
        rows[name] = value[case["process"] * size :][:size]
    batch = sharding.put_batch(rows, mesh)
    step = jit_step(recipe, mesh).lower(abstract_state(recipe, mesh), batch).compile()
    print("ready", flush=True)  # all have compiled before any goes on: Gloo waits 30 s for the others
    sys.stdin.readline()
    held = {"state": start()}

    def run():
        held["state"], metrics = jax.block_until_ready(step(held["state"], batch))
        held["loss"] = float(metrics["loss"])

    return timed(run, case["steps"]) | {"loss": held["loss"]}


def run(layout: dict) -> dict:
    """Start the processes of a layout and take the slowest's figures."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    # XLA's CPU runtime may start independent collectives in another order on each device: Gloo ends with a
    # "collective mismatch", devices of one process wait for each other without end (both seen, jax 0.10.2)
    in_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    flags = f"{ENVIRONMENT.get('XLA_FLAGS', '')} {in_order}"
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = []
    for process in range(layout["processes"]):
        case = json.dumps(layout | {"process": process, "address": address})
        command = [sys.executable, "-m", "benchmarks.scaling", "--work", case]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
    if all(process.stdout.readline() == "ready\n" for process in started):
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        return layout | {"failed": "a process failed"}
    results = [json.loads(text.splitlines()[-1]) for text in texts]
    return layout | max(results, key=lambda r: r["seconds"])


def layouts(devices: list[int], processes: list[int]) -> list[dict]:
    return [
        {"devices": n, "processes": p, "mesh": mesh}
        for p in processes
        for n in devices
        for mesh in ("data", "fsdp")
        if n % p == 0 and not (n == 1 and mesh == "fsdp")
    ]


def report(rows: list[dict], command: str) -> str:
    """The rows as a Markdown table; the first is the single device."""
    one, lines = rows[0]["seconds"], []
    for r in rows:
        line = [r["processes"], r["devices"], r["mesh"], r["devices"] * r["batch"]]
        if "failed" in r:
            lines.append([*line, r["failed"], "", ""])
            continue
        overhead = r["seconds"] / (r["devices"] * one) - 1
        line += [f"{r['seconds']:.3f} ({r['fastest']:.3f} to {r['slowest']:.3f})", f"{100 * overhead:+.0f} %"]
        lines.append([*line, f"{r['loss']:.4f}"])
    columns = ["processes", "devices", "mesh", "images", "s/step", "overhead", "loss"]
    text = machine.head(command, ("jax", "jaxlib", "flax", "numpy"))
    text += f"{rows[0]['recipe']}, {rows[0]['batch']} synthetic images a device, {rows[0]['dtype']}.\n\n"
    return text + machine.table(columns, lines)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--processes", type=numbers, default=[1, 2])
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--batch", type=int, default=4, help="images a device")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        print(json.dumps(work(args.work)))
        return
    if args.devices[0] != 1 or args.processes[0] != 1:
        parser.error("--devices and --processes begin with 1, which the others are compared with")
    same = {"recipe": args.recipe, "batch": args.batch, "dtype": "float32", "steps": args.steps}
    rows, command = [], machine.command("benchmarks.scaling", arguments)
    for layout in layouts(args.devices, args.processes):
        rows.append(run(layout | same))
        if "failed" in rows[0]:
            parser.error("the single device failed: nothing to compare with")
        text = report(rows, command)
        if args.output:
            args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
