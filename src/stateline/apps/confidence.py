"""How sure a mean over dependent data is: intervals of ratios from blocks."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from statistics import NormalDist

import numpy as np

#: Sums are kept for every so many bytes; blocks are made of whole cells.
CELL = 256
#: Blocks are as long as this, in bytes, where that leaves at least BLOCKS of them: words, sentences and most of what a
#: paragraph is about do not reach beyond.
BLOCK = 4096
BLOCKS = 20
#: Fewer units say nothing about how much they vary.
FEWEST = 8
#: Documents are the units from this many on, unless one of them has more than LARGEST of all bytes.
DOCUMENTS = 30
LARGEST = 0.1


class Tally:
    """Sums of a quantity over a text, kept by cells of its bytes and by documents: 16 bytes for every 256 of text."""

    def __init__(self) -> None:
        self.documents: tuple[array[float], array[float]] = (array("d"), array("d"))
        self.cells: tuple[array[float], array[float]] = (array("d"), array("d"))
        self.total = 0.0
        self.size = 0.0

    @classmethod
    def joined(cls, parts: Iterable[Tally]) -> Tally:
        """The tally of several texts, one after the other."""
        whole = cls()
        for part in parts:
            for mine, theirs in ((whole.documents, part.documents), (whole.cells, part.cells)):
                for column, more in zip(mine, theirs, strict=True):
                    column.extend(more)
            whole.total += part.total
            whole.size += part.size
        return whole

    def begin(self) -> int:
        """The number of a document that begins."""
        for column in self.documents:
            column.append(0.0)
        return len(self.documents[0]) - 1

    def add(self, values: np.ndarray, sizes: np.ndarray, document: int) -> None:
        """Add the values of consecutive tokens that take `sizes` bytes; a token counts in the cell where it begins."""
        ends = self.size + np.cumsum(sizes)
        places = ((ends - sizes) // CELL).astype(np.int64)
        first, last = int(places[0]), int(places[-1])
        for column, what in zip(self.cells, (values, sizes), strict=True):
            column.extend([0.0] * (last + 1 - len(column)))
            sums = np.bincount(places - first, weights=what)
            np.frombuffer(column)[first : last + 1] += sums
        for column, what in zip(self.documents, (values, sizes), strict=True):
            column[document] += float(what.sum())
        self.total += float(values.sum())
        self.size = float(ends[-1])

    def units(self) -> tuple[np.ndarray, np.ndarray, str]:
        """(values, bytes, what they are) of the units that are taken for independent."""
        values, sizes = (np.array(column) for column in self.documents)
        if len(sizes) >= DOCUMENTS and sizes.max() <= LARGEST * sizes.sum():
            return values, sizes, f"{len(sizes):,} documents"
        many = len(self.cells[0])
        cells = max(1, min(BLOCK // CELL, many // BLOCKS))
        starts = np.arange(0, many, cells)
        if not many:
            return np.zeros(0), np.zeros(0), "no blocks"
        values, sizes = (np.add.reduceat(np.array(column), starts) for column in self.cells)
        return values, sizes, f"{len(starts):,} blocks of {cells * CELL:,} bytes"


def ratio_interval(values: np.ndarray, sizes: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The interval that holds Σ values / Σ sizes of all such text with probability `level`; None for too few units.

    Units are taken for independent of one another, tokens within one may depend as they like. The variance is that of
    the ratio estimator (Cochran, Sampling Techniques, 1977, §6.4), the quantile Student's t.
    """
    n, whole = len(sizes), float(sizes.sum())
    if n < FEWEST or whole <= 0:
        return None
    ratio = float(values.sum()) / whole
    residuals = values - ratio * sizes
    error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / whole
    reach = student(0.5 + level / 2, n - 1) * error
    return ratio - reach, ratio + reach


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t, by expansion about the normal (Abramowitz & Stegun 26.7.5): 4 digits from 7 on."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
