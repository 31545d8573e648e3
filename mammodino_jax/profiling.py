"""A trace of some training steps (config.profile_steps), to be opened with xprof or Perfetto."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from mammodino_jax.errors import UserError


def steps_of(spec: str) -> range:
    """The steps of "FIRST:END", END excluded as in a slice; "" is none.

    Raises:
      UserError: anything else.
    """
    found = re.fullmatch(r"(\d+):(\d+)", spec)
    steps = range(*map(int, found.groups())) if found else range(0)
    if spec and not steps:
        raise UserError(
            f"config.profile_steps is {spec!r}, expected FIRST:END as 10:13 (steps 10, 11 and 12) or nothing"
        )
    return steps


class Profile:
    """Traces the calls of `steps` into `folder`."""

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps, self._running = folder, steps, False

    def __call__(self, step: int, function: Callable, *arguments):
        """`function(*arguments)`, which is step `step`."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*arguments)
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("traced steps %d to %d in %s", self._steps[0], self._steps[-1], self._folder)
