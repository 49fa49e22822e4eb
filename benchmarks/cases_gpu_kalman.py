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
#: What series have of their own, all matrices being common: the covariance they start with, nothing, or what they miss;
#: or all miss the same.
KINDS = ("own start", "common", "own gaps", "common gaps")


def kalman() -> Iterator[Case]:
    """Yield every case; inputs are built when a case is asked for."""
    for count, n, m in ((N, 4, 2), (N, 2, 1), (N // 5, 8, 4), (N // 50, 16, 8), (N // 50, 32, 16)):
        moved, of = 4 * count * T * (m + 1), functools.partial(_filter, count, n, m)
        for kind in KINDS if n == 4 else KINDS[:2] if n <= 8 else KINDS[:1]:
            what = f"N{count} T{T} n{n} m{m} {kind}"
            whole = 4 * count * T * (m + 1 + 2 * (n + n * n))
            yield Case("kalman", what, functools.partial(of, kind), ("kalman",), whole, tokens=count * T)
            make = functools.partial(of, kind, "loglik")
            yield Case("kalman likelihood", what, make, ("kalman",), moved, tokens=count * T)
        both = (m + 1 + n + n * n) + (2 * m + 1 + n + n * n)
        make = functools.partial(_gradient, count, n, m)
        what = f"N{count} T{T} n{n} m{m} {KINDS[0]}"
        yield Case("kalman gradient", what, make, ("kalman",), 4 * count * T * both, tokens=count * T)
    yield Case("kalman step", f"N{N} n4 m2 in place", lambda: _step(4, 2), ("kalman",), 4 * N * (2 + 3 * 20), tokens=N)


def _given(count: int, n: int, m: int, kind: str) -> dict[str, Any]:
    """Arguments of ops.kalman by name, on the device."""
    names = ("y", "A", "C", "Q", "R", "transition_offset", "observation_offset", "mean0", "cov0")
    values = problem(1000, T, n, m, kind == "own gaps", kind != "own start")
    if kind == "common gaps":
        values[0][:, torch.rand(T, m) < 0.1] = torch.nan
    x: dict[str, Any] = {name: v if v is None else v.float().to(DEVICE) for name, v in zip(names, values, strict=True)}
    for name in ("y", "mean0", "cov0"):
        v: Tensor = x[name]
        x[name] = v.repeat(count // 1000, *[1] * (v.dim() - 1)) if v.shape[0] > 1 else v.expand(count, *v.shape[1:])
    x["initial_state"] = KalmanState(x.pop("mean0"), x.pop("cov0"))
    return x


def _filter(count: int, n: int, m: int, kind: str, keep: str = "all") -> dict[str, Callable[[], object]]:
    x = _given(count, n, m, kind)
    work: dict[str, Callable[[], object]] = {OURS: lambda: ops.kalman(**x, keep=keep, backend="gpu")}
    if keep == "all" and n in (4, 16, 32) and kind == KINDS[0] and find_spec("torch_kf"):  # up to seconds a call
        from torch_kf import GaussianState, KalmanFilter

        peer = KalmanFilter(*(x[name][0, 0] for name in "ACQR"))
        y = x["y"].transpose(0, 1)[..., None].contiguous()
        start = GaussianState(x["initial_state"].mean[..., None], x["initial_state"].cov.contiguous())
        work[PEER] = lambda: peer.filter(start, y, update_first=True, return_all=True)
    return work


def _gradient(count: int, n: int, m: int) -> dict[str, Callable[[], object]]:
    x = _given(count, n, m, KINDS[0])
    leaves = [x[name].requires_grad_() for name in "ACQR"]

    def run() -> object:
        out, _ = ops.kalman(**x, keep="loglik", backend="gpu")
        return torch.autograd.grad(out.loglik.sum(), leaves)

    return {OURS: run}


def _step(n: int, m: int) -> dict[str, Callable[[], object]]:
    x = _given(N, n, m, KINDS[0])
    y, state = x["y"][:, 0].contiguous(), x.pop("initial_state")
    one = {name: v if v is None else v[:, 0] for name, v in x.items() if name != "y"}
    return {OURS: lambda: ops.kalman_step_(state, y, **one, backend="gpu")}
