"""trapezoid_ssd: the grid of sizes, layouts and arguments, and what goes beyond it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import oracles
import pytest
import torch
from oracles import layout, pairwise
from test_ops import BACKENDS, DTYPES, FLAG, LAYOUTS, Case, check, close, leaf, name_of, same
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stateline import backends, ops
from stateline.ops.library import call
from stateline.ops.trapezoid_ssd import controls

OPS = torch.ops.stateline
FORMS = [*BACKENDS, "chunked"]
STATE = ("angle", "ssm", "k", "v")
GIVEN = ("x", "dt", "A", "blend", "B", "C", "rates", "B_bias", "C_bias", "mix", "D", "z", "z_mix", "y_mix")
TOKENS = (*GIVEN[:7], "z")
GRID = {
    "backend": FORMS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 31, 32, 33, 64, 65, 130],
    "h": [1, 2, 5], "p": [1, 3, 16, 40], "n": [2, 3, 16, 36], "g": [1, 2, 3], "r": [None, 1, 2, 4, 5],
    "s": [0, 1, "half", "all"], "interleaved": FLAG, "reverse": FLAG, "bias": FLAG, "mix": FLAG, "D": FLAG, "z": FLAG,
    "initial": FLAG, "strided": FLAG,
}  # fmt: skip
#: A call as a Mamba-3 layer makes it; tests change what they are about.
PLAIN: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "h": 4, "p": 6, "n": 8, "g": 2, "r": None,
    "s": "half", "interleaved": True, "reverse": False, "bias": True, "mix": False, "D": True, "z": True,
    "initial": True,
}  # fmt: skip


def case(s: dict[str, Any]) -> Case:
    place, h, p, n, r, dtype = layout(s["layout"], s["t"]), s["h"], s["p"], s["n"], s["r"] or 1, s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b, t, g, count = place.b, place.t, min(s["g"], h), len(place.sequences)
    pairs = {"half": n // 4, "all": n // 2}.get(s["s"], s["s"])
    x = {"x": leaf((b, t, h, p), dtype), "dt": leaf((b, t, h), wide).abs(), "A": -2 * leaf((b, t, h), wide).abs()}
    x["blend"] = leaf((b, t, h), wide).sigmoid()
    x |= {name: leaf((b, t, *([] if s["r"] is None else [r]), g, n), dtype) for name in "BC"}
    if pairs:
        x["rates"] = leaf((b, t, pairs), wide)
    if s["bias"]:
        x |= {name: leaf((h, r, n), wide) for name in ("B_bias", "C_bias")}
    if s["D"]:
        x["D"] = leaf((h,), wide)
    if s["z"]:
        x["z"] = leaf((b, t, h, p), dtype)
    if s["mix"]:
        x |= {name: leaf((h, r, p), wide) for name in (("mix", "z_mix", "y_mix") if s["z"] else ("mix",))}
    shapes = ((count, h, pairs), (count, h, p, n), (count, h, r, n), (count, h, p))
    if s["initial"]:
        x |= {name: leaf(shape, wide) for name, shape in zip(STATE, shapes, strict=True)}
        x["angle"] = x["angle"] / 8

    def flat(state: tuple[Tensor, ...]) -> Tensor:
        """A state as one tensor, angles as points of the circle."""
        circle = torch.stack([(2 * torch.pi * state[0]).cos(), (2 * torch.pi * state[0]).sin()])
        return torch.cat([v.flatten(1) for v in (*circle, *state[1:])], 1)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        given = tuple(x.pop(name) for name in STATE) if s["initial"] else None
        how: dict[str, Any] = {"reverse": s["reverse"], "backend": s["backend"], **place.kwargs}
        y, state = ops.trapezoid_ssd(**x, interleaved=s["interleaved"], initial_state=given, **how)
        assert (state[0].abs() <= 0.5).all()
        return y, flat(state)

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        group = torch.arange(h) * g // h
        ranked = {name: x[name] if s["r"] else x[name][:, :, None] for name in "BC"}
        B, C = (v[:, :, :, group].transpose(2, 3) + x.get(f"{name}_bias", 0) for name, v in ranked.items())
        turns = x["dt"][..., None] * x["rates"][:, :, None] if pairs else x["dt"].new_zeros(b, t, h, 0)
        one = torch.ones(h, r, p, dtype=torch.float64)
        mix, D = x.get("mix", one), x.get("D", torch.zeros(h, dtype=torch.float64))
        ys, ends = 0 * x["x"][:, :, :, None].expand(b, t, h, r, p), []
        for i, (row, start, stop) in enumerate(place.sequences):
            tokens = [v[row, start:stop] for v in (x["x"], x["dt"], x["A"], x["blend"], B, C, turns)]
            tokens = [v.flip(0) for v in tokens] if s["reverse"] else tokens
            state = [x[k][i] if s["initial"] else B.new_zeros(v[1:]) for k, v in zip(STATE, shapes, strict=True)]
            y, end = oracles.trapezoid_ssd(*tokens, mix, D, s["interleaved"], tuple(state))
            y = y.flip(0) if s["reverse"] else y
            ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y)
            ends.append(tuple(v[None] for v in end))
        if s["z"]:
            gate = x["z"][:, :, :, None] * x.get("z_mix", one)
            ys = torch.einsum("bthrp,bthrp,hrp->bthp", ys, gate * gate.sigmoid(), x.get("y_mix", one))
        return (ys if s["r"] or s["z"] else ys.squeeze(3)), torch.cat([flat(end) for end in ends])

    return Case(x, place, op, oracle, TOKENS)


def plain(**options: Any) -> dict[str, Any]:
    """Arguments of a call, the state put together."""
    x: dict[str, Any] = dict(case(PLAIN | options).leaves)
    return x | {"initial_state": tuple(x.pop(name) for name in STATE)}


def cut(x: dict[str, Any], span: slice | int) -> dict[str, Any]:
    return {k: v[:, span] if k in TOKENS else v for k, v in x.items()}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(GRID), ids=name_of)
def test_grid(s: dict[str, Any]) -> None:
    check(case(s), s["dtype"], s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 12))
def test_grid_with_other_seeds(seed: int) -> None:
    for s in pairwise(GRID, seed):
        check(case(s), s["dtype"], s["strided"])


# ---- the contract beyond values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", FLAG)
@pytest.mark.parametrize("r", [None, 3])
def test_a_split_is_bit_equal_to_the_whole(backend: str, dtype: torch.dtype, reverse: bool, r: int | None) -> None:
    x = plain(t=75, p=19, n=9, dtype=dtype, r=r, mix=r is not None)
    how: dict[str, Any] = {"reverse": reverse, "backend": backend}
    whole, last = ops.trapezoid_ssd(**x, **how)
    for k in (0, 1, 32, 50, 75):
        first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
        y1, state = ops.trapezoid_ssd(**cut(x, first), **how)
        y2, state = ops.trapezoid_ssd(**(cut(x, second) | {"initial_state": state}), **how)
        same(torch.cat([y2, y1] if reverse else [y1, y2], 1), whole, backend)
        for got, want in zip(state, last, strict=True):
            same(got, want, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chunks_may_be_cut_anywhere(dtype: torch.dtype) -> None:
    x = plain(t=75, r=2, dtype=dtype)
    whole, last = ops.trapezoid_ssd(**x, backend="chunked")
    for k in (1, 32, 70):
        y1, state = ops.trapezoid_ssd(**cut(x, slice(0, k)), backend="chunked")
        y2, state = ops.trapezoid_ssd(**(cut(x, slice(k, None)) | {"initial_state": state}), backend="chunked")
        close("y", torch.cat([y1, y2], 1), whole.double(), dtype)
        for got, want in zip(state[1:], last[1:], strict=True):
            close("state", got, want.double(), dtype)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "r"), [(2, None), (16, 2), (33, 3)])
def test_steps_follow_the_scan(backend: str, dtype: torch.dtype, n: int, r: int | None) -> None:
    x = plain(t=7, p=19, n=n, r=r, mix=r is not None, dtype=dtype, interleaved=n != 16)
    how: dict[str, Any] = {"backend": backend, "interleaved": n != 16}
    whole, last = ops.trapezoid_ssd(**x, **how)
    slots = tuple(torch.randn(5, *s.shape[1:], dtype=s.dtype) for s in last)
    start = x.pop("initial_state")
    for own, given in zip(slots, start, strict=True):
        own[[3, 1]] = given
    kept = [s.clone() for s in slots]
    for t in range(7):
        y = ops.trapezoid_ssd_step_(slots, **cut(x, t), index=torch.tensor([3, 1]), **how)
        close("y", y, whole[:, t].double(), dtype)
    for own, want, before in zip(slots, last, kept, strict=True):
        close("state", own[[3, 1]], want.double(), want.dtype)
        assert torch.equal(own[[0, 2, 4]], before[[0, 2, 4]])
    kept = [s.clone() for s in slots]
    y = ops.trapezoid_ssd_step_(slots, **cut(x, 0), index=torch.tensor([-1, 4], dtype=torch.int32), **how)
    assert not y[0].any()
    assert y[1].any()
    assert all(torch.equal(own[:4], before[:4]) for own, before in zip(slots, kept, strict=True))
    y = ops.trapezoid_ssd_step_(tuple(s.clone() for s in start), **cut(x, 0), **how)
    close("y", y, whole[:, 0].double(), dtype)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("place", ["whole", "left", "packed"])
def test_gradcheck_of_every_argument(backend: str, place: str) -> None:
    s = PLAIN | dict(backend=backend, dtype=torch.float64, layout=place, t=5, h=3, p=2, n=4, g=2, r=2, mix=True)
    given = case(s | {"reverse": place == "left", "interleaved": place == "packed"})
    names = list(given.leaves)
    leaves = [given.leaves[k].requires_grad_() for k in names]
    fast = backend != "cpu"  # the others' is autograd's own
    assert torch.autograd.gradcheck(lambda *v: given.op(**dict(zip(names, v, strict=True))), leaves, fast_mode=fast)


@pytest.mark.parametrize("reverse", FLAG)
def test_gradients_of_a_sequence_of_many_tiles(reverse: bool) -> None:
    """Long enough that the C++ gradient marks states coarsely, then finely."""
    s = PLAIN | {"dtype": torch.float64, "t": 32 * 300 + 5, "h": 1, "p": 2, "n": 4, "g": 1, "reverse": reverse}
    leaves = {k: v[:1] if k in (*TOKENS, *STATE) else v for k, v in case(s).leaves.items()}
    grads = []
    for backend in (BACKENDS[-1], "chunked"):
        own = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        state = tuple(own[k] for k in STATE)
        rest = {k: v for k, v in own.items() if k not in STATE}
        y, end = ops.trapezoid_ssd(**rest, initial_state=state, reverse=reverse, backend=backend)
        grads.append(torch.autograd.grad(y.square().sum() + sum(v.sum() for v in end), list(own.values())))
    for name, got, want in zip(leaves, *grads, strict=True):
        close(name, got, want, torch.float64)


def test_opcheck_of_raw_ops() -> None:
    x = plain(r=2, mix=True)
    head = (*(x[k] for k in GIVEN), True)
    where = (*x["initial_state"], torch.tensor([[0, 0, 7], [1, 2, 12]]), False, None)
    results = OPS.trapezoid_ssd(*head, *where)
    torch.library.opcheck(OPS.trapezoid_ssd.default, (*head, *where))
    torch.library.opcheck(OPS.trapezoid_ssd_kept.default, (*head, *where))
    torch.library.opcheck(OPS.trapezoid_ssd_backward.default, (*results, *head, *where, []))
    token = (*(cut(x, 0)[k] for k in GIVEN[:6]), *[None] * 8, False)
    states = (torch.zeros(2, 4, 0), *results[2:])
    torch.library.opcheck(OPS.trapezoid_ssd_step_.default, (*states, *token, torch.tensor([1, -1]), None))


@pytest.mark.parametrize("backend", FORMS)
def test_gradients_are_the_same_in_a_dispatch_mode(backend: str) -> None:
    """Which runs raw ops below autograd: a gradient that a back end finds by autograd was 0 there."""
    grads = []
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        torch.manual_seed(0)
        x = plain(r=2, mix=True)
        leaves = [x[k].requires_grad_() for k in GIVEN]
        state = tuple(s.requires_grad_() for s in x["initial_state"])
        with mode:
            y, end = ops.trapezoid_ssd(**x, backend=backend)
            grads.append(torch.autograd.grad(y.square().sum() + sum(v.sum() for v in end), (*leaves, *state)))
    for got, want in zip(*grads, strict=True):
        assert want.any()
        assert torch.equal(got, want)


@pytest.mark.parametrize("activation", controls.A_ACTIVATIONS)
def test_controls_where_their_kernel_does_not_run(activation: str) -> None:
    """As on a GPU in float64: the same function, in PyTorch, behind the raw ops."""
    torch.manual_seed(0)
    wide, bias = torch.randn(5, 2, 20, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    raw, options = wide.transpose(0, 1)[..., 3:], (activation, 0.3)
    slopes = [torch.randn(2, 5, n, dtype=torch.float64) for n in (5, 5, 5, 2)]
    if activation == "softplus":
        torch.library.opcheck(OPS.trapezoid_ssd_controls.default, (raw, bias, *options))
        torch.library.opcheck(OPS.trapezoid_ssd_controls_backward.default, (*slopes, raw, bias, *options))

    def run(raw: Tensor, bias: Tensor) -> Any:
        return call(controls._Controls, raw, bias, *options)

    def loss(raw: Tensor, bias: Tensor) -> Tensor:
        return sum(((v * s).sum() for v, s in zip(run(raw, bias), slopes, strict=True)), torch.zeros(()))

    leaves = [raw.requires_grad_(), bias.requires_grad_()]
    assert all(map(torch.equal, run(*leaves), controls.formula(*leaves, *options)))
    assert torch.autograd.gradcheck(run, leaves)
    want = torch.autograd.grad(controls.formula(*leaves, *options), leaves, slopes)
    with FlopCounterMode(display=False):
        counted = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for grads in (counted, compiled, torch.func.grad(loss, (0, 1))(*(v.detach() for v in leaves))):
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b)


def test_compiles_whole_and_exports_with_dynamic_sizes() -> None:
    names = [*GIVEN[:9], "z"]

    def run(*args: Tensor) -> Tensor:
        *given, S, lengths = args
        x = dict(zip(names, given, strict=True))
        state = (S[..., 0, :2], S, S[..., :1, :], S[..., 0])
        y, end = ops.trapezoid_ssd(**x, initial_state=state, lengths=lengths)
        return y.square().sum() + sum(v.sum() for v in end)

    class Layer(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return run(*args)

    def inputs(t: int) -> list[Tensor]:
        x = plain(t=t)
        return [*(x[k] for k in names), x["initial_state"][1]]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 5):
        args, lengths = [v.requires_grad_() for v in inputs(t)], torch.tensor([t, 2])
        wanted = torch.autograd.grad(run(*args, lengths), args)
        for got, want in zip(torch.autograd.grad(compiled(*args, lengths), args), wanted, strict=True):
            torch.testing.assert_close(got, want)
    t = torch.export.Dim("t")
    shapes = [{1: t} if k in TOKENS else None for k in names] + [None, None]
    fixed = (*(v.detach() for v in args), lengths)
    program = torch.export.export(Layer(), fixed, dynamic_shapes={"args": tuple(shapes)})
    longer = inputs(31)
    torch.testing.assert_close(program.module()(*longer, lengths), run(*longer, lengths))


@pytest.mark.parametrize("backend", FORMS)
def test_mixed_dtypes_as_autocast_gives_them(backend: str) -> None:
    x = plain()
    mixed = x | {"x": x["x"].bfloat16(), "B": x["B"].bfloat16(), "C": x["C"].half(), "z": x["z"].bfloat16()}
    wide = mixed | {k: mixed[k].float() for k in "xBCz"}
    y, state = ops.trapezoid_ssd(**mixed, backend=backend)
    y32, state32 = ops.trapezoid_ssd(**wide, backend=backend)
    assert (y.dtype, state[1].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, state32)
    torch.testing.assert_close(y, y32.bfloat16())


@pytest.mark.parametrize("backend", FORMS)
def test_at_a_blend_of_one_it_is_ssd(backend: str) -> None:
    x = plain(bias=False, s=0)
    x["A"] = x["A"][:1, :1].expand_as(x["A"])
    start = x.pop("initial_state")
    y, state = ops.trapezoid_ssd(**x | {"blend": torch.ones_like(x["blend"])}, initial_state=start, backend=backend)
    of_ssd = {k: x[k] for k in ("x", "dt", "B", "C", "D", "z")} | {"A": x["A"][0, 0], "initial_state": start[1]}
    want, last = ops.ssd(**of_ssd)
    close("y", y, want.double(), torch.float32)
    close("state", state[1], last.double(), torch.float32)


@pytest.mark.parametrize(("blend", "order"), [(0.5, 2), (1.0, 1), (0.0, 1)])
def test_the_trapezoid_is_of_second_order(blend: float, order: int) -> None:
    """S' = −S + cos(3 s) to s = 2, from S = 0: halving the step divides the error by 2^order."""
    errors = []
    exact = (torch.tensor(6.0, dtype=torch.float64).cos() + 3 * torch.tensor(6.0, dtype=torch.float64).sin()) / 10
    exact = exact - torch.exp(torch.tensor(-2.0, dtype=torch.float64)) / 10
    for t in (100, 200):
        u = torch.cos(3 * torch.linspace(0, 2, t + 1, dtype=torch.float64))
        dt = torch.full((1, t, 1), 2 / t, dtype=torch.float64)
        one = torch.ones(1, t, 1, 1, dtype=torch.float64)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        state = (zero[..., :0, 0], zero, zero + 1, u[:1].view(1, 1, 1))
        _, end = ops.trapezoid_ssd(u[1:].view(1, t, 1, 1), dt, -dt / dt, blend * dt / dt, one, one, initial_state=state)
        errors.append(abs(end[1].item() - exact.item()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("which", GIVEN)
def test_nan_is_passed_on(backend: str, which: str) -> None:
    x = plain(t=3, mix=True)
    x[which].view(-1)[0] = float("nan")
    y, _ = ops.trapezoid_ssd(**x, backend=backend)
    assert y[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("empty", ["p", "n", "b", "h"])
def test_sizes_of_zero(backend: str, empty: str) -> None:
    b, p, n, h = ({"b": 2, "p": 3, "n": 4, "h": 2} | {empty: 0}).values()
    x, B = torch.randn(b, 40, h, p, requires_grad=True), torch.randn(b, 40, 2, 1, n)
    dt, rates = torch.rand(b, 40, h), torch.randn(b, 40, n // 2)
    y, state = ops.trapezoid_ssd(x, dt, -dt, dt, B, B, rates=rates, D=torch.ones(h), backend=backend)
    assert y.shape == (b, 40, h, 2, p)
    assert [tuple(s.shape) for s in state] == [(b, h, n // 2), (b, h, p, n), (b, h, 2, n), (b, h, p)]
    assert n or torch.equal(y[:, :, :, 0], x)
    gated, _ = ops.trapezoid_ssd(x, dt, -dt, dt, B, B, rates=rates, D=torch.ones(h), z=x, backend=backend)
    assert gated.shape == x.shape
    assert n or torch.allclose(gated, 2 * x * torch.nn.functional.silu(x))
    (y.sum() + gated.sum() + state[1].sum()).backward()
    assert x.grad is not None
    own = tuple(s.detach() for s in state)
    token = (x.detach()[:, 0], dt[:, 0], -dt[:, 0], dt[:, 0], B[:, 0], B[:, 0])
    assert ops.trapezoid_ssd_step_(own, *token, rates=rates[:, 0], backend=backend).shape == (b, h, 2, p)


@pytest.mark.parametrize("backend", FORMS)
def test_an_input_state_is_never_changed(backend: str) -> None:
    x = plain()
    before = [s.clone() for s in x["initial_state"]]
    for t in (12, 1, 0):
        _, state = ops.trapezoid_ssd(**cut(x, slice(0, t)), backend=backend)
        memory = {v.data_ptr() for v in (*x["initial_state"], x["x"])}
        for own in state:
            own.add_(1)
            assert own.data_ptr() not in memory
        assert all(map(torch.equal, x["initial_state"], before))


X = plain()
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X["x"][..., 0]}, ValueError, r"x has shape \(2, 12, 4\), expected \(b, t, h, p\)"),
    ({"dt": X["dt"][..., :3]}, ValueError, r"dt has shape .* with h = 4 \(set by x\)"),
    ({"dt": X["dt"].bfloat16()}, TypeError, "dt is bfloat16, expected one of float32. It keeps full precision"),
    ({"A": X["A"][0, 0]}, ValueError, r"A has shape \(4,\), expected \(b, t, h\)"),
    ({"B": X["B"][..., 0]}, ValueError, r"B has shape .* expected \(b, t, r, g, n\).*Were ranks, groups and states"),
    ({"C": X["C"][:, :, :1]}, ValueError, r"C has shape .* with g = 2 \(set by B\)"),
    ({"rates": X["blend"].repeat(1, 1, 2)}, ValueError, "rates turns 8 pairs of states, B has 8 states"),
    ({"B_bias": X["B_bias"][:, 0]}, ValueError, r"B_bias has shape \(4, 8\), expected \(h, r, n\)"),
    ({"mix": X["B_bias"]}, ValueError, r"mix has shape .* p = 6 \(set by x\)"),
    ({"D": X["D"].half()}, TypeError, "D is float16.*Keep D out of casts"),
    ({"z": X["x"][:, :1]}, ValueError, r"z has shape .* with t = 12 \(set by x\)"),
    ({"z": None, "y_mix": X["x"][0, 0][:, None]}, ValueError, "z_mix and y_mix belong to a gate, and z is None"),
    ({"interleaved": 1}, TypeError, "interleaved is 1, expected True or False"),
    ({"initial_state": X["initial_state"][:3]}, TypeError, "initial_state is tuple, expected angle, ssm, k, v"),
    ({"initial_state": tuple(s[:1] for s in X["initial_state"])}, ValueError, "initial_state, angle, .* n_seq = 2"),
    ({"initial_state": tuple(s.half() for s in X["initial_state"])}, TypeError, "angle, is float16.*does not drift"),
    ({"lengths": [1, 2], "cu_seqlens": torch.tensor([0, 12])}, ValueError, "lengths and cu_seqlens were both given"),
    ({"backend": "tpu"}, ValueError, "expected one of 'gpu', 'cpu', 'chunked', 'reference' or None"),
    ({"x": X["x"].to("meta")}, ValueError, "dt is on cpu, x is on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_bad_input_gets_one_clear_error(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^trapezoid_ssd: .*" + message):
        ops.trapezoid_ssd(**(X | change))


def test_explain_says_what_a_device_gets_and_why() -> None:
    cuda = backends.choose("trapezoid_ssd", "cuda", dtype=torch.float64)
    assert cuda.name == "chunked"
    assert "sees no CUDA device" in cuda.rejected["gpu"] or "float64 is not covered" in cuda.rejected["gpu"]
    assert backends.explain(ops.trapezoid_ssd, X["x"]).name == ("cpu" if "cpu" in BACKENDS else "chunked")
    given = (X["initial_state"], X["x"], X["dt"], X["A"])
    assert backends.explain(ops.trapezoid_ssd_step_, *given).name == ("cpu" if "cpu" in BACKENDS else "chunked")


@pytest.mark.parametrize("part", range(4))
def test_a_step_between_forward_and_backward_is_refused(part: int) -> None:
    """Each of a state's four tensors counts as written."""
    x = plain()
    x["dt"].requires_grad_()
    state = x["initial_state"]
    kept = tuple(s if i == part else s.clone() for i, s in enumerate(state))
    y, _ = ops.trapezoid_ssd(**x | {"initial_state": kept})
    token = {k: v for k, v in cut(x, 0).items() if k != "initial_state"}
    ops.trapezoid_ssd_step_(state, **token | {"dt": token["dt"].detach()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_soak_of_a_quarter_million_steps() -> None:
    """bfloat16 data through many calls: no NaN, and state and angle stay as near float64's as they began."""
    steps, state, exact = (250_000 if "cpu" in BACKENDS else 20_000), None, None
    for i in range(10):
        torch.manual_seed(i)
        x, B, C = (leaf((1, steps // 10, *w), torch.bfloat16) for w in ((2, 3), (1, 4), (1, 4)))
        dt, blend = (leaf((1, steps // 10, 2), torch.float32).sigmoid() for _ in range(2))
        rates, A = leaf((1, steps // 10, 2), torch.float32).tanh() / 2, -4 * blend
        y, state = ops.trapezoid_ssd(x, dt, A, blend, B, C, rates=rates, initial_state=state)
        wide = [v.double() for v in (x, dt, A, blend, B, C, rates)]
        y64, exact = ops.trapezoid_ssd(*wide[:6], rates=wide[6], initial_state=exact)
        assert y.isfinite().all()
        close("y", y, y64, torch.bfloat16)
    drift = (state[0].double() - exact[0] + 0.5) % 1 - 0.5
    assert drift.abs().max() < 1e-4  # turns; a float32 sum of a quarter million of them
    assert (state[1].double() - exact[1]).abs().max() / exact[1].abs().max() < 1e-3
