"""A text without end, in constant memory, that takes in new prompts as it goes.

Run: python examples/stream_forever.py [characters]      (no number: until Ctrl-C)
"""

from __future__ import annotations

import itertools
import sys

import stateline
from stateline import state
from stateline.generation import SamplingConfig, Stream


def main(limit: int | None) -> None:
    """Write, hand over another beginning every 200 tokens, and go on from the same state."""
    stream = Stream(stateline.load("bundled"), sampling=SamplingConfig(temperature=0.8, seed=1))
    size, written = state.num_bytes(stream.state), 0
    for beginning in itertools.cycle(["My fellow citizens", "\n\nThe economy", "\n\nAbroad, "]):
        stream.feed(beginning)  # what was written before is remembered, not read again
        print(beginning, end="")
        for piece in stream.text(200):
            print(piece, end="", flush=True)
            written += len(piece)
            if limit is not None and written >= limit:
                assert state.num_bytes(stream.state) == size
                print(f"\n\n{stream.length:,} tokens, {size / 1024:,.0f} KiB of memory for all that was said")
                return


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    except KeyboardInterrupt:
        print()
