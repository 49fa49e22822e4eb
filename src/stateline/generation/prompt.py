"""Prompts of any kind and size as pieces of token ids, read no faster than the model consumes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from stateline.checks import fail
from stateline.generation.tokenizer import Tokenizer

#: Text, UTF-8 bytes, a file (its path, or open in binary mode), or token ids.
Prompt = str | bytes | Path | BinaryIO | Sequence[int] | Tensor

REMEDY = "Pass tokenizer=load_tokenizer(directory, vocab_size), or give token ids to generate_tokens."


def pieces(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, size: int) -> Iterator[list[int]]:
    """Lists of at most `size` ids that together are the prompt; none is empty.

    A file is read piece by piece if the tokenizer allows it (bytes do); merges of a BPE reach across any cut, so for
    those the whole text is read. A list of ids is checked at once, a text's ids as they are read.

    Raises ValueError for an id outside the vocabulary, naming its place; TypeError for what is no prompt; OSError.
    """
    if isinstance(prompt, str | bytes | Path) or hasattr(prompt, "read"):
        if tokenizer is None:
            raise fail("generate", "a text prompt needs a tokenizer, and this model's ids are not bytes.", REMEDY)
        return _checked(_encoded(prompt, tokenizer, size), vocab_size)  # type: ignore[arg-type]  # no ids here
    ids = _ids(prompt)
    _check(ids, vocab_size, 0)
    return (ids[at : at + size].tolist() for at in range(0, len(ids), size))


def _encoded(prompt: str | bytes | Path | BinaryIO, tokenizer: Tokenizer, size: int) -> Iterator[list[int]]:
    if isinstance(prompt, Path):
        with prompt.open("rb") as file:
            yield from _encoded(file, tokenizer, size)
        return
    read = _slices if isinstance(prompt, str | bytes) else _read
    for text in read(prompt, size, tokenizer.piecewise):  # type: ignore[arg-type]  # chosen by its type
        ids = tokenizer.encode(text)
        for at in range(0, len(ids), size):  # a character may be several ids
            yield ids[at : at + size]


def _slices(text: str | bytes, size: int, piecewise: bool) -> Iterator[str | bytes]:
    step = size if piecewise else max(1, len(text))
    return (text[at : at + step] for at in range(0, len(text), step))


def _read(file: BinaryIO, size: int, piecewise: bool) -> Iterator[bytes]:
    while data := file.read(size if piecewise else -1):
        if not isinstance(data, bytes):
            raise fail("generate", "the prompt's file is open as text.", 'Open it with mode "rb".', error=TypeError)
        yield data


def _checked(lists: Iterable[list[int]], vocab_size: int) -> Iterator[list[int]]:
    position = 0
    for ids in lists:
        _check(np.asarray(ids), vocab_size, position)
        position += len(ids)
        yield ids


def _ids(prompt: Sequence[int] | Tensor) -> np.ndarray:
    values = prompt.detach().cpu().numpy() if isinstance(prompt, Tensor) else np.asarray(prompt)
    if values.size == 0 and values.ndim <= 1:
        return np.zeros(0, dtype=np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        several = "For several prompts take generate_batch." if isinstance(prompt, list | tuple) else ""
        got = f"{values.dtype} of shape {values.shape}" if values.dtype.kind in "iufb" else type(prompt).__name__
        expected = "text, bytes, a file or one list of token ids"
        raise fail("generate", f"the prompt is {got}, expected {expected}.", several, error=TypeError)
    return values


def _check(ids: np.ndarray, vocab_size: int, position: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        at = int(wrong[0])
        raise fail(
            "generate",
            f"the prompt's token {position + at} has id {int(ids[at])}, the vocabulary has ids 0 to {vocab_size - 1}.",
            "Was it encoded for another model?",
        )
