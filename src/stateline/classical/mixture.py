"""Forecasts that are averages over structures: mixtures of normal and lognormal distributions, with exact quantiles.

Suffixes: N series, S steps ahead, j structures.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stateline import checks

#: Halvings of an interval of doubles until its ends are neighbours.
HALVINGS = 64
#: A mean beyond this quantile says nothing of what will happen.
FAR = 0.95


@dataclass(frozen=True)
class StructuralForecast:
    """What N series are expected to do in the S steps ahead, and how surely.

    weight (N, j) of each structure; its mean and deviation (N, j, S) of y, or of log y where `log` (j) says so.
    """

    weight: Tensor
    location: Tensor
    deviation: Tensor
    log: Tensor

    def __repr__(self) -> str:
        return f"StructuralForecast({self.location.shape[0]} series, {self.location.shape[2]} steps)"

    @property
    def mean(self) -> NDArray[np.float64]:
        """(N, S): expected values. Where logarithms count, tails are heavy and the mean can lie far out in them; a
        RuntimeWarning then says so. `median` is the safer point forecast."""
        each = torch.where(self.log[:, None], (self.location + self.deviation**2 / 2).exp(), self.location)
        found = _array((self._weights() * torch.where(self._weights() > 0, each, 0.0)).sum(1))
        if self.log.any():
            far = (found > self.quantile(FAR)).any(1)
            if far.any():
                what = f"{int(far.sum())} of {len(far)} series have means above their {FAR:.0%} quantile"
                warnings.warn(f"forecast: {what}, as extreme growth counts in them. Use median.", RuntimeWarning, 2)
        return found

    @property
    def median(self) -> NDArray[np.float64]:
        """(N, S): values that are exceeded half of the time; what absolute errors are least around."""
        return self.quantile(0.5)

    def quantile(self, q: float | list[float]) -> NDArray[np.float64]:
        """(N, S) for a number q in (0, 1): y stays below it with probability q. A list adds an axis in front.

        Raises:
            ValueError: if a q is not between 0 and 1.
        """
        if isinstance(q, list):
            return np.stack([self.quantile(one) for one in q])
        checks.probability("quantile", "q", q)
        ends = self.location + self.deviation * torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        ends = self._back(ends)
        used = self._weights() > 0
        low = torch.where(used, ends, torch.inf).amin(1)  # the mixture's quantile lies between those of its parts
        high = torch.where(used, ends, -torch.inf).amax(1)
        for _ in range(HALVINGS):
            middle = low + (high - low) / 2
            below = self._below(middle) < q
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return _array(low + (high - low) / 2)

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends (N, S) between which each value lies with probability `level` in (0, 1)."""
        checks.probability("interval", "level", level)
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def _weights(self) -> Tensor:
        return self.weight[..., None].expand_as(self.location)

    def _back(self, x: Tensor) -> Tensor:
        return torch.where(self.log[:, None], x.exp(), x)

    def _below(self, y: Tensor) -> Tensor:
        """P(Y ≤ y), (N, S)."""
        values = y[:, None].expand_as(self.location)
        positive = values > 0
        z = torch.where(self.log[:, None], torch.where(positive, values, 1.0).log(), values)
        share = torch.special.ndtr((z - self.location) / self.deviation)
        share = torch.where(self.log[:, None] & ~positive, 0.0, share)
        return (self._weights() * share).sum(1)


def _array(x: Tensor) -> Any:
    return x.numpy()
