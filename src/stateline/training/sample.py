"""Text from a model in training, so that progress can be read as well as measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from stateline.training.text import TokenText

if TYPE_CHECKING:
    from stateline.generation import Tokenizer
    from stateline.models import LanguageModel

#: A default prompt is the start of the validation text, up to a space within so many bytes.
PROMPT_BYTES = 24


def sample_text(
    model: LanguageModel,
    prompt: str,
    max_bytes: int,
    seed: int,
    stop: Callable[[], bool],
    tokenizer: Tokenizer | None = None,
) -> str:
    """The prompt and its continuation. The global random state and the model's mode come back as they were."""
    from stateline.generation import SamplingConfig, generate

    training = model.training
    model.eval()
    pieces = [prompt]
    sampling = SamplingConfig(temperature=0.8, seed=seed)
    try:
        with torch.random.fork_rng(devices=[]):
            for piece in generate(model, prompt, max_tokens=max_bytes, sampling=sampling, tokenizer=tokenizer):
                pieces.append(piece)
                if stop() or len("".join(pieces[1:]).encode()) >= max_bytes:
                    break
    finally:
        model.train(training)
    return "".join(pieces)


def default_prompt(text: TokenText, tokenizer: Tokenizer | None = None) -> str:
    """How a text begins: whole words, about PROMPT_BYTES long."""
    ids = text.read(0, min(len(text), PROMPT_BYTES))
    raw = ids.tobytes() if tokenizer is None else b"".join(map(tokenizer.token_bytes, ids.tolist()))[:PROMPT_BYTES]
    head = raw.decode(errors="ignore").lstrip()
    words = head.rsplit(maxsplit=1)
    return (words[0] if len(words) > 1 else head) or "The"


def printable(text: str) -> str:
    """The text without characters that steer a terminal: a model in training may produce any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
