"""Documents as a stream of pieces, from text files, folders and JSON lines, plain or compressed, in constant memory.

A document is a file, a part of one between two separators, or a record of JSON lines. It may be larger than memory: it
comes in pieces, cut where a tokenizer would cut too.
"""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stateline.checks import fail
from stateline.training.config import DataConfig

#: Bytes of a piece, about. Smaller ones cost speed, larger ones memory.
PIECE = 128 << 10
#: A text with more than this share of undecodable bytes is taken for binary data (or another encoding).
INVALID_LIMIT = 0.01
#: Bytes after which that share is looked at before the file's end.
ENOUGH = 1 << 20

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")

_READ = 64 << 10  # of the file; compressed text grows a few times, and then still fits
_ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
# Between a letter and a space or line end followed by a letter, every common tokenizer starts a new word: cut there,
# the pieces have the ids of the whole. Failing that at a line end, or before any character.
_CUTS = (
    re.compile(rb"(?s:.*)[A-Za-z]()[ \n][A-Za-z]"),
    re.compile(rb"(?s:.*)\S()\n"),
    re.compile(rb"(?s:.*)()[^\x80-\xbf]"),
)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Some bytes of a document, and whether they are its first and its last. at: bytes of all files read so far."""

    data: bytes
    first: bool
    last: bool
    at: int


class TextCheck:
    """Refuses what is not UTF-8 text: NUL bytes, or too much that cannot be decoded."""

    def __init__(self, file: Path, force: bool, op: str = "train") -> None:
        self.file, self.force, self.op = file, force, op
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._invalid = self._seen = 0

    def feed(self, chunk: bytes) -> None:
        """Look at more of the file. Raises ValueError."""
        if self.force:
            return
        if b"\0" in chunk:
            remedy = "Convert it to UTF-8 (iconv -t utf-8), or read it as it is with --force-binary."
            raise fail(self.op, f"{self.file} holds NUL bytes: binary data or UTF-16, expected UTF-8 text.", remedy)
        text = self._decoder.decode(chunk)
        self._seen += len(chunk)
        self._invalid += 0 if text.isascii() else len(_ESCAPED.findall(text))
        if self._seen >= ENOUGH:
            self.finish()

    def finish(self) -> None:
        """Judge what was seen. Raises ValueError."""
        if self._invalid > INVALID_LIMIT * self._seen:
            share = f"{100 * self._invalid / self._seen:.1f} %"
            remedy = "Convert it (iconv -f latin1 -t utf-8), or read it as it is with --force-binary."
            raise fail(self.op, f"{share} of the bytes of {self.file} are not UTF-8 text.", remedy)


def find_files(path: Path, pattern: str) -> list[Path]:
    """The file, or a folder's files that match, sorted by path. Raises ValueError if there are none."""
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


def is_json_lines(file: Path) -> bool:
    """Whether a file's name says JSON lines, compressed or not."""
    suffixes = [s.lower() for s in file.suffixes]
    return bool(suffixes) and suffixes[-2 if suffixes[-1] in COMPRESSED and len(suffixes) > 1 else -1] in JSON_LINES


def is_plain(file: Path) -> bool:
    """Whether a file's bytes are its text."""
    return not is_json_lines(file) and file.suffix.lower() not in COMPRESSED


def separator_of(config: DataConfig) -> bytes:
    r"""What stands between documents of one text file, `\n` and `\t` written out; b"" for nothing."""
    return (config.document_separator or "").replace("\\n", "\n").replace("\\t", "\t").encode()


def check_options(files: list[Path], config: DataConfig) -> None:
    """Raise ValueError for options that say nothing about these files."""
    json_lines = [file for file in files if is_json_lines(file)]
    if json_lines and config.document_separator:
        problem = f"document_separator is set, but {json_lines[0]} holds JSON lines, whose records are the documents."
        raise fail("train", problem, "Drop --document-separator.")
    if not json_lines and config.text_field != "text":
        problem = f"text_field is {config.text_field!r}, but no file is JSON lines ({', '.join(JSON_LINES)})."
        raise fail("train", problem, "Drop --text-field.")


def pieces(files: list[Path], config: DataConfig) -> Iterator[Piece]:
    """Every document of the files, piece by piece; empty ones are left out. Raises ValueError naming the file."""
    before = 0
    for file in files:
        try:
            with file.open("rb") as raw:
                for data, first, last in _cut(_chunks(file, raw, config)):
                    yield Piece(data, first, last, before + raw.tell())
        except OSError as error:
            raise fail("train", f"{file} cannot be read: {error.strerror or error}.") from error
        before += file.stat().st_size


def _chunks(file: Path, raw: BinaryIO, config: DataConfig) -> Iterator[tuple[bytes, bool]]:
    """(bytes, whether a document ends after them)."""
    blocks = contents(file, raw)
    if is_json_lines(file):
        for number, line in enumerate(split(blocks, b"\n"), 1):
            if line.strip():
                yield _record(file, number, line, config.text_field), True
        return
    check = TextCheck(file, config.force_binary)
    separator = separator_of(config)
    if separator:
        yield from _documents(_checked(blocks, check), separator)
        return
    for block in _checked(blocks, check):
        yield block, False
    yield b"", True


def _checked(blocks: Iterator[bytes], check: TextCheck) -> Iterator[bytes]:
    for block in blocks:
        check.feed(block)
        yield block
    check.finish()


def contents(file: Path, raw: BinaryIO, op: str = "train") -> Iterator[bytes]:
    """A file's contents, decompressed, in blocks. Raises ValueError, as `op`, if it is damaged or cut short."""
    kind = file.suffix.lower()
    if kind not in COMPRESSED:
        while block := raw.read(_READ):
            yield block
        return
    new = (lambda: _zstandard(op)) if kind == ".zst" else (lambda: zlib.decompressobj(wbits=31))
    decoder: Any = new()
    fed = False  # of this frame: a file may hold several, one after the other
    try:
        while block := raw.read(_READ):
            while block:
                if data := decoder.decompress(block):
                    yield data
                fed, block = True, b""
                if decoder.eof:
                    block, decoder, fed = decoder.unused_data, new(), False
    except Exception as error:  # zlib.error or zstandard.ZstdError; the latter's package may not be there to be named
        if isinstance(error, OSError | ImportError) or type(error).__name__ not in ("error", "ZstdError"):
            raise
        raise fail(op, f"{file} is damaged, or no {kind} file: {error}.", "Copy or download it again.") from error
    if fed:
        raise fail(op, f"{file} is cut short: its last part is missing.", "Copy or download it again.")


def _zstandard(op: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise fail(op, "reading .zst needs the package zstandard.", "pip install 'stateline[train]'") from error
    return zstandard.ZstdDecompressor().decompressobj()


def split(blocks: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
    """What stands between marks; the last part may be empty."""
    held: list[bytes] = []
    for block in blocks:
        first, *rest = block.split(mark)
        held.append(first)
        for part in rest:
            yield b"".join(held)
            held = [part]
    yield b"".join(held)


def _documents(blocks: Iterator[bytes], mark: bytes) -> Iterator[tuple[bytes, bool]]:
    """Chunks between marks, which themselves are left out; only what could begin a mark is held back."""
    held = b""
    for block in blocks:
        *done, held = (held + block).split(mark)
        yield from ((document, True) for document in done)
        keep = len(held) - len(mark) + 1
        if keep > 0:
            yield held[:keep], False
            held = held[keep:]
    yield held, True


def _record(file: Path, number: int, line: bytes, field: str) -> bytes:
    """The text of one JSON line."""
    place = f"{file}, line {number},"
    try:
        record = json.loads(line.removeprefix(_BOM) if number == 1 else line)
    except ValueError as error:
        raise fail("train", f"{place} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise fail("train", f"{place} holds a {type(record).__name__}, expected an object with a text.")
    if field not in record:
        raise fail(
            "train", f"{place} has no field {field!r}; it has {', '.join(record)}.", "Name it with --text-field."
        )
    if not isinstance(record[field], str):
        problem = f"{place} has {type(record[field]).__name__} in {field!r}, expected text."
        raise fail("train", problem, "Name the field with the text: --text-field.")
    return str(record[field]).encode("utf-8", "replace")


def _cut(chunks: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool, bool]]:
    """(bytes, first, last) of every document that is not empty."""
    held, first = b"", True
    for chunk, ends in chunks:
        held, at = held + chunk, 0
        while len(held) - at > PIECE:
            size = safe_cut(held[at : at + PIECE])
            yield held[at : at + size], first, False
            at, first = at + size, False
        held = held[at:]
        if ends:
            if held:
                yield held, first, True
            held, first = b"", True


def safe_cut(data: bytes) -> int:
    """The last place, after the first byte, at which a text may be cut without changing its ids."""
    for pattern in _CUTS:
        if (found := pattern.match(data)) and found.start(1) > 0:
            return found.start(1)
    return len(data)
