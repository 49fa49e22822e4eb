"""What is not finite: named with its place, as the caller knows it; a stream's state survives it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_kalman_filter import CASES, F64, FORMS, load

from stateline import ops
from stateline import state as states
from stateline.classical import (
    KalmanFilter,
    NonlinearModel,
    StateSpace,
    extended_kalman_filter,
    kalman_filter,
    kalman_smoother,
    steady_filter,
    steady_state,
    unscented_kalman_filter,
)
from stateline.ops.kalman import KalmanState


@pytest.mark.parametrize("way", ["cpu", "reference", "sqrt", "parallel", "smoother", "shared", "lanes"])
def test_what_is_not_finite_is_named(way: str) -> None:
    """Whatever it is, wherever it is, at the last step too, and as the caller named it."""
    model, y, u = load(CASES["track2d_inputs"])
    assert u is not None
    y, u = y[:7], u[:7]
    run: Any = kalman_smoother if way == "smoother" else kalman_filter
    options: dict[str, Any] = {"sqrt": {"form": "sqrt"}, "parallel": {"parallel": True}}.get(way, {})
    if way in ("cpu", "reference"):
        options = {"backend": way}
    if way == "parallel":  # which needs C Q Cᵀ + R positive definite
        model = model._replace(Q=model.Q + torch.eye(4, dtype=F64))
    rows = 9 if way == "lanes" else 3
    if way in ("shared", "lanes"):
        y = y.repeat(rows, 1, 1) + torch.arange(float(rows))[:, None, None]
        y[:, 2, 0] = torch.nan
        if way == "lanes":
            y[0, 3, 1] = torch.nan
    lead = y.dim() == 3
    for t in (0, 4, 6):
        for value in (torch.inf, -torch.inf):
            wrong = y.clone()
            wrong[(1, t, 1) if lead else (t, 1)] = value
            series = " of series 1" if lead else ""
            with pytest.raises(
                ValueError, match=rf"^{run.__name__}: y is {value} at step {t}{series}\. NaN, and NaN alone"
            ):
                run(model, wrong, u, **options)
        wrong_u = u.clone()
        wrong_u[t, 0] = torch.nan
        with pytest.raises(ValueError, match=rf"^{run.__name__}: u\[{t}, 0\] is nan, expected finite values"):
            run(model, y, wrong_u, **options)
    for name in ("A", "B", "C", "D", "Q", "R", "m0", "P0"):
        part = getattr(model, name)
        for value in (torch.nan, torch.inf):
            whole = part.clone()
            whole.view(-1)[-1] = value
            with pytest.raises(ValueError, match=rf"^{run.__name__}: {name}\[.*\] is {value}, expected finite values"):
                run(model._replace(**{name: whole}), y, u, **options)
    varying = model.Q.repeat(7, 1, 1)
    varying[6] = torch.nan  # it leads beyond the last step
    with pytest.raises(ValueError, match=rf"^{run.__name__}: Q\[6, 0, 0\] is nan"):
        run(model._replace(Q=varying), y, u, **options)
    _, state = kalman_filter(model, y, u)
    state.mean[..., 1] = torch.nan
    with pytest.raises(ValueError, match=rf"^{run.__name__}: initial_state.mean\[.*1\] is nan"):
        run(model, y, u, initial_state=state, **options)


def test_a_covariance_without_square_root_is_named_with_its_place() -> None:
    """By the operation itself, which takes roots before it filters."""
    one = torch.ones(1, 1, 1, 1, dtype=F64)
    start = KalmanState(one[0, 0], one[0])
    for name, Q, P in (("Q", one * torch.nan, one[0]), ("initial_state.cov", one, one[0] * torch.inf)):
        with pytest.raises(ValueError, match=rf"^kalman: {name}\[.*\] is (nan|inf), expected finite values"):
            ops.kalman(one[0], one, one, Q, one, dataclasses.replace(start, cov=P), form="sqrt")


@pytest.mark.parametrize("run", [extended_kalman_filter, unscented_kalman_filter])
def test_nonlinear_and_steady_filters_name_it_too(run: Any) -> None:
    one = torch.eye(1, dtype=F64)
    model = NonlinearModel(torch.sin, torch.cos, Q=one, R=one, m0=one[0], P0=one)
    y = torch.zeros(5, 1, dtype=F64)
    run(model, y)
    y[3] = torch.inf
    with pytest.raises(ValueError, match=rf"^{run.__name__}: y is inf at step 3\."):
        run(model, y)
    with pytest.raises(ValueError, match=rf"^{run.__name__}: R\[0, 0\] is nan"):
        run(dataclasses.replace(model, R=one * torch.nan), y)
    steady = steady_state(StateSpace(0.5 * one, one, one, None, one, one, one[0], one))
    with pytest.raises(ValueError, match=r"^steady_filter: y is inf at step 3\."):
        steady_filter(steady, y, torch.zeros_like(y))
    with pytest.raises(ValueError, match=r"^steady_filter: u\[3, 0\] is inf"):
        steady_filter(steady, torch.zeros_like(y), y)


def test_numbers_beyond_the_range_are_no_error_of_an_argument() -> None:
    """A likelihood that overflows is what it is; what was given is finite."""
    one = torch.eye(1, dtype=F64)
    model = StateSpace(one, None, one, None, one, one, one[0], one)
    out, _ = kalman_filter(model, torch.tensor([[1e300], [1.0]], dtype=F64))
    assert out.loglik[0] == -torch.inf
    _, state = kalman_filter(model._replace(A=1e200 * one), torch.full((1, 1), torch.nan, dtype=F64))
    assert not state.cov.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [False, True])
def test_a_stream_goes_on_after_a_value_that_is_not_finite(form: str, slots: bool) -> None:
    """Its state is what it was before, in bits, whether a value, an input or a parameter was to blame."""
    model, y, u = load(CASES["track2d_inputs"])
    assert u is not None
    layer = KalmanFilter(model, form=form)
    state, index = layer.init_state(5), torch.tensor([3]) if slots else None
    if not slots:
        state = layer.init_state(1)
    layer.update_(y[:1], state, u[:1], index=index)
    before = states.clone(state)
    bad_y, bad_u = y[1:2].clone(), u[1:2].clone()
    bad_y[0, 1], bad_u[0, 0] = -torch.inf, torch.nan
    blind = torch.full_like(bad_y, torch.nan)
    with torch.no_grad():
        worn = KalmanFilter(model, form=form)
        worn.Q_factor[0, 0] = torch.nan
    for run, message in [
        (lambda: layer.update_(bad_y, state, u[1:2], index=index), r"kalman_step_: y is -inf in series 0\. NaN, and"),
        (lambda: layer.update_(y[1:2], state, bad_u, index=index), r"KalmanFilter: u\[0, 0\] is nan, expected finite"),
        (lambda: layer.update_(blind, state, bad_u, index=index), r"KalmanFilter: u\[0, 0\] is nan, expected finite"),
        (lambda: worn.update_(y[1:2], state, u[1:2], index=index), r"kalman_step_: Q\[0, 0\] is nan"),
    ]:
        with pytest.raises(ValueError, match=rf"^{message}"):
            run()
        assert torch.equal(state.mean, before.mean)
        assert torch.equal(state.cov, before.cov)
    layer.update_(y[1:2], state, u[1:2], index=index)
    whole = layer(y[None, :2], u[None, :2])
    assert whole.mean is not None
    after = layer.update_(y[2:3], state, u[2:3], index=index)
    torch.testing.assert_close(after.mean, layer(y[None, :3], u[None, :3]).mean[:, 2])  # type: ignore[index]  # kept


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_one_bad_value_touches_no_state_of_many(form: str, dtype: torch.dtype) -> None:
    """Of whichever series it is, so that the step can be taken again; a row that is skipped may hold anything."""
    model, y, _ = load(CASES["track2d"], dtype)
    layer = KalmanFilter(model, form=form)
    rows = y[:40].clone()
    for bad in (0, 17, 39):
        state = layer.init_state(40)
        before = states.clone(state)
        wrong = rows.clone()
        wrong[bad, 1] = torch.inf
        for index in (None, torch.arange(39, -1, -1)):
            with pytest.raises(ValueError, match=rf"^kalman_step_: y is inf in series {bad}\."):
                layer.update_(wrong, state, index=index)
            assert torch.equal(state.mean, before.mean)
            assert torch.equal(state.cov, before.cov)
        skip = torch.arange(40)
        skip[bad] = -1
        layer.update_(wrong, state, index=skip)
        layer.update_(rows, before)
        others = skip[skip >= 0]
        assert torch.equal(state.mean[others], before.mean[others])


@pytest.mark.parametrize("short", [True, False])
def test_a_row_that_is_skipped_is_not_blamed_for_another(short: bool) -> None:
    """Inputs neither."""
    model, y, u = load(CASES["track2d_inputs"])
    assert u is not None
    layer, index = KalmanFilter(model), torch.tensor([-1, 0], dtype=torch.int64 if short else torch.int32)
    rows, inputs = y[:2].clone(), u[:2].clone()
    rows[0], inputs[0] = torch.inf, torch.nan
    layer.update_(rows, layer.init_state(1), inputs, index=index)
    rows[1, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"y is -inf in series 1\."):
        layer.update_(rows, layer.init_state(1), inputs, index=index)
    with torch.no_grad():
        layer.A[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"A\[(0, )?2, 1\] is nan"):
        layer.update_(rows.masked_fill(rows == -torch.inf, 0.0), layer.init_state(1), inputs, index=index)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_whose_state_overflows_says_so_and_leaves_it(backend: str) -> None:
    one = torch.ones(1, 1, 1, dtype=F64)
    state = KalmanState(one[0].clone(), one.clone())
    with pytest.raises(ValueError, match=r"^kalman_step_: the next state would not be finite"):
        ops.kalman_step_(state, one[0], 1e200 * one, one, one, one, backend=backend)
    assert torch.equal(state.cov, one)
    with pytest.raises(ValueError, match=r"^kalman_step_: state.mean\[0, 0\] is inf"):
        ops.kalman_step_(KalmanState(one[0] * torch.inf, one.clone()), one[0], one, one, one, one, backend=backend)
