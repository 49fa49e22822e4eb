"""Every op, on every back end, against float64 answers from oracles.py: values, gradients, states, layouts, sizes.

One grid of cases that covers all pairs of settings runs always; `-m full` runs a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import Layout, layout, pairwise
from torch import Tensor

from stateline import ops
from stateline.backends import native_problem

#: Published bounds: largest error over largest value, against float64 on the same rounded inputs (docs/numerics.md).
BOUND = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
#: The same for the state after a million steps that forget nothing: a float32 sum of a million terms.
LONG_STREAM = 1e-3
DTYPES = list(BOUND)
BACKENDS = ["reference", "cpu"] if native_problem() is None else ["reference"]


@dataclass
class Case:
    """Inputs of one call: leaves that want gradients, and how to run op and oracle on them."""

    leaves: dict[str, Tensor]
    layout: Layout
    op: Callable[..., tuple[Tensor, Tensor]]
    oracle: Callable[..., tuple[Tensor, Tensor]]
    token_leaves: tuple[str, ...]


def leaf(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def scan_case(s: dict[str, Any]) -> Case:
    place, d, n, dtype = layout(s["layout"], s["t"]), s["d"], s["n"], s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    system = (torch.complex128 if wide == torch.float64 else torch.complex64) if s["complex"] else wide
    b, t, pair = place.b, place.t, ((2,) if s["complex"] else ())
    A = -torch.rand(d, n, dtype=torch.float64) * 4
    x = {"u": leaf((b, t, d), dtype), "dt": leaf((b, t, d), dtype), "A": A.to(system)}
    if s["complex"]:
        x["A"] = torch.complex(A, torch.randn(d, n, dtype=torch.float64)).to(system)
    for name, kind in (("B", s["B"]), ("C", s["C"])):
        x[name] = leaf((d, n), system) if kind == "constant" else leaf((b, t, min(s["g"], d), n, *pair), dtype)
    if not s["softplus"]:
        x["dt"] = x["dt"].abs()
    if s["D"]:
        x["D"] = leaf((d,), wide)
    if s["z"]:
        x["z"] = leaf((b, t, d), dtype)
    if s["dt_bias"]:
        x["dt_bias"] = leaf((d,), wide).abs()
    if s["initial"]:
        x["initial_state"] = torch.randn(len(place.sequences), d, n, dtype=system)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.selective_scan(
            **x, dt_softplus=s["softplus"], reverse=s["reverse"], backend=s["backend"], **place.kwargs
        )

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        return scan_answer(x, place, s["softplus"], s["reverse"])

    return Case(x, place, op, oracle, ("u", "dt", "z", "B", "C"))


def scan_answer(x: dict[str, Tensor], place: Layout, softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    A, (d, n) = x["A"], x["A"].shape
    dt = x["dt"] + x["dt_bias"] if "dt_bias" in x else x["dt"]
    dt = F.softplus(dt) if softplus else dt
    channel = torch.arange(d)

    def per_channel(v: Tensor, row: int, cut: slice) -> Tensor:
        if v.dim() == 2:
            return v.expand(cut.stop - cut.start, d, n)
        v = v[row, cut]
        v = torch.complex(v[..., 0], v[..., 1]) if A.is_complex() else v
        return v[:, channel * v.shape[1] // d]

    ys, states = torch.zeros(x["u"].shape, dtype=torch.float64), []
    for i, (row, start, stop) in enumerate(place.sequences):
        cut = slice(start, stop)
        h0 = x["initial_state"][i] if "initial_state" in x else A.new_zeros(d, n)
        parts = [x["u"][row, cut], dt[row, cut], per_channel(x["B"], row, cut), per_channel(x["C"], row, cut)]
        z = x["z"][row, cut] if "z" in x else None
        parts, z = ([p.flip(0) for p in parts], None if z is None else z.flip(0)) if reverse else (parts, z)
        y, h = oracles.selective_scan(parts[0], parts[1], A, parts[2], parts[3], x.get("D"), z, h0)
        ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y.flip(0) if reverse else y)
        states.append(h)
    return ys, torch.stack(states)


def conv_case(s: dict[str, Any]) -> Case:
    place, d, k, dtype = layout(s["layout"], s["t"]), s["d"], s["k"], s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = {"x": leaf((place.b, place.t, d), dtype), "weight": leaf((d, k), dtype)}
    if s["bias"]:
        x["bias"] = leaf((d,), dtype)
    if s["initial"]:
        x["initial_state"] = leaf((len(place.sequences), k - 1, d), wide)

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(
            **x, activation="silu" if s["silu"] else None, reverse=s["reverse"], backend=s["backend"], **place.kwargs
        )

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        ys, states = torch.zeros(x["x"].shape, dtype=torch.float64), []
        for i, (row, start, stop) in enumerate(place.sequences):
            taps = x["initial_state"][i] if "initial_state" in x else torch.zeros(k - 1, d, dtype=torch.float64)
            part = x["x"][row, start:stop]
            part = part.flip(0) if s["reverse"] else part
            y, taps = oracles.causal_conv1d(part, x["weight"], x.get("bias"), s["silu"], taps)
            ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y.flip(0) if s["reverse"] else y)
            states.append(taps)
        return ys, torch.stack(states)

    return Case(x, place, op, oracle, ("x",))


def ssd_case(s: dict[str, Any]) -> Case:
    place, h, p, n, dtype = layout(s["layout"], s["t"]), s["h"], s["p"], s["n"], s["dtype"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    b, t, g = place.b, place.t, min(s["g"], h)
    A = (-torch.rand(h, dtype=torch.float64) * 4).to(wide)
    x = {"x": leaf((b, t, h, p), dtype), "dt": leaf((b, t, h), dtype), "A": A}
    x |= {name: leaf((b, t, g, n), dtype) for name in "BC"}
    if not s["softplus"]:
        x["dt"] = x["dt"].abs()
    if s["D"]:
        x["D"] = leaf((h,) if s["D"] == "head" else (h, p), wide)
    if s["z"]:
        x["z"] = leaf((b, t, h, p), dtype)
    if s["dt_bias"]:
        x["dt_bias"] = leaf((h,), wide).abs()
    if s["initial"]:
        x["initial_state"] = torch.randn(len(place.sequences), h, p, n, dtype=wide)
    limit = (0.3, 1.2) if s["limit"] else None

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"dt_softplus": s["softplus"], "dt_limit": limit, "reverse": s["reverse"]}
        y, state, decay = ops.ssd(**x, **options, return_decay=True, backend=s["backend"], **place.kwargs)
        return y, torch.cat([state, decay[..., None, None].expand(*state.shape[:3], 1)], -1)

    def oracle(**x: Tensor) -> tuple[Tensor, Tensor]:
        dt = x["dt"] + x.get("dt_bias", 0)
        dt = F.softplus(dt) if s["softplus"] else dt
        dt = dt if limit is None else dt.clamp(*limit)
        group = torch.arange(h) * g // h
        ys, ends = torch.zeros(x["x"].shape, dtype=torch.float64), []
        for i, (row, start, stop) in enumerate(place.sequences):
            S0 = x["initial_state"][i] if "initial_state" in x else x["x"].new_zeros(h, p, n)
            tokens = [x["x"], dt, x["B"][:, :, group], x["C"][:, :, group], *([x["z"]] if s["z"] else [])]
            tokens = [v[row, start:stop].flip(0) if s["reverse"] else v[row, start:stop] for v in tokens]
            z = tokens[4] if s["z"] else None
            y, S, decay = oracles.ssd(tokens[0], tokens[1], x["A"], tokens[2], tokens[3], x.get("D"), z, S0)
            ys = ys.index_put((torch.tensor(row), torch.arange(start, stop)), y.flip(0) if s["reverse"] else y)
            ends.append(torch.cat([S, decay[:, None, None].expand(h, p, 1)], -1))
        return ys, torch.stack(ends)

    return Case(x, place, op, oracle, ("x", "dt", "z", "B", "C"))


def check(case: Case, dtype: torch.dtype, strided: bool) -> None:
    """Compare outputs and all gradients; tokens outside sequences hold NaN and must come back as exact zeros."""
    outside = ~case.layout.valid()
    exact = {
        k: v.detach().to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_()
        for k, v in case.leaves.items()
    }
    given = {}
    for name, value in case.leaves.items():
        value = value.clone()
        if name in case.token_leaves and value.shape[:2] == outside.shape and value.dim() > 2:
            value[outside] = float("nan")
            value = _strided(value) if strided else value
        given[name] = value.requires_grad_()
    y, state = case.op(**given)
    y_exact, state_exact = case.oracle(**exact)
    wide = state.dtype
    state_exact = state_exact + 0 * sum(v.sum() for v in exact.values()).real  # part of the graph even when empty
    gy, gs = torch.randn_like(y_exact).to(dtype).double(), torch.randn_like(state_exact).to(wide)
    wanted = torch.autograd.grad(
        (y_exact, state_exact), list(exact.values()), (gy, gs.to(state_exact.dtype)), materialize_grads=True
    )
    gy[outside] = float("nan")
    got = torch.autograd.grad((y, state), list(given.values()), (gy.to(dtype), gs), materialize_grads=True)
    assert y.dtype == dtype
    assert not y.detach()[outside].any()
    close("y", y, y_exact, dtype)
    close("state", state, state_exact, torch.float64 if dtype == torch.float64 else torch.float32)
    for name, a, b in zip(given, got, wanted, strict=True):
        assert a.dtype == given[name].dtype
        if name in case.token_leaves and a.dim() > 2:
            assert not a[outside].any(), f"gradient of {name} reaches padding"
        close(f"d{name}", a, b, dtype)


def close(name: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    wanted = wanted.detach()
    assert got.shape == wanted.shape
    got = got.detach().to(wanted.dtype)
    assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all(), f"{name} is not finite"
    if got.numel():
        error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()
        assert error <= BOUND[dtype], f"{name}: error {error:.2e} exceeds {BOUND[dtype]:.0e}"


def _strided(x: Tensor) -> Tensor:
    """The same values as a slice of a wider tensor, as a split projection gives them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 1), float("nan"), dtype=x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


LAYOUTS = ["whole", "right", "left", "packed"]
FLAG = [False, True]
SCAN = {
    "backend": BACKENDS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 63, 64, 65, 130], "d": [1, 3, 8, 17, 48],
    "n": [1, 2, 5, 16, 33], "g": [1, 2, 3], "B": ["token", "constant"], "C": ["token", "constant"], "reverse": FLAG,
    "complex": FLAG,
    "softplus": FLAG, "D": FLAG, "z": FLAG, "dt_bias": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
CONV = {
    "backend": BACKENDS, "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 64, 130], "d": [1, 3, 8, 17, 48],
    "k": [1, 2, 3, 4, 7, 16], "bias": FLAG, "silu": FLAG, "reverse": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip
SSD = {
    "backend": [*BACKENDS, "chunked"], "dtype": DTYPES, "layout": LAYOUTS, "t": [0, 1, 2, 7, 63, 64, 65, 130],
    "h": [1, 2, 5], "p": [1, 3, 16, 40], "n": [1, 3, 16, 35], "g": [1, 2, 3], "reverse": FLAG, "softplus": FLAG,
    "limit": FLAG, "D": [None, "head", "channel"], "z": FLAG, "dt_bias": FLAG, "initial": FLAG, "strided": FLAG,
}  # fmt: skip

#: A scan as a Mamba layer calls it; tests change what they are about.
USUAL: dict[str, Any] = {
    "backend": None, "dtype": torch.float32, "layout": "whole", "t": 12, "d": 5, "n": 4, "g": 1, "B": "token",
    "C": "token", "reverse": False, "complex": False, "softplus": True, "D": True, "z": True, "dt_bias": True,
    "initial": True,
}  # fmt: skip


def name_of(case: dict[str, Any]) -> str:
    return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in case.items())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(SCAN), ids=name_of)
def test_selective_scan_grid(s: dict[str, Any]) -> None:
    check(scan_case(s), s["dtype"], s["strided"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(CONV), ids=name_of)
def test_causal_conv1d_grid(s: dict[str, Any]) -> None:
    check(conv_case(s), s["dtype"], s["strided"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", pairwise(SSD), ids=name_of)
def test_ssd_grid(s: dict[str, Any]) -> None:
    check(ssd_case(s), s["dtype"], s["strided"])


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(1, 12))
def test_grids_with_other_seeds(seed: int) -> None:
    for s in pairwise(SCAN, seed):
        check(scan_case(s), s["dtype"], s["strided"])
    for s in pairwise(CONV, seed):
        check(conv_case(s), s["dtype"], s["strided"])
    for s in pairwise(SSD, seed):
        check(ssd_case(s), s["dtype"], s["strided"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d_state", [128, 256])
def test_large_states(backend: str, d_state: int) -> None:
    s = USUAL | {"backend": backend, "layout": "right", "t": 33, "n": d_state}
    check(scan_case(s), torch.float32, False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 17), (5, 1), (0, 8), (64,)], ids=str)
def test_rms_norm(backend: str, dtype: torch.dtype, residual: torch.dtype | None, shape: tuple[int, ...]) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, w = leaf(shape, dtype).requires_grad_(), leaf(shape[-1:], dtype).requires_grad_()
    r = None if residual is None else leaf(shape, residual).requires_grad_()
    y, h = ops.rms_norm(x, w, residual=r, residual_dtype=wide, backend=backend)
    leaves = [v for v in (x, w, r) if v is not None]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    h64 = exact[0] if r is None else exact[0] + exact[2]
    y64 = F.rms_norm(h64, h64.shape[-1:], exact[1], 1e-5)
    gy, gh = torch.randn_like(y64).to(dtype).double(), torch.randn_like(h64).to(wide).double()
    wanted = torch.autograd.grad((y64, h64), exact, (gy, gh))
    got = torch.autograd.grad((y, h), leaves, (gy.to(y.dtype), gh.to(h.dtype)))
    assert (y.dtype, h.dtype) == (dtype, wide)
    close("y", y, y64, dtype)
    close("h", h, h64, wide)
    for name, a, b in zip("xwr", got, wanted, strict=False):
        close(f"d{name}", a, b, max(dtype, a.dtype, key=lambda v: BOUND[v]))


# ---- the contract beyond values -------------------------------------------------------------------------------------


def plain_scan(
    b: int = 2, t: int = 12, d: int = 5, n: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    s = USUAL | {"dtype": dtype, "t": t, "d": d, "n": n}
    leaves = scan_case(s).leaves
    return (
        leaves
        if b == 2
        else {k: v[:b] if k in ("u", "dt", "B", "C", "z", "initial_state") else v for k, v in leaves.items()}
    )


def cut(x: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    tokens = ("u", "dt", "B", "C", "z", "x")
    return {k: v[:, span] if k in tokens else v for k, v in x.items()}


def same(got: Tensor, wanted: Tensor, backend: str) -> None:
    """Bit-equal on our own kernels; on the reference torch's vectorised exp may round its last elements otherwise."""
    if backend == "reference":
        close("split", got, wanted.double(), got.dtype)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", FLAG)
def test_a_split_scan_is_bit_equal_to_the_whole(backend: str, dtype: torch.dtype, reverse: bool) -> None:
    x = plain_scan(t=137, d=19, n=16, dtype=dtype)
    whole, last = ops.selective_scan(**x, dt_softplus=True, reverse=reverse, backend=backend)
    for k in (0, 1, 64, 100, 137):
        first, second = (slice(k, None), slice(0, k)) if reverse else (slice(0, k), slice(k, None))
        y1, state = ops.selective_scan(**cut(x, first), dt_softplus=True, reverse=reverse, backend=backend)
        y2, state = ops.selective_scan(
            **(cut(x, second) | {"initial_state": state}), dt_softplus=True, reverse=reverse, backend=backend
        )
        parts = [y2, y1] if reverse else [y1, y2]
        same(torch.cat(parts, 1), whole, backend)
        same(state, last, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 4, 16])
def test_a_split_convolution_is_bit_equal_to_the_whole(backend: str, k: int) -> None:
    x, w, bias = leaf((2, 40, 9), torch.float32), leaf((9, k), torch.float32), leaf((9,), torch.float32)
    whole, last = ops.causal_conv1d(x, w, bias, activation="silu", backend=backend)
    for at in (0, 1, 3, 20, 40):
        y1, state = ops.causal_conv1d(x[:, :at], w, bias, activation="silu", backend=backend)
        y2, state = ops.causal_conv1d(x[:, at:], w, bias, activation="silu", initial_state=state, backend=backend)
        same(torch.cat([y1, y2], 1), whole, backend)
        same(state, last, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("complex_", FLAG)
@pytest.mark.parametrize("constant", FLAG)
def test_scan_steps_follow_the_scan(backend: str, complex_: bool, constant: bool) -> None:
    kind = "constant" if constant else "token"
    s = USUAL | dict(backend=backend, t=9, d=11, n=6, g=2, B=kind, C=kind, complex=complex_)
    x = scan_case(s).leaves
    whole, last = ops.selective_scan(**x, dt_softplus=True, backend=backend)
    state = torch.full((5, *last.shape[1:]), float("nan"), dtype=last.dtype)
    state[[3, 1]] = x.pop("initial_state")
    for t in range(9):
        token = {k: v[:, t] if k in ("u", "dt", "z") or (k in "BC" and not constant) else v for k, v in x.items()}
        y = ops.selective_scan_step_(state, **token, dt_softplus=True, index=torch.tensor([3, 1]), backend=backend)
        close("y", y, whole[:, t].double(), torch.float32)
    close("state", state[[3, 1]], last.to(torch.complex128 if complex_ else torch.float64), torch.float32)
    assert torch.isnan(state[[0, 2, 4]]).all()
    before = state.clone()
    y = ops.selective_scan_step_(
        state, **token, dt_softplus=True, index=torch.tensor([-1, 1], dtype=torch.int32), backend=backend
    )
    assert not y[0].any()
    assert y[1].any()
    assert torch.equal(state[3], before[3])
    assert not torch.equal(state[1], before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scan_step_takes_the_logarithm_of_decay_rates(backend: str) -> None:
    s = USUAL | dict(backend=backend, t=1, d=11, n=6, g=2, B="token", C="token", complex=False)
    x = scan_case(s).leaves
    start = x.pop("initial_state")
    token = {k: v[:, 0] if k in ("u", "dt", "z", "B", "C") else v for k, v in x.items()}
    whole, last = ops.selective_scan(**x, dt_softplus=True, initial_state=start, backend=backend)
    state = start.clone()
    y = ops.selective_scan_step_(state, **token | {"A": (-x["A"]).log()}, dt_softplus=True, log_A=True, backend=backend)
    close("y", y, whole[:, 0].double(), torch.float32)
    close("state", state, last.double(), torch.float32)
    with pytest.raises(TypeError, match=r"^selective_scan_step_: log_A is True and A is complex"):
        ops.selective_scan_step_(state, **token | {"A": token["A"].to(torch.complex64)}, log_A=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_convolution_steps_follow_the_convolution(backend: str, dtype: torch.dtype, k: int) -> None:
    x, w, bias = leaf((2, 7, 10), dtype), leaf((10, k), dtype), leaf((10,), dtype)
    whole, last = ops.causal_conv1d(x, w, bias, activation="silu", backend=backend)
    state = torch.zeros(4, k - 1, 10, dtype=last.dtype)
    for t in range(7):
        y = ops.causal_conv1d_step_(
            state, x[:, t], w, bias, activation="silu", index=torch.tensor([2, 0]), backend=backend
        )
        close("y", y, whole[:, t].double(), dtype)
    assert torch.equal(state[[2, 0]], last)
    y = ops.causal_conv1d_step_(state, x[:, 0], w, bias, index=torch.tensor([-1, -1]), backend=backend)
    assert not y.any()
    assert torch.equal(state[[2, 0]], last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_input_state_is_never_changed(backend: str) -> None:
    x = plain_scan()
    before = x["initial_state"].clone()
    _, state = ops.selective_scan(**x, backend=backend)
    state.add_(1)
    assert torch.equal(x["initial_state"], before)
    empty = cut(x, slice(0, 0))
    _, state = ops.selective_scan(**empty, backend=backend)
    assert torch.equal(state, before)
    assert state.data_ptr() != x["initial_state"].data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-7, 50.0], ids=["tiny", "large"])
def test_soak_of_a_million_steps(backend: str, scale: float) -> None:
    """bfloat16 data, A·dt from vanishing to saturating: no NaN, and the state stays as near float64's as it began."""
    steps = 1_000_000 if backend == "cpu" else 20_000
    block, d, n = steps // 20, 2, 2
    A = -torch.tensor([[1.0, 4.0], [0.5, 16.0]]) * scale
    state, exact = None, None
    for i in range(20):
        torch.manual_seed(i)
        u, dt, B, C = (leaf((1, block, w), torch.bfloat16) for w in (d, d, n, n))
        y, state = ops.selective_scan(u, dt, A, B, C, dt_softplus=True, initial_state=state, backend=backend)
        y64, exact = ops.selective_scan(
            u.double(),
            dt.double(),
            A.double(),
            B.double(),
            C.double(),
            dt_softplus=True,
            initial_state=exact,
            backend=backend,
        )
        assert torch.isfinite(y).all()
        close("y", y, y64, torch.bfloat16)
    error = ((state.double() - exact).abs().max() / exact.abs().max()).item()
    assert error < LONG_STREAM if scale < 1 else error < BOUND[torch.float32]
