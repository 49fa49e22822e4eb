"""Linear algebra that covariances need wherever they may be singular: roots, and what a stable system settles at."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline import checks

#: Squares A², A⁴, … after which a sum over all of time has converged, or never will.
DOUBLINGS = 60
#: Eigenvalues of a correlation matrix below so many roundings a row are none.
ROUNDING = 16


def spectrum(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """size, values (…, n) and vectors V (…, n, n) of symmetric S = size V values Vᵀ size, largest values first.

    Eigenvectors of S scaled to a unit diagonal: small variances beside large ones keep their digits.
    """
    size = S.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)
    unit = torch.where(torch.isfinite(S), S, 0.0) * inverse[..., :, None] * inverse[..., None, :]
    values, vectors = torch.linalg.eigh(unit)
    return size, values.flip(-1), vectors.flip(-1)


def spectral_root(S: Tensor) -> Tensor:
    """F (…, n, n) with F Fᵀ = S, positive semidefinite; as many columns as S lacks in rank are zeros, the last ones."""
    size, values, vectors = spectrum(S)
    values = torch.where(values > ROUNDING * S.shape[-1] * torch.finfo(S.dtype).eps, values, 0.0)
    return size[..., :, None] * vectors * values.sqrt()[..., None, :]


def square_root(S: Tensor, op: str = "square_root", name: str = "S") -> Tensor:
    """F (…, n, n), lower triangular with a diagonal ≥ 0, such that F Fᵀ = S; S positive semidefinite. No gradient.

    By Cholesky where it succeeds, else by eigenvectors of S scaled to a unit diagonal, so that small variances beside
    large ones keep their digits.

    Raises:
        ValueError: on the CPU, if a value is not finite, or S has an eigenvalue below 0 by more than rounding explains.
            `op`, `name`: who asks.
    """
    with torch.no_grad():
        S = (S + S.mT) / 2
        L, problem = torch.linalg.cholesky_ex(S)
        if checks.can_read(S) and not problem.any():
            return L.contiguous()
        scale, values, vectors = spectrum(S)
        if checks.can_read(S):
            tolerance = ROUNDING * S.shape[-1] * torch.finfo(S.dtype).eps
            rest = S * ((scale == 0)[..., :, None] | (scale == 0)[..., None, :])  # 0 unless S is indefinite
            if (cause := checks.not_finite(op, {name: S})) is not None:
                raise cause
            if bool(rest.any()) or float(values.min()) < -tolerance:
                problem_of = f"{name} is not positive semidefinite"
                raise checks.fail(
                    op, f"{problem_of}.", "A covariance has no eigenvalue below 0; look for a wrong sign."
                )
        F = scale[..., :, None] * vectors * values.clamp(min=0).sqrt()[..., None, :]
        G = torch.linalg.qr(F.mT, mode="r").R.mT.tril()
        G = G * torch.where(G.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(G)[..., None, :]
        return torch.where((problem != 0)[..., None, None], G, L).contiguous()


def lyapunov(A: Tensor, Q: Tensor, *, continuous: bool = False) -> Tensor:
    """P = A P Aᵀ + Q (…, n, n), or A P + P Aᵀ + Q = 0, of stable A; not finite where A is not stable. Differentiable.

    Σ Aᵏ Q Aᵏᵀ by doubling the terms: for semidefinite Q, sums of what is not negative, so nothing cancels. The
    `continuous` equation becomes that one by Cayley's transformation, about the middle of A's eigenvalues.
    """
    if continuous:
        size = torch.linalg.eigvals(A.detach()).abs().clamp(min=1e-300)
        middle = (0.5 * (size.amax(-1).log() + size.amin(-1).log())).exp()[..., None, None]
        shift = middle * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        inverse = torch.linalg.inv(shift - A)
        A, Q = inverse @ (shift + A), 2 * middle * inverse @ Q @ inverse.mT
    P, power = Q, A
    for _ in range(DOUBLINGS):
        grown = P + power @ P @ power.mT
        if torch.equal(grown, P):
            break
        P, power = grown, power @ power
    else:
        fades = (power.abs() < torch.finfo(P.dtype).eps).all(-1).all(-1)
        P = torch.where(fades[..., None, None], P, torch.inf)
    return 0.5 * (P + P.mT)
