"""From bytes to text that may be shown: characters are never cut, stop strings never appear."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from stateline.checks import fail


class Utf8Decoder:
    """Bytes in, text out: an incomplete character waits for its rest, invalid bytes become U+FFFD.

    However the bytes are split, the concatenated text is the same.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """The bytes of an incomplete character (at most three)."""
        return self._decoder.getstate()[0]

    def wait(self, data: bytes) -> None:
        """Forget what is pending and wait for the rest of `data` instead, the `pending` of another time."""
        self._decoder.setstate((data, 0))

    def push(self, data: bytes) -> str:
        """The text that `data` completes."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end of the bytes: "" or, for a character cut short, U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopFilter:
    """Text in, text out, until a stop string is complete; nothing of that string comes out.

    Of several stops the first to be completed counts (the longest, if they end together), so that the result does not
    depend on how the text is split. Only what could still become a stop is held back.

    held: the text held back; given at the start, it comes before what is pushed.
    """

    def __init__(self, stops: Sequence[str], held: str = "") -> None:
        self._stops = tuple(stops)
        self.held = held
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show after `text`; "" once stopped."""
        if self.stopped:
            return ""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, once no more can come."""
        text, self.held = self.held, ""
        return text


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop or several as a tuple. Raises for an empty one, which would stop before any text."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for s in stops:
        if not isinstance(s, str):
            raise fail("generate", f"stop holds {s!r}, expected strings.", error=TypeError)
        if not s:
            raise fail("generate", "a stop string is empty, so nothing could ever be generated.", "Leave it out.")
    return stops


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
