"""Standard models by their closed forms, and models made of models by the moments of what they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, signal
from test_classical_model import F64, REFERENCE, close, dense_moments, some_model
from torch import Tensor
from torch.autograd import gradcheck

from stateline.classical import components, parts
from stateline.classical.components import (
    arma,
    constant_acceleration,
    constant_velocity,
    local_level,
    local_trend,
    oscillator,
    seasonal,
    side_by_side,
    stationary_covariance,
    sum_of,
)
from stateline.classical.model import StateSpace, check, simulate, validate


def test_moving_points_have_their_closed_form() -> None:
    dt, q = 0.7, 0.3
    velocity = constant_velocity(dt, q, noise=2.0, space=3)
    one = (
        torch.tensor([[1, dt], [0, 1]], dtype=F64),
        q * torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=F64),
    )
    close(velocity.A, torch.block_diag(*[one[0]] * 3), 1e-14)
    close(velocity.Q, torch.block_diag(*[one[1]] * 3), 1e-14)
    close(velocity.C, torch.eye(6)[::2], 0)
    close(velocity.R, 2 * torch.eye(3), 0)
    acceleration = constant_acceleration(dt, q, space=1)
    powers = [
        [dt ** (5 - i - j) / ((5 - i - j) * math.factorial(2 - i) * math.factorial(2 - j)) for j in range(3)]
        for i in range(3)
    ]
    close(acceleration.Q, q * torch.tensor(powers, dtype=F64), 1e-14)
    close(acceleration.A, [[1, dt, dt**2 / 2], [0, 1, dt], [0, 0, 1]], 1e-14)


def test_irregular_moving_points() -> None:
    dt = torch.rand(2, 5) + 0.1
    got = constant_velocity(dt, 0.3, space=2)
    assert got.A.shape == (2, 5, 4, 4)
    assert check("f", got).batch == (2,)
    alone = constant_velocity(float(dt[1, 3]), 0.3, space=2)
    close(got.A[1, 3], alone.A, 1e-14)
    close(got.Q[1, 3], alone.Q, 1e-14)


@pytest.mark.parametrize(
    ("period", "form", "n"), [(4, "dummy", 3), (2, "dummy", 1), (12, "trigonometric", 11), (7, "trigonometric", 6)]
)
def test_seasons_repeat_and_sum_to_zero(period: int, form: str, n: int) -> None:
    x = seasonal(period, 0.1, form=form)
    assert validate(x)[:2] == (n, 1)
    moved = (
        torch.eye(n, dtype=F64) if form == "trigonometric" else torch.eye(n, 1, dtype=F64) @ torch.eye(1, n, dtype=F64)
    )
    close(x.Q, 0.1 * moved, 0)  # a dummy season's new value is all that is uncertain
    _, y = simulate(x._replace(m0=torch.randn(n, dtype=F64)), 3 * period, noise=False)
    close(y[:period], y[period : 2 * period], 1e-11)
    close(y[:period].sum(), 0.0, 1e-11)
    assert torch.linalg.matrix_rank(torch.stack([x.C @ torch.linalg.matrix_power(x.A, k) for k in range(n)])[:, 0]) == n


def test_seasons_of_any_length() -> None:
    x = seasonal(365.25, 0.1, harmonics=3)
    assert x.A.shape == (6, 6)
    _, y = simulate(x._replace(m0=torch.randn(6, dtype=F64)), 1462, noise=False)
    close(y[0], y[1461], 1e-10)  # four years of 365.25 days
    with pytest.raises(ValueError, match=r"seasonal: harmonics is 7, expected a whole number at least 1 and at most 6"):
        seasonal(12, 0.1, harmonics=7)
    with pytest.raises(TypeError, match=r"seasonal: period is 6\.5, expected a whole number"):
        seasonal(6.5, 0.1, form="dummy")


def covariances(x: StateSpace, lags: int) -> Tensor:
    """C Aᵏ P0 Cᵀ, those of a stationary series."""
    return torch.stack([(x.C @ torch.linalg.matrix_power(x.A, k) @ x.P0 @ x.C.mT)[0, 0] for k in range(lags)])


@pytest.mark.parametrize(
    ("ar", "ma"), [([0.5, -0.3], []), ([], [0.8, 0.2]), ([0.9], [0.4, -0.2, 0.1]), ([0.3, 0.2, -0.4], [0.5])]
)
def test_arma_has_the_covariances_of_its_sums(ar: list[float], ma: list[float]) -> None:
    """Of y = Σ ψ[k] e[t-k], the weights by filtering an impulse."""
    x = arma(ar, ma, variance=2.0)
    weights = signal.lfilter([1, *ma], [1, *[-a for a in ar]], np.eye(1, 600)[0])
    expected = [2.0 * float(np.dot(weights[: 600 - k], weights[k:])) for k in range(5)]
    close(covariances(x, 5), expected, 1e-12)
    close(x.A @ x.P0 @ x.A.mT + x.Q, x.P0, 1e-13)


def test_arma_of_many_series() -> None:
    x = arma(torch.tensor([[0.5], [0.9]]), ma=[0.3], variance=torch.tensor([1.0, 2.0]))
    assert check("f", x).batch == (2,)
    for i, a in enumerate((0.5, 0.9)):
        alone = arma(torch.tensor([a]), ma=[0.3], variance=1.0 + i)
        close(x.A[i, 0], alone.A, 1e-14)
        close(x.P0[i], alone.P0, 1e-12)
    with pytest.raises(ValueError, match=r"arma: ar makes a root of modulus 1, expected below 1"):
        arma([1.0])


def test_a_stationary_covariance_beside_scipy() -> None:
    A = torch.randn(4, 4, dtype=F64)
    A = 0.999 * A / torch.linalg.eigvals(A).abs().max()
    expected = linalg.solve_discrete_lyapunov(A.numpy(), np.eye(4))
    got = stationary_covariance(A, torch.eye(4, dtype=F64))
    close(got / expected.max(), expected / expected.max(), 1e-11)
    reference = REFERENCE["gramians"]
    close(
        stationary_covariance(torch.tensor(reference["A"], dtype=F64), torch.eye(3, dtype=F64)),
        reference["stationary_covariance"],
    )
    small = (0.3 * A).requires_grad_()
    assert gradcheck(lambda a: stationary_covariance(a, torch.eye(4, dtype=F64)), [small])
    with pytest.raises(ValueError, match="A is not stable"):
        stationary_covariance(torch.eye(1), torch.eye(1))


def test_oscillators_and_trends() -> None:
    wave = oscillator(8.0, 0.2, damping=0.9)
    _, y = simulate(wave._replace(m0=torch.tensor([1.0, 0.0], dtype=F64)), 17, noise=False)
    close(y[:, 0], [0.9**t * math.cos(2 * math.pi * t / 8) for t in range(17)], 1e-14)
    close(stationary_covariance(wave.A, wave.Q), wave.P0, 1e-12)
    assert oscillator(8.0, 0.2).P0[0, 0] == components.PRIOR
    with pytest.raises(ValueError, match=r"oscillator: period is 2, expected above 2"):
        oscillator(2.0, 1.0)
    trend = local_trend(0.1, 0.2, damping=0.5)._replace(m0=torch.tensor([3.0, 1.0], dtype=F64))
    close(simulate(trend, 5, noise=False)[1][:, 0], [3.0, 4.0, 4.5, 4.75, 4.875], 0)
    with pytest.raises(ValueError, match=r"local_trend: damping is 1\.5, expected in \(0, 1\]"):
        local_trend(0.1, 0.1, damping=1.5)
    with pytest.raises(ValueError, match=r"local_level: level is -1, expected at least 0"):
        local_level(torch.tensor([1.0, -1.0]))


def test_a_model_each_for_many_series() -> None:
    level, noise = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.5, requires_grad=True)
    x = sum_of(local_trend(level, 0.1, damping=torch.tensor([0.5, 0.6, 0.7])), seasonal(4, level), noise=noise)
    assert check("f", x).batch == (3,)
    assert validate(x)[:3] == (5, 1, 0)
    for i in range(3):
        alone = sum_of(local_trend(1.0 + i, 0.1, damping=0.5 + 0.1 * i), seasonal(4, 1.0 + i), noise=0.5)
        for name in ("A", "Q", "P0"):
            got, expected = getattr(x, name), getattr(alone, name)
            close(got[i].reshape(5, 5) if got.dim() > 2 else got, expected, 1e-7)
    x.R.sum().backward()
    assert noise.grad == 1


def test_the_sum_of_models_is_the_model_of_the_sum() -> None:
    first, second = some_model(2, 2, 2), some_model(3, 2, 2)
    u = torch.randn(5, 2, dtype=F64)
    moments = [dense_moments(x, 5, u) for x in (first, second, sum_of(first, second))]
    for one, two, both in zip(*moments, strict=True):
        close(both, one + two, 1e-11)
    without = sum_of(first, second._replace(B=None, D=None), noise=0.5)
    close(dense_moments(without, 5, u)[0], moments[0][0] + dense_moments(second, 5)[0], 1e-11)
    close(without.R, first.R + second.R + 0.5 * torch.eye(2), 1e-14)


def test_models_side_by_side_do_not_touch() -> None:
    first, second = some_model(2, 2, 2), some_model(3, 1, 1)
    u = torch.randn(4, 3, dtype=F64)
    x = side_by_side(first, second)
    assert validate(x)[:3] == (5, 3, 3)
    mean, cov = dense_moments(x, 4, u)
    mean, cov = mean.unflatten(0, (4, 3)), cov.unflatten(0, (4, 3)).unflatten(2, (4, 3))
    for alone, seen, drive in ((first, slice(0, 2), u[:, :2]), (second, slice(2, 3), u[:, 2:])):
        expected = dense_moments(alone, 4, drive)
        close(mean[:, seen].flatten(), expected[0], 1e-11)
        close(cov[:, seen, :, seen].flatten(2, 3).flatten(0, 1), expected[1], 1e-11)
    assert cov[:, :2, :, 2:].abs().max() == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sum_of(), r"sum_of: no models were given"),
        (
            lambda: sum_of(local_level(1.0), constant_velocity(1.0, 1.0)),
            r"sum_of: part 1 has 2 observations, part 0 has 1",
        ),
        (lambda: sum_of(some_model(p=2), some_model(p=1)), r"sum_of: part 1 has 1 inputs, another has 2"),
        (
            lambda: sum_of(local_level(1.0), local_level(1.0, dtype=torch.float32)),
            r"part 1 is float32, expected one of float64",
        ),
        (lambda: local_level(torch.ones(2, 2)), r"local_level: level has shape \(2, 2\), expected \(\) or \(N\)"),
        (lambda: arma(torch.ones(1, 1, 1)), r"arma: ar has shape \(1, 1, 1\), expected \(p\) or \(N, p\)"),
        (lambda: seasonal(4, 1.0, form="dummy", harmonics=1), r"seasonal: harmonics is 1, and a dummy season has none"),
        (lambda: constant_velocity(torch.tensor([1.0, 0.0]), 1.0), r"discretize: dt has values that are not above 0"),
    ],
)
def test_components_refuse(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_drifts_leave_after_a_step_what_steps_leave() -> None:
    """The same share of a slope, and the same wave."""
    kept = torch.tensor([1.0, 0.9, 0.3], dtype=torch.float64)
    left = torch.linalg.matrix_exp(parts.trend(kept, continuous=True))
    torch.testing.assert_close(left[:, 1], parts.trend(kept)[:, 1])
    torch.testing.assert_close(left[0], parts.trend(kept)[0])  # nothing fades: a slope is added whole
    angle = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.linalg.matrix_exp(parts.wave(angle, kept, continuous=True)), parts.wave(angle, kept)
    )
    steps, drifts = parts.season(4), parts.season(4, continuous=True)
    assert [len(block) for block in steps] == [2, 1]
    assert [len(block) for block in drifts] == [2, 2]
    torch.testing.assert_close(torch.linalg.matrix_exp(drifts[1])[0, 0], steps[1][0, 0])
