"""From x' = A x + B u, sampled in steps of dt, to a recurrence: one function a rule.

    h_t = Ā h_{t−1} + B̄ u_t                         rules of one tap:  Ā, B̄ = zoh(A, B, dt)
    h_t = Ā h_{t−1} + B̄[0] u_t + B̄[1] u_{t−1}       rules of two:      Ā, B̄ = first_order_hold(A, B, dt)

| rule | Ā, with z = dt·A | B̄ / (dt·B) | order |
|---|---|---|---|
| forward_euler | 1 + z | 1 | 1 |
| backward_euler | 1 / (1 − z) | 1 / (1 − z) | 1 |
| bilinear | (1 + z/2) / (1 − z/2) | 1 / (1 − z/2) | 2 |
| generalized_bilinear, α | (1 + (1 − α)z) / (1 − αz) | 1 / (1 − αz) | 1, 2 at α = ½ |
| zoh: u constant in a step | exp z | φ₁ | exact for such u |
| first_order_hold: u a line in a step | exp z | φ₂, φ₁ − φ₂ | exact for such u |
| exponential_euler: Mamba's "simplified zoh" | exp z | 1 | 1 |
| exponential_trapezoidal, blend λ: Mamba-3 | exp z | λ, (1 − λ) exp z | 1, 2 at λ = ½ |

φ₁(z) = (exp z − 1)/z and φ₂(z) = (φ₁(z) − 1)/z, at z = 0 by their limits 1 and ½. The order counts the error at a fixed
time in powers of dt for a smooth u; rules of one tap reach 2 only if u_t is the value at the middle of step t.

A, B and dt of every rule:

    diagonal   A (…, n), real or complex, and B (…, n)
    dense      A (…, n, n) and B (…, n): told from diagonal by B's having one dimension less
    DPLR       A a `dplr.DPLR`, B (…, n/2). Rational rules give a DPLR back, by Woodbury's identity; exponentials of a
               low-rank change have no low rank: they give dense matrices (…, n, n) and B̄ (…, n) on [h, conj h].
    dt         > 0: a number, or a tensor of the shape in front of a system, with which it broadcasts: A (d, n) takes dt
               (d) or (t, d) or (t, 1); one system A (n) or A (n, n) takes (t), one step each: irregular sampling.
               A dt for each state is n systems of one: A[:, None], B[:, None], dt (n).

float64 and complex128, or float32 and complex64. Everything has gradients. Sources: "Generalized bilinear" and zoh:
"HiPPO" (Gu et al. 2020), appendix B.3; "Mamba" (Gu & Dao 2023), §2; "Mamba-3" (Lahoti et al. 2026), §3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from stateline import checks
from stateline.theory.dplr import DPLR, pairs

DTYPES = (torch.float64, torch.complex128, torch.float32, torch.complex64)
Weight = float | Tensor
#: A rational rule leaves a system in its form.
Form = TypeVar("Form", Tensor, DPLR)

#: Below this |z|, φ₁ and φ₂ are summed as series; SERIES terms reach 2⁻⁶⁴ there.
SMALL, SERIES = 0.5, 18
#: Terms of a matrix's series at norm ½: the next is below 2⁻⁶⁴.
TERMS = 20


def _series(z: Tensor, first: int) -> Tensor:
    """Σ_k z^k / (k + first)!"""
    total = torch.full_like(z, 1 / math.factorial(SERIES + first))
    for k in reversed(range(SERIES)):
        total = total * z + 1 / math.factorial(k + first)
    return total


def phi1(z: Tensor, *, quick: bool = False) -> Tensor:
    """(exp z − 1)/z, elementwise.

    quick: the quotient wherever it has a value, a tenth of the work; its slope loses as many digits as 1/|z| has.
    """
    if quick:
        tiny = z.abs() < torch.finfo(z.dtype).eps ** 0.5
        return torch.where(tiny, 1 + z / 2, torch.expm1(z) / torch.where(tiny, 1, z))
    small = z.abs() < SMALL
    safe = torch.where(small, 1, z)  # a gradient through the branch not taken must be finite
    return torch.where(small, _series(torch.where(small, z, 0), 1), torch.expm1(safe) / safe)


def phi2(z: Tensor) -> Tensor:
    """(φ₁(z) − 1)/z, elementwise."""
    small = z.abs() < SMALL
    safe = torch.where(small, 1, z)
    return torch.where(small, _series(torch.where(small, z, 0), 2), (torch.expm1(safe) - safe) / safe**2)


def exponential(M: Tensor) -> Tensor:
    """exp M (…, n, n): the series of M halved until it converges at once, then squared as often.

    torch.linalg.matrix_exp takes a polynomial of degree 8 for norms up to 0.05, which steps often have, and is off by
    up to 5e-12 there; and its last bits depend on the matrices beside.
    """
    count = halvings(M)
    half = halved(M, count)
    total = term = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    for k in range(1, TERMS + 1):
        term = term @ half / k
        total = total + term
    for left in turns(count):
        total = torch.where(left, total @ total, total)
    return total


def halvings(M: Tensor) -> Tensor:
    """(…): after how many each matrix is below one half in norm, whichever others stand beside it."""
    size = torch.linalg.matrix_norm(M.detach(), 1) if M.shape[-1] else M.detach().real.sum((-2, -1))
    return torch.where(torch.isfinite(size) & (size > 0), torch.frexp(size).exponent + 1, 0).clamp(min=0)


def halved(M: Tensor, count: Tensor) -> Tensor:
    """M (…, n, n), each matrix halved `count` (…) times."""
    return M * torch.ldexp(torch.ones_like(count, dtype=M.real.dtype), -count)[..., None, None]


def turns(count: Tensor) -> Iterator[Tensor]:
    """For each doubling which matrices (…, 1, 1) still take part."""
    for turn in range(int(count.max()) if count.numel() else 0):
        yield (count > turn)[..., None, None]


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule(ABC):
    """A row of the table: how Ā and the taps of B̄ follow from dt·A and dt·B."""

    name: str
    order: int

    @property
    @abstractmethod
    def taps(self) -> int:
        """How many inputs a step reads: 1, or 2 with the one before."""

    @abstractmethod
    def diagonal(self, z: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Ā and taps (…, n) from z = dt·A (…, n) and b = dt·B (…, n)."""

    @abstractmethod
    def dense(self, M: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Ā (…, n, n) and taps (…, n) from M = dt·A (…, n, n) and b = dt·B (…, n)."""

    @abstractmethod
    def low_rank(self, A: DPLR, b: Tensor) -> tuple[Tensor | DPLR, list[Tensor]]:
        """Ā and taps from dt·A and b = dt·B (…, n/2)."""


@dataclass(frozen=True)
class Rational(Rule):
    """Ā = (1 + (1 − α)z)/(1 − αz), B̄ = dt·B/(1 − αz). Raises ValueError unless 0 ≤ α ≤ 1, and order 2 iff α is ½."""

    alpha: float

    def __post_init__(self) -> None:
        checks.number(f"discretize.{self.name}", "alpha", self.alpha, low=0, high=1)
        if (self.alpha == 0.5) != (self.order == 2):
            raise checks.fail(f"discretize.{self.name}", f"order {self.order} does not fit alpha {self.alpha}.")

    @property
    def taps(self) -> int:
        """One."""
        return 1

    def diagonal(self, z: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A division each."""
        below = 1 - self.alpha * z
        return (1 + (1 - self.alpha) * z) / below, [b / below]

    def dense(self, M: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One solve; α = 0 has nothing to solve."""
        one = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        ahead = one + (1 - self.alpha) * M
        if self.alpha == 0:
            return ahead, [b]
        solved = torch.linalg.solve(one - self.alpha * M, torch.cat([ahead, b[..., None]], -1))
        return solved[..., :-1], [solved[..., -1]]

    def low_rank(self, A: DPLR, b: Tensor) -> tuple[Tensor | DPLR, list[Tensor]]:
        """Woodbury: (1 − αA)⁻¹ = D − α D P (1 + α Q*DP)⁻¹ Q*D with D = 1/(1 − αw), Q*DP real (r, r)."""
        a, one = self.alpha, torch.eye(A.P.shape[-2], dtype=A.P.real.dtype, device=A.P.device)
        D = 1 / (1 - a * A.w)
        left, right = D[..., None, :] * A.P, D[..., None, :].conj() * A.right
        inner = one + a * 2 * (A.right.conj() @ left.mT).real
        left = torch.linalg.solve(inner.mT, left.real) + 1j * torch.linalg.solve(inner.mT, left.imag)
        inverse = DPLR(D, a * left, right)
        return DPLR((1 + (1 - a) * A.w) * D, left, right), [inverse.apply(b)]


@dataclass(frozen=True)
class Exponential(Rule):
    """Ā = exp z; a tap of B̄ is dt·B times a combination of 1, exp z, φ₁ and φ₂, in that order.

    Raises ValueError unless the taps of a constant input add up to dt·B as dt → 0.
    """

    now: tuple[Weight, Weight, Weight, Weight]
    previous: tuple[Weight, Weight, Weight, Weight] | None = None

    def __post_init__(self) -> None:
        at_zero = sum(w * v for row in self.rows for w, v in zip(row, (1, 1, 1, 0.5), strict=True))
        if not isinstance(at_zero, Tensor) and not math.isclose(at_zero, 1):
            raise checks.fail(f"discretize.{self.name}", f"taps add up to {at_zero} at dt·A = 0, expected 1.")

    @property
    def rows(self) -> list[tuple[Weight, Weight, Weight, Weight]]:
        """The weights of each tap, the newest input first."""
        return [self.now] if self.previous is None else [self.now, self.previous]

    @property
    def taps(self) -> int:
        """One, or two where the input before counts."""
        return len(self.rows)

    def _uses(self, column: int) -> bool:
        return any(isinstance(row[column], Tensor) or row[column] != 0 for row in self.rows)

    def _combine(self, parts: list[Tensor | None]) -> list[Tensor]:
        """A tap each; a weight that is a tensor has the shape in front of a system."""
        return [sum_of([_last(w) * p for w, p in zip(row, parts, strict=True) if p is not None]) for row in self.rows]

    def diagonal(self, z: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Elementwise, with stable φ₁ and φ₂."""
        decay = torch.exp(z)
        parts = [
            b if self._uses(0) else None,
            decay * b if self._uses(1) else None,
            phi1(z) * b if self._uses(2) else None,
            phi2(z) * b if self._uses(3) else None,
        ]
        return decay, self._combine(parts)

    def dense(self, M: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One exponential of [[M, b, 0], [0, 0, 1], [0, 0, 0]]: exp M, φ₁(M)b and φ₂(M)b stand in its first rows.

        No inverse of A, so a singular A is like any other.
        """
        n, extra = M.shape[-1], 2 if self._uses(3) else 1 if self._uses(2) else 0
        batch = torch.broadcast_shapes(M.shape[:-2], b.shape[:-1])
        M, b = M.expand(*batch, n, n), b.expand(*batch, n)
        top = torch.cat([M, b[..., None], torch.zeros_like(b)[..., None]], -1)[..., : n + extra]
        below = M.new_zeros(*batch, extra, n + extra)
        if extra == 2:
            below[..., 0, n + 1] = 1
        full = exponential(torch.cat([top, below], -2))
        decay = full[..., :n, :n]
        parts = [
            b if self._uses(0) else None,
            (decay @ b[..., None])[..., 0] if self._uses(1) else None,
            full[..., :n, n] if self._uses(2) else None,
            full[..., :n, n + 1] if self._uses(3) else None,
        ]
        return decay, self._combine(parts)

    def low_rank(self, A: DPLR, b: Tensor) -> tuple[Tensor | DPLR, list[Tensor]]:
        """Dense, on [h, conj h]."""
        return self.dense(A.pairs(), pairs(b))


def sum_of(terms: list[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0) if len(terms) > 1 else terms[0]


def _last(weight: Weight) -> Weight:
    return weight[..., None] if isinstance(weight, Tensor) else weight


# --- the functions ---------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    row.name: row
    for row in (
        Rational("forward_euler", 1, 0.0),
        Rational("backward_euler", 1, 1.0),
        Rational("bilinear", 2, 0.5),
        Exponential("zoh", 2, (0, 0, 1, 0)),
        Exponential("first_order_hold", 2, (0, 0, 0, 1), (0, 0, 1, -1)),
        Exponential("exponential_euler", 1, (1, 0, 0, 0)),
        Exponential("exponential_trapezoidal", 2, (0.5, 0, 0, 0), (0, 0.5, 0, 0)),
    )
}


def discretize(rule: str | Rule, A: Tensor | DPLR, B: Tensor, dt: float | Tensor) -> tuple[Tensor | DPLR, Tensor]:
    """Ā and B̄ by a rule's name or by a row of one's own.

    Args:
        rule: a name of `RULES`, or a `Rational` or `Exponential`.
        A, B, dt: diagonal, dense or DPLR, as the module says.

    Returns:
        Ā as A, with dt's shape in front; B̄ as B, or (2, …) for rules of two taps: of u_t, of u_{t−1}.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if isinstance(rule, str):
        checks.choice("discretize", "rule", rule, tuple(RULES))
        rule = RULES[rule]
    op = f"discretize.{rule.name}"
    step = _step(op, A.w if isinstance(A, DPLR) else A, dt)
    checks.dtype(op, "B", B, DTYPES)
    if isinstance(A, DPLR):
        scaled = DPLR(step[..., None] * A.w, step[..., None, None] * A.P, A.Q if A.Q is not None else A.P)
        _same_width(op, A.w.shape[-1], B)
        decay, taps = rule.low_rank(scaled, step[..., None] * B)
    elif B.dim() == A.dim() - 1:
        if A.shape[-1] != A.shape[-2]:
            raise checks.fail(op, f"A has shape {tuple(A.shape)}, expected (…, n, n) as B has one dimension less.")
        _same_width(op, A.shape[-1], B)
        dtype = torch.promote_types(A.dtype, B.dtype)
        decay, taps = rule.dense(step[..., None, None] * A.to(dtype), step[..., None] * B.to(dtype))
    else:
        if B.dim() < A.dim():
            expected = f"expected (…, n) as A's {tuple(A.shape)}, or (…, n) for a dense A (…, n, n)"
            raise checks.fail(op, f"B has shape {tuple(B.shape)}, {expected}.")
        _same_width(op, A.shape[-1], B)
        decay, taps = rule.diagonal(step[..., None] * A, step[..., None] * B)
    return decay, taps[0] if rule.taps == 1 else torch.stack(torch.broadcast_tensors(*taps))


def _step(op: str, A: Tensor, dt: float | Tensor) -> Tensor:
    if not isinstance(A, Tensor):
        expected = "expected a tensor (…, n) or (…, n, n), or a DPLR"
        raise checks.fail(op, f"A is a {type(A).__name__}, {expected}.", error=TypeError)
    checks.dtype(op, "A", A, DTYPES)
    if A.dim() == 0:
        raise checks.fail(op, "A has shape (), expected (…, n) or (…, n, n).", "A single number is A[None].")
    real = A.real.dtype if A.is_complex() else A.dtype
    if isinstance(dt, Tensor):
        checks.dtype(op, "dt", dt, (torch.float64, torch.float32))
        if checks.can_read(dt) and not (dt > 0).all():
            raise checks.fail(op, "dt has values that are not above 0.", "A step takes time.")
        return dt
    checks.number(op, "dt", dt, low=0, open_low=True)
    return torch.tensor(dt, dtype=real, device=A.device)


def _same_width(op: str, n: int, B: Tensor) -> None:
    if B.shape[-1:] != (n,):
        raise checks.fail(op, f"B has shape {tuple(B.shape)}, expected (…, n) with n = {n} (set by A).")


def forward_euler(A: Form, B: Tensor, dt: float | Tensor) -> tuple[Form, Tensor]:
    """Ā = 1 + dt·A, B̄ = dt·B. Stable only for steps below 2|Re A|/|A|²."""
    return cast(tuple[Form, Tensor], discretize("forward_euler", A, B, dt))


def backward_euler(A: Form, B: Tensor, dt: float | Tensor) -> tuple[Form, Tensor]:
    """Ā = (1 − dt·A)⁻¹, B̄ = dt·Ā B. Stable wherever the equation is, and damps what does not decay."""
    return cast(tuple[Form, Tensor], discretize("backward_euler", A, B, dt))


def bilinear(A: Form, B: Tensor, dt: float | Tensor) -> tuple[Form, Tensor]:
    """Tustin's rule, S4's: Ā = (1 − dt·A/2)⁻¹(1 + dt·A/2). Keeps stability exactly, bends frequencies."""
    return cast(tuple[Form, Tensor], discretize("bilinear", A, B, dt))


def generalized_bilinear(A: Form, B: Tensor, dt: float | Tensor, *, alpha: float = 0.5) -> tuple[Form, Tensor]:
    """Between forward Euler (alpha 0), bilinear (½) and backward Euler (1)."""
    row = Rational("generalized_bilinear", 2 if alpha == 0.5 else 1, alpha)
    return cast(tuple[Form, Tensor], discretize(row, A, B, dt))


def zoh(A: Tensor | DPLR, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: exact if u is constant within a step. S4D's default."""
    return cast(tuple[Tensor, Tensor], discretize("zoh", A, B, dt))


def first_order_hold(A: Tensor | DPLR, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Exact if u runs in straight lines from sample to sample. Two taps."""
    return cast(tuple[Tensor, Tensor], discretize("first_order_hold", A, B, dt))


def exponential_euler(A: Tensor | DPLR, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mamba's and Mamba-2's rule: Ā by zoh, B̄ = dt·B by Euler."""
    return cast(tuple[Tensor, Tensor], discretize("exponential_euler", A, B, dt))


def exponential_trapezoidal(
    A: Tensor | DPLR, B: Tensor, dt: float | Tensor, *, blend: Weight = 0.5
) -> tuple[Tensor, Tensor]:
    """Mamba-3's rule. Two taps: blend·dt·B of u_t, (1 − blend)·dt·Ā B of u_{t−1}; blend a number or shaped as dt."""
    op = "discretize.exponential_trapezoidal"
    if not isinstance(blend, Tensor):
        checks.number(op, "blend", blend, low=0, high=1)
    row = Exponential("exponential_trapezoidal", 2, (blend, 0, 0, 0), (0, 1 - blend, 0, 0))
    return cast(tuple[Tensor, Tensor], discretize(row, A, B, dt))
