"""Text that goes on: a prompt of any length in, tokens or text out, for as long as wanted, in constant memory.

>>> import stateline
>>> model = stateline.load("bundled")
>>> for piece in stateline.generate(model, "My fellow citizens", max_tokens=5):
...     print(piece, end="")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from stateline import checks, state
from stateline.checks import fail
from stateline.generation.past import Event, Moment, Part, Past
from stateline.generation.prompt import REMEDY, Prompt, pieces
from stateline.generation.sampling import GeneratedToken, Sampler, SamplingConfig, new_generator
from stateline.generation.saved import Saved, read, write
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
    give what one call for 40 gives. Memory stays the same however long the stream. `save` and `load` carry it into
    another process, `fork` copies it, `rollback` takes tokens back; what follows has the bits it would have had.

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
        rollback: int = 0,
    ) -> None:
        """A stream that has read nothing.

        tokenizer: None means bytes for a model of 256 ids, ids alone for others.   chunk: prompt tokens a call.
        rollback: how many of the latest tokens `rollback` can take back; that costs the memory of about ten states.
        """
        checks.number("generate", "chunk", chunk, low=1, integer=True)
        checks.number("Stream", "rollback", rollback, low=0, integer=True)
        self.model = model
        self.tokenizer = default_tokenizer(model, tokenizer)
        self.sampler = Sampler(sampling)
        self.decoder = Utf8Decoder()
        self.state: Any = model.init_state(1)
        self.pending: int | None = None
        self.length = 0
        self._chunk = chunk
        self._held = ""
        self._past = Past(rollback) if rollback else None
        self._torn = False

    def feed(self, prompt: Prompt) -> None:
        """Let the model read a prompt, `chunk` tokens at a time; a file is read no faster than that.

        Raises ValueError for ids outside the vocabulary, TypeError for what is no prompt, OSError for files.
        """
        self.feed_pieces(self.read(prompt))

    def read(self, prompt: Prompt) -> Iterator[list[int]]:
        """The ids that `feed` would give to the model, in pieces; what lies in memory is checked at once."""
        return pieces(prompt, self.tokenizer, self.model.config.vocab_size, self._chunk)

    def feed_pieces(self, lists: Iterable[list[int]]) -> None:
        """Let the model read lists of ids that `read` made."""
        for ids in lists:
            self._take(ids if self.pending is not None else [*opening(self.tokenizer), *ids])

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
        comes out as U+FFFD. Stop strings are looked for within one call; if the loop is left while text that may
        become one is held back, the next call begins with that text.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise no_tokenizer()
        return self._text(tokenizer, self.tokens(max_tokens, ignore_end=ignore_end), stop_strings(stop), final)

    def fork(self, *, seed: int | None = None) -> Stream:
        """An independent copy that would write the same; with a `seed`, one that draws by other random numbers.

        A copy with a new seed cannot be rolled back to before it was made.
        """
        self._check_whole("fork")
        limit = self._past.limit if self._past else 0
        config = self.sampler.config if seed is None else dataclasses.replace(self.sampler.config, seed=seed)
        options: dict[str, Any] = {"tokenizer": self.tokenizer, "chunk": self._chunk, "rollback": limit}
        copy = Stream(self.model, sampling=config, **options)
        copy._return_to(self._moment())
        if seed is not None:
            copy.sampler.generator = new_generator(seed)
        elif self._past:
            copy._past = self._past.copy()
        return copy

    def rollback(self, k: int) -> None:
        """Take the last k tokens back: the stream is, to the bit, as if they had never been fed or drawn.

        Random numbers, penalty history and incomplete characters go back too; text already handed out does not.
        `rollback(0)` repairs a stream that was interrupted inside a token.

        Raises ValueError if the stream does not reach back k tokens: `Stream(rollback=n)` keeps the last n revocable.
        """
        checks.number("rollback", "k", k, low=0, integer=True)
        past = self._past
        if past is None or k > past.reach:
            why = f"Make it with Stream(model, rollback={max(k, 1)})." if not past or k > past.limit else ""
            raise fail("rollback", f"{k} tokens asked, {past.reach if past else 0} can be taken back.", why)
        if not past.parts:
            return
        part = past.back(k)
        self._return_to(part.moment)
        self._torn = False
        for event in part.events:
            self._redo(event)

    def save(self, path: str | Path) -> None:
        """Write all that decides the stream's future to a file, whole or not at all (a safetensors file, no code).

        Raises OSError if the disk is full or not writable; a file that was there is then untouched.
        """
        self._check_whole("save")
        past = self._past.parts if self._past else []
        settings: dict[str, Any] = {"chunk": self._chunk, "rollback": self._past.limit if self._past else 0}
        settings["sampling"] = dataclasses.asdict(self.sampler.config)
        write(path, self.model, self.tokenizer, Saved(settings, [*past, Part(self._moment())]))

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, tokenizer: Tokenizer | None = None) -> Stream:
        """The stream that `save` wrote; on the same machine it goes on with the same bits, in any process.

        `model`, `tokenizer`: those it was made with. Raises ValueError, saying which, if the file is damaged, newer
        than this version, or of another model, dtype or tokenizer; TypeError or ValueError as `Stream`.
        """
        tokenizer = default_tokenizer(model, tokenizer)
        saved = read(path, model, tokenizer)
        settings, (*parts, now) = dict(saved.settings), saved.parts
        stream = cls(model, tokenizer=tokenizer, sampling=SamplingConfig(**settings.pop("sampling")), **settings)
        stream._return_to(now.moment)
        if stream._past:
            stream._past.parts = parts
        return stream

    def _tokens(self, max_tokens: int | None, end: int | None) -> Iterator[GeneratedToken]:
        count = 0
        while max_tokens is None or count < max_tokens:
            if self.pending is None:
                self._take(first_ids(self.tokenizer))
            token = self._draw()
            if token.id == end:
                return
            yield token
            count += 1

    def _text(
        self, tokenizer: Tokenizer, tokens: Iterator[GeneratedToken], stops: tuple[str, ...], final: bool
    ) -> Iterator[str]:
        waiting = StopFilter(stops, self._held)
        for token in tokens:
            piece = waiting.push(self.decoder.push(tokenizer.token_bytes(token.id)))
            self._hold(waiting.held)
            if piece:
                yield piece
            if waiting.stopped:
                return
        last = waiting.push(self.decoder.flush()) if final else ""
        last += waiting.flush()
        self._hold("")
        if last:
            yield last

    # ---- what changes a stream -------------------------------------------------------------------------------------

    def _take(self, ids: list[int]) -> None:
        """Take in new ids, of which the last becomes pending."""
        self._check_whole("feed")
        *ready, last = ids if self.pending is None else [self.pending, *ids]
        before, after = self.state, self.state
        if ready:
            with torch.no_grad():
                batch = torch.tensor([ready], device=device_of(self.model))
                _, after = self.model.extend(batch, before, last_only=True)  # leaves `before` as it was
        self._begin(copy=not ready)
        self._torn = True
        self._note(Event(ids, tail=self.decoder.pending, held=self._held))
        self.state, self.pending = after, last
        self.sampler.see(ids)
        self.length += len(ids)
        self._torn = False

    def _draw(self) -> GeneratedToken:
        """Give the pending token to the model and draw the next."""
        self._check_whole("generate")
        self.model.check_room(self.state)
        self._begin()
        self._torn = True
        logits = step(self.model, [self.pending], self.state, self.tokenizer)
        token = self.sampler.draw(logits[0])
        self._note(Event([token.id], True, not self.sampler.config.greedy, self.decoder.pending, self._held))
        self.pending = token.id
        self.length += 1
        self._torn = False
        return token

    def _redo(self, event: Event) -> None:
        """Let an event happen again, by the same calls of the model."""
        if event.drawn:
            self._begin()
            self._note(event)
            step(self.model, [self.pending], self.state, self.tokenizer)
            self.pending = event.ids[0]
            self.length += 1
            self.sampler.repeat(event.ids[0], random=event.random)
        else:
            self._take(event.ids)
        self.decoder.wait(event.tail)
        self._hold(event.held)

    def _begin(self, *, copy: bool = True) -> None:
        """Before an event: keep a moment if one is due. Without `copy` the state is one that nobody will change."""
        if self._past and self._past.due:
            self._past.begin(self._moment(copy=copy))

    def _note(self, event: Event) -> None:
        if self._past:
            self._past.note(event)

    def _hold(self, text: str) -> None:
        self._held = text
        if self._past:
            self._past.mark(self.decoder.pending, text)

    def _moment(self, *, copy: bool = True) -> Moment:
        with torch.no_grad():
            kept = state.clone(self.state) if copy else self.state
        sampler = self.sampler
        random, history = sampler.generator.get_state(), sampler.history.recall()
        return Moment(kept, self.pending, self.length, sampler.drawn, random, history, self.decoder.pending, self._held)

    def _return_to(self, moment: Moment) -> None:
        with torch.no_grad():
            self.state = state.clone(moment.state)
        self.pending, self.length, self._held = moment.pending, moment.length, moment.held
        self.sampler.restore(moment.drawn, moment.random, moment.history)
        self.decoder.wait(moment.tail)

    def _check_whole(self, op: str) -> None:
        if self._torn:
            problem = "the stream was interrupted inside a token, so its state is neither before nor after it."
            remedy = "Call rollback(0)." if self._past else "Load a saved one; Stream(rollback=1) could be repaired."
            raise fail(op, problem, remedy)


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


# ---- shared with engines ---------------------------------------------------------------------------------------------


#: Of streams that requests go on after: a state and a length, which together tell one place, and the copy made there.
#: Within one state object tokens only become more; going back makes another.
_lent: WeakKeyDictionary[Stream, tuple[ref[Any], int, ref[Any]]] = WeakKeyDictionary()


def moment_of(stream: Stream) -> Moment:
    """All that decides what a stream will write. Raises ValueError if it was interrupted inside a token.

    Its state is a copy, the same one for all who ask at this place while any of them holds it; nobody may change it.
    """
    stream._check_whole("fork")
    source, length, lent = _lent.get(stream, (None, 0, None))
    kept = lent() if source and lent and source() is stream.state and length == stream.length else None
    if kept is None:
        with torch.no_grad():
            kept = state.clone(stream.state)
        _lent[stream] = ref(stream.state), stream.length, ref(kept)
    return dataclasses.replace(stream._moment(copy=False), state=kept)


def stream_at(
    moment: Moment, model: LanguageModel, sampling: SamplingConfig, tokenizer: Tokenizer | None, chunk: int
) -> Stream:
    """A stream that goes on from a moment."""
    stream = Stream(model, sampling=sampling, tokenizer=tokenizer, chunk=chunk)
    stream._return_to(moment)
    return stream


def step(model: LanguageModel, pending: Sequence[int | None], memory: Any, tokenizer: Tokenizer | None) -> Tensor:
    """Logits (b, v) after `pending`, one id a row; `memory` advances in place. Ids no tokenizer knows are left out."""
    with torch.no_grad():
        logits = model.step_(torch.tensor(pending, device=device_of(model)), memory)
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
