"""gated_rms_norm in Triton: a program takes a group of channels of a row, for the gradient of several rows."""

import triton
import triton.language as tl


@triton.jit
def forward(
    y, z, weight, out, d, eps, y_row, z_row, width: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """FIRST: the norm comes before the gate. width: channels of a group."""
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
def backward(
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
