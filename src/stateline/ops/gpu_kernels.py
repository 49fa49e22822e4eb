"""What GPU kernels of several operations share, in Triton."""

import triton
import triton.language as tl


@triton.jit
def place(table, tiles, index, t, runs, RUN: tl.constexpr, REVERSE: tl.constexpr):
    """Of program `index`: sequence, batch row, its first step, number of steps, place of step 0, whether it is one."""
    if table is None:
        sequence = index // runs
        first = (index % runs) * RUN
        row, start, stop = sequence.to(tl.int64), 0, t
        exists = True
    else:
        sequence = tl.load(tiles + 2 * index)
        first = tl.load(tiles + 2 * index + 1).to(tl.int32) * RUN
        exists = sequence >= 0
        row = tl.load(table + 3 * sequence, mask=exists, other=0)
        start = tl.load(table + 3 * sequence + 1, mask=exists, other=0).to(tl.int32)
        stop = tl.load(table + 3 * sequence + 2, mask=exists, other=0).to(tl.int32)
    origin = stop - 1 if REVERSE else start
    return sequence.to(tl.int64), row, first, stop - start, origin, exists


@triton.jit(do_not_specialize=("count",))
def reduce(partial, out, last, count, d, K: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    """Sums over `count` of (count, J, d), in an order that depends on `count` alone: out (d, K), last (d) or None."""
    j = tl.program_id(1)
    c = tl.program_id(0) * C + tl.arange(0, C)
    live = c < d
    total = tl.zeros((ROWS, C), tl.float32)
    first = 0
    while first < count:  # not a range: the interpreter's numbers are no indices
        rows = first + tl.arange(0, ROWS)
        where = partial + (rows[:, None].to(tl.int64) * J + j) * d + c[None, :]
        total += tl.load(where, mask=(rows[:, None] < count) & live[None, :], other=0.0)
        first += ROWS
    result = tl.sum(total, 0)
    if j < K:
        tl.store(out + c * K + j, result.to(out.dtype.element_ty), mask=live)
    elif last is not None:
        tl.store(last + c, result.to(last.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("rows", "columns", "width", "lead"))
def turn(
    x, y, rows, columns, width, lead, x_b, x_r, y_b, y_c, ADD: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """x (b, r, c) into y (b, c, width) from place `lead` on, zeros elsewhere, or added; both adjacent at the end."""
    tiles = (width + R - 1) // R
    r, c = tl.program_id(0) % tiles * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = r - lead
    live = ((row >= 0) & (row < rows))[:, None] & (c < columns)[None, :]
    value = tl.load(x + b * x_b + row[:, None].to(tl.int64) * x_r + c[None, :], mask=live, other=0.0)
    at = y + b * y_b + c[None, :].to(tl.int64) * y_c + r[:, None]
    value = value.to(y.dtype.element_ty)
    inside = (r < width)[:, None] & (c < columns)[None, :]
    if ADD:
        value += tl.load(at, mask=inside, other=0.0)
    tl.store(at, value, mask=inside)
