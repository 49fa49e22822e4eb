"""Text as bytes: what is read, how it is split, and in which order a run sees it.

The order is a function of one counter: window k of a run lies at a place that (seed, k) alone decide. A resumed run
therefore continues exactly where it stopped, whatever the number of processes or the machine.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stateline.checks import fail
from stateline.training.config import DataConfig

#: Texts up to this many bytes are held in memory; larger ones are memory-mapped.
IN_MEMORY = 1 << 30
#: The validation tail is never longer: scoring it takes seconds on a CPU.
VALIDATION_LIMIT = 256 << 10
#: A text with more than this share of undecodable bytes is taken for binary data (or another encoding).
INVALID_LIMIT = 0.01
#: How far the validation split may move to meet a blank line or a line end.
SPLIT_SEARCH = 4096

_CHUNK = 4 << 20
_ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8

Bytes = npt.NDArray[np.uint8]


class ByteText:
    """Bytes of one or more sources, end to end, addressed as one array.

    parts: uint8 arrays, in memory or memory-mapped; nothing is copied before `read`.
    """

    def __init__(self, parts: Sequence[Bytes], digest: str = "") -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)
        self.digest = digest

    @classmethod
    def of(cls, text: bytes | str) -> ByteText:
        """A text from memory; str is encoded as UTF-8."""
        raw = text.encode() if isinstance(text, str) else text
        return cls([np.frombuffer(raw, dtype=np.uint8)], hashlib.sha256(raw).hexdigest())

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) as one array."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            end = int(self.ends[first])
            begin = end - len(self.parts[first])
            pieces.append(self.parts[first][start - begin : min(stop, end) - begin])
            start, first = min(stop, end), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint8), *pieces])

    def section(self, start: int, stop: int) -> ByteText:
        """Bytes [start, stop) as a text of their own; shares memory."""
        pieces = []
        for part, end in zip(self.parts, self.ends, strict=True):
            begin = int(end) - len(part)
            pieces.append(part[max(0, start - begin) : max(0, stop - begin)])
        return ByteText(pieces, f"{self.digest}:{start}-{stop}")


@dataclass(frozen=True)
class TextData:
    """What a run learns from and what it is judged by."""

    train: ByteText
    val: ByteText

    @property
    def digest(self) -> str:
        """Identity of contents and split: a resumed run must have the same."""
        return hashlib.sha256(f"{self.train.digest} {self.val.digest}".encode()).hexdigest()


def load_data(config: DataConfig) -> TextData:
    """Read and split the text. Raises ValueError, before any training, if it is missing, empty, binary or too short."""
    if not config.path:
        raise fail("train", "no text was given.", "Name a text file or a folder: stateline train PATH.")
    text = read_text(config.path, config.pattern, config.force_binary)
    if config.val is not None:
        data = TextData(text, read_text(config.val, config.pattern, config.force_binary))
    else:
        cut = split_point(text, config.val_fraction)
        data = TextData(text.section(0, cut), text.section(cut, len(text)))
    held = f"{config.path} leaves {len(data.train)} bytes for training and {len(data.val)} for validation"
    if len(data.train) <= config.context:
        remedy = f"Give more text, or --context {max(1, (len(data.train) - 1) // 2)}."
        raise fail("train", f"{held}; a context of {config.context} needs {config.context + 1}.", remedy)
    if len(data.val) < 2:
        raise fail("train", f"{held}; expected at least 2.", "Give more text, or a validation text with --val.")
    return data


def read_text(path: str | Path, pattern: str = "*.txt", force_binary: bool = False) -> ByteText:
    """The bytes of a file, or of a folder's files that match `pattern` (searched through, sorted by path).

    Files of a folder that lack a final newline get one, so that two texts never run into each other. Every byte is
    looked at once: the digest identifies the contents. Raises ValueError if there is nothing, or nothing that is text.
    """
    path = Path(path)
    files = _files(path, pattern)
    sizes = [file.stat().st_size for file in files]
    if not any(sizes):
        raise fail("train", f"{path} is empty ({len(files)} file(s), 0 bytes).", "Give a text with some content.")
    mapped = sum(sizes) > IN_MEMORY
    digest = hashlib.sha256()
    parts: list[Bytes] = []
    for file, size in zip(files, sizes, strict=True):
        if not size:
            continue
        try:
            part: Bytes = np.memmap(file, np.uint8, mode="r") if mapped else np.fromfile(file, np.uint8)
        except OSError as error:
            raise fail("train", f"{file} cannot be read: {error.strerror}.") from error
        _inspect(file, part, digest, force_binary)
        parts.append(part)
        if path.is_dir() and part[-1] != ord("\n"):
            parts.append(np.frombuffer(b"\n", np.uint8))
            digest.update(b"\n")
    return ByteText(parts if mapped else [np.concatenate(parts)], digest.hexdigest())


def _files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise fail("train", f"there is no file or folder {path}.", "Check the name.")
    if not path.is_dir():
        raise fail("train", f"{path} is neither a file nor a folder.")
    found = sorted(p for p in path.rglob(pattern) if p.is_file())
    if not found:
        others = sorted({p.suffix for p in path.rglob("*") if p.is_file() and p.suffix})[:6]
        seen = f" (it has {', '.join(others)})" if others else ""
        raise fail("train", f"{path} holds no files like {pattern!r}{seen}.", "Choose others with --pattern, e.g. '*'.")
    return found


def _inspect(file: Path, part: Bytes, digest: hashlib._Hash, force_binary: bool) -> None:
    """Feed the digest and refuse what is not text: NUL bytes, or too much that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    invalid = 0
    for start in range(0, len(part), _CHUNK):
        chunk = part[start : start + _CHUNK].tobytes()
        digest.update(chunk)
        if force_binary:
            continue
        if b"\0" in chunk:
            remedy = "Convert it to UTF-8 (iconv -t utf-8), or read it as it is with --force-binary."
            raise fail("train", f"{file} holds NUL bytes: binary data or UTF-16, expected UTF-8 text.", remedy)
        text = decoder.decode(chunk)
        invalid += 0 if text.isascii() else len(_ESCAPED.findall(text))
    if invalid > INVALID_LIMIT * len(part):
        share = f"{100 * invalid / len(part):.1f} %"
        remedy = "Convert it (iconv -f latin1 -t utf-8), or read it as it is with --force-binary."
        raise fail("train", f"{share} of the bytes of {file} are not UTF-8 text.", remedy)


def split_point(text: ByteText, fraction: float) -> int:
    """Where validation begins: the tail `fraction`, at most VALIDATION_LIMIT, cut at a paragraph, line or character."""
    size = min(int(len(text) * fraction), VALIDATION_LIMIT)
    target = len(text) - size
    search = text.read(target, min(len(text), target + min(SPLIT_SEARCH, size // 2))).tobytes()
    for mark in (b"\n\n", b"\n"):
        if (found := search.find(mark)) >= 0:
            return target + found + len(mark)
    # no line end nearby: at least do not cut a character (its continuation bytes are 10xxxxxx)
    return target + next((i for i, byte in enumerate(search[:4]) if byte & 0xC0 != 0x80), 0)


class Windows:
    """The training windows of a text in the seeded order in which a run meets them.

    Each epoch lays a grid of windows over the text, `context` apart, starting at an offset drawn for that epoch, and
    visits its cells in a permutation drawn for that epoch. As the grid moves, no byte is always a window's first.
    """

    def __init__(self, text: ByteText, context: int, seed: int) -> None:
        self.text, self.context, self.seed = text, context, seed
        # one cell less than fit leaves a whole cell for the offset to move in
        self.per_epoch = max(1, (len(text) - 1) // context - 1)
        self.slack = len(text) - 1 - self.per_epoch * context

    def starts(self, first: int, count: int) -> list[int]:
        """Byte positions of windows number first … first + count − 1 of the run."""
        places = []
        for k in range(first, first + count):
            epoch, cell = divmod(k, self.per_epoch)
            key = _mix(_mix(self.seed) ^ epoch)
            places.append(key % (self.slack + 1) + permuted(cell, self.per_epoch, key) * self.context)
        return places

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (count, context) each: the targets are the inputs one byte on."""
        rows = [self.text.read(start, start + self.context + 1) for start in self.starts(first, count)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def permuted(index: int, n: int, key: int) -> int:
    """Where a permutation of range(n), chosen by `key`, sends `index`; constant memory for any n.

    A Feistel network over the next power of four, walked again while it lands outside range(n)
    (Black & Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key ^ _mix(right << 3 | turn)) & mask)
        index = left << half | right
        if index < n:
            return index


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea & Flood 2014): a 64-bit value that depends on every bit of x."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
