"""Fitting a model of whole signals: batches by samples, warm-up and cosine, the best weights kept whatever happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stateline import checks
from stateline.nn import param_groups
from stateline.training.signals import StopSignals

OP = "fit"
#: Share of the steps in which the rate rises, and what is left of it at the end.
WARMUP, LOWEST = 0.1, 0.01
#: Batches are cut from pools of so many, sorted by length, so that little is padding and the order stays random.
POOL = 16
#: Where nothing says how long to train: as many epochs as make about so many steps, within bounds.
STEPS, FEWEST, MOST = 1500, 20, 200
#: Batches where nothing says how large: about so many an epoch, of 8 to 64 series.
BATCHES = 20

#: What a signal is answered with.
SAID = "Stopping after this step, with the best weights so far. Again to stop at once."

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Series:
    """Prepared signals, each (t, c) float32 with t ≥ 1, and one target a signal, (n) or (n, o)."""

    inputs: Sequence[Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class FitConfig:
    """How a model of signals is fitted. None: chosen from the number of series.

    max_epochs: at most.   batch_size: series a step, fewer where they would have more than `batch_tokens` samples,
    padding included.   learning_rate: its peak.   patience: epochs without a better score on the held-out part after
    which training ends.   clip: largest norm of a step's gradient.
    crop: share of each signal that a step learns from, a piece from anywhere in it, another each time.
    """

    max_epochs: int | None = None
    batch_size: int | None = None
    batch_tokens: int = 65536
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    patience: int | None = None
    clip: float = 1.0
    crop: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size", "patience"):
            if getattr(self, name) is not None:
                checks.number(OP, name, getattr(self, name), low=1, integer=True)
        checks.number(OP, "batch_tokens", self.batch_tokens, low=1, integer=True)
        checks.number(OP, "learning_rate", self.learning_rate, low=0, open_low=True)
        checks.number(OP, "weight_decay", self.weight_decay, low=0)
        checks.number(OP, "clip", self.clip, low=0, open_low=True)
        checks.number(OP, "crop", self.crop, low=0, high=1, open_low=True)

    def batch_of(self, n: int) -> int:
        """Series a step for n of them."""
        return self.batch_size or min(64, max(8, n // BATCHES))

    def epochs_of(self, n: int) -> int:
        """Epochs for n series."""
        return self.max_epochs or min(MOST, max(FEWEST, STEPS // -(-n // self.batch_of(n))))


@dataclass(frozen=True)
class Outcome:
    """What a fit leaves. history: a dict an epoch; best: whose weights the model has; interrupted: by Ctrl-C."""

    history: list[dict[str, float]]
    best: int
    interrupted: bool


def batches(lengths: Sequence[int], size: int, tokens: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """Every index once, in batches of at most `size` series and `tokens` padded samples (one series at least).

    generator: shuffles series and batches; None: longest first, for predicting.
    """
    n = len(lengths)
    order = list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
    pool = n if generator is None else size * POOL
    found: list[list[int]] = []
    for start in range(0, n, pool):
        batch: list[int] = []
        longest = 0
        for i in sorted(order[start : start + pool], key=lambda i: -lengths[i]):
            longest = longest or lengths[i]
            if batch and (len(batch) == size or longest * (len(batch) + 1) > tokens):
                found.append(batch)
                batch, longest = [], lengths[i]
            batch.append(i)
        found.append(batch)
    if generator is not None:
        found = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
    yield from found


def padded(inputs: Sequence[Tensor], chosen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(x (b, t, c), lengths (b), or None where all are equal) of some signals."""
    picked = [inputs[i] for i in chosen]
    lengths = [len(x) for x in picked]
    x = pad_sequence(picked, batch_first=True).to(device)
    return x, None if min(lengths) == max(lengths) else torch.tensor(lengths, device=device)


@torch.no_grad()
def answers(model: nn.Module, inputs: Sequence[Tensor], config: FitConfig) -> Tensor:
    """The model's answers (n, o) to signals, on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found: list[Tensor | None] = [None] * len(inputs)
    for batch in batches([len(x) for x in inputs], 256, config.batch_tokens, None):
        x, lengths = padded(inputs, batch, device)
        for i, row in zip(batch, model(x, lengths=lengths).cpu(), strict=True):
            found[i] = row
    model.train(training)
    return torch.stack([row for row in found if row is not None])


def fit_series(
    model: nn.Module,
    data: Series,
    held: Series | None,
    loss: Loss,
    config: FitConfig,
    *,
    score: Callable[[Tensor, Tensor], float],
    generator: torch.Generator,
    report: Callable[[dict[str, float], int], None] | None = None,
) -> Outcome:
    """Train `model(x, lengths=…)` in place by AdamW; it ends in evaluation mode.

    Args:
        held: signals to judge every epoch by; the best epoch's weights (by `score`, then by loss) are kept. None: the
            last one's.
        loss: of answers and targets, a scalar.   score: of the same, higher is better.
        generator: on the CPU; decides the order of the series.
        report: called after each epoch with its figures and the number of epochs planned.

    Ctrl-C, SIGTERM or a lost terminal ends the training after at least one epoch, keeping the best weights; before that
    a KeyboardInterrupt goes through. Raises ValueError where the loss is no number, or no held-out score is.
    """
    epochs = config.epochs_of(len(data))
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.learning_rate)
    fit = _Fit(model, data, loss, config, optimizer, [group["lr"] for group in optimizer.param_groups], epochs)
    keeper = _Keeper(model, held is not None, config.patience)
    interrupted = False
    try:
        with StopSignals(SAID) as stop:
            for epoch in range(epochs):
                begun = time.perf_counter()
                figures: dict[str, float] = {"epoch": epoch + 1, "loss": fit.epoch(epoch, generator, stop)}
                if held is not None:
                    given = answers(model, held.inputs, config)
                    figures["held_out_loss"] = float(loss(given, held.targets))
                    figures["held_out_score"] = score(given, held.targets)
                figures["seconds"] = round(time.perf_counter() - begun, 3)
                keeper.take(figures)
                if report is not None:
                    report(figures, epochs)
                if keeper.tired:
                    break
    except KeyboardInterrupt:
        if not keeper.history:
            raise
        interrupted = True
    keeper.restore()
    model.eval()
    return Outcome(keeper.history, keeper.best, interrupted)


@dataclass(frozen=True)
class _Fit:
    """What the epochs of a fit share. rates: the peak learning rate of each of the optimiser's groups."""

    model: nn.Module
    data: Series
    loss: Loss
    config: FitConfig
    optimizer: torch.optim.Optimizer
    rates: list[float]
    epochs: int

    def epoch(self, done: int, generator: torch.Generator, stop: StopSignals) -> float:
        """One pass over the series after `done` others; their mean loss. Raises KeyboardInterrupt once told to stop."""
        device = next(self.model.parameters()).device
        lengths = [self._length(x) for x in self.data.inputs]
        order = list(batches(lengths, self.config.batch_of(len(lengths)), self.config.batch_tokens, generator))
        self.model.train()
        total = torch.zeros((), device=device)
        for i, batch in enumerate(order):
            if stop:
                raise KeyboardInterrupt(f"stopped by {stop.received}")
            factor = _rate((done + i / len(order)) / self.epochs)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            x, valid = padded(*self._drawn(batch, generator), device)
            value = self.loss(self.model(x, lengths=valid), self.data.targets[batch].to(device))
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            self.optimizer.step()
            total += value.detach() * len(batch)
        mean = total.item() / len(lengths)
        if not math.isfinite(mean):
            raise checks.fail(OP, f"the loss is {mean} in epoch {done + 1}.", "Take a smaller learning_rate.")
        return mean

    def _length(self, x: Tensor) -> int:
        """Samples of a signal that a step reads."""
        return max(1, round(self.config.crop * len(x)))

    def _drawn(self, batch: list[int], generator: torch.Generator) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Signals and which of them a step reads: a batch as it is, or a piece of each."""
        if self.config.crop == 1:
            return self.data.inputs, batch
        pieces = []
        for x in (self.data.inputs[i] for i in batch):
            length = self._length(x)
            start = int(torch.randint(len(x) - length + 1, (), generator=generator))
            pieces.append(x[start : start + length])
        return pieces, range(len(pieces))


def _rate(share: float) -> float:
    """What multiplies the peak rate when this share of the training is done."""
    if share < WARMUP:
        return 0.05 + 0.95 * share / WARMUP
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


class _Keeper:
    """The history, and a copy of the best weights."""

    def __init__(self, model: nn.Module, judged: bool, patience: int | None) -> None:
        self._model, self._judged, self._patience = model, judged, patience
        self._weights: dict[str, Any] = {}
        self._mark = (-math.inf, -math.inf)
        self.history: list[dict[str, float]] = []
        self.best = 0

    def take(self, figures: dict[str, float]) -> None:
        """Keep an epoch's figures, and its weights if they are the best."""
        mark = (figures["held_out_score"], -figures["held_out_loss"]) if self._judged else (math.inf, math.inf)
        if not self._judged or mark > self._mark:
            self._weights = {name: x.detach().clone() for name, x in self._model.state_dict().items()}
            self._mark, self.best = mark, int(figures["epoch"])
        self.history.append(figures)

    @property
    def tired(self) -> bool:
        return self._judged and self._patience is not None and len(self.history) - self.best >= self._patience

    def restore(self) -> None:
        """Give the model the best weights. Raises ValueError if no epoch had a held-out score that is a number."""
        if not self._weights:
            problem = f"none of {len(self.history)} epochs has a score on the held-out part that is a number"
            remedy = "Look for series there without a value, or set early_stopping=False."
            raise checks.fail(OP, f"{problem}.", remedy)
        self._model.load_state_dict(self._weights)
