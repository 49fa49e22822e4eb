"""The algebraic Riccati equation, solved by SciPy, with errors that say what a solution would take."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from stateline import checks

#: Of the largest entry of a solution; more of it left over means that there is none.
RESIDUAL = 1e-7


def linalg(op: str) -> ModuleType:
    """scipy.linalg. Raises ImportError that names the extra."""
    try:
        import scipy.linalg
    except ImportError as error:
        raise ImportError(f"{op}: needs SciPy. pip install 'stateline[classical]'") from error
    return scipy.linalg


def wide(x: Tensor) -> Tensor:
    """Values in float64 on the processor, without gradients."""
    return x.detach().to("cpu", torch.float64)


def riccati(op: str, A: Tensor, B: Tensor, Q: Tensor, R: Tensor, remedy: str, *, continuous: bool = False) -> Tensor:
    """P (n, n) float64, the stabilising solution of P = Aᵀ P A − Aᵀ P B (R + Bᵀ P B)⁻¹ Bᵀ P A + Q.

    Of Aᵀ P + P A − P B R⁻¹ Bᵀ P + Q = 0 if `continuous`. Raises ValueError with `remedy` if there is none.
    """
    scipy = linalg(op)
    A, B, Q, R = (wide(x) for x in (A, B, Q, R))
    solve = scipy.solve_continuous_are if continuous else scipy.solve_discrete_are
    try:
        P = torch.from_numpy(solve(*(x.numpy() for x in (A, B, Q, R))))
    except (ValueError, scipy.LinAlgError) as error:
        raise checks.fail(op, f"the Riccati equation has no stabilising solution ({error}).", remedy) from error
    P = 0.5 * (P + P.mT)
    if continuous:
        closed = A - B @ torch.linalg.solve(R, B.mT @ P)
        left = A.mT @ P + P @ closed + Q
        inside = bool((torch.linalg.eigvals(closed).real < 0).all())
    else:
        closed = A - B @ torch.linalg.solve(R + B.mT @ P @ B, B.mT @ P @ A)
        left = A.mT @ P @ closed + Q - P
        inside = bool((torch.linalg.eigvals(closed).abs() < 1).all())
    if not inside or not float(left.abs().max()) <= RESIDUAL * max(1.0, float(P.abs().max())):
        raise checks.fail(op, "the Riccati equation has no stabilising solution.", remedy)
    return P
