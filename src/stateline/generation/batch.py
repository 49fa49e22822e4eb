"""Several texts at once, by an engine made for them: each text ends by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stateline.generation.engine import Engine
from stateline.generation.prompt import Prompt
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
    """The texts that continue `prompts`, each what `generate` gives for it alone with its own seed.

    sampling: one configuration a prompt, or one for all, whose seed s then becomes s, s + 1, … from row to row.
    chunk: prompt tokens per call of the model, all rows together.
    The other arguments, and what is raised, as for `generate`.
    """
    engine = Engine(model, max_batch=max(1, len(prompts)), tokenizer=tokenizer, chunk=chunk)
    return engine.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_end=ignore_end)


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
    engine = Engine(model, max_batch=max(1, len(prompts)), tokenizer=tokenizer, chunk=chunk)
    return engine.stream(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_end=ignore_end)
