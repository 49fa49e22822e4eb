"""HiPPO systems as a diagonal and a few rows: what S4 computes with.

A HiPPO matrix is normal but for a low-rank part, A + PᵀP = V diag(w) V*, and a real A has its eigenvalues in conjugate
pairs. So n/2 complex numbers and r rows say everything:

    NPLR   A = 2 Re(V diag(w) V*) − PᵀP               in the coordinates of the basis functions, real
    DPLR   z' = (diag(w) − P P*) z + B u,  y = 2 Re C z    in those of the eigenvectors, half of them: z = V* x, C → C V

where P* z stands for 2 Re Σ_k conj(P_k) z_k, the pairs' sum. Source: "Efficiently modeling long sequences with
structured state spaces" (Gu, Goel, Ré 2022), §3.1 and appendix C.

Suffixes: n state, k state (columns), r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stateline import checks
from stateline.theory.measures import Measure, named

#: Eigenvalues below this share of the largest are the exact zeros of a wave that does not turn.
ZERO = 1e-10


def nplr(
    measure: str | Measure, n: int, rank: int | None = None, *, clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w (n/2), P (r, n/2), B (n/2) and V (n, n/2), complex128, of a HiPPO system in its eigenvectors' coordinates.

    w is ascending in its imaginary part, all of them ≤ 0; the other half is the conjugate. Eigenvectors are turned so
    that B is real and ≥ 0: a phase is a choice, and LAPACK's differs from machine to machine.

    Args:
        measure: a name of `MEASURES` or a row of one's own, with `rows`.
        n: states, even.
        rank: rows of P. None: as many as A needs (legt 2, the normal legsd and foud 0, all others 1); more are zero.
        clip: the largest |B|. The S4 repository cuts Im B at 2, which changes 11 of 32 entries for legs with n = 64:
            such a system is no HiPPO any more, hence None here. (It cuts in LAPACK's phases; here phases do not count.)

    Raises:
        ValueError: for an odd n, a rank below what A needs, a measure without rows.
    """
    op = "dplr.nplr"
    row = named(op, measure)
    checks.number(op, "n", n, low=2, integer=True)
    if n % 2:
        raise checks.fail(op, f"n is {n}, expected an even number.", "States come in conjugate pairs.")
    A, B = row.matrices(n)
    P = _rows(op, row, n, rank)
    normal = A + P.T @ P
    w, V = _eigen(normal)
    B_c, P_c = B.to(V.dtype) @ V.conj(), P.to(V.dtype) @ V.conj()
    turn = torch.where(B_c.abs() > ZERO * B_c.abs().max(), B_c / B_c.abs(), 1)
    V, B_c, P_c = V * turn, B_c * turn.conj(), P_c * turn.conj()
    size = B_c.real
    if clip is not None:
        checks.number(op, "clip", clip, low=0, open_low=True)
        size = size.clamp(max=clip)
    return w, P_c, torch.complex(size, torch.zeros_like(size)), V


def _rows(op: str, row: Measure, n: int, rank: int | None) -> Tensor:
    if row.rows is None:
        legendre = "Take legt, the same memory in an orthonormal basis."
        remedy = legendre if row.name == "lmu" else "Take alpha = 0, or compute with A as it is."
        raise checks.fail(op, f"measure {row.name!r} has no low-rank correction that makes it normal.", remedy)
    P = row.rows(n)
    if rank is None:
        return P
    checks.number(op, "rank", rank, low=0, integer=True)
    if rank < len(P):
        raise checks.fail(op, f"rank is {rank}, expected at least {len(P)} for measure {row.name!r}.")
    return torch.cat([P, P.new_zeros(rank - len(P), n)])


def _eigen(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Half the eigenvalues (n/2), Im ascending and ≤ 0, and eigenvectors (n, n/2) of c·I + S, S real and skew.

    Zeros come in pairs too, and there an eigenvector need not be the conjugate of its partner: any basis of the kernel
    is as good to LAPACK. The kernel of a real matrix has a real basis; a, b of it give (a + ib)/√2 and its conjugate.
    """
    n = len(normal)
    imag, V = torch.linalg.eigh(-0.5j * (normal - normal.T))
    imag, V = imag[: n // 2].clone(), V[:, : n // 2].clone()
    zero = imag >= -ZERO * normal.abs().max()
    if zero.any():
        others = V[:, ~zero]
        kernel = torch.eye(n, dtype=torch.float64) - 2 * (others @ others.mH).real
        real = torch.linalg.eigh(kernel)[1][:, -2 * int(zero.sum()) :]
        a, b = real.chunk(2, -1)
        V[:, zero], imag[zero] = torch.complex(a, b) / math.sqrt(2), 0.0
    real = normal.diagonal().mean()
    real = torch.where(real.abs() < ZERO, 0.0, real)  # rounding must not leave an eigenvalue right of the axis
    return torch.complex(real.expand(n // 2), imag), V


def dense(w: Tensor, P: Tensor, V: Tensor) -> Tensor:
    """A (n, n), real: 2 Re(V diag(w) V*) − PᵀP, from what `nplr` returns."""
    rows = 2 * (P @ V.mT).real
    return 2 * ((V * w) @ V.mH).real - rows.mT @ rows


@dataclass(frozen=True)
class DPLR:
    """A system matrix diag(w) − Σ_r P_r Q_r*, on states of which each stands for itself and its conjugate.

    w (…, n/2) and P, Q (…, r, n/2), complex; Q is P if None. Applied to z (…, n/2): w z − Σ_r P_r · 2 Re Σ conj(Q_r) z.
    """

    w: Tensor
    P: Tensor
    Q: Tensor | None = None

    def __post_init__(self) -> None:
        for name, rows in (("P", self.P), ("Q", self.Q)):
            if rows is not None and (rows.dim() < 2 or rows.shape[-1] != self.w.shape[-1]):
                expected = f"expected (…, r, n/2) with n/2 = {self.w.shape[-1]} (set by w)"
                raise checks.fail("DPLR", f"{name} has shape {tuple(rows.shape)}, {expected}.")
        if not (self.w.is_complex() and self.P.is_complex()):
            raise checks.fail("DPLR", "w and P are expected complex, half of conjugate pairs.", error=TypeError)

    @property
    def right(self) -> Tensor:
        """Q, or P where there is none."""
        return self.P if self.Q is None else self.Q

    def apply(self, z: Tensor) -> Tensor:
        """z (…, n/2) -> A z (…, n/2), in O(n r)."""
        inner = 2 * (self.right.conj() * z[..., None, :]).real.sum(-1)
        return self.w * z - (inner[..., None] * self.P).sum(-2)

    def pairs(self) -> Tensor:
        """A (…, n, n), dense, on [z, conj z]."""
        P, Q = pairs(self.P), pairs(self.right)
        return torch.diag_embed(pairs(self.w)) - P.mT @ Q.conj()


def pairs(z: Tensor) -> Tensor:
    """[z, conj z] (…, n) of z (…, n/2)."""
    return torch.cat([z, z.conj()], -1)
