"""What series are made of: how each part moves by itself, in steps h[t+1] = A h[t] or as a drift, x' = A x.

Standard models, structural models and the models of `stateline filter` put these together. Of each matrix the first
state shows. Suffixes: k states of a part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

F64 = torch.float64


def trend(damping: Tensor, *, continuous: bool = False) -> Tensor:
    """(…, 2, 2): a level that moves by a slope, of which the share `damping` (…) is left after a step."""
    zero, one = torch.zeros_like(damping), torch.ones_like(damping)
    return matrix([[zero, one], [zero, damping.log()]] if continuous else [[one, one], [zero, damping]])


def wave(angle: Tensor, damping: Tensor, *, continuous: bool = False) -> Tensor:
    """(…, 2, 2): a wave that turns by `angle` (…) a step, of which the share `damping` (…) is left."""
    damping, angle = torch.broadcast_tensors(damping, angle)
    if continuous:
        fades = damping.log()
        return matrix([[fades, angle], [-angle, fades]])
    c, s = damping * torch.cos(angle), damping * torch.sin(angle)
    return matrix([[c, s], [-s, c]])


def season(period: float, harmonics: int | None = None, *, continuous: bool = False) -> list[Tensor]:
    """The waves (k, k) of a pattern of `period` steps, the longest first, all that steps show or so many.

    A wave of two steps alternates, and is one state; as a drift it needs two as any other.
    """
    most = int(period // 2)
    turns = [2 * math.pi * (j + 1) / period for j in range(min(most, harmonics or most))]
    one = torch.ones((), dtype=F64)
    return [
        -torch.ones(1, 1, dtype=F64)
        if abs(turn - math.pi) < 1e-9 and not continuous
        else wave(turn * one, one, continuous=continuous)
        for turn in turns
    ]


def chain(order: int) -> Tensor:
    """The drift (order, order) of a place, its speed, its acceleration …, the last of which stands still."""
    return torch.diag(torch.ones(order - 1, dtype=F64), 1)


def companion(coefficients: Tensor) -> Tensor:
    """(…, k, k): the last k values of a series, the next of which is their sum weighted by coefficients (…, k)."""
    *lead, k = coefficients.shape
    below = torch.eye(k, dtype=coefficients.dtype, device=coefficients.device)[: max(k - 1, 0)]
    return torch.cat([coefficients[..., None, :], below.expand(*lead, *below.shape)], -2)


def shown(blocks: Sequence[Tensor]) -> Tensor:
    """C (1, n) of parts that are added up."""
    return torch.cat([torch.eye(len(block), dtype=block.dtype)[:1] for block in blocks], 1)


def matrix(rows: list[list[Tensor]]) -> Tensor:
    """(…, rows, columns) of entries (…)."""
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
