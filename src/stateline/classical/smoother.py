"""Estimate the states of a series from all of its observations, past and future, and draw from their distribution.

In covariance form by Bryson and Frazier: one pass backwards that inverts innovation covariances only, so that singular
Q, R and predicted covariances are nothing special. In square-root form by Rauch, Tung and Striebel, on factors.
Sources: Bryson & Frazier 1963; Rauch, Tung & Striebel 1965; Durbin & Koopman 2002, "A simple and efficient simulation
smoother". Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.kalman import Flat, flatten, run, shaped
from stateline.classical.model import StateSpace, simulate
from stateline.ops.kalman import FORMS, Filtered, SquareRootState, State, exact, square_root
from stateline.ops.kalman.reference import lower, times
from stateline.ops.kalman.smooth import kalman_smooth


class Smoothed(NamedTuple):
    """Moments of the state given all observations, T steps, n states.

    mean (…, T, n), cov (…, T, n, n).   lag_cov (…, T−1, n, n): entry t is Cov(h[t], h[t+1]).
    loglik (…, T): log p(y[t] | y[0 … t−1]), the filter's.
    """

    mean: Tensor
    cov: Tensor
    lag_cov: Tensor
    loglik: Tensor


def kalman_smoother(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    initial_state: State | None = None,
    form: str = "joseph",
    backend: str | None = None,
) -> Smoothed:
    """Estimate the state at each step from the whole series; arguments as in `kalman_filter`.

    Differentiable in every part of the model, y, u and the state; the gradient is that of covariances in float64
    whatever the form. Singular covariances are taken as they are. For float32 data prefer form="sqrt": what is left by
    smoothing may be little of what was filtered.

    Raises:
        ValueError, TypeError: as `kalman_filter`.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> level = StateSpace(one, None, one, None, 0.1 * one, one, m0=one[0], P0=one)
    >>> smoothed = kalman_smoother(level, torch.tensor([[1.0], [1.2], [float("nan")], [1.1]], dtype=torch.float64))
    >>> [round(m, 3) for m in smoothed.mean[:, 0].tolist()], smoothed.lag_cov.shape
    ([1.067, 1.081, 1.083, 1.084], torch.Size([3, 1, 1]))
    """
    return filter_and_smooth(model, y, u, initial_state=initial_state, form=form, backend=backend)[2]


def filter_and_smooth(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    initial_state: State | None = None,
    form: str = "joseph",
    backend: str | None = None,
) -> tuple[Filtered, State, Smoothed]:
    """What `kalman_filter` and `kalman_smoother` return, with one pass forwards for both; arguments as theirs."""
    op = "kalman_smoother"
    checks.choice(op, "form", form, FORMS)
    flat = flatten(op, model, y, u, initial_state, form)
    roots = form == "sqrt"
    out, state = run(flat, form, "all", backend, wide=roots)
    before: Any = (out.predicted_mean, out.predicted_cov)
    system = [None if v is None else v.to(out.loglik.dtype) for v in (flat.y, flat.A, flat.C, flat.R)]
    offset = None if flat.observation_offset is None else flat.observation_offset.to(out.loglik.dtype)
    own = None if backend == "gpu" else backend  # which has no kernel of its own for the way back
    with exact(y):
        known = None
        if roots:
            with torch.no_grad():
                known = _through_factors(flat, out)
        smoothed = kalman_smooth(*system, *before, observation_offset=offset, known=known, backend=own)
    out, state = shaped(flat, out, state)
    N, dtype = flat.y.shape[0], flat.y.dtype
    parts = (v.expand(N, *v.shape[1:]).reshape(*flat.batch, *v.shape[1:]) for v in smoothed)
    if roots and dtype is not torch.float64:
        out = Filtered(*(None if v is None else v.to(dtype) for v in out))  # type: ignore[arg-type]  # loglik is there
        state = SquareRootState(state.mean.to(dtype), state.factor.to(dtype))  # type: ignore[union-attr]  # in this form
    return out, state, Smoothed(*(v.to(dtype) for v in (*parts, out.loglik)))


def posterior_sample(
    model: StateSpace,
    y: Tensor,
    u: Tensor | None = None,
    *,
    samples: int = 1,
    initial_state: State | None = None,
    form: str = "joseph",
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Whole paths of the state (samples, …, T, n) drawn from their distribution given all observations. No gradient.

    A path of the model is drawn first, then moved by what the smoother makes of the difference between its observations
    and y; singular covariances are nothing special.

    Args:
        initial_state: what an earlier call returned, to go on there; None starts from m0, P0.
        generator: one seed on one machine gives the same paths again.
        others: as in `kalman_filter`.

    Raises:
        ValueError, TypeError: as `kalman_smoother`.
    """
    op = "posterior_sample"
    checks.number(op, "samples", samples, low=1, integer=True)
    with torch.no_grad(), exact(y):
        batch = flatten(op, model, y, u, initial_state, form).batch
        start = None
        if initial_state is not None:
            model = model._replace(m0=initial_state.mean, P0=initial_state.cov)
            second = initial_state.factor if isinstance(initial_state, SquareRootState) else initial_state.cov
            start = type(initial_state)(torch.zeros_like(initial_state.mean), second)
        h, drawn = simulate(model, y.shape[-2], u, batch=(samples, *batch), generator=generator)
        # The smoother is affine in y: for the difference of two series, means and inputs cancel.
        centred = model._replace(B=None, D=None, m0=torch.zeros_like(model.m0))
        moved = kalman_smoother(centred, y - drawn, initial_state=start, form=form, backend=backend)
        return h + moved.mean


# ---- square-root form ------------------------------------------------------------------------------------------------


def _through_factors(flat: Flat, out: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (N, T, n), cov (s, T, n, n), lag (s, T−1, n, n), from the filter's factors G (P = G Gᵀ) and F (Q = F Fᵀ),
    in float64.

        [A G  F]  U = [X  0]
        [G    0]      [Y  Z]        J = Y X⁻¹,   mean = m + J (mean[t+1] − m'[t+1]),   G ← [Z  J G[t+1]]

    the last made triangular again; Cov(h[t], h[t+1]) = J P[t+1]. X is singular where A P Aᵀ + Q is: a generalised
    inverse then serves, since the differences lie in its range, and Y (I − X⁻¹ X) joins Z.
    """
    dtype, F = flat.y.dtype, square_root(flat.Q, "kalman_smoother", "Q").double()
    moments: Any = (out.mean, out.predicted_mean, out.factor, out.predicted_factor)
    m, m_before, G, G_before = moments
    (_, T, n), A = m.shape, flat.A.double()
    if G.stride(0) == 0:
        G, G_before = G[:1], G_before[:1]
    if T == 0:
        return m, G, G
    A, F = (v if v.shape[1] == 1 else v[:, :-1] for v in (A, F))
    first = G[:, :-1]
    above = torch.cat([A @ first, F.expand_as(first)], -1)
    whole = lower(torch.cat([above, torch.cat([first, torch.zeros_like(first)], -1)], -2))
    # What a state's deviation can be by rounding alone, where nothing is left of it.
    rounding = times(A.abs(), G_before[:, :-1].norm(dim=-1)) + F.norm(dim=-1)
    inverse, null = _inverse(whole[..., :n, :n], rounding, dtype)
    Y = whole[..., n:, :n]
    J, Z = Y @ inverse, torch.cat([whole[..., n:, n:], Y @ null], -1)
    mean, factor = m[:, -1], G[:, -1]
    means, factors = [mean], [factor]
    for t in reversed(range(T - 1)):
        mean = m[:, t] + times(J[:, t], mean - m_before[:, t + 1])
        factor = lower(torch.cat([Z[:, t], J[:, t] @ factor], -1))
        means.append(mean)
        factors.append(factor)
    mean, factor = torch.stack(means[::-1], 1), torch.stack(factors[::-1], 1)
    cov = factor @ factor.mT
    return mean, cov, J @ cov[:, 1:]


def _inverse(X: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X⁻¹ of lower triangular matrices (…, n, n), a generalised inverse where they are singular, and I − X⁻¹ X.

    Rows are scaled to 1 first: a small deviation beside large ones is no singularity. What is no more than rounding
    of `scale` (…, n) counts as zero; `dtype`: to how many digits X is known otherwise.
    """
    size = X.norm(dim=-1)
    shrink = torch.where(size > 8 * X.shape[-1] * torch.finfo(X.dtype).eps * scale, 1 / size, 0.0)
    unit = X * shrink[..., None]
    tolerance = 8 * X.shape[-1] * torch.finfo(dtype).eps
    eye = torch.eye(X.shape[-1]).to(X).expand_as(X)
    full = (unit.diagonal(dim1=-2, dim2=-1) > tolerance).all(-1)[..., None, None]
    straight = torch.linalg.solve_triangular(torch.where(full, X, eye), eye, upper=False)
    if checks.can_read(full) and bool(full.all()):
        return straight, torch.zeros_like(X)
    inverse = torch.linalg.pinv(unit, rtol=tolerance)
    null = eye - inverse @ unit
    return torch.where(full, straight, inverse * shrink[..., None, :]), torch.where(full, 0.0, null)
