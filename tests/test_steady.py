"""Filters of constant gain: reference values, a Kalman filter's loop, both kernels, cuts, gradients, refusals."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from test_classical_model import F64, REFERENCE, close, some_model, spd
from torch import Tensor
from torch.autograd import gradcheck

from stateline.classical import steady as module
from stateline.classical.components import arma, local_level, local_trend, seasonal, sum_of
from stateline.classical.model import StateSpace, simulate
from stateline.classical.steady import Steady, form_of, steady_filter, steady_state

SETTLED = 200


def kalman_loop(x: StateSpace, y: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, predicted_mean (T, n), loglik (T), and the mean predicted next, of one series."""
    mean, cov = x.m0, x.P0
    means, predicted, loglik = [], [], []
    for t in range(len(y)):
        drive = torch.zeros_like(mean) if u is None or x.B is None else x.B @ u[t]
        through = torch.zeros_like(y[t]) if u is None or x.D is None else x.D @ u[t]
        seen = torch.distributions.MultivariateNormal(x.C @ mean + through, x.C @ cov @ x.C.mT + x.R)
        gain = cov @ x.C.mT @ torch.linalg.inv(seen.covariance_matrix)
        predicted.append(mean)
        loglik.append(seen.log_prob(y[t]))
        mean = mean + gain @ (y[t] - seen.mean)
        kept = torch.eye(len(mean), dtype=F64) - gain @ x.C
        cov = kept @ cov @ kept.mT + gain @ x.R @ gain.mT
        means.append(mean)
        mean, cov = x.A @ mean + drive, x.A @ cov @ x.A.mT + x.Q
    return torch.stack(means), torch.stack(predicted), torch.stack(loglik), mean


def track() -> StateSpace:
    A, C, Q, R = (torch.tensor(REFERENCE["steady_state"][k], dtype=F64) for k in "ACQR")
    return StateSpace(A, None, C, None, Q, R, torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64))


def test_docstrings() -> None:
    found = doctest.testmod(module)
    assert found.attempted > 2
    assert found.failed == 0


def test_reference_values() -> None:
    expected, got = REFERENCE["steady_state"], steady_state(track())
    close(got.predicted_cov, expected["P_predicted"])
    close(got.cov, expected["P_filtered"])
    close(got.gain, expected["gain"])
    assert got.system.B is not None
    close(got.system.B, expected["gain_predictor"])
    closed = torch.linalg.eigvals((torch.eye(4, dtype=F64) - got.gain @ track().C) @ track().A).abs()
    close(closed.sort().values, expected["moduli"])


@pytest.mark.parametrize("form", ["scan", "conv"])
@pytest.mark.parametrize("inputs", [0, 2])
def test_it_is_the_tail_of_a_kalman_filter(form: str, inputs: int) -> None:
    x = some_model(4, 2, inputs)
    x = x._replace(A=0.95 * x.A / torch.linalg.eigvals(x.A).abs().max())  # so that series stay small
    u = torch.randn(SETTLED + 50, inputs, dtype=F64) if inputs else None
    _, y = simulate(x, SETTLED + 50, u)
    mean, predicted, loglik, after = kalman_loop(x, y, u)
    got, state = steady_filter(
        steady_state(x),
        y[SETTLED:],
        u if u is None else u[SETTLED:],
        initial_state=predicted[SETTLED],
        form=form,
    )
    close(got.mean, mean[SETTLED:], 1e-10)
    close(got.predicted_mean, predicted[SETTLED:], 1e-10)
    close(got.loglik, loglik[SETTLED:], 1e-10)
    close(state, after, 1e-10)


def test_started_settled_it_is_the_kalman_filter() -> None:
    x = track()
    found = steady_state(x)
    x = x._replace(P0=found.predicted_cov, m0=torch.randn(4, dtype=F64))
    found = steady_state(x)
    _, y = simulate(x, 60)
    out, state = steady_filter(found, y)
    for got, expected in zip((*out, state), kalman_loop(x, y), strict=True):
        close(got, expected, 1e-11)
    close(out.mean, simulate(found.system, 60, y, noise=False)[1], 1e-11)


@pytest.mark.parametrize(
    "x",
    [
        local_level(1.0, 0.5),
        sum_of(local_trend(0.1, 0.01), seasonal(12, 0.05), noise=1.0),
        arma([0.5, -0.3], [0.2], noise=0.1),
    ],
    ids=["level", "trend and season", "arma"],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_both_kernels_agree(x: StateSpace, dtype: torch.dtype, bound: float) -> None:
    _, y = simulate(x._replace(P0=torch.eye(len(x.A), dtype=F64)), 500, batch=(2, 3))
    found = steady_state(x.to(dtype))
    assert form_of(found)[0] == "scan"
    exact = simulate(steady_state(x).system, 500, y, noise=False)
    for form in ("scan", "conv"):
        got, _ = steady_filter(found, y.to(dtype), form=form)
        assert got.mean.dtype == dtype
        assert got.mean.shape == (2, 3, 500, len(x.A))
        close(got.predicted_mean.double(), exact[0], bound)
        close(got.mean.double(), exact[1], bound)


def deadbeat() -> Steady:
    """What is seen without error is known at once: the filter forgets everything, and its matrix is nilpotent."""
    return steady_state(arma([0.5, -0.3, 0.2], variance=1.0))


def test_what_has_no_eigenvectors_is_a_convolution() -> None:
    found = deadbeat()
    assert form_of(found)[0] == "conv"
    _, y = simulate(found.model, 40)
    got, _ = steady_filter(found, y)
    close(got.mean[2:, 0], y[2:, 0], 1e-9)
    close(got.predicted_mean, simulate(found.system, 40, y, noise=False)[0], 1e-9)
    with pytest.raises(ValueError, match=r"form is 'scan', and the filter has eigenvectors of condition .*form='conv'"):
        steady_filter(found, y, form="scan")


@pytest.mark.parametrize("form", ["scan", "conv"])
def test_a_series_in_pieces_and_its_gradients(form: str) -> None:
    x = some_model(3, 2, 1)
    found = steady_state(x)
    u, y, start = (torch.randn(*s, dtype=F64) for s in ((9, 1), (2, 9, 2), (2, 3)))
    whole, last = steady_filter(found, y, u, initial_state=start, form=form)
    for cut in (0, 1, 4, 9):
        first, state = steady_filter(found, y[:, :cut], u[:cut], initial_state=start, form=form)
        second, state = steady_filter(found, y[:, cut:], u[cut:], initial_state=state, form=form)
        for name in ("mean", "predicted_mean", "loglik"):
            close(torch.cat([getattr(first, name), getattr(second, name)], 1), getattr(whole, name), 1e-11)
        close(state, last, 1e-11)
    inputs = [v[..., :3, :].clone().requires_grad_() if v is not start else v.requires_grad_() for v in (y, u, start)]

    def run(y: Tensor, u: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        out, state = steady_filter(found, y, u, initial_state=start, form=form)
        return (*out, state)

    assert gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: steady_state(x._replace(A=x.A.expand(5, 4, 4))),
            r"steady_state: A has shape \(5, 4, 4\), expected one",
        ),
        (
            lambda x: steady_state(local_level(0.0, 1.0)),
            r"no stabilising solution\. Every motion that does not die out",
        ),
        (lambda x: steady_state(x._replace(C=torch.zeros(2, 4, dtype=F64))), r"no stabilising solution"),
        (lambda x: steady_state(x._replace(R=-x.R)), r"steady_state: R has the eigenvalue"),
        (lambda x: steady_filter(steady_state(x), torch.full((5, 2), math.nan, dtype=F64)), r"y has missing entries"),
        (lambda x: steady_filter(steady_state(x), torch.ones(5, 3, dtype=F64)), r"y has shape \(5, 3\), .* m = 2"),
        (
            lambda x: steady_filter(
                steady_state(x), torch.ones(5, 2, dtype=F64), initial_state=torch.ones(3, dtype=F64)
            ),
            r"initial_state has shape \(3,\), expected \(…, n\) with n = 4",
        ),
        (lambda x: steady_filter(steady_state(x), torch.ones(5, 2, dtype=F64), form="fft"), r"form is 'fft', expected"),
    ],
)
def test_refusals(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(track())


def test_a_state_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"initial_state is a tuple, .* A Kalman filter's state has it as `mean`"):
        steady_filter(steady_state(track()), torch.ones(5, 2, dtype=F64), initial_state=(1,))  # type: ignore[arg-type]  # wrong on purpose


def test_noise_that_is_singular_is_allowed_where_the_answer_is() -> None:
    x = track()._replace(Q=spd(4, rank=2))
    found = steady_state(x)
    left = x.A @ found.cov @ x.A.mT + x.Q - found.predicted_cov
    close(left, torch.zeros(4, 4), 1e-9)
