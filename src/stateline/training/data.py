"""What a run reads: its text, how it is split, and in which order a run sees it.

The order is a function of one counter: window k of a run lies at a place that (seed, k) alone decide. A resumed run
therefore continues exactly where it stopped, whatever the number of processes or the machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stateline.checks import fail
from stateline.models import LanguageModel
from stateline.training import corpus
from stateline.training.config import DataConfig
from stateline.training.prepare import Request, prepare
from stateline.training.resume import PREPARED
from stateline.training.shards import INDEX, PROGRESS, is_dataset, open_dataset, read_index
from stateline.training.text import IGNORED, Layout, TokenText
from stateline.training.vocabulary import Vocabulary, beside, bpe_size, named, require_same

#: Texts up to this many bytes are held in memory; larger ones are memory-mapped.
IN_MEMORY = 256 << 20
#: A folder of more files than this is not mapped file by file (each takes a handle) but prepared, if it is large.
MAPPED_FILES = 64
#: The validation tail is never longer: scoring it takes seconds on a CPU.
VALIDATION_LIMIT = 256 << 10
#: How far the validation split may move to meet a blank line or a line end.
SPLIT_SEARCH = 4096

_CHUNK = 4 << 20

Bytes = npt.NDArray[np.uint8]
#: A text whose ids are its bytes.
ByteText = TokenText


@dataclass(frozen=True)
class TextData:
    """What a run learns from and what it is judged by, and what ids of both stand for."""

    train: TokenText
    val: TokenText
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def lies_in(self, folder: Path) -> bool:
        """Whether some of it is mapped from files in a folder."""
        parts = [part for part in (*self.train.parts, *self.val.parts) if isinstance(part, np.memmap)]
        return any(Path(str(part.filename)).is_relative_to(folder.resolve()) for part in parts)

    @property
    def digest(self) -> str:
        """Identity of contents and split: a resumed run must have the same."""
        return hashlib.sha256(f"{self.train.digest} {self.val.digest}".encode()).hexdigest()


def load_data(
    config: DataConfig,
    *,
    home: Path | None = None,
    model: Path | None = None,
    resumed: bool = False,
    before: DataConfig | None = None,
    progress: str = "off",
) -> TextData:
    """Read and split the text, preparing shards of it where bytes on disk are not yet ids.

    home: the run's folder, where prepared shards go unless `config.cache` says otherwise.   model: the folder of the
    weights that training starts from, whose tokenizer counts; `resumed`: they are this run's own.   before: the
    settings that a resumed run has learnt by: what it prepared is read, and never replaced.   progress: as in
    ReportConfig.

    Raises ValueError, before any training, if the text is missing, empty, binary or too short, or the tokenizer is not
    the model's.
    """
    if not config.path:
        raise fail("train", "no text was given.", "Name a text file or a folder: stateline train PATH.")
    own = beside(model) if model else None
    if own is not None and not (resumed and _is_gone(config.tokenizer)):
        require_same(own, config.tokenizer, str(model), learnt=resumed)
    source = _Source(config, home, own, str(model), progress, before)
    text, vocabulary = source.open(config.path, "train")
    if config.val is not None:
        val, _ = replaced(source, own=vocabulary, owner=config.path).open(config.val, "val")
        data = TextData(text, val, vocabulary)
    else:
        data = TextData(*split(text, config.val_fraction), vocabulary)
    _check_lengths(data, config)
    return data


def _is_gone(spec: str | None) -> bool:
    """Whether `--tokenizer` named a file that is no longer there; a run keeps a copy."""
    return spec not in (None, "bytes") and not bpe_size(spec) and not Path(str(spec)).exists()


def _check_lengths(data: TextData, config: DataConfig) -> None:
    unit = "bytes" if data.vocabulary.is_bytes else "tokens"
    held = f"{config.path} leaves {len(data.train)} {unit} for training and {len(data.val)} for validation"
    if len(data.train) <= config.context:
        remedy = f"Give more text, or --context {max(1, (len(data.train) - 1) // 2)}."
        raise fail("train", f"{held}; a context of {config.context} needs {config.context + 1}.", remedy)
    if len(data.val) < 2:
        raise fail("train", f"{held}; expected at least 2.", "Give more text, or a validation text with --val.")


@dataclass(frozen=True)
class _Source:
    """How texts are opened. own: the vocabulary that counts, which `owner` brings; None leaves it to the settings."""

    config: DataConfig
    home: Path | None
    own: Vocabulary | None
    owner: str
    progress: str
    before: DataConfig | None

    def open(self, name: str, part: str) -> tuple[TokenText, Vocabulary]:
        """A text file, a folder, a prepared data set, or what has to become one; with its vocabulary."""
        path, config = Path(name), self.config
        if is_dataset(path):
            return self._dataset(path)
        request = Request(path, config, self.own)
        kept = self.home / PREPARED / part if self.home else None
        if not path.exists() and kept and (kept / INDEX).is_file():  # the source may go once it is prepared
            return self._dataset(kept)
        vocabulary = self.own or named(config.tokenizer)
        if vocabulary is not None and vocabulary.is_bytes and _is_readable(request.files, config):
            return read_text(path, config.pattern, config.force_binary), vocabulary
        if self.before and kept and is_dataset(kept) and not config.cache:
            return self._kept(kept, request, part)
        if config.cache:
            kept = Path(config.cache).expanduser() / f"{path.name.partition('.')[0]}-{request.key()}"
        if kept is None:
            raise fail("train", f"{path} has to be prepared first.", "Name a folder for that: cache.")
        prepare(request, kept, progress=self.progress, replace=True)
        text, vocabulary, _ = open_dataset(kept)
        return text, vocabulary

    def _kept(self, folder: Path, request: Request, part: str) -> tuple[TokenText, Vocabulary]:
        """What the run prepared and has learnt from, whatever became of its source since."""
        names = ("path" if part == "train" else "val", "pattern", "force_binary", "text_field", "document_separator")
        changed = [name for name in names if getattr(self.config, name) != getattr(self.before, name)]
        index = read_index(folder, INDEX if (folder / INDEX).is_file() else PROGRESS)
        if changed and index.request != request.record():
            problem = f"{' and '.join(changed)} changed, and {folder}, which the run learns from, was made otherwise."
            raise fail("train", problem, "Drop these changes, or start a new run.")
        if (folder / INDEX).is_file():
            return self._dataset(folder)
        prepare(request, folder, progress=self.progress)
        return self._dataset(folder)

    def _dataset(self, folder: Path) -> tuple[TokenText, Vocabulary]:
        given = {"document_separator": None, "text_field": "text", "cache": None, "force_binary": False}
        for option, default in given.items():
            if getattr(self.config, option) != default and folder == Path(self.config.path):
                problem = f"{option} is set, but {folder} is a prepared data set."
                raise fail("train", problem, "Give it to stateline tokenize instead.")
        text, vocabulary, _ = open_dataset(folder)
        if self.own is None:
            require_same(vocabulary, self.config.tokenizer, f"the data set {folder}", learnt=True)
        elif self.own.fingerprint != vocabulary.fingerprint:
            problem = f"{folder} was made with {vocabulary}, {self.owner} reads {self.own}."
            raise fail("train", problem, "Prepare the text again with that tokenizer.")
        return text, vocabulary


def _is_readable(files: list[Path], config: DataConfig) -> bool:
    """Whether files can be read as they are: their bytes are the ids, and they fit in memory or in a few maps."""
    if corpus.separator_of(config) or not all(map(corpus.is_plain, files)):
        return False
    return len(files) <= MAPPED_FILES or sum(file.stat().st_size for file in files) <= IN_MEMORY


def read_text(path: str | Path, pattern: str = "*.txt", force_binary: bool = False) -> TokenText:
    """The bytes of a file, or of a folder's files that match `pattern` (searched through, sorted by path).

    Files of a folder that lack a final newline get one, so that two texts never run into each other. Every byte is
    looked at once: the digest identifies the contents. Raises ValueError if there is nothing, or nothing that is text.
    """
    path = Path(path)
    files = corpus.find_files(path, pattern)
    sizes = [file.stat().st_size for file in files]
    if not any(sizes):
        raise fail("train", f"{path} is empty ({len(files)} file(s), 0 bytes).", "Give a text with some content.")
    mapped = sum(sizes) > IN_MEMORY
    digest = hashlib.sha256()
    parts: list[Bytes] = []
    starts, length = [], 0
    for file, size in zip(files, sizes, strict=True):
        if not size:
            continue
        try:
            part: Bytes = np.memmap(file, np.uint8, mode="r") if mapped else np.fromfile(file, np.uint8)
        except OSError as error:
            raise fail("train", f"{file} cannot be read: {error.strerror}.") from error
        _inspect(file, part, digest, force_binary)
        starts.append(length)
        parts.append(part)
        length += size
        if path.is_dir() and part[-1] != ord("\n"):
            parts.append(np.frombuffer(b"\n", np.uint8))
            digest.update(b"\n")
            length += 1
    layout = Layout(starts=np.array(starts, np.int64))
    return TokenText(parts if mapped else [np.concatenate(parts)], digest.hexdigest(), layout=layout)


def _inspect(file: Path, part: Bytes, digest: hashlib._Hash, force_binary: bool) -> None:
    """Feed the digest and refuse what is not text."""
    check = corpus.TextCheck(file, force_binary)
    for start in range(0, len(part), _CHUNK):
        chunk = part[start : start + _CHUNK].tobytes()
        digest.update(chunk)
        check.feed(chunk)
    check.finish()


def split(text: TokenText, fraction: float) -> tuple[TokenText, TokenText]:
    """(training text, validation text): the tail is kept, at most VALIDATION_LIMIT bytes of it."""
    if text.layout.widths is None:
        cut = split_point(text, fraction)
        return text.section(0, cut), text.section(cut, len(text))
    size = min(int(text.num_bytes * fraction), VALIDATION_LIMIT)
    tail = max(0, len(text) - max(2, size))  # hardly any id is empty: so many hold enough bytes
    widths = text.layout.widths[text.read(tail, len(text))]
    target = len(text) - int(np.searchsorted(np.cumsum(widths[::-1]), size, side="right"))
    cut = next(iter(text.documents(target, target + (len(text) - target) // 2)), target)
    val = text.section(cut, len(text))
    return text.section(0, cut, text.num_bytes - val.num_bytes), val


def split_point(text: TokenText, fraction: float) -> int:
    """Where validation begins: the tail `fraction`, at most VALIDATION_LIMIT, cut at a paragraph, line or character."""
    size = min(int(len(text) * fraction), VALIDATION_LIMIT)
    target = len(text) - size
    search = text.read(target, min(len(text), target + min(SPLIT_SEARCH, size // 2))).tobytes()
    for mark in (b"\n\n", b"\n"):
        if (found := search.find(mark)) >= 0:
            return target + found + len(mark)
    # no line end nearby: at least do not cut a character (its continuation bytes are 10xxxxxx)
    return target + next((i for i, byte in enumerate(search[:4]) if byte & 0xC0 != 0x80), 0)


@dataclass(frozen=True)
class Batch:
    """What one forward pass predicts: inputs, targets int64 (b, t), or (1, b·t) packed with cu_seqlens int32."""

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def count(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def loss(self, model: LanguageModel, device: torch.device) -> Tensor:
        """Mean nats a target."""
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return model.loss(self.inputs.to(device), self.targets.to(device), cu_seqlens=bounds)


class Windows:
    """The training windows of a text in the seeded order in which a run meets them.

    Each epoch lays a grid of windows over the text, `context` apart, starting at an offset drawn for that epoch, and
    visits its cells in a permutation drawn for that epoch. As the grid moves, no id is always a window's first.

    apart: no state flows from one document into the next, also within a window.
    """

    def __init__(self, text: TokenText, context: int, seed: int, *, apart: bool = False) -> None:
        self.text, self.context, self.seed, self.apart = text, context, seed, apart
        # one cell less than fit leaves a whole cell for the offset to move in
        self.per_epoch = max(1, (len(text) - 1) // context - 1)
        self.slack = len(text) - 1 - self.per_epoch * context

    def starts(self, first: int, count: int) -> list[int]:
        """Positions of windows number first … first + count − 1 of the run."""
        places = []
        for k in range(first, first + count):
            epoch, cell = divmod(k, self.per_epoch)
            key = _mix(_mix(self.seed) ^ epoch)
            places.append(key % (self.slack + 1) + permuted(cell, self.per_epoch, key) * self.context)
        return places

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (count, context) each: the targets are the inputs one id on."""
        rows = [self.text.read(start, start + self.context + 1) for start in self.starts(first, count)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def fetch(self, first: int, count: int) -> Batch:
        """Windows first … first + count − 1 for one forward pass; packed where documents are kept apart."""
        if not self.apart:
            return Batch(*self.batch(first, count))
        pieces = [self.text.piece(at, at + self.context, apart=True) for at in self.starts(first, count)]
        bounds = {i * self.context + cut for i, piece in enumerate(pieces) for cut in [0, *piece.cuts]}
        cu_seqlens = torch.tensor([*sorted(bounds), count * self.context], dtype=torch.int32)
        inputs, targets = (torch.cat(rows)[None] for rows in zip(*((p.inputs, p.targets) for p in pieces), strict=True))
        return Batch(inputs, targets, cu_seqlens)


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
