"""metrics.jsonl, TensorBoard events, and the line on the console; process 0 only."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import jax
from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from mammodino_jax.flops import chip, step_flops
from mammodino_jax.workdir import write_whole

CONSOLE_SECONDS = 5.0  # at most one console line in so many seconds


class MetricsWriter:
    """Writes the metrics of every `log_every`-th step, bad ones, held-out looks and new warnings.

    Only `time/...` entries vary by run. A full disk does not stop it: rows wait until they can be written.
    """

    def __init__(self, workdir: Path, start: int, recipe, active: bool = True):
        self._recipe, self._start, self._active = recipe, start, active
        self._began = self._last_console = self._since = time.perf_counter()
        self._wait = self._wait_since = 0.0
        self._steps_since = 0
        self._warned: set[str] = set()  # warnings of the last step
        here = chip(jax.devices()[0].device_kind)
        # seconds of a step at the full rate of all devices: MFU is their share (flops.py has the convention)
        self._ideal = step_flops(recipe)["model"] / (here.flops * jax.device_count()) if here else math.nan
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        self._unwritten = b""
        self._full = self._blind = False  # whether writing metrics.jsonl, the events failed last
        _truncate(self._path, start)
        self._board = None

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
            metrics["bad"]
            or "checkpoint_failed" in metrics
            or warned - self._warned
            or any(name.startswith("held_out/") for name in metrics)
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
            "time/mfu": self._steps_since * self._ideal / span,
            "time/peak_gib": self._peak_bytes() / 2**30,
        }  # fmt: skip
        self._since, self._wait_since, self._steps_since = now, 0.0, 0
        # JSON has no NaN: not-applicable counters are left out, as are MFU and memory on a CPU
        known = {k: v for k, v in row.items() if math.isfinite(v)}
        self._unwritten += json.dumps(known).encode() + b"\n"
        full, self._full = self._full, False
        try:
            self.flush(sync=False)
        except OSError as error:
            self._full = True
            if not full:
                logging.warning("the metrics of step %d wait in memory: %s", step, error)
        try:
            self._show(step, known)
            self._blind = False
        except OSError as error:
            if not self._blind:
                logging.warning("TensorBoard does not get the metrics of step %d: %s", step, error)
            self._blind = True
            if self._board:
                with contextlib.suppress(OSError):  # its rest fits no better
                    self._board.close()
            self._board = None
        if now - self._last_console >= CONSOLE_SECONDS or step in (self._start, r.steps - 1):
            self._last_console = now
            done = (step + 1 - self._start) / max(r.steps - self._start, 1)
            eta = (now - self._began) * (1 - done) / done
            terms = "  ".join(
                f"{k} {row[k]:.3f}"
                for k in ("loss", "dino_global", "dino_local", "ibot", "koleo", "adjacent")
                if k in row
            )
            mfu = f"  MFU {row['time/mfu']:.0%}" if "time/mfu" in known else ""
            logging.info(
                "step %d/%d  %s  entropy %.2f  %.1f images/s%s  data wait %.0f %%  ETA %s",
                step, r.steps, terms, row["teacher_entropy"],
                row["time/images_per_s"], mfu, 100 * row["time/data_wait"], _clock(eta),
            )  # fmt: skip

    @staticmethod
    def _peak_bytes() -> float:
        """The most memory of a device that was in use at once; NaN on a CPU."""
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", math.nan)

    def flush(self, sync: bool = True) -> None:
        """Write the rows that wait, with `sync` down to the disk; on an OSError all of them wait on."""
        if not self._active:
            return
        with self._path.open("ab", buffering=0) as file:
            end, rest = file.tell(), self._unwritten
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file)
            except OSError:
                file.truncate(end)
                raise
        self._unwritten = b""

    def _show(self, step: int, row: dict[str, float]) -> None:
        """Add a row to the TensorBoard events.

        Not by the library's SummaryWriter: a full disk ends its thread, and then its queue blocks the run.
        """
        if self._board is None:  # after a failure a new file: the end of the old one may be broken
            self._board = EventsWriter(str(self._path.with_name("events")), f".{step}")
            if self._start:  # hides what was logged of steps that are trained again
                log = SessionLog(status=SessionLog.START)
                self._board.write_event(Event(step=self._start, wall_time=time.time(), session_log=log))
        values = [Summary.Value(tag=name, simple_value=v) for name, v in row.items() if name != "step"]
        self._board.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
        self._board.flush()

    def close(self) -> None:
        if self._active:
            try:
                self.flush()
                if self._board:
                    self._board.close()
            except OSError as error:
                logging.warning("the last metrics are lost: %s", error)
            total = max(time.perf_counter() - self._began, 1e-9)
            logging.info("waited for data %.1f %% of the time", 100 * self._wait / total)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _truncate(path: Path, start: int) -> None:
    """Drop lines at or after step `start`, which will be trained again, and a half-written last line."""
    if path.exists():
        rows = [row for row in read(path) if row["step"] < start]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


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
