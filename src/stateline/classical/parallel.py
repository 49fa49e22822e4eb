"""The Kalman filter in a number of rounds that grows with log T: a scan over time, all steps of a round at once.

Step t is an element (A, b, C, η, J): given the state before it, the state is N(A h + b, C), and the likelihood of what
was observed is that of information (η, J) about h. Elements compose associatively. Only moments come out of the scan:
each step's filtered moments and likelihood are computed from its prediction as the serial filter does, since a
likelihood that is carried through compositions loses nats to rounding.
Source: Särkkä & García-Fernández 2021, "Temporal parallelization of Bayesian smoothers", section IV.
Suffixes: N series, T time step, n state, m observation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.ops.kalman import Filtered, KalmanState
from stateline.ops.kalman.reference import (
    joseph_correct,
    joseph_predict,
    masked,
    moved,
    residual,
    symmetric,
    times,
)

if TYPE_CHECKING:
    from stateline.classical.kalman import Flat

OP = "kalman_filter"


class Element(NamedTuple):
    """Some steps as one: A, C, J (N, T, n, n), b, eta (N, T, n)."""

    A: Tensor
    b: Tensor
    C: Tensor
    eta: Tensor
    J: Tensor


def parallel_filter(flat: Flat, keep: str) -> tuple[Filtered, KalmanState]:
    """What `ops.kalman` returns for the same arguments, T ≥ 1, covariance form.

    Raises:
        ValueError: on the CPU, naming series and step, if an innovation covariance is not positive definite: also
            C Q Cᵀ + R, by which alone each step is made an element.
    """
    y, A, C, Q, R = flat.y, flat.A, flat.C, symmetric(flat.Q), symmetric(flat.R)
    b = y.new_zeros(1, 1, A.shape[-1]) if flat.transition_offset is None else flat.transition_offset
    d = y.new_zeros(1, 1, C.shape[-2]) if flat.observation_offset is None else flat.observation_offset
    m0, P0 = flat.state.mean[:, None], symmetric(flat.state.cov)[:, None]
    seen = ~torch.isnan(y)
    first = _first(y, C, R, d, m0, P0, seen)
    whole = first
    if y.shape[1] > 1:
        rest = _elements(y, A, C, Q, R, b, d, seen)
        whole = Element(
            *(torch.cat([f, v.expand(f.shape[0], *v.shape[1:])], 1) for f, v in zip(first, rest, strict=True))
        )
    scanned = scan(whole)
    m_next, P_next = moved(A, b, scanned.b), joseph_predict(scanned.C, A, Q)
    m, P = torch.cat([m0, m_next[:, :-1]], 1), torch.cat([P0, P_next[:, :-1]], 1)
    e = residual(y, C, d, m, seen)
    mean, cov, loglik, failed = joseph_correct(m, P, e, C, R, seen)
    _raise_failed(failed, "C P Cᵀ + R", 'form="sqrt" keeps twice the digits.')
    state = KalmanState(m_next[:, -1].contiguous(), P_next[:, -1].contiguous())
    filtered, predicted = keep != "loglik", keep == "all"
    out = Filtered(
        mean if filtered else None,
        cov if filtered else None,
        m if predicted else None,
        P if predicted else None,
        loglik,
    )
    return out, state


def scan(x: Element) -> Element:
    """All steps up to each, composed: pairs first, the scan of those, and from it what lies between."""
    T = x.b.shape[1]
    if T == 1:
        return x
    pairs = compose(_every(x, slice(0, T - 1, 2)), _every(x, slice(1, None, 2)))
    odd = scan(pairs)
    if T == 2:
        return Element(*(torch.cat([v[:, :1], o], 1) for v, o in zip(x, odd, strict=True)))
    between = compose(_every(odd, slice(0, (T - 1) // 2)), _every(x, slice(2, None, 2)))
    parts = []
    for v, o, e in zip(x, odd, between, strict=True):
        even = torch.cat([v[:, :1], e], 1)
        count = o.shape[1]
        turns = torch.stack([even[:, :count], o], 2).flatten(1, 2)
        parts.append(torch.cat([turns, even[:, count:]], 1))
    return Element(*parts)


def compose(i: Element, j: Element) -> Element:
    """i, then j. I + C_i J_j always has an inverse: both are positive semidefinite."""
    n = i.b.shape[-1]
    M = torch.eye(n).to(i.b) + i.C @ j.J
    right = torch.cat([i.A, (i.b + times(i.C, j.eta))[..., None], i.C], -1)
    X = torch.linalg.solve(M, right)
    left = torch.cat([(j.eta - times(j.J, i.b))[..., None], j.J @ i.A], -1)
    Y = torch.linalg.solve(M.mT, left)
    return Element(
        j.A @ X[..., :n], times(j.A, X[..., n]) + j.b, symmetric(j.A @ X[..., n + 1 :] @ j.A.mT + j.C),
        times(i.A.mT, Y[..., 0]) + i.eta, symmetric(i.A.mT @ Y[..., 1:] + i.J),
    )  # fmt: skip


def _every(x: Element, span: slice) -> Element:
    return Element(*(v[:, span] for v in x))


def _first(y: Tensor, C: Tensor, R: Tensor, d: Tensor, m0: Tensor, P0: Tensor, seen: Tensor) -> Element:
    """The first step, behind which there is only the prior."""
    C, R, d, seen = (v[:, :1] for v in (C, R, d, seen))
    mean, cov, _, failed = joseph_correct(m0, P0, residual(y[:, :1], C, d, m0, seen), C, R, seen)
    _raise_failed(failed, "C P Cᵀ + R", 'form="sqrt" keeps twice the digits.')
    nothing = torch.zeros_like(cov)
    return Element(nothing, mean, cov, torch.zeros_like(mean), nothing)


def _elements(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor, d: Tensor, seen: Tensor
) -> tuple[Tensor, ...]:
    """The steps after the first: the state moves on from the one before, then it is observed."""
    A, Q, b = (v if v.shape[1] == 1 else v[:, :-1] for v in (A, Q, b))
    C, R, d = (v if v.shape[1] == 1 else v[:, 1:] for v in (C, R, d))
    y, seen = y[:, 1:], seen[:, 1:]
    start = b.expand(*y.shape[:2], A.shape[-1])
    e = residual(y, C, d, start, seen)
    C, R = masked(C, R, seen)
    CQ = C @ Q
    L, problem = torch.linalg.cholesky_ex(symmetric(CQ @ C.mT + R))
    _raise_failed(problem != 0, "C Q Cᵀ + R", "parallel=True needs each to be; leave it out.", 1)
    K = torch.cholesky_solve(CQ, L).mT
    rest = torch.eye(A.shape[-1]).to(A) - K @ C
    CA = C @ A
    back = torch.cholesky_solve(CA, L).mT  # (C A)ᵀ S⁻¹
    cov = symmetric(rest @ Q @ rest.mT + K @ R @ K.mT)
    return rest @ A, start + times(K, e), cov, times(back, e), symmetric(back @ CA)


def _raise_failed(failed: Tensor, which: str, remedy: str, first: int = 0) -> None:
    """Raise if a factorisation (N, T) failed, on devices whose values cost no wait."""
    if checks.can_read(failed) and bool(failed.any()):
        step, series = (int(v) for v in failed.mT.nonzero()[0])
        problem = (
            f"the innovation covariance {which} of series {series} at step {step + first} is not positive definite."
        )
        raise checks.fail(OP, problem, f"Nothing is added to it to hide that. {remedy}")
