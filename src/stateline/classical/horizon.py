"""Steering within limits: at every step the best inputs for a horizon ahead, of which the first is applied.

    least of  Σ (y[k] − r[k])ᵀ Q (y[k] − r[k]) + (u[k] − u*[k])ᵀ R (u[k] − u*[k]) + Δu[k]ᵀ S Δu[k]  +  end
    within    h[k+1] = A h[k] + B u[k],  boxes for u, for Δu[k] = u[k] − u[k−1], for h[k+1] and for y[k+1] = C h[k+1]

u* is the input that holds y near r at rest, so that a goal that is reached costs nothing. The end, (h − h*)ᵀ P (h − h*)
by P of `lqr`, is what the rest of time costs without limits: where none is touched, the inputs are those of `lqr`.

A quadratic program, solved by OSQP. From step to step only vectors change: matrices are factorised once, and a solution
starts from the last one, shifted by a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stateline import checks
from stateline.classical.control import lqr
from stateline.classical.model import StateSpace, covariance, no_tensor
from stateline.classical.regulator import only_controlled, rests
from stateline.classical.riccati import wide
from stateline.ops.kalman.reference import times

Bound = float | Tensor
#: Tolerance of OSQP, absolute and relative; polishing then solves for the limits that it found touched, to rounding.
PRECISION = 1e-4
ITERATIONS = 20_000
#: How surely a program without an answer must show it; OSQP's own 1e-4 despairs of unstable plants too soon.
IMPOSSIBILITY = 1e-9
SOLVED, IMPOSSIBLE = 1, (3, 4)
#: The boxes that may be exceeded at a cost: the last ones among the rows, one behind the other.
SOFT = ("states", "outputs")


@dataclass(frozen=True)
class Limits:
    """Boxes: (low, high), numbers or tensors (p) for inputs and their rates, (n) for states, (m) for y; infinite: free.

    rates: of u[k] − u[k−1], a step.
    outputs: of y, for models whose states have no meaning of their own, as those that were learned.
    soft: None, or what a violation of `states` and `outputs` costs, linearly and squared: the boxes of inputs and rates
        are hard, and without it these too, so that from some states there is no answer.
    """

    inputs: tuple[Bound, Bound] | None = None
    rates: tuple[Bound, Bound] | None = None
    states: tuple[Bound, Bound] | None = None
    soft: float | None = None
    outputs: tuple[Bound, Bound] | None = None


class Plan(NamedTuple):
    """u (T, p), the first to be applied now; h (T+1, n) and y (T+1, m) it leads to, from now on; iterations of OSQP."""

    u: Tensor
    h: Tensor
    y: Tensor
    iterations: int


class RecedingHorizon:
    """Tracking with limits; also called model predictive control.

    Args:
        model: constant matrices of one system with inputs, and without D.
        Q: (m, m), what a distance of y from the reference costs.   R: (p, p), what an input costs.
        horizon: T steps.
        rate: S (p, p), what a change of the input costs; nothing if None.
        final: (n, n), what a distance of the last state from rest costs; P of `lqr` with Cᵀ Q C and R if None.
        limits: boxes.

    Inputs and their rates are within their limits exactly, states and y within the solver's tolerance (`PRECISION`).

    One plant an object: it keeps the last solution to start from. Nothing else is kept, and the answer is the same
    without it, within the precision of the solver.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> model = StateSpace(
    ...     A=torch.tensor([[1.0, 0.1], [0.0, 1.0]]), B=torch.tensor([[0.005], [0.1]]), C=torch.tensor([[1.0, 0.0]]),
    ...     D=None, Q=torch.eye(2), R=torch.eye(1), m0=torch.zeros(2), P0=torch.eye(2),
    ... )
    >>> controller = RecedingHorizon(model, torch.eye(1), 0.01 * torch.eye(1), horizon=20, limits=Limits((-1.0, 1.0)))
    >>> plan = controller.plan(torch.zeros(2), reference=torch.tensor([1.0]))
    >>> round(plan.u[0].item(), 4), plan.y.shape
    (1.0, torch.Size([21, 1]))
    """

    def __init__(
        self,
        model: StateSpace,
        Q: Tensor,
        R: Tensor,
        *,
        horizon: int,
        rate: Tensor | None = None,
        final: Tensor | None = None,
        limits: Limits | None = None,
    ) -> None:
        op = self.op = "RecedingHorizon"
        self.model = model = only_controlled(op, model)
        assert model.B is not None
        checks.number(op, "horizon", horizon, low=1, integer=True)
        self.n, self.m, self.p, self.T = len(model.A), len(model.C), model.B.shape[1], horizon
        for name, x, size in (("Q", Q, self.m), ("R", R, self.p), ("rate", rate, self.p), ("final", final, self.n)):
            if x is not None:
                self._fits(name, x, (size, size))
                covariance(op, name, x, "weight")
        if not isinstance(limits, Limits | None):
            raise checks.fail(op, f"limits is {limits!r}, expected Limits(inputs=(low, high), …).", error=TypeError)
        self.limits = limits or Limits()
        if self.limits.soft is not None:
            checks.number(op, "soft", self.limits.soft, low=0)
        self._rests = rests(model)
        self.Q, self.R = wide(Q), wide(R)
        self.S = torch.zeros_like(self.R) if rate is None else wide(rate)
        if final is None:
            final = lqr(model.A, model.B, model.C.mT @ Q @ model.C, R).P
        self.P = wide(final)
        self._needs_before = rate is not None or self.limits.rates is not None
        self._setup()

    # The variables are h[1] … h[T], u[0] … u[T−1], and with soft limits what each h[k] and y[k] may exceed its box by.

    def _setup(self) -> None:
        osqp, sparse = _osqp(self.op)
        n, p, T = self.n, self.p, self.T
        C = wide(self.model.C)
        change = sparse.kron(sparse.eye(T) - sparse.eye(T, k=-1), sparse.eye(p))  # Δu of u, but for u[−1]
        seen = sparse.kron(sparse.diags([1.0] * (T - 1) + [0.0]), (C.mT @ self.Q @ C).numpy())
        end = sparse.kron(sparse.diags([0.0] * (T - 1) + [1.0]), self.P.numpy())
        spent = sparse.kron(sparse.eye(T), self.R.numpy())
        varied = change.T @ sparse.kron(sparse.eye(T), self.S.numpy()) @ change
        parts = [2 * (seen + end), 2 * (spent + varied)]
        self._at: dict[str, slice]
        self._sizes: dict[str, int]
        self._kept: dict[str, np.ndarray]
        self._low: np.ndarray
        self._high: np.ndarray
        rows = self._boxes(sparse, change)
        self._linear = np.zeros((n + p) * T)
        self._widths = [n, p], [n, *self._sizes.values()]  # of a step's variables, and of its rows
        soft = [name for name in SOFT if name in self._at]
        if self.limits.soft is not None and soft:
            sizes, at = [self._sizes[name] for name in soft], slice(self._at[soft[0]].start, self._at[soft[-1]].stop)
            size = sum(sizes)
            count, free = len(self._low), sparse.eye(size * T)
            place = (np.arange(at.start, at.stop), np.arange(size * T))
            slack = sparse.csr_matrix((np.ones(size * T), place), (count, size * T))
            below = sparse.hstack([sparse.csr_matrix((size * T, (n + p) * T)), free])
            rows = sparse.vstack([sparse.hstack([rows, slack]), sparse.hstack([rows[at], -free]), below])
            never = np.full(size * T, np.inf)
            self._low = np.concatenate([self._low, -never, np.zeros(size * T)])
            self._high = np.concatenate([self._high, self._high[at], never])
            self._high[at] = never
            parts.append(2 * self.limits.soft * free)
            self._linear = np.concatenate([self._linear, np.full(size * T, self.limits.soft)])
            self._widths = [n, p, *sizes], [n, *self._sizes.values(), *sizes, *sizes]
        self._solver = osqp.OSQP()
        self._solver.setup(
            P=sparse.triu(sparse.block_diag(parts), format="csc"),
            q=self._linear,
            A=sparse.csc_matrix(rows),
            l=self._low,
            u=self._high,
            verbose=False,
            eps_abs=PRECISION,
            eps_rel=PRECISION,
            eps_prim_inf=IMPOSSIBILITY,
            max_iter=ITERATIONS,
            polishing=True,
        )
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def _boxes(self, sparse: Any, change: Any) -> Any:
        """Rows of the dynamics and of every box; notes their bounds, and where each box lies."""
        n, m, p, T = self.n, self.m, self.p, self.T
        assert self.model.B is not None
        steps = sparse.eye(n * T) - sparse.kron(sparse.eye(T, k=-1), wide(self.model.A).numpy())
        rows = [sparse.hstack([steps, -sparse.kron(sparse.eye(T), wide(self.model.B).numpy())])]
        low, high = [np.zeros(n * T)], [np.zeros(n * T)]
        self._at, self._sizes, self._kept = {}, {}, {}
        for name, size, columns in (
            ("inputs", p, (sparse.csr_matrix((p * T, n * T)), sparse.eye(p * T))),
            ("rates", p, (sparse.csr_matrix((p * T, n * T)), change)),
            ("states", n, (sparse.eye(n * T), sparse.csr_matrix((n * T, p * T)))),
            ("outputs", m, (sparse.kron(sparse.eye(T), wide(self.model.C).numpy()), sparse.csr_matrix((m * T, p * T)))),
        ):
            box = getattr(self.limits, name)
            least, most = (np.full(size, -np.inf), np.full(size, np.inf)) if box is None else self._box(name, box, size)
            kept = np.flatnonzero(np.isfinite(least) | np.isfinite(most))
            if len(kept):
                start = sum(map(len, low))
                self._at[name] = slice(start, start + len(kept) * T)
                self._sizes[name], self._kept[name] = len(kept), kept
                rows.append(sparse.kron(sparse.eye(T), np.eye(size)[kept]) @ sparse.hstack(columns))
                low.append(np.tile(least[kept], T))
                high.append(np.tile(most[kept], T))
        self._low, self._high = np.concatenate(low), np.concatenate(high)
        return sparse.vstack(rows).tocsr()

    def _box(self, name: str, box: tuple[Bound, Bound], size: int) -> list[np.ndarray]:
        if not isinstance(box, tuple | list) or len(box) != 2:
            raise checks.fail(self.op, f"limits.{name} is {box!r}, expected two ends, (low, high).", error=TypeError)
        ends = []
        for end in box:
            made = torch.as_tensor(end, dtype=torch.float64).cpu()
            if made.shape not in ((), (size,)):
                problem = f"limits.{name} has an end of shape {tuple(made.shape)}, expected () or ({size},)."
                raise checks.fail(self.op, problem)
            ends.append(made.expand(size).numpy())
        if not (ends[0] <= ends[1]).all():
            raise checks.fail(self.op, f"limits.{name} is {box}, expected (low, high) with low ≤ high.")
        return ends

    def _update(self, h: Tensor, wanted: Tensor, before: Tensor) -> None:
        """The vectors of the program for a start, a reference (T, m) and an input before."""
        n, p, T = self.n, self.p, self.T
        rest, _ = self._rests(wanted)
        low, high, linear = self._low.copy(), self._high.copy(), self._linear.copy()
        first = wide(self.model.A) @ h
        low[:n] = high[:n] = first
        if "rates" in self._at:
            start, last = self._at["rates"].start, before.numpy()[self._kept["rates"]]
            low[start : start + len(last)] += last
            high[start : start + len(last)] += last
        pull = wanted @ self.Q @ wide(self.model.C)
        pull[-1] = self.P @ rest.h[-1]
        push = rest.u @ self.R
        push[0] += self.S @ before
        linear[: n * T] -= 2 * pull.flatten().numpy()
        linear[n * T : (n + p) * T] -= 2 * push.flatten().numpy()
        self._solver.update(q=linear, l=low, u=high)

    def _shifted(self, x: np.ndarray) -> np.ndarray:
        """A solution, or its multipliers, a step later: the first step left out, the last twice."""
        widths = self._widths[0 if len(x) == len(self._linear) else 1]
        moved = [part.reshape(self.T, -1) for part in np.split(x, self.T * np.cumsum(widths)[:-1])]
        return np.concatenate([np.concatenate([part[1:], part[-1:]]).ravel() for part in moved])

    def _kept_within(self, u: Tensor, before: Tensor) -> Tensor:
        """Inputs with what the solver's tolerance lets them exceed their limits by taken off."""
        free = (-torch.inf, torch.inf)
        (low, high), (down, up) = (
            [torch.as_tensor(end, dtype=u.dtype, device=u.device) for end in box or free]
            for box in (self.limits.inputs, self.limits.rates)
        )
        made = []
        for step in u:
            before = step.maximum(before + down).minimum(before + up).maximum(low).minimum(high)
            made.append(before)
        return torch.stack(made)

    def _follow(self, h: Tensor, u: Tensor, iterations: int) -> Plan:
        assert self.model.B is not None
        states = [h]
        for step in u:
            states.append(times(self.model.A, states[-1]) + times(self.model.B, step))
        made = torch.stack(states)
        return Plan(u, made, made @ self.model.C.mT, iterations)

    def _fits(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(x, Tensor):
            raise no_tensor(self.op, name, x, str(shape), shape[0] if len(shape) == 2 else None)
        if tuple(x.shape) != shape:
            raise checks.fail(self.op, f"{name} has shape {tuple(x.shape)}, expected {shape}.")
        checks.dtype(self.op, name, x, (self.model.A.dtype,), "One dtype for all, as the model.")
        if not torch.isfinite(x).all():
            raise checks.fail(self.op, f"{name} has values that are not finite.")

    def plan(self, h: Tensor, reference: Tensor | None = None, before: Tensor | None = None) -> Plan:
        """The best inputs from the state h (n) on.

        Args:
            reference: (m), or (T, m) for y of the T steps to come; zeros if None. Where no input holds it, the nearest
                rest is what costs nothing.
            before: (p), the input of the step before, for limits or costs of rates; zeros for a plant that was at rest.

        Raises:
            ValueError: if no inputs within the limits keep states and outputs within theirs, or naming the argument.
        """
        self._fits("h", h, (self.n,))
        wanted = h.new_zeros(self.m) if reference is None else reference
        each = isinstance(wanted, Tensor) and wanted.dim() != 1
        self._fits("reference", wanted, (self.T, self.m) if each else (self.m,))
        if before is None and self._needs_before:
            problem = f"before is None, expected ({self.p},): rates are limited or cost something."
            raise checks.fail(self.op, problem, "Give the input of the step before, or zeros.")
        last = h.new_zeros(self.p) if before is None else before
        self._fits("before", last, (self.p,))
        self._check_reach(last)
        self._update(wide(h), wide(wanted).expand(self.T, self.m), wide(last))
        if self._last is not None:
            x, dual = self._last
            self._solver.warm_start(x=self._shifted(x), y=self._shifted(dual))
        found = self._solver.solve(raise_error=False)
        if found.info.status_val != SOLVED:
            self._last = None
            kept = " and ".join(name for name in SOFT if name in self._at)
            if found.info.status_val in IMPOSSIBLE and kept:
                remedy = f"Widen them, start nearer, or make those of {kept} soft: Limits(…, soft=1000)."
                raise checks.fail(self.op, f"no inputs within the limits keep the {kept} within theirs.", remedy)
            remedy = "Scale states and inputs to about one; a smaller `soft` helps too."
            raise checks.fail(self.op, f"OSQP gave up ({found.info.status}).", remedy)
        self._last = found.x, found.y
        u = torch.from_numpy(found.x[self.n * self.T : (self.n + self.p) * self.T].reshape(self.T, self.p)).to(h)
        return self._follow(h, self._kept_within(u, last), int(found.info.iter))

    def _check_reach(self, before: Tensor) -> None:
        """Raise if no allowed change leads from the input before to one within its limits."""
        if self.limits.inputs is None or self.limits.rates is None:
            return
        (low, high), (down, up) = (self._box(n, getattr(self.limits, n), self.p) for n in ("inputs", "rates"))
        least, most = (wide(before) + torch.from_numpy(end) for end in (down, up))
        missed = torch.maximum(least - torch.from_numpy(high), torch.from_numpy(low) - most)
        far = missed > PRECISION * (1 + wide(before).abs())
        if bool(far.any()):
            i = int(far.nonzero()[0])
            problem = f"before[{i}] is {float(before[i]):g}, and no change within limits.rates leads into limits.inputs"
            raise checks.fail(self.op, f"{problem}.", "Give the input that was applied, or widen the rates.")

    def control(self, h: Tensor, reference: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """The input (p) to apply now: the first of `plan`."""
        return self.plan(h, reference, before).u[0]


def _osqp(op: str) -> tuple[Any, Any]:
    try:
        import osqp
        from scipy import sparse
    except ImportError as error:
        raise ImportError(f"{op}: needs OSQP and SciPy. pip install 'stateline[classical]'") from error
    return osqp, sparse
