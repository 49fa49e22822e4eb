"""Minimise many small functions at once: BFGS in a batch, each function with its own steps and its own end.

Suffixes: N functions, M those that are still under way, k parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: values (M) and gradients (M, k) of the functions `rows` (M) at x (M, k).
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
#: Of the decrease that the slope promises, what a step must bring (Nocedal & Wright, eq. 3.6a).
ARMIJO = 1e-4
SHORTEST = 1e-8
#: A decrease of so much of the tolerance is none: it is near what rounding does to a likelihood.
SMALL = 1e-4
#: Where the ground bends down steps grow by this factor: with no curvature to go by they would stay short.
LONGER = 4.0
#: Rows are copied together once so many of them are done.
COMPACT = 0.75


class Minimum(NamedTuple):
    """x (N, k), value (N), converged (N) bool, evaluations (N): where each function was least, and after how many."""

    x: Tensor
    value: Tensor
    converged: Tensor
    evaluations: Tensor


@dataclass
class _Search:
    """What the search knows of the functions under way: `rows` of all, a point, its value, a direction and a step."""

    rows: Tensor
    x: Tensor
    value: Tensor
    slope: Tensor
    inverse: Tensor
    direction: Tensor
    step: Tensor
    flat: Tensor  # accepted steps in a row that brought next to nothing

    def narrow(self, keep: Tensor) -> _Search:
        """The rows where `keep` is true."""
        return _Search(**{name: part[keep] for name, part in vars(self).items()})


def minimise(
    objective: Objective, start: Tensor, *, tolerance: float = 1e-5, evaluations: int = 200, longest: float = 1.0
) -> Minimum:
    """Local minima of N smooth functions of k parameters each, from `start` (N, k).

    Quasi-Newton steps (BFGS) with backtracking, one evaluation of all functions under way at a time: one function
    shortens its step while another takes its next. A function ends when its largest derivative is below `tolerance`,
    when its next step promises less than SMALL of that, when three in a row brought no more, or when no step lowers it;
    these leave the batch. `longest` bounds the length of a step. Values that are not finite count as too high.
    """
    N, k = start.shape
    done = Minimum(
        start.clone(), start.new_empty(N), torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.long)
    )
    rows = torch.arange(N)
    value, slope = objective(start, rows)
    identity = torch.eye(k, dtype=start.dtype).expand(N, k, k)
    now = _Search(rows, start, value, slope, identity.clone(), -slope, start.new_ones(N), start.new_zeros(N))
    now.direction = _bounded(-slope, longest)
    over = _over(now, tolerance)
    for count in range(1, evaluations + 1):
        _store(done, now, over, count)
        live = ~over
        if not live.any():
            break
        if int(live.sum()) < COMPACT * len(live):
            now, over = now.narrow(live), over[live]
        over = over | _advance(now, objective, tolerance, longest)
    _store(done, now, torch.ones_like(over), evaluations, converged=over)
    return done


def _store(done: Minimum, now: _Search, over: Tensor, count: int, converged: Tensor | None = None) -> None:
    rows = now.rows[over]
    done.x[rows], done.value[rows] = now.x[over], now.value[over]
    done.converged[rows] = True if converged is None else converged[over]
    fresh = rows[done.evaluations[rows] == 0]
    done.evaluations[fresh] = count


def _advance(now: _Search, objective: Objective, tolerance: float, longest: float) -> Tensor:
    """One evaluation a row, its step taken or shortened; which rows have nothing more to do."""
    trial = now.x + now.step[:, None] * now.direction
    value, slope = objective(trial, now.rows)
    promised = (now.slope * now.direction).sum(-1)
    good = torch.isfinite(value) & torch.isfinite(slope).all(-1)
    good &= value <= now.value + ARMIJO * now.step * promised
    gained = torch.where(good, now.value - value, torch.inf)
    now.flat = torch.where(
        good, torch.where(gained < SMALL * tolerance * (1 + now.value.abs()), now.flat + 1, 0), now.flat
    )
    inverse = _bfgs(now.inverse, trial - now.x, slope - now.slope)
    now.inverse = torch.where(good[:, None, None], inverse, now.inverse)
    now.x = torch.where(good[:, None], trial, now.x)
    now.value = torch.where(good, value, now.value)
    now.slope = torch.where(good[:, None], slope, now.slope)
    # A step that was too long: where the parabola through both values and the slope is least.
    bend = value - now.value - now.step * promised
    least = -0.5 * promised * now.step / torch.where(bend > 0, bend, torch.inf)
    shorter = now.step * torch.where(torch.isfinite(bend), least, 0.1).clamp(0.1, 0.5)
    direction = -(now.inverse @ now.slope[..., None])[..., 0]
    down = (direction * now.slope).sum(-1) < 0
    direction = _bounded(torch.where(down[:, None], direction, -now.slope), longest)
    now.direction = torch.where(good[:, None], direction, now.direction)
    now.step = torch.where(good, 1.0, shorter)
    return _over(now, tolerance)


def _over(now: _Search, tolerance: float) -> Tensor:
    promised = -(now.slope * now.direction).sum(-1)
    little = promised < SMALL * tolerance * (1 + now.value.abs())
    return (now.slope.abs().amax(-1) < tolerance) | little | (now.flat >= 3) | (now.step < SHORTEST)


def _bounded(direction: Tensor, longest: float) -> Tensor:
    length = direction.norm(dim=-1, keepdim=True)
    return direction * (longest / length.clamp(min=longest))


def _bfgs(inverse: Tensor, move: Tensor, change: Tensor) -> Tensor:
    """The inverse Hessian (M, k, k) after a move that changed the slope so; LONGER where curvature is not above 0."""
    along = (move * change).sum(-1)
    enough = along > 1e-10 * move.norm(dim=-1) * change.norm(dim=-1)
    rho = (1 / torch.where(enough, along, 1.0))[:, None, None]
    left = torch.eye(move.shape[-1], dtype=move.dtype) - rho * move[:, :, None] * change[:, None, :]
    updated = left @ inverse @ left.mT + rho * move[:, :, None] * move[:, None, :]
    return torch.where(enough[:, None, None], updated, LONGER * inverse)
