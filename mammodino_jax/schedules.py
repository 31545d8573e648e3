"""Schedules of DINOv2 (utils/utils.py CosineScheduler): step number -> value.

Each is computed in float64 for a Python int and with jnp for a traced step.
"""

import dataclasses
import math

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warmup from `start` to `base` (its first value is exactly `start`, its last `base`), then a half
    cosine from `base` towards `final`, then constant `final` from step `total` on."""

    base: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0

    def __call__(self, step):
        span = max(self.total - self.warmup, 1)
        if isinstance(step, int):
            if step < self.warmup:
                return self.start + (self.base - self.start) * step / max(self.warmup - 1, 1)
            if step >= self.total:
                return self.final
            angle = math.pi * (step - self.warmup) / span
            return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(angle))
        step = jnp.asarray(step, jnp.float32)
        ramp = self.start + (self.base - self.start) * step / max(self.warmup - 1, 1)
        angle = math.pi * (step - self.warmup) / span
        cosine = self.final + 0.5 * (self.base - self.final) * (1 + jnp.cos(angle))
        return jnp.where(step < self.warmup, ramp, jnp.where(step >= self.total, self.final, cosine))


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """DINOv2's rule: the peak learning rate of a global batch is base_lr * sqrt(batch / 1024)."""
    return base_lr * math.sqrt(batch_size / 1024)
