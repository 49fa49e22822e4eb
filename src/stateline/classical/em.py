"""One step of expectation maximisation: moments of the states given all observations, then the parts that fit best.

The states, and the entries that are missing in rows that have others, are what is imagined; empty rows are left out.
With r the residual of a transition, an observation or the start under the present model, and z what its matrix
multiplies, the sums of r rᵀ, r zᵀ and z zᵀ over steps are all that a part needs:

    F ← F + Δ,  Δ z ≈ r weighted by the noise;    noise ← mean of (r − Δ z)(r − Δ z)ᵀ

which for F without frozen entries is Δ = Σ r zᵀ (Σ z zᵀ)⁻¹. Where noise is singular, F and the noise change within its
range only: expectation maximisation cannot leave it. F with frozen entries depends on the noise, so both take turns.
Sources: Shumway & Stoffer 1982; Anderson 1973, "Asymptotically efficient estimation of covariance matrices with linear
structure", for covariances of which some entries are frozen.

Suffixes: N series, G model (N, or 1 for all series), T time step, n state, m observation, p input, q columns of z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline.classical.model import StateSpace
from stateline.classical.parameters import blocks
from stateline.classical.smoother import Smoothed, kalman_smoother
from stateline.ops.kalman.reference import masked, symmetric, times

#: Turns of F and noise, and scoring steps, until nothing moves by more than this share.
TURNS, SETTLED = 200, 1e-13
#: Of the largest eigenvalue of a matrix scaled to a unit diagonal: below, it counts as singular.
SINGULAR = 1e-12
#: Sums over the steps: r rᵀ (G, a, a), r zᵀ (G, a, q), z zᵀ (G, q, q), and the number of steps (G, 1, 1).
Sums = tuple[Tensor, Tensor, Tensor, Tensor]


class Data(NamedTuple):
    """Series y (N, T, m), inputs u (N, T, p) or None, whether each series has a model of its own, the filter's form."""

    y: Tensor
    u: Tensor | None
    each: bool
    form: str


def em_step(data: Data, model: StateSpace, free: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The learned parts (G, …) one step on, and the log-likelihood (N, T) of the present ones.

    model: parts (N or 1, T or 1, …), m0 (N or 1, n), P0 (N or 1, n, n).   free: entries that are learned, by part.
    """
    smoothed = kalman_smoother(model, data.y, data.u, form=data.form)
    made: dict[str, Tensor] = {}
    if {"A", "B", "Q"} & set(free):
        made |= _improve(model, free, ("A", "B", "Q"), _transitions(data, model, smoothed, free))
    if {"C", "D", "R"} & set(free):
        made |= _improve(model, free, ("C", "D", "R"), _observations(data, model, smoothed, free))
    if {"m0", "P0"} & set(free):
        made |= _improve(model, free, ("m0", "", "P0"), _start(data, model, smoothed))
    return made, smoothed.loglik


# ---- sums ------------------------------------------------------------------------------------------------------------


def _transitions(data: Data, model: StateSpace, smoothed: Smoothed, free: Mapping[str, Tensor]) -> Sums:
    m, P, lag = smoothed.mean, _own(smoothed.cov), _own(smoothed.lag_cov)
    A, steps = _until_last(model.A), m.shape[1] - 1
    r, h = m[:, 1:] - times(A, m[:, :-1]), m[:, :-1]
    u = None if data.u is None else data.u[:, :-1]
    if u is not None and model.B is not None:
        r = r - times(_until_last(model.B), u)
    if A.shape[1] == 1:
        before, after, lag, A = P[:, :-1].sum(1), P[:, 1:].sum(1), lag.sum(1), A[:, 0]
    else:
        before, after = P[:, :-1], P[:, 1:]
    with_state = lag.mT - A @ before
    own = after - A @ lag - with_state @ A.mT
    spread = [v if v.dim() == 3 else v.sum(1) for v in (own, with_state, before)]
    z = _regressors(h, u, "A" in free, "B" in free)
    return _sums(data, r, z, spread, steps if "A" in free else 0, m.new_full((len(m), 1, 1), steps))


def _observations(data: Data, model: StateSpace, smoothed: Smoothed, free: Mapping[str, Tensor]) -> Sums:
    seen = ~data.y.isnan()
    some = seen.any(-1)
    P, m, C = _own(smoothed.cov), smoothed.mean, model.C
    r = data.y - times(C, m)
    if data.u is not None and model.D is not None:
        r = r - times(model.D, data.u)
    r, kept = torch.where(seen, r, 0.0), some[..., None]
    if bool((seen == kept).all()):  # rows are whole or empty
        P = torch.where(kept[: len(P)], P.flatten(2), 0.0).unflatten(2, P.shape[2:]) if not bool(some.all()) else P
        P, C = (P.sum(1), C[:, 0]) if C.shape[1] == 1 else (P, C)
        with_state = -C @ P
        own = -with_state @ C.mT
        spread = [v if v.dim() == 3 else v.sum(1) for v in (own, with_state, P)]
    else:
        R = model.R
        C_seen, R_seen = masked(C, R, seen)
        fill = torch.where(seen[..., None, :], R, 0.0) @ torch.linalg.pinv(R_seen, hermitian=True)
        rest = torch.where(kept[..., None], R - fill @ torch.where(seen[..., None], R, 0.0), 0.0)
        fill = torch.where(seen[..., None], torch.eye(R.shape[-1]).to(R), fill)
        both = seen[..., None] | seen[..., None, :]
        rest, fill = torch.where(both, 0.0, rest), torch.where(kept[..., None], fill, 0.0)
        r, P = times(fill, r), torch.where(kept[..., None], P, 0.0)
        with_state = -fill @ C_seen @ P
        own = rest - with_state @ (fill @ C_seen).mT
        spread = [v.sum(1) for v in (own, with_state, P)]
    h, u = torch.where(kept, m, 0.0), None if data.u is None else torch.where(kept, data.u, 0.0)
    z = _regressors(h, u, "C" in free, "D" in free)
    return _sums(data, r, z, spread, 1 if "C" in free else 0, some.sum(1).to(m)[:, None, None])


def _start(data: Data, model: StateSpace, smoothed: Smoothed) -> Sums:
    r, P = (smoothed.mean[:, 0] - model.m0)[:, None], _own(smoothed.cov)[:, 0]
    one = r.new_ones(len(r), 1, 1)
    return _sums(data, r, one, [P, P[:, :, :1], P[:, :1, :1]], 0, one)


def _sums(data: Data, r: Tensor, z: Tensor, spread: list[Tensor], states: int, count: Tensor) -> Sums:
    """Of means r (N, T, a), z (N, T, q) and summed covariances of r and of z's first columns, if those are states."""
    own, with_state, of_state = (v.expand(len(r), *v.shape[1:]) for v in spread)
    rr, rz, zz = r.mT @ r + own, r.mT @ z, z.mT @ z
    if states:
        n = of_state.shape[-1]
        rz[..., :n] += with_state
        zz[..., :n, :n] += of_state
    found = (symmetric(rr), rz, symmetric(zz), count)
    return found if data.each else tuple(v.sum(0, keepdim=True) for v in found)  # type: ignore[return-value]  # four


def _regressors(h: Tensor, u: Tensor | None, states: bool, inputs: bool) -> Tensor:
    parts = ([h] if states else []) + ([u] if inputs and u is not None else [])
    return torch.cat(parts, -1) if parts else h[..., :0]


def _own(cov: Tensor) -> Tensor:
    """(1, …) of covariances that all series share."""
    return cov[:1] if cov.stride(0) == 0 else cov


def _until_last(M: Tensor) -> Tensor:
    return M if M.shape[1] == 1 else M[:, :-1]


# ---- parts -----------------------------------------------------------------------------------------------------------


def _improve(
    model: StateSpace, free: Mapping[str, Tensor], names: tuple[str, str, str], sums: Sums
) -> dict[str, Tensor]:
    """A matrix, an input matrix and a noise covariance, those of them that are learned."""
    first, second, noise = names
    rr, rz, zz, count = sums
    size = len(rr)
    now = {name: _matrix(getattr(model, name)) for name in (first, second) if name in free}
    cov = _matrix(getattr(model, noise)).expand(size, -1, -1)
    mask = torch.cat([_mask(free[name]) for name in now], 1) if now else None
    turns = TURNS if mask is not None and noise in free and not bool(mask.all()) else 1
    old, delta = cov, torch.zeros_like(rz)
    for _ in range(turns):
        if mask is not None:
            delta = _regress(rz, zz, cov, mask)
        if noise not in free:
            break
        left = symmetric(rr - delta @ rz.mT - rz @ delta.mT + delta @ zz @ delta.mT) / count.clamp(min=1)
        new = _moment(torch.where(count > 0, left, old), old, free[noise])
        moved = float((new - cov).abs().max())
        cov = new
        if moved <= SETTLED * float(cov.abs().max()):
            break
    made = {noise: cov} if noise in free else {}
    at = 0
    for name, present in now.items():
        q = present.shape[-1]
        part = present + delta[..., at : at + q]
        made[name] = part[..., 0] if name == "m0" else part
        at += q
    return made


def _matrix(v: Tensor) -> Tensor:
    """(G, rows, columns) of a part (G, 1, rows, columns) or (G, n, n), or of m0 (G, n)."""
    return v[:, 0] if v.dim() == 4 else v[..., None] if v.dim() == 2 else v


def _mask(free: Tensor) -> Tensor:
    return free[:, None] if free.dim() == 1 else free


def _regress(rz: Tensor, zz: Tensor, noise: Tensor, free: Tensor) -> Tensor:
    """Δ (G, a, q), zero where not free (a, q), that leaves least of r − Δ z, weighted by the inverse noise."""
    if bool(free.all()):
        return _solve(zz, rz.mT).mT
    i, j = free.nonzero(as_tuple=True)
    delta = torch.zeros_like(rz)
    values, vectors = torch.linalg.eigh(noise.expand(len(rz), -1, -1))
    inside = values > SINGULAR * values[..., -1:]
    weight = (vectors * torch.where(inside, 1 / values, 0.0)[..., None, :]) @ vectors.mT
    systems = weight[:, i][:, :, i] * zz[:, j][:, :, j]
    wanted = (weight @ rz)[:, i, j]
    if bool(inside.all()):
        delta[:, i, j] = _solve(systems, wanted[..., None])[..., 0]
        return delta
    for g in range(len(rz)):
        # Nothing may move across the range of the noise: each null vector forbids one sum in each column.
        null = vectors[g][:, ~inside[g]].mT
        columns = torch.arange(free.shape[1])
        forbidden = (null[:, None, i] * (columns[:, None] == j)).flatten(0, 1)
        _, sizes, rows = torch.linalg.svd(forbidden, full_matrices=True)
        allowed = rows[int((sizes > SINGULAR**0.5).sum()) :].mT
        if allowed.shape[1]:
            reduced = _solve((allowed.mT @ systems[g] @ allowed)[None], (allowed.mT @ wanted[g])[None, :, None])
            delta[g, i, j] = allowed @ reduced[0, :, 0]
    return delta


def _solve(S: Tensor, b: Tensor) -> Tensor:
    """S⁻¹ b of semidefinite S (G, q, q); the smallest solution, in units of its diagonal, where S is singular."""
    size = S.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)[..., None]
    unit = S * inverse * inverse.mT
    L, problem = torch.linalg.cholesky_ex(unit)
    low = L.diagonal(dim1=-2, dim2=-1).amin(-1) if S.shape[-1] else L.new_ones(len(L))
    if bool((problem != 0).any()) or bool((low < SINGULAR**0.5).any()):
        return inverse * (torch.linalg.pinv(unit, rtol=SINGULAR, hermitian=True) @ (inverse * b))
    return inverse * torch.cholesky_solve(inverse * b, L)


def _moment(found: Tensor, old: Tensor, free: Tensor) -> Tensor:
    """The covariances (G, n, n) most likely for second moments `found`, with the frozen entries of `old`."""
    made, found = old.clone(), _semidefinite(found)
    for block in blocks(old, free):
        at = torch.tensor(block.at)
        S, before = found[:, at][:, :, at], old[:, at][:, :, at]
        best = _within(S, before) if block.whole else torch.stack(
            [_score(s, b, block.free) for s, b in zip(S, before, strict=True)]
        )  # fmt: skip
        made[:, at[:, None], at] = best
    return made


def _semidefinite(S: Tensor) -> Tensor:
    """S, less the negative eigenvalues that it has from rounding: it is a difference where noise is nearly none."""
    if not bool(torch.linalg.cholesky_ex(S)[1].any()):
        return S
    values, vectors = torch.linalg.eigh(S)
    return symmetric((vectors * values.clamp(min=0)[..., None, :]) @ vectors.mT)


def _within(S: Tensor, old: Tensor) -> Tensor:
    """S, less what rounding put outside of the range of `old`."""
    if not bool(torch.linalg.cholesky_ex(old)[1].any()):
        return S
    values, vectors = torch.linalg.eigh(old)
    inside = vectors * (values > SINGULAR * values[..., -1:])[..., None, :]
    onto = inside @ inside.mT
    return symmetric(onto @ S @ onto)


def _score(S: Tensor, R: Tensor, free: Tensor) -> Tensor:
    """R (n, n) of least log det R + tr R⁻¹ S that keeps the entries which are not free, by Fisher's scoring."""
    L, problem = torch.linalg.cholesky_ex(R)
    if bool(problem):
        problem_of = "a covariance of which some entries are frozen became singular"
        raise ValueError(f"{problem_of}; freeze the whole block or none of it")
    i, j = free.tril().nonzero(as_tuple=True)
    twice = torch.where(i == j, 1.0, 2.0).to(R)

    def cost(factor: Tensor) -> float:
        return float(2 * factor.diagonal().log().sum() + torch.cholesky_solve(S, factor).trace())

    now = cost(L)
    for _ in range(TURNS):
        W = torch.cholesky_inverse(L)
        slope = twice * (W @ (S - R) @ W)[i, j]
        system = twice[:, None] * twice * (W[i][:, i] * W[j][:, j] + W[i][:, j] * W[j][:, i]) / 2
        change = torch.linalg.solve(system, slope)
        step, scale = torch.zeros_like(R), 1.0
        step[i, j] = change
        step[j, i] = change
        while scale > 1e-10:
            trial = R + scale * step
            factor, failed = torch.linalg.cholesky_ex(trial)
            if not bool(failed) and (value := cost(factor)) <= now:
                break
            scale /= 2
        else:
            break
        R, L, settled, now = trial, factor, abs(now - value) <= SETTLED * max(1.0, abs(now)), value
        if settled:
            break
    return R


def replace(model: StateSpace, parts: Mapping[str, Any]) -> StateSpace:
    """The flat model with learned parts (G, …) put in."""
    return model._replace(**{k: v if k in ("m0", "P0") else v[:, None] for k, v in parts.items()})
