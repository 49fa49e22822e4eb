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


@triton.jit
def gated_forward(
    y, z, weight, out, d, eps, y_row, z_row, width: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """A group of `width` channels of a row, times silu(z). FIRST: the norm comes before the gate."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    live = c < width
    c += tl.program_id(1) * width
    value = tl.load(y + row * y_row + c, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + c, mask=live, other=0.0).to(tl.float32)
    scale = tl.load(weight + c, mask=live, other=0.0).to(tl.float32)
    gate *= tl.sigmoid(gate)
    if not FIRST:
        value *= gate
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps) * scale
    if FIRST:
        value *= gate
    tl.store(out + row * d + c, value.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("rows",))
def gated_backward(
    dout, y, z, weight, dy, dz, partial, rows, d, eps, dout_row, y_row, z_row, width: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dy and dz of ROWS rows, and the program's sum for the weight."""
    c = tl.arange(0, C)
    own = c < width
    c += tl.program_id(1) * width
    scale = tl.load(weight + c, mask=own, other=0.0).to(tl.float32)
    total = tl.zeros((C,), tl.float32)
    for i in range(0, ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        live = own & (row < rows)
        value = tl.load(y + row * y_row + c, mask=live, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_row + c, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(dout + row * dout_row + c, mask=live, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        gate *= sigmoid
        inner = value if FIRST else value * gate
        inverse = tl.rsqrt(tl.sum(inner * inner, 0) / width + eps)
        normed = inner * inverse
        scaled = grad * scale
        passed = scaled * gate if FIRST else scaled
        total += grad * normed * gate if FIRST else grad * normed
        dinner = inverse * (passed - normed * (tl.sum(passed * normed, 0) / width))
        dgate = scaled * normed if FIRST else dinner * value
        dvalue = dinner if FIRST else dinner * gate
        tl.store(dy + row * d + c, dvalue.to(dy.dtype.element_ty), mask=live)
        tl.store(dz + row * d + c, (dgate * slope).to(dz.dtype.element_ty), mask=live)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + c, total, mask=own)
