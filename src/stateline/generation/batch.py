"""Several texts at once, by an engine made for them: each text ends by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stateline.generation.engine import Engine
from stateline.generation.prompt import Prompt
from stateline.generation.request import configs
from stateline.generation.sampling import SamplingConfig
from stateline.generation.stream import CHUNK, DEFAULT
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
    """What `Engine.generate` gives, by an engine made for these prompts; chunk: their tokens per call of the model."""
    each = configs("generate_batch", prompts, sampling)
    engine = Engine(model, max_batch=max(1, len(prompts)), tokenizer=tokenizer, chunk=chunk)
    return engine.generate(prompts, max_tokens=max_tokens, sampling=each, stop=stop, ignore_end=ignore_end)


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
    """What `Engine.stream` gives, by an engine made for these prompts; chunk: their tokens per call of the model."""
    each = configs("stream_batch", prompts, sampling)
    engine = Engine(model, max_batch=max(1, len(prompts)), tokenizer=tokenizer, chunk=chunk)
    return engine.stream(prompts, max_tokens=max_tokens, sampling=each, stop=stop, ignore_end=ignore_end)
