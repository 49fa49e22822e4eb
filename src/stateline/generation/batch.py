"""Several texts at once: prompts of unequal length read together, each text ending by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from stateline import checks, state
from stateline.checks import fail
from stateline.generation.prompt import Prompt, pieces
from stateline.generation.sampling import Sampler, SamplingConfig
from stateline.generation.stream import (
    CHUNK,
    DEFAULT,
    check_max_tokens,
    default_tokenizer,
    device_of,
    first_ids,
    no_tokenizer,
    opening,
    step,
)
from stateline.generation.text import StopFilter, Utf8Decoder, stop_strings
from stateline.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stateline.models import LanguageModel


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 256,
    sampling: SamplingConfig | Sequence[SamplingConfig] = DEFAULT,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    ignore_end: bool = False,
    chunk: int = CHUNK,
) -> list[str]:
    """The texts that continue `prompts`, each what `generate` gives for it alone with its own seed.

    sampling: one configuration a prompt, or one for all, whose seed s then becomes s, s + 1, … from row to row.
    chunk: prompt tokens per call of the model, all rows together.
    The other arguments, and what is raised, as for `generate`.
    """
    checks.number("generate_batch", "max_tokens", max_tokens, low=0, integer=True)
    texts = [""] * len(prompts)
    for row, piece in stream_batch(
        model,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        tokenizer=tokenizer,
        ignore_end=ignore_end,
        chunk=chunk,
    ):
        texts[row] += piece
    return texts


def stream_batch(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = 256,
    sampling: SamplingConfig | Sequence[SamplingConfig] = DEFAULT,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    ignore_end: bool = False,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, str]]:
    """Pieces of the texts that continue `prompts`, as (row, piece); arguments as for `generate_batch`."""
    if isinstance(prompts, str | bytes):
        raise fail("generate_batch", "prompts is one text, expected a list of prompts.", error=TypeError)
    checks.number("generate_batch", "chunk", chunk, low=1, integer=True)
    check_max_tokens(max_tokens)
    known = default_tokenizer(model, tokenizer)
    if known is None:
        raise no_tokenizer()
    size = max(1, chunk // max(1, len(prompts)))
    stops = stop_strings(stop)
    rows = [
        _Row(i, pieces(prompt, known, model.config.vocab_size, size), Sampler(config), StopFilter(stops))
        for i, (prompt, config) in enumerate(zip(prompts, _configs(sampling, len(prompts)), strict=True))
    ]
    return _write(model, known, rows, max_tokens, None if ignore_end else known.end)


@dataclass
class _Row:
    """One text of a batch."""

    number: int
    prompt: Iterator[list[int]]
    sampler: Sampler
    stops: StopFilter
    decoder: Utf8Decoder = field(default_factory=Utf8Decoder)
    pending: int | None = None
    count: int = 0

    def next_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The next ids for the model, none when the prompt has no more; its very last one stays pending."""
        for ids in self.prompt:
            if ready := self._read(opening(tokenizer) + ids if self.pending is None else ids):
                return ready
        return self._read(first_ids(tokenizer)) if self.pending is None else []

    def _read(self, ids: list[int]) -> list[int]:
        self.sampler.see(ids)
        before = [] if self.pending is None else [self.pending]
        *ready, self.pending = *before, *ids
        return ready

    def take(self, token: int, tokenizer: Tokenizer, max_tokens: int | None, end: int | None) -> tuple[str, bool]:
        """The text that a drawn token adds, and whether the row goes on."""
        self.pending = token
        self.count += 1
        piece = "" if token == end else self.stops.push(self.decoder.push(tokenizer.token_bytes(token)))
        if self.stops.stopped:
            return piece, False
        if token != end and (max_tokens is None or self.count < max_tokens):
            return piece, True
        return piece + self.stops.push(self.decoder.flush()) + self.stops.flush(), False


def _write(
    model: LanguageModel, tokenizer: Tokenizer, rows: list[_Row], max_tokens: int | None, end: int | None
) -> Iterator[tuple[int, str]]:
    if not rows or max_tokens == 0:
        return
    memory = _read(model, tokenizer, rows)
    while rows:
        logits = step(model, [row.pending for row in rows], memory, tokenizer)
        alive = []
        for at, row in enumerate(rows):
            piece, goes_on = row.take(row.sampler.draw(logits[at]).id, tokenizer, max_tokens, end)
            if piece:
                yield row.number, piece
            if goes_on:
                alive.append(at)
        if len(alive) < len(rows):
            rows = [rows[at] for at in alive]
            with torch.no_grad():
                memory = state.index(memory, alive)


def _read(model: LanguageModel, tokenizer: Tokenizer, rows: list[_Row]) -> Any:
    """The state (rows) after all prompts but their pending ids; rows with more to read go together, padded right."""
    memory = [model.init_state(1) for _ in rows]
    while ready := {i: ids for i, row in enumerate(rows) if (ids := row.next_ids(tokenizer))}:
        lengths = [len(ids) for ids in ready.values()]
        with torch.no_grad():
            padded = [ids + [0] * (max(lengths) - len(ids)) for ids in ready.values()]
            batch = torch.tensor(padded, device=device_of(model))
            known = torch.tensor(lengths, device=batch.device)
            _, after = model.extend(batch, state.stack([memory[i] for i in ready]), lengths=known, last_only=True)
            for at, i in enumerate(ready):
                memory[i] = state.index(after, at)
    with torch.no_grad():
        return state.stack(memory)


def _configs(sampling: SamplingConfig | Sequence[SamplingConfig], count: int) -> list[SamplingConfig]:
    if isinstance(sampling, SamplingConfig):
        seed = sampling.seed
        return [sampling if seed is None else replace(sampling, seed=seed + i) for i in range(count)]
    if len(sampling) != count:
        raise fail("generate_batch", f"sampling has {len(sampling)} configurations for {count} prompts.")
    return list(sampling)
