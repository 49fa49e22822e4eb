"""Numbers without limits, (G, k), that stand for the learned parts of G models: 0 is the start.

A, B, C, D and m0 move by their own entries, in units of the start's size. A covariance without frozen entries is
F M Mᵀ Fᵀ with the start F Fᵀ and M lower triangular, its diagonal an exponential: it stays positive semidefinite and
in the start's range, also where that is singular. Parts of it that no entry connects are blocks of their own. In a
block of which only some entries are frozen, variances are exponentials and the others move as they are; where that is
no covariance, there is no value. A that stays stable is L K L⁻¹ with ‖K‖ < 1, which every stable matrix is.

Suffixes: G model (each learned part has G or 1), k parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.model import StateSpace
from stateline.theory.covariance import lyapunov, spectral_root

COVARIANCES = ("Q", "R", "P0")


class Block(NamedTuple):
    """Indices of a covariance that its entries connect, and which of their entries are free."""

    at: list[int]
    free: Tensor

    @property
    def whole(self) -> bool:
        """Whether none of its entries is frozen."""
        return bool(self.free.all())


def blocks(cov: Tensor, free: Tensor) -> list[Block]:
    """The blocks of covariances (G, n, n) that have free entries (n, n); frozen zeros connect nothing."""
    linked = free | (cov != 0).any(0)
    left, found = list(range(len(free))), []
    while left:
        group, queue = [], [left[0]]
        while queue:
            i = queue.pop()
            if i in left:
                left.remove(i)
                group.append(i)
                queue += [j for j in left if bool(linked[i, j])]
        group.sort()
        inside = free[group][:, group]
        if bool(inside.any()):
            found.append(Block(group, inside))
    return found


def root(cov: Tensor) -> Tensor:
    """F (G, n, n) with F Fᵀ = cov; where one is singular, columns of zeros come last."""
    L, problem = torch.linalg.cholesky_ex(cov)
    return torch.where((problem != 0)[:, None, None], spectral_root(cov), L) if bool(problem.any()) else L


class Entries:
    """Free entries of a matrix, moved in units of its size."""

    def __init__(self, start: Tensor, free: Tensor) -> None:
        self.start, (self.rows, self.columns) = start, free.nonzero(as_tuple=True)
        self.count = len(self.rows)
        entries = start[:, self.rows, self.columns].abs()
        typical = start.abs().mean((-1, -2), keepdim=True)[..., 0]
        size = torch.maximum(entries, typical)
        self.scale = torch.where(size > 0, size, 1.0)
        self.moves = torch.ones(len(start), self.count, dtype=torch.bool)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        start, scale = of(self.start, rows), of(self.scale, rows)
        flat = start.flatten(1).expand(len(x), -1)
        at = self.rows * start.shape[-1] + self.columns
        return flat.index_add(1, at, x * scale).unflatten(1, start.shape[1:]), None


class Covariance:
    """Free blocks of a covariance."""

    def __init__(self, op: str, name: str, start: Tensor, free: Tensor) -> None:
        self.start, self.blocks, self.roots = start, blocks(start, free), []
        moves = []
        for block in self.blocks:
            part = start[:, block.at][:, :, block.at]
            if block.whole:
                F = root(part)
                self.roots.append(F)
                moves.append((F != 0).any(-2)[:, torch.tril_indices(*block.free.shape)[0]])
                continue
            if bool(torch.linalg.cholesky_ex(part)[1].any()):
                problem = f"{name} is singular in a block of which some entries are frozen (rows {block.at})"
                raise checks.fail(op, f"{problem}.", "Freeze the whole block or none of it, or start inside.")
            self.roots.append(part)
            moves.append(torch.ones(len(start), int(block.free.tril().sum()), dtype=torch.bool))
        self.moves = torch.cat(moves, 1) if moves else torch.zeros(len(start), 0, dtype=torch.bool)
        self.count = self.moves.shape[1]

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        whole, bad, first = of(self.start, rows).expand(len(x), -1, -1).clone(), None, 0
        for block, kept in zip(self.blocks, self.roots, strict=True):
            i, j = block.free.tril().nonzero(as_tuple=True)
            part = x[:, first : first + len(i)]
            first += len(i)
            kept, at = of(kept, rows), torch.tensor(block.at)
            if block.whole:
                M = _triangle(part, i, j, len(block.at))
                F = kept @ M
                made = F @ F.mT
            else:
                size = kept.diagonal(dim1=-2, dim2=-1).sqrt()
                diagonal = i == j
                now = kept[:, i, j]
                moved = torch.where(diagonal, now * part.exp(), now + part * size[:, i] * size[:, j])
                made = kept.expand(len(x), -1, -1).clone()
                made[:, i, j] = moved
                made[:, j, i] = moved
                failed = torch.linalg.cholesky_ex(made.detach())[1] != 0
                bad = failed if bad is None else bad | failed
            whole[:, at[:, None], at] = made
        return whole, bad


class StableA:
    """All stable matrices: L K L⁻¹, K = V G⁻ᵀ with G Gᵀ = I + Vᵀ V, so that Kᵀ K = I − G⁻¹ G⁻ᵀ; L, V are free."""

    def __init__(self, op: str, start: Tensor) -> None:
        n = start.shape[-1]
        self.n, self.count = n, n * n + n * (n + 1) // 2
        radius = float(torch.linalg.eigvals(start).abs().max())
        if radius >= 1:
            remedy = f"Start from one that is, for example A · {0.99 / radius:.4g}."
            raise checks.fail(op, f"stable=True, and the start's A has spectral radius {radius:.6g}.", remedy)
        eye = torch.eye(n, dtype=start.dtype)
        self.L = torch.linalg.cholesky(lyapunov(start, eye))
        K = torch.linalg.solve_triangular(self.L, start @ self.L, upper=False)
        E = torch.linalg.cholesky(eye - K.mT @ K)
        self.V = torch.linalg.solve_triangular(E, K.mT, upper=False).mT  # K E⁻ᵀ
        self.moves = torch.ones(len(start), self.count, dtype=torch.bool)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        n, i = self.n, torch.tril_indices(self.n, self.n)
        L, V = of(self.L, rows), of(self.V, rows) + x[:, : n * n].unflatten(1, (n, n))
        L = L @ _triangle(x[:, n * n :], i[0], i[1], n)
        G = torch.linalg.cholesky(torch.eye(n, dtype=x.dtype) + V.mT @ V)
        K = torch.linalg.solve_triangular(G, V.mT, upper=False).mT  # V G⁻ᵀ: Kᵀ K = I − G⁻¹ G⁻ᵀ
        return _divide(L @ K, L), None


def _divide(X: Tensor, L: Tensor) -> Tensor:
    """X L⁻¹, L lower triangular."""
    return torch.linalg.solve_triangular(L.mT, X.mT, upper=True).mT


def _triangle(x: Tensor, i: Tensor, j: Tensor, n: int) -> Tensor:
    """M (G, n, n), lower triangular, exp(x) on its diagonal."""
    M = x.new_zeros(len(x), n, n)
    M[:, i, j] = torch.where(i == j, x.exp(), x)
    return M


def of(v: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor that has one for each model, or one for all."""
    return v if len(v) == 1 else v[rows]


class Parameters:
    """What x (G, k) stands for; call it for the parts and which models are none (bad)."""

    def __init__(
        self, op: str, model: StateSpace, learn: tuple[str, ...], free: Mapping[str, Tensor], stable: bool
    ) -> None:
        self.model, self.parts = model, {}
        for name in learn:
            start = getattr(model, name)
            start = start[:, 0] if start.dim() == 4 else start
            self.parts[name] = self._part(op, name, start, free[name], stable)
        self.count = sum(part.count for part in self.parts.values())

    @staticmethod
    def _part(op: str, name: str, start: Tensor, free: Tensor, stable: bool) -> Any:
        if name in COVARIANCES:
            return Covariance(op, name, start, free)
        if name == "m0":
            return Entries(start[:, None], free[None])
        return StableA(op, start) if name == "A" and stable else Entries(start, free)

    def start(self, G: int) -> Tensor:
        """x of the start, (G, k)."""
        return self.model.A.new_zeros(G, self.count)

    def moves(self, G: int) -> Tensor:
        """Which parameters (G, k) change anything."""
        return torch.cat([part.moves.expand(G, -1) for part in self.parts.values()], 1)

    def __call__(self, x: Tensor, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each learned part (G, …), and bad (G)."""
        made, bad, first = {}, torch.zeros(len(x), dtype=torch.bool), 0
        for name, part in self.parts.items():
            made[name], failed = part(x[:, first : first + part.count], rows)
            first += part.count
            bad = bad if failed is None else bad | failed
        return {name: v[:, 0] if name == "m0" else v for name, v in made.items()}, bad
