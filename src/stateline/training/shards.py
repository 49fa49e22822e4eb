"""A prepared data set on disk: token shards that are memory-mapped, and an index that proves they are whole.

    dataset.json                    the index; written last, so that a folder with one is complete
    tokens-00000.bin, …             ids, uint8, uint16 or uint32, little-endian, end to end
    documents.bin                   where each document begins, int64, little-endian
    tokenizer.json                  what made the ids (not for bytes)
    progress.json                   the index so far, while preparation goes on

Documents stand in the order of their sources. Where the vocabulary has an end-of-text id, it opens every document and
closes the last.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stateline.checks import fail
from stateline.files import flush
from stateline.training.resume import TEMPORARY, write_atomically
from stateline.training.text import Ids, Layout, TokenText
from stateline.training.vocabulary import TOKENIZER, TOKENIZER_CONFIG, Vocabulary, beside

FORMAT, VERSION = "stateline-tokens", 1
INDEX, PROGRESS, DOCUMENTS = "dataset.json", "progress.json", "documents.bin"
#: Ids of a shard, about: what an interrupted preparation loses at most, a few seconds of work.
SHARD_TOKENS = 16 << 20

_READ = 4 << 20
_START = np.dtype("<i8")


@dataclass
class Index:
    """What a data set holds. shards: (file, ids, SHA-256) in order; request: what it was prepared from, and how.

    pieces: how many pieces of the corpus are in the shards, from where an interrupted preparation goes on.
    """

    request: dict[str, Any]
    vocab_size: int
    dtype: str
    tokenizer: str
    end: int | None
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    source_bytes: int = 0
    pieces: int = 0
    shards: list[tuple[str, int, str]] = field(default_factory=list)
    documents_sha256: str = ""

    @property
    def digest(self) -> str:
        """Identity of the contents, whatever they were read from."""
        names = ("vocab_size", "dtype", "tokenizer", "end", "tokens", "documents", "bytes", "documents_sha256")
        said = [asdict(self)[name] for name in names] + [shard[1:] for shard in self.shards]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def to_json(self) -> str:
        """The index as a file holds it."""
        return (
            json.dumps({"format": FORMAT, "version": VERSION, "digest": self.digest, **asdict(self)}, indent=1) + "\n"
        )


def is_dataset(path: str | Path) -> bool:
    """Whether a path is a prepared data set, whole or interrupted."""
    return any((Path(path) / name).is_file() for name in (INDEX, PROGRESS))


def read_index(folder: Path, name: str = INDEX) -> Index:
    """The index in a folder. Raises ValueError naming the file if it is missing, damaged or foreign."""
    path = folder / name
    if not path.is_file():
        problem = f"{folder} is a data set whose preparation was interrupted ({name} is missing)."
        raise fail("data", problem, "Run the same stateline tokenize again: it goes on.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("format"), values.pop("version")
        digest = values.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise fail("data", f"{path} is damaged or no index of a data set: {error!r}.", _AGAIN) from error
    if found != (FORMAT, VERSION):
        problem = (
            f"{path} has format {found[0]!r} version {found[1]!r}, this release reads {FORMAT!r} version {VERSION}."
        )
        raise fail("data", problem, "Prepare the data again, or update stateline.")
    try:
        index = Index(**values)
        index.shards = [(str(file), int(count), str(sha)) for file, count, sha in index.shards]
        whole = index.digest == digest and index.tokens == sum(shard[1] for shard in index.shards)
    except (TypeError, ValueError) as error:
        raise fail("data", f"{path} is damaged: {error}.", _AGAIN) from error
    if not whole:
        raise fail("data", f"{path} is damaged: it contradicts itself.", _AGAIN)
    return index


def open_dataset(folder: Path) -> tuple[TokenText, Vocabulary, Index]:
    """A prepared data set: its ids (mapped), vocabulary and index.

    Every byte is looked at once. Raises ValueError naming the file that is missing, cut short, damaged or foreign.
    """
    index = read_index(folder)
    vocabulary = Vocabulary() if index.tokenizer == "bytes" else beside(folder)
    if (vocabulary.fingerprint, vocabulary.size, vocabulary.end) != (index.tokenizer, index.vocab_size, index.end):
        problem = f"{folder / TOKENIZER} is not the tokenizer that made the shards beside it ({index.tokenizer[:12]})."
        raise fail("data", problem, _AGAIN)
    dtype = vocabulary.dtype
    for name, count, sha in index.shards:
        _verify(folder / name, count * dtype.itemsize, sha)
    _verify(folder / DOCUMENTS, index.documents * _START.itemsize, index.documents_sha256)
    parts: list[Ids] = [np.memmap(folder / name, dtype, mode="r") for name, count, _ in index.shards if count]
    starts = np.memmap(folder / DOCUMENTS, _START, mode="r") if index.documents else np.zeros(0, np.int64)
    layout = Layout(vocabulary.widths, starts, opened=index.end is not None)
    return TokenText(parts, index.digest, layout=layout, num_bytes=index.bytes), vocabulary, index


def _verify(path: Path, size: int, sha: str) -> None:
    if not path.is_file():
        raise fail("data", f"{path} is missing.", _AGAIN)
    if path.stat().st_size != size:
        problem = (
            f"{path} has {path.stat().st_size} bytes, its index says {size}: it is cut short or not of this data set."
        )
        raise fail("data", problem, _AGAIN)
    if _sha256(path) != sha:
        raise fail("data", f"{path} is damaged, or not of this data set: its contents differ from its index.", _AGAIN)


_AGAIN = "Copy the whole folder again, or delete it and prepare the data again."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()


class Writer:
    """Appends documents to a data set in the making; a complete shard outlives a kill, a power cut, a full disk.

    index: what is written, complete shards and the open one together.
    """

    def __init__(self, folder: Path, index: Index, vocabulary: Vocabulary) -> None:
        """Take up the data set where `index` stands; what lies beyond is cut off."""
        self.folder, self.index, self.vocabulary = folder, index, vocabulary
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink()
        self._starts = (folder / DOCUMENTS).open("r+b" if (folder / DOCUMENTS).exists() else "w+b")
        self._starts.truncate(index.documents * _START.itemsize)
        self._starts.seek(0, os.SEEK_END)
        self._shard: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._count = 0

    def write(self, pieces: list[tuple[bool, int, Ids]]) -> None:
        """Append (whether a document begins, its source's bytes, ids) in order; ends a shard that is long enough."""
        index, width = self.index, self.vocabulary.widths
        for first, size, ids in pieces:
            if first:
                self._starts.write(np.array(index.tokens, _START).tobytes())
                index.documents += 1
                self._end_of_text()
            self._append(ids)
            index.bytes += len(ids) if width is None else int(width[ids].sum())
            index.source_bytes += size
        index.pieces += len(pieces)
        if self._count >= SHARD_TOKENS:
            self._close_shard()

    def finish(self) -> None:
        """Close the last document and shard and write the index: from now on the data set is complete."""
        self._end_of_text()
        self._close_shard(last=True)
        self._starts.close()
        self.index.documents_sha256 = _sha256(self.folder / DOCUMENTS)
        self.vocabulary.save(self.folder)
        write_atomically(self.folder / INDEX, self.index.to_json())
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Close files and leave complete shards for later."""
        if self._shard is not None:
            self._shard.close()
        self._starts.close()

    def _end_of_text(self) -> None:
        if self.vocabulary.end is not None:
            self._append(np.array([self.vocabulary.end], self.vocabulary.dtype))

    def _append(self, ids: Ids) -> None:
        raw = np.ascontiguousarray(ids, self.vocabulary.dtype).tobytes()
        if self._shard is None:
            self._shard = (self.folder / f"{TEMPORARY}{self._name()}").open("wb")
        self._shard.write(raw)
        self._digest.update(raw)
        self._count += len(ids)
        self.index.tokens += len(ids)

    def _close_shard(self, *, last: bool = False) -> None:
        """Put the open shard in place. The last one, which the closing end of text is in, is no progress to go on from.

        A preparation that is killed between it and the index makes it again.
        """
        if self._shard is None:
            return
        self._shard.close()
        temporary, name = self.folder / f"{TEMPORARY}{self._name()}", self._name()
        flush(temporary)
        os.replace(temporary, self.folder / name)
        self._starts.flush()
        flush(self.folder / DOCUMENTS)
        self.index.shards.append((name, self._count, self._digest.hexdigest()))
        if not last:
            write_atomically(self.folder / PROGRESS, self.index.to_json())
        self._shard, self._digest, self._count = None, hashlib.sha256(), 0

    def _name(self) -> str:
        return f"tokens-{len(self.index.shards):05d}.bin"


def remove_dataset(folder: Path) -> None:
    """Delete a data set's own files and nothing else in its folder; the index goes first."""
    for name in (INDEX, PROGRESS, DOCUMENTS, TOKENIZER, TOKENIZER_CONFIG):
        (folder / name).unlink(missing_ok=True)
    for path in [*folder.glob("tokens-*.bin"), *folder.glob(f"{TEMPORARY}*")]:
        path.unlink(missing_ok=True)
