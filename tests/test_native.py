"""The C++ kernels against float64 oracles: values and gradients, awkward sizes, splits, steps.

Runs alone too, after `cmake -S . -B build && cmake --build build`.
"""

from __future__ import annotations

import pytest
import torch
from native_cases import BOUND, assert_near, check_conv, check_scan, conv, conv_inputs, scan, scan_inputs, wide

from stateline.backends import native_problem
from stateline.ops.rms_norm import cpu as norm

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no C++ library: {native_problem()}")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh tensors hold NaN, so that a kernel that forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- selective_scan -------------------------------------------------------------------------------


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


def test_scan_mixed_dtypes():
    """As autocast hands them over: every tensor may have a dtype of its own; y has u's."""
    for dtypes in ((torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16)):
        inputs = scan_inputs(t=35, d=21)
        for i, dtype in zip((0, 1, 6), dtypes, strict=True):
            inputs[i] = inputs[i].to(dtype)
        same = [x.float() if i in (0, 1, 6) else x for i, x in enumerate(inputs)]
        y, state = scan.forward(*inputs, None, False)
        want_y, want_state = scan.forward(*same, None, False)
        assert torch.equal(y, want_y.to(dtypes[0]))
        assert torch.equal(state, want_state)
        got = scan.backward(want_y, state, *inputs, None, False)
        for mine, want in zip(got, scan.backward(want_y, state, *same, None, False), strict=True):
            assert torch.equal(mine, want.to(mine.dtype))


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


# ---- causal_conv1d --------------------------------------------------------------------------------


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


# ---- rms_norm -------------------------------------------------------------------------------------


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
