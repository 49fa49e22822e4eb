"""Ids of a text, wherever they lie: in memory, in a mapped file, or spread over the shards of a prepared data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: uint8, uint16 or uint32.
Ids = npt.NDArray[Any]

_CHUNK = 1 << 20
#: Each document of a piece has a state of its own while it is read: so many fit in memory.
MOST_CUTS = 64
#: A target that no loss counts (`LanguageModel.loss`).
IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """What ids stand for and where documents begin.

    widths: bytes by id (vocab_size,), None where every id is a byte.
    starts: sorted positions of the first id of every document (int64, in memory or mapped), None for a single document.
    opened: documents open with an end-of-text id, which the document before them may therefore predict.
    """

    widths: npt.NDArray[np.int64] | None = None
    starts: npt.NDArray[np.int64] | None = None
    opened: bool = False


@dataclass(frozen=True)
class Piece:
    """A stretch of ids to predict: position i of `inputs` should predict position i of `targets`.

    inputs, targets: int64 (t); a target of −100 does not count.   cuts: positions in [0, t) where a document begins.
    """

    inputs: Tensor
    targets: Tensor
    cuts: list[int]


class TokenText:
    """Ids of one or more sources, end to end, addressed as one array; bytes, unless `layout` says what ids stand for.

    parts: unsigned arrays, in memory or memory-mapped; nothing is copied before `read`.
    base: where in `layout.starts` this text's first id lies (a section shares its whole's layout).
    num_bytes: bytes that all ids stand for, if known.
    """

    def __init__(
        self,
        parts: Sequence[Ids],
        digest: str = "",
        *,
        layout: Layout | None = None,
        base: int = 0,
        num_bytes: int | None = None,
    ) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)
        self.digest = digest
        self.layout = layout or Layout()
        self.base = base
        self._num_bytes = num_bytes

    @classmethod
    def of(cls, text: bytes | str) -> TokenText:
        """The bytes of a text from memory; str is encoded as UTF-8."""
        raw = text.encode() if isinstance(text, str) else text
        return cls([np.frombuffer(raw, dtype=np.uint8)], hashlib.sha256(raw).hexdigest())

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> Ids:
        """Ids [start, stop) as one array."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            end = int(self.ends[first])
            begin = end - len(self.parts[first])
            pieces.append(self.parts[first][start - begin : min(stop, end) - begin])
            start, first = min(stop, end), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint8), *pieces])

    def section(self, start: int, stop: int, num_bytes: int | None = None) -> TokenText:
        """Ids [start, stop) as a text of their own; shares memory."""
        pieces = []
        for part, end in zip(self.parts, self.ends, strict=True):
            begin = int(end) - len(part)
            pieces.append(part[max(0, start - begin) : max(0, stop - begin)])
        digest = f"{self.digest}:{start}-{stop}"
        return TokenText(pieces, digest, layout=self.layout, base=self.base + start, num_bytes=num_bytes)

    def head(self, size: int) -> TokenText:
        """The first `size` bytes, to the id, but at least two ids."""
        if self.layout.widths is None:
            return self.section(0, min(len(self), size))
        widths = self.layout.widths[self.read(0, min(len(self), max(2, size)))]  # few ids are empty: size ids will do
        count = int(np.searchsorted(np.cumsum(widths), size, side="right"))
        return self.section(0, min(len(self), max(2, count)))

    @property
    def num_bytes(self) -> int:
        """How many bytes the ids stand for (counted at the first call if nobody knew)."""
        if self._num_bytes is None:
            spans = range(0, len(self), _CHUNK)
            self._num_bytes = sum(self.width(self.read(a, min(a + _CHUNK, len(self)))) for a in spans)
        return self._num_bytes

    def width(self, ids: Ids) -> int:
        """How many bytes some ids stand for."""
        return len(ids) if self.layout.widths is None else int(self.layout.widths[ids].sum())

    def documents(self, start: int, stop: int) -> list[int]:
        """Positions in [start, stop) where a document begins."""
        starts = self.layout.starts
        if starts is None:
            return [0] if start <= 0 < stop else []
        first, last = np.searchsorted(starts, [start + self.base, stop + self.base])
        return (np.asarray(starts[first:last]) - self.base).tolist()

    def piece(self, start: int, stop: int, *, apart: bool = False) -> Piece:
        """Inputs [start, stop) and targets one id on. `apart`: documents know nothing of each other.

        Then `cuts` says where a state must start afresh, and what only the document before could predict is ignored.
        """
        ids = torch.from_numpy(self.read(start, stop + 1).astype(np.int64))
        inputs, targets = ids[:-1], ids[1:].clone()
        cuts: list[int] = []
        if apart:
            found = [position - start for position in self.documents(start, stop + 1)]
            if not self.layout.opened:
                targets[[position - 1 for position in found if position]] = IGNORED
            cuts = [position for position in found if position < stop - start]
        return Piece(inputs, targets, cuts)

    def count(self, targets: Tensor) -> int:
        """How many bytes the targets of a loss stand for; ignored ones stand for none."""
        wanted = targets[targets != IGNORED]
        return wanted.numel() if self.layout.widths is None else self.width(wanted.numpy())

    def pieces(self, size: int, *, apart: bool = False) -> Iterator[Piece]:
        """The whole text in pieces of at most `size` inputs, and `apart` of at most MOST_CUTS documents, in order."""
        start = 0
        while start < len(self) - 1:
            stop = min(start + size, len(self) - 1)
            inside = self.documents(start + 1, stop) if apart else []
            stop = inside[MOST_CUTS - 1] if len(inside) >= MOST_CUTS else stop
            yield self.piece(start, stop, apart=apart)
            start = stop
