"""One text of an engine: where it begins, its prompt in pieces, its tokens one by one, and how it came to its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from stateline.checks import fail
from stateline.generation.past import Moment
from stateline.generation.prompt import Prompt
from stateline.generation.sampling import GeneratedToken, Sampler, SamplingConfig, complaint
from stateline.generation.stream import DEFAULT, Stream, first_ids, moment_of, opening
from stateline.generation.text import StopFilter, Utf8Decoder
from stateline.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stateline.models import LanguageModel

OP = "Engine"


@dataclass(frozen=True, eq=False)
class Event:
    """What happened to a request: a token, its end, or both.

    token: the one drawn; None for ends that draw none, and for the id that ends a text.
    text: what is certain of the text by now and was not told before, in whole characters; often "".
    reason: None while the request goes on; then why it ended, see `Request`.
    """

    request: Request
    token: GeneratedToken | None
    text: str
    reason: str | None


@dataclass(frozen=True)
class Options:
    """What was asked of a request. max_tokens: None for no end.   end: the id that ends the text, or None."""

    max_tokens: int | None
    end: int | None
    stops: tuple[str, ...]
    keep: bool
    context: int | None


class Request:
    """A text that an engine writes; `Engine.add` makes it.

    number: counts an engine's requests from 0.
    count: tokens drawn so far, as far as events have told.
    reason: None while it goes on, then "length", "stop" (a stop string), "end" (an end-of-text id), "cancelled" or
        "error".
    error: what went wrong, where reason is "error".
    stream: with `keep`, once it ended by itself or while it was writing: the `Stream` that goes on from there.
    """

    def __init__(
        self,
        number: int,
        ids: Iterator[list[int]],
        sampler: Sampler,
        options: Options,
        tokenizer: Tokenizer | None,
        start: Moment | None,
        told: deque[Event],
    ) -> None:
        self.number = number
        self.sampler = sampler
        self.options = options
        self.count = 0
        self.reason: str | None = None
        self.error: Exception | None = None
        self.stream: Stream | None = None
        # Where its events go. They are the engine's, or of a loop of their own: so an engine knows what it was given.
        self.told = told
        # What the engine keeps of it: its row of the slots; before, and after where it is kept, (state, row of that).
        self.row: int | None = None
        self.part: tuple[Any, int] | None = None if start is None else (start.state, 0)
        self.launched = 0
        self.limit: int | None = None
        self.numbers: torch.Generator | None = None
        # Ids that the model has not read. Once the prompt is read, one: the last token.
        self.unread = [] if start is None or start.pending is None else [start.pending]
        self.length = 0 if start is None else start.length
        self.before = sampler.drawn
        self._ids: Iterator[list[int]] | None = ids
        self._tokenizer = tokenizer
        self._decoder = Utf8Decoder()
        self._stops = StopFilter(options.stops, "" if start is None else start.held)
        if start is not None:
            self._decoder.wait(start.tail)

    @property
    def ready(self) -> bool:
        """Whether the prompt is read but for the last token."""
        return self._ids is None and len(self.unread) == 1

    def read(self, room: int) -> list[int]:
        """The prompt's next ids, at most `room`, for the model to read; its very last one stays.

        Raises what reading the prompt raises, ValueError where the text is longer than the engine's context.
        """
        while self._ids is not None and len(self.unread) <= room + 1:  # enough to know whether one is left
            ids = next(self._ids, None)
            if ids is None:
                self._ids = None
                if not self.unread:
                    self._see(opening(self._tokenizer) + first_ids(self._tokenizer))
            else:
                self._see(ids if self.length else opening(self._tokenizer) + ids)
        if self.options.context is not None and self.length > self.options.context:
            most = f"more than {self.options.context} tokens, the engine's context"
            problem = f"the prompt, with any text before it, has {most}."
            raise fail(OP, problem, "Shorten it, or make an engine with a larger context.")
        count = min(room, len(self.unread) - 1)
        ids, self.unread = self.unread[:count], self.unread[count:]
        if self.ready:
            left = None if self.options.context is None else self.options.context - self.length
            self.limit = min((n for n in (self.options.max_tokens, left) if n is not None), default=None)
        return ids

    def _see(self, ids: list[int]) -> None:
        self.sampler.see(ids)
        self.unread += ids
        self.length += len(ids)

    def take(self, drawn: GeneratedToken | Exception) -> Event:
        """What a drawn token, or the failure to draw one, means for the text."""
        if isinstance(drawn, Exception):
            return self.fail(drawn)
        if drawn.id < 0:
            return self.fail(complaint(drawn.logprob, self.before + self.count))
        self.count += 1
        self.length += 1
        self.unread = [drawn.id]
        if drawn.id == self.options.end:
            return self._ended(None, "", "end")
        known = b"" if self._tokenizer is None else self._tokenizer.token_bytes(drawn.id)
        text = self._stops.push(self._decoder.push(known))
        if self._stops.stopped:
            self.reason = "stop"
        elif self.count == self.limit:
            return self._ended(drawn, text, "length")
        return Event(self, drawn, text, self.reason)

    def _ended(self, token: GeneratedToken | None, text: str, reason: str) -> Event:
        self.reason = reason
        return Event(self, token, text + self._stops.push(self._decoder.flush()) + self._stops.flush(), reason)

    def fill(self) -> Event:
        """The end of a request that wants no tokens."""
        return self._ended(None, "", "length")

    def cancel(self) -> Event:
        """The end of a request that nobody wants any more."""
        self.reason = "cancelled"
        return Event(self, None, "", self.reason)

    def fail(self, error: Exception) -> Event:
        """The end of a request by an error."""
        self.reason, self.error = "error", error
        return Event(self, None, "", self.reason)

    def moment(self, state: Any) -> Moment:
        """Where the text has got to, for a `Stream` to go on from."""
        random, history = self.sampler.generator.get_state(), self.sampler.history.recall()
        pending, drawn = self.unread[-1], self.sampler.drawn
        tail, held = self._decoder.pending, self._stops.held
        return Moment(state, pending, self.length, drawn, random, history, tail, held)


def beginning(
    after: Stream | None, sampling: SamplingConfig | None, model: LanguageModel, memory: Any
) -> tuple[Sampler, Moment | None]:
    """What a request draws with and goes on from. memory: a state of the engine's, for its sizes.

    Raises ValueError where a stream cannot be continued in this engine or with this sampling.
    """
    if after is None:
        return Sampler(sampling or DEFAULT), None
    if after.model is not model:
        raise fail(OP, "after is a stream of another model.", "Make the stream and the engine with one model.")
    if _sizes(after.state) != _sizes(memory):
        raise fail(OP, "after has a state of other sizes than the engine's.", "Has the engine another context?")
    start = moment_of(after)
    if sampling is None:
        sampler = Sampler(after.sampler.config)
        sampler.restore(start.drawn, start.random, start.history)
    else:
        _check_history(sampling, after)
        sampler = Sampler(sampling)
        sampler.see(start.history)
    return sampler, start


def _sizes(memory: Any) -> list[Any]:
    """Of the parts of a sequence's state."""
    return [(x.shape[1:], x.dtype) for x in pytree.tree_leaves(memory)]


def _check_history(sampling: SamplingConfig, after: Stream) -> None:
    """Raise unless the stream remembers the tokens that a penalty would look at."""
    own = after.sampler.config
    same = own.repetition_penalty != 1 and own.repetition_window == sampling.repetition_window
    if sampling.repetition_penalty != 1 and after.length and not same:
        window = sampling.repetition_window
        problem = f"after did not keep the tokens that a repetition penalty over {window or 'all'} tokens looks at."
        remedy = f"Make the stream with a penalty, 1.0001 for instance, and repetition_window={window}."
        raise fail(OP, problem, remedy)


def configs(
    op: str, prompts: Sequence[Prompt], sampling: SamplingConfig | Sequence[SamplingConfig]
) -> list[SamplingConfig]:
    """How each of several prompts is continued: one configuration each, or one for all with the seeds s, s + 1, …

    Raises TypeError for one text instead of a list, ValueError for another number of configurations, naming `op`.
    """
    if isinstance(prompts, str | bytes):
        raise fail(op, "prompts is one text, expected a list of prompts.", error=TypeError)
    if isinstance(sampling, SamplingConfig):
        seed = sampling.seed
        return [sampling if seed is None else replace(sampling, seed=seed + i) for i in range(len(prompts))]
    if len(sampling) != len(prompts):
        raise fail(op, f"sampling has {len(sampling)} configurations for {len(prompts)} prompts.")
    return list(sampling)
