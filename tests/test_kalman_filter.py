"""The classical filter, smoother and forecast against values of 60 digits and one Gaussian of a whole series."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import mpmath  # PyTorch depends on it
import numpy as np
import pytest
import torch
from oracles import JointGaussian
from torch import Tensor

from stateline.classical import (
    KalmanState,
    SquareRootState,
    StateSpace,
    forecast,
    kalman_filter,
    kalman_smoother,
    posterior_sample,
    simulate,
)  # fmt: skip

REFERENCE = json.loads((Path(__file__).parent / "data" / "kalman_reference.json").read_text())
CASES, STRESS = REFERENCE["cases"], REFERENCE["stress"]
FORMS = ["joseph", "sqrt"]
F64 = torch.float64


def tensor(values: Any, dtype: torch.dtype = F64) -> Tensor:
    """A tensor of nested lists, None being NaN."""
    return torch.tensor(np.array(values, dtype=float), dtype=dtype)


def load(case: dict[str, Any], dtype: torch.dtype = F64) -> tuple[StateSpace, Tensor, Tensor | None]:
    parts = [tensor(case[k], dtype) if k in case else None for k in StateSpace._fields]
    return StateSpace(*parts), tensor(case["y"], dtype), tensor(case["u"], dtype) if "u" in case else None  # type: ignore[arg-type]  # only B and D are absent


def agrees(name: str, got: Tensor, wanted: Any, bound: float = 1e-10) -> None:
    wanted = tensor(wanted)
    assert got.shape == wanted.shape, name
    error = float((got.detach() - wanted).abs().max() / wanted.abs().max())
    assert error <= bound, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(CASES))
def test_reference_values(name: str, form: str) -> None:
    case = CASES[name]
    model, y, u = load(case)
    out, state = kalman_filter(model, y, u, form=form)
    smoothed = kalman_smoother(model, y, u, form=form)
    at, lag = case["cov_steps"], case["lag_one_steps"]
    assert isinstance(state, SquareRootState if form == "sqrt" else KalmanState)
    assert out.cov is not None
    assert out.predicted_cov is not None
    found = {
        "loglik": out.loglik.sum(), "loglik_per_step": out.loglik, "filtered_mean": out.mean,
        "predicted_mean": out.predicted_mean, "filtered_cov": out.cov[at], "predicted_cov": out.predicted_cov[at],
        "smoothed_mean": smoothed.mean, "smoothed_cov": smoothed.cov[at], "lag_one_cov": smoothed.lag_cov[lag],
    }  # fmt: skip
    if "forecast_mean" in case:
        ahead = forecast(model, state, 10)
        found |= {"forecast_mean": ahead.mean, "forecast_cov": ahead.cov}
        found |= {"forecast_state_mean": ahead.state_mean, "forecast_state_cov": ahead.state_cov}
    for key, value in found.items():
        assert value is not None
        agrees(key, value, case[key])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "gradient" in case])
def test_reference_gradients(name: str, form: str) -> None:
    case = CASES[name]
    model, y, u = load(case)
    model = StateSpace(*(None if v is None else v.requires_grad_() for v in model))  # type: ignore[arg-type]  # B, D
    loglik = kalman_filter(model, y, u, form=form, keep="loglik")[0].loglik.sum()
    for key, wanted in case["gradient"].items():
        part = key.split()[-1]
        if "mpmath" in key:
            continue
        (slope,) = torch.autograd.grad(loglik, getattr(model, part), retain_graph=True)
        scaled = key.startswith("d loglik / d log scale")
        agrees(key, (slope * getattr(model, part)).sum() if scaled else slope, wanted, 1e-9)


def stress(name: str, dtype: torch.dtype, form: str) -> tuple[float, float, float]:
    """Largest relative errors of the first and last filtered variances and of means, and that of the log-likelihood."""
    case = STRESS[f"{name}_{str(dtype).removeprefix('torch.')}"]
    model, y, _ = load(case, dtype)
    out, _ = kalman_filter(model, y, form=form)
    assert out.cov is not None
    assert out.mean is not None
    ends = [
        (out.cov[t].diagonal().double(), tensor(case[f"filtered_var_{w}"])) for t, w in ((0, "first"), (-1, "last"))
    ]
    variance = max(float(((got - wanted).abs() / wanted).max()) for got, wanted in ends)
    wanted = tensor(case["filtered_mean"])
    mean = float((out.mean.double() - wanted).abs().max() / wanted.abs().max())
    return variance, mean, abs(float(out.loglik.double().sum()) - case["loglik"])


# What docs/numerics.md says. Sensors in float64 differ by 1e-12: of sixteen digits that leaves four.
@pytest.mark.parametrize(
    ("name", "dtype", "form", "bounds"),
    [
        ("cv_precise_sensor", torch.float32, "joseph", (1e-3, 1e-5, 0.01)),
        ("cv_precise_sensor", torch.float32, "sqrt", (1e-5, 1e-6, 1e-4)),
        ("cv_precise_sensor", F64, "joseph", (1e-9, 1e-10, 1e-8)),
        ("cv_precise_sensor", F64, "sqrt", (1e-9, 1e-10, 1e-8)),
        ("near_collinear", torch.float32, "sqrt", (1e-5, 1e-6, 1e-4)),
        ("near_collinear", F64, "sqrt", (1e-3, 1e-3, 1e-2)),
    ],
)
def test_stress(name: str, dtype: torch.dtype, form: str, bounds: tuple[float, float, float]) -> None:
    """A sensor 1e14 (in float64 1e26) times as precise as what was known before; two that differ by 1e-6 (1e-12)."""
    for got, bound in zip(stress(name, dtype, form), bounds, strict=True):
        assert got <= bound


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_covariances_do_not_pretend_to_tell_nearly_collinear_sensors_apart(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"of series 0 at step 0 is not positive definite.*form=\"sqrt\""):
        stress("near_collinear", dtype, "joseph")


@pytest.mark.parametrize("name", ["near_collinear", "cv_precise_sensor"])
def test_square_roots_have_gradients_of_float32_data(name: str) -> None:
    """As those of the same numbers in float64; where those need more digits, an error, no number."""
    model, y, _ = load(STRESS[f"{name}_float32"], torch.float32)
    found = []
    for dtype in (F64, torch.float32):
        leaves = [v.to(dtype).requires_grad_() for v in (model.A, model.C, model.Q, model.R, model.m0, model.P0)]
        A, C, Q, R, m0, P0 = leaves
        out, _ = kalman_filter(StateSpace(A, None, C, None, Q, R, m0, P0), y.to(dtype), form="sqrt")
        found.append(torch.autograd.grad(out.loglik.sum(), leaves))
    for exact, got in zip(*found, strict=True):
        assert ((got.double() - exact).abs().max() / exact.abs().max()) <= 2e-4
    model, y, _ = load(STRESS["near_collinear_float64"])
    for backend in (None, "reference"):
        out, _ = kalman_filter(model._replace(A=model.A.requires_grad_()), y, form="sqrt", backend=backend)
        with pytest.raises(
            ValueError, match=r"^kalman: the gradient of series 0 at step 0 takes more digits than float64"
        ):
            out.loglik.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_float32_likelihood_of_a_long_track(form: str) -> None:
    model, _, _ = load(CASES["track2d"])
    _, y = simulate(model, 400, batch=3)
    small = StateSpace(*(None if v is None else v.float() for v in model))  # type: ignore[arg-type]  # B, D
    wanted = kalman_filter(StateSpace(*(None if v is None else v.double() for v in small)), y.float().double())[0]  # type: ignore[arg-type]  # B, D
    got = kalman_filter(small, y.float(), form=form)[0]
    assert (got.loglik.double().sum(-1) - wanted.loglik.sum(-1)).abs().max() <= 0.01


# ---- any shapes, any gaps --------------------------------------------------------------------------------------------


def varied(gaps: bool = True) -> tuple[StateSpace, Tensor, Tensor]:
    """A model with parts of every kind of shape beside series (2, 3, 7, 2) and inputs (3, 7, 1)."""
    draw = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731  # one line
    square = lambda v: v @ v.mT + 0.2 * torch.eye(v.shape[-1], dtype=F64)  # noqa: E731  # one line
    model = StateSpace(
        A=0.5 * draw(7, 3, 3), B=draw(3, 1), C=draw(2, 1, 1, 2, 3), D=draw(3, 1, 2, 1), Q=square(draw(3, 1, 3, 3)),
        R=square(draw(2, 3, 7, 2, 2)), m0=draw(3, 3), P0=square(draw(3, 3)),
    )  # fmt: skip
    y = draw(2, 3, 7, 2)
    return model, torch.where(torch.rand(y.shape) < 0.3, torch.nan, y) if gaps else y, draw(3, 7, 1)


def joint(model: StateSpace, y: Tensor, u: Tensor, i: int, j: int) -> JointGaussian:
    """One of the series of `varied` as a Gaussian."""
    A, B, C, D, Q, R, m0, P0 = model
    assert B is not None
    assert D is not None
    t, n = y.shape[2], 3
    whole = [v.expand(2, 3, t, *v.shape[-2:])[i, j] for v in (A, C, Q, R)]
    b, d = (u[j] @ B.mT), (u[j] @ D[j, 0].mT)
    return JointGaussian.of(y[i, j], *whole, m0.expand(2, 3, n)[i, j], P0, b, d)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_broadcast_and_smoothing_conditions_on_everything(form: str) -> None:
    model, y, u = varied()
    out, state = kalman_filter(model, y, u, form=form)
    smoothed = kalman_smoother(model, y, u, form=form)
    assert state.mean.shape == (2, 3, 3)
    assert state.cov.shape == (2, 3, 3, 3)
    assert out.cov is not None
    for i in range(2):
        for j in range(3):
            exact = joint(model, y, u, i, j)
            mean, cov = exact.given(8)
            blocks = cov.reshape(8, 3, 8, 3).transpose(1, 2)
            pairs = [(smoothed.mean[i, j], mean.reshape(8, 3)[:7])]
            pairs += [(smoothed.cov[i, j, t], blocks[t, t]) for t in range(7)]
            pairs += [(smoothed.lag_cov[i, j, t], blocks[t, t + 1]) for t in range(6)]
            pairs += [(out.cov[i, j, t], exact.state(t, t + 1)[1]) for t in range(7)]
            pairs += [(out.loglik[i, j].sum(), exact.loglik(8))]
            for got, wanted in pairs:
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_series_may_be_cut_anywhere(form: str) -> None:
    model, y, u = varied()
    whole, last = kalman_filter(model, y, u, form=form)
    for at in (0, 1, 4, 7):
        halves, state = [], None
        for span in (slice(at), slice(at, None)):
            part = model._replace(A=model.A[span], R=model.R[:, :, span])
            out, state = kalman_filter(part, y[:, :, span], u[:, span], initial_state=state, form=form)
            halves.append(out)
        for name, a, b, wanted in zip(whole._fields[:5], *halves, whole, strict=False):
            torch.testing.assert_close(torch.cat([a, b], 2), wanted, rtol=1e-12, atol=1e-12, msg=name)
        assert state is not None
        torch.testing.assert_close(state.cov, last.cov, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_smoothed_moments_have_derivatives(form: str) -> None:
    model, y, u = varied()
    leaves = [v.requires_grad_() for v in (model.A, model.R, model.P0)]
    smoothed = kalman_smoother(model, y, u, form=form)
    got = torch.autograd.grad(smoothed.mean.square().sum() + smoothed.lag_cov.sum() + smoothed.cov.sum(), leaves)
    total = torch.zeros((), dtype=F64)
    for i in range(2):
        for j in range(3):
            mean, cov = joint(model, y, u, i, j).given(8)
            blocks = cov.reshape(8, 3, 8, 3).transpose(1, 2)
            total = total + mean[:21].square().sum() + sum(blocks[t, t].sum() for t in range(7))
            total = total + sum(blocks[t, t + 1].sum() for t in range(6))
    for a, b in zip(got, torch.autograd.grad(total, leaves), strict=True):
        b = (b + b.mT) / 2 if b.shape != model.A.shape else b
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("T", [0, 1, 6])
def test_gradients_of_the_smoother_are_those_of_its_other_form(T: int, gaps: bool) -> None:
    """From every result and into every part: P0 = 0, a singular Q, a sensor without noise; float32 loses no digits."""
    given, _, _ = load(CASES["ar2_singular_Q_noise"])
    zero = torch.zeros(2, 2, dtype=F64)
    settings = [given, given._replace(R=0 * given.R), given._replace(P0=zero), given._replace(Q=zero)]
    y = simulate(given, T, batch=3)[1]
    if gaps:
        y[1, 2:4] = torch.nan
        y[:, 4:5] = torch.nan
    for model in settings:
        found: list[Any] = []
        for form, dtype in (("joseph", F64), ("sqrt", F64), ("sqrt", torch.float32)):
            leaves = [v.to(torch.float32).to(dtype).requires_grad_() for v in (model.A, model.C, model.Q, model.R)]
            start = [v.to(torch.float32).to(dtype).requires_grad_() for v in (model.m0, model.P0, y)]
            A, C, Q, R, (m0, P0, series) = *leaves, start
            smoothed = kalman_smoother(StateSpace(A, None, C, None, Q, R, m0, P0), series, form=form)
            assert smoothed.cov.dtype == dtype
            slopes = [torch.linspace(-1, 1, v.numel(), dtype=torch.float32).reshape(v.shape).to(v) for v in smoothed]
            grads = torch.autograd.grad([*smoothed], [*leaves, *start], slopes, materialize_grads=True)
            found.append([(g + g.mT) / 2 if i in (2, 3, 5) else g for i, g in enumerate(grads)])
        for exact, same, single in zip(*found, strict=True):
            torch.testing.assert_close(same, exact, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(single, exact.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [0, 1, 5])
def test_degenerate_models_are_ordinary(form: str, T: int) -> None:
    """Singular Q, R = 0, P0 = 0, nothing observed, no steps: exactly what conditioning says."""
    model, _, _ = load(CASES["ar2_singular_Q_noise"])
    y = simulate(model, T, batch=2)[1]
    zero = torch.zeros(2, 2, dtype=F64)
    settings: list[tuple[StateSpace, Tensor]] = [
        (model._replace(R=0 * model.R), y), (model._replace(P0=zero), y), (model._replace(Q=zero), y),
        (model, torch.full_like(y, torch.nan)), (model._replace(Q=zero, P0=zero), y),
    ]  # fmt: skip
    for case, series in settings:
        out, state = kalman_filter(case, series, form=form)
        smoothed = kalman_smoother(case, series, form=form)
        assert smoothed.mean.shape == (2, T, 2)
        assert smoothed.lag_cov.shape == (2, max(T - 1, 0), 2, 2)
        parts = [v.expand(T, *v.shape) for v in (case.A, case.C, case.Q, case.R)]
        for i in range(2):
            nothing = torch.zeros(T, 2, dtype=F64), torch.zeros(T, 1, dtype=F64)
            exact = JointGaussian.of(series[i], *parts, case.m0, case.P0, *nothing)
            mean, cov = exact.given(T)
            wanted = [(state.mean[i], mean[2 * T :]), (state.cov[i], cov[2 * T :, 2 * T :])]
            wanted += [(smoothed.mean[i], mean[: 2 * T].reshape(T, 2)), (out.loglik[i].sum(), exact.loglik(T))]
            wanted += [(smoothed.cov[i, t], cov[2 * t : 2 * t + 2, 2 * t : 2 * t + 2]) for t in range(T)]
            for a, b in wanted:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_forecasts_cover_what_comes() -> None:
    model, _, _ = load(CASES["track2d"])
    model = model._replace(D=torch.ones(2, 1, dtype=F64), B=torch.ones(4, 1, dtype=F64))
    u = torch.randn(60, 1, dtype=F64)
    _, y = simulate(model, 60, u, batch=2000)
    _, state = kalman_filter(model, y[:, :50], u[:50])
    ahead = forecast(model, state, 10, u[50:])
    low, high = ahead.interval(0.9)
    inside = ((low <= y[:, 50:]) & (y[:, 50:] <= high)).double().mean()
    assert ahead.cov.shape == (2000, 10, 2, 2)
    assert abs(inside - 0.9) < 0.006  # four deviations of what 2,000 series tell
    for level in (0, 1, 0.0, 1.0, 95, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"^interval: level is"):
            ahead.interval(level)
    with pytest.raises(ValueError, match=r"between 0 and 1, such as 0.95. In per cent it would be 95 %: give 0.95"):
        ahead.interval(95)
    low, high = ahead._replace(mean=ahead.mean.float(), cov=ahead.cov.float()).interval(1 - 1e-12)
    assert ((high - low) / 2 / ahead.cov.diagonal(dim1=-2, dim2=-1).sqrt()).sub(7.13051).abs().max() < 1e-3
    with pytest.raises(ValueError, match=r"^forecast: u is None"):
        forecast(model, state, 10)


def exactly_smoothed(model: StateSpace, y: Tensor) -> Tensor:
    """Variances (T, n) of the smoother's states by Rauch, Tung and Striebel in 60 digits."""
    with mpmath.workdps(60):
        A, C, Q, R, P = (mpmath.matrix(v.tolist()) for v in (model.A, model.C, model.Q, model.R, model.P0))
        before, after = [], []
        for _ in y:
            before.append(P)
            K = P * C.T * mpmath.inverse(C * P * C.T + R)
            after.append(P - K * C * P)
            P = A * after[-1] * A.T + Q
        found = [after[-1]]
        for t in reversed(range(len(y) - 1)):
            J = after[t] * A.T * mpmath.inverse(before[t + 1])
            found.append(after[t] + J * (found[-1] - before[t + 1]) * J.T)
        return torch.tensor([[float(V[i, i]) for i in range(V.rows)] for V in reversed(found)], dtype=F64)


@pytest.mark.parametrize("name", ["near_collinear", "cv_precise_sensor"])
def test_smoothing_by_factors_keeps_digits_that_covariances_lose(name: str) -> None:
    """Those of two sensors that differ by 1e-12: from the filter's factors, the smoother of covariances errs by 0.7."""
    model, y, _ = load(STRESS[f"{name}_float64"])
    y = y[:12]
    exact = exactly_smoothed(model, y)
    found = kalman_smoother(model, y, form="sqrt").cov.diagonal(dim1=-2, dim2=-1)
    assert ((found - exact).abs() / exact).max() < 1e-3
    model, y, _ = load(STRESS[f"{name}_float32"], torch.float32)
    exact = exactly_smoothed(model, y[:12])
    found = kalman_smoother(model, y[:12], form="sqrt").cov.diagonal(dim1=-2, dim2=-1)
    assert ((found - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("singular", [False, True])
def test_a_smoother_is_traced_and_transformed(form: str, singular: bool) -> None:
    """Of singular systems too, where the form by factors takes generalised inverses."""
    model, y, _ = load(CASES["track2d_missing_rows"])
    rows = torch.stack([y[:6], y[30:36], y[60:66]])
    if singular:
        model = model._replace(Q=0 * model.Q, P0=0 * model.P0)

    def mean(y: Tensor, A: Tensor) -> Tensor:
        return kalman_smoother(model._replace(A=A), y, form=form).mean

    def energy(A: Tensor, y: Tensor) -> Tensor:
        return mean(y, A).square().sum()

    close: Any = torch.testing.assert_close
    close(torch.func.vmap(mean, (0, None))(rows, model.A), mean(rows, model.A))
    close(torch.compile(mean, fullgraph=True, backend="aot_eager")(rows, model.A), mean(rows, model.A))
    leaf = model.A.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(leaf, rows), leaf)
    close(torch.func.vmap(torch.func.grad(energy), (None, 0))(model.A, rows).sum(0), wanted)


def test_a_series_is_smoothed_as_alone_beside_one_that_is_singular() -> None:
    """By factors: a generalised inverse for the one that needs it, an inverse for the other."""
    model, y, _ = load(CASES["track2d"])
    both = model._replace(Q=torch.stack([model.Q, 0 * model.Q])[:, None], P0=torch.stack([model.P0, 0 * model.P0]))
    beside = kalman_smoother(both, y.expand(2, *y.shape), form="sqrt")
    for i, one in enumerate((model, model._replace(Q=0 * model.Q, P0=0 * model.P0))):
        alone = kalman_smoother(one, y, form="sqrt")
        for a, b in zip(beside, alone, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_paths_have_the_moments_of_the_posterior(form: str) -> None:
    model, y, u = varied()
    smoothed = kalman_smoother(model, y, u, form=form)
    generator = torch.Generator().manual_seed(3)
    paths = posterior_sample(model, y, u, samples=2000, form=form, generator=generator)
    assert paths.shape == (2000, 2, 3, 7, 3)
    deviation = smoothed.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((paths.mean(0) - smoothed.mean).abs() / deviation).max() < 5 / 2000**0.5
    lag = ((paths - paths.mean(0))[..., :-1, :, None] * (paths - paths.mean(0))[..., 1:, None, :]).mean(0)
    scale = deviation[..., :-1, :, None] * deviation[..., 1:, None, :]
    assert ((lag - smoothed.lag_cov).abs() / scale).max() < 7 / 2000**0.5
    generator.manual_seed(3)
    assert torch.equal(paths, posterior_sample(model, y, u, samples=2000, form=form, generator=generator))


@pytest.mark.parametrize("form", FORMS)
def test_paths_go_on_from_a_state(form: str) -> None:
    """Of the second half of a series, given the first: as the halves of whole paths."""
    model, y, u = load(CASES["track2d_inputs"])
    assert u is not None
    _, state = kalman_filter(model, y[:97], u[:97], form=form)
    smoothed = kalman_smoother(model, y[97:], u[97:], initial_state=state, form=form)
    draw: dict[str, Any] = {"samples": 2000, "initial_state": state, "form": form}
    paths = posterior_sample(model, y[97:], u[97:], generator=torch.Generator().manual_seed(1), **draw)
    deviation = smoothed.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert paths.shape == (2000, 3, 4)
    assert ((paths.mean(0) - smoothed.mean).abs() / deviation).max() < 5 / 2000**0.5
    assert (paths.std(0) / deviation - 1).abs().max() < 5 / 4000**0.5
    with pytest.raises(TypeError, match=r"^posterior_sample: the state is a tuple"):
        posterior_sample(model, y, u, initial_state=(state.mean, state.cov))  # type: ignore[arg-type]  # wrong


def test_errors_name_the_argument() -> None:
    model, y, _ = load(CASES["track2d"])
    _, state = kalman_filter(model, y)
    two, narrow = KalmanState(state.mean.expand(2, 4), state.cov), KalmanState(state.mean[:3], state.cov)
    for run, message in [
        (lambda: kalman_filter(model, y[:, :1]), r"^kalman_filter: y has shape \(100, 1\)"),
        (lambda: kalman_filter(model, y, form="ud"), r"form is 'ud'"),
        (lambda: kalman_filter(model, y.expand(3, 100, 2), initial_state=two), r"the state has series \(2,\), y"),
        (lambda: kalman_filter(model, y, initial_state=narrow), r"the state's mean has"),
        (lambda: forecast(model, state, -1), r"^forecast: steps is -1"),
        (lambda: forecast(model._replace(A=model.A.expand(9, 4, 4)), state, 5), r"A has .* 5 steps .* by steps\)"),
        (lambda: kalman_smoother(model, y[0]), r"^kalman_smoother: y has shape \(2,\)"),
        (lambda: posterior_sample(model, y, samples=0), r"^posterior_sample: samples is 0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(TypeError, match=r"^kalman_filter: y is float32, expected one of float64"):
        kalman_filter(model, y.float())
    _, roots = kalman_filter(model, y, form="sqrt")
    with pytest.raises(TypeError, match=r'initial_state holds factors. Give form="sqrt"'):
        kalman_filter(model, y, initial_state=roots)
    with pytest.raises(
        TypeError, match=r"^forecast: the state is a tuple, .* returns \(moments, state\): give the second"
    ):
        forecast(model, kalman_filter(model, y), 3)  # type: ignore[arg-type]  # wrong


@pytest.mark.parametrize("form", FORMS)
def test_a_negative_variance_is_refused_even_where_innovations_stay_positive(form: str) -> None:
    model, y, _ = load(CASES["nile_local_level"])
    _, state = kalman_filter(model, y)
    for name in ("Q", "R", "P0"):
        wrong = model._replace(**{name: torch.tensor([[-0.01]], dtype=F64)})
        for run in (kalman_filter, kalman_smoother):
            with pytest.raises(
                ValueError, match=rf"^{run.__name__}: {name} has the variance -0\.01, expected none below"
            ):
                run(wrong, y[:3], form=form)
    kalman_filter(model._replace(P0=-model.P0), y[:3], initial_state=state, form=form)  # it is not used
    rounded = torch.diag(torch.tensor([1.0, -1e-14], dtype=F64))  # as sampling may leave it
    eye = torch.eye(2, dtype=F64)
    kalman_filter(StateSpace(eye, None, eye, None, rounded, eye, 0 * eye[0], eye), y[:3].expand(3, 2))
    each = torch.tensor([1.0, -1.0], dtype=F64).reshape(2, 1, 1, 1)
    with pytest.raises(ValueError, match="R has the variance -1,"):
        kalman_filter(model._replace(R=each), y, form=form)


def test_examples_in_docstrings() -> None:
    for name in ("ops.kalman", "classical.kalman", "classical.smoother", "classical.layer", "classical.nonlinear"):
        module = importlib.import_module(f"stateline.{name}")
        names = {"torch": torch, "StateSpace": StateSpace, "kalman_filter": kalman_filter}
        failed, tried = doctest.testmod(module, extraglobs=names)
        assert tried
        assert not failed, name
