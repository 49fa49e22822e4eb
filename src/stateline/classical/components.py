"""Models to start from, and models made of models.

A component is a `StateSpace` without noise of observation unless it is given some, so that `sum_of` adds them up:

    sum_of(local_trend(0.1, 0.01), seasonal(12, 0.05), noise=1.0)

Variances are numbers, or tensors () or (N): a model each for N series, with gradients. What is not known of the start
has a variance of `prior`, to be chosen large beside the squared units of the series; stationary components start in
their stationary covariance instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stateline import checks
from stateline.classical import parts
from stateline.classical.model import StateSpace, check
from stateline.classical.sampled import discretize
from stateline.theory.covariance import lyapunov

Variance = float | Tensor
PRIOR = 1e6


def local_level(
    level: Variance, noise: Variance = 0.0, *, prior: float = PRIOR, dtype: torch.dtype = torch.float64
) -> StateSpace:
    """A level that walks at random: n = 1.

    Args:
        level: the variance of its step.   noise: that of an observation.   prior: that of the first level, about 0.

    >>> local_level(1469.1, noise=15099.0).Q
    tensor([[1469.1000]], dtype=torch.float64)
    """
    op = "local_level"
    level, noise = _variance(op, "level", level, dtype), _variance(op, "noise", noise, dtype)
    one = torch.ones(1, 1, dtype=dtype, device=level.device)
    return _made(op, one, one, _diagonal([level]), noise, prior)


def local_trend(
    level: Variance,
    slope: Variance,
    noise: Variance = 0.0,
    *,
    damping: Variance = 1.0,
    prior: float = PRIOR,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """A level that moves by a slope, both walking at random: n = 2, level and slope.

    Args:
        level, slope: the variances of their steps.   noise: that of an observation.
        damping: in (0, 1], the share of a slope that is left after a step; below 1, forecasts flatten out.
        prior: the variance of the first level and slope, about 0.
    """
    op = "local_trend"
    given = [_variance(op, name, x, dtype) for name, x in {"level": level, "slope": slope, "noise": noise}.items()]
    kept = _share(op, "damping", damping, dtype)
    A = _time(parts.trend(kept))
    C = torch.tensor([[1.0, 0.0]], dtype=dtype, device=A.device)
    return _made(op, A, C, _diagonal(given[:2]), given[2], prior)


def seasonal(
    period: float,
    season: Variance,
    noise: Variance = 0.0,
    *,
    form: str = "trigonometric",
    harmonics: int | None = None,
    prior: float = PRIOR,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """A pattern that repeats, sums to zero over a period, and changes slowly.

    Args:
        period: steps, ≥ 2; a whole number for "dummy", any for "trigonometric" (365.25 days).
        season: the variance of the change in a step.   noise: that of an observation.
        form: "dummy", one state for each step of a period but one; or "trigonometric", two for each wave, one for the
            wave of period 2.
        harmonics: how many waves, the longest first; all that the period has if None.
        prior: the variance of each first state, about 0.
    """
    op = "seasonal"
    checks.choice(op, "form", form, ("dummy", "trigonometric"))
    checks.number(op, "period", period, low=2, integer=form == "dummy")
    season, noise = _variance(op, "season", season, dtype), _variance(op, "noise", noise, dtype)
    if form == "dummy":
        if harmonics is not None:
            raise checks.fail(
                op, f"harmonics is {harmonics}, and a dummy season has none.", "form='trigonometric' has."
            )
        n = int(period) - 1
        blocks = [parts.companion(-torch.ones(n))]
        shocks = [season, *[torch.zeros_like(season)] * (n - 1)]
    else:
        waves = int(period // 2)
        if harmonics is not None:
            checks.number(op, "harmonics", harmonics, low=1, high=waves, integer=True)
        blocks = parts.season(period, harmonics)
        shocks = [season] * sum(map(len, blocks))
    A, C = (x.to(season.device, dtype) for x in (torch.block_diag(*blocks), parts.shown(blocks)))
    return _made(op, A, C, _diagonal(shocks), noise, prior)


def oscillator(
    period: Variance,
    variance: Variance,
    noise: Variance = 0.0,
    *,
    damping: Variance = 1.0,
    prior: float = PRIOR,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """A wave whose size and phase wander, such as a business cycle: n = 2, and y shows the first.

    Args:
        period: steps, above 2; a number or a tensor as variances are.
        variance: of the change in a step, in each of the two states.   noise: that of an observation.
        damping: in (0, 1], what is left of the wave after a step. Below 1 it starts stationary, at 1 with `prior`.
    """
    op = "oscillator"
    length = _positive(op, "period", period, dtype)
    if checks.can_read(length) and not (length > 2).all():
        raise checks.fail(op, f"period is {float(length.min()):g}, expected above 2.", "Samples show no faster wave.")
    variance, noise = _variance(op, "variance", variance, dtype), _variance(op, "noise", noise, dtype)
    kept = _share(op, "damping", damping, dtype)
    A, Q = _time(parts.wave(2 * math.pi / length, kept)), _diagonal([variance, variance])
    C = torch.tensor([[1.0, 0.0]], dtype=dtype, device=A.device)
    fades = kept < 1
    start = torch.where(fades, variance / (1 - torch.where(fades, kept, 0) ** 2), prior)
    return _made(op, A, C, Q, noise, prior, start=_diagonal([start, start], time=False))


def arma(
    ar: Sequence[float] | Tensor = (),
    ma: Sequence[float] | Tensor = (),
    variance: Variance = 1.0,
    noise: Variance = 0.0,
    *,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """y[t] = Σ ar[i] y[t-1-i] + e[t] + Σ ma[i] e[t-1-i], started in its stationary distribution: n = max(p, q + 1).

    Args:
        ar: (p) numbers, or a tensor (p) or (N, p).   ma: (q) likewise.
        variance: of e.   noise: of an error of observation, beside e.

    Raises:
        ValueError: if the series is not stationary: for differences of a series, use the ARMA model of the differences.

    >>> model = arma(ar=[0.5], variance=3.0)  # stationary variance 3 / (1 - 0.5²)
    >>> model.P0
    tensor([[4.]], dtype=torch.float64)
    """
    op = "arma"
    back, kicks = _coefficients(op, "ar", ar, dtype), _coefficients(op, "ma", ma, dtype)
    variance, noise = _variance(op, "variance", variance, dtype), _variance(op, "noise", noise, dtype)
    n = max(back.shape[-1], kicks.shape[-1] + 1)
    A = parts.companion(torch.nn.functional.pad(back, (0, n - back.shape[-1]))).mT
    one = kicks.new_ones(*kicks.shape[:-1], 1)
    enter = torch.nn.functional.pad(torch.cat([one, kicks], -1), (0, n - 1 - kicks.shape[-1]))[..., None]
    Q = variance[..., None, None] * (enter @ enter.mT)
    if checks.can_read(A) and n and not (radius := float(torch.linalg.eigvals(A.detach()).abs().max())) < 1:
        remedy = "Take differences of the series, or add a `local_level` or `local_trend`."
        raise checks.fail(op, f"ar makes a root of modulus {radius:.6g}, expected below 1 (stationary).", remedy)
    C = torch.eye(n, dtype=dtype, device=A.device)[:1]
    A, Q, start = _time(A), _time(Q), stationary_covariance(A, Q)
    return _made(op, A, C, Q, noise, PRIOR, start=start)


def constant_velocity(
    dt: float | Tensor,
    intensity: float,
    noise: Variance = 0.0,
    *,
    space: int = 2,
    prior: float = PRIOR,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """A moving point that white noise accelerates; its positions are seen: n = 2·space, position and velocity an axis.

    Args:
        dt: the time between observations, or a tensor (…, T): that from each to the next.
        intensity: of the acceleration, squared distance / time³.   noise: variance of a position seen.
        space: how many axes.   prior: variance of the first positions and velocities, about 0.
    """
    return _moving("constant_velocity", 2, dt, intensity, noise, space, prior, dtype)


def constant_acceleration(
    dt: float | Tensor,
    intensity: float,
    noise: Variance = 0.0,
    *,
    space: int = 2,
    prior: float = PRIOR,
    dtype: torch.dtype = torch.float64,
) -> StateSpace:
    """A moving point with white noise for jerk: n = 3·space, position, velocity and acceleration an axis.

    As `constant_velocity`; intensity is squared distance / time⁵.
    """
    return _moving("constant_acceleration", 3, dt, intensity, noise, space, prior, dtype)


def _moving(
    op: str,
    order: int,
    dt: float | Tensor,
    intensity: float,
    noise: Variance,
    space: int,
    prior: float,
    dtype: torch.dtype,
) -> StateSpace:
    checks.number(op, "space", space, low=1, integer=True)
    checks.number(op, "intensity", intensity, low=0)
    sigma = _variance(op, "noise", noise, dtype)
    chain = parts.chain(order).to(dtype)
    white = torch.zeros(order, order, dtype=dtype)
    white[-1, -1] = intensity
    if isinstance(dt, Tensor):
        dt = dt.to(dtype)
        sigma, chain, white = (x.to(dt.device) for x in (sigma, chain, white))
    sampled = discretize(chain, None, dt, white)
    assert sampled.Q is not None
    axes = torch.eye(space, dtype=dtype, device=chain.device)
    A, Q = (torch.kron(axes, x.contiguous()) for x in (sampled.A, sampled.Q))
    C = torch.kron(axes, torch.eye(order, dtype=dtype, device=chain.device)[:1])
    return _made(op, A, C, Q, sigma, prior)


# ---- models of models ------------------------------------------------------------------------------------------------


def sum_of(*models: StateSpace, noise: Variance = 0.0) -> StateSpace:
    """The model of a sum: y = y₁ + y₂ + …, of parts that move apart from each other and share their inputs.

    Args:
        models: with equal m, and equal p where they have inputs.
        noise: variance of an observation, beside what the parts bring.

    Raises:
        ValueError: naming the part and the sizes that differ.
    """
    frames = _frames("sum_of", models, ("m",))
    C = _columns([model.C for model in models])
    p = max(frame[2] for frame in frames)
    for i, frame in enumerate(frames):
        if frame[2] not in (0, p):
            raise checks.fail("sum_of", f"part {i} has {frame[2]} inputs, another has {p}.", "They share their inputs.")
    B = _columns([_or_zeros(x.B, x.A, f[0], p).mT for x, f in zip(models, frames, strict=True)]).mT if p else None
    through = [model.D for model in models if model.D is not None]
    R = torch.stack(torch.broadcast_tensors(*[model.R for model in models])).sum(0)
    extra = _variance("sum_of", "noise", noise, R.dtype).to(R.device)
    R = R + _time(extra[..., None, None] * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device))
    D = torch.stack(torch.broadcast_tensors(*through)).sum(0) if through else None
    return _joined(models, B, C, D, R)


def side_by_side(*models: StateSpace) -> StateSpace:
    """The model of several series at once: y = [y₁, y₂, …], u = [u₁, u₂, …], with nothing between them."""
    frames = _frames("side_by_side", models, ())
    B = D = None
    if any(frame[2] for frame in frames):
        B = _blocks([_or_zeros(x.B, x.A, f[0], f[2]) for x, f in zip(models, frames, strict=True)])
        D = _blocks([_or_zeros(x.D, x.A, f[1], f[2]) for x, f in zip(models, frames, strict=True)])
    return _joined(models, B, _blocks([m.C for m in models]), D, _blocks([m.R for m in models]))


def _joined(models: Sequence[StateSpace], B: Tensor | None, C: Tensor, D: Tensor | None, R: Tensor) -> StateSpace:
    A, Q, P0 = (_blocks([model[i] for model in models]) for i in (0, 4, 7))  # type: ignore[misc]  # three fields
    m0 = _columns([model.m0[..., None, :] for model in models])[..., 0, :]
    return StateSpace(A, B, C, D, Q, R, m0, P0)


def _frames(op: str, models: Sequence[StateSpace], equal: Sequence[str]) -> list[tuple[int, int, int]]:
    if not models:
        raise checks.fail(op, "no models were given, expected at least one.")
    frames = [check(op, model)[:3] for model in models]
    for i, (model, frame) in enumerate(zip(models, frames, strict=True)):
        if "m" in equal and frame[1] != frames[0][1]:
            raise checks.fail(op, f"part {i} has {frame[1]} observations, part 0 has {frames[0][1]}.")
        checks.dtype(op, f"part {i}", model.A, (models[0].A.dtype,), "Convert with model.to(dtype).")
    checks.same_device(op, {f"part {i}": model.A for i, model in enumerate(models)})
    return frames


def _or_zeros(x: Tensor | None, like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_zeros(rows, columns) if x is None else x


def _columns(parts: Sequence[Tensor]) -> Tensor:
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in parts))
    return torch.cat([x.expand(*lead, *x.shape[-2:]) for x in parts], -1)


def _blocks(parts: Sequence[Tensor]) -> Tensor:
    """Block diagonal, over broadcast leading dimensions."""
    width, rows, left = sum(x.shape[-1] for x in parts), [], 0
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in parts))
    for x in parts:
        padded = torch.nn.functional.pad(x, (left, width - left - x.shape[-1]))
        rows.append(padded.expand(*lead, *padded.shape[-2:]))
        left += x.shape[-1]
    return torch.cat(rows, -2)


# ---- parts -----------------------------------------------------------------------------------------------------------


def stationary_covariance(A: Tensor, Q: Tensor) -> Tensor:
    """P = A P Aᵀ + Q (…, n, n), the covariance that a stable A (…, n, n) settles at; differentiable in both.

    Raises ValueError if A is not stable.
    """
    P = lyapunov(A, Q)
    if checks.can_read(P.detach()) and not torch.isfinite(P).all():
        raise checks.fail("stationary_covariance", "A is not stable: the covariance of its state grows without end.")
    return P


def _made(
    op: str, A: Tensor, C: Tensor, Q: Tensor, noise: Tensor, prior: float, start: Tensor | None = None
) -> StateSpace:
    checks.number(op, "prior", prior, low=0)
    n, m = A.shape[-1], C.shape[-2]
    R = _time(noise[..., None, None] * torch.eye(m, dtype=C.dtype, device=C.device))
    P0 = prior * torch.eye(n, dtype=A.dtype, device=A.device) if start is None else start
    return StateSpace(A, None, C, None, Q, R, A.new_zeros(n), P0)


def _time(x: Tensor) -> Tensor:
    """A matrix a series (N, n, n) as one that does not vary, (N, 1, n, n)."""
    return x[..., None, :, :] if x.dim() > 2 else x


def _diagonal(values: list[Tensor], *, time: bool = True) -> Tensor:
    made = torch.diag_embed(torch.stack(torch.broadcast_tensors(*values), -1))
    return _time(made) if time else made


def _variance(op: str, name: str, x: Variance, dtype: torch.dtype) -> Tensor:
    return _number(op, name, x, dtype, "at least 0", lambda v: v >= 0)


def _positive(op: str, name: str, x: Variance, dtype: torch.dtype) -> Tensor:
    return _number(op, name, x, dtype, "above 0", lambda v: v > 0)


def _share(op: str, name: str, x: Variance, dtype: torch.dtype) -> Tensor:
    return _number(op, name, x, dtype, "in (0, 1]", lambda v: (v > 0) & (v <= 1))


def _number(
    op: str, name: str, x: Variance, dtype: torch.dtype, expected: str, fits: Callable[[Tensor], Tensor]
) -> Tensor:
    """A number or a tensor () or (N) of them, as a tensor of `dtype`."""
    if isinstance(x, Tensor):
        checks.dtype(op, name, x, checks.REAL_DTYPES)
        if x.dim() > 1:
            raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected () or (N), one a series.")
        made = x.to(dtype)
    else:
        checks.number(op, name, x)
        made = torch.tensor(x, dtype=dtype)
    if checks.can_read(made) and not fits(made).all():
        worst = made[~fits(made)].flatten()[0]
        raise checks.fail(op, f"{name} is {float(worst):.6g}, expected {expected}.")
    return made


def _coefficients(op: str, name: str, x: Sequence[float] | Tensor, dtype: torch.dtype) -> Tensor:
    made = x.to(dtype) if isinstance(x, Tensor) else torch.tensor(list(x), dtype=dtype)
    if made.dim() not in (1, 2):
        raise checks.fail(op, f"{name} has shape {tuple(made.shape)}, expected (p) or (N, p).")
    return made
