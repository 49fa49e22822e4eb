"""How far a run has come, when it ends, and its learning rate on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stateline.checks import fail
from stateline.training.config import OptimConfig, TrainConfig

DEFAULT_STEPS = 1000
#: Default warm-up: this share of the steps, but not more than so many; so many where only time is given.
WARMUP_SHARE, WARMUP_MOST, WARMUP_TIMED = 0.05, 200, 20
#: Defaults of the settings that only some schedules have.
MIN_LR_RATIO, DECAY_SHARE, DECAY_FORM = 0.1, 0.2, "linear"


@dataclass(frozen=True)
class Form:
    """A fall from 1 at the start of the decay (x = 0) to 0 at its end (x = 1)."""

    name: str
    fall: Callable[[float], float]

    def __post_init__(self) -> None:
        values = [self.fall(x / 64) for x in range(65)]
        if values[0] != 1 or abs(values[-1]) > 1e-12:
            raise ValueError(f"{self.name}: a form falls from 1 to 0, this one from {values[0]} to {values[-1]}")
        if values != sorted(values, reverse=True):
            raise ValueError(f"{self.name}: a form never rises")


FORMS = {
    form.name: form
    for form in (
        Form("linear", lambda x: 1 - x),
        Form("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        Form("sqrt", lambda x: 1 - math.sqrt(x)),  # Hägele et al. 2024, section 4, "1-sqrt"
    )
}


@dataclass(frozen=True)
class Decay:
    """The last `share` of a run, in which the rate falls to `low` of its peak; a share of 0 never falls."""

    share: float
    form: Form
    low: float

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.low <= 1):
            raise ValueError(f"decay: share and low are {self.share} and {self.low}, expected both in [0, 1]")

    def factor(self, progress: float) -> float:
        """What multiplies the peak when `progress`, in [0, 1], of the run is done."""
        x = (progress - (1 - self.share)) / self.share if self.share else 0.0
        return self.low + (1 - self.low) * self.form.fall(min(1.0, max(0.0, x)))


def _low(optim: OptimConfig) -> float:
    return MIN_LR_RATIO if optim.min_lr_ratio is None else optim.min_lr_ratio


#: What --schedule chooses from.
SCHEDULES: dict[str, Callable[[OptimConfig], Decay]] = {
    "cosine": lambda optim: Decay(1.0, FORMS["cosine"], _low(optim)),
    "wsd": lambda optim: Decay(optim.decay_share or DECAY_SHARE, FORMS[optim.decay_form or DECAY_FORM], _low(optim)),
    "constant": lambda optim: Decay(0.0, FORMS["linear"], 1.0),
}


@dataclass(frozen=True)
class Schedule:
    """The end of a run (steps, seconds, or whichever comes first) and its learning rate.

    lr = peak · warm(step) · decay(progress): warm rises linearly to 1 over `warmup_steps` steps, progress goes from 0
    to 1 over the run.
    """

    peak: float
    decay: Decay
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
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.peak * warm * self.decay.factor(self.progress(step, elapsed))


def make_schedule(config: TrainConfig, windows_per_epoch: int) -> Schedule:
    """The schedule a configuration asks for. Raises ValueError if its warm-up leaves no room for the rest."""
    budget = config.budget
    steps, seconds = budget.steps, budget.minutes * 60 if budget.minutes else None
    if budget.epochs:
        per_step = config.data.batch_size * config.data.accumulate
        steps = max(1, math.ceil(budget.epochs * windows_per_epoch / per_step))
    if not steps and not seconds:
        steps = DEFAULT_STEPS
    warmup = config.optim.warmup_steps
    decay = SCHEDULES[config.optim.schedule](config.optim)
    if warmup is None:
        warmup = min(WARMUP_MOST, int(steps * WARMUP_SHARE)) if steps else WARMUP_TIMED
    elif steps and warmup >= steps:
        raise fail("train", f"warmup_steps is {warmup}, but the run has {steps} steps.", "Warm up for fewer.")
    elif steps and config.optim.schedule == "wsd" and warmup > steps * (1 - decay.share):
        problem = f"warmup_steps is {warmup}, but the decay takes the last {decay.share:.0%} of {steps} steps."
        raise fail("train", problem, "Warm up for fewer, or lower --decay-share.")
    return Schedule(config.peak_lr, decay, steps, seconds, warmup)
