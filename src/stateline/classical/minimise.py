"""Minimise many small functions at once: quasi-Newton steps in a batch, each function with its own steps and own end.

Limited-memory BFGS (Nocedal 1980, "Updating quasi-Newton matrices with limited storage"). Suffixes: N functions, M
those that are still under way, k parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: values (M) and gradients (M, k) of the functions `rows` (M) at x (M, k).
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
#: Called with step, values (N) and x (N, k) so far.
Report = Callable[[int, Tensor, Tensor], None]
#: Of the decrease that the slope promises, what a step must bring (Nocedal & Wright, eq. 3.6a).
ARMIJO = 1e-4
SHORTEST = 1e-8
#: A decrease of so much of the tolerance is none: it is near what rounding does to a likelihood.
SMALL = 1e-4
#: Of the value: less decrease than this is rounding.
ROUNDING = 1e-12
#: Where no step lowers a function, it is as low as it gets if a step promised less than this share of its value.
SETTLED = 1e-7
#: Trials in a row that bring next to nothing end a search: one or two may be short by chance.
IDLE = 3
#: Where the ground bends down steps grow by this factor: with no curvature to go by they would stay short.
LONGER = 4.0
#: Rows are copied together once so many of them are done.
COMPACT = 0.75
#: Evaluations whose curvature is remembered.
MEMORY = 30
#: Why a search ended, by `Minimum.reason`; the first three are convergence.
REASONS = (
    "no slope is left",
    "steps gain next to nothing",
    "no step gains more than rounding",
    "no step along the slope lowers it",
    "all steps are used up",
    "all evaluations are used up",
    "the start has no finite value",
)
FLAT, LITTLE, LOWEST, STUCK, STEPS, EVALUATIONS, NOWHERE = range(len(REASONS))
OPEN = -1


class Minimum(NamedTuple):
    """Where each function was least, and how it came there.

    x (N, k), value (N).   converged (N) bool and reason (N), an index of REASONS.   evaluations (N): how many it took.
    trace (steps + 1, N): values at the start and after each step; a function that took fewer keeps its last.
    """

    x: Tensor
    value: Tensor
    converged: Tensor
    reason: Tensor
    evaluations: Tensor
    trace: Tensor


@dataclass
class _Search:
    """What the search knows of the functions under way: `rows` of all, a point, its value, a direction and a step.

    moves, changes (M, s, k): of x and of the slope in the last s evaluations, oldest first, scaled so that their
    product is 1; zeros where there was no curvature.   gamma (M): the curvature's inverse where none is remembered.
    """

    rows: Tensor
    x: Tensor
    value: Tensor
    slope: Tensor
    direction: Tensor
    step: Tensor
    idle: Tensor  # trials that brought, or failed and had promised, next to nothing since one brought more
    taken: Tensor
    reason: Tensor
    moves: Tensor
    changes: Tensor
    gamma: Tensor

    def narrow(self, keep: Tensor) -> _Search:
        """The rows where `keep` is true."""
        return _Search(**{name: part[keep] for name, part in vars(self).items()})

    @property
    def open(self) -> Tensor:
        """(M): which have not ended."""
        return self.reason == OPEN

    @property
    def promised(self) -> Tensor:
        """(M): by how much the slope says that a whole step lowers the function."""
        return -(self.slope * self.direction).sum(-1)


@dataclass(frozen=True)
class _Rules:
    tolerance: float
    gain: float | None
    longest: float
    steps: int

    def floor(self, value: Tensor) -> Tensor:
        """What is next to nothing, beside values (M)."""
        least = ROUNDING * value.abs()
        if self.gain is not None:
            return least.clamp(min=self.gain)
        return torch.maximum(least, SMALL * self.tolerance * (1 + value.abs()))


def minimise(
    objective: Objective,
    start: Tensor,
    *,
    tolerance: float = 1e-5,
    evaluations: int = 200,
    longest: float = 1.0,
    steps: int | None = None,
    gain: float | None = None,
    report: Report | None = None,
) -> Minimum:
    """Local minima of N smooth functions of k parameters each, from `start` (N, k).

    Quasi-Newton steps with backtracking, one evaluation of all functions under way at a time: one function shortens its
    step while another takes its next, and what comes out for one does not depend on the others. Values that are not
    finite count as too high.

    Args:
        tolerance: a function ends when its largest derivative is not above this.
        gain: and when IDLE steps in a row bring less than this; None: less than SMALL of the tolerance, relatively.
        evaluations, steps: at most, of each function; no limit to steps if None.
        longest: bounds the length of a step.
        report: called once the foremost function has taken one more step.
    """
    N, k = start.shape
    limit = evaluations if steps is None else min(steps, evaluations)
    rules = _Rules(tolerance, gain, longest, limit if steps is None else steps)
    value, slope = objective(start, torch.arange(N))
    done = Minimum(
        start.clone(), value.clone(), torch.zeros(N, dtype=torch.bool), torch.full((N,), EVALUATIONS),
        torch.ones(N, dtype=torch.long), value.expand(limit + 1, N).clone(),
    )  # fmt: skip
    counts, none = torch.zeros(N, dtype=torch.long), start.new_zeros(N, 0, k)
    now = _Search(
        torch.arange(N), start, value, slope, _bounded(-slope, longest), value.new_ones(N), counts, counts,
        counts + OPEN, none, none, value.new_ones(N),
    )  # fmt: skip
    now.reason = torch.where(torch.isfinite(value) & torch.isfinite(slope).all(-1), now.reason, NOWHERE)
    _end(now, rules)
    taken, foremost = counts.clone(), 0
    for _ in range(evaluations - 1):
        if not bool(now.open.any()):
            break
        if int(now.open.sum()) < COMPACT * len(now.rows):
            _store(done, now, taken)
            now = now.narrow(now.open)
        done.evaluations[now.rows[now.open]] += 1
        _advance(now, objective, rules)
        _end(now, rules)
        _store(done, now, taken)
        if report is not None and int(now.taken.max()) > foremost:
            foremost = int(now.taken.max())
            report(foremost, done.value, done.x)
    _store(done, now, taken)
    done.reason[done.reason == OPEN] = EVALUATIONS
    done.converged[:] = done.reason <= LOWEST
    order = torch.minimum(torch.arange(int(taken.max()) + 1 if N else 1)[:, None], taken)
    return done._replace(trace=done.trace.gather(0, order))


def _store(done: Minimum, now: _Search, taken: Tensor) -> None:
    rows = now.rows
    done.x[rows], done.value[rows], done.reason[rows], taken[rows] = now.x, now.value, now.reason, now.taken
    done.trace[now.taken, rows] = now.value


def _advance(now: _Search, objective: Objective, rules: _Rules) -> None:
    """One evaluation a row, its step taken or shortened."""
    trial = now.x + now.step[:, None] * now.direction
    value, slope = objective(trial, now.rows)
    promised, live = now.promised, now.open
    good = live & torch.isfinite(value) & torch.isfinite(slope).all(-1)
    good &= value <= now.value - ARMIJO * now.step * promised
    little = torch.where(good, now.value - value, promised) < rules.floor(now.value)
    now.idle = torch.where(little, now.idle + 1, torch.where(good, 0, now.idle))
    _remember(now, trial - now.x, slope - now.slope, good)
    # A step that was too long: where the parabola through both values and the slope is least.
    bend = value - now.value + now.step * promised
    least = 0.5 * promised * now.step / torch.where(bend > 0, bend, torch.inf)
    shorter = now.step * torch.where(torch.isfinite(bend), least, 0.1).clamp(0.1, 0.5)
    now.x = torch.where(good[:, None], trial, now.x)
    now.value, now.slope = torch.where(good, value, now.value), torch.where(good[:, None], slope, now.slope)
    now.taken = now.taken + good
    now.step = torch.where(good, 1.0, torch.where(live, shorter, now.step))
    now.direction = torch.where(good[:, None], _direction(now, rules), now.direction)


def _end(now: _Search, rules: _Rules) -> None:
    """Say which rows have nothing more to do; those whose memory led nowhere forget it and go down the slope."""
    short, settled = now.step < SHORTEST, now.promised < SETTLED * now.value.abs().clamp(min=1)
    led = now.open & short & (now.moves != 0).flatten(1).any(1)
    if bool(led.any()):
        now.moves, now.changes = (torch.where(led[:, None, None], 0.0, v) for v in (now.moves, now.changes))
        now.direction = torch.where(led[:, None], _bounded(-now.slope, rules.longest), now.direction)
        now.gamma, now.step = (torch.where(led, 1.0, v) for v in (now.gamma, now.step))
    ends = {
        FLAT: (now.slope.abs() <= rules.tolerance).all(-1),
        LITTLE: now.idle >= IDLE,
        LOWEST: short & settled,
        STUCK: short & ~led,
        STEPS: now.taken >= rules.steps,
    }
    for reason, here in ends.items():
        now.reason = torch.where(now.open & here, reason, now.reason)


def _bounded(direction: Tensor, longest: float) -> Tensor:
    length = direction.norm(dim=-1, keepdim=True)
    return direction * (longest / length.clamp(min=longest))


def _remember(now: _Search, move: Tensor, change: Tensor, good: Tensor) -> None:
    """The curvature of the accepted moves; where there is none above 0, longer steps."""
    product = (move * change).sum(-1)
    clear = good & (product > 1e-10 * move.norm(dim=-1) * change.norm(dim=-1))
    size = torch.where(clear, product, 1.0).sqrt()[:, None]
    move, change = (torch.where(clear[:, None], v / size, 0.0)[:, None] for v in (move, change))
    now.moves, now.changes = (torch.cat([a, b], 1)[:, -MEMORY:] for a, b in ((now.moves, move), (now.changes, change)))
    inverse = 1 / change.square().sum((1, 2)).clamp(min=1e-300)
    now.gamma = torch.where(clear, inverse, torch.where(good, LONGER * now.gamma, now.gamma))


def _direction(now: _Search, rules: _Rules) -> Tensor:
    """Minus the inverse curvature times the slope (M, k), no longer than `longest`: Byrd, Nocedal & Schnabel 1994."""
    S, Y, g, gamma = now.moves, now.changes, now.slope[..., None], now.gamma[:, None, None]
    R = (S @ Y.mT).triu(1)
    u = torch.linalg.solve_triangular(R, S @ g, upper=True, unitriangular=True)
    a = u + gamma * (Y @ (Y.mT @ u - g))
    a = torch.linalg.solve_triangular(R.mT, a, upper=False, unitriangular=True)
    direction = -(gamma * (g - Y.mT @ u) + S.mT @ a)[..., 0]
    down = (direction * now.slope).sum(-1) < 0
    return _bounded(torch.where(down[:, None], direction, -now.slope), rules.longest)
