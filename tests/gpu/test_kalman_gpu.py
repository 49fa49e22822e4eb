"""kalman's GPU kernels against one Gaussian of everything, and the reference: values, gradients, states, slots."""

from __future__ import annotations

from typing import Any

import host
import pytest
import torch
from oracles import pairwise
from test_gpu_ops import named
from test_kalman import BOUND, USUAL, Problem, check, close, problem, symmetric
from test_ops import FLAG
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.ops.kalman import Filtered, KalmanState, SquareRootState, gpu, reference

GRID: dict[str, list[Any]] = {
    "backend": ["gpu"], "dtype": list(BOUND), "form": ["joseph"], "A": ["one", "time", "series", "both"],
    "noise": ["one", "time", "series", "both"], "gaps": ["none", "same", "own", "all"],
    "offsets": ["none", "one", "both"], "start": ["one", "own"],
}  # fmt: skip
if INTERPRETED:
    GRID |= {"N": [1, 33], "t": [0, 1, 3, 9], "n": [1, 2, 3, 4, 7], "m": [1, 2, 3]}
else:
    GRID |= {"N": [1, 2, 33, 70], "t": [0, 1, 2, 7, 12, 18], "n": [1, 2, 3, 4, 5, 6, 7, 8], "m": [1, 2, 3, 4, 5, 8]}

pytestmark = pytest.mark.skipif(INTERPRETED and host.COMPILER is None, reason="no C++ compiler to stand in for NVRTC")


@pytest.fixture(autouse=True)
def _on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Problem.run` moves to the device, and its results back."""
    run = Problem.run

    def there(self: Problem, x: dict[str, Tensor], **options: Any) -> Any:
        out, state = run(self, {k: v.to(DEVICE) for k, v in x.items()}, **options)
        back = type(out)(*(None if v is None else v.cpu() for v in out))
        return back, KalmanState(state.mean.cpu(), state.cov.cpu())

    monkeypatch.setattr(Problem, "run", there)


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    check(s)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_gradients_of_each_result(dtype: torch.dtype) -> None:
    """One by one, so that those which are None are."""
    case = problem(USUAL | {"backend": "gpu", "dtype": dtype, "t": 3, "n": 2, "offsets": "none"})
    case.leaves["P0"] = symmetric(case.leaves["P0"])
    x = {k: v.requires_grad_() for k, v in case.leaves.items()}
    given = [x["y"], x["A"], x["C"], symmetric(x["Q"]), symmetric(x["R"]), None, None, x["m0"], x["P0"]]
    exact = [None if v is None else v.detach().double() for v in given]
    *values, _ = reference.forward(*exact, form="joseph", keep="all", shared=False)  # type: ignore[arg-type]  # nine
    there = [None if v is None else v.detach().to(DEVICE) for v in given]
    before = [v.to(DEVICE, dtype) for v in values[2:4]]  # type: ignore[union-attr]  # all kept
    for i, value in enumerate(values):
        assert value is not None
        slope = torch.randn_like(value)
        slopes = [slope if k == i else None for k in range(7)]
        want = reference.backward(tuple(slopes), *exact, *values[2:4], shared=False)  # type: ignore[arg-type]  # nine
        slopes = [None if v is None else v.to(DEVICE, dtype) for v in slopes]
        got = gpu.backward(tuple(slopes), *there, *before, shared=False)  # type: ignore[arg-type]  # nine
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            if a is not None and b is not None:
                close(f"{i}: {k}", a.cpu(), b, BOUND[dtype][1])


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_steps_follow_the_whole_in_slots(dtype: torch.dtype) -> None:
    case = problem(USUAL | {"backend": "gpu", "dtype": dtype, "N": 2, "t": 3, "A": "both"})
    x, bound = {k: v.to(DEVICE) for k, v in case.leaves.items()}, BOUND[dtype][0]
    out, last = case.run(case.leaves)
    state = KalmanState(*(torch.full((5, *tail), 7.0, dtype=dtype, device=DEVICE) for tail in ((3,), (3, 3))))
    state.mean[[3, 1]], state.cov[[3, 1]] = x["m0"], symmetric(x["P0"])
    index = torch.tensor([3, 1], device=DEVICE, dtype=torch.int32)
    options: dict[str, Any] = {"transition_offset": x["b"][:, 0], "observation_offset": x["d"][:, 0], "backend": "gpu"}
    for t in range(3):
        system = (x["A"][:, t], x["C"][:, 0], symmetric(x["Q"][:, 0]), symmetric(x["R"][:, 0]))
        step = ops.kalman_step_(state, x["y"][:, t], *system, index=index, **options)
        for got, whole in ((step.mean, out.mean), (step.cov, out.cov), (step.loglik, out.loglik)):
            close(f"step {t}", got.cpu(), whole[:, t].double(), bound)  # type: ignore[union-attr,index]  # kept
    close("mean", state.mean[[3, 1]].cpu(), last.mean.double(), bound)
    close("cov", state.cov[[3, 1]].cpu(), last.cov.double(), bound)
    assert (state.mean[[0, 2, 4]] == 7).all()
    before = state.mean.clone()
    index = torch.tensor([-1, 1], device=DEVICE)
    step = ops.kalman_step_(state, x["y"][:, 0].nan_to_num(1.0), *system, index=index, **options)
    assert not step.mean[0].any()  # type: ignore[index]  # kept
    assert step.loglik[0] == 0
    assert torch.equal(state.mean[3], before[3])
    assert not torch.equal(state.mean[1], before[1])


def test_states_and_moments_may_lie_anywhere() -> None:
    """A state within other memory, at any address; moments turned in memory."""
    eye = torch.eye(2, device=DEVICE)
    y, system = torch.ones(3, 1, device=DEVICE), (eye[None], eye[None, :1], eye[None], eye[None, :1, :1])
    memory = torch.zeros(20, device=DEVICE)
    packed = KalmanState(memory[:6].view(3, 2), memory[6:18].view(3, 2, 2))
    packed.cov.copy_(eye)
    apart = KalmanState(packed.mean.clone(), packed.cov.clone())
    assert packed.cov.data_ptr() % 16
    for state in (packed, apart):
        ops.kalman_step_(state, y, *system, backend="gpu")
    assert torch.equal(packed.mean, apart.mean)
    assert torch.equal(packed.cov, apart.cov)
    assert not memory[18:].any()
    turned = torch.arange(24.0, device=DEVICE).view(2, 3, 4).permute(2, 1, 0)
    pieces = gpu._pieces(turned, 1)
    assert pieces.stride(-1) == 1
    assert torch.equal(pieces, turned)


@pytest.mark.parametrize("keep", ["filtered", "loglik"])
def test_keep_and_batch_change_no_bits(keep: str) -> None:
    case = problem(USUAL | {"backend": "gpu", "N": 40 if not INTERPRETED else 5, "t": 3})
    case.setting["backend"] = "gpu"
    whole, last = case.run(case.leaves)
    some, end = case.run(case.leaves, keep=keep)
    alone = {k: v[2:3] if k in ("y", "m0", "P0") else v for k, v in case.leaves.items()}
    one, _ = case.run(alone, keep=keep)
    assert torch.equal(end.cov, last.cov)
    for name in ("mean", "cov", "predicted_mean", "loglik"):
        kept = name == "loglik" or (keep == "filtered" and not name.startswith("predicted"))
        assert (getattr(some, name) is not None) == kept
        if kept:
            assert torch.equal(getattr(some, name), getattr(whole, name))
            assert torch.equal(getattr(one, name)[0], getattr(whole, name)[2])


@pytest.mark.parametrize("stepwise", FLAG)
def test_the_first_failure_is_told_and_its_series_is_nan(stepwise: bool) -> None:
    case = problem(USUAL | {"backend": "gpu", "N": 4, "t": 4, "noise": "both", "gaps": "none", "offsets": "none"})
    x = case.leaves
    for series, t in ((3, 2), (1, 2), (2, 3)):
        x["C"][series, t] = x["R"][series, t] = 0
    given = [symmetric(x[k]) if k in "QR" else x[k] for k in "yACQR"] + [None, None, x["m0"], symmetric(x["P0"])]
    there: list[Any] = [None if v is None else v.to(DEVICE) for v in given]
    if stepwise:
        now = [None if v is None else v[:, min(2, v.shape[1] - 1)] for v in there[:7]]
        *_, info = gpu.step(*now, there[7].clone(), there[8].clone(), None, form="joseph")
        assert info.tolist() == [1, 0]
        return
    mean, _, _, _, loglik, *_, info = gpu.forward(*there, form="joseph", keep="all", shared=False)
    assert info is not None
    assert mean is not None
    assert loglik is not None
    assert info.tolist() == [1, 2]
    assert torch.isnan(loglik).cpu().sum(1).tolist() == [0, 2, 1, 2]
    assert not torch.isnan(mean[0]).any()
    found = Filtered(mean, None, None, None, loglik)
    with pytest.raises(ValueError, match=r"^kalman: loglik\[1, 2\] is NaN: .* form=\"sqrt\""):
        found.check()
    fine = Filtered(mean, None, None, None, loglik[:1])
    assert fine.check() is fine


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_runs_of_steps_and_warps_of_series_meet(dtype: torch.dtype) -> None:
    """More steps than are moved at once, more series than a warp has, everything of its own and in motion; strides."""
    case = problem(USUAL | {"backend": "gpu", "dtype": dtype, "N": 34, "t": 37, "n": 3, "m": 2, "A": "both",
                            "noise": "both", "offsets": "both"})  # fmt: skip
    x = {k: v + 0.1 * (torch.randn_like(v).triu(1)) if k in ("Q", "R", "P0") else v for k, v in case.leaves.items()}
    x |= {k: x[k] - (x[k] - case.leaves[k]).mT for k in ("Q", "R", "P0")}  # not symmetric: only that part counts
    given = [x[k] for k in ("y", "A", "C", "Q", "R", "b", "d", "m0", "P0")]
    exact = [v.double() for v in given]
    *values, _ = reference.forward(*exact, form="joseph", keep="all", shared=False)
    slopes = tuple(torch.randn_like(v).to(dtype) for v in values)  # type: ignore[arg-type]  # all kept
    wanted = reference.backward(tuple(v.double() for v in slopes), *exact, *values[2:4], shared=False)  # type: ignore[arg-type]  # nine
    for turned in (False, True):  # in memory: series first, or steps
        there = [v.to(DEVICE) for v in given]
        if turned:
            there = [
                v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() > 3 or k < 1 else v
                for k, v in enumerate(there)
            ]
        *got, info = gpu.forward(*there, form="joseph", keep="all", shared=False)
        assert info is not None
        assert info.tolist() == [-1, -1]
        for k, (a, b) in enumerate(zip(got, values, strict=True)):
            close(f"result {k}", a.cpu(), b, BOUND[dtype][0])  # type: ignore[union-attr,arg-type]  # all kept
        back = gpu.backward(tuple(v.to(DEVICE) for v in slopes), *there, *got[2:4], shared=False)  # type: ignore[arg-type]  # nine
        for k, (a, b) in enumerate(zip(back, wanted, strict=True)):
            close(f"gradient {k}", a.cpu(), b, BOUND[dtype][1])  # type: ignore[union-attr,arg-type]  # all there


def test_shared_covariances() -> None:
    """Those of one series, as whoever calls promises, with their gradients."""
    case = problem(USUAL | {"backend": "gpu", "N": 35, "t": 9, "n": 4, "gaps": "same", "start": "one"})
    x = {k: symmetric(v) if k in ("Q", "R", "P0") else v for k, v in case.leaves.items()}
    given = [x[k] for k in ("y", "A", "C", "Q", "R", "b", "d", "m0", "P0")]
    *values, _ = reference.forward(*given, form="joseph", keep="all", shared=True)
    there = [v.to(DEVICE) for v in given]
    *got, _ = gpu.forward(*there, form="joseph", keep="all", shared=True)
    for k, (a, b) in enumerate(zip(got, values, strict=True)):
        close(f"result {k}", a.cpu(), b, BOUND[torch.float64][0])  # type: ignore[union-attr,arg-type]  # all kept
    slopes = [torch.randn_like(v) for v in values]  # type: ignore[arg-type]  # all kept
    wanted = reference.backward(tuple(slopes), *given, *values[2:4], shared=True)  # type: ignore[arg-type]  # nine
    back = gpu.backward(tuple(v.to(DEVICE) for v in slopes), *there, *got[2:4], shared=True)  # type: ignore[arg-type]  # nine
    for k, (a, b) in enumerate(zip(back, wanted, strict=True)):
        close(f"gradient {k}", a.cpu(), b, BOUND[torch.float64][1])  # type: ignore[union-attr,arg-type]  # all there


def test_what_is_not_covered_is_refused_by_name() -> None:
    y, A, C = torch.zeros(1, 2, 1, device=DEVICE), torch.zeros(1, 1, 65, 65), torch.zeros(1, 1, 1, 65)
    words = "the system has 65 states and 1 observed values, its GPU kernels know up to 64 of each."
    assert gpu.problem(y, A, C) == words
    state = SquareRootState(torch.zeros(1, 2), torch.zeros(1, 2, 2))
    for args in ((y, A[..., :2, :2], C[..., :2], None, None, "sqrt"), (y, A[..., :2, :2], C[..., :2], y, y, state)):
        assert 'compute form="joseph"' in str(gpu.problem(*args))
    assert gpu.problem(y, A[..., :2, :2], C[..., :2], None, None, "joseph") is None
    if not INTERPRETED:
        choice = backends.explain(ops.kalman, y, A, C)
        assert choice.name == "reference"
        assert "up to 64" in choice.rejected["gpu"]
