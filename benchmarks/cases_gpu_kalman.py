"""Cases of one GPU: the Kalman filter of many short series at once, beside the package that filters on GPUs.

N series, T step, n state, m observation; float32. `pip install torch-kf` for the peer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.cases import OURS
from benchmarks.cases_gpu import DEVICE, Case
from benchmarks.cases_kalman import problem
from torch import Tensor

from stateline import ops
from stateline.ops.kalman import KalmanState

PEER = "torch-kf"
N, T = 100_000, 1000


def kalman() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    n, m, value = 4, 2, 4
    moved = N * T * (m + 1 + 2 * n) * value
    for what, gaps, shared, bytes_ in (
        ("shared", False, True, moved),
        ("of their own", False, False, moved + N * T * 2 * n * n * value),
        ("own gaps", True, False, moved + N * T * 2 * n * n * value),
    ):
        make = functools.partial(_filter, n, m, gaps, shared)
        yield Case("kalman", f"N{N} T{T} n{n} m{m} {what}", make, ("kalman",), bytes_, tokens=N * T)
    likelihood = functools.partial(_filter, n, m, False, False, "loglik")
    yield Case("kalman likelihood", f"N{N} T{T} n{n} m{m}", likelihood, ("kalman",), N * T * (m + 1) * value)
    yield Case("kalman gradient", f"N10000 T{T} n{n} m{m}", lambda: _gradient(10_000, n, m), ("kalman",), many=True)
    yield Case("kalman step", f"N{N} n{n} m{m} in place", lambda: _step(n, m), ("kalman",), tokens=N)


def _given(count: int, n: int, m: int, gaps: bool, shared: bool) -> dict[str, Any]:
    """Arguments of ops.kalman by name, on the device."""
    names = ("y", "A", "C", "Q", "R", "transition_offset", "observation_offset", "mean0", "cov0")
    values = problem(1000, T, n, m, gaps, shared)
    x: dict[str, Any] = {name: v if v is None else v.float().to(DEVICE) for name, v in zip(names, values, strict=True)}
    for name in ("y", "mean0", "cov0"):
        v: Tensor = x[name]
        x[name] = v.repeat(count // 1000, *[1] * (v.dim() - 1)) if v.shape[0] > 1 else v.expand(count, *v.shape[1:])
    x["initial_state"] = KalmanState(x.pop("mean0"), x.pop("cov0"))
    return x


def _filter(n: int, m: int, gaps: bool, shared: bool, keep: str = "all") -> dict[str, Callable[[], object]]:
    x = _given(N, n, m, gaps, shared)
    work: dict[str, Callable[[], object]] = {OURS: lambda: ops.kalman(**x, keep=keep, backend="gpu")}
    if keep == "all" and find_spec("torch_kf"):
        from torch_kf import GaussianState, KalmanFilter

        peer = KalmanFilter(*(x[name][0, 0] for name in "ACQR"))
        y = x["y"].transpose(0, 1)[..., None].contiguous()
        start = GaussianState(x["initial_state"].mean[..., None], x["initial_state"].cov.contiguous())
        work[PEER] = lambda: peer.filter(start, y, update_first=True, return_all=True)
    return work


def _gradient(count: int, n: int, m: int) -> dict[str, Callable[[], object]]:
    x = _given(count, n, m, False, False)
    leaves = [x[name].requires_grad_() for name in "ACQR"]

    def run() -> object:
        out, _ = ops.kalman(**x, keep="loglik", backend="gpu")
        return torch.autograd.grad(out.loglik.sum(), leaves)

    return {OURS: run}


def _step(n: int, m: int) -> dict[str, Callable[[], object]]:
    x = _given(N, n, m, False, False)
    y, state = x["y"][:, 0].contiguous(), x.pop("initial_state")
    one = {name: v if v is None else v[:, 0] for name, v in x.items() if name != "y"}
    return {OURS: lambda: ops.kalman_step_(state, y, **one, backend="gpu")}
