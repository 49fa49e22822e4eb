"""The search for variances that make series most likely: where it begins, and uphill from there.

Suffixes: N series, k logarithms of variances, in those of the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stateline.apps.filter_models import F64
from stateline.classical.minimise import minimise

#: Of the data's variance: where searches for variances begin, what moves and what is noise. A slope that wanders for T
#: rows makes T³ of its variance, so it may be small.
MOVES, NOISES, STILL = (1e-8, 1e-6, 1e-4, 1e-2, 1.0), (1e-3, 0.1), 1e-9
#: A step of the search, in logarithms of variances.
LONGEST = 4.0


def starts_of(moves: Tensor) -> Tensor:
    """Logarithms (families, starts, k) to begin from: all that moves (k) alike, then each of it and the rest hardly."""
    families = [moves] + [row & moves for row in torch.eye(len(moves), dtype=torch.bool) if bool((row & moves).any())]
    families = families[: 1 if int(moves.sum()) < 2 else None]
    return (
        torch.stack(
            [
                torch.stack(
                    [torch.where(one, move, torch.where(moves, STILL, noise)) for move in MOVES for noise in NOISES]
                )
                for one in families
            ]
        )
        .to(F64)
        .log()
    )


def likeliest(likelihood: Callable[[Tensor, Tensor], Tensor], start: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where minus the likelihood (N) of x (N, k) of the series `at` is least, from a start (N, k); and its value."""

    def cost(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = -likelihood(x, at[rows])
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    found = minimise(cost, start, longest=LONGEST)
    return found.x, found.value
