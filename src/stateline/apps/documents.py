"""Files and folders as documents: text, whole or by lines, and JSON lines with a text field; plain or compressed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stateline.checks import fail
from stateline.training.corpus import COMPRESSED, JSON_LINES, TextCheck, contents, is_json_lines, split

#: What is read of a folder.
SUFFIXES = (".txt", *JSON_LINES)

_LOOK = 1 << 20  # bytes of a mapped file that are looked at together


@dataclass(frozen=True)
class Document:
    """One text of a file.

    source: the file, as it is called in reports.   data: its bytes, uint8, possibly memory-mapped.
    consumed: bytes of all files that are read once this document is.   stored: how many of them are the document's.
    """

    source: str
    data: np.ndarray
    consumed: int = 0
    stored: int = 0

    @classmethod
    def of(cls, text: bytes | str, source: str = "text") -> Document:
        """A text from memory; str is encoded as UTF-8."""
        data = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
        return cls(source, data, 0, len(data))


@dataclass(frozen=True)
class Corpus:
    """Files to read documents from, in order.

    lines: each line of a text file is a document, its newline included; otherwise the file is one.
    field: of each JSON line, the text.
    limit: bytes of text at which reading stops; the document there is cut, at a character's start.
    force_binary: read files even if they are not UTF-8 text.
    """

    files: Sequence[Path]
    lines: bool = False
    field: str = "text"
    limit: int | None = None
    force_binary: bool = False

    @classmethod
    def of(
        cls,
        paths: Iterable[str | Path] | str | Path,
        *,
        lines: bool = False,
        field: str = "text",
        limit: int | None = None,
        force_binary: bool = False,
    ) -> Corpus:
        """The files that paths name; a folder stands for its .txt, .jsonl and .ndjson files, sorted.

        Raises ValueError if one is missing, holds nothing readable, or if all are empty.
        """
        if isinstance(paths, str | Path):
            paths = [paths]
        files = [file for path in paths for file in _files(Path(path).expanduser())]
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise fail("eval", f"limit is {limit!r}, expected a whole number of bytes from 1.")
        corpus = cls(list(dict.fromkeys(files)), lines, field, limit, force_binary)
        if not any(file.stat().st_size for file in corpus.files):
            raise fail("eval", f"{len(files)} file(s) with 0 bytes were given.", "Give a text with some content.")
        return corpus

    @property
    def size(self) -> int:
        """Bytes of the files that will be read, for progress: exact for plain text, as stored for others."""
        total = sum(file.stat().st_size for file in self.files)
        return total if self.limit is None else min(total, self.limit)

    def documents(self) -> Iterator[Document]:
        """The documents that hold anything. Raises ValueError naming the file, and the line of bad JSON."""
        left = self.limit
        before = 0
        for file in self.files:
            last = 0
            for data, consumed in self._read(file, left):
                if left is not None and len(data) >= left:
                    cut = _character_start(data, left)
                    if cut:
                        yield Document(str(file), data[:cut], self.limit or 0, cut)
                    return
                if len(data):
                    left = None if left is None else left - len(data)
                    yield Document(str(file), data, before + consumed, consumed - last)
                last = consumed
            before += file.stat().st_size

    def _read(self, file: Path, most: int | None) -> Iterator[tuple[np.ndarray, int]]:
        """(bytes of a document, bytes of the file read by its end); what lies after `most` bytes may be left out."""
        if is_json_lines(file):
            yield from _json_lines(file, self.field)
            return
        check = TextCheck(file, self.force_binary, "eval")
        if self.lines:
            for line, at in _lines(file):
                check.feed(line)
                yield np.frombuffer(line, np.uint8), at
        elif size := file.stat().st_size:
            data = _whole(file, most)
            for at in range(0, len(data), _LOOK):
                check.feed(data[at : at + _LOOK].tobytes())
            check.finish()
            yield data, size
        check.finish()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise fail("eval", f"{path} holds no {', '.join(SUFFIXES)} files.", "Name the files themselves.")
        return found
    if not path.is_file():
        raise fail("eval", f"there is no file or folder {path}.", "Check the name.")
    with path.open("rb"):  # one that may not be read is reported before any work
        return [path]


def _whole(file: Path, most: int | None) -> np.ndarray:
    """A file's text: mapped, or decompressed up to about `most` bytes."""
    if file.suffix.lower() not in COMPRESSED:
        return np.memmap(file, np.uint8, mode="r")[:most]
    held = bytearray()
    with file.open("rb") as raw:
        for block in contents(file, raw, "eval"):
            held += block
            if most is not None and len(held) > most:
                break
    return np.frombuffer(held, np.uint8)[:most]


def _lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """A file's lines with their ends, and how many of its bytes are read by then."""
    with file.open("rb") as raw:
        if file.suffix.lower() not in COMPRESSED:
            at = 0
            for line in raw:
                at += len(line)
                yield line, at
            return
        held: bytes | None = None
        for part in split(contents(file, raw, "eval"), b"\n"):
            if held is not None:
                yield held + b"\n", raw.tell()
            held = part
        if held:
            yield held, raw.tell()


def _json_lines(file: Path, field: str) -> Iterator[tuple[np.ndarray, int]]:
    for number, (line, at) in enumerate(_lines(file), 1):
        if line.strip():
            yield np.frombuffer(_field(line, field, f"{file}:{number}"), np.uint8), at


def _field(line: bytes, field: str, where: str) -> bytes:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise fail("eval", f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise fail("eval", f"{where} holds a {type(record).__name__}, expected an object with the field {field!r}.")
    if field not in record:
        known = ", ".join(sorted(record)[:8]) or "none"
        raise fail("eval", f"{where} has no field {field!r}; it has {known}.", "Choose one with --field.")
    text = record[field]
    if not isinstance(text, str):
        raise fail("eval", f"{where}: {field!r} is a {type(text).__name__}, expected a string.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise fail("eval", f"{where}: {field!r} holds half a surrogate pair, which is no text.") from error


def _character_start(data: np.ndarray, at: int) -> int:
    """The last place up to `at` where a UTF-8 character may begin (continuation bytes are 10xxxxxx)."""
    if at >= len(data):
        return len(data)
    for back in range(min(4, at + 1)):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at
