"""The scan over time gives what the serial filter gives: values, gradients, likelihoods in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import pairwise
from test_kalman import BOUND, USUAL, close, problem, symmetric
from test_ops import name_of
from torch import Tensor

from stateline import ops
from stateline.classical import StateSpace, constant_velocity, kalman_filter, simulate
from stateline.classical.kalman import Flat
from stateline.classical.parallel import parallel_filter
from stateline.ops.kalman import Filtered, KalmanState

GRID: dict[str, list[Any]] = {
    "N": [1, 3], "t": [1, 2, 3, 4, 7, 12], "n": [1, 2, 4], "m": [1, 3], "A": ["one", "time", "both"],
    "noise": ["one", "time", "series", "both"], "gaps": ["none", "own", "all"], "offsets": ["none", "one", "both"],
}  # fmt: skip


def tracking(dtype: torch.dtype) -> tuple[StateSpace, Tensor]:
    """400 positions in a plane, some missing."""
    generator = torch.Generator().manual_seed(1)
    line = constant_velocity(1.0, 0.05, 0.5, prior=10.0)
    model = StateSpace(*(None if v is None else v.double() for v in line))  # type: ignore[arg-type]  # eight parts
    _, y = simulate(model, 400, batch=2, generator=generator)
    y = torch.where(torch.rand(y.shape, generator=generator) < 0.2, torch.nan, y)
    return model.to(dtype), y.to(dtype)


@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_it_equals_the_serial_filter(s: dict[str, Any]) -> None:
    case = problem(USUAL | s)
    x = {k: v.requires_grad_() for k, v in case.leaves.items()}
    N, noise = x["y"].shape[0], [symmetric(x[k]) for k in "QR"]
    start = KalmanState(x["m0"], symmetric(x["P0"]).expand(N, *x["P0"].shape[1:]))
    out, state = parallel_filter(Flat(x["y"], x["A"], x["C"], *noise, x.get("b"), x.get("d"), start, (N,)), "all")
    offsets = {"transition_offset": x.get("b"), "observation_offset": x.get("d")}
    want, last = ops.kalman(x["y"], x["A"], x["C"], *noise, start, **offsets)
    pairs = [*zip(out[:5], want[:5], strict=True), (state.mean, last.mean), (state.cov, last.cov)]  # type: ignore[union-attr]  # of a filter in covariances
    totals = [torch.zeros(()).double(), torch.zeros(()).double()]
    for (a, b), name in zip(pairs, (*Filtered._fields[:5], "next", "next cov"), strict=True):
        assert a is not None
        assert b is not None
        close(name, a, b, 1e-9)
        weight = torch.randn_like(b)
        totals = [totals[0] + (a * weight).sum(), totals[1] + (b * weight).sum()]
    options: dict[str, Any] = {"materialize_grads": True, "retain_graph": True}
    grads = (torch.autograd.grad(v, list(x.values()), **options) for v in totals)
    for name, a, b in zip(x, *grads, strict=True):
        close(f"d{name}", a, b, BOUND[torch.float64][1])


def test_likelihood_in_float32() -> None:
    model, y = tracking(torch.float64)
    exact, _ = kalman_filter(model, y)
    out, _ = kalman_filter(*tracking(torch.float32), parallel=True)
    assert (out.loglik.double().sum(-1) - exact.loglik.sum(-1)).abs().max() < 0.01
    double, state = kalman_filter(model, y, parallel=True, keep="loglik")
    close("loglik", double.loglik, exact.loglik, 1e-9)
    assert double.mean is None
    assert state.mean.shape == (2, 4)


def test_what_it_cannot_do_is_refused() -> None:
    model, y = tracking(torch.float64)
    with pytest.raises(ValueError, match=r"^kalman_filter: form is 'sqrt' with parallel=True, expected 'joseph'"):
        kalman_filter(model, y, form="sqrt", parallel=True)
    with pytest.raises(ValueError, match="backend is 'cpu' with parallel=True"):
        kalman_filter(model, y, backend="cpu", parallel=True)
    sure = model._replace(Q=0 * model.Q, R=0 * model.R)
    with pytest.raises(ValueError, match=r"C Q Cᵀ \+ R of series 0 at step 1 is not positive .* leave it out"):
        kalman_filter(sure, y.nan_to_num(), parallel=True)
    assert kalman_filter(model, y[:, :0], parallel=True)[0].loglik.shape == (2, 0)
