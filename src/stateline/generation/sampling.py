"""Choosing the next token: logits (v,) in, an id and its log-probability out.

Order of the steps, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Logits are taken as
float32 and weighed in float64 on the CPU whatever device made them, so a seed gives the same draw everywhere.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stateline import checks
from stateline.checks import fail

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens; the defaults draw from the model's own distribution.

    temperature: divides the logits; 0 takes the most likely token (the lowest id of equals) and ignores the filters.
    top_k: keep the k most likely tokens, and those as likely as the k-th; 0 keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach top_p, in (0, 1]; 1 keeps all.
    min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1]; 0 keeps all.
    repetition_penalty: tokens seen lately are made this much less likely (positive logits divided, negative ones
        multiplied; Keskar et al. 2019, CTRL, section 4.1); 1 changes nothing, below 1 favours repetition.
    repetition_window: how many tokens back "lately" reaches, prompt included; None: everything so far.
    seed: draws repeat for the same seed; None takes a new one each time.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int | None = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        op = "SamplingConfig"
        checks.number(op, "temperature", self.temperature, low=0.0)
        checks.number(op, "top_k", self.top_k, low=0, integer=True)
        checks.number(op, "top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        checks.number(op, "min_p", self.min_p, low=0.0, high=1.0)
        checks.number(op, "repetition_penalty", self.repetition_penalty, low=0.01, high=100.0)
        if self.repetition_window is not None:
            checks.number(op, "repetition_window", self.repetition_window, low=1, integer=True)
        if self.seed is not None:
            checks.number(op, "seed", self.seed, low=0, high=2**63 - 1, integer=True)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


class GeneratedToken(NamedTuple):
    """A token and its log-probability (nats) under the model itself: before penalty, temperature and filters."""

    id: int
    logprob: float


class History:
    """The ids a repetition penalty looks at: the last `window`, or with None every id ever seen.

    Memory is bounded by the window, or by the vocabulary.
    """

    def __init__(self, window: int | None) -> None:
        self._recent: deque[int] = deque(maxlen=window or 0)
        self._counts: Counter[int] = Counter()
        self._window = window

    def see(self, ids: Iterable[int]) -> None:
        """Add ids, oldest first, and forget those that leave the window."""
        if self._window is None:
            self._counts.update(dict.fromkeys(ids, 1))
            return
        for token in ids:
            if len(self._recent) == self._window:
                oldest = self._recent[0]
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]
            self._recent.append(token)
            self._counts[token] += 1

    def ids(self) -> list[int]:
        """The distinct ids in view."""
        return list(self._counts)


class Sampler:
    """Draws one sequence's tokens: a configuration, its random numbers and the tokens it has seen."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.generator = new_generator(config.seed)
        self.history = History(config.repetition_window)
        self.drawn = 0

    def see(self, ids: Iterable[int]) -> None:
        """Let the repetition penalty know of tokens that were not drawn here: the prompt's."""
        if self.config.repetition_penalty != 1.0:
            self.history.see(ids)

    def draw(self, logits: Tensor) -> GeneratedToken:
        """The next token from `logits` (v,). Raises ValueError, naming the token's number, if they hold NaN."""
        token = sample(logits, self.config, self.generator, self.history, step=self.drawn)
        self.drawn += 1
        self.see((token.id,))
        return token


def new_generator(seed: int | None) -> torch.Generator:
    """An own source of random numbers on the CPU; torch's global one is neither read nor advanced."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
    history: History | None = None,
    *,
    step: int | None = None,
) -> GeneratedToken:
    """Draw one token from `logits` (v,), of any float dtype and device.

    `history` is read, not changed; `step` only names the token in errors. One number is drawn from `generator`, or none
    if the config is greedy. -inf rules a token out.

    Raises ValueError for NaN or +inf among the logits, and if none is above -inf.
    """
    raw = logits.detach().to(device="cpu", dtype=torch.float32).numpy().astype(np.float64)
    highest = _check(raw, step)
    logz = highest + math.log(np.exp(raw - highest).sum())
    scores = _penalise(raw, config.repetition_penalty, history)
    if config.greedy:
        token = int(scores.argmax())
    else:
        token = _draw(_weights(scores, config), generator)
    return GeneratedToken(token, float(raw[token] - logz))


def distribution(logits: Tensor, config: SamplingConfig, history: History | None = None) -> Tensor:
    """The probabilities (v,), float64, that `sample` draws from."""
    raw = logits.detach().to(device="cpu", dtype=torch.float32).numpy().astype(np.float64)
    _check(raw, None)
    scores = _penalise(raw, config.repetition_penalty, history)
    if config.greedy:
        weights = np.zeros_like(scores)
        weights[scores.argmax()] = 1.0
    else:
        weights = _weights(scores, config)
    return torch.from_numpy(weights / weights.sum())


def _check(raw: Floats, step: int | None) -> float:
    """The highest logit, once it is certain that all can be compared."""
    highest = float(raw.max()) if raw.size else -math.inf
    if math.isfinite(highest):
        return highest
    where = "" if step is None else f" at generated token {step}"
    if highest == -math.inf:
        raise fail("sample", f"no logit is above -inf{where}: there is nothing to choose from.")
    raise fail(
        "sample",
        f"the logits{where} hold {'NaN' if math.isnan(highest) else '+inf'}.",
        "The weights or the state are damaged, or a half-precision model overflowed: try dtype=torch.float32.",
    )


def _penalise(raw: Floats, penalty: float, history: History | None) -> Floats:
    if penalty == 1.0 or history is None:
        return raw
    seen = [i for i in history.ids() if i < raw.size]
    scores = raw.copy()
    lately = scores[seen]
    scores[seen] = np.where(lately > 0, lately / penalty, lately * penalty)
    return scores


def _weights(scores: Floats, config: SamplingConfig) -> Floats:
    """Unnormalised probabilities after temperature and filters; the most likely token weighs 1."""
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, as it should
        scores = (scores - scores.max()) / config.temperature
    weights: Floats = np.exp(scores)
    if 0 < config.top_k < weights.size:
        weights[scores < np.partition(scores, -config.top_k)[-config.top_k]] = 0.0
    if config.top_p < 1.0:
        weights = _nucleus(weights, config.top_p)
    if config.min_p > 0.0:
        weights[weights < config.min_p] = 0.0
    return weights


def _nucleus(weights: Floats, top_p: float) -> Floats:
    """The fewest largest weights that reach `top_p` of the total, the others 0."""
    total = weights.sum()
    # All weights below this together are less than 1 - top_p of the total, so none is needed: sort only the others.
    candidates = np.flatnonzero(weights >= (1.0 - top_p) * total / weights.size)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]  # equals by id, so that the cut is reproducible
    last = int(np.searchsorted(weights[order].cumsum(), top_p * total))
    kept = np.zeros_like(weights)
    kept[order[: last + 1]] = weights[order[: last + 1]]
    return kept


def _draw(weights: Floats, generator: torch.Generator) -> int:
    """Inverse transform: the first id whose cumulative weight exceeds u times the total; never one of weight 0."""
    mass = weights.cumsum()
    u = torch.rand((), dtype=torch.float64, generator=generator).item()
    below_total = np.nextafter(mass[-1], 0.0)  # u·total may round up to the total
    return int(np.searchsorted(mass, min(u * mass[-1], below_total), side="right"))
