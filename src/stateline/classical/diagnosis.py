"""Whether anything is left to predict in errors of predicting: autocorrelation, Ljung & Box, a variance that drifts.

Suffixes: N series, T time step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Diagnosis(NamedTuple):
    """Whether the errors of predicting each series one step ahead, in their expected deviations, look like white noise.

    errors (N, T), NaN where there is none; autocorrelation (N, lags); ljung_box and p_value (N): small where
    something is left to predict; ratio (N): variance in the last third over that in the first third, 1 if it is steady.
    """

    errors: Floats
    autocorrelation: Floats
    ljung_box: Floats
    p_value: Floats
    ratio: Floats

    def __repr__(self) -> str:
        (N, T), lags = self.errors.shape, self.autocorrelation.shape[1]
        return f"Diagnosis({N} series, {T} steps, {lags} lags)"


def diagnosis(errors: Tensor, lags: int, free: Tensor) -> Diagnosis:
    """Statistics of standardised errors (N, T): Ljung & Box 1978, one degree of freedom less for each parameter."""
    there = ~torch.isnan(errors)
    count = there.sum(1)
    mean = errors.nanmean(1, keepdim=True)
    e = torch.where(there, errors - mean, 0.0)
    total = (e**2).sum(1)
    found = torch.zeros(len(e), lags, dtype=torch.float64)
    for apart in range(1, min(lags, e.shape[1] - 1) + 1):
        found[:, apart - 1] = (e[:, apart:] * e[:, :-apart]).sum(1) / total
    lag = torch.arange(1, lags + 1)
    used = lag < count[:, None]
    weighted = torch.where(used, found**2 / (count[:, None] - lag).clamp(min=1), 0.0)
    box = count * (count + 2) * weighted.sum(1)
    degrees = (torch.minimum(count - 1, torch.tensor(lags)) - free).clamp(min=1)
    p = torch.special.gammaincc(degrees / 2, box / 2)
    order = there.cumsum(1)
    early, late = (
        torch.where(m & there, errors**2, torch.nan).nanmean(1)
        for m in (order <= count[:, None] // 3, order > count[:, None] - count[:, None] // 3)
    )
    return Diagnosis(errors.numpy(), found.numpy(), box.numpy(), p.numpy(), (late / early).numpy())
