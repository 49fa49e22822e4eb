"""linear_scan: the grid of sizes, layouts and kinds of numbers, and what goes beyond it."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import layout, pairwise
from test_ops import BACKENDS, DTYPES, FLAG, LAYOUTS, Case, check, close, leaf, name_of, same
from torch import Tensor

from stateline import backends, ops

OPS = torch.ops.stateline
GRID = {
    "backend": BACKENDS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 64, 130], "d": [1, 3, 8, 17, 70, 131],
    "complex": FLAG, "constant": FLAG, "a": ["same", "wide", "bfloat16"], "reverse": FLAG, "initial": FLAG,
    "strided": FLAG,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 9, "d": 5, "complex": False, "constant": False,
    "a": "same", "reverse": False, "initial": True,
}  # fmt: skip


def kinds(s: dict[str, Any]) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of a, b and the state. Complex numbers have no 16-bit kind: float32 is meant."""
    double = s["dtype"] == torch.float64
    if s["complex"]:
        kind = torch.complex128 if double else torch.complex64
        return kind, kind, kind
    wide = torch.float64 if double else torch.float32
    return {"same": s["dtype"], "wide": wide, "bfloat16": torch.bfloat16}[s["a"]], s["dtype"], wide


def case(s: dict[str, Any]) -> Case:
    place, d = layout(s["layout"], s["t"]), s["d"]
    of_a, of_b, of_state = kinds(s)
    shape = (place.b, place.t, d)
    decays = torch.rand((d,) if s["constant"] else shape, dtype=torch.float64)
    if s["complex"]:
        decays = torch.polar(decays, 6 * torch.rand_like(decays))
    x = {"a": decays.to(of_a), "b": leaf(shape, torch.complex128 if s["complex"] else torch.float64).to(of_b)}
    x["b"] = torch.randn(shape, dtype=torch.complex128 if s["complex"] else torch.float64).to(of_b)
    if s["initial"]:
        x["initial_state"] = torch.randn(len(place.sequences), d, dtype=of_state)

    def real(x: Tensor) -> Tensor:
        return torch.view_as_real(x) if x.is_complex() else x

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        h, state = ops.linear_scan(**x, reverse=s["reverse"], backend=s["backend"], **place.kwargs)
        assert (h.dtype, state.dtype) == (of_b, of_state)
        return real(h), real(state)

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        a, hs, ends = x["a"].expand(shape), torch.zeros(shape, dtype=x["b"].dtype), []
        for i, (row, start, stop) in enumerate(place.sequences):
            h0 = x["initial_state"][i] if s["initial"] else x["b"].new_zeros(d)
            parts = [v[row, start:stop].flip(0) if s["reverse"] else v[row, start:stop] for v in (a, x["b"])]
            h, end = oracles.linear_scan(*parts, h0)
            where = (torch.tensor(row), torch.arange(start, stop))
            hs = hs.index_put(where, h.flip(0) if s["reverse"] else h)
            ends.append(end)
        return real(hs), real(torch.stack(ends))

    return Case(x, place, op, oracle, ("a", "b"))


def precision(s: dict[str, Any]) -> torch.dtype:
    """The coarsest dtype that takes part, whose bound counts."""
    if s["complex"]:
        return torch.float64 if s["dtype"] == torch.float64 else torch.float32
    return s["dtype"]  # type: ignore[no-any-return]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    if s["a"] == "bfloat16" and not s["complex"]:
        made = case(s)
        made.leaves["a"] = made.leaves["a"].to(torch.bfloat16)
        y, state = made.op(**made.leaves)  # its gradient is rounded to bfloat16, whatever the data: values only
        want, end = made.oracle(**{k: v.double() for k, v in made.leaves.items()})
        close("h", y, want, s["dtype"])
        close("state", state, end, state.dtype)
    else:
        check(case(s), precision(s), s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 8))
def test_grid_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        # The gradient of one constant is a sum that may cancel: its size then says nothing of its rounding.
        cancels = s["constant"] and s["d"] == 1 and s["dtype"] in (torch.bfloat16, torch.float16)
        if s["a"] != "bfloat16" and not cancels:
            check(case(s), precision(s), s["strided"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("constant", FLAG)
@pytest.mark.parametrize("reverse", FLAG)
def test_gradcheck(backend: str, complex_: bool, constant: bool, reverse: bool) -> None:
    s = PLAIN | {"backend": backend, "dtype": torch.float64, "complex": complex_, "constant": constant, "t": 4, "d": 2}
    made = case(s | {"reverse": reverse, "layout": "left" if reverse else "packed"})
    names = list(made.leaves)
    leaves = [made.leaves[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(lambda *v: made.op(**dict(zip(names, v, strict=True))), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("reverse", FLAG)
def test_a_split_scan_is_bit_equal_to_the_whole(backend: str, complex_: bool, reverse: bool) -> None:
    kind = torch.complex64 if complex_ else torch.float32
    a, b = 0.9 * torch.rand(2, 40, 19).to(kind), torch.randn(2, 40, 19, dtype=kind)
    whole, last = ops.linear_scan(a, b, reverse=reverse, backend=backend)
    for k in (0, 1, 17, 40):
        first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
        h1, state = ops.linear_scan(a[:, first], b[:, first], reverse=reverse, backend=backend)
        h2, state = ops.linear_scan(a[:, second], b[:, second], initial_state=state, reverse=reverse, backend=backend)
        joined = torch.cat([h2, h1] if reverse else [h1, h2], 1)
        for got, want in ((joined, whole), (state, last)):
            same(*(torch.view_as_real(v) if complex_ else v for v in (got, want)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("constant", FLAG)
def test_steps_follow_the_scan(backend: str, complex_: bool, constant: bool) -> None:
    x = case(PLAIN | {"d": 19, "complex": complex_, "constant": constant}).leaves
    a, b, start = x["a"], x["b"], x["initial_state"]
    whole, last = ops.linear_scan(a, b, initial_state=start, backend=backend)
    state = torch.full((5, 19), float("nan"), dtype=last.dtype)
    state[[3, 1]] = start
    index = torch.tensor([3, 1])
    for t in range(9):
        h = ops.linear_scan_step_(state, a if constant else a[:, t], b[:, t], index=index, backend=backend)
        close("h", h, whole[:, t].to(torch.complex128 if complex_ else torch.float64), torch.float32)
    same(*(torch.view_as_real(v) if complex_ else v for v in (state[index], last)), backend)
    assert torch.isnan(state[[0, 2, 4]]).all()
    before = state.clone()
    h = ops.linear_scan_step_(state, a if constant else a[:, 0], b[:, 0], index=torch.tensor([-1, 1]), backend=backend)
    assert not h[0].any()
    assert torch.equal(state[3], before[3])
    assert not torch.equal(state[1], before[1])
    alone = start.clone()
    ops.linear_scan_step_(alone, a if constant else a[:, 0], b[:, 0], backend=backend)
    close("state", alone, whole[:, 0].to(torch.complex128 if complex_ else torch.float64), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_complex_system_may_meet_real_numbers(backend: str) -> None:
    a, b = torch.polar(torch.tensor(0.9), torch.tensor(0.3)).expand(3), torch.randn(1, 5, 3)
    h, state = ops.linear_scan(a, b, backend=backend)
    want, end = ops.linear_scan(a, b.to(torch.complex64), backend=backend)
    assert torch.equal(h, want)
    assert torch.equal(state, end)
    h, _ = ops.linear_scan(torch.rand(3).requires_grad_(), b.to(torch.complex64), backend=backend)
    assert h.dtype == torch.complex64
    ops.linear_scan(a.conj(), b.to(torch.complex64).conj(), backend=backend)[0].isfinite().all()
    assert torch.allclose(ops.linear_scan(a.conj(), b, backend=backend)[0], want.conj())


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library was not built")
@pytest.mark.parametrize("d", [300, 520])
def test_threads_change_no_bits(d: int) -> None:
    """They decide how wide a strip of channels is."""
    a, b = (torch.rand(2, 9, d) * 0.9).requires_grad_(), torch.randn(2, 9, d)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            h, state = ops.linear_scan(a, b, backend="cpu")
            found.append((h, state, *torch.autograd.grad(h.square().sum() + state.sum(), a)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ library was not built")
def test_a_long_sum_of_slopes_keeps_its_precision() -> None:
    a, b = torch.full((3,), 0.9), torch.rand(1, 200_000, 3)
    grads = []
    for kind in (torch.float32, torch.float64):
        decays = a.detach().to(kind, copy=True).requires_grad_()
        ops.linear_scan(decays, b.to(kind), backend="cpu")[0].sum().backward()
        grads.append(decays.grad)
    close("da", *grads, torch.float32)


def test_opcheck_of_raw_ops() -> None:
    table = torch.tensor([[0, 0, 7], [1, 2, 9]])
    for twice in FLAG:  # complex and constant decays, or neither
        x = case(PLAIN | {"complex": twice, "constant": twice}).leaves
        a, b, start = x["a"], x["b"], x["initial_state"]
        h, state = OPS.linear_scan(a, b, start, table, False, None)
        torch.library.opcheck(OPS.linear_scan.default, (a, b, start, table, True, None))
        torch.library.opcheck(OPS.linear_scan_backward.default, (h, state, a, b, h, start, table, False, None))
        token = (a if twice else a[:, 0], b[:, 0], torch.tensor([1, -1]), None)
        torch.library.opcheck(OPS.linear_scan_step_.default, (state, *token))


def test_compiles_whole_with_gradients_and_transforms() -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        h, state = ops.linear_scan(a, b)
        return h.abs().square().sum() + state.abs().square().sum()

    x = case(PLAIN | {"complex": True, "constant": True}).leaves
    a, b = x["a"].requires_grad_(), x["b"]
    (want,) = torch.autograd.grad(loss(a, b), a)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(a, b), a)
    assert torch.allclose(got, want)
    r, v = torch.rand(3), torch.randn(2, 5, 3)
    each = torch.func.vmap(torch.func.grad(loss, argnums=1), (None, 0))(r, v[:, None])
    assert torch.allclose(each[:, 0], torch.func.grad(loss, argnums=1)(r, v), atol=1e-5)
    r.requires_grad_()
    (g,) = torch.autograd.grad(loss(r, v), r, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_scan: a second derivative"):
        g.sum().backward()


def test_the_result_may_be_changed_where_no_gradient_is_wanted() -> None:
    h, state = ops.linear_scan(torch.rand(3), torch.randn(1, 4, 3))
    h.add_(1)
    state.add_(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.rand(4)}, ValueError, r"a has shape \(4,\), expected \(d,\) with d = 3"),
        ({"a": torch.rand(2, 5, 4)}, ValueError, r"a has shape .* d = 3"),
        ({"a": torch.rand(2, 3)}, ValueError, r"a has shape .*Constant decays are \(d\)"),
        ({"a": torch.ones(3, dtype=torch.int64)}, TypeError, "a is int64"),
        ({"b": torch.ones(2, 5, 3, dtype=torch.int64)}, TypeError, "b is int64"),
        ({"b": torch.rand(5, 3)}, ValueError, "b has shape"),
        ({"initial_state": torch.rand(1, 3)}, ValueError, "initial_state has shape .* n_seq = 2"),
        ({"initial_state": torch.rand(2, 3).double()}, TypeError, "initial_state is float64"),
        ({"a": torch.ones(3) + 0j, "initial_state": torch.rand(2, 3)}, TypeError, "initial_state is float32"),
        ({"lengths": [6, 1]}, ValueError, "lengths is"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^linear_scan: .*{message}"):
        ops.linear_scan(**{"a": torch.rand(3), "b": torch.randn(2, 5, 3)} | change)


def test_explain_goes_by_the_inputs() -> None:
    assert backends.explain(ops.linear_scan, torch.rand(3), torch.rand(1, 2, 3)).name == BACKENDS[-1]
