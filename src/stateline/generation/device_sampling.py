"""Choosing the next tokens of many sequences where their logits are, without a word to the host.

The same steps in the same order and precision as `sampling`, whose `distribution` the tests hold this to: what a
sequence draws is what `Sampler` draws from the same logits and random numbers, but for the order of float64 sums.
What it needs of every sequence lies in a row of some tensors, so that a captured graph can read and advance it.

b rows, v ids, w columns of recent ids. Everything has a fixed shape: what no row asks for is left out by a `Plan`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stateline.generation.sampling import BLOCK, LARGEST, History, SamplingConfig
from stateline.ops.cuda import DTYPES

Rows = dict[str, Tensor]

#: Random numbers that lie ready for a row. They come from its sampler's generator, half of them at a time.
READY = 128
HALF = READY // 2
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, GREEDY = range(6)
DRAWN, SEEN, WINDOW = range(3)
#: Elements that a pass of the search for a nucleus may look at: more thresholds at once where there are few rows.
AT_ONCE = 2**20


class Plan(NamedTuple):
    """What at least one row asks for. top_k: 0, or a power of two that no row's k exceeds (v if that is less)."""

    random: bool
    top_k: int
    top_p: bool
    min_p: bool
    penalty: bool


def plan_for(configs: Iterable[SamplingConfig], v: int) -> Plan:
    """The plan that serves all of these."""
    configs = list(configs)
    drawn = [c for c in configs if not c.greedy]
    largest = max((c.top_k for c in drawn if c.top_k < v), default=0)
    return Plan(
        random=bool(drawn),
        top_k=min(v, 1 << (largest - 1).bit_length()) if largest else 0,
        top_p=any(c.top_p < 1 for c in drawn),
        min_p=any(c.min_p > 0 for c in drawn),
        penalty=any(c.repetition_penalty != 1 for c in configs),
    )


def new_rows(count: int, width: int) -> Rows:
    """Rows for `count` sequences, with room for `width` recent ids each, on the CPU."""
    return {
        "settings": torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64).repeat(count, 1),
        "counters": torch.zeros(count, 3, dtype=torch.int64),
        "uniforms": torch.zeros(count, READY, dtype=torch.float64),
        "recent": torch.zeros(count, width, dtype=torch.int64),
    }


def width_for(config: SamplingConfig, v: int) -> int:
    """Columns of recent ids that a configuration needs."""
    if config.repetition_penalty == 1:
        return 0
    window = config.repetition_window
    return v if window is None else min(v, 1 << (window - 1).bit_length()) if window < v else window


def row(config: SamplingConfig, history: History, uniforms: Tensor, v: int, width: int) -> Rows:
    """One row, for a sequence that drew nothing yet. uniforms: (READY) float64 in [0, 1), its first random numbers."""
    made = new_rows(1, width)
    made["uniforms"][0] = uniforms
    temperature = 1.0 if config.greedy else config.temperature
    top_k = config.top_k if config.top_k < v else 0
    settings = (temperature, top_k, config.top_p, config.min_p, config.repetition_penalty, config.greedy)
    made["settings"][0] = torch.tensor(settings, dtype=torch.float64)
    seen = history.recall()
    if config.repetition_penalty != 1 and seen:
        # Ids that cannot be drawn stand for one that nobody looks at.
        recent = _columns([min(i, v) for i in seen], config.repetition_window, width)
        made["recent"][0] = torch.from_numpy(recent)
        made["counters"][0] = torch.tensor([0, len(seen), config.repetition_window or 0])
    return made


def widened(rows: Rows, width: int) -> Tensor:
    """The recent ids of `rows` in more columns."""
    recent, window = rows["recent"], rows["counters"][:, WINDOW, None]
    if not recent.shape[1]:
        return recent.new_zeros(len(recent), width)
    places = torch.arange(width, device=recent.device)
    return recent.gather(
        1, torch.where(window > 0, places % window.clamp(min=1), places.clamp(max=recent.shape[1] - 1))
    )


def _columns(seen: Sequence[int], window: int | None, width: int) -> np.ndarray:
    """Recent ids in their columns. An id may be in several, so no column is ever empty.

    A window's ids go round in it, and its columns are repeated up to the width. Without a window each id has the column
    of its own number.
    """
    if window is not None:
        return np.resize(np.array([*seen, *[seen[-1]] * (window - len(seen))], dtype=np.int64), width)
    columns = np.full(width, seen[0], dtype=np.int64)
    own = [i for i in seen if i < width]
    columns[own] = own
    return columns


def draw(logits: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """The next tokens from logits (b, v), as (b, 2) float64 [id, log-probability]; `rows` advance in place.

    Where a row's logits hold NaN or +inf, or none is above -inf, it is [-1, the highest], for `sampling.complaint`.
    Logits of 16 or 32 bits on a CUDA device go to kernels where Triton is installed, others to their definition here.
    """
    if logits.is_cuda and logits.dtype in DTYPES and _has_triton():
        from stateline.generation import gpu_sampling

        return gpu_sampling.draw(logits, rows, plan)
    return define(logits, rows, plan)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def define(logits: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """`draw` in PyTorch, for any device and dtype."""
    raw = _padded(logits)
    highest = raw.amax(-1, keepdim=True)
    logz = highest + (raw - highest).exp_().sum(-1, keepdim=True, dtype=torch.float64).log_()
    scores = _penalise(raw, rows) if plan.penalty else raw
    token = scores.argmax(-1, keepdim=True)
    if plan.random:
        uniform = rows["uniforms"].gather(1, rows["counters"][:, DRAWN, None] % READY)
        greedy = rows["settings"][:, GREEDY, None] > 0
        token = torch.where(greedy, token, _pick(weigh(scores, rows, plan), uniform))
    broken = ~torch.isfinite(highest)
    token = token.masked_fill(broken, 0)
    _advance(rows, token, plan)
    logprob = torch.where(broken, highest.double(), raw.gather(1, token) - logz)
    return torch.cat([token.masked_fill(broken, -1).double(), logprob], 1)


def distribution(logits: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """The probabilities (b, v), float64, that `draw` draws from; rows that are greedy take the most likely instead."""
    raw = _padded(logits)
    weights = weigh(_penalise(raw, rows) if plan.penalty else raw, rows, plan)[:, : logits.shape[1]]
    return weights / weights.sum(-1, keepdim=True)


def _padded(logits: Tensor) -> Tensor:
    """(b, v) -> float32 (b, whole blocks), -inf behind the logits, where there is room for at least one."""
    b, v = logits.shape
    padded = logits.new_full((b, (v // BLOCK + 1) * BLOCK), -math.inf, dtype=torch.float32)
    padded[:, :v] = logits
    return padded


def _penalise(raw: Tensor, rows: Rows) -> Tensor:
    recent, penalty = rows["recent"], rows["settings"][:, PENALTY, None]
    lately = raw.gather(1, recent).double()
    changed = torch.where(lately > 0, lately / penalty, lately * penalty).clamp_(max=LARGEST)
    return raw.scatter(1, recent, changed.float())  # an id in several columns gets the same value from each


def weigh(scores: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """Unnormalised probabilities, float64, 0 where a filter rules an id out."""
    settings = rows["settings"]
    highest = scores.amax(-1, keepdim=True).double()
    weights = (scores - highest).div_(settings[:, TEMPERATURE, None]).exp_()
    if plan.top_k:
        k = settings[:, TOP_K, None].long()
        least = scores.topk(plan.top_k).values.gather(
            1, (k - 1).clamp_(0, plan.top_k - 1)
        )  # a row out of use may ask for more
        weights = weights.masked_fill((scores < least) & (k > 0), 0)
    if plan.top_p:
        top_p = settings[:, TOP_P, None]
        weights = weights.masked_fill(~_nucleus(scores, weights, top_p) & (top_p < 1), 0)
    if plan.min_p:
        weights = weights.masked_fill(weights < settings[:, MIN_P, None], 0)
    return weights


def _nucleus(scores: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """Where the fewest largest weights are that reach `top_p` of the total; of equals the first count.

    Scores become whole numbers of the same order, and the largest from which on the weights reach it is found from its
    highest bits down, 1, 2 or 4 bits a pass.
    """
    target = top_p * weights.sum(-1, keepdim=True)
    keys = (scores + 0.0).view(torch.int32)  # which makes one zero of two
    keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    least = torch.full_like(target, -(2**31), dtype=torch.int32)
    bits = next((n for n in (4, 2) if scores.numel() << n <= AT_ONCE), 1)
    steps = torch.arange(1, 1 << bits, device=scores.device, dtype=torch.int64)
    for shift in range(32 - bits, -1, -bits):
        tried = (least + (steps << shift)).int()
        mass = torch.where(keys[:, None] >= tried[:, :, None], weights[:, None], 0).sum(-1)
        least = (least + ((mass >= target).sum(-1, keepdim=True) << shift)).int()
    above, equal = keys > least, keys == least
    before = torch.where(above, weights, 0).sum(-1, keepdim=True)
    each = torch.where(equal, weights, 0).amax(-1, keepdim=True)
    count = ((target - before) / each).floor()
    count += before + count * each < target
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= count))


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform: the first place (b, 1) whose cumulative weight exceeds u·total, never of weight 0."""
    blocks = weights.unflatten(1, (-1, BLOCK))
    mass = blocks.sum(-1).cumsum(-1)
    total = mass[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    block = (mass <= target).sum(-1, keepdim=True).clamp_(max=mass.shape[1] - 1)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1)
    place = (before + inside.cumsum(-1) <= target).sum(-1, keepdim=True)
    places = torch.arange(BLOCK, device=weights.device)
    last = torch.where(inside > 0, places, 0).amax(
        -1, keepdim=True
    )  # the block's sum may round above its cumulative one
    return block * BLOCK + torch.minimum(place, last)


def _advance(rows: Rows, token: Tensor, plan: Plan) -> None:
    """Count the tokens (b, 1) that were drawn, and remember them where a penalty looks back."""
    counters = rows["counters"]
    if plan.penalty:
        recent, window = rows["recent"], counters[:, WINDOW, None]
        width = recent.shape[1]
        round_, place = window.clamp(min=1), torch.arange(width, device=token.device)
        own = torch.where(window > 0, place % round_ == counters[:, SEEN, None] % round_, place == token)
        recent.copy_(torch.where(own, token, recent))
        counters[:, SEEN] += 1
    counters[:, DRAWN] += 1
