"""kalman's GPU kernels of several lanes a series against the reference in float64: values, gradients, bits."""

from __future__ import annotations

import functools
from typing import Any

import host
import pytest
import torch
from test_kalman import BOUND, close
from test_kalman_native import KINDS, problem
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.ops.kalman import KalmanState, gpu, gpu_plan, reference

pytestmark = pytest.mark.skipif(INTERPRETED and host.COMPILER is None, reason="no C++ compiler to stand in for NVRTC")

F32, F64 = torch.float32, torch.float64
#: Series, steps, states, observed values, kind of system, dtype. Compiled for sizes, dtype, and one series' own or not.
CASES: list[tuple[int, int, int, int, str, torch.dtype]] = [
    (3, 4, 5, 3, "both", F64), (9, 2, 5, 3, "series", F64), (1, 1, 5, 3, "time", F64), (2, 3, 17, 10, "both", F64),
    (1, 2, 17, 10, "constant", F64), (5, 3, 2, 9, "time", F32), (3, 2, 9, 2, "both", F32),
]  # fmt: skip
if not INTERPRETED:
    CASES += [
        (33 if n < 9 else 5, 7, n, m, kind, dtype)
        for n, m in (
            (1, 1), (2, 1), (3, 5), (4, 2), (6, 3), (7, 7), (8, 4), (8, 8), (11, 1), (12, 12), (13, 4), (16, 8),
            (16, 16), (20, 7), (24, 24), (31, 2), (32, 16), (32, 32), (40, 3), (9, 40),
        )
        for kind, dtype in (("constant", F32), ("both", F64))
    ] + [(2, 3, 64, 32, "time", F32), (3, 40, 32, 16, "series", F32)]  # fmt: skip


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small systems too are computed by these kernels."""
    monkeypatch.setattr(gpu_plan, "FEWEST", {file: {4: 1, 8: 1} for file in gpu_plan.FEWEST})


def there(given: list[Any], dtype: torch.dtype = F64) -> list[Any]:
    return [None if v is None else v.to(DEVICE, dtype) for v in given]


def run(given: list[Any], keep: str = "all", shared: bool = False) -> list[Any]:
    return list(gpu.forward(*given, form="joseph", keep=keep, shared=shared))


def check(given: list[Any], dtype: torch.dtype = F64, shared: bool = False) -> None:
    """Values, and gradients of all results at once."""
    given = [None if v is None else v.to(dtype).double() for v in given]
    *want, _ = reference.forward(*given, form="joseph", keep="all", shared=shared)
    x = there(given, dtype)
    *got, info = run(x, shared=shared)
    assert info[:2].tolist() == [-1, -1]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        close(f"result {i}", a.cpu(), b, BOUND[dtype][0])  # type: ignore[arg-type]  # all kept
        assert i not in (1, 3, 6) or torch.equal(a, a.mT)  # covariances are symmetric to the last bit
    slopes = tuple(torch.randn_like(v).to(dtype).double() for v in want)  # type: ignore[arg-type]  # all kept
    exact = reference.backward(slopes, *given, *want[2:4], shared=shared)  # type: ignore[arg-type]  # nine
    found = gpu.backward(tuple(there(list(slopes), dtype)), *x, *got[2:4], shared=shared)  # type: ignore[arg-type]  # nine
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(f"gradient {i}", a.cpu(), b, BOUND[dtype][1])
    assert not found[0][torch.isnan(x[0])].any()  # type: ignore[index]  # of y


@pytest.mark.parametrize(("N", "T", "n", "m", "kind", "dtype"), CASES)
def test_values_and_gradients(N: int, T: int, n: int, m: int, kind: str, dtype: torch.dtype) -> None:
    check(problem(N, T, n, m, kind, offsets=kind != "constant"), dtype)


@pytest.mark.parametrize("moving", [1, 2, 3, 4])
def test_each_matrix_may_vary_alone(moving: int) -> None:
    given = problem(3, 3, 5, 3, "time", offsets=False)
    check([v if v is None or i not in (1, 2, 3, 4) or i == moving else v[:, :1] for i, v in enumerate(given)])


@pytest.mark.parametrize("N", [1, 5])
def test_no_steps_and_nothing_seen(N: int) -> None:
    check(problem(N, 0, 5, 3))
    given = problem(N, 2, 5, 3)
    given[0][:] = float("nan")
    check(given)
    assert not run(there(given))[4].any()


def test_shared_covariances() -> None:
    check(problem(9, 3, 5, 3, "time", shared=True), shared=True)


@pytest.mark.parametrize("zero", [(3,), (4,), (8,), (3, 8)], ids=str)
def test_singular_covariances(zero: tuple[int, ...]) -> None:
    """Q, R, the prior, or two of them 0."""
    given = problem(3, 2, 5, 3, offsets=False)
    given[2] = given[2] / 4
    check([v * 0 if i in zero else v for i, v in enumerate(given)])


def test_moments_of_any_layout() -> None:
    given = problem(4, 3, 5, 3, "both")
    want, x = run(there(given)), there(given)
    slopes = [torch.randn_like(v) for v in want[:7]]
    exact = gpu.backward(tuple(slopes), *x, *want[2:4], shared=False)
    turned = [v if v.dim() < 3 or i > 6 else v.transpose(0, 1).contiguous().transpose(0, 1) for i, v in enumerate(x)]
    turned[1] = x[1].mT.contiguous().mT
    for a, b in zip(run(turned), want, strict=True):
        assert torch.equal(a, b)
    moments = [v.contiguous() for v in want[2:4]]
    slopes = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in slopes]
    for a, b in zip(gpu.backward(tuple(slopes), *turned, *moments, shared=False), exact, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]  # all there


def test_gradients_of_each_result() -> None:
    given = problem(3, 3, 5, 3)
    *want, _ = reference.forward(*given, form="joseph", keep="all", shared=False)
    for i in range(7):
        slopes = tuple(torch.randn_like(v) if i == j else None for j, v in enumerate(want))  # type: ignore[arg-type]
        exact = reference.backward(slopes, *given, *want[2:4], shared=False)  # type: ignore[arg-type]  # nine
        args = [*there(given), *there(want[2:4])]
        found = gpu.backward(tuple(None if v is None else v.to(DEVICE) for v in slopes), *args, shared=False)
        for k, (a, b) in enumerate(zip(found, exact, strict=True)):
            close(f"{i}: {k}", a.cpu(), b, BOUND[F64][1])  # type: ignore[union-attr,arg-type]  # all there


# ---- bits ------------------------------------------------------------------------------------------------------------


def test_batch_and_keep_change_no_bits() -> None:
    """Of a series among others, alone, and with a system of its own, for which another kernel is compiled."""
    x = there(problem(11, 3, 5, 3, offsets=False))
    whole = run(x)
    slopes = tuple(torch.randn_like(v) for v in whole[:7])
    back = gpu.backward(slopes, *x, *whole[2:4], shared=False)
    rows = [v is not None and v.shape[0] == 11 for v in x]
    for i in (0, 8, 10):
        alone = [v[i : i + 1] if own else v for v, own in zip(x, rows, strict=True)]
        apart = [v if v is None or own else v.expand(11, *v.shape[1:]) for v, own in zip(x, rows, strict=True)]
        for some, at in ((alone, 0), (apart, i)):
            got = run(some)
            assert all(torch.equal(a[at], b[i]) for a, b in zip(got[:7], whole[:7], strict=True))
            few = tuple(v[i : i + 1] for v in slopes) if some is alone else slopes
            found = gpu.backward(few, *some, *got[2:4], shared=False)
            assert all(torch.equal(found[k][at], back[k][i]) for k in (0, 7, 8))  # type: ignore[index]  # y, prior
    for name in ("filtered", "loglik"):
        got = run(x, name)
        assert all(a is None or torch.equal(a, b) for a, b in zip(got, whole, strict=True))
        assert sum(a is None for a in got) == len(reference.DROPPED[name])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU chooses the order of lanes itself")
@pytest.mark.parametrize(("n", "m", "dtype"), [(9, 2, F32), (17, 10, F64)])
def test_lanes_need_nothing_of_each_other_between_meetings(
    n: int, m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = there(problem(3, 3, n, m, "both"), dtype)
    results: list[Any] = []
    for extra in ((), ("-DLAST_LANE_FIRST",)):
        monkeypatch.setattr(gpu, "library", functools.partial(host.kalman, extra=extra))
        values = run(x)
        slopes = tuple(map(torch.ones_like, values[:7]))
        results.append((*values, *gpu.backward(slopes, *x, *values[2:4], shared=False)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- failures, slots -------------------------------------------------------------------------------------------------


def test_the_first_failure_is_told_and_its_series_is_nan() -> None:
    given = problem(12, 4, 5, 3, "both", gaps=False)
    for i, t in ((7, 2), (10, 1), (4, 1), (2, 3)):
        given[2][i, t] = given[4][i, t] = 0
    mean, cov, *_, loglik, mean_next, cov_next, info = run(there(given))
    assert info[:2].tolist() == [4, 1]
    lost = [1 if i == 2 else 2 if i == 7 else 3 if i in (4, 10) else 0 for i in range(12)]
    assert torch.isnan(loglik).cpu().sum(1).tolist() == lost
    for v, size in ((mean, 5), (cov, 25)):
        assert [int(v[i].isnan().sum()) for i in range(12)] == [size * count for count in lost]
    assert torch.isnan(mean_next).any(1).tolist() == [count > 0 for count in lost]
    assert torch.isnan(cov_next[2]).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_steps_follow_the_whole_in_slots(dtype: torch.dtype) -> None:
    x = there(problem(6, 3, 5, 3, "both"))
    want = run(x)
    mean, cov = (torch.cat([v, v.flip(0)]) for v in x[7:])
    slots, before = torch.tensor([4, -1, 0, 2, 1, -5], device=DEVICE, dtype=dtype), mean.clone()
    for t in range(3):
        now = [v[:, min(t, v.shape[1] - 1)] for v in x[:7]]
        now = [v if v.shape[0] == 1 else v[[4, 5, 0, 2, 1, 3]] for v in now]
        *out, info = gpu.step(*now, mean, cov, slots, form="joseph")
        assert info[:2].tolist() == [-1, -1]
        for a, b in zip(out, (want[0], want[1], want[4]), strict=True):
            assert torch.equal(a[[0, 2, 3, 4]], b[[4, 0, 2, 1], t])
            assert not a[[1, 5]].any()
    assert torch.equal(mean[[4, 0, 2, 1]], want[5][[4, 0, 2, 1]])
    assert torch.equal(cov[[4, 0, 2, 1]], want[6][[4, 0, 2, 1]])
    assert torch.equal(mean[[3, 5, 6, 7]], before[[3, 5, 6, 7]])


# ---- which sizes -----------------------------------------------------------------------------------------------------


def test_every_size_is_covered_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    y = torch.zeros(1, 2, 1)

    def why(n: int, m: int, dtype: torch.dtype = F32) -> str | None:
        return gpu.problem(y.to(dtype), torch.zeros(1, 1, n, n), torch.zeros(1, 1, m, n), None, None, "joseph")

    for n in (1, 8, 9, 20, 32):
        assert all(why(n, m, dtype) is None for m in (1, 8, 17, 32) for dtype in (F32, F64))
    assert why(64, 32) is None
    assert why(65, 1) == "the system has 65 states and 1 observed values, its GPU kernels know up to 64 of each."
    assert why(1, 65) is not None
    assert "64 states and 1 observed values of float64, which take" in str(why(64, 1, F64))
    for n, dtype, said in (
        (6, F32, "a thread a series"), (8, F32, "a thread a series, in the gradient 4 lanes a series"),
        (8, F64, "8 lanes a series"), (32, F32, "32 lanes a series"), (32, F64, "128 lanes a series"),
    ):  # fmt: skip
        assert gpu.detail(y.to(dtype), None, torch.zeros(1, 1, 2, n)) == said
    monkeypatch.setattr(gpu, "_block_room", lambda _: 101376)  # an RTX 4090's
    assert why(16, 16, F64) is None
    assert why(32, 16) is None
    assert "of this device has 101376" in str(why(64, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operation_takes_them_by_itself(kind: str) -> None:
    """Values and gradients through autograd, no back end named."""
    given = problem(2, 2, 9, 2, kind)
    leaves = [v.detach().clone().requires_grad_() for v in given]
    moved = [v.detach().to(DEVICE).requires_grad_() for v in given]

    def total(x: list[Tensor], backend: str | None) -> Tensor:
        offsets = {"transition_offset": x[5], "observation_offset": x[6]}
        out, last = ops.kalman(*x[:5], KalmanState(*x[7:]), **offsets, backend=backend)  # type: ignore[arg-type]
        return out.loglik.sum() + out.cov.square().sum() + last.mean.sum()  # type: ignore[union-attr]  # kept

    if not INTERPRETED:
        assert backends.explain(ops.kalman, *moved[:5]).name == "gpu"
    here, on_gpu = total(leaves, None if not INTERPRETED else "gpu"), total(moved, None)
    close("sum", on_gpu.cpu(), here, 1e-11)
    pairs = zip(torch.autograd.grad(on_gpu, moved), torch.autograd.grad(here, leaves), strict=True)
    for i, (a, b) in enumerate(pairs):
        close(f"gradient {i}", a.cpu(), b, 1e-9)
