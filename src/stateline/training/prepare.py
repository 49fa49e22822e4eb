"""From text to token shards: streamed, in constant memory; an interrupted preparation goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stateline.checks import fail
from stateline.training import corpus
from stateline.training.config import DataConfig
from stateline.training.corpus import Piece
from stateline.training.progress import Meter, Reporter, clock, quantity
from stateline.training.resume import TrainingError, locked, write_atomically
from stateline.training.shards import INDEX, PROGRESS, Index, Writer, is_dataset, read_index, remove_dataset
from stateline.training.signals import Interrupted, StopSignals
from stateline.training.vocabulary import Vocabulary, beside, bpe_size, learn, named

#: Pieces encoded at once: enough to keep every core busy, some megabytes of text.
BATCH = 16
#: A BPE is learnt from at most about so many bytes, evenly spread: its memory grows with the number of distinct words.
LEARN_BYTES = 128 << 20
#: How much compressed text is taken to grow, where only a guess is needed.
_GROWTH = 4


@dataclass(frozen=True)
class Request:
    """What to prepare. own: the vocabulary to take in place of learning one, or of what `config.tokenizer` names."""

    path: Path
    config: DataConfig
    own: Vocabulary | None = None

    @property
    def files(self) -> list[Path]:
        """The sources, in order. Raises ValueError if there are none, or if an option does not suit them."""
        found = corpus.find_files(self.path, self.config.pattern)
        corpus.check_options(found, self.config)
        return found

    def record(self) -> dict[str, Any]:
        """What decides the result: names, sizes and times of the files, and how they are read. Ready for JSON."""
        config, files = self.config, []
        for file in self.files:
            about = file.stat()
            name = str(file.relative_to(self.path)) if self.path.is_dir() else file.name
            files.append([name, about.st_size, about.st_mtime_ns])
        learnt = bpe_size(config.tokenizer)
        vocabulary = self.own or named(config.tokenizer)
        return {
            "files": files,
            "tokenizer": config.tokenizer if learnt or vocabulary is None else vocabulary.fingerprint,
            "text_field": config.text_field,
            "separator": corpus.separator_of(config).decode(),
            "force_binary": config.force_binary,
        }

    def key(self) -> str:
        """A name for this request's result among others."""
        return hashlib.sha256(json.dumps(self.record()).encode()).hexdigest()[:12]


def prepare(request: Request, folder: Path, *, progress: str = "auto", replace: bool = False) -> Index:
    """Make a folder hold the data set that is asked for, unless it already does; an interrupted one is continued.

    replace: a data set of another request there is deleted.

    Raises ValueError for sources that cannot be read as text, for a folder that holds something else, and if another
    process prepares it; TrainingError if the disk is full; Interrupted (a KeyboardInterrupt) after one
    of the signals in `StopSignals`.
    """
    wanted = request.record()
    if folder.exists() and not folder.is_dir():
        raise fail("data", f"{folder} is a file, expected a folder to write to.", "Choose another.")
    with locked(folder, "preparing data in"), Reporter(progress) as reporter, StopSignals() as stop:
        there = _there(folder)
        if there and (there.request != wanted or (request.own and there.tokenizer != request.own.fingerprint)):
            if not replace:
                problem = f"{folder} holds a data set of other sources, or made in another way."
                raise fail("data", problem, "Choose another folder, or --overwrite it.")
            there = None
        if there and (folder / INDEX).is_file():
            reporter.say(f"Data: prepared before, {summary(there)}, in {folder}")
            return there
        try:
            return _make(request, wanted, folder, there, reporter, stop)
        except OSError as error:
            problem = f"data: {folder} could not be written: {error.strerror or error}."
            raise TrainingError(f"{problem} Free some space; the same command then goes on.") from error


def summary(index: Index) -> str:
    """The sizes of a data set, in words."""
    ratio = f", {index.bytes / index.tokens:.2f} bytes a token" if index.tokenizer != "bytes" and index.tokens else ""
    documents = f"{quantity(index.documents)} document{'' if index.documents == 1 else 's'}"
    return f"{documents}, {quantity(index.bytes)} bytes, {quantity(index.tokens)} tokens{ratio}"


def _there(folder: Path) -> Index | None:
    """The data set in a folder, whole or begun; None if the folder is empty."""
    if is_dataset(folder):
        return read_index(folder, INDEX if (folder / INDEX).is_file() else PROGRESS)
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if others:
        raise fail("data", f"{folder} is not empty and holds no data set: {others[0]}.", "Choose another folder.")
    return None


def _make(
    request: Request, wanted: dict[str, Any], folder: Path, begun: Index | None, reporter: Reporter, stop: StopSignals
) -> Index:
    work = _Work(request, folder, reporter, stop)
    reporter.say(f"Data: preparing {request.path} into {folder}")
    if begun:
        vocabulary = Vocabulary() if begun.tokenizer == "bytes" else beside(folder)
        reporter.say(f"Data: going on after {summary(begun)}")
    else:
        remove_dataset(folder)
        vocabulary = request.own or named(request.config.tokenizer) or work.learn()
        vocabulary.save(folder)
        begun = Index(wanted, vocabulary.size, str(vocabulary.dtype), vocabulary.fingerprint, vocabulary.end)
        write_atomically(folder / PROGRESS, begun.to_json())
    index = work.encode(vocabulary, begun)
    reporter.say(f"Data: {summary(index)}, in {clock(time.perf_counter() - work.started)}")
    if index.bytes != index.source_bytes:
        told = f"its ids stand for {index.bytes} bytes, the text has {index.source_bytes}"
        reporter.say(
            f"Data: this tokenizer does not keep every byte ({told}); bits per byte count what its ids stand for"
        )
    return index


class _Work:
    """One session of preparing a folder."""

    def __init__(self, request: Request, folder: Path, reporter: Reporter, stop: StopSignals) -> None:
        self.request, self.folder, self.reporter, self.stop = request, folder, reporter, stop
        self.files = request.files
        sizes = [file.stat().st_size for file in self.files]
        if not any(sizes):
            problem = f"{request.path} is empty ({len(sizes)} file(s), 0 bytes)."
            raise fail("train", problem, "Give a text with some content.")
        self.total = sum(sizes)
        growth = (1 if corpus.is_plain(f) or f.suffix.lower() in corpus.JSON_LINES else _GROWTH for f in self.files)
        self.estimate = sum(size * factor for size, factor in zip(sizes, growth, strict=True))
        self.started = time.perf_counter()
        self.meter = Meter()

    def learn(self) -> Vocabulary:
        """A BPE of the size that the settings ask for."""
        size = bpe_size(self.request.config.tokenizer)
        assert size is not None
        self.reporter.say(f"Data: learning a BPE of {size} ids from {self.request.path}")
        vocabulary = learn(self._texts(), size)
        if vocabulary.size < size:
            self.reporter.say(f"Data: the text has no more to merge: the BPE has {vocabulary.size} ids, not {size}")
        return vocabulary

    def _texts(self) -> Iterator[str]:
        stride = max(1, -(-self.estimate // LEARN_BYTES))
        for number, piece in enumerate(self._pieces("learning the BPE")):
            if number % stride == 0:
                yield piece.data.decode("utf-8", "replace")

    def encode(self, vocabulary: Vocabulary, index: Index) -> Index:
        """Write every piece that `index` does not have yet."""
        writer = Writer(self.folder, index, vocabulary)
        before = index.tokens
        try:
            rest = islice(self._pieces("preparing"), index.pieces, None)
            while batch := list(islice(rest, BATCH)):
                texts = [_closed(piece, vocabulary) for piece in batch]
                encoded = zip(batch, texts, vocabulary.encode(texts), strict=True)
                writer.write([(piece.first, len(text), ids) for piece, text, ids in encoded])
                self.meter.speed = (index.tokens - before) / (time.perf_counter() - self.started)
            if not index.documents:
                raise fail("train", f"{self.request.path} holds no text.", "Give a text with some content.")
            writer.finish()
        finally:
            writer.abandon()
        return index

    def _pieces(self, what: str) -> Iterator[Piece]:
        """The corpus, with the bar moving, until a signal comes."""
        for piece in corpus.pieces(self.files, self.request.config):
            if self.stop:
                how = "What is done is kept: the same command goes on from there."
                raise Interrupted(f"Stopped by {self.stop.received} while {what} in {self.folder}. {how}", self.folder)
            yield piece
            self.reporter.show(self.meter, f"{what} {quantity(piece.at)}B", piece.at / max(1, self.total))


def _closed(piece: Piece, vocabulary: Vocabulary) -> bytes:
    """A piece's bytes; a document that no end-of-text id closes ends with a newline."""
    lacks = piece.last and vocabulary.end is None and not piece.data.endswith(b"\n")
    return piece.data + b"\n" if lacks else piece.data
