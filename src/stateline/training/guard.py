"""Whether a run is worth going on with: spikes of the loss, and validation that no longer improves.

Both are functions of figures that checkpoints carry, so a resumed run decides as an undisturbed one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from stateline.training.config import GuardConfig

#: A run whose loss stays above the bound for so many steps has diverged.
SPIKES_IN_A_ROW = 5
#: The median absolute deviation is taken to be at least this share of the median.
LEAST_DEVIATION = 0.01


@dataclass
class Watched:
    """What the two rules remember. Losses in nats a token, validation in bits per byte."""

    losses: list[float] = field(default_factory=list)  # the newest that were no spikes, oldest first
    spikes: int = 0  # in a row, now
    skipped: int = 0  # steps whose update was left out, in all
    mark: float | None = None  # the result that --patience measures against
    stale: int = 0  # validations since then


def spike_bound(watched: Watched, config: GuardConfig) -> float | None:
    """The loss above which a step is a spike: median + k · deviation; None while too few losses are known."""
    recent = watched.losses[-config.spike_window :]
    if config.on_spike == "ignore" or len(recent) < config.spike_window:
        return None
    middle = median(recent)
    deviation = median(abs(loss - middle) for loss in recent)
    return middle + config.spike_mads * max(deviation, LEAST_DEVIATION * middle)


def watch_loss(watched: Watched, loss: float, config: GuardConfig) -> bool:
    """Take in a step's loss; True if it is a spike."""
    bound = spike_bound(watched, config)
    if bound is not None and loss > bound:
        watched.spikes += 1
        return True
    watched.spikes = 0
    watched.losses = [*watched.losses, loss][-config.spike_window :]
    return False


def diverged(watched: Watched) -> bool:
    """Whether the loss has stayed above its bound for too long."""
    return watched.spikes >= SPIKES_IN_A_ROW


def watch_validation(watched: Watched, bits: float, config: GuardConfig) -> None:
    """Take in a validation's bits per byte."""
    if watched.mark is None or bits < watched.mark - config.min_delta:
        watched.mark, watched.stale = bits, 0
    else:
        watched.stale += 1


def exhausted(watched: Watched, config: GuardConfig) -> bool:
    """Whether patience has run out."""
    return config.patience > 0 and watched.stale >= config.patience
