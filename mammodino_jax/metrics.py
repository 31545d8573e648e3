"""metrics.jsonl, TensorBoard events, and the line on the console; process 0 only."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

from absl import logging
from tensorboardX import SummaryWriter

CONSOLE_SECONDS = 5.0  # at most one console line in so many seconds


class MetricsWriter:
    """Writes the metrics of every `log_every`-th step, bad ones, held-out looks and new warnings.

    Only `time/...` entries vary by run.
    """

    def __init__(self, workdir: Path, start: int, recipe, active: bool = True):
        self._recipe, self._start, self._active = recipe, start, active
        self._began = self._last_console = self._since = time.perf_counter()
        self._wait = self._wait_since = 0.0
        self._steps_since = 0
        self._warned: set[str] = set()  # warnings of the last step
        if not active:
            return
        path = workdir / "metrics.jsonl"
        _truncate(path, start)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir), purge_step=start or None)

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._wait += seconds
        self._wait_since += seconds

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._steps_since += 1
        r = self._recipe
        warned = {name for name in metrics if name.startswith("warning/")}
        told = (
            metrics["bad"] or warned - self._warned or any(name.startswith("held_out/") for name in metrics)
        )
        self._warned = warned
        logged = step % r.run.log_every == 0 or step + 1 == r.steps or told
        if not (self._active and logged):
            return
        now = time.perf_counter()
        span = max(now - self._since, 1e-9)
        row = {
            "step": step, **metrics,
            "time/images_per_s": self._steps_since * r.batch_size / span,
            "time/data_wait": self._wait_since / span,
        }  # fmt: skip
        self._since, self._wait_since, self._steps_since = now, 0.0, 0
        # JSON has no NaN: not-applicable counters are left out
        self._file.write(json.dumps({k: v for k, v in row.items() if math.isfinite(v)}) + "\n")
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        if now - self._last_console >= CONSOLE_SECONDS or step in (self._start, r.steps - 1):
            self._last_console = now
            done = (step + 1 - self._start) / max(r.steps - self._start, 1)
            eta = (now - self._began) * (1 - done) / done
            terms = "  ".join(
                f"{k} {row[k]:.3f}"
                for k in ("loss", "dino_global", "dino_local", "ibot", "koleo", "adjacent")
                if k in row
            )
            logging.info(
                "step %d/%d  %s  entropy %.2f  %.1f images/s  data wait %.0f %%  ETA %s",
                step, r.steps, terms, row["teacher_entropy"],
                row["time/images_per_s"], 100 * row["time/data_wait"], _clock(eta),
            )  # fmt: skip

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            total = max(time.perf_counter() - self._began, 1e-9)
            logging.info("waited for data %.1f %% of the time", 100 * self._wait / total)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _truncate(path: Path, start: int) -> None:
    """Drop lines at or after step `start`, which will be trained again, and a half-written last line."""
    rows = [row for row in read(path) if row["step"] < start]
    if path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)


def read(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    rows = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
