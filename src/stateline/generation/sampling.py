"""Choosing the next token: logits (v,) in, an id and its log-probability out.

Order of the steps, as in transformers: repetition penalty, temperature, top-k, top-p, min-p. Logits are taken as
float32 and weighed in float64 on the CPU whatever device made them, so a seed gives the same draw everywhere. Filters
find their candidates in float32, where order is exact, and weigh only those; all of it runs on one thread.
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
Singles = NDArray[np.float32]
Ids = NDArray[np.int64]

#: Probabilities are summed by blocks, and only the block that a draw falls in is searched.
BLOCK = 256
#: Top-p sums probabilities by levels of the logits, and sorts only the level in which they reach p.
LEVELS = 4096
LARGEST = float(np.finfo(np.float32).max)


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

    def recall(self) -> list[int]:
        """What a new history of the same window must `see` to become equal to this one."""
        return list(self._counts if self._window is None else self._recent)


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

    def repeat(self, token: int, *, random: bool) -> None:
        """Take note of a token that was drawn before, with a random number or without."""
        if random:
            _uniform(self.generator)
        self.drawn += 1
        self.see((token,))

    def restore(self, drawn: int, random: Tensor, history: Iterable[int]) -> None:
        """Go to where another sampler was: its count of draws, its generator's state, what its history recalls."""
        self.drawn = drawn
        self.generator.set_state(random)
        self.history = History(self.config.repetition_window)
        self.history.see(history)


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
    raw = _raw(logits)
    highest = _check(raw, step)
    logz = highest + math.log(np.exp(raw - highest).sum(dtype=np.float64))
    scores = _penalise(raw, config.repetition_penalty, history)
    if config.greedy:
        token = int(scores.argmax())
    else:
        ids, weights = _weigh(scores, config)
        place = _draw(weights, generator)
        token = place if ids is None else int(ids[place])
    return GeneratedToken(token, float(raw[token]) - logz)


def distribution(logits: Tensor, config: SamplingConfig, history: History | None = None) -> Tensor:
    """The probabilities (v,), float64, that `sample` draws from."""
    raw = _raw(logits)
    _check(raw, None)
    scores = _penalise(raw, config.repetition_penalty, history)
    probabilities = np.zeros(scores.size)
    if config.greedy:
        probabilities[scores.argmax()] = 1.0
    else:
        ids, weights = _weigh(scores, config)
        probabilities[slice(None) if ids is None else ids] = weights / weights.sum()
    return torch.from_numpy(probabilities)


def _raw(logits: Tensor) -> Singles:
    values: Singles = logits.detach().to(device="cpu", dtype=torch.float32).numpy()
    return values


def _check(raw: Singles, step: int | None) -> float:
    """The highest logit, once it is certain that all can be compared."""
    highest = float(raw.max()) if raw.size else -math.inf
    if not math.isfinite(highest):
        raise complaint(highest, step)
    return highest


def complaint(highest: float, step: int | None = None) -> Exception:
    """What to raise for logits whose `highest` is no number: NaN, +inf or -inf. `step`: the token's number."""
    where = "" if step is None else f" at generated token {step}"
    if highest == -math.inf:
        return fail("sample", f"no logit is above -inf{where}: there is nothing to choose from.")
    return fail(
        "sample",
        f"the logits{where} hold {'NaN' if math.isnan(highest) else '+inf'}.",
        "The weights or the state are damaged, or a half-precision model overflowed: try dtype=torch.float32.",
    )


def _penalise(raw: Singles, penalty: float, history: History | None) -> Singles:
    if penalty == 1.0 or history is None:
        return raw
    seen = np.fromiter(history.ids(), dtype=np.int64)
    seen = seen[seen < raw.size]
    scores = raw.copy()
    lately = raw[seen].astype(np.float64)
    with np.errstate(over="ignore"):  # what falls below the range of float32 is ruled out
        scores[seen] = np.minimum(np.where(lately > 0, lately / penalty, lately * penalty), LARGEST)
    return scores


def _weigh(scores: Singles, config: SamplingConfig) -> tuple[Ids | None, Floats]:
    """The ids left after temperature and filters (ascending; None: all) and their unnormalised probabilities."""
    highest = float(scores.max())
    ids: Ids | None = None
    if 0 < config.top_k < scores.size:
        ids = np.flatnonzero(scores >= _largest(scores, config.top_k))
    elif config.min_p > 0.0 and config.top_p == 1.0:
        lowest = highest + config.temperature * math.log(config.min_p)
        ids = np.flatnonzero(scores >= lowest - 1e-5 * (1.0 + abs(lowest)))  # a little more: the rest is weighed below
    left = scores if ids is None else scores[ids]
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, as it should
        weights: Floats = np.exp((left.astype(np.float64) - highest) / config.temperature)
    if config.top_p < 1.0:
        ids, weights = _keep(ids, weights, _nucleus(left, weights, config.top_p))
    if config.min_p > 0.0:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= config.min_p))
    return ids, weights


def _keep(ids: Ids | None, weights: Floats, places: Ids) -> tuple[Ids, Floats]:
    return places if ids is None else ids[places], weights[places]


def _largest(scores: Singles, k: int) -> np.float32:
    """The k-th largest score."""
    return np.float32(torch.topk(torch.from_numpy(scores), k).values[-1].item())


def _nucleus(scores: Singles, weights: Floats, top_p: float) -> Ids:
    """Places, ascending, of the fewest largest weights that reach `top_p` of the total; of equals the first count."""
    total = weights.sum()
    # All weights below this together are less than 1 - top_p of the total, so none is needed.
    likely = np.flatnonzero(weights >= (1.0 - top_p) * total / weights.size)
    depth = float(scores.max()) - scores[likely]
    level = (depth * (LEVELS / max(float(depth.max()), 1e-30))).astype(np.int64)
    mass = np.bincount(level, weights[likely]).cumsum()
    last = min(int(np.searchsorted(mass, top_p * total)), mass.size - 1)
    edge = np.flatnonzero(level == last)
    edge = edge[np.argsort(-weights[likely[edge]], kind="stable")]
    before = mass[last - 1] if last else 0.0
    count = 1 + int(np.searchsorted(before + weights[likely[edge]].cumsum(), top_p * total))
    kept = level < last
    kept[edge[:count]] = True
    return likely[kept]


def _draw(weights: Floats, generator: torch.Generator) -> int:
    """Inverse transform: the first place whose cumulative weight exceeds u times the total; never one of weight 0."""
    mass = np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)).cumsum()
    u = _uniform(generator)
    target = min(u * mass[-1], np.nextafter(mass[-1], 0.0))  # u·total may round up to the total
    block = int(np.searchsorted(mass, target, side="right"))
    start, before = block * BLOCK, mass[block - 1] if block else 0.0
    inside = weights[start : start + BLOCK]
    place = int(np.searchsorted(before + inside.cumsum(), target, side="right"))
    return start + min(place, int(np.flatnonzero(inside)[-1]))  # the block's sum may round above its cumulative one


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()
