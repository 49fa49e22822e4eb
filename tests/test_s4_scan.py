"""s4_scan on every back end against float64 sums over all earlier inputs: values, gradients, states, layouts, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Layout, layout, pairwise
from torch import Tensor

from stateline import backends, ops

F64, C128 = torch.float64, torch.complex128
BACKENDS = ["reference", "chunked", "cpu"] if backends.native_problem() is None else ["reference", "chunked"]
#: Published bounds: largest error over largest value, against float64 on the same rounded inputs (docs/numerics.md).
BOUND = {F64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
GRID: dict[str, list[Any]] = {
    "backend": BACKENDS, "dtype": list(BOUND), "layout": ["whole", "right", "left", "packed"],
    "t": [0, 1, 3, 7, 64, 65, 200],
    "h": [1, 3, 16, 17, 40], "n": [1, 2, 5, 16], "c": [1, 2, 3], "D": [False, True], "initial": [False, True],
    "strided": [False, True], "reverse": [False, True],
}  # fmt: skip


def case(s: dict[str, Any]) -> tuple[dict[str, Tensor], Layout]:
    place, h, n, c, dtype = layout(s["layout"], s["t"]), s["h"], s["n"], s["c"], s["dtype"]
    full = F64 if dtype == F64 else torch.float32
    A = torch.complex(-0.3 * torch.rand(h, n, dtype=F64), torch.randn(h, n, dtype=F64)).exp()
    x = {
        "u": torch.randn(place.b, place.t, h, dtype=F64).to(dtype), "A_bar": A,
        "B_bar": torch.randn(h, n, dtype=C128), "C": torch.randn(c, h, n, dtype=C128),
    }  # fmt: skip
    if s["D"]:
        x["D"] = torch.randn(c, h, dtype=F64)
    if s["initial"]:
        x["initial_state"] = torch.randn(len(place.sequences), h, n, 2, dtype=F64).to(full)
    return x, place


def answer(x: dict[str, Tensor], place: Layout, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Every output as a sum over all earlier inputs, each weighted by a power of Ā; no recurrence and no chunks."""
    A, B, C = x["A_bar"], x["B_bar"], x["C"]
    (h, n), c = A.shape, len(C)
    ys, ends = torch.zeros(place.b, place.t, c, h, dtype=F64), []
    for i, (row, start, stop) in enumerate(place.sequences):
        u, t = x["u"][row, start:stop].double(), stop - start
        u = u.flip(0) if reverse else u
        x0 = torch.view_as_complex(x["initial_state"][i].double()) if "initial_state" in x else A.new_zeros(h, n)
        since = torch.arange(t)[:, None] - torch.arange(t)
        powers = A ** torch.arange(t + 1)[:, None, None]  # (l, h, n)
        taps = 2 * torch.einsum("chn,hn,lhn->lch", C, B, powers).real
        weight = torch.where(since[..., None, None] >= 0, taps[since.clamp(min=0)], 0)  # (to, from, c, h)
        y = torch.einsum("tsch,sh->tch", weight, u) + 2 * torch.einsum("chn,thn,hn->tch", C, powers[1:], x0).real
        end = powers[t] * x0 + torch.einsum("thn,th,hn->hn", powers[:t].flip(0), u + 0j, B)
        y = y + x["D"] * u[:, None] if "D" in x else y
        ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y.flip(0) if reverse else y)
        ends.append(torch.view_as_real(end))
    return ys, torch.stack(ends)


def near(name: str, got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    got, want = got.detach().to(want), want.detach()
    assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all(), f"{name} is not finite"
    if got.numel():
        error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.0e}"


def check(s: dict[str, Any], device: str = "cpu") -> None:
    x, place = case(s)
    exact = {k: v.detach().to(C128 if v.is_complex() else F64).requires_grad_() for k, v in x.items()}
    outside = ~place.valid()
    u = x["u"].clone()
    u[outside] = torch.nan  # skipped, not multiplied away
    if s["strided"]:
        wide = torch.full((*u.shape[:-1], 2 * u.shape[-1] + 1), torch.nan, dtype=u.dtype)
        wide[..., 1 : 1 + u.shape[-1]] = u
        u = wide[..., 1 : 1 + u.shape[-1]]
    given = {k: v.to(device).requires_grad_() for k, v in (x | {"u": u}).items()}
    where = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in place.kwargs.items()}
    y, state = ops.s4_scan(**given, **where, reverse=s["reverse"], backend=s["backend"])
    want, end = answer(exact, place, s["reverse"])
    dtype, full = s["dtype"], F64 if s["dtype"] == F64 else torch.float32
    assert (y.dtype, state.dtype) == (dtype, full)
    assert not y.detach().cpu()[outside].any()
    near("y", y, want, BOUND[dtype])
    near("state", state, end, BOUND[full])
    gy, gs = torch.randn_like(want).to(dtype), torch.randn_like(end).to(full)
    end = end + 0 * sum(v.sum() for v in exact.values()).real  # type: ignore[union-attr]  # in the graph even when empty
    wanted = torch.autograd.grad((want, end), list(exact.values()), (gy.double(), gs.double()), materialize_grads=True)
    gy[outside] = torch.nan
    made = [
        (v, g) for v, g in ((y, gy.to(device)), (state, gs.to(device))) if v.requires_grad
    ]  # nothing depends on no tokens
    got = [torch.zeros_like(v) for v in given.values()]
    if made:
        got = torch.autograd.grad(
            [v for v, _ in made], list(given.values()), [g for _, g in made], materialize_grads=True
        )
    for name, a, b in zip(given, got, wanted, strict=True):
        if name == "u":
            assert not a.cpu()[outside].any()
        near(f"d{name}", a, b, BOUND[dtype])


def name_of(s: dict[str, Any]) -> str:
    return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in s.items())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_s4_scan_grid(s: dict[str, Any]) -> None:
    check(s)


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 8))
def test_grids_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(s)


USUAL = {"backend": "cpu", "dtype": torch.float32, "layout": "whole", "t": 150, "h": 5, "n": 4, "c": 2} | dict.fromkeys(
    ("D", "initial"), True
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_is_the_whole(backend: str) -> None:
    x, _ = case(USUAL)
    start = x.pop("initial_state")
    whole, end = ops.s4_scan(**x, initial_state=start, backend=backend)
    u = x.pop("u")
    for sizes in ([0, 150], [1, 149], [64, 64, 22], [63, 2, 0, 85]):
        state, ys = start, []
        for piece in u.split(sizes, 1):
            before = state.clone()
            y, after = ops.s4_scan(piece, **x, initial_state=state, backend=backend)
            assert torch.equal(state, before)
            ys, state = [*ys, y], after
        near("y", torch.cat(ys, 1), whole.double(), 5e-6)
        near("state", state, end.double(), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_steps_follow_the_scan(backend: str, dtype: torch.dtype) -> None:
    x, _ = case(USUAL | {"t": 6, "dtype": dtype})
    whole, last = ops.s4_scan(**x, backend=backend)
    u, start = x.pop("u"), x.pop("initial_state")
    state = torch.full((5, *last.shape[1:]), torch.nan, dtype=last.dtype)
    state[[3, 1]] = start
    narrow = x if dtype == F64 else {k: v.to(torch.complex64) if v.is_complex() else v.float() for k, v in x.items()}
    for t in range(6):
        system = x if t % 2 else narrow
        y = ops.s4_scan_step_(state, u[:, t], **system, index=torch.tensor([3, 1]), backend=backend)
        assert y.dtype == dtype
        near("y", y, whole[:, t].double(), BOUND[dtype])
    near("state", state[[3, 1]], last.double(), BOUND[last.dtype])
    assert torch.isnan(state[[0, 2, 4]]).all()
    before, index = state.clone(), torch.tensor([-1, 1], dtype=torch.int32)
    y = ops.s4_scan_step_(state, u[:, 0], **x, index=index, backend=backend)
    assert not y[0].any()
    assert torch.equal(state[3], before[3])
    assert not torch.equal(state[1], before[1])
    alone = before[[3, 1]].contiguous()
    assert torch.equal(ops.s4_scan_step_(alone, u[:, 0], **x, backend=backend)[1], y[1])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library is not built")
def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x, _ = case(USUAL | {"h": 20})
    y, state = ops.s4_scan(**x)
    one = {k: v[1:] if k in ("u", "initial_state") else v for k, v in x.items()}
    y1, state1 = ops.s4_scan(**one)
    assert torch.equal(y[1:], y1)
    assert torch.equal(state[1:], state1)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library is not built")
def test_raw_ops_and_compile() -> None:
    from stateline.ops.s4_scan import chunked

    x, _ = case(USUAL | {"t": 9, "dtype": F64})
    tables = chunked.diagonal_tables(x["A_bar"], x["B_bar"], x["C"], x["D"], 8, F64)
    assert isinstance(tables.advance, chunked.Diagonal)
    given = (x["u"], tables.taps, tables.read, tables.write, chunked.as_real(tables.advance.powers))
    start = x["initial_state"].flatten(-2)
    checked = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.stateline.s4_scan.default, (*given, start, None, None, False, "cpu"), test_utils=checked
    )
    dy, dstate = torch.randn(2, 9, 2, 5, dtype=F64), torch.randn(2, 5, 8, dtype=F64)
    back = torch.ops.stateline.s4_scan_backward.default
    torch.library.opcheck(back, (dy, dstate, *given, None, None, None, True, "cpu"), test_utils=checked)
    compiled = torch.compile(lambda u, A: ops.s4_scan(u, A, x["B_bar"], x["C"])[0], backend="eager", fullgraph=True)
    near("compiled", compiled(x["u"], x["A_bar"]), ops.s4_scan(x["u"], x["A_bar"], x["B_bar"], x["C"])[0], 1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(2, 3)}, ValueError, r"u has shape \(2, 3\), expected \(b, t, h\)"),
        ({"A_bar": torch.ones(3, 2, dtype=torch.complex64)}, TypeError, "A_bar is complex64.*in double"),
        ({"C": torch.ones(1, 3, 5, dtype=C128)}, ValueError, r"C has shape \(1, 3, 5\)"),
        ({"D": torch.ones(1, 3)}, TypeError, "D is float32"),
        ({"initial_state": torch.ones(3, 3, 2, 2)}, ValueError, "initial_state has shape"),
        ({"initial_state": torch.ones(2, 3, 2, 2, dtype=F64)}, TypeError, "initial_state is float64"),
        ({"lengths": [1]}, ValueError, "lengths has shape"), ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    one = torch.ones(3, 2, dtype=C128)
    with pytest.raises(error, match=f"^s4_scan: .*{message}"):
        ops.s4_scan(**({"u": torch.ones(2, 4, 3), "A_bar": one, "B_bar": one, "C": one[None]} | change))


@pytest.mark.parametrize("chunks", [1, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_dense_systems_double_as_they_step(packed: bool, chunks: int) -> None:
    """What a GPU does for a matrix from chunk to chunk, beside one chunk after another."""
    from stateline.ops.s4_scan import chunked

    matrix = (torch.linalg.qr(torch.randn(3, 4, 4, dtype=F64))[0] * 0.97).requires_grad_()
    given = torch.randn(3, 2, chunks, 4, dtype=F64, requires_grad=True)
    place, rest = torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4]), torch.tensor([2, 1, 0, 0, 4, 3, 2, 1, 0])
    runs = chunked.Runs(place[:chunks], rest[:chunks].clamp(max=chunks - 1 - torch.arange(chunks)))
    want = chunked.before(chunked.Dense((matrix,)), given, runs if packed else None)
    got = chunked.DenseScan.apply(given, matrix, *((runs.place, runs.rest) if packed else (None, None)))
    slope = torch.randn_like(want)
    near("states", got, want, 1e-13)
    for name, a, b in zip(
        ("given", "matrix"),
        torch.autograd.grad(got, (given, matrix), slope),
        torch.autograd.grad(want, (given, matrix), slope, materialize_grads=True),
        strict=True,
    ):
        near(name, a, b, 1e-12)
