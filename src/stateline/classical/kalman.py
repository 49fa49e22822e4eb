"""Filter and forecast series with a `StateSpace`: the operation `kalman` for any leading dimensions and inputs.

Shapes follow the model's: series y (…, T, m), inputs u (…, T, p), moments (…, T, n) and (…, T, n, n), states (…, n) and
(…, n, n). Suffixes: N all series of (…), T time step, n state, m observation, p input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.model import Frame, StateSpace, check, no_negative_variance
from stateline.classical.parallel import parallel_filter
from stateline.ops.kalman import FORMS, KEEPS, Filtered, KalmanState, SquareRootState, State, exact, kalman
from stateline.ops.kalman.reference import times


class Flat(NamedTuple):
    """A model beside its series as the operation takes them: leading dimensions are N or 1, and T or 1."""

    y: Tensor
    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    transition_offset: Tensor | None
    observation_offset: Tensor | None
    state: State
    batch: tuple[int, ...]
    #: What the caller gave, by name, and to what: for errors.
    given: dict[str, Tensor | None] | None = None
    op: str = "kalman_filter"


class Forecast(NamedTuple):
    """What the observations and states ahead are expected to be, and how surely.

    mean (…, T, m), cov (…, T, m, m): of observations, their noise included.
    state_mean (…, T, n), state_cov (…, T, n, n): of the state.
    """

    mean: Tensor
    cov: Tensor
    state_mean: Tensor
    state_cov: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (…, T, m) between which each observed value lies with probability `level` in (0, 1)."""
        checks.probability("interval", "level", level)
        half = -float(torch.special.ndtri(torch.tensor((1 - level) / 2, dtype=torch.float64, device="cpu")))
        deviation = half * self.cov.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return self.mean - deviation, self.mean + deviation


def kalman_filter(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    initial_state: State | None = None,
    form: str = "joseph",
    keep: str = "all",
    backend: str | None = None,
    parallel: bool = False,
) -> tuple[Filtered, State]:
    """Estimate the state of each series at each step from what was observed until then.

    Args:
        model: its parts broadcast against (…, T); see `StateSpace`.
        y: (…, T, m), NaN: that entry is missing, the rest of its row counts.   u: (…, T, p).
        initial_state: what an earlier call returned, to go on there; None starts from m0, P0. It is not changed.
        form: "joseph" or "sqrt", which keeps twice the digits; see docs/numerics.md. For float32 data prefer "sqrt".
        keep, backend: as in `ops.kalman`.
        parallel: a scan over time in PyTorch, in about 2 log T rounds of many steps each, instead of step by step: for
            few long series of small states on a GPU. On a CPU it is slower. Only form="joseph".

    Returns:
        `Filtered` with mean, predicted_mean (…, T, n), cov, predicted_cov (…, T, n, n) and loglik (…, T), and the state
        at the step after the last: mean (…, n) with cov or factor (…, n, n). Cut anywhere and continued, results agree.

    Differentiable in every part of the model, y, u and the state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came, or the series and step that failed;
            on the CPU also a value that is not finite (in y: infinite), with its place.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> level = StateSpace(one, None, one, None, 0.1 * one, one, m0=one[0], P0=one)
    >>> out, state = kalman_filter(level, torch.tensor([[1.0], [1.2], [float("nan")], [1.1]], dtype=torch.float64))
    >>> [round(m, 3) for m in out.mean[:, 0].tolist()]
    [1.0, 1.075, 1.075, 1.084]
    """
    checks.choice("kalman_filter", "form", form, FORMS)
    if parallel:
        checks.choice("kalman_filter", "keep", keep, KEEPS)
        for name, given, usual in (("form", form, "joseph"), ("backend", backend, None)):
            if given != usual:
                problem = f"{name} is {given!r} with parallel=True, expected {usual!r}."
                raise checks.fail("kalman_filter", problem, "The scan has one form, in PyTorch on any device.")
    flat = flatten("kalman_filter", model, y, u, initial_state, form)
    if parallel and y.shape[-2]:
        with exact(y):
            return shaped(flat, *_in_parallel(flat, keep))
    return _run(flat, form, keep, backend)


def forecast(
    model: StateSpace, state: State, steps: int, u: Tensor | None = None, *, backend: str | None = None
) -> Forecast:
    """What the next `steps` observations are expected to be, from the state that a filter returned.

    Args:
        model: parts that vary in time hold the values of the steps ahead, (…, steps, …).
        state: its mean and covariance are those of the first step of the forecast.
        u: (…, steps, p) inputs to come, for a model that has any.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> walk = StateSpace(one, None, one, None, one, 0.5 * one, m0=one[0], P0=one)
    >>> ahead = forecast(walk, kalman_filter(walk, one.expand(3, 1))[1], 2)
    >>> low, high = ahead.interval(0.9)
    >>> ahead.mean.shape, bool((low < ahead.mean).all())
    (torch.Size([2, 1]), True)
    """
    op = "forecast"
    checks.number(op, "steps", steps, low=0, integer=True)
    check(op, model, u=u, steps=steps)
    form = "sqrt" if isinstance(state, SquareRootState) else "joseph"
    _check_kind(op, state, form)
    shape = (*state.mean.shape[:-1], steps, model.C.shape[-2])
    nothing = torch.full(shape, float("nan"), dtype=model.A.dtype, device=model.A.device)
    flat = flatten(op, model, nothing, u, state, form)
    out, _ = _run(flat, form, "all", backend)
    h, P, C, R = out.predicted_mean, out.predicted_cov, model.C, model.R
    assert h is not None
    assert P is not None
    with exact(h):
        mean = times(C, h) if u is None or model.D is None else times(C, h) + drive(model.D, u)
        cov = C @ P @ C.mT + (R + R.mT) / 2
    return Forecast(mean, (cov + cov.mT) / 2, h, P)


def flatten(op: str, model: StateSpace, y: Tensor, u: Tensor | None, initial_state: State | None, form: str) -> Flat:
    """Check that all fit together and bring them to one batch dimension, inputs as offsets."""
    frame = check(op, model, y, u)
    batch = frame.batch
    no_negative_variance(op, Q=model.Q, R=model.R)
    if initial_state is None:
        no_negative_variance(op, P0=model.P0)
    else:
        _check_kind(op, initial_state, form)
        batch = _with_state(op, frame, initial_state)
    b = d = None
    if u is not None:
        with exact(y):
            b, d = (None if M is None else drive(M, u) for M in (model.B, model.D))
    N = torch.Size(batch).numel()

    def lead(v: Tensor | None, own: int) -> Any:
        """(…, T or 1, own dimensions) to (N or 1, T or 1, …)."""
        if v is None:
            return None
        ahead, tail = v.shape[: v.dim() - own], v.shape[v.dim() - own :]
        time = ahead[-1] if ahead else 1
        if all(size == 1 for size in ahead[:-1]):
            return v.reshape(1, time, *tail)
        return v.expand(*batch, time, *tail).reshape(N, time, *tail)

    state = initial_state or KalmanState(model.m0, model.P0)
    whole = y.expand(*batch, *y.shape[-2:]).reshape(N, *y.shape[-2:])
    A, C, Q, R = (lead(v, 2) for v in (model.A, model.C, model.Q, model.R))
    given = {"y": y, "u": u} | model._asdict()
    if initial_state is not None:
        name, second = _second(initial_state)
        given |= {"m0": None, "P0": None, "initial_state.mean": initial_state.mean, f"initial_state.{name}": second}
    return Flat(whole, A, C, Q, R, lead(b, 1), lead(d, 1), _rows(state, batch), batch, given, op)


def drive(M: Tensor, u: Tensor) -> Tensor:
    """M (…, n, p) times inputs (…, T, p)."""
    return u @ M.mT if M.dim() == 2 else times(M, u)


def filter_by_factors(
    model: StateSpace, factors: tuple[Tensor, Tensor], y: Tensor, u: Tensor | None, state: State
) -> tuple[Filtered, State]:
    """`kalman_filter` in square-root form with factors of Q (n, n) and R (m, m) that are at hand."""
    flat = flatten("kalman_filter", model, y, u, state, "sqrt")
    Q, R = factors
    return shaped(flat, *run(flat, "sqrt", "all", None, (Q[None, None], R[None, None])))


def run(
    flat: Flat,
    form: str,
    keep: str,
    backend: str | None,
    factors: tuple[Tensor, Tensor] | None = None,
    wide: bool = False,
) -> tuple[Filtered, State]:
    """The operation on flattened series; what is not finite is named as the caller knows it."""
    try:
        return kalman(
            flat.y, flat.A, flat.C, flat.Q, flat.R, flat.state, transition_offset=flat.transition_offset,
            observation_offset=flat.observation_offset, form=form, factors=factors, keep=keep, wide=wide,
            backend=backend,
        )  # fmt: skip
    except ValueError as error:
        raise checks.not_finite(flat.op, flat.given or {}) or error from None


def _in_parallel(flat: Flat, keep: str) -> tuple[Filtered, State]:
    """The scan over time, with the errors of `run`."""
    try:
        out, state = parallel_filter(flat, keep)
        odd = checks.can_read(state.mean) and not bool((state.mean.sum() + state.cov.sum()).isfinite())
        error: Exception | None = None
    except ValueError as failed:
        odd, error = True, failed
    cause = checks.not_finite(flat.op, flat.given or {}) or error if odd else None
    if cause is not None:
        raise cause from None
    return out, state


def _run(flat: Flat, form: str, keep: str, backend: str | None) -> tuple[Filtered, State]:
    return shaped(flat, *run(flat, form, keep, backend))


def shaped(flat: Flat, out: Filtered, state: State) -> tuple[Filtered, State]:
    """Results with the leading dimensions (…) of the series."""
    shaped: Any = [None if v is None else v.reshape(*flat.batch, *v.shape[1:]) for v in out]
    parts = (v.reshape(*flat.batch, *v.shape[1:]) for v in (state.mean, _second(state)[1]))
    return Filtered(*shaped), type(state)(*parts)


def _second(state: State) -> tuple[str, Tensor]:
    """What a state has beside its mean, by its name."""
    return ("factor", state.factor) if isinstance(state, SquareRootState) else ("cov", state.cov)


def _rows(state: State, batch: tuple[int, ...]) -> State:
    N = torch.Size(batch).numel()
    second, n = _second(state)[1], state.mean.shape[-1]
    mean = state.mean.expand(*batch, n).reshape(N, n)
    return type(state)(mean, second.expand(*batch, n, n).reshape(N, n, n))


def _check_kind(op: str, state: State, form: str) -> None:
    if not isinstance(state, KalmanState | SquareRootState):
        kinds = "a KalmanState or SquareRootState"
        remedy = "kalman_filter returns (moments, state): give the second." if isinstance(state, tuple) else ""
        raise checks.fail(op, f"the state is a {type(state).__name__}, expected {kinds}.", remedy, error=TypeError)
    if form == "joseph" and isinstance(state, SquareRootState):
        remedy = 'Give form="sqrt", which made it.'
        raise checks.fail(op, "initial_state holds factors.", remedy, error=TypeError)


def _with_state(op: str, frame: Frame, state: State) -> tuple[int, ...]:
    """The leading dimensions (…) of series and state together."""
    name, second = _second(state)
    for part, v, tail in (("mean", state.mean, (frame.n,)), (name, second, (frame.n, frame.n))):
        if tuple(v.shape[v.dim() - len(tail) :]) != tail or v.dim() < len(tail):
            expected = ", ".join(("…", *map(str, tail)))
            raise checks.fail(op, f"the state's {part} has shape {tuple(v.shape)}, expected ({expected}).")
    rows = tuple(state.mean.shape[:-1])
    try:
        return tuple(torch.broadcast_shapes(frame.batch, rows, second.shape[:-2]))
    except RuntimeError:
        problem = f"the state has series {rows}, y and the model {frame.batch}"
        raise checks.fail(op, f"{problem}.", "Give the state that these series ended in.") from None
