"""Filters for h[t+1] = f(h[t]) + v, y[t] = g(h[t]) + n: each step a straight line stands in for f and for g.

Extended: the tangent at the mean, by torch.func. Unscented: the line that fits best over the state's spread, from
values at 2 n + 1 points; what the line misses counts as noise. The rest is the Kalman filter.
Sources: Jazwinski 1970, section 8.3; Julier & Uhlmann 2004, "Unscented filtering and nonlinear estimation".
Suffixes: N all series of (…), T time step, n state, m observation, p input.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.checks import Sizes
from stateline.classical.model import match, no_negative_variance
from stateline.ops.kalman import Filtered, KalmanState, exact
from stateline.ops.kalman.reference import joseph_correct, joseph_predict, outer, symmetric

Function = Callable[..., Tensor]
#: Characters of another's error that ours repeats; all of it is the cause.
SAID = 120


@dataclass(frozen=True)
class NonlinearModel:
    """What an extended or unscented filter needs.

    transition: f(h) or f(h, u) -> (n,), of one state h (n,) and, where there are inputs, one input u (p,).
    observation: g(h) or g(h, u) -> (m,). Both in torch operations, differentiable for the extended filter, and run
        under torch.func for all series at once: no NumPy, no float(), and torch.where in place of an `if` on values.
    Q (…, n, n), R (…, m, m): covariances of v and n, whose dimensions ahead broadcast against the (…, T) of y.
    m0 (…, n), P0 (…, n, n): what is known at the first observation, before it is seen.
    """

    transition: Function
    observation: Function
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor


class Line(NamedTuple):
    """A function of N uncertain states as a line: its mean (N, k), slope (N, k, n), what that misses (N, k, k)."""

    mean: Tensor
    slope: Tensor
    rest: Tensor


def extended_kalman_filter(
    model: NonlinearModel, y: Tensor, u: Tensor | None = None, *, initial_state: KalmanState | None = None
) -> tuple[Filtered, KalmanState]:
    """Filter y (…, T, m), NaN where missing, with inputs u (…, T, p), by tangents of both functions.

    Returns moments and state as `kalman_filter`, differentiable. For linear functions they are those of the Kalman
    filter. In plain PyTorch: a loop over time. `initial_state` goes on from the state that an earlier call returned,
    with Q and R of the new steps where they vary. With y of NaN, mean and cov are a forecast of those steps.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, or the step that failed.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> pendulum = NonlinearModel(
    ...     transition=lambda h: torch.stack([h[0] + 0.1 * h[1], h[1] - 0.1 * torch.sin(h[0])]),
    ...     observation=lambda h: torch.sin(h[:1]),
    ...     Q=1e-4 * torch.eye(2), R=0.01 * torch.eye(1), m0=torch.tensor([1.0, 0.0]), P0=torch.eye(2))
    >>> out, state = extended_kalman_filter(pendulum, torch.rand(8, 50, 1))
    >>> out.mean.shape, state.cov.shape
    (torch.Size([8, 50, 2]), torch.Size([8, 2, 2]))
    """
    return _filter("extended_kalman_filter", _tangent, model, y, u, initial_state)


def unscented_kalman_filter(
    model: NonlinearModel,
    y: Tensor,
    u: Tensor | None = None,
    *,
    kappa: float | None = None,
    initial_state: KalmanState | None = None,
) -> tuple[Filtered, KalmanState]:
    """As `extended_kalman_filter`, by points: no derivative of the functions is taken, curvature is not overlooked.

    kappa: points lie sqrt(n + kappa) deviations from the mean, which itself has the weight kappa / (n + kappa); at
        least 0, so that no covariance turns negative. None: 3 − n, or 0 from three states on.

    Raises:
        ValueError, TypeError: as `extended_kalman_filter`; a predicted covariance must not be singular.
    """
    if kappa is not None:
        checks.number("unscented_kalman_filter", "kappa", kappa, low=0.0)

    def fit(function: Function, m: Tensor, P: Tensor, u: tuple[Tensor, ...]) -> Line:
        return _fitted(function, m, P, u, float(max(3 - m.shape[-1], 0) if kappa is None else kappa))

    return _filter("unscented_kalman_filter", fit, model, y, u, initial_state)


def _filter(
    op: str, linearise: Callable[..., Line], model: NonlinearModel, y: Tensor, u: Tensor | None,
    initial_state: KalmanState | None,
) -> tuple[Filtered, KalmanState]:  # fmt: skip
    batch, (m, P), Q, R = _prepare(op, model, y, u, initial_state)
    N, T = torch.Size(batch).numel(), y.shape[-2]
    flat_y = y.expand(*batch, *y.shape[-2:]).reshape(N, T, y.shape[-1])
    flat_u = None if u is None else u.expand(*batch, *u.shape[-2:]).reshape(N, T, u.shape[-1])
    observation, transition = (_told(op, name, getattr(model, name)) for name in ("observation", "transition"))
    steps = []
    with exact(y):
        for t in range(T):
            now = () if flat_u is None else (flat_u[:, t],)
            seen = ~torch.isnan(flat_y[:, t])
            look = linearise(observation, m, P, now)
            _check_result(op, "observation", look, seen.shape, y)
            e = torch.where(seen, flat_y[:, t] - look.mean, 0.0)
            m_new, P_new, loglik, failed = joseph_correct(m, P, e, look.slope, R[:, t] + look.rest, seen)
            if checks.can_read(failed) and bool(failed.any()):
                series = int(failed.nonzero()[0, 0])
                problem = f"the innovation covariance of series {series} at step {t} is not positive definite."
                raise checks.fail(op, problem, "Are R and P0 covariances, and the functions finite there?")
            steps.append((m_new, P_new, m, P, loglik))
            move = linearise(transition, m_new, P_new, now)
            _check_result(op, "transition", move, m.shape, y)
            m, P = move.mean, joseph_predict(P_new, move.slope, Q[:, t] + move.rest)
    n = m.shape[-1]
    empty = [m.new_empty(N, 0, *tail) for tail in ((n,), (n, n), (n,), (n, n), ())]
    columns = [torch.stack(c, 1) for c in zip(*steps, strict=True)] if steps else empty
    return Filtered(*(v.reshape(*batch, *v.shape[1:]) for v in columns)), KalmanState(
        m.reshape(*batch, n), P.reshape(*batch, n, n)
    )


def _told(op: str, name: str, function: Function) -> Function:
    """The function, whose errors name it and say by which rules it runs."""

    def call(h: Tensor, *u: Tensor) -> Tensor:
        got = f"h ({h.shape[0]},) " + (f"and u ({u[0].shape[0]},)" if u else "alone, as there is no u")
        remedy = (
            f"It gets tensors, {got}, and runs under torch.func: torch functions only, no NumPy and no float(), and no"
            " `if` on values (torch.where)."
        )
        try:
            value = function(h, *u)
        except Exception as error:
            problem = f"{name} raised {type(error).__name__} ({textwrap.shorten(str(error), SAID)})."
            raise checks.fail(op, problem, remedy) from error
        if not isinstance(value, Tensor):
            problem = (
                f"{name} returns a {type(value).__name__}, expected a tensor, as torch.stack([…]) makes of numbers."
            )
            raise checks.fail(op, problem, remedy, error=TypeError)
        return value

    return call


def _check_result(op: str, name: str, line: Line, shape: torch.Size, y: Tensor) -> None:
    if line.mean.shape != shape:
        raise checks.fail(op, f"{name} returns {tuple(line.mean.shape[1:])}, expected {tuple(shape[1:])}.")
    checks.dtype(op, f"what {name} returns", line.mean, (y.dtype,), "Constants in it have the dtype of y, too.")


def _prepare(
    op: str, model: NonlinearModel, y: Tensor, u: Tensor | None, initial_state: KalmanState | None
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor], Tensor, Tensor]:
    """The series (…), the start (N, …), and Q, R as (N, T, …), after checking that all fit together."""
    if not isinstance(model, NonlinearModel):
        remedy = "kalman_filter takes a StateSpace."
        raise checks.fail(
            op, f"the model is a {type(model).__name__}, expected a NonlinearModel.", remedy, error=TypeError
        )
    match(Sizes(op), "y", y, "T m")
    if u is not None:
        match(Sizes(op), "u", u, "T p")
    mean, cov = (model.m0, model.P0) if initial_state is None else (initial_state.mean, initial_state.cov)
    n, m = mean.shape[-1], model.R.shape[-1]
    given = {"Q": (model.Q, (n, n)), "R": (model.R, (m, m)), "P0": (cov, (n, n)), "m0": (mean, (n,))}
    given |= {"y": (y, (m,))} | ({} if u is None else {"u": (u, u.shape[-1:])})
    T = y.shape[-2]
    shapes = []
    for name, (v, tail) in given.items():
        checks.dtype(op, name, v, (torch.float32, torch.float64) if name == "Q" else (model.Q.dtype,))
        lead = tuple(v.shape[: v.dim() - len(tail)])
        in_time = name not in ("m0", "P0") and bool(lead)
        if tuple(v.shape[len(lead) :]) != tail or (in_time and lead[-1] not in ((T,) if name in "yu" else (1, T))):
            wanted = ", ".join(("…", *(["T"] if in_time else []), *map(str, tail)))
            raise checks.fail(op, f"{name} has shape {tuple(v.shape)}, expected ({wanted}), T = {T} steps of y.")
        shapes.append(lead[:-1] if in_time else lead)
    try:
        batch = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise checks.fail(op, f"the series of {', '.join(given)} are {shapes}, which do not broadcast.") from None
    if (cause := checks.not_finite(op, {name: v for name, (v, _) in given.items()})) is not None:
        raise cause
    no_negative_variance(op, Q=model.Q, R=model.R, **({"P0": cov} if initial_state is None else {}))
    N = torch.Size(batch).numel()
    Q, R, cov = symmetric(model.Q), symmetric(model.R), symmetric(cov)
    Q, R = (v.expand(*batch, T, *v.shape[-2:]).reshape(N, T, *v.shape[-2:]) for v in (Q, R))
    return batch, (mean.expand(*batch, n).reshape(N, n), cov.expand(*batch, n, n).reshape(N, n, n)), Q, R


def _tangent(function: Function, m: Tensor, P: Tensor, u: tuple[Tensor, ...]) -> Line:
    """The line that touches the function at the mean."""

    def twice(h: Tensor, *u: Tensor) -> tuple[Tensor, Tensor]:
        value = function(h, *u)
        return value, value

    slope, value = torch.func.vmap(torch.func.jacfwd(twice, has_aux=True))(m, *u)
    return Line(value, slope.to(m), m.new_zeros(()))  # a number times one entry of h has a tangent in float64


def _fitted(function: Function, m: Tensor, P: Tensor, u: tuple[Tensor, ...], kappa: float) -> Line:
    """The line that fits the function at the points m and m ± sqrt(n + kappa) times each column of P's factor."""
    n = m.shape[-1]
    L, problem = torch.linalg.cholesky_ex(symmetric(P))
    if checks.can_read(problem) and bool(problem.any()):
        what = f"the covariance of series {int(problem.nonzero()[0, 0])} is singular"
        raise checks.fail("unscented_kalman_filter", f"{what}.", "Give P0 and Q no direction without variance.")
    reach = (n + kappa) ** 0.5
    points = torch.cat([m[:, None], m[:, None] + reach * L.mT, m[:, None] - reach * L.mT], 1)
    each = torch.func.vmap(torch.func.vmap(function, in_dims=(0, *(None for _ in u))))
    values = each(points, *u)
    weights = m.new_full((2 * n + 1,), 0.5 / (n + kappa))
    weights[0] = kappa / (n + kappa)
    mean = (weights[:, None] * values).sum(1)
    across = (values[:, 1 : n + 1] - values[:, n + 1 :]).mT / (2 * reach)
    slope = torch.linalg.solve_triangular(L, across, upper=False, left=False)
    spread = (weights[:, None, None] * outer(values - mean[:, None], values - mean[:, None])).sum(1)
    return Line(mean, slope, symmetric(spread - across @ across.mT))
