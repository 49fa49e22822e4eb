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
from stateline.ops import cuda
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

#: Series that share matrices. gaps: the same in all (in the end: now and then), but for one entry of the last series at
#: the last step ("last") or of the first series at the first ("first"), or for a series that misses everything ("one").
#: start: one in memory, equal, or another of the last series.   turned: y lies step by step.   fails: S once is
#: singular.
COMMON: dict[str, list[Any]] = {
    "dtype": list(BOUND), "N": [2, 33, 70], "t": [0, 1, 33, 300], "size": [(3, 2), (2, 1)], "A": ["one", "time"],
    "noise": ["one", "time"], "offsets": ["none", "one", "own"], "start": ["one", "equal", "other"],
    "gaps": ["none", "same", "all", "last", "first", "one", "own", "rare"], "turned": [False, True],
    "keep": ["all", "filtered", "predicted", "loglik"], "fails": [False, True],
}  # fmt: skip
if not INTERPRETED:
    COMMON |= {"N": [1, 2, 33, 70], "size": [(1, 1), (2, 3), (3, 2), (4, 2), (5, 8), (8, 4)]}

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
        assert info[:2].tolist() == [1, 0]
        return
    mean, _, _, _, loglik, *_, info = gpu.forward(*there, form="joseph", keep="all", shared=False)
    assert info is not None
    assert mean is not None
    assert loglik is not None
    assert info[:2].tolist() == [1, 2]
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
        assert info[:2].tolist() == [-1, -1]
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


def flip(y: Tensor, *at: int) -> None:
    """An entry that is missing is there, or the other way round."""
    y[at] = 1.0 if y[at] != y[at] else torch.nan


def share(s: dict[str, Any]) -> list[Any]:
    """Arguments of `forward` on the device, all series with the same matrices."""
    (n, m), N, T = s["size"], s["N"], s["t"]
    one = {"N": 1, "n": n, "m": m, "gaps": "none", "start": "one"}
    one["offsets"] = "none" if s["offsets"] == "none" else "both"
    x, many = problem(USUAL | s | one).leaves, problem(USUAL | s | one | {"N": N, "A": "one", "noise": "one"}).leaves
    x |= {k: v for k, v in many.items() if k in ("y", "m0") or (k in "bd" and s["offsets"] == "own")}
    P0 = symmetric(x["P0"]).expand(N, n, n)
    y, P0 = x["y"], P0 if s["start"] == "one" else P0.clone()
    if s["start"] == "other":
        P0[-1] *= 1.001
    if s["gaps"] == "rare":
        y[:, 50::97] = torch.nan
    elif s["gaps"] != "none":
        y[(torch.rand(1, T, m) < (1.1 if s["gaps"] == "all" else 0.3)).expand(N, T, m)] = torch.nan
    if s["fails"] and T:
        y[:, 2 * T // 3] = torch.nan if s["gaps"] == "all" else 1.0
        for k in "CR":
            x[k] = x[k].expand(1, T, *x[k].shape[2:]).clone()
            x[k][:, 2 * T // 3] = 0
    if s["gaps"] in ("first", "last") and T:
        flip(y, *((0, 0, 0) if s["gaps"] == "first" else (-1, -1, -1)))
    if s["gaps"] == "one":
        y[N // 2] = torch.nan
    if s["gaps"] == "own":
        y[torch.rand(N, T, m) < 0.05] = torch.nan
    if s["turned"]:
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    given = [y, x["A"], x["C"], symmetric(x["Q"]), symmetric(x["R"]), x.get("b"), x.get("d"), x["m0"]]
    given = [None if v is None else v.to(DEVICE) for v in given]
    return [*given, P0.to(DEVICE) if s["start"] != "one" else P0[:1].to(DEVICE).expand(N, n, n)]


def same_bits(a: Tensor | None, b: Tensor | None) -> None:
    """Of whatever is a number; what is none is none in both."""
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        bits = {4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        numbers = [torch.where(v != v, 0, v).contiguous().view(bits) for v in (a, b)]
        assert torch.equal(a != a, b != b)
        assert torch.equal(*numbers)


@pytest.mark.parametrize("s", pairwise(COMMON), ids=named)
def test_common_covariances_have_the_bits_of_own_ones(s: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = share(s)
    for shared in (False, True):
        if shared and (s["start"] == "other" or s["gaps"] not in ("none", "same", "all", "rare")):
            continue
        given[8] = given[8][:1] if shared else given[8]
        results = []
        for common in (False, True):
            monkeypatch.setattr(gpu, "may_be_common", lambda *_, common=common: common)
            results.append(gpu.forward(*given, form="joseph", keep=s["keep"], shared=shared))
        for a, b in zip(*results, strict=True):
            same_bits(a, b)
        if s["gaps"] in ("none", "same", "rare"):
            assert torch.isnan(results[1][4]).any() == (s["fails"] and s["t"] > 0)


class Followed:
    """Kernels but for that of series whose covariances are their own."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def launch(self, name: str, *rest: Any) -> None:
        if name != "kalman_forward":
            self.of.launch(name, *rest)


def test_covariances_are_computed_once_as_far_as_they_are_common(monkeypatch: pytest.MonkeyPatch) -> None:
    s: dict[str, Any] = {key: values[0] for key, values in COMMON.items()}
    given = share(s | {"N": 70, "t": 300, "size": (3, 2), "gaps": "same", "start": "equal"})
    system = gpu._System(given[:7])
    assert gpu.may_be_common(system.variant, system.views, 70, 300)
    whole = gpu.forward(*given, form="joseph", keep="all", shared=False)
    library = gpu.library
    monkeypatch.setattr(gpu, "library", lambda *key: Followed(library(*key)))
    for a, b in zip(whole, gpu.forward(*given, form="joseph", keep="all", shared=False), strict=True):
        same_bits(a, b)
    flip(given[0], 40, 200, 1)
    _, cov, *_ = gpu.forward(*given, form="joseph", keep="all", shared=False)
    assert whole[1] is not None
    assert cov is not None
    for rows in (slice(32), slice(64, 70)):  # warps that follow to the end
        same_bits(cov[rows], whole[1][rows])
    same_bits(cov[32:64, :192], whole[1][32:64, :192])  # whole runs, as far as they tell nothing else
    assert torch.isnan(cov[32:64, 208:]).all()  # fenced, and written by nobody


def both_ways(monkeypatch: pytest.MonkeyPatch, given: list[Any]) -> tuple[Any, Any]:
    """Results with covariances of each series' own, and of all as far as they have them in common."""
    results = []
    for common in (False, True):
        monkeypatch.setattr(gpu, "may_be_common", lambda *_, common=common: common)
        results.append(gpu.forward(*given, form="joseph", keep="all", shared=False))
    return results[0], results[1]


@pytest.mark.parametrize("fails", FLAG)
def test_a_series_that_misses_something_else_goes_on_by_itself(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a run of steps, and after the step at which all have failed."""
    s: dict[str, Any] = {key: values[0] for key, values in COMMON.items()}
    given = share(s | {"N": 70, "t": 300, "size": (3, 2), "gaps": "same", "noise": "time", "fails": fails})
    flip(given[0], 5, 251, 1)
    own, common = both_ways(monkeypatch, given)
    for a, b in zip(own, common, strict=True):
        same_bits(a, b)
    assert common[-1][:2].tolist() == ([0, 200] if fails else [-1, -1])


@pytest.mark.parametrize("t", [300, 301])
def test_common_covariances_settle(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this system soon are two in turn. Steps from then on are copies, until something is missing."""
    eye = torch.eye(2, device=DEVICE)[None, None]
    A = torch.tensor([[1.0, 1.0], [0.0, 0.95]], device=DEVICE)[None, None]
    y, mean0, cov0 = torch.zeros(33, t, 1, device=DEVICE), torch.zeros(33, 2, device=DEVICE), eye[0].expand(33, 2, 2)
    empty, made = cuda.empty, []

    def remembered(*args: Any) -> Tensor:
        made.append(empty(*args))
        return made[-1]

    monkeypatch.setattr(cuda, "empty", remembered)
    for gap in (None, 100, 201):
        if gap is not None:
            y[:, gap] = torch.nan
        own, common = both_ways(
            monkeypatch, [y, A, eye[:, :, :1], 0.1 * eye, eye[..., :1, :1], None, None, mean0, cov0]
        )
        for a, b in zip(own, common, strict=True):
            same_bits(a, b)
        marks = [v for v in made if v.dtype == torch.int64 and len(v) > 4][-1]
        assert marks[3] == 2


@pytest.mark.skipif(INTERPRETED, reason="only a GPU records graphs")
def test_a_graph_finds_out_anew_whether_covariances_are_common() -> None:
    s: dict[str, Any] = {key: values[0] for key, values in COMMON.items()} | {"N": 70, "t": 70, "gaps": "same"}
    given, other = share(s), share(s | {"gaps": "own"})
    gpu.forward(*given, form="joseph", keep="all", shared=False)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gpu.forward(*given, form="joseph", keep="all", shared=False)
    for y in (given[0].clone(), other[0]):
        given[0].copy_(y)
        graph.replay()
        for a, b in zip(recorded, gpu.forward(*given, form="joseph", keep="all", shared=False), strict=True):
            same_bits(a, b)


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
