"""Text from a model in training, so that progress can be read as well as measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from stateline.training.data import ByteText

if TYPE_CHECKING:
    from stateline.models import LanguageModel

#: A default prompt is the start of the validation text, up to a space within so many bytes.
PROMPT_BYTES = 24


def sample_text(model: LanguageModel, prompt: str, max_bytes: int, seed: int, stop: Callable[[], bool]) -> str:
    """The prompt and its continuation. The global random state and the model's mode come back as they were."""
    from stateline.generation import SamplingConfig, generate

    training = model.training
    model.eval()
    pieces = [prompt]
    sampling = SamplingConfig(temperature=0.8, seed=seed)
    try:
        with torch.random.fork_rng(devices=[]):
            for piece in generate(model, prompt, max_tokens=max_bytes, sampling=sampling):
                pieces.append(piece)
                if stop():
                    break
    finally:
        model.train(training)
    return "".join(pieces)


def default_prompt(text: ByteText) -> str:
    """How a text begins: whole words, about PROMPT_BYTES long."""
    head = text.read(0, min(len(text), PROMPT_BYTES)).tobytes().decode(errors="ignore").lstrip()
    words = head.rsplit(maxsplit=1)
    return (words[0] if len(words) > 1 else head) or "The"


def printable(text: str) -> str:
    """The text without characters that steer a terminal: a model in training may produce any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
