"""Timing cases of the Kalman filter's C++ kernels beside its definition in PyTorch, on one thread or more.

N series, T step, n state, m observation; float64 unless a case says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.cases import OURS, Case
from torch import Tensor

from stateline.ops.kalman import cpu, reference

PLAIN = "plain PyTorch"
Run = Callable[[], object]


def kalman() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    for form in ("joseph", "sqrt"):
        small = functools.partial(_filter, 1, 10_000, 4, 2, form=form, beside=False)
        yield _case("kalman", 1, 10_000, 4, 2, small, form)
        yield _case("kalman", 1, 1000, 64, 32, functools.partial(_filter, 1, 1000, 64, 32, form=form), form)
    yield _case("kalman", 1000, 1000, 4, 2, lambda: _filter(1000, 1000, 4, 2, shared=True), "shared")
    yield _case("kalman", 1000, 1000, 4, 2, lambda: _filter(1000, 1000, 4, 2, gaps=True), "own gaps")
    yield _case("kalman gradient", 1, 1000, 4, 2, lambda: _gradient(1, 1000), "likelihood")
    yield _case("kalman smooth", 1, 10_000, 4, 2, lambda: _smooth(10_000), "from predictions")
    yield _case("kalman smooth gradient", 1, 1000, 4, 2, lambda: _smooth_gradient(1000), "from predictions")
    yield _case("kalman step", 1, 1, 4, 2, lambda: _step(1), "in place")
    yield _case("kalman step", 10_000, 1, 4, 2, lambda: _step(10_000), "in place")


def _case(op: str, N: int, T: int, n: int, m: int, make: Callable[[], dict[str, Run]], what: str) -> Case:
    return Case(op, f"N{N} T{T} n{n} m{m} {what}", "float64", lambda _: make())


def problem(N: int, T: int, n: int, m: int, gaps: bool = False, shared: bool = False) -> list[Any]:
    """y, A, C, Q, R, no offsets, mean0, cov0: one constant system, a tenth of the entries missing if `gaps`."""
    torch.manual_seed(0)

    def covariance(k: int, rows: int) -> Tensor:
        X = torch.randn(rows, 1, k, k, dtype=torch.float64)
        return X @ X.mT / k + 0.3 * torch.eye(k, dtype=torch.float64)

    y = torch.randn(N, T, m, dtype=torch.float64)
    y = torch.where(torch.rand(N, T, m) < 0.1, float("nan"), y) if gaps else y
    A = torch.randn(1, 1, n, n, dtype=torch.float64) * 0.6 / n**0.5
    C = torch.randn(1, 1, m, n, dtype=torch.float64)
    start = torch.zeros(N, n, dtype=torch.float64), covariance(n, 1 if shared else N)[:, 0]
    return [y, A, C, covariance(n, 1), covariance(m, 1), None, None, *start]


def _filter(
    N: int, T: int, n: int, m: int, *, form: str = "joseph", gaps: bool = False, shared: bool = False,
    beside: bool = True,
) -> dict[str, Run]:  # fmt: skip
    given = problem(N, T, n, m, gaps, shared)
    if form == "sqrt":
        given = [torch.linalg.cholesky(v) if i in (3, 4, 8) else v for i, v in enumerate(given)]
    runs: dict[str, Run] = {}
    for name, keep in ((OURS, "all"), ("likelihoods only", "loglik")):
        runs[name] = functools.partial(cpu.forward, *given, form=form, keep=keep, shared=shared)
    if beside:
        runs[PLAIN] = functools.partial(reference.forward, *given, form=form, keep="all", shared=shared)
    return runs


def _gradient(N: int, T: int) -> dict[str, Run]:
    given = problem(N, T, 4, 2)

    def both(module: Any) -> Run:
        def run() -> object:
            values = module.forward(*given, form="joseph", keep="all", shared=False)
            slopes = (None, None, None, None, torch.ones_like(values[4]), None, None)
            return module.backward(slopes, *given, values[2], values[3], shared=False)

        return run

    return {OURS: both(cpu), PLAIN: both(reference)}


def _predicted(T: int) -> tuple[Any, ...]:
    """What the smoother takes: y, A, C, R, no offset, predicted moments."""
    given = problem(1, T, 4, 2)
    values = reference.forward(*given, form="joseph", keep="all", shared=False)
    y, A, C, _, R = given[:5]
    return (y, A, C, R, None, *values[2:4])


def _smooth_gradient(T: int) -> dict[str, Run]:
    operands = _predicted(T)
    slopes = tuple(map(torch.ones_like, cpu.smooth(*operands, shared=False)))
    return {
        name: functools.partial(module.smooth_backward, slopes, *operands, shared=False)
        for name, module in ((OURS, cpu), (PLAIN, reference))
    }


def _smooth(T: int) -> dict[str, Run]:
    operands = _predicted(T)
    return {
        name: functools.partial(module.smooth, *operands, shared=False)
        for name, module in ((OURS, cpu), (PLAIN, reference))
    }


def _step(rows: int) -> dict[str, Run]:
    given = [None if v is None else v[:, 0] for v in problem(rows, 1, 4, 2)[:7]]
    mean, cov = problem(rows, 1, 4, 2)[7:]
    return {
        name: functools.partial(module.step, *given, mean.clone(), cov.clone(), None, form="joseph")
        for name, module in ((OURS, cpu), (PLAIN, reference))
    }
