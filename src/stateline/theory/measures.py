"""The HiPPO families: linear systems whose state holds the coefficients of the past in an orthonormal basis.

    x' = A x + B u,      x_n(t) = gain_n ∫ u(t − τ) p_n(τ) w(τ) dτ,      u(t − τ) ≈ Σ_n x_n(t) p_n(τ) / gain_n

τ ≥ 0 is the age of an input, w the measure that says which ages matter, p_n polynomials or waves with ∫ p_n p_m w = δ.
Hence p_n w = exp(τA)B / gain_n: the system's impulse response is its memory. That holds exactly for legs and the
Laguerre family; a window has to forget what leaves it, of which the state knows only an approximation, so legt, lmu and
the Fourier family reach it as n grows.

Sources: "HiPPO" (Gu et al. 2020), §2 and appendix D; "How to train your HiPPO" (Gu et al. 2022), §3 and §4; lmu is
"Legendre Memory Units" (Voelker et al. 2019), eq. 1. All signs are those of x' = A x + B u. legt and the Fourier family
are scaled as S4 does: their windows are 2 or 1 long.

Suffixes: n state, k state (columns), r rank.  τ: the unit of time of A; > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stateline import checks

Matrices = Callable[[int], tuple[Tensor, Tensor]]


def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


@dataclass(frozen=True)
class Measure:
    """One family: its matrices, the rows that make A normal, and what its state means.

    Raises ValueError where A + Σ_r P_r P_rᵀ does not commute with its transpose.
    """

    name: str
    matrices: Matrices
    #: P (r, n), real, with A + PᵀP normal; None: no small P does it.
    rows: Callable[[int], Tensor] | None = None
    #: How far back the measure reaches.
    window: float = math.inf
    #: w(τ), and p (…, n) from n and τ (…); None: the state is no projection onto an orthonormal basis.
    weight: Callable[[Tensor], Tensor] | None = None
    basis: Callable[[int, Tensor], Tensor] | None = None
    gain: Callable[[int], Tensor] = _ones

    def __post_init__(self) -> None:
        if self.rows is not None:
            (A, _), P = self.matrices(6), self.rows(6)
            N = A + P.T @ P
            if not torch.allclose(N @ N.T, N.T @ N):
                raise checks.fail("hippo", f"measure {self.name}: A + PᵀP is not normal.")


# --- polynomials -----------------------------------------------------------------------------------------------------


def _root(n: int) -> Tensor:
    """√(2k + 1), k < n: the norm that makes Legendre polynomials orthonormal under the mean over their interval."""
    return (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()


def legendre(n: int, x: Tensor) -> Tensor:
    """P_0 … P_{n−1} at x (…), in [−1, 1] -> (…, n), by their three-term recurrence."""
    values = [torch.ones_like(x), x]
    for k in range(1, n - 1):
        values.append(((2 * k + 1) * x * values[k] - k * values[k - 1]) / (k + 1))
    return torch.stack(values[:n], -1)


def laguerre(n: int, x: Tensor, alpha: float = 0.0, damping: float = 0.0) -> Tensor:
    """exp(−damping·x) L_k^α(x), k < n, at x (…) ≥ 0 -> (…, n). Damped first, so that old ages do not overflow."""
    seed = torch.exp(-damping * x)
    values = [seed, (1 + alpha - x) * seed]
    for k in range(1, n - 1):
        values.append(((2 * k + 1 + alpha - x) * values[k] - (k + alpha) * values[k - 1]) / (k + 1))
    return torch.stack(values[:n], -1)


def waves(n: int, x: Tensor) -> Tensor:
    """1, 0, √2 cos x, √2 sin x, √2 cos 2x, … at x (…) -> (…, n): entry 1, the sine of nothing, is dead."""
    angle = x[..., None] * torch.arange((n + 1) // 2, dtype=x.dtype, device=x.device)
    pairs = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    pairs = pairs.flatten(-2)[..., :n]
    return torch.cat([pairs[..., :1] / math.sqrt(2), pairs[..., 1:]], -1)


# --- Legendre --------------------------------------------------------------------------------------------------------


def _legs(n: int) -> tuple[Tensor, Tensor]:
    r = _root(n)
    A = -torch.tril(r[:, None] * r, -1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return A, r


def _legsd(n: int) -> tuple[Tensor, Tensor]:
    A, r = _legs(n)
    return A + 0.5 * r[:, None] * r, 0.5 * r


def _alternating(n: int) -> Tensor:
    """(−1)^(n − k) above the diagonal, 1 elsewhere."""
    sign = 1 - 2 * (torch.arange(n, dtype=torch.float64) % 2)
    return torch.tril(torch.ones(n, n, dtype=torch.float64)) + torch.triu(sign[:, None] * sign, 1)


def _legt(n: int) -> tuple[Tensor, Tensor]:
    r = _root(n)
    return -0.5 * r[:, None] * r * _alternating(n), 0.5 * r


def _legt_rows(n: int) -> Tensor:
    r, odd = _root(n), torch.arange(n) % 2 == 1
    return math.sqrt(0.5) * torch.stack([r * odd, r * ~odd])


def _lmu(n: int) -> tuple[Tensor, Tensor]:
    k = torch.arange(n, dtype=torch.float64)
    sign = 1 - 2 * (k % 2)
    A = -torch.triu(torch.ones(n, n, dtype=torch.float64), 1) - torch.tril(sign[:, None] * sign)
    return (2 * k + 1)[:, None] * A, (2 * k + 1) * sign


# --- Laguerre --------------------------------------------------------------------------------------------------------


def _lower(n: int, diagonal: float) -> Tensor:
    return torch.diag(diagonal * _ones(n)) - torch.tril(torch.ones(n, n, dtype=torch.float64), -1)


def _half_rows(n: int) -> Tensor:
    return math.sqrt(0.5) * _ones(n)[None]


def tilted_laguerre(beta: float = 1.0) -> Measure:
    """The measure β exp(−βτ) with Laguerre polynomials ("tlagt"): how fast is forgotten apart from how fine is seen.

    Raises ValueError unless beta > 0.
    """
    checks.number("hippo.tilted_laguerre", "beta", beta, low=0, open_low=True)
    return Measure(
        "tlagt",
        lambda n: (_lower(n, -0.5 * (1 + beta)), beta * _ones(n)),
        _half_rows,
        weight=lambda age: beta * torch.exp(-beta * age),
        basis=lambda n, age: laguerre(n, age, damping=0.5 * (1 - beta)) / math.sqrt(beta),
        gain=lambda n: math.sqrt(beta) * _ones(n),
    )


def generalized_laguerre(alpha: float = 0.0, beta: float = 0.01) -> Measure:
    """The gamma measure β^(1−α) τ^(−α) exp(−βτ) / Γ(1−α) ("glagt"): α > 0 looks harder at what is new.

    Raises ValueError unless −1 < alpha < 1 and beta > 0.
    """
    checks.number("hippo.generalized_laguerre", "beta", beta, low=0, open_low=True)
    checks.number("hippo.generalized_laguerre", "alpha", alpha, low=-1, high=1, open_low=True)
    if alpha == 1:
        raise checks.fail("hippo.generalized_laguerre", "alpha is 1, expected a number above -1 and below 1.")
    kappa = math.exp(-0.5 * math.lgamma(1 - alpha)) * beta ** (0.5 * (1 - alpha))

    def norm(n: int) -> Tensor:
        """Of the generalised Laguerre polynomials: √(Γ(k + α + 1) / Γ(k + 1))."""
        k = torch.arange(n, dtype=torch.float64)
        return torch.exp(0.5 * (torch.lgamma(k + alpha + 1) - torch.lgamma(k + 1)))

    def matrices(n: int) -> tuple[Tensor, Tensor]:
        c = norm(n)
        # binom(k + α, k) / c = c / Γ(1 + α)
        return _lower(n, -0.5 * (1 + beta)) * c / c[:, None], c * kappa / math.gamma(1 + alpha)

    def basis(n: int, age: Tensor) -> Tensor:
        tilt = age[..., None] ** alpha / kappa
        return tilt * laguerre(n, age, alpha, 0.5 * (1 - beta)) / norm(n).to(age.device)

    return Measure(
        "glagt",
        matrices,
        _half_rows if alpha == 0 else None,
        weight=lambda age: kappa**2 * age ** (-alpha) * torch.exp(-beta * age),
        basis=basis,
    )


# --- Fourier ---------------------------------------------------------------------------------------------------------


def _fourier(n: int, speed: float, decay: float, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """S turns each pair of waves, b their values at age 0: speed·S − decay·bbᵀ − damping, and b."""
    b = waves(n, torch.zeros((), dtype=torch.float64))
    angle = math.pi * torch.arange(n // 2, dtype=torch.float64)
    S = torch.zeros(n, n, dtype=torch.float64)
    even = torch.arange(0, n - 1, 2)
    S[even + 1, even], S[even, even + 1] = angle, -angle
    return speed * S - decay * b[:, None] * b - damping * torch.eye(n, dtype=torch.float64), b


def _fourier_measure(name: str, speed: float, decay: float, damping: float, gain: float) -> Measure:
    def matrices(n: int) -> tuple[Tensor, Tensor]:
        A, b = _fourier(n, speed, decay, damping)
        return A, gain * b

    def rows(n: int) -> Tensor:
        b = _fourier(n, speed, decay)[1]
        return math.sqrt(decay) * b[None] if decay else b.new_zeros(0, n)

    window = 2 / speed
    if damping:  # old turns shine through newer ones, so the waves are not orthogonal under the measure
        return Measure(name, matrices, rows)
    if decay < speed:  # what falls out of the window comes in again, a third of it
        return Measure(name, matrices, rows, math.inf, lambda age: 3.0 ** -torch.floor(age / window) / 3, waves_of(1.0))
    return Measure(name, matrices, rows, window, lambda age: (age <= window) / window, waves_of(speed))


def waves_of(speed: float) -> Callable[[int, Tensor], Tensor]:
    """The waves whose first pair turns once in 2 / speed."""
    return lambda n, age: waves(n, math.pi * speed * age)


# --- the rows --------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Measure] = {
    row.name: row
    for row in (
        Measure(
            "legs",
            _legs,
            lambda n: math.sqrt(0.5) * _root(n)[None],
            weight=lambda age: torch.exp(-age),
            basis=lambda n, age: _root(n).to(age.device) * legendre(n, 2 * torch.exp(-age) - 1),
        ),
        Measure("legsd", _legsd, lambda n: _ones(n).new_zeros(0, n)),
        Measure(
            "legt",
            _legt,
            _legt_rows,
            2.0,
            weight=lambda age: 0.5 * (age <= 2),
            basis=lambda n, age: _root(n).to(age.device) * legendre(n, 1 - age),
        ),
        Measure(
            "lmu",
            _lmu,
            None,
            1.0,
            weight=lambda age: 1.0 * (age <= 1),
            basis=lambda n, age: _root(n).to(age.device) * legendre(n, 2 * age - 1),
            gain=_root,
        ),
        Measure(
            "lagt",
            lambda n: (_lower(n, -0.5), _ones(n)),
            _half_rows,
            weight=torch.ones_like,
            basis=lambda n, age: laguerre(n, age, damping=0.5),
        ),
        tilted_laguerre(),
        generalized_laguerre(),
        _fourier_measure("fourier", 1.0, 1.0, 0.0, 1.0),
        _fourier_measure("fourier_decay", 1.0, 0.5, 0.0, 0.5),
        _fourier_measure("fourier2", 2.0, 2.0, 0.0, 2.0),
        _fourier_measure("foud", 2.0, 0.0, 0.5, 1.0),
    )
}


def named(op: str, measure: str | Measure) -> Measure:
    """The row of a name, or the row given. Raises ValueError for a name that there is not."""
    if isinstance(measure, Measure):
        return measure
    checks.choice(op, "measure", measure, tuple(MEASURES))
    return MEASURES[measure]
