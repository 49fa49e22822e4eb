"""Maximum likelihood of one structure for many series at once, and what is known of each series at its end.

Suffixes: N series, M those that the structure can be fitted to, T time step, n state, k parameters.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.assembly import Structure
from stateline.classical.minimise import minimise
from stateline.classical.panel import Panel
from stateline.ops.kalman import KalmanState, kalman

#: Numbers in the covariances of a block: what one batch of series may keep for its derivatives, here 64 MiB.
BLOCK = 1 << 23
#: Series of a block differ in length by this factor at most, once it has many.
SPREAD, MANY = 1.5, 1024


@dataclass
class StructureFit:
    """A structure and what was found for the series `rows` (M) of all.

    theta (M, k); centre, scale (M): series, or their logarithms, enter as (y − centre) / scale; unit (c): of X.
    loglik (M): of y, in its own units, given each series' first `Structure.diffuse` values; evidence (M): given as many
    as the largest structure needs, to compare. converged, evaluations (M): of the search. state: at the next step.
    """

    structure: Structure
    rows: Tensor
    theta: Tensor
    centre: Tensor
    scale: Tensor
    unit: Tensor
    loglik: Tensor
    evidence: Tensor
    aicc: Tensor
    converged: Tensor
    evaluations: Tensor
    state: KalmanState

    def scaled(self, panel: Panel) -> Panel:
        """The series of this fit among those of `panel`, as they enter."""
        part = panel.take(self.rows)
        part = part.logarithms() if self.structure.transform == "log" else part
        X = None if part.X is None else part.X / self.unit
        return replace(part, y=(part.y - self.centre[:, None]) / self.scale[:, None], X=X)


class Progress:
    """A line on stderr that says how far a long fit is; nothing where stderr is no terminal or `show` is False."""

    def __init__(self, total: int, show: bool | str) -> None:
        self.total, self.done, self.begin, self.last = total, 0, time.monotonic(), 0.0
        self.on = show is True or (show == "auto" and sys.stderr.isatty())

    def advance(self, series: int, what: str) -> None:
        """`series` more were fitted to the structure `what`."""
        self.done += series
        now = time.monotonic()
        if not self.on or now - self.begin < 2 or (now - self.last < 0.2 and self.done < self.total):
            return
        self.last, spent = now, now - self.begin
        left = spent / self.done * (self.total - self.done)
        end = "\n" if self.done >= self.total else ""
        text = f"\rfit: {100 * self.done // self.total}% · {spent:.0f} s, {left:.0f} s left · {what}"
        print(f"{text:<100}", end=end, file=sys.stderr, flush=True)


def fitting(structure: Structure, panel: Panel) -> Tensor:
    """(N): which series have values enough for a structure, and above 0 for logarithms."""
    fits = panel.count >= structure.diffuse + 2
    return fits & ((panel.y > 0) | ~panel.seen).all(1) if structure.transform == "log" else fits


def check_fitting(panel: Panel, structures: list[Structure]) -> None:
    """Raise, before any work, if no structure can be fitted to some series."""
    without = ~torch.stack([fitting(structure, panel) for structure in structures]).any(0)
    if without.any():
        series = int(without.nonzero()[0])
        fewest = min(structure.diffuse for structure in structures) + 2
        count = int(panel.count[series])
        problem = f"series {series} has {count} values, and no structure can be fitted to them"
        remedy = f"The smallest takes {fewest} values."
        if count >= fewest:
            low = float(panel.y[series].nan_to_num(torch.inf).min())
            problem = f"series {series} has the value {low:g}, and logarithms take values above 0"
            remedy = 'Give transform="none", or ["none", "log"]: logarithms where all values are above 0.'
        if len(panel.y) > panel.y.shape[1] > 1:
            remedy += f" There are {len(panel.y)} series of {panel.y.shape[1]} steps: is it y.T?"
        raise checks.fail("fit", f"{problem}.", remedy)


def fit_structure(
    structure: Structure, panel: Panel, common: int, options: tuple[float, int], progress: Progress
) -> StructureFit:
    """The likeliest parameters of `structure` for each series of `panel` that it can be fitted to.

    common: how many values of each series the evidence leaves out.   options: tolerance and evaluations of the search.
    """
    rows = fitting(structure, panel).nonzero()[:, 0]
    M, k, n = len(rows), len(structure.names), structure.n
    unit = _unit(panel)
    part = panel.take(rows)
    centre, scale = (part.logarithms() if structure.transform == "log" else part).scaling()
    nothing = scale.new_zeros(M)
    fit = StructureFit(
        structure, rows, scale.new_zeros(M, k), centre, scale, unit, nothing, nothing.clone(), nothing.clone(),
        torch.zeros(M, dtype=torch.bool), torch.zeros(M, dtype=torch.long),
        KalmanState(scale.new_zeros(M, n), scale.new_zeros(M, n, n)),
    )  # fmt: skip
    whole = fit.scaled(panel)
    for block in blocks(whole.length, n):
        _fit_block(fit, whole.take(block), block, part, common, options)
        progress.advance(len(block), str(structure))
    excess = part.count - common - k - 1
    fit.aicc = 2 * k - 2 * fit.evidence + 2 * k * (k + 1) / excess.clamp(min=1)
    return fit


def blocks(length: Tensor, n: int) -> Iterator[Tensor]:
    """Rows of series of about equal length whose covariances fit a block; longest first, so that memory shows early."""
    order = length.argsort(descending=True, stable=True)
    first = 0
    while first < len(order):
        longest = int(length[order[first]])
        size = max(1, BLOCK // (longest * n * n))
        alike = int((length[order[first:]] * SPREAD >= longest).sum())
        size = min(size, max(alike, MANY))
        yield order[first : first + size]
        first += size


def filtered(
    structure: Structure, theta: Tensor, part: Panel, state: KalmanState | None = None
) -> tuple[Tensor, Tensor, Tensor, KalmanState]:
    """Likelihood terms (M, T), one-step errors and their variances (M, T), and the state after each series' end.

    `state`: of the step before which the values of `part` begin; None: nothing is known.
    """
    M, T = part.y.shape
    y = torch.nn.functional.pad(part.y, (0, 1), value=torch.nan)[..., None]
    X = None if part.X is None else torch.nn.functional.pad(part.X, (0, 0, 0, 1))
    model = structure.model(theta, X)
    start = state or KalmanState(model.m0.expand(M, -1), model.P0)
    out, _ = kalman(y, model.A, model.C, model.Q, model.R, start)
    assert out.predicted_mean is not None
    assert out.predicted_cov is not None
    each = torch.arange(M)
    state = KalmanState(out.predicted_mean[each, part.length].clone(), out.predicted_cov[each, part.length].clone())
    C = model.C[:, :, 0]
    error = y[..., 0] - (C * out.predicted_mean).sum(-1)
    variance = (C[..., None, :] @ out.predicted_cov @ C[..., :, None])[..., 0, 0] + model.R[:, :, 0, 0]
    return out.loglik[:, :T], error[:, :T], variance[:, :T], state


class _Likelihood:
    """Mean negative log-likelihood a value of each series of a block, and its gradient."""

    def __init__(self, structure: Structure, part: Panel) -> None:
        self.structure, self.whole = structure, part
        self.rows, self.part = torch.arange(len(part.y)), part
        self._prepare()

    def _prepare(self) -> None:
        self.mask = self.part.after(self.structure.diffuse).double()
        self.mask /= self.mask.sum(1, keepdim=True)

    def values(self, theta: Tensor, rows: Tensor) -> Tensor:
        """(M) of `rows` at theta (M, k); infinite where rounding leaves no stationary start."""
        if rows is not self.rows:
            self.rows, self.part = rows, self.whole.take(rows)
            self._prepare()
        model = self.structure.model(theta, self.part.X)
        there = torch.isfinite(model.P0).all(-1).all(-1)
        P0 = torch.where(there[:, None, None], model.P0, torch.eye(self.structure.n, dtype=theta.dtype))
        start = KalmanState(model.m0.expand(len(theta), -1), P0)
        out, _ = kalman(self.part.y[..., None], model.A, model.C, model.Q, model.R, start, keep="loglik")
        return torch.where(there, -(out.loglik * self.mask).sum(1), torch.inf)

    def __call__(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = theta.detach().requires_grad_()
            value = self.values(x, rows)
            (slope,) = torch.autograd.grad(value, x, torch.ones_like(value))
        return value.detach(), slope


def _fit_block(
    fit: StructureFit, part: Panel, block: Tensor, raw: Panel, common: int, options: tuple[float, int]
) -> None:
    """Fit the series `block` of `fit`; `part` are they, scaled, and `raw` all of the fit's in their own units."""
    with torch.no_grad():
        likelihood = _Likelihood(fit.structure, part)
        starts, M = fit.structure.starts(), len(block)
        each = likelihood.values(starts.repeat_interleave(M, 0), torch.arange(M).repeat(len(starts)))
        first = starts[each.reshape(-1, M).argmin(0)]
        found = minimise(likelihood, first, tolerance=options[0], evaluations=options[1])
        terms, _, _, state = filtered(fit.structure, found.x, part)
        terms = terms - fit.scale[block].log()[:, None]
        if fit.structure.transform == "log":
            terms = terms - raw.take(block).y.log()
    fit.theta[block], fit.converged[block], fit.evaluations[block] = found.x, found.converged, found.evaluations
    fit.state.mean[block], fit.state.cov[block] = state.mean, state.cov
    for kept, left_out in ((fit.loglik, fit.structure.diffuse), (fit.evidence, common)):
        kept[block] = torch.where(part.after(left_out), terms, 0.0).sum(1)


def _unit(panel: Panel) -> Tensor:
    """(c) root mean square of each regressor over all series: what it is measured in."""
    if panel.X is None:
        return torch.ones(0, dtype=torch.float64)
    inside = (torch.arange(panel.y.shape[1]) < panel.length[:, None])[..., None]
    size = ((panel.X**2 * inside).sum((0, 1)) / inside.sum()).sqrt()
    return torch.where(size > 0, size, 1.0)


def advance(fit: StructureFit, part: Panel) -> KalmanState:
    """The state of each series of a fit after the new values of `part`, which are scaled."""
    made = KalmanState(fit.state.mean.clone(), fit.state.cov.clone())
    for at in blocks(part.length + 1, fit.structure.n):
        state = KalmanState(fit.state.mean[at], fit.state.cov[at])
        after = filtered(fit.structure, fit.theta[at], part.take(at), state)[3]
        made.mean[at], made.cov[at] = after.mean, after.cov
    return made
