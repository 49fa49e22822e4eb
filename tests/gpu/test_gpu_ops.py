"""Every operation with GPU kernels against float64 oracles: values, gradients, states, layouts, awkward sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracles import pairwise
from test_ops import FLAG, LAYOUTS, Case, check, close, conv_case
from test_ops import _strided as strided
from torch import Tensor
from where import DEVICE, INTERPRETED

from stateline import backends, ops
from stateline.ops.causal_conv1d import conv_halves

# Triton's interpreter cuts bfloat16 off instead of rounding, which is beyond the bound.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SIZES = {"t": [0, 1, 9], "d": [1, 40], "k": [1, 2, 4]} if INTERPRETED else {
    "t": [0, 1, 2, 7, 64, 65, 130, 300], "d": [1, 3, 8, 17, 48, 130, 1030], "k": [1, 2, 3, 4, 7, 16],
}  # fmt: skip
CONV = {
    "backend": ["gpu"], "dtype": DTYPES, "layout": LAYOUTS, **SIZES, "bias": FLAG, "silu": FLAG, "reverse": FLAG,
    "initial": FLAG, "strided": FLAG,
}  # fmt: skip


def on_device(case: Case, wide: bool) -> Case:
    """The case with its inputs moved to the device, where slices stay slices."""

    def op(**x: Tensor) -> tuple[Tensor, Tensor]:
        moved = {name: v.to(DEVICE) for name, v in x.items()}
        if wide:
            moved = {n: strided(v) if n in case.token_leaves else v for n, v in moved.items()}
        y, state = case.op(**moved)
        return y.cpu(), state.cpu()

    return dataclasses.replace(case, op=op)


def named(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in case.items() if k != "backend")


@pytest.fixture(autouse=True)
def _memory_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`strided` of test_ops makes its wide tensor on the CPU."""
    full = torch.full
    monkeypatch.setattr("test_ops.torch.full", lambda *a, **k: full(*a, **{"device": DEVICE} | k))


@pytest.mark.parametrize("s", pairwise(CONV), ids=named)
def test_convolution(s: dict[str, Any]) -> None:
    check(on_device(conv_case(s | {"strided": False}), s["strided"]), s["dtype"], False)


HALVES = {name: values for name, values in CONV.items() if name not in ("silu", "reverse", "strided")}
HALVES |= {"layout": ["whole", "right", "packed"]}
if INTERPRETED:
    HALVES |= {"dtype": [torch.float32], "t": [0, 9], "d": [40], "k": [4]}


@pytest.mark.parametrize("s", pairwise(HALVES), ids=named)
def test_gradients_of_halves(s: dict[str, Any]) -> None:
    """In one pass: two gradients are added, two put together."""
    dtype, case = s["dtype"], conv_case(s | {"silu": True, "reverse": False})
    outside = ~case.layout.valid()[..., None]
    z = torch.randn_like(case.leaves["x"])
    exact = {name: v.double().requires_grad_() for name, v in case.leaves.items()}
    leaves = case.leaves | {"x": torch.cat([case.leaves["x"], z], -1)}
    given = {name: v.to(DEVICE).requires_grad_() for name, v in leaves.items()}
    place = {name: torch.as_tensor(v).to(DEVICE) for name, v in case.layout.kwargs.items() if name != "padding_side"}
    u, state = case.oracle(**exact)
    *got, last = conv_halves(
        given["x"], given["weight"], given.get("bias"), initial_state=given.get("initial_state"), backend="gpu", **place
    )
    close("u", got[0].cpu(), u, dtype)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[2].cpu(), z)
    dy, more, dz = (torch.randn_like(z).masked_fill(outside, 0) for _ in range(3))
    dstate = torch.randn(state.shape)
    state = state + 0 * sum(v.sum() for v in exact.values())  # part of the graph even when empty
    wanted = torch.autograd.grad((u, state), list(exact.values()), (dy.double() + more.double(), dstate.double()))
    found = torch.autograd.grad((*got, last), list(given.values()), [g.to(DEVICE) for g in (dy, more, dz, dstate)])
    assert torch.equal(found[0].cpu()[..., s["d"] :], dz)
    for name, a, w in zip(exact, found, wanted, strict=True):
        close(f"d{name}", a.cpu()[..., : w.shape[-1]], w, dtype)


NORM = {
    "dtype": DTYPES, "shape": [(2, 3, 17), (0, 5), (19, 1), (1, 1)], "residual": FLAG,
    "stream": [None, torch.float32, DTYPES[-1]], "strided": FLAG,
}  # fmt: skip
if not INTERPRETED:
    NORM["shape"] += [(300, 768), (17, 2560), (5, 5000), (2, 20000)]


@pytest.mark.parametrize("s", pairwise(NORM), ids=named)
def test_norm(s: dict[str, Any]) -> None:
    dtype, shape = s["dtype"], s["shape"]
    stream = s["stream"] or dtype
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1:])
    leaves = [x, weight] + ([torch.randn(shape).to(stream)] if s["residual"] else [])
    exact = [v.double().requires_grad_() for v in leaves]
    given = [v.to(DEVICE).requires_grad_() for v in leaves]
    inputs = [strided(v) if s["strided"] and i != 1 else v for i, v in enumerate(given)]
    y, h = ops.rms_norm(inputs[0], inputs[1], residual=dict(enumerate(inputs)).get(2), residual_dtype=s["stream"],
                        backend="gpu")  # fmt: skip
    assert (y.dtype, h.dtype) == (dtype, stream)
    h_exact = exact[0] + exact[2] if s["residual"] else exact[0] * 1
    stored = h.detach().cpu().double()  # what the gradient sees of h is what was stored
    y_exact = h_exact * torch.rsqrt(h_exact.square().mean(-1, keepdim=True) + 1e-5) * exact[1]
    gy, gh = torch.randn(shape).to(dtype), torch.randn(shape).to(stream)
    got = torch.autograd.grad((y, h), given, (gy.to(DEVICE), gh.to(DEVICE)))
    rounded = h_exact + (stored - h_exact).detach()
    y_of_rounded = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-5) * exact[1]
    wanted = torch.autograd.grad((y_of_rounded, h_exact), exact, (gy.double(), gh.double()))
    close("y", y.cpu(), y_exact, dtype)
    close("h", h.cpu(), h_exact, stream)
    coarse = max(dtype, stream, key=lambda d: torch.finfo(d).eps)
    for name, a, b in zip(("dx", "dweight", "dresidual"), got, wanted, strict=False):
        close(name, a.cpu(), b, coarse)


LOSS = {"dtype": DTYPES, "rows": [0, 1, 5], "columns": [(1, 1), (17, 15), (4100, 4099)], "strided": FLAG}
if not INTERPRETED:
    LOSS |= {"rows": [0, 1, 5, 300], "columns": [(1, 1), (17, 15), (256, 256), (4096, 4096), (50280, 50277)]}


@pytest.mark.parametrize("s", pairwise(LOSS), ids=named)
def test_cross_entropy(s: dict[str, Any]) -> None:
    dtype, rows, (width, classes) = s["dtype"], s["rows"], s["columns"]
    logits, targets = (3 * torch.randn(rows, width)).to(dtype), torch.randint(classes, (rows,))
    ignored = torch.arange(rows) % 4 == 2
    targets[ignored] = -7
    exact = logits.double()[:, :classes].requires_grad_()
    own = torch.nn.functional.one_hot(targets.masked_fill(ignored, 0), classes).double()
    want = (exact.exp().sum(1).log() - (exact * own).sum(1)).masked_fill(ignored, 0)
    logits[ignored] = logits[:, classes:] = float("nan")
    given = (strided(logits.to(DEVICE)) if s["strided"] else logits.to(DEVICE)).requires_grad_()
    where = targets.to(DEVICE, torch.int32 if s["strided"] else torch.int64)
    loss = ops.cross_entropy(given, where, classes=classes, ignore_index=-7, backend="gpu")
    slope = torch.randn(rows)
    (wanted,) = torch.autograd.grad(want, exact, slope.double())
    (got,) = torch.autograd.grad(loss, given, slope.to(DEVICE))
    close("loss", loss.cpu(), want, torch.float32)
    close("gradient", got.cpu()[:, :classes], wanted, dtype)
    assert got.dtype == dtype
    assert not got[ignored.to(DEVICE)].any()
    assert not got[:, classes:].any()


def test_cross_entropy_of_extreme_logits_and_wrong_targets() -> None:
    inf = float("inf")
    x = torch.tensor(
        [[1e4, -1e4, 0.0], [-inf, 2.0, -inf], [-inf, -inf, -inf], [0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]]
    )
    loss = ops.cross_entropy(x.to(DEVICE), torch.tensor([0, 1, -100, -100, 0]).to(DEVICE), backend="gpu")
    assert loss[:4].tolist() == [0, 0, 0, 0]
    assert loss[4].isnan()
    if not INTERPRETED:  # where targets can be read they are refused
        assert ops.cross_entropy(x[3:4].to(DEVICE), torch.tensor([3]).to(DEVICE)).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_steps_equal_the_sequence(dtype: torch.dtype, k: int) -> None:
    b, t, d = 3, 4, 40
    x, weight, bias = (torch.randn(s).to(DEVICE, dtype) for s in ((b, t, d), (d, k), (d,)))
    y, state = ops.causal_conv1d(x, weight, bias, activation="silu", backend="gpu")
    slots = torch.full((b + 2, k - 1, d), 7.0, device=DEVICE)
    index = torch.tensor([4, -1, 0], device=DEVICE)
    slots[[4, 0]] = 0
    for i in range(t):
        out = ops.causal_conv1d_step_(slots, x[:, i], weight, bias, activation="silu", index=index, backend="gpu")
        assert torch.equal(out[[0, 2]], y[[0, 2], i])
        assert not out[1].any()
    assert torch.equal(slots[[4, 0]], state[[0, 2]])
    assert (slots[1:4] == 7).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    x, weight = torch.randn(3, 9, 40).to(DEVICE), torch.randn(40, 4).to(DEVICE).requires_grad_()
    dy = torch.randn_like(x)
    together = x.clone().requires_grad_()
    y, state = ops.causal_conv1d(together, weight, activation="silu", backend="gpu")
    (dx,) = torch.autograd.grad(y, together, dy)
    alone = x[1:2].clone().requires_grad_()
    y1, state1 = ops.causal_conv1d(alone, weight, activation="silu", backend="gpu")
    (dx1,) = torch.autograd.grad(y1, alone, dy[1:2])
    packed = x[1, 2:].clone()[None]
    y2, _ = ops.causal_conv1d(torch.cat([x[:1], packed], 1), weight, activation="silu", backend="gpu",
                              cu_seqlens=torch.tensor([0, 9, 16], device=DEVICE))  # fmt: skip
    y3, _ = ops.causal_conv1d(packed, weight, activation="silu", backend="gpu")
    assert torch.equal(y[1:2], y1)
    assert torch.equal(dx[1:2], dx1)
    assert torch.equal(state[1:2], state1)
    assert torch.equal(y2[:, 9:], y3)


def test_same_call_same_bits() -> None:
    x, weight, bias = (torch.randn(s).to(DEVICE).requires_grad_() for s in ((2, 9, 40), (40, 4), (40,)))
    dy = torch.randn_like(x)
    runs = [
        torch.autograd.grad(ops.causal_conv1d(x, weight, bias, backend="gpu")[0], (x, weight, bias), dy)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


needs_cuda = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")


@needs_cuda
def test_cuda_tensors_take_these_kernels_by_themselves() -> None:
    x = torch.randn(1, 3, 8, device=DEVICE)
    assert backends.explain(ops.causal_conv1d, x).name == "gpu"
    assert backends.explain(ops.causal_conv1d, x.double()).name == "reference"
    assert torch.equal(ops.rms_norm(x, x[0, 0])[0], ops.rms_norm(x, x[0, 0], backend="gpu")[0])


@needs_cuda
def test_offsets_beyond_two_to_the_31() -> None:
    t, d = 1_100_000, 2048
    x = torch.zeros(1, t, d, dtype=torch.bfloat16, device=DEVICE)
    x[0, -64:] = torch.randn(64, d, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(d, 4, device=DEVICE)
    with torch.no_grad():
        y, state = ops.causal_conv1d(x, weight, backend="gpu")
        tail, tail_state = ops.causal_conv1d(x[:, -80:].contiguous(), weight, backend="gpu")
    assert torch.equal(y[:, -64:], tail[:, -64:])
    assert torch.equal(state, tail_state)


@needs_cuda
def test_logits_beyond_two_to_the_31() -> None:
    rows, v = 43_000, 50_280
    x = torch.zeros(rows, v, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = torch.randn(3, v, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(v, (rows,), device=DEVICE)
    tail = x[-3:].clone().requires_grad_()
    x.requires_grad_()
    loss, alone = ops.cross_entropy(x, targets), ops.cross_entropy(tail, targets[-3:])
    assert torch.equal(loss[-3:], alone)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(grad[-3:], torch.autograd.grad(alone.sum(), tail)[0])


@needs_cuda
def test_a_graph_replays_forward_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # guard bytes are filled by launches that a graph would replay
    x, weight = torch.randn(2, 70, 256, device=DEVICE), torch.randn(256, 4, device=DEVICE)
    state = torch.zeros(2, 3, 256, device=DEVICE)

    def run() -> tuple[Tensor, Tensor]:
        return ops.causal_conv1d(x, weight)[0], ops.causal_conv1d_step_(state, x[:, 0], weight)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = run()
    x.copy_(torch.randn_like(x))
    state.zero_()
    graph.replay()
    assert torch.equal(out[0], ops.causal_conv1d(x, weight)[0])
    assert torch.equal(state[:, -1], x[:, 0])
