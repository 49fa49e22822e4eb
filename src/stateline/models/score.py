"""What a model makes of texts, token by token: the one place that reads sequences to score them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import state as states
from stateline.models.language import LanguageModel

#: Tokens read at once: long enough for full speed, short enough that logits of bytes take 4 MB.
CHUNK = 4096


class Tokens(Protocol):
    """Token ids that need not lie in memory."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop)."""
        ...


@dataclass(frozen=True)
class Span:
    """A stretch [start, stop) of a sequence that is read from a fresh state: its first token is given, not scored."""

    tokens: Tokens
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a span as the model saw them coming.

    logits: (k, v) before each token, in the model's dtype.   targets: (k) the tokens.   first: place of targets[0] in
    the span's sequence.
    """

    span: Span
    first: int
    logits: Tensor
    targets: Tensor

    def nats(self) -> Tensor:
        """−log p of each token (k), in float32 at least."""
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        return F.cross_entropy(logits, self.targets, reduction="none")


def score(
    model: LanguageModel,
    spans: Iterable[Span],
    *,
    chunk: int = CHUNK,
    autocast: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Part]:
    """Every span's tokens after its first, in order, each predicted from all of its span before it.

    A state is carried from chunk to chunk, and short spans are packed side by side, so that neither long spans nor many
    of them cost memory or speed, and no figure depends on `chunk`. Put the model in evaluation mode first. `autocast`
    is the dtype of matrix products. Ends early once `stop()` is true.
    """
    device = next(model.parameters()).device
    carried: Any = None
    for pieces in _batches(spans, chunk):
        if stop():
            return
        rows = [torch.from_numpy(span.tokens.read(a, b + 1).astype("int64")).to(device) for span, a, b in pieces]
        span, _, end = pieces[-1]
        with torch.no_grad(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits, carried = _extend(model, rows, carried)
            carried = states.index(carried, len(rows) - 1) if end < span.stop - 1 else None
        at = 0
        for row, (span, start, _) in zip(rows, pieces, strict=True):
            yield Part(span, start + 1, logits[at : at + len(row) - 1], row[1:])
            at += len(row) - 1


def _extend(model: LanguageModel, rows: list[Tensor], carried: Any) -> tuple[Tensor, Any]:
    """(logits, states) of rows of inputs, each with one token more than is read; the first may go on from `carried`."""
    device = rows[0].device
    if len(rows) == 1:
        state = model.init_state(1, device=device) if carried is None else carried
        logits, state = model.extend(rows[0][None, :-1], state)
        return logits[0], state
    state = model.init_state(len(rows) - (carried is not None), device=device)
    if carried is not None:
        state = states.stack([carried, state])
    bounds = torch.tensor([0, *np.cumsum([len(row) - 1 for row in rows])], dtype=torch.int32, device=device)
    logits, state = model.extend(torch.cat([row[:-1] for row in rows])[None], state, cu_seqlens=bounds)
    return logits[0], state


def _batches(spans: Iterable[Span], chunk: int) -> Iterator[list[tuple[Span, int, int]]]:
    """Lists of (span, start, stop) of inputs, `chunk` of them together; only the last span may go on in the next."""
    batch: list[tuple[Span, int, int]] = []
    room = chunk
    for span in spans:
        at = span.start
        while at < span.stop - 1:  # the last token is no input
            end = min(at + room, span.stop - 1)
            batch.append((span, at, end))
            room -= end - at
            at = end
            if room == 0:
                yield batch
                batch, room = [], chunk
    if batch:
        yield batch
