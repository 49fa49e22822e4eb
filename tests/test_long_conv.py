"""long_conv: the grid of sizes, layouts and kernels, streaming, fusion of kernels, and what goes beyond it."""

from __future__ import annotations

from itertools import pairwise as neighbours
from typing import Any

import oracles
import pytest
import torch
from oracles import layout, pairwise
from test_ops import BACKENDS, BOUND, DTYPES, FLAG, LAYOUTS, Case, check, close, leaf, name_of
from torch import Tensor

from stateline import backends, ops
from stateline.ops.long_conv import chunked, spectrum
from stateline.ops.segments import gathered

OPS = torch.ops.stateline
FORMS = [*BACKENDS, "chunked"]
GRID = {
    "backend": FORMS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 40, 65], "d": [1, 3, 17],
    "l": [1, 2, 5, 33, 90], "out": [None, 1, 4], "taps": [torch.float32, torch.bfloat16], "reverse": FLAG,
    "initial": FLAG, "strided": FLAG,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "d": 3, "l": 5, "out": None,
    "taps": torch.float32, "reverse": False, "initial": True,
}  # fmt: skip


@pytest.fixture(params=["by size", "transforms"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes would all be summed tap by tap: once as they are, once by transforms in blocks of few steps."""
    if request.param == "transforms":
        monkeypatch.setattr(chunked, "direct_pays", lambda k, t: False)
        monkeypatch.setattr(spectrum, "plan", lambda t, l, *_: (min(t, 9), spectrum.fast_length(min(t, 9) + l - 1)))
        monkeypatch.setattr(spectrum, "GROUP", {"cpu": 2 * spectrum.fast_length(30)})


def case(s: dict[str, Any]) -> Case:
    place, d, taps, dtype = layout(s["layout"], s["t"]), s["d"], s["l"], s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    of_k = wide if dtype == torch.float64 else torch.float16 if dtype == torch.float16 else s["taps"]
    of_k = torch.float32 if dtype == torch.float32 else of_k
    o = s["out"] or d
    x = {"u": leaf((place.b, place.t, d), dtype)}
    x["k"] = leaf((d, taps), of_k) if s["out"] is None else leaf((taps, o, d), of_k)
    if s["initial"]:
        x["initial_state"] = leaf((len(place.sequences), taps - 1, d), wide)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.long_conv(**x, reverse=s["reverse"], backend=s["backend"], **place.kwargs)

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        ys, ends = torch.zeros(place.b, place.t, o, dtype=torch.float64), []
        for i, (row, start, stop) in enumerate(place.sequences):
            past = x["initial_state"][i] if s["initial"] else torch.zeros(taps - 1, d, dtype=torch.float64)
            part = x["u"][row, start:stop]
            y, past = oracles.long_conv(part.flip(0) if s["reverse"] else part, x["k"], past)
            ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y.flip(0) if s["reverse"] else y)
            ends.append(past)
        return ys, torch.stack(ends)

    return Case(x, place, op, oracle, ("u",))


@pytest.mark.usefixtures("poisoned", "form")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    check(case(s), s["dtype"], s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned", "form")
@pytest.mark.parametrize("seed", range(1, 8))
def test_grid_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(case(s), s["dtype"], s["strided"])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("out", [None, 2])
@pytest.mark.parametrize("reverse", FLAG)
def test_gradcheck(backend: str, out: int | None, reverse: bool) -> None:
    made = case(PLAIN | {"backend": backend, "dtype": torch.float64, "t": 6, "d": 2, "out": out, "reverse": reverse,
                         "layout": "left" if reverse else "packed"})  # fmt: skip
    names = list(made.leaves)
    leaves = [made.leaves[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(lambda *v: made.op(**dict(zip(names, v, strict=True))), leaves)


def stream(u: Tensor, k: Tensor, sizes: list[int], state: Tensor | None = None, **how: Any) -> tuple[Tensor, Tensor]:
    pieces = []
    for piece in u.split(sizes, 1):
        y, state = ops.long_conv(piece, k, initial_state=state, **how)
        pieces.append(y)
    assert state is not None
    return torch.cat(pieces, 1), state


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("t", "length"), [(300, 40), (70, 300), (1000, 700)])
@pytest.mark.parametrize("out", [None, 3])
def test_any_split_is_the_whole(backend: str, dtype: torch.dtype, t: int, length: int, out: int | None) -> None:
    u, k = torch.randn(2, t, 5).to(dtype), torch.randn((5, length) if out is None else (length, out, 5)).to(dtype)
    _, end = ops.long_conv(u, k, backend=backend)
    exact, _ = ops.long_conv(u.double(), k.double(), backend="reference")
    bound = 1e-12 if dtype == torch.float64 else BOUND[dtype]
    for sizes in ([t], [t - 1, 1], [0, 7, t - 7], [t // 3, t // 3, t - 2 * (t // 3)]):
        y, state = stream(u, k, sizes, backend=backend)
        assert torch.equal(state, end)
        assert (y - exact).abs().max() <= bound * exact.abs().max()
    back, _ = ops.long_conv(u, k, backend=backend, reverse=True)
    flipped, _ = ops.long_conv(u.flip(1), k, backend=backend)
    assert torch.equal(back.flip(1), flipped)


def test_a_row_does_not_depend_on_its_batch() -> None:
    u, k = torch.randn(4, 1500, 6), torch.randn(6, 1100)
    lengths = torch.tensor([1500, 9, 700, 1500])
    y, state = ops.long_conv(u, k, lengths=lengths)
    alone, end = ops.long_conv(u[2:3], k, lengths=lengths[2:3])
    assert torch.equal(y[2:3], alone)
    assert torch.equal(state[2:3], end)
    packed, _ = ops.long_conv(u[:1], k, cu_seqlens=torch.tensor([0, 300, 1500]))
    second, _ = ops.long_conv(u[:1, 300:].contiguous(), k)
    assert torch.equal(packed[:, 300:], second)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("out", [None, 2])
@pytest.mark.parametrize("length", [1, 6])
def test_steps_follow_the_convolution(backend: str, out: int | None, length: int) -> None:
    u, k = torch.randn(2, 7, 4), torch.randn((4, length) if out is None else (length, out, 4))
    whole, last = ops.long_conv(u, k, backend=backend)
    state = torch.full((4, length - 1, 4), 7.0)
    state[[2, 0]] = 0
    for t in range(7):
        y = ops.long_conv_step_(state, u[:, t], k, index=torch.tensor([2, 0]), backend=backend)
        close("y", y, whole[:, t].double(), torch.float32)
    assert torch.equal(state[[2, 0]], last)
    assert (state[[1, 3]] == 7).all()
    y = ops.long_conv_step_(state, u[:, 0], k, index=torch.tensor([-1, 1]), backend=backend)
    assert not y[0].any()
    assert torch.equal(state[[2, 0]], last)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reverse", FLAG)
def test_what_a_gpu_does_without_reading_lengths(side: str, reverse: bool) -> None:
    """Gathers stand for the copies of the CPU, where the tests of values run."""
    x, k, past = torch.randn(4, 9, 3), torch.randn(3, 6), torch.randn(4, 5, 3)
    lengths = torch.tensor([9, 0, 4, 5])
    start = torch.zeros(4, dtype=torch.int64) if side == "right" else 9 - lengths
    table = torch.stack([torch.arange(4), start, start + lengths], 1)
    there = chunked._aligned(x, table, reverse)
    assert torch.equal(gathered(x, table, reverse, back=False), there)
    assert torch.equal(gathered(there, table, reverse, back=True), chunked._back_in_place(there, table, reverse))
    for given in (None, past):
        want = chunked._state(there, k, given, lengths[:, None])
        assert torch.equal(chunked.gathered_state(there, k, given, lengths[:, None]), want)


def test_transforms_are_as_short_as_can_be() -> None:
    for n in (1, 2, 3, 7, 31, 1000, 1001, 4097, 65537):
        fast, rest = spectrum.fast_length(n), spectrum.fast_length(n)
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        assert rest == 1
        assert n <= fast <= max(2, 1.15 * n + 1)
    assert spectrum.fast_length(1001) == 1024
    assert spectrum.fast_length(2017) == 2048
    assert spectrum.plan(1000, 1000)[1] == spectrum.fast_length(1999)
    assert spectrum.plan(10**4, 100, "cuda") == (10**4, spectrum.fast_length(10**4 + 99))  # one transform
    s, n = spectrum.plan(10**6, 100, "cuda")
    assert s + 99 <= n < spectrum.WHOLE
    s, n = spectrum.plan(10**6, 100)  # far more inputs than taps: blocks
    assert n < 10_000
    assert n >= s + 99


def test_memory_is_bounded_where_inputs_are_many() -> None:
    largest = 0
    rfft = torch.fft.rfft

    def watched(x: Tensor, *args: Any, **named: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return rfft(x, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.fft, "rfft", watched)
        ops.long_conv(torch.randn(1, 100_000, 4), torch.randn(4, 500), backend="chunked")
    assert 0 < largest < 100_000


# ---- kernels made one -----------------------------------------------------------------------------------------------


def kernels(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


PARALLEL = [[(3, 4)], [(3, 4), (3, 9), (3, 1)], [(4, 2, 3), (7, 2, 3)], [(3, 4), (2, 3, 3), (3, 6)]]
CASCADE = [[(3, 4)], [(3, 4), (3, 9), (3, 1)], [(4, 2, 3), (7, 5, 2)], [(3, 4), (2, 4, 3), (4, 6)]]


@pytest.mark.parametrize("shapes", PARALLEL, ids=str)
def test_branches_are_one_convolution(shapes: list[tuple[int, ...]]) -> None:
    given, u = kernels(shapes), torch.randn(2, 50, 3, dtype=torch.float64)
    fused = ops.fuse_parallel(*given)
    apart = sum(ops.long_conv(u, k)[0] for k in given)
    for sizes in ([50], [1, 20, 29]):
        y, _ = stream(u, fused, sizes)
        assert torch.allclose(y, torch.as_tensor(apart), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shapes", CASCADE, ids=str)
def test_layers_one_after_another_are_one_convolution(shapes: list[tuple[int, ...]]) -> None:
    given, u = kernels(shapes), torch.randn(2, 50, 3, dtype=torch.float64)
    fused = ops.fuse_cascade(*given)
    apart = u
    for k in given:
        apart, _ = ops.long_conv(apart, k)
    assert (fused.shape[0] if fused.dim() == 3 else fused.shape[1]) == sum(
        k.shape[0] if k.dim() == 3 else k.shape[1] for k in given
    ) - len(given) + 1
    for sizes in ([50], [1, 20, 29], [10] * 5):
        y, _ = stream(u, fused, sizes)
        assert torch.allclose(y, apart, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fuse", [ops.fuse_parallel, ops.fuse_cascade])
def test_fused_kernels_pass_gradients_on(fuse: Any) -> None:
    for shapes in ([(2, 3), (2, 5)], [(3, 2, 2), (2, 4)]):
        leaves = [k.requires_grad_() for k in kernels(shapes)]
        assert torch.autograd.gradcheck(fuse, leaves)
    half = fuse(*kernels([(2, 3), (2, 5)], torch.bfloat16))
    assert half.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"^{fuse.__name__}: "):
        fuse(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="no kernels"):
        fuse()
    with pytest.raises(ValueError, match="kernel 1 is int, expected taps"):
        fuse(torch.ones(2, 3), 3)


# ---- the contract beyond values -------------------------------------------------------------------------------------


def test_opcheck_of_raw_ops() -> None:
    table = torch.tensor([[0, 0, 7], [1, 2, 9]])
    for out in (None, 2):
        x = case(PLAIN | {"out": out}).leaves
        u, k, start = x["u"], x["k"], x["initial_state"]
        y, state = OPS.long_conv(u, k, start, table, False, None)
        torch.library.opcheck(OPS.long_conv.default, (u, k, start, table, True, None))
        torch.library.opcheck(OPS.long_conv_backward.default, (y, state, u, k, start, table, False, None))
        torch.library.opcheck(OPS.long_conv_backward.default, (y, state, u, k, None, None, False, "chunked"))
        torch.library.opcheck(OPS.long_conv_step_.default, (state, u[:, 0], k, torch.tensor([1, -1]), None))
    packed = torch.tensor([[0, 0, 5], [0, 5, 12]])  # of one row, which has two states
    y, state = OPS.long_conv(u[:1], k, start, packed, False, "chunked")
    torch.library.opcheck(OPS.long_conv_backward.default, (y, state, u[:1], k, start, packed, False, "chunked"))


def test_compiles_whole_with_gradients_and_transforms() -> None:
    def loss(u: Tensor, k: Tensor) -> Tensor:
        y, state = ops.long_conv(u, ops.fuse_cascade(k, k[:, :2]))
        return y.square().sum() + state.square().sum()

    u, k = torch.randn(2, 5, 3), torch.randn(3, 4, requires_grad=True)
    (want,) = torch.autograd.grad(loss(u, k), k)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(u, k), k)
    assert torch.allclose(got, want, rtol=1e-4)
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(u[:, None], k.detach())
    assert torch.allclose(each.sum(0), want, rtol=1e-4)
    (g,) = torch.autograd.grad(ops.long_conv(u, k)[0].square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="long_conv: a second derivative"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.rand(4, 2)}, ValueError, r"k has shape \(4, 2\), expected \(d, l\) with d = 3"),
        ({"k": torch.rand(2, 4, 5)}, ValueError, r"k has shape .* d = 3.*Matrix taps are \(l, d_out, d\)"),
        ({"k": torch.rand(3, 0)}, ValueError, "no taps"),
        ({"k": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, "k is complex64"),
        ({"u": torch.ones(2, 5, 3, dtype=torch.int64)}, TypeError, "u is int64"),
        ({"initial_state": torch.rand(2, 4, 3)}, ValueError, "initial_state has shape .* l-1 = 1"),
        ({"initial_state": torch.rand(2, 1, 3).double()}, TypeError, "initial_state is float64"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^long_conv: .*{message}"):
        ops.long_conv(**{"u": torch.randn(2, 5, 3), "k": torch.rand(3, 2)} | change)


def test_explain_and_forced_back_ends() -> None:
    u, k = torch.randn(1, 5, 3), torch.rand(3, 2)
    assert backends.explain(ops.long_conv, u, k).name == ("cpu" if "cpu" in BACKENDS else "chunked")
    with pytest.raises(backends.BackendError, match="CUDA"):
        ops.long_conv(u, k, backend="gpu")


def test_cuts_are_where_the_table_says() -> None:
    bounds = torch.tensor([0, 4, 4, 12])
    u, k = torch.randn(1, 12, 3), torch.randn(3, 5)
    y, _ = ops.long_conv(u, k, cu_seqlens=bounds)
    for a, b in neighbours(bounds.tolist()):
        assert torch.equal(y[:, a:b], ops.long_conv(u[:, a:b], k)[0])
