"""ssd's gradients in Triton. A program takes a tile and some parts of one group, whose dB and dC it sums.

`inputs` reads the gradient that reaches the state after the tile, `projections` that and the state before it. What a
step's decay gets back is the sum over all pairs of an earlier input and an output at or after it. HALF takes it from
what all outputs from the step on read, less what all inputs from it on give, which `finish` sums over time: that costs
nothing, but in float32 the difference would lose what its bound asks for, so that otherwise the pairs themselves are
summed. Nothing here is added by atomics.

Names as in gpu_kernels.py.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.ssd.gpu_kernels import at, clock_of, decays, operand, put, rows, sheet, sized, skip


@triton.jit
def parts_of(group, share, heads: tl.constexpr, groups: tl.constexpr, PARTS: tl.constexpr, TAKEN: tl.constexpr):
    """The first of a program's parts, and the one after the last."""
    begin = (group * heads + groups - 1) // groups * PARTS + share * TAKEN
    return begin, tl.minimum(begin + TAKEN, ((group + 1) * heads + groups - 1) // groups * PARTS)


@triton.jit
def between(pairs, s, PRECISION: tl.constexpr):
    """What the decay of each step gets from pairs (later, earlier) that it lies between; it may be the later one."""
    reach = tl.where(s[:, None] == s[None, :], 0.0, pairs)
    reach = tl.dot(reach, tl.where(s[:, None] < s[None, :], 1.0, 0.0), input_precision=PRECISION)
    return tl.sum(tl.where(s[:, None] >= s[None, :], reach, 0.0), 0)


@triton.jit(do_not_specialize=("t", "each"))
def inputs(
    dy, x, B, Cs, D, clock, table, tiles, after, dx, pairs, pieces, crossing, dD, t, each, dx_t,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, w_b, w_t, w_g,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_WIDE: tl.constexpr,
    REVERSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, SHARES: tl.constexpr, TAKEN: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and what inputs give to the sums for dt, dB, dC and dD. SHARES programs share a group.

    pairs: (tile, group, SHARES, 2, Q, Q) the gradient of C·B of two steps, and what HALF leaves out.
    dD: (tile, part) or, D_WIDE, (tile, part, PB).
    pieces: (tile, 3, part, Q) what goes to the decays of a step and all before it, twice, and to its size; unless HALF
        the first is what goes to a step's decay alone, from the pairs that it lies between.
    crossing: (tile, 2, part) what all decays of a tile get; the first if HALF.
    """
    PARTS: tl.constexpr = (P + PB - 1) // PB
    number, rest = tl.program_id(0) // (SHARES * groups), tl.program_id(0) % (SHARES * groups)
    group = rest // SHARES
    _sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        tile, n, s = number.to(tl.int64), tl.arange(0, NB), tl.arange(0, Q)
        b_at = at(B + group.to(tl.int64) * w_g, row, w_b, w_t, origin, first, Q, REVERSE)
        c_at = at(Cs + group.to(tl.int64) * w_g, row, w_b, w_t, origin, first, Q, REVERSE)
        b = operand(rows(b_at, n, N, first, length, Q, NB), HALF)
        c = operand(rows(c_at, n, N, first, length, Q, NB), HALF)
        product = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        dproduct = tl.zeros((Q, Q), tl.float32)
        diagonal = s[:, None] == s[None, :]
        begin, end = parts_of(group, rest % SHARES, heads, groups, PARTS, TAKEN)
        for part in tl.range(begin, end, num_stages=STAGES):
            head, p0 = part // PARTS + 0 * tile, part % PARTS * PB  # 64 bits, like the tile
            p = p0 + tl.arange(0, PB)
            own, exist = sheet(p0, P, N, PB, NB)
            x_at = at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE)
            dy_at = at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE)
            value = rows(x_at, p, P, first, length, Q, PB)
            slope = rows(dy_at, p, P, first, length, Q, PB)
            G = tl.load(after + (tile * heads + head) * (P * N) + own, mask=exist, other=0.0)
            size, _, leave, exponent, left_out, _ = clock_of(clock, tile, head, heads, Q, HALF)
            grad = operand(slope, HALF)
            both = tl.dot(grad, tl.trans(operand(value, HALF)), input_precision=PRECISION)
            if HALF and dy.dtype.element_ty == tl.float32:  # through a gate: what bfloat16 leaves out of it
                left_over = operand(slope - grad.to(tl.float32), HALF)
                both = tl.dot(left_over, tl.trans(operand(value, HALF)), both, input_precision=PRECISION)
            if D is not None:
                if not D_WIDE:  # one for all channels of a head: what both hold lies on the diagonal
                    tl.store(dD + tile * (heads * PARTS) + part, tl.sum(tl.where(diagonal, both, 0.0)))
            within = decays(exponent, left_out, Q, HALF)
            matrix = operand(product * within, HALF)
            both *= within
            dproduct += both * size[None, :]
            both *= product
            direct = tl.sum(both, 0)
            weighed = both * size[None, :]
            across = tl.sum(weighed, 1) if HALF else between(weighed, s, PRECISION)
            du = tl.dot(b, G, input_precision=PRECISION) * leave[:, None]
            into = tl.sum(value.to(tl.float32) * du, 1)
            du = tl.dot(tl.trans(matrix), grad, du, input_precision=PRECISION)
            out = pieces + (tile * 3 * (heads * PARTS) + part) * Q + s
            direct += into
            if HALF:
                across -= direct * size
                tl.store(crossing + tile * 2 * (heads * PARTS) + part, tl.sum(into * size))
            else:
                across += tl.sum(tl.where(s[:, None] < s[None, :], (into * size)[:, None], 0.0), 0)
            tl.store(out, across)
            tl.store(out + 2 * heads * PARTS * Q, direct)
            du *= size[:, None]
            if D is not None:
                wide = slope.to(tl.float32)
                du += skip(D, head, p, P, D_WIDE)[None, :] * wide
                if D_WIDE:
                    tl.store(dD + (tile * (heads * PARTS) + part) * PB + p - p0, tl.sum(wide * value.to(tl.float32), 0))
            dx_at = at(dx + head * P, row * t, dx_t, dx_t, origin, first, Q, REVERSE)
            put(dx_at, p, P, first, length, du, Q, PB)
        where = pairs + (tile * (groups * SHARES) + rest) * (2 * Q * Q) + s[:, None] * Q + s[None, :]
        most = operand(dproduct, HALF)
        tl.store(where, most)
        if HALF:
            tl.store(where + Q * Q, operand(dproduct - most.to(tl.float32), HALF))


@triton.jit(do_not_specialize=("t", "each"))
def projections(
    dy, x, B, Cs, clock, table, tiles, before, after, pairs, dB, dC, pieces, crossing, t, each, size_of_share,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, w_b, w_t, w_g,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, SHARES: tl.constexpr, TAKEN: tl.constexpr, Q: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dB and dC of a tile, a share of their sums over heads each, (SHARES, b, t, g, n); the rest of what dt gets."""
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    number, rest = program // (SHARES * groups), program % (SHARES * groups)
    group = rest // SHARES
    _sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        tile = number.to(tl.int64)
        n, s = tl.arange(0, NB), tl.arange(0, Q)
        c_at = at(Cs + group.to(tl.int64) * w_g, row, w_b, w_t, origin, first, Q, REVERSE)
        c = operand(rows(c_at, n, N, first, length, Q, NB), HALF)
        db, dc = tl.zeros((Q, NB), tl.float32), tl.zeros((Q, NB), tl.float32)
        diagonal = tl.arange(0, PB)[:, None] == tl.arange(0, PB)[None, :]
        begin, end = parts_of(group, rest % SHARES, heads, groups, PARTS, TAKEN)
        for part in tl.range(begin, end, num_stages=STAGES):
            head, p0 = part // PARTS + 0 * tile, part % PARTS * PB  # 64 bits, like the tile
            p = p0 + tl.arange(0, PB)
            own, exist = sheet(p0, P, N, PB, NB)
            own += (tile * heads + head) * (P * N)
            x_at = at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE)
            dy_at = at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE)
            value = rows(x_at, p, P, first, length, Q, PB).to(tl.float32)
            slope = rows(dy_at, p, P, first, length, Q, PB).to(tl.float32)
            S = tl.load(before + own, mask=exist, other=0.0)
            G = tl.load(after + own, mask=exist, other=0.0)
            size, enter, leave, _, _, whole = clock_of(clock, tile, head, heads, Q, HALF)
            slope *= enter[:, None]
            dc = tl.dot(operand(slope, HALF), tl.trans(S), dc, input_precision=PRECISION)
            db = tl.dot(operand(value * (leave * size)[:, None], HALF), tl.trans(G), db, input_precision=PRECISION)
            read = tl.dot(c, S, input_precision=PRECISION)
            tl.store(pieces + (tile * 3 * (heads * PARTS) + heads * PARTS + part) * Q + s, tl.sum(slope * read, 1))
            through = tl.dot(tl.trans(S), G, input_precision=PRECISION)  # what both hold lies on its diagonal
            through = tl.sum(tl.where(diagonal, through, 0.0)) * whole
            tl.store(crossing + (tile * 2 + 1) * (heads * PARTS) + part, through)
        where = pairs + (tile * (groups * SHARES) + rest) * (2 * Q * Q) + s[:, None] * Q + s[None, :]
        b_at = at(B + group.to(tl.int64) * w_g, row, w_b, w_t, origin, first, Q, REVERSE)
        b = operand(rows(b_at, n, N, first, length, Q, NB), HALF)
        for i in tl.static_range(2 if HALF else 1):
            product = tl.load(where + i * Q * Q)
            dc = tl.dot(product, b, dc, input_precision=PRECISION)
            db = tl.dot(tl.trans(product), c, db, input_precision=PRECISION)
        offset = rest % SHARES * size_of_share + group * N
        width = groups * N
        put(at(dC + offset, row * t, width, width, origin, first, Q, REVERSE), n, N, first, length, dc, Q, NB)
        put(at(dB + offset, row * t, width, width, origin, first, Q, REVERSE), n, N, first, length, db, Q, NB)


@triton.jit(do_not_specialize=("t", "each"))
def finish(
    dt, A, bias, clock, table, tiles, pieces, crossing, ddecay, decay, ddt, sums, t, each, low, high, dt_b, dt_t,
    heads: tl.constexpr, PARTS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, HALF: tl.constexpr,
    Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """ddt of a tile and H heads, and its sums for A and dt_bias, (tile, 2, h)."""
    sequence, row, first, length, origin, exists = place(table, tiles, tl.program_id(0), t, each, Q, REVERSE)
    tile = tl.program_id(0).to(tl.int64)
    h, s = tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
    known = h < heads
    if not exists:
        length = length * 0 - 1
    live = known[:, None] & (first + s < length)[None, :]
    there = known & (length >= 0)
    later, direct, across = tl.zeros((H, Q), tl.float32), tl.zeros((H, Q), tl.float32), tl.zeros((H, Q), tl.float32)
    through = tl.load(ddecay + sequence * heads + h, mask=there, other=0.0)
    through *= tl.load(decay + sequence * heads + h, mask=there, other=0.0)
    for i in tl.static_range(PARTS):
        own = pieces + ((tile * 3 * heads + h) * PARTS + i)[:, None] * Q + s[None, :]
        across += tl.load(own, mask=live, other=0.0)
        later += tl.load(own + heads * PARTS * Q, mask=live, other=0.0)
        direct += tl.load(own + 2 * heads * PARTS * Q, mask=live, other=0.0)
        own = crossing + (tile * 2 * heads + h) * PARTS + i
        if HALF:
            through += tl.load(own, mask=there, other=0.0)
        through += tl.load(own + heads * PARTS, mask=there, other=0.0)
    if HALF:
        dexponent = tl.cumsum(later + across, 1, reverse=True) + through[:, None]
    else:
        dexponent = tl.cumsum(later, 1, reverse=True) + across + through[:, None]
    size = tl.load(clock + (tile * heads + h)[:, None] * (3 * Q) + s[None, :], mask=live, other=0.0)
    rate = tl.load(A + h, mask=known, other=0.0)
    grad = dexponent * rate[:, None] + direct
    time = origin - first if REVERSE else origin + first
    step = (-s if REVERSE else s)[None, :]
    raw_at = dt + row * dt_b + time.to(tl.int64) * dt_t + step * dt_t + h[:, None]
    raw = tl.load(raw_at, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + h, mask=known, other=0.0)[:, None]
    free = sized(raw, float("-inf"), float("inf"), SOFTPLUS)
    grad = tl.where((free >= low) & (free <= high), grad, 0.0)
    if SOFTPLUS:
        grad *= tl.sigmoid(raw)
    grad = tl.where(live, grad, 0.0)
    where = ddt + (row * t + time.to(tl.int64)) * heads + step * heads + h[:, None]
    tl.store(where, grad.to(ddt.dtype.element_ty), mask=live)
    tl.store(sums + tile * 2 * heads + h, tl.sum(tl.where(live, dexponent * size, 0.0), 1), mask=known)
    tl.store(sums + (tile * 2 + 1) * heads + h, tl.sum(grad, 1), mask=known)


@triton.jit(do_not_specialize=("size",))
def add(dB_parts, dC_parts, dB, dC, size, SHARES: tl.constexpr, C: tl.constexpr):
    """Sums over SHARES of two tensors (SHARES, size), in order."""
    c = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    live = c < size
    first, second = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for i in tl.static_range(SHARES):
        first += tl.load(dB_parts + i * size.to(tl.int64) + c, mask=live, other=0.0)
        second += tl.load(dC_parts + i * size.to(tl.int64) + c, mask=live, other=0.0)
    tl.store(dB + c, first.to(dB.dtype.element_ty), mask=live)
    tl.store(dC + c, second.to(dC.dtype.element_ty), mask=live)
