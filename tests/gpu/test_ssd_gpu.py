"""ssd's GPU kernels against the reference in float64: values, gradients, states, steps, layouts, awkward sizes.

Buffers are poisoned and fenced (conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import pairwise
from test_gpu_ops import named, on_device
from test_ops import FLAG, LAYOUTS, check, close, ssd_case
from test_ops import _strided as strided
from test_ssd import PLAIN, TOKENS, cut
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.ops.rms_norm import reference as norm
from stateline.ops.ssd import chunked, gpu, reference

# Triton's interpreter cuts bfloat16 off instead of rounding, which is beyond the bound.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
GRID: dict[str, list[Any]] = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, "h": [1, 2, 5], "g": [1, 2, 3], "reverse": FLAG,
    "softplus": FLAG, "limit": FLAG, "D": [None, "head", "channel"], "z": FLAG, "dt_bias": FLAG, "initial": FLAG,
    "strided": FLAG,
}  # fmt: skip
if INTERPRETED:
    GRID |= {"h": [1, 2, 3], "t": [0, 1, 20], "p": [1, 17], "n": [1, 3, 17]}
else:
    GRID |= {"t": [0, 1, 2, 63, 64, 65, 300, 1100], "p": [1, 3, 16, 40, 64, 130], "n": [1, 3, 16, 35, 64, 128]}


@pytest.fixture(autouse=True)
def _memory_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strided` of test_ops makes its wide tensor on the CPU."""
    full = torch.full
    monkeypatch.setattr("test_ops.torch.full", lambda *a, **k: full(*a, **{"device": DEVICE} | k))


@pytest.mark.parametrize("s", pairwise(GRID), ids=named)
def test_grid(s: dict[str, Any]) -> None:
    check(on_device(ssd_case(s | {"strided": False}), s["strided"]), s["dtype"], False)


def inputs(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """As a Mamba-2 layer calls it, on the device."""
    return {k: v.to(DEVICE) for k, v in ssd_case(PLAIN | {"dtype": dtype} | options).leaves.items()}


NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def exact(x: dict[str, Tensor], limit: tuple[float, float] = (-torch.inf, torch.inf)) -> list[Any]:
    """What the reference's functions take, in float64 on the CPU, with softplus; by name it may not be asked for."""
    wide = {k: v.cpu().double() for k, v in x.items()}
    return [*(wide.get(k) for k in NAMES), True, *limit, wide.get("initial_state")]


def results(x: dict[str, Tensor], weights: list[Tensor] | None = None, **how: Any) -> list[Tensor]:
    """y, state, total decay and all gradients of their sum, weighted."""
    leaves = {k: v.clone().requires_grad_() for k, v in x.items()}
    out = ops.ssd(**leaves, dt_softplus=True, return_decay=True, backend="gpu", **how)
    return [*out, *torch.autograd.grad(out, list(leaves.values()), weights or [torch.ones_like(v) for v in out])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layers_shape(dtype: torch.dtype) -> None:
    """Heads of 64 channels, 128 states, several runs of tiles, several programs that share a group's sums.

    The oracle of the grid would take minutes here; the chunked form, which agrees with it, does not.
    """
    t, h, p, n = (20, 3, 17, 16) if INTERPRETED else (1300, 24, 64, 128)
    x = inputs(dtype, t=t, h=h, p=p, n=n, g=1, z=False)
    x |= {name: strided(x[name]) for name in ("x", "dt", "B", "C")}
    out = chunked.forward(*exact(x), None, False)
    grads = chunked.backward(*map(torch.ones_like, out), *exact(x), None, False)
    wanted = dict(zip((*NAMES, "initial_state"), grads, strict=True))
    for name, a, b in zip(("y", "state", "decay", *x), results(x), [*out, *map(wanted.get, x)], strict=True):
        assert b is not None
        close(name, a.cpu(), b, torch.float32 if name in ("state", "decay") else dtype)


@pytest.mark.parametrize("place", ["whole", "packed"])
def test_a_row_does_not_depend_on_its_batch_and_bits_repeat(place: str) -> None:
    t = 10 if INTERPRETED else 700
    dtype, h, p, n = (torch.float16, 1, 3, 16) if INTERPRETED else (torch.bfloat16, 3, 64, 64)
    x = inputs(dtype, t=t, h=h, p=p, n=n, g=1)
    rows = [slice(0, 1), slice(1, 2)]
    if place == "packed":
        cu = torch.tensor([0, t - 5, 2 * t - 5], device=DEVICE)
        joined = {k: torch.cat([v[:1, : t - 5], v[1:2]], 1) if k in TOKENS else v for k, v in x.items()}
        together = results(joined, cu_seqlens=cu)
        again = results(joined, cu_seqlens=cu)
    else:
        together, again = results(x), results(x)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for i, row in enumerate(rows):
        length = t - 5 if place == "packed" and i == 0 else t
        own = {k: v[row, :length] if k in TOKENS else v[row] if k == "initial_state" else v for k, v in x.items()}
        alone = results(own)
        for name, a, b in zip(("y", "state", "decay", *x), together, alone, strict=True):
            if name in ("A", "D", "dt_bias"):
                continue
            if place == "packed" and name in ("y", *TOKENS):
                a = a[:, :length] if i == 0 else a[:, t - 5 :]
            else:
                a = a[row]
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 16, 33])
@pytest.mark.parametrize("reverse", FLAG)
def test_pieces_and_steps_follow_the_whole(dtype: torch.dtype, n: int, reverse: bool) -> None:
    x = inputs(dtype, t=9, p=19, n=n, D="channel", g=2)
    how: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.1, 2.0), "backend": "gpu"}
    whole, last = ops.ssd(**x, reverse=reverse, **how)
    first, second = (slice(4, None), slice(0, 4)) if reverse else (slice(0, 4), slice(4, None))
    y1, state = ops.ssd(**cut(x, first), reverse=reverse, **how)
    y2, state = ops.ssd(**(cut(x, second) | {"initial_state": state}), reverse=reverse, **how)
    y = torch.cat([y2, y1] if reverse else [y1, y2], 1)
    bound = max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
    close("y", y, whole.double(), bound)
    close("state", state, last.double(), torch.float32)
    slots = torch.randn(5, *last.shape[1:]).to(DEVICE)
    slots[[3, 1]] = x.pop("initial_state")
    kept = slots.clone()
    for i in reversed(range(9)) if reverse else range(9):
        y = ops.ssd_step_(slots, **cut(x, i), index=torch.tensor([3, 1], device=DEVICE), **how)
        close("y", y, whole[:, i].double(), bound)
    close("state", slots[[3, 1]], last.double(), torch.float32)
    assert torch.equal(slots[[0, 2, 4]], kept[[0, 2, 4]])
    before = slots.clone()
    y = ops.ssd_step_(slots, **cut(x, 0), index=torch.tensor([-1, 4], dtype=torch.int32, device=DEVICE), **how)
    assert not y[0].any()
    assert y[1].any()
    assert torch.equal(slots[:4], before[:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 40, 64, 3), (1, 3, 130, 1), (5, 1, 1, 5)], ids=str)
def test_step(dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> None:
    h, p, n, g = sizes
    for options in ({"z": True, "D": "head"}, {"z": False, "D": "channel", "dt_bias": False}, {"D": None}):
        x = ssd_case(PLAIN | {"t": 1, "h": h, "p": p, "n": n, "g": g, "dtype": dtype} | options).leaves
        token = cut(x, 0)
        state = token.pop("initial_state")
        right, mine = state.double(), state.clone().to(DEVICE)
        want = reference.step(right, *exact(token, (-torch.inf, 0.7))[:-1], None)
        given = {k: v.to(DEVICE) for k, v in token.items()}
        y = ops.ssd_step_(mine, **given, dt_softplus=True, dt_limit=(None, 0.7), backend="gpu")
        close("y", y.cpu(), want, dtype)
        close("state", mine.cpu(), right, torch.float32)
        if dtype == torch.float64:
            continue
        given["A"] = given["A"].neg().log()
        wide, narrow = (state.to(DEVICE, torch.bfloat16).to(kept) for kept in (torch.float32, torch.bfloat16))
        y, z = (ops.ssd_step_(s, **given, dt_softplus=True, log_A=True, backend="gpu") for s in (wide, narrow))
        close("y of a narrow state", z.cpu(), y.double().cpu(), dtype)
        step = 2**-7 if INTERPRETED else 1.01 * 2**-8  # the interpreter cuts off what the device rounds
        assert ((narrow.float() - wide).abs() <= step * wide.abs() + 1e-5).all()


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_each_option_absent(absent: str) -> None:
    x = {k: v for k, v in inputs(t=5, p=3, n=2).items() if k != absent}
    out = reference.forward(*exact(x), None, False)
    grads = reference.backward(*map(torch.ones_like, out), *exact(x), None, False)
    wanted = dict(zip((*NAMES, "initial_state"), grads, strict=True))
    for name, a, b in zip(("y", "state", "decay", *x), results(x), [*out, *map(wanted.get, x)], strict=True):
        assert b is not None
        close(name, a.cpu(), b, torch.float32)


def test_mixed_dtypes_are_read_as_float32() -> None:
    x = inputs(t=9)
    mixed = x | {"x": x["x"].half(), "z": x["z"].half()}
    y, state = ops.ssd(**mixed, dt_softplus=True, backend="gpu")
    y32, state32 = ops.ssd(**{k: v.float() for k, v in mixed.items()}, dt_softplus=True, backend="gpu")
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    assert torch.equal(state, state32)
    assert torch.equal(y, y32.half())


def test_large_steps_and_small_ones() -> None:
    """Decays that vanish, and raw step sizes where a naive softplus is exactly 0 or overflows."""
    x = inputs(t=66, z=False, dt_bias=False)
    x["dt"] = torch.linspace(-40, 90, 66)[None, :, None].expand(2, 66, 4).contiguous().to(DEVICE)
    y, state = ops.ssd(**x, dt_softplus=True, backend="gpu")
    want = reference.forward(*exact(x), None, False)
    close("y", y.cpu(), want[0], torch.float32)
    close("state", state.cpu(), want[1], torch.float32)


@pytest.mark.parametrize("which", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_nan_is_passed_on(which: str) -> None:
    x = inputs(t=3)
    x[which].view(-1)[0] = float("nan")
    y, _ = ops.ssd(**x, dt_softplus=True, backend="gpu")
    assert y[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("sizes", [(0, 7, 2, 3, 4), (2, 0, 2, 3, 4), (2, 7, 2, 3, 0)], ids=str)
def test_sizes_of_zero(sizes: tuple[int, ...]) -> None:
    b, t, h, p, n = sizes
    x, B = torch.randn(b, t, h, p, device=DEVICE, requires_grad=True), torch.randn(b, t, 1, n, device=DEVICE)
    start = torch.randn(b, h, p, n, device=DEVICE)
    dt, A, D = torch.rand(b, t, h, device=DEVICE), -torch.rand(h, device=DEVICE), torch.ones(h, device=DEVICE)
    y, state = ops.ssd(x, dt, A, B, B, D=D, initial_state=start, backend="gpu")
    assert (y.shape, state.shape) == ((b, t, h, p), (b, h, p, n))
    assert torch.equal(y, x) or n
    assert t or torch.equal(state, start)
    (y.sum() + state.sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if t:
        assert ops.ssd_step_(state.detach(), x.detach()[:, 0], dt[:, 0], A, B[:, 0], B[:, 0], backend="gpu").shape == (
            b, h, p,
        )  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is given a plan of its own")
def test_plans_depend_on_one_sequence_alone() -> None:
    for memory in (99 * 1024, 227 * 1024):
        for half in FLAG:
            plan = gpu.plan(2048, 32, 64, 128, half, memory)
            assert plan.run % plan.tile == 0
            assert plan.states >= 128
    assert gpu.plan(2048, 32, 64, 128, True, 99 * 1024).tile < gpu.plan(2048, 32, 64, 128, True, 227 * 1024).tile


needs_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")


@needs_cuda
def test_cuda_tensors_take_these_kernels_by_themselves() -> None:
    x = inputs(torch.bfloat16, p=64, n=128)
    system = [x[k] for k in ("x", "dt", "A", "B", "C")]
    assert str(backends.explain(ops.ssd, *system)) == "gpu (matrix products of bfloat16, summed in float32)"
    small = inputs(torch.bfloat16)
    assert "float32, each" in str(backends.explain(ops.ssd, *(small[k] for k in ("x", "dt", "A", "B", "C"))))
    assert "float32, each number as three" in str(backends.explain(ops.ssd, *(v.float() for v in system)))
    assert backends.explain(ops.ssd, *(v.double() for v in system)).name == "chunked"
    wide = [*system[:3], *(torch.randn(2, 12, 1, 300, device=DEVICE) for _ in "BC")]
    assert "up to 128 states, not 300" in backends.explain(ops.ssd, *wide).rejected["gpu"]
    assert torch.equal(ops.ssd(**x)[0], ops.ssd(**x, backend="gpu")[0])
    assert ops.ssd(*wide)[0].shape == (2, 12, 4, 64)


@needs_cuda
def test_a_graph_replays_forward_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes are filled by launches that a graph would replay
    x = inputs(torch.bfloat16, t=130, p=64, n=64)
    state = torch.zeros_like(x["initial_state"])
    token = {k: v for k, v in cut(x, 0).items() if k != "initial_state"}

    def run() -> tuple[Tensor, Tensor]:
        return ops.ssd(**x, dt_softplus=True)[0], ops.ssd_step_(state, **token, dt_softplus=True)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = run()
    x["x"].copy_(torch.randn_like(x["x"]))
    state.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[0], ops.ssd(**x, dt_softplus=True)[0])
    state.zero_()
    assert torch.equal(out[1], ops.ssd_step_(state, **token, dt_softplus=True))


@needs_cuda
def test_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes would take as much memory again
    t, h, p, n, tail = 1_100_000, 32, 64, 1, 300
    x = torch.zeros(1, t, h, p, dtype=torch.bfloat16, device=DEVICE)
    x[0, -tail:] = torch.randn(tail, h, p, device=DEVICE)
    dt, A = torch.ones(1, t, h, device=DEVICE, dtype=torch.bfloat16), torch.zeros(h, device=DEVICE)
    B = torch.ones(1, t, 1, n, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        y, state = ops.ssd(x, dt, A, B, B)
        y_tail, state_tail = ops.ssd(x[:, -tail:], dt[:, -tail:], A, B[:, -tail:], B[:, -tail:])
    assert not y[0, : t - tail : 1000].any()
    close("y", y[:, -tail:], y_tail.double(), torch.bfloat16)
    close("state", state, state_tail.double(), torch.float32)


NORM = {"dtype": DTYPES, "shape": [(2, 3, 18), (0, 6), (1, 6)], "groups": [1, 3], "first": FLAG, "strided": FLAG}
if not INTERPRETED:
    NORM["shape"] += [(300, 768), (17, 5160), (2, 2, 24000)]


@pytest.mark.parametrize("s", pairwise(NORM), ids=named)
def test_gated_norm(s: dict[str, Any]) -> None:
    shape, how = s["shape"], (1e-5, s["groups"], s["first"])
    y, z, weight = torch.randn(shape).to(s["dtype"]), torch.randn(shape).to(s["dtype"]), torch.randn(shape[-1:])
    given = [v.to(DEVICE).requires_grad_() for v in (y, z, weight)]
    placed = [strided(v) if s["strided"] and i < 2 else v for i, v in enumerate(given)]
    out = ops.gated_rms_norm(*placed, eps=how[0], groups=how[1], norm_before_gate=how[2], backend="gpu")
    assert out.dtype == s["dtype"]
    exact = [v.double() for v in (y, z, weight)]
    close("out", out.cpu(), norm.gated_forward(*exact, *how), s["dtype"])
    dout = torch.randn(shape).to(s["dtype"])
    got = torch.autograd.grad(out, given, dout.to(DEVICE))
    for name, a, b in zip(("y", "z", "weight"), got, norm.gated_backward(dout.double(), *exact, *how), strict=True):
        close(f"d{name}", a.cpu(), b, s["dtype"])
