"""Steering what is only seen through noise: a filter of constant gain, and the feedback of its estimate.

A step takes what was predicted, adjusts it by what is seen, decides the input, and predicts what that will do:

    x[t] = m[t] + K (y[t] − C m[t])      u[t] = u* − L (x[t] − h*)      m[t+1] = A x[t] + B u[t]

With K of `steady_state` and L of `lqr` no controller that sees y costs less on average: estimating and steering may be
solved apart from each other. (h*, u*) is a state of rest, `equilibrium`, or zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.control import lqr
from stateline.classical.model import StateSpace, check, no_tensor
from stateline.classical.riccati import wide
from stateline.classical.steady import Steady, steady_state
from stateline.ops.kalman.reference import times

#: Of the largest entry of what is asked for; what is left over more than that is not reached at rest.
RESIDUAL = {torch.float64: 1e-8, torch.float32: 1e-5}


class Rest(NamedTuple):
    """A state h (…, n) that the inputs u (…, p) hold."""

    h: Tensor
    u: Tensor


class Decision(NamedTuple):
    """u (…, p), the state mean (…, n) it was decided on, and the mean predicted for the next step, `state` (…, n)."""

    u: Tensor
    mean: Tensor
    state: Tensor


class Lqg(NamedTuple):
    """A controller; state goes in and comes out, nothing is remembered. Made by `lqg`.

    model, steady: what is steered, and its filter.   gain: L (p, n).   cost: what a step costs on average in the end.
    """

    model: StateSpace
    steady: Steady
    gain: Tensor
    cost: Tensor

    def init_state(self, batch: int | tuple[int, ...] = ()) -> Tensor:
        """The mean predicted for the first step, m0, for plants (…) or a number of them."""
        shape = (batch,) if isinstance(batch, int) else tuple(batch)
        m0 = self.model.m0
        return m0.expand(*torch.broadcast_shapes(shape, m0.shape[:-1]), m0.shape[-1]).clone()

    def update(self, y: Tensor, state: Tensor) -> Tensor:
        """The predicted mean (…, n) adjusted by an observation y (…, m); entries that are missing (NaN) are left out.

        The gain takes the mean to be as sure as it settles without gaps: after a long one, the state of a
        `KalmanFilter`, whose mean `control` takes too, finds its way back sooner.
        """
        op = "lqg.update"
        _fits(op, "y", y, self.model.C.shape[0], self.model)
        _fits(op, "state", state, len(self.gain.mT), self.model)
        missing = y.isnan()
        residual = torch.where(missing, 0.0, y - times(self.model.C, state))
        S = self.steady.innovation_cov
        one = torch.eye(len(S), dtype=S.dtype, device=S.device)
        seen = torch.where(missing[..., None, :] | missing[..., :, None], one, S)
        expected = times(S, torch.linalg.solve(seen, residual))  # missing entries, as those that are seen tell of them
        residual = torch.where(missing, expected, residual)
        return state + times(self.steady.gain, residual)

    def control(self, mean: Tensor, target: Rest | None = None) -> Tensor:
        """The input (…, p) for a state mean (…, n): towards zero, or towards `target` of `equilibrium`."""
        _fits("lqg.control", "mean", mean, len(self.gain.mT), self.model)
        if target is None:
            return -times(self.gain, mean)
        return target.u - times(self.gain, mean - target.h)

    def predict(self, mean: Tensor, u: Tensor) -> Tensor:
        """The mean (…, n) of the next step, after input u (…, p): the one that was applied, if that differs."""
        assert self.model.B is not None
        _fits("lqg.predict", "u", u, self.model.B.shape[1], self.model)
        return times(self.model.A, mean) + times(self.model.B, u)

    def step(self, y: Tensor, state: Tensor, target: Rest | None = None) -> Decision:
        """`update`, `control` and `predict` in one."""
        mean = self.update(y, state)
        u = self.control(mean, target)
        return Decision(u, mean, self.predict(mean, u))


def lqg(model: StateSpace, Q: Tensor, R: Tensor) -> Lqg:
    """The controller of least average cost hᵀ Q h + uᵀ R u that sees only y.

    Args:
        model: constant matrices of one system with inputs, and without D: u[t] is decided after y[t] is seen.
        Q: (n, n), what a state costs.   R: (p, p), what an input costs.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; also if `steady_state` or `lqr` has
            no answer.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> plant = StateSpace(A=1.2 * one, B=one, C=one, D=None, Q=0.1 * one, R=one, m0=one[0], P0=one)
    >>> controller = lqg(plant, Q=one, R=0.1 * one)
    >>> decision = controller.step(y=torch.tensor([1.5], dtype=torch.float64), state=controller.init_state())
    >>> round(decision.mean.item(), 4), round(decision.u.item(), 4)
    (1.2034, -1.3269)
    """
    model = only_controlled("lqg", model)
    assert model.B is not None
    steady = steady_state(model)
    model = steady.model
    assert model.B is not None
    gain, value = lqr(model.A, model.B, Q, R)
    spread, noise = wide(steady.cov), wide(model.Q)
    L, P, B = wide(gain), wide(value), wide(model.B)
    cost = (P @ noise).trace() + (spread @ L.mT @ (wide(R) + B.mT @ P @ B) @ L).trace()
    return Lqg(model, steady, gain, cost.to(gain))


def equilibrium(model: StateSpace, y: Tensor) -> Rest:
    """A state and the inputs that hold it, at which y (…, m) is observed: h = A h + B u, y = C h + D u.

    The smallest of them where there are several.

    Raises:
        ValueError: if y is not reached at rest, saying by how much it is missed.

    >>> one = torch.ones(1, 1)
    >>> plant = StateSpace(A=0.5 * one, B=one, C=one, D=None, Q=one, R=one, m0=one[0], P0=one)
    >>> rest = equilibrium(plant, torch.tensor([3.0]))
    >>> rest.h.tolist(), rest.u.tolist()
    ([3.0], [1.5])
    """
    op = "equilibrium"
    model = one_system(op, model)
    _fits(op, "y", y, model.C.shape[0], model)
    if checks.can_read(y.detach()) and not torch.isfinite(y).all():
        raise checks.fail(op, "y has values that are not finite.")
    rest, missed = rests(model)(y)
    if checks.can_read(missed.detach()):
        most = float(missed.detach().abs().max()) if missed.numel() else 0.0
        if most > RESIDUAL[y.dtype] * max(1.0, float(y.detach().abs().max())):
            remedy = "It takes an input for each entry of y that is to be chosen freely."
            raise checks.fail(op, f"no rest has these y, the nearest misses them by {most:.3g}.", remedy)
    return rest


class rests:  # noqa: N801  # a function of y, prepared once
    """The rest nearest to y (…, m), and what it misses: by least squares."""

    def __init__(self, model: StateSpace) -> None:
        n, m, p = len(model.A), model.C.shape[0], 0 if model.B is None else model.B.shape[1]
        A, C = wide(model.A), wide(model.C)
        B = A.new_zeros(n, p) if model.B is None else wide(model.B)
        D = A.new_zeros(m, p) if model.D is None else wide(model.D)
        self.n = n
        self.whole = torch.cat([torch.cat([A - torch.eye(n, dtype=A.dtype), B], 1), torch.cat([C, D], 1)])
        self.inverse = torch.linalg.pinv(self.whole)

    def __call__(self, y: Tensor) -> tuple[Rest, Tensor]:
        wanted = torch.nn.functional.pad(y.to("cpu", torch.float64), (self.n, 0))
        found = times(self.inverse, wanted)
        missed = times(self.whole, found) - wanted
        found = found.to(y)
        return Rest(found[..., : self.n], found[..., self.n :]), missed


def one_system(op: str, model: StateSpace) -> StateSpace:
    """The model with matrices of two dimensions. Raises ValueError if they vary."""
    check(op, model)
    changed = {}
    for name, x in model._asdict().items():
        if name in ("m0", "P0") or x is None:
            continue
        if x.numel() != x.shape[-1] * x.shape[-2]:
            raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected one constant matrix.")
        changed[name] = x.reshape(x.shape[-2:])
    return model._replace(**changed)


def only_controlled(op: str, model: StateSpace) -> StateSpace:
    """One system with inputs and without D. Raises ValueError for any other."""
    model = one_system(op, model)
    if model.B is None:
        raise checks.fail(op, "the model has no B, expected inputs (n, p).", "There is nothing to steer it with.")
    if model.D is not None and bool((model.D != 0).any()):
        remedy = "Where y shows the input of the step before, make that input a state."
        raise checks.fail(op, "the model has D, and u[t] is decided after y[t] is seen.", remedy)
    return model


def _fits(op: str, name: str, x: Tensor, size: int, model: StateSpace) -> None:
    if not isinstance(x, Tensor):
        raise no_tensor(op, name, x, f"(…, {size})")
    if x.shape[-1:] != (size,):
        raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected (…, {size}).")
    checks.dtype(op, name, x, (model.A.dtype,), "One dtype for all, as the model.")
