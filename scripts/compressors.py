"""What general compressors make of the test texts, given the training texts too: the yardstick of the model cards.

    python scripts/compressors.py           # measures, prints, and rewrites compressors.json beside this file
    python scripts/compressors.py poems     # one corpus of data/ alone

A compressor's figure is 8 · (C(train + test) − C(train)) / |test| bits per byte, with C the size of its output: what
the test costs it once it has read what the model has learnt from (see KNOWN), the test's own kind last. PPMd's order is
the one that serves the validation text best, found the same way. Needs the xz and zstd commands and pyppmd (the `bench`
extra).
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
#: What is read before each test: what serves PPMd best. Novels before the messages cost it 0.01 bits a byte on these.
KNOWN = {"sotu": ("sotu",), "novels": ("sotu", "novels"), "poems": ("poems",)}
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
        # level 19 sees 8 MB back; the window of 128 MB lets it see all of the training text
        "zstd -19 --long=27": command("zstd", "-19", "--long=27", "-T1", "-q", "-c"),
        f"PPMd variant H, order {order}": ppmd(order),
    }
    return {name: round(cost(size, train, test), 4) for name, size in compressors.items()}


def texts(name: str) -> tuple[bytes, bytes, bytes]:
    """(all that is known, validation, test) of a corpus."""
    known = b"".join((ROOT / "data" / other / "train.txt").read_bytes() for other in KNOWN[name])
    validation, test = ((ROOT / "data" / name / f"{split}.txt").read_bytes() for split in ("validation", "test"))
    return known, validation, test


def digests(name: str) -> list[str]:
    """What identifies the texts of a corpus."""
    return [hashlib.sha256(text).hexdigest() for text in texts(name)]


def main(argv: list[str] | None = None) -> int:
    names = (sys.argv[1:] if argv is None else argv) or list(KNOWN)
    record = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for name in names:
        if name not in KNOWN or not (ROOT / "data" / name / "test.txt").exists():
            print(f"compressors: data/{name}/test.txt is missing; run `make data` first", file=sys.stderr)
            return 1
        figures = measure(*texts(name))
        record[name] = {"data": digests(name), "bits_per_byte": figures}
        FIGURES.write_text(json.dumps(record, indent=1) + "\n")
        for compressor, bits in figures.items():
            print(f"{name}, {compressor}: {bits:.4f} bits per byte", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
