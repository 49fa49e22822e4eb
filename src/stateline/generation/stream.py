"""Text that goes on: a prompt of any length in, tokens or text out, for as long as wanted, in constant memory.

>>> import stateline
>>> model = stateline.load("bundled")
>>> for piece in stateline.generate(model, "My fellow citizens", max_tokens=5):
...     print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from stateline import checks
from stateline.checks import fail
from stateline.generation.prompt import REMEDY, Prompt, pieces
from stateline.generation.sampling import GeneratedToken, Sampler, SamplingConfig
from stateline.generation.text import StopFilter, Utf8Decoder, stop_strings
from stateline.generation.tokenizer import BYTES, ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from stateline.models import LanguageModel

T = TypeVar("T")

#: Prompt tokens per call of the model: enough to fill its matrix products, some ten MB of activations at d_model 768.
CHUNK = 2048
DEFAULT = SamplingConfig()


class Stream:
    """One text in the making: what the model remembers, the token it has not seen yet, and the sampler.

    Feeding and generating may alternate at will: `feed` a prompt, take some `text`, feed more. Two calls for 20 tokens
    give what one call for 40 gives. Memory stays the same however long the stream.

    state: the model's state after every token but the last (`stateline.state` copies, saves and forks it).
    pending: the last token's id, not yet given to the model; None before the first.
    length: tokens so far, prompts included.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        sampling: SamplingConfig = DEFAULT,
        tokenizer: Tokenizer | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """`tokenizer`: None means bytes for a model of 256 ids, ids alone for others; `chunk`: prompt tokens a call."""
        checks.number("generate", "chunk", chunk, low=1, integer=True)
        self.model = model
        self.tokenizer = default_tokenizer(model, tokenizer)
        self.sampler = Sampler(sampling)
        self.decoder = Utf8Decoder()
        self.state: Any = model.init_state(1)
        self.pending: int | None = None
        self.length = 0
        self._chunk = chunk

    def feed(self, prompt: Prompt) -> None:
        """Let the model read a prompt, `chunk` tokens at a time; a file is read no faster than that.

        Raises ValueError for ids outside the vocabulary, TypeError for what is no prompt, OSError for files.
        """
        self.feed_pieces(self.read(prompt))

    def read(self, prompt: Prompt) -> Iterator[list[int]]:
        """The ids that `feed` would give to the model, in pieces; what lies in memory is checked at once."""
        return pieces(prompt, self.tokenizer, self.model.config.vocab_size, self._chunk)

    def feed_pieces(self, lists: Iterator[list[int]]) -> None:
        """Let the model read lists of ids that `read` made."""
        for ids in lists:
            before = opening(self.tokenizer) if self.pending is None else [self.pending]
            self._extend([*before, *ids])

    def tokens(self, max_tokens: int | None = 256, *, ignore_end: bool = False) -> Iterator[GeneratedToken]:
        """Generate `max_tokens` tokens, or without end if None; an end-of-text id stops it and is not yielded.

        A stream that was fed nothing starts from the tokenizer's `start` id: a newline for bytes.
        Raises ValueError if the model's logits hold NaN.
        """
        check_max_tokens(max_tokens)
        return self._tokens(max_tokens, None if ignore_end else getattr(self.tokenizer, "end", None))

    def text(
        self,
        max_tokens: int | None = 256,
        *,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        final: bool = False,
    ) -> Iterator[str]:
        """Generate text in non-empty pieces, up to `max_tokens` tokens or a stop string, which is never part of it.

        Pieces hold whole characters; one that is cut short by `max_tokens` waits for the next call, or with `final`
        comes out as U+FFFD. Stop strings are looked for within one call.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise no_tokenizer()
        return self._text(tokenizer, self.tokens(max_tokens, ignore_end=ignore_end), stop_strings(stop), final)

    def _tokens(self, max_tokens: int | None, end: int | None) -> Iterator[GeneratedToken]:
        if self.pending is None:
            self._extend(first_ids(self.tokenizer))
        count = 0
        while max_tokens is None or count < max_tokens:
            logits = step(self.model, [self.pending], self.state, self.tokenizer)
            token = self.sampler.draw(logits[0])
            self.pending = token.id
            self.length += 1
            if token.id == end:
                return
            yield token
            count += 1

    def _text(
        self, tokenizer: Tokenizer, tokens: Iterator[GeneratedToken], stops: tuple[str, ...], final: bool
    ) -> Iterator[str]:
        waiting = StopFilter(stops)
        for token in tokens:
            if piece := waiting.push(self.decoder.push(tokenizer.token_bytes(token.id))):
                yield piece
            if waiting.stopped:
                return
        last = waiting.push(self.decoder.flush()) if final else ""
        if last := last + waiting.flush():
            yield last

    def _extend(self, ids: list[int]) -> None:
        """Take in `ids`, which begin with the pending token if there is one; the last becomes pending."""
        self.length += len(ids) - (self.pending is not None)
        self.sampler.see(ids if self.pending is None else ids[1:])
        if len(ids) > 1:
            with torch.inference_mode():
                batch = torch.tensor([ids[:-1]], device=device_of(self.model))
                _, self.state = self.model.extend(batch, self.state, last_only=True)
        self.pending = ids[-1]


def generate(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_tokens: int | None = 256,
    sampling: SamplingConfig = DEFAULT,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    ignore_end: bool = False,
    chunk: int = CHUNK,
) -> Iterator[str]:
    """Text that continues `prompt`, in pieces, as the model writes it; the prompt itself is not repeated.

    Args:
        prompt: text, UTF-8 bytes, a `Path` or binary file (read piece by piece: a million bytes take no more memory
            than a thousand), or token ids. An empty one starts from a newline (bytes) or the tokenizer's start id.
        max_tokens: None goes on for ever, in constant memory; stop by leaving the loop.
        sampling: how tokens are drawn; the same seed gives the same text.
        stop: one string or several; text ends before the first that appears.
        tokenizer: None means bytes for a model of 256 ids; others need `load_tokenizer`.
        ignore_end: go on after an end-of-text id.
        chunk: prompt tokens per call of the model.

    Arguments are checked at the call, the prompt is read when the first piece is asked for.

    Raises ValueError or TypeError naming the argument; ValueError naming the token if logits hold NaN.
    """
    stream = Stream(model, sampling=sampling, tokenizer=tokenizer, chunk=chunk)
    ids = stream.read(prompt)
    text = stream.text(max_tokens, stop=stop, ignore_end=ignore_end, final=True)
    return _fed(stream, ids, text)


def generate_tokens(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_tokens: int | None = 256,
    sampling: SamplingConfig = DEFAULT,
    tokenizer: Tokenizer | None = None,
    ignore_end: bool = False,
    chunk: int = CHUNK,
) -> Iterator[GeneratedToken]:
    """Tokens that continue `prompt`, each an (id, logprob) pair; arguments as for `generate`.

    Needs no tokenizer if the prompt is token ids.
    """
    stream = Stream(model, sampling=sampling, tokenizer=tokenizer, chunk=chunk)
    ids = stream.read(prompt)
    return _fed(stream, ids, stream.tokens(max_tokens, ignore_end=ignore_end))


def _fed(stream: Stream, ids: Iterator[list[int]], out: Iterator[T]) -> Iterator[T]:
    stream.feed_pieces(ids)
    yield from out


# ---- shared with batches ---------------------------------------------------------------------------------------------


def step(model: LanguageModel, pending: Sequence[int | None], state: Any, tokenizer: Tokenizer | None) -> Tensor:
    """Logits (b, v) after `pending`, one id a row; the state advances in place. Ids no tokenizer knows are left out."""
    with torch.inference_mode():
        logits = model.step_(torch.tensor(pending, device=device_of(model)), state)
        return logits[:, : vocabulary(model, tokenizer)]


def vocabulary(model: LanguageModel, tokenizer: Tokenizer | None) -> int:
    """Ids that may be generated: the model's table may be padded beyond what the tokenizer knows."""
    return min(model.config.vocab_size, tokenizer.vocab_size if tokenizer else model.config.vocab_size)


def default_tokenizer(model: LanguageModel, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer given, else bytes for a model of 256 ids. Raises ValueError if it knows more ids than the model."""
    size = model.config.vocab_size
    if tokenizer is None:
        return ByteTokenizer() if size == BYTES else None
    if tokenizer.vocab_size > size:
        raise fail(
            "generate", f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}.", "Take the model's own."
        )
    return tokenizer


def opening(tokenizer: Tokenizer | None) -> list[int]:
    """Ids put before a prompt."""
    return list(tokenizer.prefix) if tokenizer else []


def first_ids(tokenizer: Tokenizer | None) -> list[int]:
    """What an empty prompt starts from. Raises ValueError if the vocabulary has nothing for that."""
    start = tokenizer.start if tokenizer else None
    if start is None:
        raise fail("generate", "the prompt is empty and this vocabulary has no start id.", "Give at least one token.")
    return [start]


def check_max_tokens(max_tokens: int | None) -> None:
    """Raise unless it is None or a whole number from 0."""
    if max_tokens is not None:
        checks.number("generate", "max_tokens", max_tokens, low=0, integer=True)


def no_tokenizer() -> Exception:
    """The complaint that text was asked of a model whose ids mean nothing here."""
    return fail("generate", "text needs a tokenizer, and this model's ids are not bytes.", REMEDY)


def device_of(model: LanguageModel) -> torch.device:
    """Where the model's ids must be."""
    return next(model.parameters()).device
