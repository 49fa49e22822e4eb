"""What general compressors make of the test years, given the training years too: the yardstick of the model card.

    python scripts/compressors.py       # measures, prints, and rewrites compressors.json beside this file

A compressor's figure is 8 · (C(train + test) − C(train)) / |test| bits per byte, with C the size of its output: what
the test years cost it once it has read the training years. PPMd's order is the one that serves the validation years
best, found the same way. Needs the xz and zstd commands and pyppmd (the `bench` extra).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "data" / "sotu"
FIGURES = Path(__file__).with_suffix(".json")

PPMD_ORDERS = (4, 6, 8, 10, 12, 16)
PPMD_MEMORY = 1 << 30  # far more than it needs here: the model is never restarted

Size = Callable[[bytes], int]


def command(*words: str) -> Size:
    """The size of what a command writes when it reads the data on its standard input."""
    if shutil.which(words[0]) is None:
        raise SystemExit(f"compressors: {words[0]} is not on PATH; install it (Debian: apt install xz-utils zstd)")

    def size(data: bytes) -> int:
        return len(subprocess.run(words, input=data, capture_output=True, check=True).stdout)

    return size


def ppmd(order: int) -> Size:
    """The size of PPMd variant H's output at an order."""
    try:
        import pyppmd
    except ImportError as error:
        raise SystemExit("compressors: pyppmd is missing; pip install 'stateline[bench]'") from error

    def size(data: bytes) -> int:
        encoder = pyppmd.Ppmd7Encoder(order, PPMD_MEMORY)
        return len(encoder.encode(data)) + len(encoder.flush())

    return size


def cost(size: Size, known: bytes, text: bytes) -> float:
    """Bits per byte of `text` for a compressor that has read `known`."""
    return 8 * (size(known + text) - size(known)) / len(text)


def measure(train: bytes, validation: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte on the test text by the compressor's name."""
    order = min(PPMD_ORDERS, key=lambda k: cost(ppmd(k), train, validation))
    compressors = {
        "xz -9e": command("xz", "-9e", "-T1", "-c"),
        # level 19 sees 8 MB back; the window of 16 MB lets it see all of the training years
        "zstd -19 --long=24": command("zstd", "-19", "--long=24", "-T1", "-q", "-c"),
        f"PPMd variant H, order {order}": ppmd(order),
    }
    return {name: round(cost(size, train, test), 4) for name, size in compressors.items()}


def main() -> int:
    if not (CORPUS / "test.txt").exists():
        print(f"compressors: {CORPUS / 'test.txt'} is missing; run `make data` first", file=sys.stderr)
        return 1
    texts = [(CORPUS / f"{split}.txt").read_bytes() for split in ("train", "validation", "test")]
    figures = measure(*texts)
    record = {"data": [hashlib.sha256(text).hexdigest() for text in texts], "bits_per_byte": figures}
    FIGURES.write_text(json.dumps(record, indent=1) + "\n")
    for name, bits in figures.items():
        print(f"{name}: {bits:.4f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
