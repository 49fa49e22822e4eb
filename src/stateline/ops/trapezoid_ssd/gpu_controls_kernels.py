"""`controls` in Triton: a program takes ROWS tokens of all heads.

Names as in controls.py; r token, c column; H heads, S angles, CB columns at least.
"""

import triton
import triton.language as tl

from stateline.ops.selective_scan.gpu_kernels import softplus


@triton.jit
def half_tanh(x):
    """tanh(x) / 2, by its series where a difference of exponentials would lose digits."""
    y = x * x
    near = x * (0.5 + y * (-1.0 / 6 + y * (1.0 / 15 + y * (-17.0 / 630 + y * (31.0 / 2835)))))
    return tl.where(y < 0.09, near, tl.sigmoid(2.0 * x) - 0.5)


@triton.jit(do_not_specialize=("rows",))
def forward(
    raw, bias, dt, A, blend, rates, rows, floor, raw_r,
    H: tl.constexpr, S: tl.constexpr, HEAVY: tl.constexpr, ROWS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """dt, A, blend (rows, H) and rates (rows, S)."""
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CB)
    r = r[:, None].to(tl.int64)
    live, turns = (r < rows) & (c < H)[None, :], (r < rows) & (c < S)[None, :]
    raw += r * raw_r + c[None, :]
    step = tl.load(raw, mask=live, other=0.0).to(tl.float32) + tl.load(bias + c, mask=c < H, other=0.0)[None, :]
    decay = tl.load(raw + H, mask=live, other=0.0).to(tl.float32)
    trap = tl.load(raw + 2 * H, mask=live, other=0.0).to(tl.float32)
    decay = tl.maximum(decay, 0.0) + 1.0 / (1.0 - tl.minimum(decay, 0.0)) if HEAVY else softplus(decay)
    out = r * H + c[None, :]
    tl.store(dt + out, softplus(step), mask=live)
    tl.store(A + out, -tl.maximum(decay, floor), mask=live)
    tl.store(blend + out, tl.sigmoid(trap), mask=live)
    if S > 0:
        angle = tl.load(raw + 3 * H, mask=turns, other=0.0).to(tl.float32)
        tl.store(rates + r * S + c[None, :], half_tanh(angle), mask=turns)


@triton.jit(do_not_specialize=("rows",))
def backward(
    ddt, dA, dblend, drates, raw, bias, draw, partial, rows, floor, raw_r,
    H: tl.constexpr, S: tl.constexpr, HEAVY: tl.constexpr, ROWS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """draw (rows, 3 H + S); partial (programs, H), sums for the bias."""
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CB)
    r = r[:, None].to(tl.int64)
    live, turns = (r < rows) & (c < H)[None, :], (r < rows) & (c < S)[None, :]
    raw += r * raw_r + c[None, :]
    draw += r * (3 * H + S) + c[None, :]
    kind = draw.dtype.element_ty
    out = r * H + c[None, :]
    step = tl.load(raw, mask=live, other=0.0).to(tl.float32) + tl.load(bias + c, mask=c < H, other=0.0)[None, :]
    decay = tl.load(raw + H, mask=live, other=0.0).to(tl.float32)
    blend = tl.sigmoid(tl.load(raw + 2 * H, mask=live, other=0.0).to(tl.float32))
    grad = tl.load(ddt + out, mask=live, other=0.0) * tl.sigmoid(step)
    tl.store(draw, grad.to(kind), mask=live)
    tl.store(partial + tl.program_id(0) * H + c, tl.sum(grad, 0), mask=c < H)
    if HEAVY:
        below = 1.0 / (1.0 - tl.minimum(decay, 0.0))
        value, slope = tl.maximum(decay, 0.0) + below, tl.where(decay > 0.0, 1.0, below * below)
    else:
        value, slope = softplus(decay), tl.sigmoid(decay)
    grad = tl.where(value < floor, 0.0, -slope * tl.load(dA + out, mask=live, other=0.0))
    tl.store(draw + H, grad.to(kind), mask=live)
    grad = tl.load(dblend + out, mask=live, other=0.0) * blend * (1.0 - blend)
    tl.store(draw + 2 * H, grad.to(kind), mask=live)
    if S > 0:
        angle = half_tanh(tl.load(raw + 3 * H, mask=turns, other=0.0).to(tl.float32))
        grad = tl.load(drates + r * S + c[None, :], mask=turns, other=0.0) * (0.5 - 2.0 * angle * angle)
        tl.store(draw + 3 * H, grad.to(kind), mask=turns)
