"""kalman_smooth on every back end against one Gaussian of everything, and the C++ kernel against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import JointGaussian, pairwise
from test_kalman import BOUND, USUAL, close, problem, symmetric
from test_kalman_native import Fence
from test_ops import BACKENDS, name_of
from torch import Tensor

from stateline.ops import kalman_smooth
from stateline.ops.kalman import cpu, reference

RAW = torch.ops.stateline
GRID: dict[str, list[Any]] = {
    "backend": BACKENDS, "dtype": list(BOUND), "N": [1, 2, 9], "t": [0, 1, 2, 7], "n": [1, 2, 4, 9], "m": [1, 2, 5],
    "A": ["one", "time", "series", "both"], "noise": ["one", "time", "series", "both"],
    "gaps": ["none", "same", "own", "all"], "offsets": ["none", "both"], "start": ["one", "own"],
}  # fmt: skip
needs_native = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library is not built")


def operands(s: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """Leaves, and what the smoother takes: y, A, C, R, d, predicted moments, all float64."""
    x = problem(USUAL | s | {"dtype": torch.float64}).leaves
    N = x["y"].shape[0]
    given = [symmetric(x[k]) if k in "QR" else x[k] for k in "yACQR"] + [x.get("b"), x.get("d"), x["m0"]]
    start = symmetric(x["P0"]).expand(N, *x["P0"].shape[1:])
    out = reference.forward(*given, start, form="joseph", keep="all", shared=False)
    return x, [given[0], given[1], given[2], given[4], given[6], out[2], out[3]]


def exact(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    (N, T, m), n = x["y"].shape, x["m0"].shape[1]

    def of(name: str, i: int, *tail: int) -> Tensor:
        v = x.get(name, torch.zeros(1, 1, *tail, dtype=torch.float64))
        return (symmetric(v) if name in "QR" else v).expand(N, T, *tail)[i]

    rows: list[tuple[Tensor, ...]] = []
    for i in range(N):
        P0 = symmetric(x["P0"].expand(N, n, n)[i])
        parts = (of("A", i, n, n), of("C", i, m, n), of("Q", i, n, n), of("R", i, m, m))
        joint = JointGaussian.of(x["y"][i], *parts, x["m0"][i], P0, of("b", i, n), of("d", i, m))
        mean, cov = joint.given(T)
        blocks = cov[: n * T, : n * T].reshape(T, n, T, n).permute(0, 2, 1, 3)
        now, lag = torch.arange(T), torch.arange(max(T - 1, 0))
        rows.append((mean[: n * T].reshape(T, n), blocks[now, now], blocks[lag, lag + 1]))
    return tuple(torch.stack(v) for v in zip(*rows, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    """Values, and gradients as those of the definition."""
    x, given = operands(s)
    dtype, backend = s["dtype"], s["backend"]
    leaves = [None if v is None else v.to(dtype).requires_grad_() for v in given]
    y, A, C, R, d, before, cov = leaves
    got = kalman_smooth(y, A, C, R, before, cov, observation_offset=d, backend=backend)
    wanted = [None if v is None else v.detach().double().requires_grad_() for v in leaves]
    inner = reference.smooth(*wanted, shared=False)  # type: ignore[arg-type]  # all there but d
    for name, a, b in zip(("mean", "cov", "lag"), got, exact(x), strict=True):
        close(name, a, b, BOUND[dtype][0] * 10)
    slopes = [torch.randn_like(v) for v in inner]
    options: dict[str, Any] = {"materialize_grads": True}
    there = [(v, w) for v, w in zip(leaves, wanted, strict=True) if v is not None and w is not None]
    got_slopes = [v.to(dtype) for v in slopes]
    grads = torch.autograd.grad(got, [v for v, _ in there], got_slopes, **options)
    exacts = torch.autograd.grad(inner, [w for _, w in there], slopes, **options)
    for i, (a, b) in enumerate(zip(grads, exacts, strict=True)):
        close(f"gradient {i}", a, symmetric(b) if i in (3, len(grads) - 1) else b, BOUND[dtype][1])


def slopes_of(module: Any, given: list[Any], shared: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Gradients of a mixture of all results by `module`, and by autograd through the definition's loop."""
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in given]
    results = reference.smooth(*leaves, shared=shared)  # type: ignore[arg-type]  # all there but d
    slopes = tuple(torch.randn_like(v) for v in results)
    there = [v for v in leaves if v is not None]
    exact = list(torch.autograd.grad(results, there, slopes, materialize_grads=True))
    exact[3], exact[-1] = symmetric(exact[3]), symmetric(exact[-1])
    got = module.smooth_backward(slopes, *given, shared=shared)
    assert [v is None for v in got] == [v is None for v in given]
    return tuple(v for v in got if v is not None), tuple(exact)


MODULES = [reference, *([cpu] if "cpu" in BACKENDS else [])]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 5), (8, 3), (9, 3), (16, 2), (17, 2), (2, 20)]
)
def test_the_way_back_is_that_of_the_loop(module: Any, n: int, m: int) -> None:
    """By formulas as autograd has it, series alone, in lanes and in groups, missing entries or none."""
    for s in ({"N": 1, "t": 5, "gaps": "none"}, {"N": 11, "t": 3, "A": "both", "noise": "both", "offsets": "both"},
              {"N": 2, "t": 4, "A": "series", "noise": "time"}):  # fmt: skip
        for i, (a, b) in enumerate(zip(*slopes_of(module, operands(s | {"n": n, "m": m})[1]), strict=True)):
            close(f"gradient {i}", a, b, 1e-11)
    for N, gaps in ((5, "same"), (9, "none")):
        _, (y, A, C, R, d, mean, cov) = operands({"N": N, "t": 3, "n": n, "m": m, "gaps": gaps, "start": "one"})
        for i, (a, b) in enumerate(zip(*slopes_of(module, [y, A, C, R, d, mean, cov[:1]], True), strict=True)):
            close(f"shared gradient {i}", a, b, 1e-11)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("T", [0, 1, 2, 6])
def test_the_way_back_of_degenerate_systems(module: Any, T: int) -> None:
    """Singular Q, R = 0, P0 = 0, nothing observed, no steps; and each result's gradient alone, others counting as 0."""
    zero, one = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    A = torch.tensor([[[[0.6, 0.3], [1.0, 0.0]]]], dtype=torch.float64)
    C = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    thin = zero.clone()
    thin[..., 0, 0] = 0.7
    y, start = torch.randn(3, T, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    m0 = torch.randn(3, 2, dtype=torch.float64)
    for Q, R, P0, series in ((thin, 0 * one, start, y), (zero, one, start, y), (thin, one, 0 * start, y),
                             (zero, one, 0 * start, y), (thin, one, start, y * torch.nan)):  # fmt: skip
        system = (series, A, C, Q, R, None, None, m0, P0)
        before = reference.forward(*system, form="joseph", keep="all", shared=False)[2:4]
        for i, (a, b) in enumerate(zip(*slopes_of(module, [series, A, C, R, None, *before]), strict=True)):
            close(f"gradient {i}", a, b, 1e-11)
    given = (series, A, C, R, None, *before)
    parts: Any = reference.smooth(*given, shared=False)  # type: ignore[arg-type]  # in order
    whole = module.smooth_backward(parts, *given, shared=False)
    alone = [module.smooth_backward(tuple(v if i == j else None for j, v in enumerate(parts)), *given, shared=False)
             for i in range(3)]  # fmt: skip
    for total, *rest in zip(whole, *alone, strict=True):
        if total is not None:
            close("sum", sum(rest), total, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    _, given = operands({"N": 2, "t": 3, "n": 2, "m": 1, "gaps": "none", "offsets": "both"})
    y, A, C, R, d, mean, cov = (v.clone().requires_grad_() for v in given)

    def run(y: Tensor, A: Tensor, C: Tensor, R: Tensor, d: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, ...]:
        return kalman_smooth(y, A, C, symmetric(R), mean, symmetric(cov), observation_offset=d, backend=backend)

    assert torch.autograd.gradcheck(run, (y, A, C, R, d, mean, cov))


@needs_native
def test_threads_and_batches_do_not_change_gradients() -> None:
    """More groups of series than sums that are kept apart: the order of adding is one whatever the threads."""
    _, given = operands({"N": 8 * 70, "t": 2, "n": 2, "m": 1})
    grads: Any = tuple(torch.randn_like(v) for v in cpu.smooth(*given, shared=False))  # type: ignore[arg-type]  # in order
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(cpu.smooth_backward(grads, *given, shared=False))  # type: ignore[arg-type]  # in order
    finally:
        torch.set_num_threads(before)
    exact = reference.smooth_backward(grads, *given, shared=False)  # type: ignore[arg-type]  # in order
    for a, b, c in zip(*found, exact, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            close("sum", a, c, 1e-11)


@needs_native
@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 2), (9, 3), (17, 2), (2, 20)])
def test_a_series_has_the_same_bits_in_any_batch(n: int, m: int) -> None:
    _, given = operands({"N": 11, "t": 3, "n": n, "m": m})
    for dtype in (torch.float64, torch.float32):
        whole = cpu.smooth(*(None if v is None else v.to(dtype) for v in given), shared=False)  # type: ignore[arg-type]  # in order
        for i in (0, 10):
            one = [None if v is None else (v if v.shape[0] == 1 else v[i : i + 1]).to(dtype) for v in given]
            for a, b in zip(whole, cpu.smooth(*one, shared=False), strict=True):  # type: ignore[arg-type]  # seven
                assert torch.equal(a[i], b[0])


@needs_native
def test_guards_stay_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = Fence()

    for N, n, m in ((1, 3, 2), (5, 4, 2), (2, 17, 3)):
        _, given = operands({"N": N, "t": 3, "n": n, "m": m})
        want = reference.smooth(*given, shared=False)
        monkeypatch.setattr(torch, "empty", fenced)
        found = cpu.smooth(*given, shared=False)
        monkeypatch.undo()
        for a, b in zip(found, want, strict=True):
            close("values", a, b, 1e-11)
        exact = reference.smooth_backward(want, *given, shared=False)
        monkeypatch.setattr(torch, "empty", fenced)
        slopes = cpu.smooth_backward(found, *given, shared=False)
        monkeypatch.undo()
        for a, b in zip(slopes, exact, strict=True):
            if a is not None and b is not None:
                close("gradients", a, b, 1e-11)
    assert len(fenced.guards) == 9 + 3 * 9
    assert fenced.stands()


def test_transforms_and_shared_covariances() -> None:
    _, given = operands({"gaps": "none", "start": "one", "t": 2})
    torch.library.opcheck(RAW.kalman_smooth.default, (*given, False, "reference"))
    slopes = (torch.randn_like(given[5]), None, None)
    torch.library.opcheck(RAW.kalman_smooth_backward.default, (*slopes, *given, False, "reference"))
    y, A, C, R, d, mean, cov = given

    def energy(A: Tensor) -> Tensor:
        return sum((v * v).sum() for v in kalman_smooth(y, A, C, R, mean, cov))  # type: ignore[return-value]  # not 0

    leaf = A.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(energy)(A), wanted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(energy))(torch.stack([A, A]))[1], wanted)
    with pytest.raises(RuntimeError, match=r"^kalman_smooth: a second derivative was asked for"):
        torch.autograd.grad(torch.autograd.grad(energy(leaf), leaf, create_graph=True)[0].sum(), leaf)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], wanted)
    apart = kalman_smooth(y, A, C, R, mean, cov, observation_offset=d)
    together = kalman_smooth(y, A, C, R, mean, cov[:1].expand_as(cov), observation_offset=d)
    assert together[1].stride(0) == 0
    for a, b in zip(together, apart, strict=True):
        close("shared", a, b, 1e-12)


@needs_native
@pytest.mark.parametrize(("N", "t", "n", "m"), [(2, 1, 1, 1), (5, 7, 4, 2), (3, 4, 9, 3)])
@pytest.mark.parametrize("gaps", ["none", "same", "all"])
def test_series_that_share_covariances_follow_the_definition(N: int, t: int, n: int, m: int, gaps: str) -> None:
    for change in ("one", "time"):
        s = {
            "N": N,
            "t": t,
            "n": n,
            "m": m,
            "gaps": gaps,
            "start": "one",
            "A": change,
            "noise": change,
            "offsets": "both",
        }
        _, (y, A, C, R, d, mean, cov) = operands(s)
        given = [y, *(v[:1] for v in (A, C, R)), d, mean, cov[:1]]
        wanted = reference.smooth(*given, shared=True)
        for dtype in BOUND:
            got = cpu.smooth(*(None if v is None else v.to(dtype) for v in given), shared=True)  # type: ignore[arg-type]  # in order
            for name, a, b in zip(("mean", "cov", "lag"), got, wanted, strict=True):
                close(name, a, b, BOUND[dtype][0] * 10)


def test_one_covariance_of_series_with_gaps_of_their_own_is_not_shared() -> None:
    """Those of the last step do not show in what was predicted, but in what is smoothed."""
    _, (y, A, C, R, d, mean, cov) = operands({"N": 3, "t": 4, "gaps": "none", "start": "one"})
    y = y.clone()
    y[1, -1] = torch.nan
    apart = kalman_smooth(y, A, C, R, mean, cov[:1].repeat(3, 1, 1, 1), observation_offset=d)
    expanded = kalman_smooth(y, A, C, R, mean, cov[:1].expand_as(cov), observation_offset=d)
    for a, b in zip(expanded, apart, strict=True):
        close("gaps", a, b, 1e-12)
    assert not torch.equal(apart[1][0], apart[1][1])


def test_a_leaf_that_is_one_row_in_memory_has_gradients_of_each_row() -> None:
    _, (y, A, C, R, d, mean, cov) = operands({"gaps": "none", "start": "one", "t": 2})
    found = []
    for leaf in (cov[:1].expand_as(cov).clone(), cov[:1].expand_as(cov)):
        leaf.requires_grad_()
        moments = kalman_smooth(y, A, C, R, mean, leaf, observation_offset=d)
        found.append(torch.autograd.grad(sum(v.square().sum() for v in moments), leaf)[0])  # type: ignore[arg-type]  # not 0
    torch.testing.assert_close(*found)


def test_errors_name_the_argument() -> None:
    _, (y, A, C, R, _, mean, cov) = operands({})
    for wrong, message in [
        ({"C": C[..., :2]}, r"^kalman_smooth: C has shape \(1, 1, 2, 2\), expected \(1 or N, 1 or T, 2, 3\)"),
        ({"predicted_cov": cov[:, :2]}, r"^kalman_smooth: predicted_cov has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            kalman_smooth(**{"y": y, "A": A, "C": C, "R": R, "predicted_mean": mean, "predicted_cov": cov} | wrong)
    with pytest.raises(TypeError, match="R is float32"):
        kalman_smooth(y, A, C, R.float(), mean, cov)
