"""What the measuring scripts share: one core, CPU time, and the head of their reports.

Import it first: it sets the number of threads before numpy is loaded.
"""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2


def pin() -> None:
    """Stay on one core, with one thread."""
    cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def cpu_seconds(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median CPU time of this process for a call of each; a first call is not counted. They are called in
    turns, so that what else the machine does meets all alike."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            if repeat:
                measured.append(time.process_time() - start)
    return [statistics.median(measured) for measured in times]


def head(command: str, packages: Iterable[str]) -> str:
    """Machine, date, versions and command, as Markdown."""
    names = {}
    if (info := Path("/proc/cpuinfo")).is_file():
        names = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in names.items()}
    cpu = names.get("model name", platform.processor() or platform.machine())
    if "cpu family" in names:  # a hypervisor often hides the rest of the name
        cpu += f" (family {names['cpu family']}, model {names['model']})"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"Machine: {cpu}, {os.cpu_count()} cores, {platform.system()}.\n"
        f"Date: {datetime.now(UTC):%Y-%m-%d}. Versions: Python {platform.python_version()}, {versions}.\n"
        f"Command: `{command}`\n"
    )


def table(columns: list[str], rows: list[list]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def finish(text: str, output: Path | None) -> None:
    """Print a report, and write it where asked."""
    print(text)
    if output:
        output.write_text(text)


def command(module: str, arguments: list[str] | None) -> str:
    """The command line for a report: of paths only the names, so that it names no machine's folders."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", module, *(Path(word).name if "/" in word else word for word in words)])
