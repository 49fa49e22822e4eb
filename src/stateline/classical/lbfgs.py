"""Many small minimisations side by side: limited-memory BFGS, each with its own steps and its own end.

Sources: Nocedal 1980, "Updating quasi-Newton matrices with limited storage"; Lewis & Overton 2013, whose line search
halves or doubles an interval until the step is neither too long nor too short, and treats what cannot be evaluated
(infinity) as too long. Suffixes: G problem, k parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY = 20
TRIALS = 40
ENOUGH, FLAT = 1e-4, 0.9  # of the slope: the least descent, and what must be left of the slope at most
#: Of the value: less descent than this is rounding.
ROUNDING = 1e-12
#: f(x (a, k), rows (a)) -> values (a), infinite where there is none, and slopes (a, k).
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Minimum(NamedTuple):
    """x (G, k), values of all steps (steps + 1, G), and for each problem whether it converged and why it ended."""

    x: Tensor
    trace: Tensor
    converged: Tensor
    reasons: list[str]


class Lbfgs:
    """The state of G minimisations; `run` advances them all until each has ended."""

    def __init__(self, function: Function, x: Tensor, tolerance: float) -> None:
        self.function, self.x, self.tolerance = function, x, tolerance
        self.value, self.slope = function(x, torch.arange(len(x)))
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # moves, changes of slope, 1 / their product or 0
        self.gain = torch.full_like(self.value, torch.inf)
        self.reasons = ["" for _ in x]
        self.converged = torch.zeros(len(x), dtype=torch.bool)
        for g in (~torch.isfinite(self.value)).nonzero()[:, 0].tolist():
            self.reasons[g] = "the likelihood of the start is not finite"

    def run(self, steps: int, report: Callable[[int, Tensor, Tensor], None]) -> Minimum:
        """At most `steps` steps; `report(step, values, x)` after each."""
        trace = [self.value.clone()]
        for step in range(1, steps + 1):
            rows = torch.tensor([g for g, reason in enumerate(self.reasons) if not reason], dtype=torch.long)
            if not len(rows):
                break
            self.step(rows)
            trace.append(self.value.clone())
            report(step, self.value, self.x)
        for g, reason in enumerate(self.reasons):
            self.reasons[g] = reason or f"all {steps} steps are used up"
        return Minimum(self.x, torch.stack(trace), self.converged, self.reasons)

    def step(self, rows: Tensor) -> None:
        """One step of the problems `rows`, or their end."""
        direction = self.direction(rows)
        descent = -(self.slope[rows] * direction).sum(-1)
        small = torch.maximum(torch.full_like(descent, self.tolerance), ROUNDING * self.value[rows].abs())
        ended = (descent < 2 * small) & (self.gain[rows] < small)
        ended |= self.slope[rows].abs().amax(-1) == 0 if self.x.shape[1] else torch.ones_like(ended)
        self.end(rows[ended], f"a step gains less than {self.tolerance:g}", converged=True)
        rows, direction, descent = rows[~ended], direction[~ended], descent[~ended]
        found = self.search(rows, direction, -descent)
        stuck = ~found
        if bool(stuck.any()):
            settled = descent[stuck] < 1e-7 * self.value[rows[stuck]].abs().clamp(min=1)
            self.end(rows[stuck][settled], "no step gains more than rounding", converged=True)
            rest = rows[stuck][~settled]
            fresh = [g for g in rest.tolist() if not any(bool(rho[g]) for _, _, rho in self.pairs)]
            self.end(torch.tensor(fresh, dtype=torch.long), "no step along the slope raises the likelihood", False)
            for _, _, rho in self.pairs:  # forget, and try steepest descent
                rho[rest] = 0

    def end(self, rows: Tensor, reason: str, converged: bool) -> None:
        """Say why the problems `rows` ended."""
        for g in rows.tolist():
            self.reasons[g] = reason
        self.converged[rows] = converged

    def direction(self, rows: Tensor) -> Tensor:
        """−H slope by the two loops; without memory, a step no longer than 1."""
        q, weights = self.slope[rows].clone(), []
        scale = 1 / self.slope[rows].norm(dim=-1).clamp(min=1)
        for s, y, rho in reversed(self.pairs):
            weight = rho[rows] * (s[rows] * q).sum(-1)
            q -= weight[:, None] * y[rows]
            weights.append(weight)
        known = torch.zeros_like(scale, dtype=torch.bool)
        for s, y, rho in reversed(self.pairs):
            newest = (rho[rows] > 0) & ~known
            ratio = (s[rows] * y[rows]).sum(-1) / y[rows].square().sum(-1).clamp(min=1e-300)
            scale, known = torch.where(newest, ratio, scale), known | newest
        q *= scale[:, None]
        for (s, y, rho), weight in zip(self.pairs, reversed(weights), strict=True):
            q += s[rows] * (weight - rho[rows] * (y[rows] * q).sum(-1))[:, None]
        return -q

    def search(self, rows: Tensor, direction: Tensor, slope: Tensor) -> Tensor:
        """Which problems found a point along `direction`; their x, value and slope move there."""
        start, before, old = self.x[rows].clone(), self.value[rows].clone(), self.slope[rows].clone()
        length, low = torch.ones_like(before), torch.zeros_like(before)
        high, found = torch.full_like(before, torch.inf), torch.zeros_like(before, dtype=torch.bool)
        best, best_at = before.clone(), torch.zeros_like(before)
        for _ in range(TRIALS):
            a = (~found).nonzero()[:, 0]
            if not len(a):
                break
            trial = start[a] + length[a, None] * direction[a]
            value, gradient = self.function(trial, rows[a])
            finite = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
            long = ~finite | (value > before[a] + ENOUGH * length[a] * slope[a])
            short = ~long & ((gradient * direction[a]).sum(-1) < FLAT * slope[a])
            good = ~long & (value <= best[a])  # keep the best point with enough descent, whatever its slope
            g = a[good]
            best[g], best_at[g] = value[good], length[g]
            self.x[rows[g]], self.value[rows[g]], self.slope[rows[g]] = trial[good], value[good], gradient[good]
            high[a[long]], low[a[short]] = length[a[long]], length[a[short]]
            found[a[~long & ~short]] = True
            length = torch.where(torch.isfinite(high), (low + high) / 2, 2 * length)
        found |= best_at > 0
        self.gain[rows] = before - self.value[rows]
        moved, changed = torch.zeros_like(self.x), torch.zeros_like(self.x)
        moved[rows], changed[rows] = self.x[rows] - start, self.slope[rows] - old
        product = (moved * changed).sum(-1)
        clear = product > 1e-14 * moved.norm(dim=-1) * changed.norm(dim=-1)
        rho = torch.where(clear, 1 / product.clamp(min=1e-300), 0.0)
        self.pairs = [*self.pairs, (moved, changed, rho)][-MEMORY:]
        return found
