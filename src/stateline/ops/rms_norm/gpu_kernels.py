"""rms_norm in Triton: a program takes a row, for the gradient several, whose weight's sum is partial."""

import triton
import triton.language as tl


@triton.jit
def forward(x, residual, weight, y, h, d, eps, x_row, r_row, C: tl.constexpr):
    """y and h = x + residual of a row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    live = c < d
    value = tl.load(x + row * x_row + c, mask=live, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * r_row + c, mask=live, other=0.0).to(tl.float32)
    scale = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / d + eps)
    tl.store(h + row * d + c, value.to(h.dtype.element_ty), mask=live)
    tl.store(y + row * d + c, (value * inverse * scale).to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("rows",))
def backward(
    h, dy, dh, weight, dx, dresidual, partial, rows, d, eps, h_row, dy_row, dh_row, ROWS: tl.constexpr, C: tl.constexpr
):
    """dx (and the residual's gradient, the same) of ROWS rows, and the program's sum for the weight."""
    c = tl.arange(0, C)
    scale = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    total = tl.zeros((C,), tl.float32)
    for i in range(0, ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        live = (c < d) & (row < rows)
        value = tl.load(h + row * h_row + c, mask=live, other=0.0).to(tl.float32)
        given = tl.load(dy + row * dy_row + c, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(dh + row * dh_row + c, mask=live, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / d + eps)
        normed = value * inverse
        scaled = given * scale
        grad += inverse * (scaled - normed * (tl.sum(scaled * normed, 0) / d))
        total += given * normed
        tl.store(dx + row * d + c, grad.to(dx.dtype.element_ty), mask=live)
        if dresidual is not None:
            tl.store(dresidual + row * d + c, grad.to(dresidual.dtype.element_ty), mask=live)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + c, total, mask=c < d)
