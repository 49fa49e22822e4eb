"""A model for each series: learned side by side, each is what it is alone, and what goes wrong with one stays there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_learn import away, data, loglik, system

from stateline.classical import (
    FitOptions,
    StateSpace,
    em,
    fit,
    kalman_filter,
    learn,
    local_level,
    local_trend,
    objective,
    side_by_side,
    simulate,
)


def test_models_side_by_side_are_those_of_each_series_alone() -> None:
    truth = system(n=2, m=1)
    y, u = data(truth, N=3, T=30)
    for method in ("em", "lbfgs"):
        options = FitOptions(errors=False, tolerance=1e-7)
        together = fit(away(truth), y, u, method=method, each=True, steps=15, options=options)
        for i in range(3):
            alone = fit(away(truth), y[i], u[i], method=method, steps=15, options=options)
            torch.testing.assert_close(together.model.Q[i, 0], alone.model.Q, rtol=1e-6, atol=1e-9)
            assert bool(together.converged[i]) == alone.converged  # type: ignore[index]  # one of each series


def test_one_series_at_the_border_keeps_the_errors_of_the_others() -> None:
    walk = local_level(level=1.0, noise=0.5, prior=1.0)
    y = simulate(walk, 60, batch=3, generator=torch.Generator().manual_seed(0))[1]
    y[1] = simulate(walk._replace(R=0 * walk.R), 60, generator=torch.Generator().manual_seed(0))[1]
    options = FitOptions(tolerance=1e-9)
    found = fit(walk, y, method="lbfgs", each=True, options=options)
    assert "1 of 3 series have none; series 1: a variance in R went to the border" in found.errors_reason
    assert found.errors is not None
    assert found.errors["Q"].isnan().flatten().tolist() == [False, True, False]
    for i in (0, 2):
        alone = fit(walk, y[i], method="lbfgs", options=options)
        assert alone.errors is not None
        torch.testing.assert_close(found.errors["Q"][i, 0], alone.errors["Q"], rtol=1e-4, atol=0)
    assert fit(walk, y[1:2], method="lbfgs", each=True, options=options).errors is None


@pytest.mark.parametrize("method", ["em", "lbfgs"])
def test_a_series_that_is_predicted_without_error_has_no_errors_and_says_so(method: str) -> None:
    """One that is constant, and one with a constant column, beside one that is not; none of their likelihoods ends."""
    walk = local_level(level=1.0, noise=0.5, prior=1.0)
    y = simulate(walk, 30, batch=3, generator=torch.Generator().manual_seed(0))[1]
    y[1] = 5.0
    options = FitOptions(tolerance=1e-3)
    found = fit(walk, y, method=method, each=True, steps=120, options=options)
    assert torch.as_tensor(found.converged).tolist() == [True, False, True]
    why = "column 0 of y is predicted without error, .* Leave Q and R out of learn; is it constant"
    assert re.match(why, found.reason)
    assert re.match(f"1 of 3 series have none; series 1: {why}", found.errors_reason)
    assert found.errors is not None
    for name in ("Q", "R"):
        assert found.errors[name].isnan().flatten().tolist() == [False, True, False]
    for value in (5.0, 0.0):
        alone = fit(walk, torch.full_like(y[1], value), method=method, steps=120)
        assert alone.errors is None
        assert re.match(why, alone.errors_reason)
    both = side_by_side(walk, walk)
    columns = torch.cat([y[0], y[1]], 1)
    keep = {name: ~torch.eye(2, dtype=torch.bool) for name in ("Q", "R")}
    beside = fit(both, columns, frozen=keep, method=method, steps=120, options=options)
    assert beside.errors is None
    assert re.match(why.replace("column 0", "column 1"), beside.errors_reason)
    far = fit(
        walk, y[:1] + 1e9, learn=("Q", "R", "m0"), method=method, steps=5
    )  # noise is small beside it, not nothing
    assert "without error" not in far.errors_reason


@pytest.mark.parametrize("method", ["em", "lbfgs"])
def test_what_fails_for_one_series_does_not_touch_the_others(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = local_level(level=0.5, noise=2.0, prior=1.0)
    y = simulate(walk, 40, batch=5, generator=torch.Generator().manual_seed(0))[1]
    options = FitOptions(errors=False, tolerance=1e-3)
    wanted = fit(away(walk)._replace(A=walk.A), y, method=method, each=True, steps=200, options=options)
    calls = [0]

    def spoiled(good: Any, at: int) -> Any:
        def run(first: Any, second: Any, *rest: Any, **options: Any) -> Any:
            data = first.y if isinstance(first, em.Data) else second
            calls[0] += 1
            if calls[0] > at and bool((data[:, 0, 0] == y[3, 0, 0]).any()):
                raise ValueError("kalman: series 0 at step 7")
            return good(first, second, *rest, **options)

        return run

    if method == "em":
        monkeypatch.setattr(learn, "em_step", spoiled(em.em_step, 2))
    else:
        monkeypatch.setattr(objective, "kalman_filter", spoiled(kalman_filter, 2))
    found = fit(away(walk)._replace(A=walk.A), y, method=method, each=True, steps=200, options=options)
    others = [0, 1, 2, 4]
    torch.testing.assert_close(found.model.Q[others], wanted.model.Q[others], rtol=1e-9, atol=0)
    assert not bool(found.converged[3])  # type: ignore[index]  # one of each series
    assert "series 3 at step 7" in found.reason
    assert float(loglik(found.model, y)[3].detach()) == pytest.approx(float(found.loglik[-1, 3]), abs=1e-9)


def test_em_of_a_constant_series_blames_no_covariance() -> None:
    """Nothing is left of its noise but differences of larger numbers, which may be negative by rounding."""
    start = local_trend(level=1.0, slope=0.1, noise=1.0, prior=10.0)
    start = StateSpace(*(None if v is None else v.double() for v in start))
    found = fit(start, torch.full((60, 1), 5.0, dtype=torch.float64), learn=("Q", "R"), method="em", steps=200)
    assert not found.converged
    assert "failed" not in found.reason
    assert torch.isfinite(found.model.Q).all()
