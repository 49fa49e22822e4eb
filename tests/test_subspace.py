"""Subspace identification: systems without noise come back, refusals, and a start that `fit` goes on from."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from test_learn import F64, data, loglik, system
from torch import Tensor

from stateline.classical import FitOptions, StateSpace, fit, n4sid, simulate


def test_n4sid_finds_a_system_without_noise() -> None:
    truth = system(n=3, m=2, p=2)
    truth = truth._replace(Q=0 * truth.Q, R=0 * truth.R, D=None)
    u = torch.randn(3, 300, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = simulate(truth, 300, u, noise=False)[1]
    found = n4sid(y, u, order=3, block_rows=6)
    assert found.suggested_order == 3
    markov = [[m.C @ torch.linalg.matrix_power(m.A, k) @ m.B for k in range(5)] for m in (truth, found.model)]
    torch.testing.assert_close(torch.stack(markov[1]), torch.stack(markov[0]), rtol=1e-6, atol=1e-6)
    with_D = truth._replace(D=torch.ones(2, 2, dtype=F64))
    again = n4sid(simulate(with_D, 300, u, noise=False)[1], u, order=3, block_rows=6, feedthrough=True)
    torch.testing.assert_close(again.model.D, with_D.D, rtol=1e-6, atol=1e-6)


def test_n4sid_starts_fit() -> None:
    truth = system(n=2, m=1, p=1, seed=3)._replace(D=None)
    y, u = data(truth, N=2, T=200, gaps=False)
    start = n4sid(y, u, order=2, stable=True).model
    found = fit(
        start,
        y,
        u,
        learn=("A", "B", "C", "Q", "R"),
        method="lbfgs",
        steps=80,
        options=FitOptions(errors=False, stable=True),
    )
    assert found.loglik[-1] > loglik(truth, y, u).sum() - 1
    assert found.loglik[-1] > found.loglik[0]


def coloured(steps: int, noise: float = 1e-2) -> tuple[StateSpace, Tensor, Tensor]:
    """A system, inputs that tell much of their own future, and what they make of it."""
    truth = system(n=2, m=1, p=1, seed=3)
    truth = truth._replace(D=None, Q=noise**2 * truth.Q, R=noise * truth.R)
    generator, u = torch.Generator().manual_seed(0), [torch.zeros(1, dtype=F64)]
    for _ in range(steps - 1):
        u.append(0.98 * u[-1] + 0.2 * torch.randn(1, dtype=F64, generator=generator))
    inputs = torch.stack(u)
    return truth, simulate(truth, steps, inputs, generator=generator)[1], inputs


def test_singular_values_are_correlations_given_future_inputs() -> None:
    """Of past and future, by the inverse covariance of all that is not asked about (Anderson 2003, chapter 12)."""
    _, y, u = coloured(400, noise=1.0)
    i, columns = 3, range(400 - 2 * 3 + 1)
    past, future, ahead = (
        torch.stack([torch.cat([v[t + a : t + a + i].flatten() for v in parts]) for t in columns])
        for parts, a in (((y, u), 0), ((y,), i), ((u,), i))
    )
    cov = torch.cat([past, future, ahead], 1)
    cov = cov.mT @ cov
    given = torch.linalg.inv(torch.linalg.inv(cov)[:9, :9])  # 6 of the past and 3 of the future
    roots = [torch.linalg.inv(torch.linalg.cholesky(part)) for part in (given[:6, :6], given[6:, 6:])]
    wanted = torch.linalg.svdvals(roots[0] @ given[:6, 6:] @ roots[1].mT)
    assert wanted[0] < 0.99
    torch.testing.assert_close(n4sid(y, u, block_rows=i).singular_values, wanted, rtol=1e-6, atol=1e-8)


def test_future_inputs_are_projected_out() -> None:
    """Inputs that tell of their own future would pass for states that tell of the future of y."""
    truth, y, inputs = coloured(3000)
    found = n4sid(y, inputs, order=2, block_rows=8)
    markov = [[(m.C @ torch.linalg.matrix_power(m.A, k) @ m.B).item() for k in range(6)] for m in (truth, found.model)]
    error = torch.tensor(markov[1]) - torch.tensor(markov[0])
    assert error.norm() < 0.05 * torch.tensor(markov[0]).norm()


def test_a_column_that_repeats_another_leaves_the_suggested_order() -> None:
    _, y, u = coloured(2000, noise=0.1)
    alone = n4sid(y, u)
    assert alone.suggested_order == n4sid(torch.cat([y, y], 1), u).suggested_order == 2
    assert n4sid(y, order=3).suggested_order == n4sid(torch.cat([y, 2 * y], 1), order=3).suggested_order


def test_means_are_taken_away_and_told() -> None:
    truth = system(n=2, m=1, p=1, seed=3)._replace(D=None)
    u = torch.randn(2000, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = simulate(truth, 2000, u, generator=torch.Generator().manual_seed(1))[1]
    plain = n4sid(y, u, order=2, centre=True)
    moved = n4sid(y + 100, u - 30, order=2, centre=True)
    torch.testing.assert_close(moved.y_mean, plain.y_mean + 100)
    torch.testing.assert_close(moved.u_mean, plain.u_mean - 30)
    markov = [[(m.model.C @ m.model.A @ m.model.B).item(), torch.linalg.det(m.model.A).item()] for m in (plain, moved)]
    assert markov[0] == pytest.approx(markov[1], rel=1e-6)
    bent = n4sid(y + 100, u - 30, order=2)
    assert torch.equal(bent.y_mean, torch.zeros(1, dtype=F64))
    slowest = [torch.linalg.eigvals(m.model.A).abs().max().item() for m in (plain, bent)]
    assert slowest[1] > 0.97 > 0.9 > slowest[0]  # a state that nearly stands still holds the offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_rounding_tells_apart_are_dependent(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y, u = (torch.randn(300, 1, dtype=dtype, generator=generator) for _ in range(2))
    with pytest.raises(ValueError, match="dependent"):
        n4sid(y, torch.cat([u, u / 3], 1), order=1, block_rows=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.full((300, 1), float("nan"), dtype=F64)}, "missing"),
        ({"y": torch.zeros(4, 1, dtype=F64), "u": None}, "too short"),
        ({"u": torch.ones(300, 1, dtype=F64)}, "dependent"),
        ({"order": 6, "block_rows": 5}, "order"),
        ({"block_rows": 100}, "block_rows"),
        ({"u": None, "feedthrough": True}, "feedthrough=True, and there are no inputs u"),
        ({"y": torch.zeros(300, 1, dtype=F64), "u": None}, "y stays at 0"),
        ({"u": torch.ones(299, 1, dtype=F64)}, r"y has shape \(300, 1\), u has shape \(299, 1\), .* steps alike"),
        ({"y": torch.ones(300, dtype=F64)}, r"y has shape \(300,\), .* One value a step is y\[:, None\]"),
    ],
)  # fmt: skip
def test_n4sid_refuses(change: dict[str, Any], message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {"y": torch.randn(300, 1, dtype=F64, generator=generator)}
    given["u"] = torch.randn(300, 1, dtype=F64, generator=generator)
    with pytest.raises(ValueError, match=message):
        n4sid(**(given | change))


def test_examples_of_the_docstring() -> None:
    failed, tried = doctest.testmod(importlib.import_module("stateline.classical.subspace"))
    assert tried > 0
    assert failed == 0
