"""One structure of a series, level + slope + seasons + autoregression + regressors, as a state space of its parameters.

    y[t] = level + Σ seasons + cycle + x[t]·weights + noise
    level' = level + slope + ·,   slope' = damping · slope + ·,   a season turns by 2πj/period a step + ·

States are in this order: level, slope, two a wave, the last `ar` values of the autoregression, weights. Parameters are
free numbers θ (N, k): standard deviations are |θ|, damping and partial correlations go with sin θ, so that their
bounds, where many are best, are reached in a few steps and not at infinity. Autoregressions stay stationary, as their
partial correlations stay within ±1 (Barndorff-Nielsen & Schou 1973).
Suffixes: N series, T time step, n state, k parameters, q parts that vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from stateline.classical import parts
from stateline.classical.model import StateSpace
from stateline.theory.covariance import lyapunov

#: Variance of what is not known of the start, in squared units of a scaled series.
PRIOR = 1e6
#: Variance of an observation that no parameter takes away: a series without any noise has no largest likelihood.
FLOOR = 1e-6
#: A slope that fades faster cannot be told from steps of the level, a slower one not from one that stays
#: (the usual range of exponential smoothing: Hyndman & Athanasopoulos 2021, section 8.2).
DAMPING = (0.8, 0.98)
TRENDS = ("none", "fixed", "walk", "damped")
#: The largest partial correlation: at 1 there is no stationary distribution to start in.
STABLE = 0.9999
LEVELS = ("fixed", "walk")
REGRESSORS = ("fixed", "walk")


@dataclass(frozen=True)
class Structure:
    """Which parts a series has. Data only; `StructuralModel` explains the choices."""

    level: str = "walk"
    trend: str = "none"
    seasonal: tuple[float, ...] = ()
    harmonics: int | None = None
    ar: int = 0
    transform: str = "none"
    regressors: str = "fixed"
    columns: int = 0

    def __str__(self) -> str:
        told = [f"level={self.level}", f"trend={self.trend}"] + [f"seasonal={p:g}" for p in self.seasonal]
        told += [f"ar={self.ar}"] * bool(self.ar) + [f"{self.columns} regressors, {self.regressors}"] * bool(
            self.columns
        )
        return ", ".join(told + ["log"] * (self.transform == "log"))

    @cached_property
    def waves(self) -> list[list[Tensor]]:
        """Steps of each season's waves, the longest first."""
        return [parts.season(period, self.harmonics) for period in self.seasonal]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many states each part has, in order."""
        slope, season = int(self.trend != "none"), sum(len(wave) for waves in self.waves for wave in waves)
        return {"level": 1, "slope": slope, "season": season, "ar": self.ar, "weights": self.columns}

    @property
    def n(self) -> int:
        """How many states there are."""
        return sum(self.sizes.values())

    @property
    def diffuse(self) -> int:
        """States of which nothing is known at the start: so many likelihood terms are left out."""
        return self.n - self.ar

    def where(self, part: str) -> slice:
        """The states of a part."""
        names = list(self.sizes)
        first = sum(self.sizes[name] for name in names[: names.index(part)])
        return slice(first, first + self.sizes[part])

    @cached_property
    def deviations(self) -> dict[str, list[int]]:
        """The states that each standard deviation drives, in the order of θ; that of the observation comes before."""
        found: dict[str, list[int]] = {}
        if self.level == "walk":
            found["level"] = [0]
        if self.trend in ("walk", "damped"):
            found["slope"] = [1]
        first = self.where("season").start
        for period, waves in zip(self.seasonal, self.waves, strict=True):
            size = sum(map(len, waves))
            found[f"season_{period:g}"] = list(range(first, first + size))
            first += size
        if self.ar:
            found["ar"] = [self.where("ar").start]
        if self.regressors == "walk":
            for i in range(self.columns):
                found[f"weight_{i}"] = [self.where("weights").start + i]
        return found

    @cached_property
    def names(self) -> list[str]:
        """What each of the k parameters is."""
        damping = ["damping"] if self.trend == "damped" else []
        return ["noise", *self.deviations, *damping, *(f"ar_{i + 1}" for i in range(self.ar))]

    @cached_property
    def _blocks(self) -> list[Tensor]:
        """What adds up to y, before parameters: level and slope, waves, autoregression."""
        one = torch.ones((), dtype=torch.float64)
        level = one[None, None] if self.trend == "none" else parts.trend(0 * one if self.trend == "damped" else one)
        return [level, *(wave for waves in self.waves for wave in waves), parts.companion(one.new_zeros(self.ar))][
            : None if self.ar else -1
        ]

    @cached_property
    def _constant(self) -> Tensor:
        """A (n, n) without what parameters decide."""
        return torch.block_diag(*self._blocks, torch.eye(self.columns, dtype=torch.float64))

    @cached_property
    def seen(self) -> Tensor:
        """C (n), weights of regressors 0."""
        return torch.nn.functional.pad(parts.shown(self._blocks)[0], (0, self.columns))

    @cached_property
    def _driven(self) -> Tensor:
        """(q, n): which states each deviation drives."""
        table = torch.zeros(len(self.deviations), self.n, dtype=torch.float64)
        for i, states in enumerate(self.deviations.values()):
            table[i, states] = 1
        return table

    def values(self, theta: Tensor) -> dict[str, Tensor]:
        """What the parameters (N, k) mean: variances of "noise" and each part, "damping", coefficients "ar" (N, p)."""
        q = len(self.deviations)
        found = {"noise": theta[:, 0] ** 2 + FLOOR}
        found |= {name: theta[:, 1 + i] ** 2 for i, name in enumerate(self.deviations)}
        if self.trend == "damped":
            low, high = DAMPING
            found["damping"] = (low + high) / 2 + (high - low) / 2 * torch.sin(theta[:, 1 + q])
        if self.ar:
            found["coefficients"] = _autoregression(STABLE * torch.sin(theta[:, theta.shape[1] - self.ar :]))
        return found

    def exact(self, theta: Tensor) -> Tensor:
        """(N): whether all variances went to the border; what is left, FLOOR, says nothing of the series."""
        return (theta[:, : 1 + len(self.deviations)] ** 2).sum(1) < FLOOR

    def model(self, theta: Tensor, X: Tensor | None = None) -> StateSpace:
        """The models of N series with parameters (N, k) and scaled regressors X (N, T, columns); differentiable."""
        N, n = theta.shape[0], self.n
        values = self.values(theta)
        A = self._constant.expand(N, n, n)
        if self.trend == "damped":
            A = A + values["damping"][:, None, None] * _unit(n, 1, 1)
        if self.ar:
            at = self.where("ar").start
            rows = torch.stack([_unit(n, at, at + i).flatten() for i in range(self.ar)])
            A = A + (values["coefficients"] @ rows).reshape(N, n, n)
        variances = theta[:, 1 : 1 + len(self.deviations)] ** 2 @ self._driven
        Q = torch.diag_embed(variances)
        return StateSpace(
            A[:, None], None, self._observed(N, X), None, Q[:, None], values["noise"][:, None, None, None],
            theta.new_zeros(n), self._start(A, Q),
        )  # fmt: skip

    def _observed(self, N: int, X: Tensor | None) -> Tensor:
        if X is None:
            return self.seen[None, None, None]
        T = X.shape[1]
        return torch.cat([self.seen[: self.n - self.columns].expand(N, T, -1), X], -1)[:, :, None]

    def _start(self, A: Tensor, Q: Tensor) -> Tensor:
        """P0 (N, n, n): the autoregression in its stationary distribution, PRIOR for all else."""
        n, at = self.n, self.where("ar")
        P = PRIOR * torch.eye(n, dtype=A.dtype)
        P[at, at] = 0
        if not self.ar:
            return P.expand(len(A), n, n)
        block = lyapunov(A[:, at, at], Q[:, at, at])
        return P + torch.nn.functional.pad(block, (at.start, n - at.stop, at.start, n - at.stop))

    def starts(self) -> Tensor:
        """Points (s, k) to begin a search from, of which each series takes the likeliest."""
        rows = []
        for (noise, level, slope, season, cycle), partial in product(SHAPES, PARTIAL if self.ar else [()]):
            row = [noise]
            for name in self.deviations:
                kind = name.split("_")[0]
                row.append({"level": level, "slope": slope, "season": season, "ar": cycle, "weight": 0.05}[kind])
            ar = [*partial, *[0.0] * self.ar][: self.ar]
            rows.append([*row, *[0.5] * (self.trend == "damped"), *ar])
        return torch.unique(torch.tensor(rows, dtype=torch.float64), dim=0)


#: Deviations of noise, level, slope, season and autoregression to begin from, in units of a typical change.
SHAPES = (
    (0.1, 0.8, 0.05, 0.05, 0.3), (0.6, 0.3, 0.05, 0.05, 0.3), (0.3, 0.1, 0.4, 0.05, 0.6), (0.8, 0.1, 0.02, 0.02, 0.1),
    (0.1, 0.1, 0.8, 0.2, 0.8), (2.0, 0.8, 0.2, 0.2, 0.5), (0.3, 2.0, 0.2, 0.5, 2.0),
)  # fmt: skip

#: First partial correlations to begin from, as angles: slow, swinging, alternating, of every other step.
PARTIAL = ((0.7,), (0.7, -0.7), (-0.7,), (0.0, 1.0))


def _unit(n: int, i: int, j: int) -> Tensor:
    M = torch.zeros(n, n, dtype=torch.float64)
    M[i, j] = 1
    return M


def _autoregression(partial: Tensor) -> Tensor:
    """Coefficients (N, p) from partial correlations (N, p), by Durbin and Levinson."""
    found = partial[:, :1]
    for i in range(1, partial.shape[1]):
        last = partial[:, i : i + 1]
        found = torch.cat([found - last * found.flip(1), last], 1)
    return found
