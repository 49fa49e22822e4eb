"""Inputs, comparisons and float64 oracles (loops that share no algorithm with the kernels) for tests of C++ kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # also run without installing

from stateline.ops.causal_conv1d import cpu as conv
from stateline.ops.selective_scan import cpu as scan

# Relative to the largest value of the oracle. float32 sums of up to 256 terms; bfloat16 rounds results to 8 bits; a
# complex decay turns through dt·Im A radians, which float32 holds to 1e-7 of up to sixty.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}
COMPLEX_BOUND = {torch.float32: 6e-5, torch.bfloat16: 8e-3, torch.float64: 1e-11}


def wide(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.to(torch.complex128) if x.is_complex() else x.double()


def assert_near(got: Tensor | None, want: Tensor | None, bound: float, what: str) -> None:
    assert (got is None) == (want is None), what
    if got is None or want is None or want.numel() == 0:
        return
    assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all(), (
        f"{what} has values that are not finite"
    )
    error = (wide(got) - want).abs().max() / want.abs().max().clamp_min(1e-3)
    assert error < bound, f"{what}: error {error:.2e}, bound {bound:.0e}"


def scan_oracle(u, dt, A, B, C, D, z, dt_bias, softplus, h0, segments, reverse):
    """One token at a time, in float64, differentiable by autograd."""
    b, t, d = u.shape
    if segments is None:
        segments = [(i, 0, t) for i in range(b)]
    y = [[torch.zeros(d, dtype=torch.float64)] * t for _ in range(b)]
    states = []
    for i, (row, start, stop) in enumerate(segments):
        h = torch.zeros(A.shape, dtype=A.dtype) if h0 is None else h0[i]
        order = range(stop - 1, start - 1, -1) if reverse else range(start, stop)
        for k in order:
            step = dt[row, k] + (0 if dt_bias is None else dt_bias)
            if softplus:
                step = torch.nn.functional.softplus(step, threshold=700)
            Bk, Ck = (x if x.dim() == 2 else x[row, k] for x in (B, C))
            Bk, Ck = (torch.view_as_complex(x) if A.is_complex() and not x.is_complex() else x for x in (Bk, Ck))
            channel_group = torch.arange(d) * Bk.shape[0] // d, torch.arange(d) * Ck.shape[0] // d
            h = torch.exp(step[:, None] * A) * h + (step * u[row, k])[:, None] * Bk[channel_group[0]]
            out = (Ck[channel_group[1]] * h).sum(-1)
            out = 2 * out.real if A.is_complex() else out
            if D is not None:
                out = out + D * u[row, k]
            if z is not None:
                out = out * torch.nn.functional.silu(z[row, k])
            y[row][k] = out
        states.append(h)
    zeros = torch.zeros((0, *A.shape), dtype=A.dtype)
    empty = torch.zeros(b, t, d, dtype=torch.float64)
    ys = torch.stack([torch.stack(rows) for rows in y]) if t and b else empty
    return ys, torch.stack(states) if states else zeros


def scan_inputs(
    b=2, t=33, d=17, n=16, g=1, dtype=torch.float32, cx=False, const=(False, False), extras=True, sequences=None
):
    torch.manual_seed(b + 10 * t + 100 * d + n)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    state = {torch.float32: torch.complex64, torch.float64: torch.complex128}[real] if cx else real
    u, dt, z = (torch.randn(b, t, d).to(dtype) for _ in range(3))
    A = -torch.rand(d, n, dtype=real) * 3
    if cx:
        A = torch.complex(A, torch.randn(d, n, dtype=real) * 6)
    shape = (b, t, g, n, 2) if cx else (b, t, g, n)
    B, C = (torch.randn(d, n, dtype=state) if k else torch.randn(shape).to(dtype) for k in const)
    D, bias = torch.randn(d, dtype=real), torch.randn(d, dtype=real)
    h0 = torch.randn(b if sequences is None else sequences, d, n, dtype=state)
    return [u, dt, A, B, C, *((D, z, bias) if extras else (None, None, None)), True, h0 if extras else None]


def check_scan(inputs, segments=None, reverse=False):
    table = None if segments is None else torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
    dtype, cx = inputs[0].dtype, inputs[2].is_complex()
    bound = (COMPLEX_BOUND if cx else BOUND)[dtype]
    y, state = scan.forward(*inputs, table, reverse)
    leaves = [wide(x).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    want_y, want_state = scan_oracle(*leaves, segments, reverse)
    assert y.dtype == dtype
    assert state.dtype == inputs[2].dtype
    assert_near(y, want_y.detach(), bound, "y")
    assert_near(state, want_state.detach(), min(bound, COMPLEX_BOUND[torch.float32]), "state")
    dy, dstate = torch.randn_like(want_y).to(dtype), torch.randn_like(state)
    names = ["u", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "initial"]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    value = (want_y * dy.double()).sum() + (want_state * wide(dstate).conj()).sum().real
    grads = iter(
        torch.autograd.grad(value, tensors, allow_unused=True) if value.requires_grad else [None] * len(tensors)
    )
    got = iter(scan.backward(dy, dstate, *inputs, table, reverse))
    for name, x in zip(names, inputs, strict=True):
        if name == "softplus":
            continue
        mine = next(got)
        want = next(grads) if isinstance(x, Tensor) else None
        if isinstance(x, Tensor):
            assert mine.dtype == x.dtype
            assert mine.shape == x.shape
            want = torch.zeros_like(wide(x)) if want is None else want
        assert_near(mine, want, 3 * bound, f"gradient of {name}")


def conv_oracle(x, weight, bias, silu, h0, segments, reverse):
    b, t, d = x.shape
    k = weight.shape[1]
    if segments is None:
        segments = [(i, 0, t) for i in range(b)]
    y = [[torch.zeros(d, dtype=torch.float64)] * t for _ in range(b)]
    states = []
    for i, (row, start, stop) in enumerate(segments):
        past = [torch.zeros(d, dtype=torch.float64)] * (k - 1) if h0 is None else list(h0[i])
        order = range(stop - 1, start - 1, -1) if reverse else range(start, stop)
        for s in order:
            past.append(x[row, s])
            window = past[len(past) - k :]
            out = sum(weight[:, j] * window[j] for j in range(k)) + (0 if bias is None else bias)
            y[row][s] = torch.nn.functional.silu(out) if silu else out
        states.append(torch.stack(past[len(past) - (k - 1) :]) if k > 1 else torch.zeros(0, d, dtype=torch.float64))
    return torch.stack([torch.stack(rows) for rows in y]) if t else x * 0, torch.stack(states)


def conv_inputs(b=2, t=37, d=17, k=4, dtype=torch.float32, silu=True, extras=True, sequences=None):
    torch.manual_seed(b + 10 * t + 100 * d + k)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, bias = torch.randn(b, t, d).to(dtype), torch.randn(d, k, dtype=real), torch.randn(d, dtype=real)
    h0 = torch.randn(b if sequences is None else sequences, k - 1, d, dtype=real)
    return [x, weight, bias if extras else None, silu, h0 if extras else None]


def check_conv(inputs, segments=None, reverse=False):
    table = None if segments is None else torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
    dtype = inputs[0].dtype
    y, state = conv.forward(*inputs, table, reverse)
    leaves = [wide(x).requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    want_y, want_state = conv_oracle(*leaves, segments, reverse)
    assert_near(y, want_y.detach(), BOUND[dtype], "y")
    assert torch.equal(state.double(), want_state.detach())
    dy, dstate = torch.randn_like(want_y).to(dtype), torch.randn_like(state)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    value = (want_y * dy.double()).sum() + (want_state * dstate.double()).sum()
    grads = iter(torch.autograd.grad(value, tensors, allow_unused=True))
    got = conv.backward(dy, dstate, *inputs, table, reverse)
    for name, mine, x in zip(("x", "weight", "bias", "initial"), got, [*inputs[:3], inputs[4]], strict=True):
        want = None
        if x is not None:
            want = next(grads)
            want = torch.zeros_like(wide(x)) if want is None else want
            assert mine.dtype == x.dtype
        assert_near(mine, want, 3 * BOUND[dtype], f"gradient of {name}")
