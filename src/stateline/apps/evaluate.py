"""Bits per byte and perplexity of a model on texts, with how sure the figures are.

Every byte counts. A document's first token is predicted from the vocabulary's start id (a newline for bytes); where
there is none, it is charged as a uniform guess, log₂ of the vocabulary's size.

>>> import stateline
>>> from stateline.apps.evaluate import Document, Evaluator
>>> evaluator = Evaluator(stateline.load("bundled"))
>>> evaluator.run([Document.of("We meet in time of peace.")])
>>> 1 < evaluator.report().total.bits_per_byte < 4
True
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stateline import checks
from stateline.apps.confidence import Tally, ratio_interval
from stateline.apps.documents import Corpus, Document
from stateline.generation import Tokenizer
from stateline.generation.prompt import REMEDY
from stateline.generation.stream import default_tokenizer
from stateline.generation.tokenizer import ByteTokenizer
from stateline.models import LanguageModel
from stateline.models.score import CHUNK, Part, Span, score

__all__ = ["Corpus", "Document", "EvalConfig", "Evaluator", "Report", "Score", "evaluate"]

MODES = ("document", "window", "sliding")
#: Logits read at once hold at most this many numbers (128 MB), but are those of at least FEWEST tokens.
LOGITS = 1 << 25
FEWEST = 256

#: Called with (bytes of the corpus read, what is known so far) while texts are read.
Progress = Callable[[int, "Score"], None]


@dataclass(frozen=True)
class EvalConfig:
    """How much a model may see of the text before each token.

    mode: "document": everything from the document's start, its state carried along. "window": the text falls into
        windows of `context` tokens, each read from a fresh state. "sliding": windows of `context` tokens begin every
        `stride` tokens, and only tokens that no earlier window has scored count, so that each but a document's first
        has more than context − stride tokens before it.
    context, stride: tokens, for these two modes; 1 ≤ stride ≤ context.
    chunk: tokens read at once; no figure depends on it. None: as many as keep memory small.
    """

    mode: str = "document"
    context: int | None = None
    stride: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        checks.choice("eval", "mode", self.mode, MODES)
        for name, modes in (("context", MODES[1:]), ("stride", MODES[2:])):
            value, used = getattr(self, name), self.mode in modes
            if used and value is None:
                raise checks.fail(
                    "eval", f"mode {self.mode!r} needs {name}, in tokens.", "E.g. context 1024, stride 512."
                )
            if not used and value is not None:
                others = " and ".join(map(repr, modes))
                raise checks.fail("eval", f"{name} goes with mode {others}, the mode is {self.mode!r}.")
        if self.context is not None:
            checks.number("eval", "context", self.context, low=1, integer=True)
        if self.stride is not None:
            checks.number("eval", "stride", self.stride, low=1, high=self.context or 1, integer=True)
        if self.chunk is not None:
            checks.number("eval", "chunk", self.chunk, low=1, integer=True)

    def spans(self, tokens: _Sequence) -> Iterator[Span]:
        """What is read of a sequence, each stretch from a fresh state."""
        if self.context is None:
            if len(tokens) > 1:
                yield Span(tokens, 0, len(tokens))
            return
        start = 0
        while start == 0 or start + self.context - self.step < len(tokens) - 1:
            yield Span(tokens, start, min(start + self.context + 1, len(tokens)))
            start += self.step

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next one's."""
        return self.stride or self.context or 0

    def given(self, span: Span) -> int:
        """How many of a span's predictions only give context: an earlier window has scored them."""
        return 0 if self.context is None or span.start == 0 else self.context - self.step


@dataclass(frozen=True)
class Score:
    """Figures of one file or of all. interval: 95 % bounds of bits_per_byte, None if there is too little text; from
    `units` taken for independent."""

    name: str
    documents: int
    bytes: int
    tokens: int
    nats: float
    interval: tuple[float, float] | None
    units: str

    @property
    def bits_per_byte(self) -> float:
        """−log₂ p of the text over its size in bytes; NaN for no text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean −log p of a token: depends on the vocabulary, so compare it within one only."""
        return math.exp(min(700.0, self.nats / self.tokens)) if self.tokens else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Every figure, ready for JSON."""
        return dataclasses.asdict(self) | {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Report:
    """What an evaluation found. notes: what a reader of the figures must know."""

    config: EvalConfig
    files: list[Score]
    total: Score
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        config = {key: value for key, value in dataclasses.asdict(self.config).items() if key != "chunk"}
        files = [score.to_dict() for score in self.files]
        return {**config, "files": files, "total": self.total.to_dict(), "notes": self.notes}


def evaluate(
    model: LanguageModel,
    texts: Corpus | Iterable[str | Path] | str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    config: EvalConfig | None = None,
    progress: Progress | None = None,
) -> Report:
    """The figures of a model on files and folders.

    texts: paths, or a Corpus of them, which also says what a document is.
    tokenizer: the model's own, from `load_tokenizer`; None for a model that reads bytes.

    Raises ValueError, naming the file, for text that is missing, empty, or that the tokenizer cannot read.
    """
    evaluator = Evaluator(model, tokenizer, config)
    corpus = texts if isinstance(texts, Corpus) else Corpus.of(texts)
    evaluator.run(corpus.documents(), progress)
    return evaluator.report()


class Evaluator:
    """Scores documents as they come; `report` may be asked at any time, also after an interrupt."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer | None = None, config: EvalConfig | None = None
    ) -> None:
        known = default_tokenizer(model, tokenizer)
        if known is None:
            raise checks.fail("eval", "the model's ids are not bytes and no tokenizer was given.", REMEDY)
        self.model, self.tokenizer, self.config = model, known, config or EvalConfig()
        self.tallies: dict[str, Tally] = {}
        self._tokens: dict[str, int] = {}
        self._inexact = 0
        self._uniform = math.log(model.config.vocab_size)
        self._sizes = None
        if not isinstance(known, ByteTokenizer):
            self._sizes = np.array([len(known.token_bytes(i)) for i in range(known.vocab_size)], np.float64)

    def run(self, documents: Iterable[Document], progress: Progress | None = None) -> None:
        """Read documents and add them to the figures."""
        small = max(FEWEST, min(CHUNK, LOGITS // self.model.config.vocab_size))
        training = self.model.training
        self.model.eval()
        try:
            spans = (span for document in documents for span in self._spans(document))
            for part in score(self.model, spans, chunk=self.config.chunk or small):
                self._add(part)
                if progress is not None:
                    assert isinstance(part.span.tokens, _Sequence)
                    sequence = part.span.tokens
                    share = (part.first + len(part.targets)) / len(sequence)
                    ahead = int(sequence.document.stored * (1 - share))
                    progress(sequence.document.consumed - ahead, self._score("total", list(self.tallies), sure=False))
        finally:
            self.model.train(training)

    def report(self) -> Report:
        """The figures of all that was read so far."""
        notes = []
        if self._inexact:
            notes.append(
                f"in {self._inexact:,} document(s) the tokenizer's ids do not stand for exactly the text;"
                " bits per byte count the text's bytes"
            )
        if self.tokenizer.start is None:
            notes.append("the vocabulary has no start id: a document's first token is charged as a uniform guess")
        files = [self._score(name, [name]) for name in self.tallies]
        return Report(self.config, files, self._score("total", list(self.tallies)), notes)

    def _score(self, name: str, sources: list[str], *, sure: bool = True) -> Score:
        tallies = [self.tallies[source] for source in sources]
        tokens = sum(self._tokens[source] for source in sources)
        interval, units = None, ""
        if sure:
            values, sizes, units = Tally.joined(tallies).units()
            interval = ratio_interval(values / math.log(2), sizes)
        documents = sum(len(tally.documents[0]) for tally in tallies)
        size, nats = sum(round(tally.size) for tally in tallies), math.fsum(tally.total for tally in tallies)
        return Score(name, documents, size, tokens, nats, interval, units)

    def _spans(self, document: Document) -> Iterator[Span]:
        self.tallies.setdefault(document.source, Tally())
        self._tokens.setdefault(document.source, 0)
        sequence = self._sequence(document)
        if len(sequence) > 1:
            yield from self.config.spans(sequence)
        else:  # nothing to predict from a state
            self._begin(sequence)

    def _sequence(self, document: Document) -> _Sequence:
        start = self.tokenizer.start
        if self._sizes is None:
            return _Sequence(document, document.data, start)
        try:
            text = document.data.tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise checks.fail(
                "eval",
                f"{document.source} is not UTF-8 ({error.reason} at byte {error.start} of a document).",
                "Convert it, e.g. with iconv -t utf-8, or take a model that reads bytes.",
            ) from error
        ids = np.array(self.tokenizer.encode(text), dtype=np.int64)
        found = float(self._sizes[ids].sum())
        exact = found == len(document.data)
        self._inexact += not exact
        return _Sequence(document, ids, start, len(document.data) / found if found else 0.0)

    def _begin(self, sequence: _Sequence) -> None:
        """Count a document, and what no state predicts: its first token without a start id, or bytes without ids."""
        tally = self.tallies[sequence.document.source]
        sequence.number = tally.begin()
        if not len(sequence.ids):
            tally.add(np.zeros(1), np.array([float(len(sequence.document.data))]), sequence.number)
        elif sequence.start is None:
            self._count(sequence, np.array([self._uniform]), sequence.ids[:1])

    def _add(self, part: Part) -> None:
        sequence = part.span.tokens
        assert isinstance(sequence, _Sequence)
        if sequence.number is None:
            self._begin(sequence)
        nats = part.nats().double().cpu().numpy()
        skip = max(0, part.span.start + 1 + self.config.given(part.span) - part.first)
        if not np.isfinite(nats).all():
            at = part.first + int(np.flatnonzero(~np.isfinite(nats))[0])
            raise checks.fail(
                "eval",
                f"the model gives no probability for token {at} of a document in {sequence.document.source}.",
                "Its logits are not finite: are the weights damaged, or do they overflow in this dtype?",
            )
        if skip < len(nats):
            self._count(sequence, nats[skip:], part.targets[skip:].cpu().numpy())

    def _count(self, sequence: _Sequence, nats: np.ndarray, ids: np.ndarray) -> None:
        sizes = np.ones(len(ids)) if self._sizes is None else self._sizes[ids] * sequence.scale
        assert sequence.number is not None
        self.tallies[sequence.document.source].add(nats, sizes, sequence.number)
        self._tokens[sequence.document.source] += len(ids)


@dataclass
class _Sequence:
    """A document's ids after the start id, if there is one; `scale` makes the ids' bytes add up to the document's."""

    document: Document
    ids: np.ndarray
    start: int | None
    scale: float = 1.0
    number: int | None = None

    def __len__(self) -> int:
        return len(self.ids) + (self.start is not None)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop), the start id being number 0."""
        if self.start is None:
            return np.asarray(self.ids[start:stop])
        body = np.asarray(self.ids[max(0, start - 1) : max(0, stop - 1)])
        return np.concatenate([np.array([self.start], np.int64), body]) if start == 0 else body
