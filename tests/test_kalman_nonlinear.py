"""Extended and unscented filters: the Kalman filter where functions are linear, numerical integration where not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stateline.classical import (
    KalmanState,
    NonlinearModel,
    StateSpace,
    extended_kalman_filter,
    forecast,
    kalman_filter,
    simulate,
    unscented_kalman_filter,
)

F64 = torch.float64
FILTERS = [extended_kalman_filter, unscented_kalman_filter]
Filter = Callable[..., Any]


def linear() -> tuple[StateSpace, NonlinearModel, Tensor, Tensor]:
    A = torch.tensor([[1.0, 0.5], [-0.2, 0.8]], dtype=F64)
    B, C, D = torch.randn(2, 1, dtype=F64), torch.randn(3, 2, dtype=F64), torch.randn(3, 1, dtype=F64)
    I = torch.eye(3, dtype=F64)  # the papers' notation
    model = StateSpace(A, B, C, D, 0.1 * I[:2, :2], 0.3 * I, torch.ones(2, dtype=F64), I[:2, :2])
    same = NonlinearModel(lambda h, u: A @ h + B @ u, lambda h, u: C @ h + D @ u, model.Q, model.R, model.m0, model.P0)
    u = torch.randn(4, 12, 1, dtype=F64)
    _, y = simulate(model, 12, u)
    return model, same, torch.where(torch.rand(y.shape) < 0.3, torch.nan, y), u


@pytest.mark.parametrize("run", FILTERS)
def test_linear_functions_give_the_kalman_filter(run: Filter) -> None:
    model, same, y, u = linear()
    wanted, last = kalman_filter(model, y, u)
    got, state = run(same, y, u)
    for name, a, b in zip(wanted._fields[:5], got, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(state.cov, last.cov.contiguous(), rtol=1e-10, atol=1e-10)
    first, middle = run(same, y[:, :5], u[:, :5])
    second, end = run(same, y[:, 5:], u[:, 5:], initial_state=middle)
    torch.testing.assert_close(torch.cat([first.mean, second.mean], 1), got.mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(end.mean, state.mean)
    assert run(same, y[:, :0], u[:, :0])[0].mean.shape == (4, 0, 2)


@pytest.mark.parametrize("run", FILTERS)
def test_nothing_seen_is_a_forecast(run: Filter) -> None:
    model, same, y, u = linear()
    _, state = run(same, y, u)
    wanted = forecast(model, state, 5, u[:, :5])
    ahead, _ = run(same, torch.full((4, 5, 3), torch.nan, dtype=F64), u[:, :5], initial_state=state)
    torch.testing.assert_close(ahead.mean, wanted.state_mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ahead.cov, wanted.state_cov, rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match=r"extended_kalman_filter with initial_state=state and a y \(steps, m\) of NaN"):
        forecast(same, state, 5, u[:, :5])  # type: ignore[arg-type]  # wrong


@pytest.mark.parametrize("run", FILTERS)
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda h, u: np.sin(h), "raised RuntimeError"),
        (lambda h, u: h if h[0] > 0 else -h, "raised RuntimeError"),
        (lambda h, u: float(h[0]) * h, "raised RuntimeError"),
        (lambda h: h, "raised TypeError .* takes 1 positional argument"),
        (lambda h, u: [h[0], h[1]], "returns a list, expected a tensor, as torch.stack"),
    ],
)
def test_a_function_that_torch_cannot_run_is_told_the_rules(run: Filter, function: Any, problem: str) -> None:
    _, same, y, u = linear()
    for name in ("transition", "observation"):
        rules = (
            r"It gets tensors, h \(2,\) and u \(1,\), and runs under torch\.func: torch functions only.*torch\.where"
        )
        with pytest.raises((ValueError, TypeError), match=f"{run.__name__}: {name} {problem}.* {rules}") as told:
            run(dataclasses.replace(same, **{name: function}), y, u)
        assert (told.value.__cause__ is not None) == ("raised" in problem)
    with pytest.raises(ValueError, match=r"missing 1 required positional argument.* h \(2,\) alone, as there is no u"):
        run(same, y)


@pytest.mark.parametrize("run", FILTERS)
def test_a_curved_sensor_against_integration_on_a_grid(run: Filter) -> None:
    """A walk seen through its exponential: close to the exact posterior where the state is well known."""
    one = torch.ones(1, 1, dtype=F64)
    model = NonlinearModel(lambda h: 0.95 * h, torch.exp, 0.01 * one, 0.1 * one, 0.5 * one[0], 0.01 * one)
    h, ys = torch.tensor([0.6], dtype=F64), []
    for _ in range(30):
        ys.append(h.exp() + 0.1**0.5 * torch.randn(1, dtype=F64))
        h = 0.95 * h + 0.1 * torch.randn(1, dtype=F64)
    y = torch.stack(ys)
    y[4] = torch.nan
    out, _ = run(model, y)
    grid = torch.linspace(-3, 3, 3001, dtype=F64)
    p = torch.exp(-((grid - 0.5) ** 2) / 0.02)
    move = torch.exp(-((grid[:, None] - 0.95 * grid) ** 2) / 0.02)
    for t in range(30):
        if not torch.isnan(y[t]):
            p = p * torch.exp(-((y[t] - grid.exp()) ** 2) / 0.2)
        p = p / p.sum()
        mean = (p * grid).sum()
        deviation = (p * (grid - mean) ** 2).sum().sqrt()
        assert abs(out.mean[t, 0] - mean) < 0.25 * deviation
        assert abs(out.cov[t, 0, 0].sqrt() / deviation - 1) < 0.1
        p = move @ p


@pytest.mark.parametrize("run", FILTERS)
def test_float32_stays_float32(run: Filter) -> None:
    model = NonlinearModel(
        lambda h: torch.stack([h[0] + 0.1 * h[1], h[1] - 0.1 * torch.sin(h[0])]), lambda h: torch.sin(h[:1]),
        0.01 * torch.eye(2), 0.1 * torch.eye(1), torch.tensor([1.0, 0.0]), torch.eye(2),
    )  # fmt: skip
    out, state = run(model, torch.rand(2, 9, 1))
    assert {v.dtype for v in (*out[:5], state.mean, state.cov)} == {torch.float32}
    assert torch.isfinite(out.loglik).all()


@pytest.mark.parametrize("run", FILTERS)
def test_derivatives_and_errors(run: Filter) -> None:
    _, same, y, u = linear()
    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    curved = dataclasses.replace(same, observation=lambda h, u: torch.sin(scale * h.sum()) + same.observation(h, u))

    def loss(s: Tensor) -> Tensor:
        bent = dataclasses.replace(curved, observation=lambda h, u: torch.sin(s * h.sum()) + same.observation(h, u))
        return run(bent, y[:2, :4], u[:2, :4])[0].loglik.sum()

    assert torch.autograd.gradcheck(loss, [scale])
    for wrong, message in [
        (dict(R=same.R[:2, :2]), r"y has shape \(4, 12, 3\), expected \(…, T, 2\)"),
        (dict(Q=same.Q.expand(5, 2, 2)), r"Q has shape \(5, 2, 2\)"),
        (dict(observation=lambda h, u: h), r"observation returns \(2,\), expected \(3,\)"),
        (dict(transition=lambda h, u: h[:1]), r"transition returns \(1,\), expected \(2,\)"),
        (dict(m0=same.m0.expand(3, 2)), "do not broadcast"),
        (dict(Q=-1e-3 * same.Q), r"Q has the variance -.*, expected none below 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(same, **wrong), y, u)
    for series, inputs, message in [
        (y[0, :, 0], u, r"y has shape \(12,\), expected \(…, T, m\)\. One value a step is y\[:, None\]"),
        (y, u[0, :, 0], r"u has shape \(12,\), expected \(…, T, p\)\. One value a step is u\[:, None\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(same, series, inputs)
    with pytest.raises(TypeError, match=r"y is float32, expected one of float64"):
        run(same, y.float(), u)
    with pytest.raises(TypeError, match=r"y is a list, expected a tensor"):
        run(same, y.tolist(), u)
    with pytest.raises(TypeError, match=r"the model is a StateSpace, expected a NonlinearModel\. kalman_filter takes"):
        run(linear()[0], y, u)  # type: ignore[arg-type]  # wrong
    if run is extended_kalman_filter:
        with pytest.raises(TypeError, match=r"what observation returns is float32, expected one of float64"):
            run(dataclasses.replace(same, observation=lambda h, u: torch.ones(3)), y, u)
    if run is unscented_kalman_filter:
        with pytest.raises(ValueError, match="series 0 is singular"):
            run(same, y, u, initial_state=KalmanState(same.m0, 0 * same.P0))
        with pytest.raises(ValueError, match="kappa is -1"):
            run(same, y, u, kappa=-1)
