"""gated_scan on every back end against a float64 answer by other means: values, gradients, states, layouts, steps."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from oracles import layout, pairwise
from test_ops import BACKENDS, DTYPES, FLAG, LAYOUTS, Case, check, close, leaf, name_of, same
from torch import Tensor

from stateline import ops
from stateline.backends import explain
from stateline.ops.gated_scan import ACTIVATIONS

OPS = torch.ops.stateline
GRID = {
    "backend": BACKENDS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 33, 64, 65],
    "n": [1, 3, 8, 17, 48, 70], "dense": FLAG, "activation": list(ACTIVATIONS), "reverse": FLAG, "initial": FLAG,
    "strided": FLAG,
}  # fmt: skip
USUAL: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "n": 5, "dense": True, "activation": "tanh",
    "reverse": False, "initial": True,
}  # fmt: skip


def gated_case(s: dict[str, Any]) -> Case:
    place, n, dtype, activation = layout(s["layout"], s["t"]), s["n"], s["dtype"], s["activation"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A = torch.randn(n, n, dtype=torch.float64)
    A = A / torch.linalg.matrix_norm(A, 2) if s["dense"] else torch.rand(n, dtype=torch.float64) * 2 - 1
    x = {"v": leaf((place.b, place.t, n), dtype), "g": leaf((place.b, place.t, n), dtype).sigmoid(), "A": A.to(wide)}
    if s["initial"]:
        x["initial_state"] = torch.randn(len(place.sequences), n, dtype=wide)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gated_scan(
            **x,
            activation=activation,
            reverse=s["reverse"],
            backend=s["backend"],
            **place.kwargs,  # type: ignore[arg-type]
        )

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        hs, states = 0 * x["v"], []
        for i, (row, start, stop) in enumerate(place.sequences):
            h0 = x["initial_state"][i] if "initial_state" in x else x["v"].new_zeros(n)
            v, g = (x[k][row, start:stop].flip(0) if s["reverse"] else x[k][row, start:stop] for k in "vg")
            h, last = oracles.gated_scan(v, g, x["A"], activation, h0)
            hs = hs.index_put((torch.tensor(row), torch.arange(start, stop)), h.flip(0) if s["reverse"] else h)
            states.append(last)
        return hs, torch.stack(states)

    return Case(x, place, op, oracle, ("v", "g"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    check(gated_case(s), s["dtype"], s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 8))
def test_grids_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(gated_case(s), s["dtype"], s["strided"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", FLAG)
def test_many_packed_sequences_of_many_lengths(backend: str, dense: bool) -> None:
    """More sequences than a kernel advances at once, so that some take the places of others."""
    lengths = [3, 0, 11, 1, 7, 7, 2, 19, 5, 0, 4, 13, 1, 1, 9, 6, 8, 2, 2, 17]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    x = gated_case(USUAL | {"n": 21, "t": int(bounds[-1]), "dense": dense, "initial": False}).leaves
    v, g = x["v"][:1], x["g"][:1]
    start = torch.randn(len(lengths), 21)
    options: dict[str, Any] = {"activation": "tanh", "backend": backend}
    h, state = ops.gated_scan(v, g, x["A"], initial_state=start, cu_seqlens=bounds, **options)
    for i, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        alone, last = ops.gated_scan(v[:, a:b], g[:, a:b], x["A"], initial_state=start[i : i + 1], **options)
        same(h[:, a:b], alone, backend)
        same(state[i : i + 1], last, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", FLAG)
@pytest.mark.parametrize("reverse", FLAG)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_split_is_bit_equal_to_the_whole(backend: str, dense: bool, reverse: bool, dtype: torch.dtype) -> None:
    x = gated_case(USUAL | {"t": 40, "n": 19, "dense": dense, "dtype": dtype}).leaves
    A, options = x["A"], {"activation": "sigmoid", "reverse": reverse, "backend": backend}
    whole, last = ops.gated_scan(**x, **options)
    for k in (0, 1, 16, 33, 40):
        first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
        cut = [(x["v"][:, span], x["g"][:, span]) for span in (first, second)]
        h1, state = ops.gated_scan(*cut[0], A, initial_state=x["initial_state"], **options)
        h2, state = ops.gated_scan(*cut[1], A, initial_state=state, **options)
        same(torch.cat([h2, h1] if reverse else [h1, h2], 1), whole, backend)
        same(state, last, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", FLAG)
@pytest.mark.parametrize(
    ("activation", "place"), [("identity", "packed"), ("relu", "left"), ("tanh", "whole"), ("sigmoid", "left")]
)
def test_gradcheck(backend: str, dense: bool, activation: str, place: str) -> None:
    s = USUAL | dict(backend=backend, dtype=torch.float64, t=5, n=3, dense=dense, activation=activation, layout=place)
    case = gated_case(s | {"reverse": place == "left"})
    names = list(case.leaves)
    leaves = [v.requires_grad_() for v in case.leaves.values()]
    assert torch.autograd.gradcheck(lambda *v: case.op(**dict(zip(names, v, strict=True))), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", FLAG)
def test_steps_follow_the_scan_in_slots(backend: str, dense: bool) -> None:
    x = gated_case(USUAL | {"t": 9, "n": 11, "dense": dense}).leaves
    options: dict[str, Any] = {"activation": "tanh", "backend": backend}
    whole, last = ops.gated_scan(**x, **options)
    state = torch.full((5, 11), float("nan"))
    state[[3, 1]] = x["initial_state"]
    for t in range(9):
        token = (x["v"][:, t], x["g"][:, t], x["A"])
        h = ops.gated_scan_step_(state, *token, index=torch.tensor([3, 1]), **options)
        close("h", h, whole[:, t].double(), torch.float32)
    close("state", state[[3, 1]], last.double(), torch.float32)
    assert torch.isnan(state[[0, 2, 4]]).all()
    before = state.clone()
    h = ops.gated_scan_step_(state, *token, index=torch.tensor([-1, 1], dtype=torch.int32), **options)
    assert not h[0].any()
    assert torch.equal(h[1], before[1])
    assert torch.equal(state[3], before[3])
    assert not torch.equal(state[1], before[1])
    rows, where = state[[3, 1]].clone(), state[[3, 1]]
    ops.gated_scan_step_(where, *token, **options)
    assert not torch.equal(where, rows)


def test_opcheck_and_transforms() -> None:
    x = gated_case(USUAL | {"dtype": torch.float64}).leaves
    v, g, A, start = x.values()
    table = torch.tensor([[0, 0, 7], [1, 2, 12]])
    h, state = OPS.gated_scan(v, g, A, "tanh", start, table, False, None)
    torch.library.opcheck(OPS.gated_scan.default, (v, g, A, "tanh", start, table, False, None))
    torch.library.opcheck(OPS.gated_scan_backward.default, (h, state, h, v, g, A, "tanh", table, True, None))
    torch.library.opcheck(
        OPS.gated_scan_step_.default, (state, v[:, 0], g[:, 0], A, "relu", torch.tensor([1, -1]), None)
    )

    def energy(v: Tensor) -> Tensor:
        h, state = ops.gated_scan(v, g, A, initial_state=start, activation="sigmoid")
        return h.square().sum() + state.sum()

    leaf = v.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(energy(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(energy)(v), wanted)
    compiled = torch.compile(energy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], wanted)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(energy(leaf), leaf, create_graph=True)[0].sum(), leaf)


def test_errors_name_the_argument() -> None:
    v, A = torch.randn(2, 3, 4), torch.zeros(4)
    for wrong, message in [
        (dict(A=torch.zeros(5)), r"^gated_scan: A has shape \(5,\), expected \(n,\) with n = 4 \(set by v\)"),
        (dict(A=torch.zeros(4, 5)), r"A has shape \(4, 5\), expected \(n, n\)"),
        (dict(g=v[:, :2]), r"g has shape \(2, 2, 4\)"),
        (dict(activation="gelu"), r"activation is 'gelu', expected one of 'identity', 'relu'"),
        (dict(initial_state=torch.zeros(3, 4)), "initial_state has shape"),
        (dict(lengths=[1, 4]), "lengths is"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.gated_scan(**{"v": v, "g": v, "A": A, **wrong})
    with pytest.raises(TypeError, match=r"A is bfloat16, expected one of float32"):
        ops.gated_scan(v.bfloat16(), v, A.bfloat16())
    with pytest.raises(TypeError, match=r"A is float32, expected one of float64"):
        ops.gated_scan(v.double(), v.double(), A)
    with pytest.raises(TypeError, match=r"^gated_scan_step_: state is float64"):
        ops.gated_scan_step_(torch.zeros(2, 4).double(), v[:, 0], v[:, 0], A)


def test_explain_names_the_back_end() -> None:
    v = torch.randn(2, 3, 4)
    assert explain(ops.gated_scan, v, v, torch.zeros(4)).name == BACKENDS[-1]
