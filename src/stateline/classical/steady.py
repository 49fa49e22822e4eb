"""The filter that a Kalman filter becomes: constant gains, so a linear system, so our scan and convolution run it.

After long observation without gaps the covariances stop changing, P = A P Aᵀ + Q − A P Cᵀ S⁻¹ C P Aᵀ with
S = C P Cᵀ + R, and with the gain K = P Cᵀ S⁻¹ the predicted mean m follows

    m[t+1] = (A − A K C) m[t] + A K y[t] + (B − A K D) u[t]
    x[t]   = (I − K C) m[t]   +   K y[t]   −   K D u[t]           the filtered mean

a `StateSpace` with inputs [y, u] and without noise. It is dense; two forms of it run on kernels:

    scan   in the coordinates of its eigenvectors, where `linear_scan` takes it, a complex state for each pair. Refused
           where the eigenvectors are too close to dependent (`SCAN_CONDITION`): rounding would grow by as much.
    conv   as its impulse response, a matrix a tap for `long_conv`, as many taps as it takes to fade, never more than
           there are steps. Always exact to rounding; longer than a scan where the filter forgets slowly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks, ops
from stateline.classical.model import StateSpace, check, covariance
from stateline.classical.riccati import riccati, wide

#: The largest condition number of eigenvectors that a scan takes: it multiplies the rounding of a step.
SCAN_CONDITION = {torch.float64: 1e5, torch.float32: 1e2}
FORMS = ("scan", "conv")


class Steady(NamedTuple):
    """A filter with constant gain.

    system: the StateSpace above: inputs [y, u] (m + p), outputs x (n), no noise.
    gain: K (n, m), what a residual adds to the state.   cov, predicted_cov: (n, n) of x and of m.
    innovation_cov: S (m, m).   model: what it filters.
    """

    system: StateSpace
    gain: Tensor
    cov: Tensor
    predicted_cov: Tensor
    innovation_cov: Tensor
    model: StateSpace


class SteadyFiltered(NamedTuple):
    """mean, predicted_mean (…, T, n) and loglik (…, T)."""

    mean: Tensor
    predicted_mean: Tensor
    loglik: Tensor


def steady_state(model: StateSpace) -> Steady:
    """The filter of constant gain that `kalman_filter` tends to, by SciPy's solution of the Riccati equation.

    Args:
        model: constant matrices of one system; m0 may be (N, n). Values in the model's dtype, computed in float64;
            without gradients.

    Raises:
        ValueError: if the model varies, or no steady state exists: some motion neither dies out nor is seen, or it
            never ends and is moved by no noise, so that its gain goes to zero for ever.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> model = StateSpace(A=one, B=None, C=one, D=None, Q=one, R=2 * one, m0=one[0], P0=one)
    >>> steady = steady_state(model)
    >>> round(steady.predicted_cov.item(), 6), round(steady.gain.item(), 6), round(steady.system.A.item(), 6)
    (2.0, 0.5, 0.5)
    """
    op = "steady_state"
    n, m, p, _, _ = check(op, model)
    plain = {
        name: _one(op, name, x) for name, x in model._asdict().items() if x is not None and name not in ("m0", "P0")
    }
    model = model._replace(**plain)
    for name in ("Q", "R"):
        covariance(op, name, plain[name])
    A, C, Q, R = (wide(plain[name]) for name in ("A", "C", "Q", "R"))
    B, D = (wide(plain[k]) if k in plain else torch.zeros(rows, p, dtype=A.dtype) for k, rows in (("B", n), ("D", m)))
    remedy = "Every motion that does not die out must be seen in y and moved by Q; kalman_filter needs neither."
    P = riccati(op, A.mT, C.mT, Q, R, remedy)
    S = C @ P @ C.mT + R
    factor, failed = torch.linalg.cholesky_ex(S)
    if failed:
        raise checks.fail(op, "C P Cᵀ + R is singular, expected noise in every observation.", "Give R a diagonal.")
    K = torch.cholesky_solve(C @ P, factor).mT
    kept = torch.eye(n, dtype=A.dtype) - K @ C
    cov = kept @ P @ kept.mT + K @ R @ K.mT
    system = StateSpace(
        A - A @ K @ C,
        torch.cat([A @ K, B - A @ K @ D], -1),
        kept,
        torch.cat([K, -K @ D], -1),
        torch.zeros_like(A),
        torch.zeros_like(A),
        wide(model.m0),
        torch.zeros_like(A),
    )
    system, (K, cov, P, S) = system.to(model.A.dtype), (x.to(model.A.dtype) for x in (K, cov, P, S))
    there = model.A.device
    return Steady(system.to(there), K.to(there), cov.to(there), P.to(there), S.to(there), model)


def _one(op: str, name: str, x: Tensor) -> Tensor:
    if math.prod(x.shape[:-2]) != 1:
        remedy = "Take kalman_filter, or one steady state a system."
        raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected one constant matrix.", remedy)
    return x.reshape(x.shape[-2:])


def steady_filter(
    steady: Steady,
    y: Tensor,
    u: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    form: str | None = None,
    backend: str | None = None,
) -> tuple[SteadyFiltered, Tensor]:
    """Filtered and predicted means and the likelihood, by a filter of constant gain, all steps at once; and the state.

    What `kalman_filter` gives once its covariances have settled; before that, the gain is the settled one. The state
    (…, n) is the mean predicted for the step to come: continued from it, outputs are those of the whole series, within
    rounding.

    Args:
        steady: of `steady_state`.   y: (…, T, m), without gaps.   u: (…, T, p).
        initial_state: (…, n), the mean predicted for the first step; the model's m0 if None.
        form: "scan" or "conv", as the module says; None takes scan where that is precise.
        backend: of the kernel.

    Differentiable in y, u and initial_state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; on CPU also for NaN in y.
    """
    op = "steady_filter"
    model = steady.model
    n, m, _, batch, steps = check(op, model, y, u)
    assert steps is not None
    if checks.can_read(y.detach()) and y.isnan().any():
        raise checks.fail(op, "y has missing entries (NaN), which a constant gain cannot skip.", "Take kalman_filter.")
    if (cause := checks.not_finite(op, {"y": y.detach(), "u": u})) is not None:
        raise cause
    if initial_state is not None:
        _check_state(op, initial_state, n, y)
        batch = tuple(torch.broadcast_shapes(batch, initial_state.shape[:-1]))
    start = (model.m0 if initial_state is None else initial_state).expand(*batch, n).reshape(math.prod(batch), n)
    w = torch.cat([x.expand(*batch, *x.shape[-2:]) for x in (y, u) if x is not None], -1)
    w = w.reshape(math.prod(batch), *w.shape[-2:])
    chosen = _choose(op, steady, form)
    run = _by_scan if chosen == "scan" else _by_conv
    after = run(steady.system, w, start, backend)
    predicted = torch.cat([start[:, None], after], 1)
    state, predicted = predicted[:, -1], predicted[:, :-1]
    assert steady.system.D is not None
    mean = predicted @ steady.system.C.mT + w @ steady.system.D.mT
    residual = w[..., :m] - predicted @ model.C.mT
    if model.D is not None and u is not None:
        residual = residual - w[..., m:] @ model.D.mT
    loglik = _log_density(residual, steady.innovation_cov)
    out = SteadyFiltered(
        mean.reshape(*batch, steps, n),
        predicted.reshape(*batch, steps, n),
        loglik.reshape(*batch, steps),
    )
    return out, state.reshape(*batch, n)


def form_of(steady: Steady) -> tuple[str, str]:
    """The form that `steady_filter` chooses, and why."""
    condition, most = _condition(steady.system.A), SCAN_CONDITION[steady.system.A.dtype]
    if condition <= most:
        return "scan", f"eigenvectors of condition {condition:.3g}, at most {most:g}"
    return "conv", f"eigenvectors of condition {condition:.3g}, above {most:g}: a scan would lose as much precision"


def _condition(A: Tensor) -> float:
    if not len(A):
        return 1.0
    sizes = torch.linalg.svdvals(torch.linalg.eig(wide(A))[1])
    return float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else math.inf


def _choose(op: str, steady: Steady, form: str | None) -> str:
    if form is not None:
        checks.choice(op, "form", form, FORMS)
    chosen, why = form_of(steady)
    if form == "scan" and chosen != "scan":
        raise checks.fail(op, f"form is 'scan', and the filter has {why}.", "Take form='conv'.")
    return form or chosen


def _check_state(op: str, state: Tensor, n: int, y: Tensor) -> None:
    if not isinstance(state, Tensor):
        remedy = "A Kalman filter's state has it as `mean`."
        problem = f"initial_state is a {type(state).__name__}, expected a tensor (…, n)."
        raise checks.fail(op, problem, remedy, error=TypeError)
    if state.shape[-1:] != (n,):
        raise checks.fail(op, f"initial_state has shape {tuple(state.shape)}, expected (…, n) with n = {n}.")
    checks.dtype(op, "initial_state", state, (y.dtype,), "One dtype for all, as y.")
    checks.same_device(op, {"y": y, "initial_state": state})


def _by_scan(system: StateSpace, w: Tensor, start: Tensor, backend: str | None) -> Tensor:
    """m[1] … m[T] (b, T, n): as z = V⁻¹ m every state decays alone, and one of each conjugate pair is enough."""
    assert system.B is not None
    values, vectors = torch.linalg.eig(wide(system.A))
    inverse = torch.linalg.inv(vectors)
    upper = values.imag >= 0
    twice = torch.where(values.imag[upper] > 0, 2.0, 1.0)
    values, vectors, inverse = values[upper], vectors[:, upper] * twice, inverse[upper]
    if not values.is_complex() or not (values.imag != 0).any():
        values, vectors, inverse = values.real, vectors.real, inverse.real
    into = inverse @ wide(system.B).to(inverse.dtype)
    kind = w.dtype if not values.is_complex() else torch.complex128 if w.dtype == torch.float64 else torch.complex64
    values, vectors, inverse, into = (x.to(w.device, kind) for x in (values, vectors, inverse, into))
    z, _ = ops.linear_scan(values, w.to(kind) @ into.mT, initial_state=start.to(kind) @ inverse.mT, backend=backend)
    after = z @ vectors.mT
    return after.real if after.is_complex() else after


def _by_conv(system: StateSpace, w: Tensor, start: Tensor, backend: str | None) -> Tensor:
    """m[1] … m[T] (b, T, n): Σ Aⁱ B w[t−i], and the first state's Aᵗ⁺¹ m[0]; powers below rounding are left out."""
    assert system.B is not None
    steps, n = w.shape[1], system.A.shape[0]
    if not steps:
        return w.new_zeros(len(w), 0, n)
    A = wide(system.A)
    powers, last = torch.eye(n, dtype=A.dtype)[None], A
    faint = torch.finfo(w.dtype).eps
    while len(powers) < steps and float(torch.linalg.matrix_norm(last, 2)) > faint:
        powers, last = torch.cat([powers, powers @ last]), last @ last
    powers = powers[:steps].to(w)
    after, _ = ops.long_conv(w, powers @ system.B, backend=backend)
    free = torch.einsum("tij,bj->bti", powers @ system.A, start)
    return after + torch.nn.functional.pad(free, (0, 0, 0, steps - len(powers)))


def _log_density(residual: Tensor, cov: Tensor) -> Tensor:
    """log N(residual; 0, cov) of every step (b, T)."""
    factor = torch.linalg.cholesky(wide(cov)).to(residual)
    white = torch.linalg.solve_triangular(factor, residual.mT, upper=False)
    constant = factor.diagonal().log().sum() + 0.5 * len(factor) * math.log(2 * math.pi)
    return -0.5 * white.square().sum(-2) - constant
