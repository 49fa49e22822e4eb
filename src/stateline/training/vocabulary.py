"""The vocabulary of a run: bytes, a tokenizer.json, or a byte-level BPE learnt from the training text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stateline.checks import fail
from stateline.training.resume import write_atomically
from stateline.training.text import Ids

if TYPE_CHECKING:
    from stateline.generation import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTES = 256
#: What ends a document in a vocabulary learnt here, and in many others.
END = "<|endoftext|>"
#: A BPE has the 256 bytes, the end of text and at least one merge.
SMALLEST_BPE = BYTES + 2


@dataclass(frozen=True)
class Vocabulary:
    """Ids and what they stand for.

    size: ids are below it.   end: the id that opens, and so ends, documents; None if there is none.
    text: the tokenizer.json, None for bytes.
    """

    size: int = BYTES
    end: int | None = None
    text: str | None = None
    _reader: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """The vocabulary of a tokenizer.json. Raises ValueError if the file cannot be used."""
        from stateline.generation.tokenizer import read_tokenizer

        if not path.is_file():
            raise fail(
                "tokenizer", f"there is no file {path}.", "Give bytes, bpe:8192 or the path of a tokenizer.json."
            )
        reader = read_tokenizer(path, end=END)
        return cls(reader.vocab_size, reader.end, path.read_text(encoding="utf-8"), reader)

    @property
    def is_bytes(self) -> bool:
        """Whether ids are bytes."""
        return self.text is None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest little-endian type that holds every id."""
        kind = "u1" if self.size <= 1 << 8 else "<u2" if self.size <= 1 << 16 else "<u4"
        return np.dtype(kind)

    @cached_property
    def fingerprint(self) -> str:
        """Identity: "bytes", or the SHA-256 of what the tokenizer.json says and of the end id."""
        if self.text is None:
            return "bytes"
        said = json.dumps([json.loads(self.text), self.end], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @cached_property
    def widths(self) -> npt.NDArray[np.int64] | None:
        """Bytes by id, None where every id is a byte."""
        if self.text is None:
            return None
        return np.array([len(self._reader.token_bytes(i)) for i in range(self.size)], dtype=np.int64)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What generation needs; None for bytes, its default."""
        return self._reader

    def __str__(self) -> str:
        return "bytes" if self.text is None else f"a tokenizer of {self.size} ids ({self.fingerprint[:12]})"

    def encode(self, texts: Sequence[bytes]) -> list[Ids]:
        """Ids of each text, of this vocabulary's dtype, without special ones."""
        if self.text is None:
            return [np.frombuffer(text, np.uint8) for text in texts]
        ids = self._reader.encode_batch([text.decode("utf-8", "replace") for text in texts])
        return [np.array(row, dtype=self.dtype) for row in ids]

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` reads; nothing for bytes."""
        if self.text is None:
            return
        write_atomically(folder / TOKENIZER, self.text)
        if self.end is not None:
            special = {"eos_token": self._reader.token(self.end)}
            write_atomically(folder / TOKENIZER_CONFIG, json.dumps(special, ensure_ascii=False) + "\n")


def beside(folder: Path) -> Vocabulary:
    """The vocabulary of the model in a folder: its tokenizer.json, else bytes."""
    path = folder / TOKENIZER
    return Vocabulary.read(path) if path.is_file() else Vocabulary()


def bpe_size(spec: str | None) -> int | None:
    """The size that "bpe:8192" asks for; None for other specifications. Raises ValueError for a size that cannot be."""
    if spec is None or not spec.startswith("bpe:"):
        return None
    if not re.fullmatch(r"bpe:\d{1,7}", spec) or int(spec[4:]) < SMALLEST_BPE:
        raise fail("train", f"tokenizer is {spec!r}, expected bpe:N with N from {SMALLEST_BPE}, such as bpe:8192.")
    return int(spec[4:])


def named(spec: str | None) -> Vocabulary | None:
    """The vocabulary that `--tokenizer` names, None if it has to be learnt."""
    if spec is None or spec == "bytes":
        return Vocabulary()
    if bpe_size(spec):
        library()
        return None
    path = Path(spec).expanduser()
    return Vocabulary.read(path / TOKENIZER if path.is_dir() else path)


def require_same(own: Vocabulary, spec: str | None, owner: str, *, learnt: bool = False) -> None:
    """Raise ValueError if `--tokenizer` asks for another vocabulary than `own`, which `owner` brings.

    learnt: `own` may be what "bpe:N" gave before.
    """
    if spec is None:
        return
    size = bpe_size(spec)
    asked = None if size else named(spec)
    same = learnt and own.size <= (size or 0) if asked is None else asked.fingerprint == own.fingerprint
    if not same:
        problem = f"tokenizer is {spec!r}, but {owner} has its own: {own}."
        beside_it = ", or put the model's own tokenizer.json beside its weights" * own.is_bytes
        raise fail("train", problem, f"A model only understands its own ids: drop --tokenizer{beside_it}.")


def learn(texts: Iterable[str], size: int) -> Vocabulary:
    """A byte-level BPE of at most `size` ids (fewer if the texts have no more to merge), one of them the end of text.

    The same texts give the same vocabulary. Sennrich et al. 2016; bytes as in Radford et al. 2019.
    """
    import tempfile

    tokenizers = library()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        path.write_text(bpe.to_str(pretty=True), encoding="utf-8")
        return Vocabulary.read(path)


def library() -> Any:
    """The package `tokenizers`. Raises ValueError naming the extra if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise fail("train", "a BPE needs the package tokenizers.", "pip install 'stateline[train]'") from error
    return tokenizers
