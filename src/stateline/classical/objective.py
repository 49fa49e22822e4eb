"""The likelihood of learned numbers, each model's by itself, and how sure its top is: standard errors from curvature.

Suffixes: G model, k learned number, a models asked about.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stateline.classical.em import Data, replace
from stateline.classical.kalman import kalman_filter
from stateline.classical.model import StateSpace
from stateline.classical.parameters import COVARIANCES, Parameters, of

OP = "fit"
#: Steps of the differences that curvature is taken from, in learned numbers, whose unit is the size of what is learned.
DIFFERENCE = 1e-5
#: The least eigenvalue of the information scaled to a unit diagonal: below, a direction changes nothing.
SINGULAR = 1e-8
#: A variance whose error is this many times itself has gone to zero, the border, where curvature says nothing.
VAGUE = 10.0
#: Errors expected of predictions, beside the largest value of a series: below, they are how its numbers are rounded.
EXACT = 4 * torch.finfo(torch.float64).eps
Tensors = tuple[Tensor, ...]


def apart(run: Callable[[Tensor], Tensors], failed: Callable[[int, str], Tensors], rows: Tensor) -> Tensors:
    """`run(rows)`, a row of each result for each; where that raises, of halves, down to the rows that `failed`."""
    try:
        return run(rows)
    except (ValueError, torch.linalg.LinAlgError) as error:
        if len(rows) == 1:
            row = int(rows[0])
            return failed(row, str(error).replace("series 0", f"series {row}"))  # it was alone there
        half = len(rows) // 2
        both = [apart(run, failed, part) for part in (rows[:half], rows[half:])]
        return tuple(torch.cat(pair) for pair in zip(*both, strict=True))


def some_of(flat: StateSpace, data: Data, rows: Tensor) -> tuple[StateSpace, Data]:
    """The models and series `rows`, where each series has a model."""
    if not data.each or len(rows) == len(data.y):
        return flat, data
    parts = {k: of(v, rows) for k, v in flat._asdict().items() if v is not None}
    return flat._replace(**parts), data._replace(y=data.y[rows], u=None if data.u is None else data.u[rows])


def beside(take: Tensor, v: Tensor) -> Tensor:
    """(G) beside a part (G, …)."""
    return take.view(-1, *[1] * (v.dim() - 1))


class Cost:
    """Minus the log-likelihood of x (a, k) for the models `rows` (a), and its slope; infinite where there is none.

    problems: why there was none, the last time, by row.
    """

    def __init__(self, flat: StateSpace, data: Data, parameters: Parameters) -> None:
        self.flat, self.data, self.parameters = flat, data, parameters
        self.problems: dict[int, str] = {}

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.empty(int(rows.max()) + 1, dtype=torch.long).index_put((rows,), torch.arange(len(rows)))

        def failed(row: int, problem: str) -> Tensors:
            self.problems[row] = problem
            return x.new_tensor([torch.inf]), torch.zeros_like(x[:1])

        value, slope = apart(lambda some: self._of(x[where[some]], some), failed, rows)
        return value, slope

    def _of(self, x: Tensor, rows: Tensor) -> Tensors:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            parts, bad = self.parameters(x, rows)
            if bool(bad.any()):
                for row in rows[bad].tolist():
                    self.problems[row] = "a covariance with frozen entries is not positive definite"
                good = self.parameters(torch.zeros_like(x), rows)[0]  # the start, which the filter can take
                parts = {k: torch.where(beside(bad, v), good[k], v) for k, v in parts.items()}
            cost = -self._loglik(parts, rows)
            (slope,) = torch.autograd.grad(cost.sum(), x)
        return torch.where(bad, torch.inf, cost.detach()), torch.where(bad[:, None], 0.0, slope)

    def _loglik(self, parts: dict[str, Tensor], rows: Tensor) -> Tensor:
        model, data = some_of(self.flat, self.data, rows)
        out, _ = kalman_filter(replace(model, parts), data.y, data.u, form=data.form, keep="loglik")
        return out.loglik.sum(1) if data.each else out.loglik.sum()[None]


def without_top(flat: StateSpace, data: Data, free: dict[str, Tensor]) -> dict[int, str]:
    """Models whose likelihood has no largest value, and why: they predict without error, as a series that is constant.

    The smaller a variance, the likelier is what is predicted exactly, until rounding ends it.
    """
    learned = [name for name in ("Q", "R") if name in free]
    if not learned:
        return {}

    def run(rows: Tensor) -> Tensors:
        model, some = some_of(flat, data, rows)
        _, state = kalman_filter(model, some.y, some.u, form=data.form, keep="loglik")
        C, R = model.C[:, -1], model.R[:, -1]
        expected = (C @ state.cov @ C.mT + R).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        seen = torch.nan_to_num(some.y).abs().amax(1)
        exact = (expected <= EXACT * torch.where(seen > 0, seen, 1.0)) & ~some.y.isnan().all(1)
        return (exact if data.each else exact.all(0, keepdim=True),)

    def failed(row: int, problem: str) -> Tensors:
        return (torch.zeros(1, data.y.shape[2], dtype=torch.bool),)

    (found,) = apart(run, failed, torch.arange(len(data.y) if data.each else 1))
    problem = "is predicted without error, so that its likelihood grows without end as variances fall to 0"
    remedy = f"Leave {' and '.join(learned)} out of learn; is it constant?"
    columns = {g: int(found[g].nonzero()[0]) for g in found.any(1).nonzero()[:, 0].tolist()}
    return {g: f"column {column} of y {problem}. {remedy}" for g, column in columns.items()}


def standard_errors(
    flat: StateSpace, data: Data, free: dict[str, Tensor], without: dict[int, str]
) -> tuple[dict[str, Tensor] | None, str]:
    """Of the learned parts (G, …) at `flat`: from the information in learned numbers, carried over to the entries.

    without: models that have none, and why.   NaN for models that have none; None if no model has any.
    """
    G = len(data.y) if data.each else 1
    parameters = Parameters(OP, flat, tuple(free), free, stable=False)
    cost, rows, x = Cost(flat, data, parameters), torch.arange(G), parameters.start(G)
    information = x.new_zeros(G, parameters.count, parameters.count)
    for j in range(parameters.count):
        move = torch.zeros_like(x)
        move[:, j] = DIFFERENCE
        information[:, j] = (cost(x + move, rows)[1] - cost(x - move, rows)[1]) / (2 * DIFFERENCE)
    reasons = {g: f"the likelihood ends at what was found: {problem}" for g, problem in cost.problems.items()} | without
    spread = _inverted(information, ~parameters.moves(G), reasons)
    errors = {}
    with torch.enable_grad():
        x = x.requires_grad_()
        for name, part in parameters(x, rows)[0].items():
            flat_part, variances = part.flatten(1), []
            for i in range(flat_part.shape[1]):
                (row,) = torch.autograd.grad(flat_part[:, i].sum(), x, retain_graph=True)
                variances.append((row[:, None] @ spread @ row[:, :, None])[:, 0, 0])
            errors[name] = torch.stack(variances, 1).clamp(min=0).sqrt().detach().unflatten(1, part.shape[1:])
            if name in COVARIANCES:
                error, variance = (v.detach().diagonal(dim1=-2, dim2=-1) for v in (errors[name], part))
                for g in (error > VAGUE * variance).any(1).nonzero()[:, 0].tolist():
                    remedy = f"Freeze it there, or leave {name} out of learn."
                    least = float(variance[g].min())
                    reasons.setdefault(g, f"a variance in {name} went to the border, {least:.3g}. {remedy}")
    if not reasons:
        return errors, ""
    first = min(reasons)
    if G == 1:
        return None, reasons[first]
    why = f"{len(reasons)} of {G} series have none; series {first}: {reasons[first]}"
    for v in errors.values():
        v[list(reasons)] = torch.nan
    return (errors if len(reasons) < G else None), why


def _inverted(information: Tensor, still: Tensor, reasons: dict[int, str]) -> Tensor:
    """Inverses (G, k, k) with zeros for numbers that do not move; where there is none, a reason and zeros."""
    still = still[:, :, None] | still[:, None, :]
    one = torch.eye(information.shape[-1], dtype=information.dtype)
    information = torch.where(still, one, (information + information.mT) / 2)
    size = information.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    for g in (~(size > 0)).any(1).nonzero()[:, 0].tolist():
        reasons.setdefault(g, "the information is singular: a learned number does not change the likelihood")
    good = torch.tensor([g not in reasons for g in range(len(size))])
    unit = torch.where(good[:, None, None], information / size[:, :, None] / size[:, None, :], one)
    for g in (torch.linalg.eigvalsh(unit)[:, :1].amin(1) < SINGULAR).nonzero()[:, 0].tolist():
        what = "leaves the likelihood as it is, or raises it"
        remedy = "Freeze entries or learn fewer parts: A, C and Q together leave the coordinates of the state open."
        reasons[g], good[g] = f"the information is singular: some change of the learned parts {what}. {remedy}", False
    spread = torch.linalg.inv(torch.where(good[:, None, None], unit, one)) / size[:, :, None] / size[:, None, :]
    return torch.where(still | ~good[:, None, None], 0.0, spread)
