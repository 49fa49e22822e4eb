"""What a stream needs to go back by a few tokens, in bounded memory: some moments of it, and what happened since each.

To go back, the last moment that is early enough is restored and what happened up to the wanted token is done again, by
the same calls of the model with the same tokens. So the result has the bits of a stream that went no further.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

#: A window of revocable tokens holds about this many moments, so this many states; more would shorten what is redone.
MOMENTS = 8
#: Tokens between moments at least: copying a state costs a good part of a token.
SPACING = 8


@dataclass(frozen=True)
class Moment:
    """All that decides a stream's future but its model, vocabulary and settings. Nobody changes one once it is made.

    state, pending, length: as in `Stream`, the state as it was then.
    drawn, random, history: of its sampler: tokens drawn, the generator's state (uint8), what the penalty has seen.
    tail, held: bytes of an incomplete character, and text that may be the beginning of a stop string.
    """

    state: Any
    pending: int | None
    length: int
    drawn: int
    random: Tensor
    history: list[int]
    tail: bytes
    held: str


@dataclass(frozen=True)
class Event:
    """Tokens that were given to a stream in one piece, or one that it drew (`random`: with a random number).

    tail, held: as in `Moment`, after the event.
    """

    ids: list[int]
    drawn: bool = False
    random: bool = False
    tail: bytes = b""
    held: str = ""


@dataclass
class Part:
    """A moment and what happened until the next one."""

    moment: Moment
    events: list[Event] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The stream's length after the last event."""
        return self.moment.length + sum(len(event.ids) for event in self.events)


class Past:
    """The way back of one stream, `limit` tokens long."""

    def __init__(self, limit: int, parts: list[Part] | None = None) -> None:
        self.limit = limit
        self.parts = parts or []
        self._every = max(SPACING, -(-limit // MOMENTS))

    def copy(self) -> Past:
        """Another stream's past that is the same so far; moments are shared."""
        return Past(self.limit, [Part(part.moment, list(part.events)) for part in self.parts])

    @property
    def due(self) -> bool:
        """Whether the next event should be preceded by a moment."""
        return not self.parts or self.parts[-1].end - self.parts[-1].moment.length >= self._every

    @property
    def reach(self) -> int:
        """How many tokens can be taken back."""
        return min(self.limit, self.parts[-1].end - self.parts[0].moment.length) if self.parts else 0

    def begin(self, moment: Moment) -> None:
        """Add a moment, which was due."""
        self.parts.append(Part(moment))

    def note(self, event: Event) -> None:
        """Add what happened, and forget what is out of reach."""
        self.parts[-1].events.append(event)
        oldest = self.parts[-1].end - self.limit
        while len(self.parts) > 1 and self.parts[1].moment.length <= oldest:
            del self.parts[0]

    def mark(self, tail: bytes, held: str) -> None:
        """Keep what text is waiting after the last event."""
        if self.parts and self.parts[-1].events:
            self.parts[-1].events[-1] = replace(self.parts[-1].events[-1], tail=tail, held=held)

    def back(self, k: int) -> Part:
        """Forget the last k tokens; the moment to restore, and what has then to be done again and noted anew."""
        target = self.parts[-1].end - k
        while self.parts[-1].moment.length > target:
            self.parts.pop()
        part, left = self.parts.pop(), []
        room = target - part.moment.length
        for event in part.events:
            if room > 0:
                left.append(replace(event, ids=event.ids[:room]))
            room -= len(event.ids)
        return Part(part.moment, left)
