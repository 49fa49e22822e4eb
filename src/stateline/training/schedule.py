"""How far a run has come, when it ends, and its learning rate on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stateline.checks import fail
from stateline.training.config import OptimConfig, TrainConfig

DEFAULT_STEPS = 1000
#: Default warm-up: this share of the steps, but not more than so many; so many where only time is given.
WARMUP_SHARE, WARMUP_MOST, WARMUP_TIMED = 0.05, 200, 20


@dataclass(frozen=True)
class Schedule:
    """The end of a run (steps, seconds, or whichever comes first) and its learning rate.

    lr = peak · warm(step) · cosine(progress): warm rises linearly to 1 over `warmup_steps` steps, cosine falls from 1
    to `min_lr_ratio` as progress goes from 0 to 1.
    """

    optim: OptimConfig
    steps: int | None
    seconds: float | None
    warmup_steps: int

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that lies behind step number `step` (0-based), in [0, 1]; 1 at the last step."""
        by_step = step / max(1, self.steps - 1) if self.steps else 0.0
        by_time = elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_step, by_time))

    def finished(self, step: int, elapsed: float) -> bool:
        """Whether no step is left after `step` of them and `elapsed` seconds."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and elapsed >= self.seconds)

    def learning_rate(self, step: int, elapsed: float = 0.0) -> float:
        """The rate for step number `step` (0-based)."""
        low = self.optim.min_lr_ratio
        cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * self.progress(step, elapsed)))
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.optim.lr * warm * cosine


def make_schedule(config: TrainConfig, windows_per_epoch: int) -> Schedule:
    """The schedule a configuration asks for. Raises ValueError if its warm-up is as long as the run."""
    budget = config.budget
    steps, seconds = budget.steps, budget.minutes * 60 if budget.minutes else None
    if budget.epochs:
        per_step = config.data.batch_size * config.data.accumulate
        steps = max(1, math.ceil(budget.epochs * windows_per_epoch / per_step))
    if not steps and not seconds:
        steps = DEFAULT_STEPS
    warmup = config.optim.warmup_steps
    if warmup is None:
        warmup = min(WARMUP_MOST, int(steps * WARMUP_SHARE)) if steps else WARMUP_TIMED
    elif steps and warmup >= steps:
        raise fail("train", f"warmup_steps is {warmup}, but the run has {steps} steps.", "Warm up for fewer.")
    return Schedule(config.optim, steps, seconds, warmup)
