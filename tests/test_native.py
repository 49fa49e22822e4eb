"""The C++ kernels against oracles written here in float64, by loops that share no algorithm with them; values and gradients.

Runs alone too: `cmake -S . -B build && cmake --build build && pytest tests/test_native.py`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from stateline.backends import load_native, native_problem
from stateline.ops.causal_conv1d import cpu as conv
from stateline.ops.rms_norm import cpu as norm
from stateline.ops.selective_scan import cpu as scan

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no C++ library: {native_problem()}")

# Relative to the largest value of the oracle. float32 sums of up to 256 terms; bfloat16 rounds results to 8 bits; a complex
# decay turns through dt·Im A radians, which float32 holds to 1e-7 of up to sixty.
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


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh tensors hold NaN, so that a kernel that forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- selective_scan ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("d", [1, 3, 8, 17, 100])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_scan_widths(d, n):
    check_scan(scan_inputs(t=5, d=d, n=n))


@pytest.mark.parametrize(
    ("n", "dtype"), [(64, torch.float32), (256, torch.bfloat16), (256, torch.float64), (20, torch.float64)]
)
def test_scan_many_states(n, dtype):
    check_scan(scan_inputs(b=1, t=3, d=9, n=n, dtype=dtype))


@pytest.mark.parametrize("t", [0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 130])
def test_scan_lengths(t):
    check_scan(scan_inputs(b=1, t=t, d=5, n=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cx", [False, True])
@pytest.mark.parametrize("const", [(False, False), (True, False), (False, True), (True, True)])
def test_scan_kinds(dtype, cx, const):
    check_scan(scan_inputs(t=34, d=6, n=5, dtype=dtype, cx=cx, const=const))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cx", [False, True])
def test_scan_groups_and_segments(reverse, cx):
    segments = [(0, 0, 3), (1, 4, 4), (1, 5, 40), (0, 7, 40), (0, 3, 3)]
    inputs = scan_inputs(t=40, d=7, n=3, g=3, cx=cx, sequences=len(segments))
    for x in (0, 1, 6):  # what lies outside segments is never read
        inputs[x][1, 4], inputs[x][0, 3:7] = float("nan"), float("nan")
    table = torch.tensor(segments)
    y, _ = scan.forward(*inputs, table, reverse)
    grads = scan.backward(torch.ones_like(y), torch.zeros_like(inputs[9]), *inputs, table, reverse)
    for x in (y, grads[0], grads[1], grads[6], grads[3], grads[4]):
        assert (x[0, 3:7] == 0).all()
        assert (x[1, 4] == 0).all()
    for x in (0, 1, 6):
        inputs[x].nan_to_num_(0)
    check_scan(inputs, segments, reverse)
    check_scan([*inputs[:9], None], segments, reverse)


def test_scan_bare_and_strided():
    check_scan(scan_inputs(extras=False))
    inputs = scan_inputs(t=9, d=10, n=4, g=2)
    plain = scan.forward(*inputs, None, False)
    for i in (0, 1, 3, 4, 6):
        x = inputs[i]
        inputs[i] = torch.cat([x, x], -1)[..., : x.shape[-1]].transpose(0, 1).contiguous().transpose(0, 1)
    assert not inputs[0].is_contiguous()
    for a, b in zip(plain, scan.forward(*inputs, None, False), strict=True):
        assert torch.equal(a, b)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(plain[0], scan.forward(*inputs, None, False)[0])


def test_scan_growth_and_large_steps():
    """Positive A, steps so large that decays vanish, and raw dt far from zero."""
    inputs = scan_inputs(t=6, d=8, n=4)
    inputs[2] = torch.cat([torch.full((4, 4), 0.7), torch.full((4, 4), -300.0)])
    inputs[1] = torch.linspace(-40, 12, inputs[1].numel()).reshape(inputs[1].shape)
    inputs[1][..., :4].clamp_(max=2)
    check_scan(inputs)


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("cx", [False, True])
def test_scan_passes_nan_on(which, cx):
    inputs = scan_inputs(b=1, t=3, d=9, n=2, cx=cx)
    inputs[which].view(-1)[0] = float("nan")
    y, _ = scan.forward(*inputs, None, False)
    assert y[0, 0, 0].isnan()
    assert not y[0, :, 8].isnan().any() or which in (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cx", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_split_has_the_same_bits(dtype, cx, reverse):
    inputs = scan_inputs(b=2, t=70, d=19, n=7, dtype=dtype, cx=cx)
    y, state = scan.forward(*inputs, None, reverse)
    for cut in (1, 29, 32, 69):
        parts = [[x[:, :cut] if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]]
        parts.append([x[:, cut:] if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)])
        first, second = parts[::-1] if reverse else parts
        ya, middle = scan.forward(*first, None, reverse)
        second[9] = middle
        yb, end = scan.forward(*second, None, reverse)
        assert torch.equal(torch.cat([yb, ya] if reverse else [ya, yb], 1), y)
        assert torch.equal(end, state)


@pytest.mark.parametrize("cx", [False, True])
@pytest.mark.parametrize("const", [False, True])
def test_scan_step(cx, const):
    inputs = scan_inputs(b=3, t=1, d=21, n=6, g=3, cx=cx, const=(const, const))
    y, state = scan.forward(*inputs, None, False)
    token = [x[:, 0] if i in (0, 1, 3, 4, 6) and x.dim() > 2 else x for i, x in enumerate(inputs[:9])]
    slots = torch.randn(5, 21, 6, dtype=state.dtype)
    slots[[4, 0, 2]] = inputs[9]
    kept = slots.clone()
    out = scan.step(slots, *token, torch.tensor([4, 0, 2], dtype=torch.int32))
    assert torch.equal(out, y[:, 0])
    assert torch.equal(slots[[4, 0, 2]], state)
    assert torch.equal(slots[[1, 3]], kept[[1, 3]])
    view = kept.transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    assert torch.equal(scan.step(view, *token, torch.tensor([4, -1, 2]))[[0, 2]], y[[0, 2], 0])
    assert torch.equal(view[[4, 2]], state[[0, 2]])
    assert torch.equal(view[0], kept[0])
    assert (scan.step(view, *token, torch.tensor([-1, -1, -1])) == 0).all()
    with pytest.raises(ValueError, match="index"):
        scan.step(view, *token, torch.tensor([5, 0, 1]))


# ---- causal_conv1d -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_conv_taps(dtype, k, reverse):
    check_conv(conv_inputs(k=k, dtype=dtype, silu=k != 3), reverse=reverse)


@pytest.mark.parametrize("t", [0, 1, 2, 3, 31, 33, 65, 260])
@pytest.mark.parametrize("k", [2, 4, 40])
def test_conv_lengths(t, k):
    check_conv(conv_inputs(b=1, t=t, d=5, k=k))


@pytest.mark.parametrize("d", [1, 3, 8, 64, 100])
def test_conv_widths(d):
    check_conv(conv_inputs(t=6, d=d, extras=d != 8))


@pytest.mark.parametrize("reverse", [False, True])
def test_conv_segments(reverse):
    segments = [(0, 0, 2), (1, 4, 4), (1, 5, 40), (0, 7, 40)]
    inputs = conv_inputs(t=40, sequences=4)
    inputs[0][0, 2:7], inputs[0][1, :5] = float("nan"), float("nan")
    y, state = conv.forward(*inputs, torch.tensor(segments), reverse)
    dx = conv.backward(torch.ones_like(y), state, *inputs, torch.tensor(segments), reverse)[0]
    for x in (y, dx):
        assert torch.isfinite(x).all()
        assert (x[0, 2:7] == 0).all()
        assert (x[1, :5] == 0).all()
    inputs[0].nan_to_num_(0)
    check_conv(inputs, segments, reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_split_and_step_have_the_same_bits(dtype):
    inputs = conv_inputs(t=70, d=70, dtype=dtype)
    y, state = conv.forward(*inputs, None, False)
    for cut in (1, 2, 32, 69):
        ya, middle = conv.forward(inputs[0][:, :cut], *inputs[1:], None, False)
        yb, end = conv.forward(inputs[0][:, cut:], *inputs[1:4], middle, None, False)
        assert torch.equal(torch.cat([ya, yb], 1), y)
        assert torch.equal(end, state)
    slots = torch.zeros(3, 3, 70)
    slots[[2, 0]] = inputs[4]
    for s in range(6):
        assert torch.equal(conv.step(slots, inputs[0][:, s], *inputs[1:4], torch.tensor([2, 0])), y[:, s])
    assert (slots[1] == 0).all()
    assert (conv.step(slots, inputs[0][:, 0], *inputs[1:4], torch.tensor([-1, -1])) == 0).all()


# ---- rms_norm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 7), (40, 33), (0, 8), (5, 1, 300)])
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_rms_norm(dtype, shape, residual):
    torch.manual_seed(1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1], dtype=real)
    r = None if residual is None else torch.randn(shape).to(residual)
    y, h = norm.forward(x, weight, r, 1e-3, real)
    leaves = [wide(v).requires_grad_() for v in (x, weight) + (() if r is None else (r,))]
    sums = leaves[0] + (leaves[2] if r is not None else 0)
    want = sums / torch.sqrt((sums**2).mean(-1, keepdim=True) + 1e-3) * leaves[1]
    assert_near(y, want.detach(), BOUND[dtype], "y")
    assert_near(h, sums.detach(), BOUND[real], "residual")
    dy, dh = torch.randn(shape).to(dtype), torch.randn(shape, dtype=real)
    grads = torch.autograd.grad((want * dy.double()).sum() + (sums * dh.double()).sum(), leaves)
    got = norm.backward(dy, dh, h, weight, 1e-3, dtype, residual)
    for name, mine, true in zip(("x", "weight", "residual"), got, (*grads, None)[:3], strict=True):
        assert_near(
            mine, true, (BOUND[torch.float32] if name == "residual" else BOUND[dtype]) * 3, f"gradient of {name}"
        )


def test_rms_norm_rows_do_not_depend_on_each_other():
    x, w = torch.randn(37, 100), torch.randn(100)
    whole = norm.forward(x, w, None, 1e-5, torch.float32)[0]
    for i in (0, 16, 36):
        assert torch.equal(norm.forward(x[i : i + 1], w, None, 1e-5, torch.float32)[0][0], whole[i])


# ---- what the library promises -------------------------------------------------------------------------------------------


def big_results(b: int = 2) -> list[Tensor]:
    """Enough work that threads really run."""
    torch.manual_seed(7)
    inputs = scan_inputs(b=3, t=200, d=300, n=16)
    for i in (0, 1, 3, 4, 6, 9):
        inputs[i] = inputs[i][:b].contiguous()
    y, state = scan.forward(*inputs, None, False)
    out = [y, state, *scan.backward(y, state, *inputs, None, False)]
    c = conv_inputs(b=3, t=900, d=300)
    c[0], c[4] = c[0][:b].contiguous(), c[4][:b].contiguous()
    cy, cs = conv.forward(*c, None, False)
    out += [cy, *conv.backward(cy, cs, *c, None, False)]
    x = cy.reshape(-1, 300)
    ny, nh = norm.forward(x, c[2], x, 1e-5, torch.float32)
    return [*out, ny, *norm.backward(ny, nh, nh, c[2], 1e-5, torch.float32, torch.float32)]


def test_threads_do_not_change_bits():
    library, before = load_native(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = big_results()
        for own in (0, 1):
            library.sl_use_own_threads(own)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for a, b in zip(want, big_results(), strict=True):
                    assert torch.equal(a, b)
    finally:
        library.sl_use_own_threads(0)
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_the_batch():
    alone, together = big_results(1), big_results(3)
    per_row = (0, 1, 2, 3, 5, 6, 8, 10, 11, 12)  # y, state, du, ddt, dB, dC, dz, dinitial; conv y, dx
    for i in per_row:
        assert torch.equal(alone[i][0], together[i][0]), i


def test_guards_stay_untouched():
    """Inputs and outputs inside larger buffers: what lies around them is neither read into results nor written."""
    empty, guards = torch.empty, []

    def fenced(*shape, dtype=torch.float32, **rest):
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 128, dtype=dtype, **rest).fill_(float("nan"))
        buffer[:64], buffer[64 + count :] = -77.0, -77.0
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(shape)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "empty", fenced)
    try:
        for d, n in ((3, 5), (17, 16), (70, 4)):
            inputs = scan_inputs(t=35, d=d, n=n)
            inputs = [fenced(x.shape, dtype=x.dtype).copy_(x) if isinstance(x, Tensor) else x for x in inputs]
            y, state = scan.forward(*inputs, None, False)
            outs = [y, state, *scan.backward(y, state, *inputs, None, False)]
            c = [fenced(x.shape, dtype=x.dtype).copy_(x) if isinstance(x, Tensor) else x for x in conv_inputs(d=d)]
            y, state = conv.forward(*c, None, False)
            outs += [y, state, *conv.backward(y, state, *c, None, False)]
            y, h = norm.forward(c[0], c[2], c[0], 1e-5, torch.bfloat16)
            outs += [y, h, *norm.backward(y, h, h, c[2], 1e-5, torch.float32, torch.bfloat16)]
            assert all(torch.isfinite(x).all() for x in outs)
    finally:
        patch.undo()
    assert len(guards) > 60
    assert all((side == -77.0).all() for pair in guards for side in pair)


def test_wrong_segments_are_refused():
    inputs = scan_inputs(t=4, d=3, n=2, sequences=1)
    for bad in ([0, 0, 5], [2, 0, 1], [0, -1, 2], [0, 3, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="segment"):
            scan.forward(*inputs, torch.tensor([bad]), False)
        with pytest.raises(ValueError, match="segment"):
            conv.forward(*conv_inputs(t=4, sequences=1), torch.tensor([bad]), False)


def test_half_precision_data_is_computed_in_float32():
    inputs = scan_inputs()
    half = [x.half() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]
    y, _ = scan.forward(*half, None, False)
    assert y.dtype == torch.float16
    want, _ = scan.forward(*[x.float() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(half)], None, False)
    assert torch.equal(y, want.half())
    assert scan.backward(y, inputs[9], *half, None, False)[0].dtype == torch.float16


# ---- vector functions ----------------------------------------------------------------------------------------------------

FUNCTIONS = [
    "exp2",
    "exp",
    "softplus",
    "sigmoid_of_softplus",
    "sigmoid",
    "silu",
    "silu_slope",
    "cos",
    "sin",
    "log1p",
    "bfloat16",
]


def probe(function: str, x: Tensor) -> Tensor:
    out = torch.full_like(x, float("nan"))
    record = (ctypes.c_int64 * 5)(
        FUNCTIONS.index(function), x.dtype == torch.float64, x.numel(), x.data_ptr(), out.data_ptr()
    )
    assert load_native().sl_probe(record) == 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vector_functions(dtype):
    # Without fused multiply-add a few roundings more; in units of the result's last place, relative error.
    fused = ctypes.CDLL(load_native()._name).sl_isa
    fused.restype = ctypes.c_char_p
    slack = 3 if fused() == b"base" else 1
    unit = (2.0**-23 if dtype == torch.float32 else 2.0**-52) * slack

    def check(function, x, want, units, floor=0.0):
        x = x.to(dtype)
        exact = want(x.double())
        got = probe(function, x).double()
        error = ((got - exact).abs() / (exact.abs() + floor)).max() / unit
        assert error < units, f"{function}: {error:.1f} units, bound {units}"

    line = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    small = torch.linspace(-1, 1, 50_001, dtype=torch.float64)
    check("exp2", line, torch.exp2, 4)
    check("exp", line, torch.exp, 4)
    check("exp", -torch.linspace(0, 80, 50_001, dtype=torch.float64), torch.exp, 4)
    softplus = lambda v: torch.log1p(torch.exp(-v.abs())) + v.clamp_min(0)  # noqa: E731
    check("softplus", line, softplus, 5)
    check("softplus", line * 4, softplus, 5)
    check("softplus", torch.tensor([1e4, 1e30, 300.0]), softplus, 2)
    check("softplus", torch.tensor([-1e4, -1e30]), softplus, 2, floor=1e-30)
    check("sigmoid_of_softplus", line, torch.sigmoid, 6)
    check("sigmoid", line * 4, torch.sigmoid, 6)
    check("silu", line, lambda v: v * torch.sigmoid(v), 6)
    check("silu_slope", line, lambda v: torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v))), 8, floor=1e-1)
    check("cos", small, lambda v: torch.cos(2 * torch.pi * v), 4, floor=1.0)
    check("sin", small, lambda v: torch.sin(2 * torch.pi * v), 4, floor=1.0)
    check("log1p", torch.logspace(-30, 0, 10_001, dtype=torch.float64), torch.log1p, 4)


def test_exponential_at_the_edges():
    for dtype in (torch.float32, torch.float64):
        inf, nan = float("inf"), float("nan")
        got = probe("exp2", torch.tensor([0.0, -0.0, 1.0, -1.0, inf, 1e30, 1e5, -inf, -1e30, 3.0], dtype=dtype))
        assert got[[0, 1, 2, 3, 9]].tolist() == [1, 1, 2, 0.5, 8]
        assert got[4:7].tolist() == [inf, inf, inf]
        assert (got[7:9] < 1e-37).all()
        assert (got[7:9] >= 0).all()
        for function in ("exp", "softplus", "sigmoid_of_softplus", "sigmoid", "silu", "silu_slope", "bfloat16"):
            assert probe(function, torch.tensor([nan, -nan], dtype=dtype)).isnan().all(), function
        assert probe("sigmoid", torch.tensor([inf, 1e30, 0.0], dtype=dtype)).tolist() == [1, 1, 0.5]
        assert probe("softplus", torch.tensor([inf, 1e30], dtype=dtype)).tolist() == [
            inf,
            float(torch.tensor(1e30, dtype=dtype)),
        ]


def test_bfloat16_rounds_to_nearest_even():
    x = torch.cat(
        [torch.randn(1000) * 10.0**e for e in (-30, -3, 0, 30)] + [torch.tensor([float("inf"), -float("inf")])]
    )
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -0.0])
    x = torch.cat([x, ties])
    assert torch.equal(probe("bfloat16", x), x.bfloat16().float())
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert probe("bfloat16", nans).isnan().all()


# ---- other processes -----------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(scan.__file__).resolve().parents[3])
    env = {**os.environ, "PYTHONPATH": source + os.pathsep + os.environ.get("PYTHONPATH", ""), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=60
    )


def other_instruction_sets() -> list[str]:
    if native_problem() is not None:
        return []
    library = load_native()
    library.sl_isas.restype = library.sl_isa.restype = ctypes.c_char_p
    return [name for name in library.sl_isas().decode().split() if name != library.sl_isa().decode()]


@pytest.mark.parametrize("isa", other_instruction_sets())
def test_other_instruction_sets(isa):
    """The same tests under every other instruction set that this machine runs."""
    if "STATELINE_ISA" in os.environ:
        pytest.skip("already inside such a run")
    chosen = "widths or kinds or groups or taps or rms or edges or functions or nearest or scan_step"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    result = subprocess.run(
        command, env={**os.environ, "STATELINE_ISA": isa}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "[100%]" in result.stdout


@pytest.mark.parametrize(
    ("name", "why"), [("avx1024", "unknown"), ("neon" if os.uname().machine == "x86_64" else "avx2", "unknown")]
)
def test_unusable_instruction_sets_are_refused(name, why):
    result = run_python("from stateline.backends import load_native; load_native()", STATELINE_ISA=name)
    assert result.returncode != 0
    assert f"STATELINE_ISA is '{name}'" in result.stderr
    assert why in result.stderr


def test_forks_and_clean_exit():
    """Threads of the parent are gone in a child: it must neither hang nor compute something else; then both must exit."""
    code = """
        import os, threading, torch
        from stateline.backends import load_native
        from stateline.ops.selective_scan import cpu
        torch.set_num_threads(3)
        torch.manual_seed(0)
        u, A, B = torch.rand(1, 300, 256), -torch.rand(256, 16), torch.rand(1, 300, 1, 16)
        def work():  # bytes: torch's own parallel loops do hang after a fork
            return cpu.forward(u, u, A, B, B, None, None, None, False, None, None, False)[0].numpy().tobytes()
        for own in (0, 1):
            load_native().sl_use_own_threads(own)
            want = work()
            child = os.fork()
            if child == 0:
                same = work() == want and work() == want
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0 if work() == want else 1)
                os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert work() == want
            wrong = []
            def many():
                wrong.extend(1 for _ in range(10) if work() != want)
            callers = [threading.Thread(target=many) for _ in range(4)]
            [caller.start() for caller in callers]
            [caller.join() for caller in callers]
            assert not wrong
        print("done")
    """
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_library_links_nothing_of_torch_and_exports_only_its_interface():
    """One binary for every torch and Python; nothing compiled for a wide instruction set can leak out of it."""
    try:
        path = load_native()._name
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as missing:
        pytest.skip(f"needs binutils: {missing}")
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert names
    assert all(name.startswith("sl_") for name in names), names
    for foreign in ("torch", "omp", "python", "c10"):
        assert foreign not in needed
