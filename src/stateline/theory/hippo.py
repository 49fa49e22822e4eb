"""What a state of n numbers remembers of a signal: HiPPO systems, and projecting and reconstructing with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stateline import checks
from stateline.theory.dplr import nplr
from stateline.theory.measures import MEASURES, Measure, generalized_laguerre, named, tilted_laguerre

__all__ = ["INITS", "MEASURES", "Measure", "diagonal", "generalized_laguerre", "tilted_laguerre", "transition"]


def transition(measure: str | Measure, n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n), float64, of x' = A x + B u.

    Args:
        measure: a name of `MEASURES`, or a row: `tilted_laguerre(beta)`, `generalized_laguerre(alpha, beta)`, your own.
        n: states ≥ 1.

    Raises:
        ValueError, TypeError: for an unknown measure, or an n that is no whole number ≥ 1.
    """
    row = named("hippo.transition", measure)
    checks.number("hippo.transition", "n", n, low=1, integer=True)
    return row.matrices(n)


def _inverse(n: int, stride: int) -> Tensor:
    k = torch.arange(n // 2, dtype=torch.float64)
    return n / math.pi * (n / (stride * k + 1) - 1)


def _spectrum(init: str, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(−Re A, −Im A) of a diagonal initialiser."""
    k = torch.arange(n // 2, dtype=torch.float64)
    half = torch.full_like(k, 0.5)
    if init == "legs":
        w = nplr("legs", n)[0]
        return -w.real, -w.imag
    if init == "real":
        return k + 1, torch.zeros_like(k)
    if init == "rand":
        return half, torch.exp(torch.randn(n // 2, dtype=torch.float64, generator=generator))
    rows = {
        "lin": lambda: math.pi * k,
        "inv": lambda: _inverse(n, 2),
        "inv2": lambda: _inverse(n, 1),
        "quad": lambda: (2 * k + 1) ** 2 / math.pi,
    }
    return half, rows[init]()


#: What `diagonal` knows.
INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "rand")


def diagonal(init: str, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """A (n/2) complex128 of a diagonal system, half of conjugate pairs: Re A < 0, Im A ≤ 0.

    k = 0 … n/2 − 1 below; the real part is −½ but for "real".

    Args:
        init: "lin" −Im = πk, the frequencies of a Fourier series · "inv" (n/π)(n/(2k+1) − 1), close to legs in closed
            form · "inv2" (n/π)(n/(k+1) − 1) · "quad" (1+2k)²/π · "legs" the eigenvalues of legs' normal part, ascending
            in Im · "real" −(k+1), no frequencies · "rand" exp of a normal number.
        n: states, even; conjugates count.
        generator: of "rand". None: torch's own.

    Raises:
        ValueError, TypeError: for an unknown init, an odd n.

    Source: "On the parameterization and initialization of diagonal state space models" (Gu et al. 2022), §4.
    """
    op = "hippo.diagonal"
    checks.choice(op, "init", init, INITS)
    checks.number(op, "n", n, low=2, integer=True)
    if n % 2:
        raise checks.fail(op, f"n is {n}, expected an even number.", "States come in conjugate pairs.")
    real, imag = _spectrum(init, n, generator)
    return torch.complex(-real, -imag)
