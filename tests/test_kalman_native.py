"""The C++ kernels of kalman against the definition in float64: values and gradients, awkward sizes, bits, memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline import backends
from stateline.ops.kalman import cpu, reference

pytestmark = pytest.mark.skipif(backends.native_problem() is not None, reason="no C++ library")

BOUND = {torch.float64: 1e-12, torch.float32: 2e-4}  # relative to the largest value of a result
KINDS = {"constant": (False, False), "time": (False, True), "series": (True, False), "both": (True, True)}
COVS = (3, 4, 8)  # Q, R, cov0


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    N: int, T: int, n: int, m: int, kind: str = "constant", *, gaps: bool = True, offsets: bool = True,
    shared: bool = False,
) -> list[Any]:  # fmt: skip
    """y, A, C, Q, R, b, d, mean0, cov0 of `forward`; a third of the entries missing."""
    make = torch.Generator().manual_seed(1000 * N + 100 * T + 10 * n + m)
    apart, varies = KINDS[kind]
    lead = (N if apart else 1, T if varies else 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def covariance(k: int, *shape: int) -> Tensor:
        X = normal(*shape, k, k)
        return X @ X.mT / k + 0.3 * torch.eye(k, dtype=torch.float64)

    y = normal(N, T, m)
    if gaps:
        holes = torch.rand(1 if shared else N, T, m, generator=make) < 0.3
        y = torch.where(holes.expand_as(y), float("nan"), y)
    b, d = (normal(N, lead[1], n), normal(1, T, m)) if offsets else (None, None)
    system = (normal(*lead, n, n) * 0.6 / n**0.5, normal(*lead, m, n), covariance(n, *lead), covariance(m, *lead))
    return [y, *system, b, d, normal(N, n), covariance(n, 1 if shared else N)]


def factors(given: list[Any]) -> list[Any]:
    return [torch.linalg.cholesky(v) if i in COVS else v for i, v in enumerate(given)]


def run(given: list[Any], form: str = "joseph", keep: str = "all", shared: bool = False) -> tuple[Any, ...]:
    return cpu.forward(*given, form=form, keep=keep, shared=shared)


def assert_near(got: tuple[Any, ...], want: tuple[Any, ...], bound: float) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None and a.numel():
            assert a.shape == b.shape, i
            assert a.isfinite().all(), i
            error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)
            assert error < bound, f"result {i}: {error:.1e}"


def check(given: list[Any], form: str = "joseph", shared: bool = False) -> None:
    """Values, and for covariances the gradients of all results."""
    given = factors(given) if form == "sqrt" else given
    want = reference.forward(*given, form=form, keep="all", shared=shared)
    assert run(given, form, shared=shared)[7].tolist() == [-1, -1, 0]
    for dtype in (torch.float64, torch.float32):
        same = [None if v is None else v.to(dtype) for v in given]
        assert_near(run(same, form, shared=shared)[:7], want[:7], BOUND[dtype])
    if form == "joseph":
        slopes = tuple(torch.randn_like(v) for v in want[:7])  # type: ignore[arg-type]  # all kept
        moments = want[2:4]
        exact = reference.backward(slopes, *given, *moments, shared=shared)  # type: ignore[arg-type]  # in order
        assert_near(cpu.backward(slopes, *given, *moments, shared=shared), exact, 10 * BOUND[torch.float64])  # type: ignore[arg-type]  # in order


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_states(n: int, form: str) -> None:
    check(problem(1, 3, n, 2, "both"), form)
    check(problem(5, 2, n, 1, "series", gaps=False), form)


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 19])
def test_observations(m: int, form: str) -> None:
    check(problem(2, 3, 4, m, "time"), form)
    check(problem(9, 2, 3, m, offsets=False), form)


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
def test_large(form: str) -> None:
    check(problem(2, 2, 64, 32), form)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "T"), [(1, 0), (1, 1), (3, 2), (8, 1), (17, 2), (4, 0)])
def test_series_and_steps(N: int, T: int, kind: str) -> None:
    for n, m in ((4, 2), (2, 3), (9, 1)):
        check(problem(N, T, n, m, kind))


@pytest.mark.parametrize("kind", ["constant", "time"])
@pytest.mark.parametrize(("N", "T", "n", "m"), [(17, 3, 4, 2), (2, 1, 9, 5), (3, 0, 2, 1), (5, 4, 20, 3), (1, 2, 3, 2)])
def test_shared_covariances(N: int, T: int, n: int, m: int, kind: str) -> None:
    for form in ("joseph", "sqrt"):
        check(problem(N, T, n, m, kind, shared=True), form, shared=True)


def test_nothing_seen() -> None:
    given = problem(3, 2, 4, 2)
    given[0][1] = float("nan")
    check(given)
    assert (run(given)[4][1] == 0).all()


def test_missing_gradients_count_as_zero() -> None:
    given = problem(3, 3, 3, 2)
    want = run(given)
    for i in range(7):
        slopes = tuple(torch.randn_like(v) if i == j else None for j, v in enumerate(want[:7]))
        exact = reference.backward(slopes, *given, want[2], want[3], shared=False)
        assert_near(cpu.backward(slopes, *given, want[2], want[3], shared=False), exact, 1e-11)


# ---- bits ------------------------------------------------------------------------------------------------------------


def alone(given: list[Any], i: int) -> list[Any]:
    return [v if v is None or v.shape[0] == 1 else v[i : i + 1] for v in given]


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (4, 2), (7, 5), (9, 3), (17, 2), (2, 20)])
def test_a_series_has_the_same_bits_in_any_batch(n: int, m: int, form: str) -> None:
    for dtype in (torch.float64, torch.float32):
        given = problem(19, 3, n, m)
        given = [None if v is None else v.to(dtype) for v in (factors(given) if form == "sqrt" else given)]
        whole = run(given, form)
        for i in (0, 8, 18):
            for a, b in zip(whole[:7], run(alone(given, i), form)[:7], strict=True):
                assert torch.equal(a[i], b[0])


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize(("n", "m"), [(4, 2), (9, 3), (33, 2)])
def test_sharing_covariances_changes_no_bits(n: int, m: int, form: str) -> None:
    given = problem(11, 4, n, m, shared=True)
    given = factors(given) if form == "sqrt" else given
    apart = [v.expand(11, n, n) if i == 8 else v for i, v in enumerate(given)]
    for a, b in zip(run(given, form, shared=True)[:7], run(apart, form)[:7], strict=True):
        assert torch.equal(a.expand_as(b), b)


def test_threads_do_not_change_bits() -> None:
    given, before = problem(37, 60, 4, 2), torch.get_num_threads()
    whole, results = problem(37, 60, 4, 2, shared=True), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            values = run(given)
            grads = cpu.backward(tuple(map(torch.ones_like, values[:7])), *given, values[2], values[3], shared=False)
            results.append((*values, *grads, *run(whole, shared=True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_do_not_change_bits() -> None:
    """Transposed, expanded and sliced operands."""
    given = problem(5, 3, 4, 2, "time")
    want = run(given)
    odd = [
        None if v is None else v.mT.contiguous().mT if v.dim() > 2 else torch.cat([v, v], -1)[:, : v.shape[1]]
        for v in given
    ]
    odd[1] = given[1].expand(5, 3, 4, 4)
    slopes = tuple(map(torch.ones_like, want[:7]))
    for a, b in zip(want, run(odd), strict=True):
        assert torch.equal(a, b)
    got = cpu.backward(slopes, *odd, want[2], want[3], shared=False)
    exact = reference.backward(slopes, *odd, want[2], want[3], shared=False)
    assert_near(got, exact, 1e-11)


def test_keep_leaves_out_and_changes_no_bits() -> None:
    for shared in (False, True):
        given = problem(4, 3, 3, 2, shared=shared)
        whole = run(given, shared=shared)
        for keep, dropped in reference.DROPPED.items():
            for name, a, b in zip(reference.RESULTS, run(given, keep=keep, shared=shared), whole, strict=False):
                assert a is None if name in dropped else torch.equal(a, b)


# ---- steps, failures, memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
def test_steps_are_the_filter(form: str) -> None:
    given = problem(6, 3, 4, 2, "time")
    given = factors(given) if form == "sqrt" else given
    want = run(given, form)
    mean, cov = (torch.cat([v, v.flip(0)]) for v in given[7:])
    slots = torch.tensor([4, -1, 0, 2, 1, -5])
    before = mean.clone()
    for t in range(3):
        now = [None if v is None else v[:, min(t, v.shape[1] - 1)] for v in given[:7]]
        now = [v if v is None or v.shape[0] == 1 else v[[4, 5, 0, 2, 1, 3]] for v in now]
        *out, info = cpu.step(*now, mean, cov, slots, form=form)
        assert info == [-1, -1, 0]
        for a, b in zip(out, (want[0], want[1], want[4]), strict=True):
            assert torch.equal(a[[0, 2, 3, 4]], b[[4, 0, 2, 1], t])
            assert (a[[1, 5]] == 0).all()
    assert torch.equal(mean[[4, 0, 2, 1]], want[5][[4, 0, 2, 1]])
    assert torch.equal(cov[[4, 0, 2, 1]], want[6][[4, 0, 2, 1]])
    assert torch.equal(mean[[3, 5, 6, 7]], before[[3, 5, 6, 7]])
    with pytest.raises(ValueError, match="index"):
        cpu.step(*now, mean, cov, torch.tensor([0, 1, 2, 3, 4, 12]), form=form)


@pytest.mark.parametrize("form", ["joseph", "sqrt"])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_the_first_failure_is_named(n: int, form: str) -> None:
    given = problem(12, 6, n, 2, "both", gaps=False)
    for series, t in ((7, 4), (11, 3), (5, 3), (2, 5)):
        given[2][series, t] = 0
        given[4][series, t] = 0
    given = factors([v if i != 4 else v + 0 for i, v in enumerate(given)]) if form == "none" else given
    if form == "sqrt":
        given = [torch.linalg.cholesky(v) if i in (3, 8) else v for i, v in enumerate(given)]
    assert run(given, form)[7].tolist() == [5, 3, 0]
    single = [v[:, 0] if i < 7 and v is not None else v for i, v in enumerate(given)]
    single[2], single[4] = given[2][:, 3], given[4][:, 3]
    mean, cov = given[7].clone(), given[8].clone()
    info = cpu.step(*single[:7], mean, cov, None, form=form)[3]
    assert info == [5, 0, 0]
    assert torch.equal(mean[5], given[7][5])


class Fence:
    """torch.empty, with numbers around what it returns that must survive."""

    def __init__(self) -> None:
        self.empty = torch.empty
        self.guards: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *shape: Any, dtype: torch.dtype = torch.float32, **rest: Any) -> Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = self.empty(count + 128, dtype=torch.float64, **rest).fill_(-77.0).to(dtype)
        self.guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(shape)

    def stands(self) -> bool:
        """Whether nothing was written outside."""
        return all(bool((side == -77.0).all()) for pair in self.guards for side in pair)


@pytest.mark.parametrize(("N", "n", "m"), [(1, 3, 2), (5, 4, 2), (2, 17, 3)])
def test_guards_stay_untouched(N: int, n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = Fence()

    given = problem(N, 3, n, m)
    want = run(given)
    slopes = tuple(map(torch.ones_like, want[:7]))
    exact = cpu.backward(slopes, *given, want[2], want[3], shared=False)
    monkeypatch.setattr(torch, "empty", fenced)
    given = [None if v is None else fenced(v.shape, dtype=v.dtype).copy_(v) for v in given]
    for form in ("joseph", "sqrt"):
        run(factors(given) if form == "sqrt" else given, form)
    for a, b in zip(run(given), want, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(cpu.backward(slopes, *given, want[2], want[3], shared=False), exact, strict=True):
        assert torch.equal(a, b)
    assert len(fenced.guards) > 30
    assert fenced.stands()


def test_precise_sensor_in_float32() -> None:
    """Variances after a sensor far more precise than the prior: what Joseph's form and square roots are for."""
    f = torch.float64
    given: list[Any] = [torch.zeros(1, 100, 1, dtype=f), torch.tensor([[[[1.0, 1.0], [0.0, 1.0]]]], dtype=f),
                        torch.tensor([[[[1.0, 0.0]]]], dtype=f), 0.01 * torch.eye(2, dtype=f)[None, None],
                        torch.full((1, 1, 1, 1), 1e-12, dtype=f), None, None, torch.zeros(1, 2, dtype=f),
                        100 * torch.eye(2, dtype=f)[None]]  # fmt: skip
    exact = run(given)[1].diagonal(dim1=-2, dim2=-1)
    for form, bound in (("joseph", 1e-3), ("sqrt", 1e-5)):
        single = [None if v is None else v.float() for v in (factors(given) if form == "sqrt" else given)]
        cov = run(single, form)[1].double()
        cov = cov @ cov.mT if form == "sqrt" else cov
        assert ((cov.diagonal(dim1=-2, dim2=-1) - exact) / exact).abs().max() < bound


@pytest.mark.full
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    library = backends.load_native()
    library.sl_isas.restype = ctypes.c_char_p
    if isa not in library.sl_isas().decode().split():
        pytest.skip(f"this machine does not run {isa}")
    files = [__file__, str(Path(__file__).with_name("test_kalman_smooth.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "not other"]
    done = subprocess.run(
        command, env={**os.environ, "STATELINE_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
