"""How much each token of a corpus says: inverse document frequencies, as gates of a GatedSSM.

TF-IDF weighs a token by how often it occurs in a document times log of how few documents have it. A recurrence sums
over occurrences by itself, which is the first factor; so a table of the second, one number a token, is all it needs.
Source: Spärck Jones 1972, "A statistical interpretation of term specificity and its application in retrieval"; the
smoothed form is scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stateline import checks
from stateline.training.text import Ids, TokenText

OP = "tfidf"
#: Ids that are looked at together.
_BLOCK = 1 << 20


class DocumentFrequency:
    """In how many documents of a corpus each token occurs, counted as documents come.

    documents: how many were counted.   containing: (vocab_size) int64, how many of them have each id.

    >>> counts = DocumentFrequency(4)
    >>> for document in ([0, 1, 1], [0, 2], [0, 1]):
    ...     counts.add(np.array(document))
    >>> counts.containing.tolist()
    [3, 2, 1, 0]
    >>> counts.idf().round(3).tolist()
    [1.0, 1.288, 1.693, 2.386]
    """

    def __init__(self, vocab_size: int) -> None:
        checks.number(OP, "vocab_size", vocab_size, low=1, integer=True)
        self.documents = 0
        self.containing = np.zeros(vocab_size, np.int64)

    def add(self, ids: Ids | list[int]) -> None:
        """Count one document."""
        self._count(iter([np.asarray(ids)]))

    def add_text(self, text: TokenText) -> None:
        """Count every document of a text, block by block: it may be larger than memory, as a prepared data set is."""
        starts = np.array([*text.documents(0, len(text)), len(text)])
        if len(text) and starts[0] > 0:  # a section may begin inside a document
            starts = np.concatenate([[0], starts])
        for start, stop in pairwise(starts.tolist()):
            self._count(text.read(a, min(a + _BLOCK, stop)) for a in range(start, stop, _BLOCK))

    def _count(self, blocks: Iterator[Ids]) -> None:
        size, found = len(self.containing), []
        for ids in blocks:
            seen = np.unique(ids)
            if len(seen) and not (np.issubdtype(seen.dtype, np.integer) and seen[0] >= 0 and seen[-1] < size):
                problem = f"a document has ids from {seen[0]} to {seen[-1]}, expected whole numbers below {size}."
                raise checks.fail(OP, problem, "Is it the right tokenizer?")
            found.append(seen)
        if found:
            self.containing[np.unique(np.concatenate(found)).astype(np.int64)] += 1
        self.documents += 1

    def idf(self) -> npt.NDArray[np.float64]:
        """(vocab_size) ln((1 + documents) / (1 + containing)) + 1: 1 for what every document has."""
        return np.log((1 + self.documents) / (1 + self.containing)) + 1

    def gates(self, low: float = 0.9, high: float = 1.0) -> Tensor:
        """(vocab_size) float32: from `low` for the commonest tokens to `high` for the rarest, by their idf.

        A gate multiplies the whole state. Between tokens that say nothing it fades as low^t, to 1/e in about
        1 / (1 − low) of them; those that say much leave it as it is.

        Raises:
            ValueError: where no two tokens differ, as in a corpus of one document.
        """
        checks.number(OP, "low", low, low=0, high=1)
        checks.number(OP, "high", high, low=low, high=1)
        idf = self.idf()
        seen = idf[self.containing > 0]
        if len(seen) == 0 or seen.min() == seen.max():
            problem = f"{self.documents} documents were counted, and every token in them is in as many as any other."
            raise checks.fail(OP, problem, "Count more documents, or smaller ones (--document-separator).")
        share = (idf - seen.min()) / (seen.max() - seen.min())
        return torch.from_numpy(low + (high - low) * np.clip(share, 0, 1)).float()
