"""ssd's gradients in Triton. A program of `gradients` takes a tile and some parts of one group, whose dB and dC it sums.

It reads the state before the tile and the gradient that reaches the state after it. What a step's decay gets back is
the sum over all pairs of an earlier input and an output at or after it: sums over rows and columns of one matrix, so
that they cancel to the last bit of float32. `finish` sums them over time; nothing here is added by atomics.

Names as in gpu_kernels.py.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.ssd.gpu_kernels import at, clock_of, decays, operand, put, rows, sheet, sized, skip


@triton.jit(do_not_specialize=("t", "each"))
def gradients(
    dy, x, z, B, Cs, D, clock, table, tiles, before, after, dx, dz, dB, dC, pieces, crossing, dD, t, each, size_of_part,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, z_b, z_t, z_h, B_b, B_t, B_g, Cs_b, Cs_t, Cs_g,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_WIDE: tl.constexpr,
    REVERSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, SHARES: tl.constexpr, TAKEN: tl.constexpr,
    Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dz of a tile, and what dt, dB, dC and dD are summed from. SHARES programs share a group, TAKEN parts each.

    pieces: (tile, 2, part, Q) what goes to the decays of a step and all before it, and to its size.
    crossing: (tile, part) what all decays of a tile get.   dD: (tile, part, PB).   dB, dC: (SHARES, b, t, g, n).
    """
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    tile, rest = (program // (SHARES * groups)).to(tl.int64), program % (SHARES * groups)
    group, share = rest // SHARES, rest % SHARES
    sequence, row, first, length, origin, exists = place(table, tiles, tile, t, each, Q, REVERSE)
    if exists:
        n, s = tl.arange(0, NB), tl.arange(0, Q)
        b = operand(rows(at(B + group * B_g, row, B_b, B_t, origin, first, Q, REVERSE), n, N, first, length, Q, NB),
                    HALF)  # fmt: skip
        c = operand(rows(at(Cs + group * Cs_g, row, Cs_b, Cs_t, origin, first, Q, REVERSE), n, N, first, length, Q, NB),
                    HALF)  # fmt: skip
        product = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        dproduct = tl.zeros((Q, Q), tl.float32)
        db, dc = tl.zeros((Q, NB), tl.float32), tl.zeros((Q, NB), tl.float32)
        begin = (group * heads + groups - 1) // groups * PARTS + share * TAKEN
        end = tl.minimum(begin + TAKEN, ((group + 1) * heads + groups - 1) // groups * PARTS)
        for part in tl.range(begin, end, num_stages=STAGES):
            head, p0 = part // PARTS, part % PARTS * PB
            p = p0 + tl.arange(0, PB)
            own, exist = sheet(p0, P, N, PB, NB)
            own += (tile * heads + head) * (P * N)
            given = rows(at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            slope = rows(at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            S = tl.load(before + own, mask=exist, other=0.0)
            G = tl.load(after + own, mask=exist, other=0.0)
            size, exponent, left_out, last, last_rest = clock_of(clock, tile, head, heads, Q, HALF)
            within = decays(exponent, left_out, Q)
            enter = tl.exp2(exponent + left_out)
            leave = tl.exp2((last - exponent) + (last_rest - left_out))
            skipped = tl.zeros((PB,), tl.float32)
            if D is not None:
                skipped = skip(D, head, p, P, D_WIDE)
            value = operand(given, HALF)
            read = tl.dot(c, tl.trans(S), input_precision=PRECISION) * enter[:, None]
            if z is not None:
                gate_at = at(z + head * z_h, row, z_b, z_t, origin, first, Q, REVERSE)
                gate = rows(gate_at, p, P, first, length, Q, PB).to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                matrix = operand(product * within * size[None, :], HALF)
                y = tl.dot(matrix, value, read, input_precision=PRECISION) + skipped[None, :] * given.to(tl.float32)
                dgate = slope.to(tl.float32) * y * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
                dz_at = at(dz + head * P, row * t, heads * P, heads * P, origin, first, Q, REVERSE)
                put(dz_at, p, P, first, length, dgate, Q, PB)
                slope = slope.to(tl.float32) * (gate * sigmoid)
            grad = operand(slope, HALF)
            wide = grad.to(tl.float32)
            pairs = tl.dot(grad, tl.trans(value), input_precision=PRECISION) * within * size[None, :]
            dproduct += pairs
            pairs *= product
            passed = tl.dot(b, tl.trans(G), input_precision=PRECISION) * leave[:, None]
            matrix = operand(product * within, HALF)
            du = tl.dot(tl.trans(matrix), grad, passed, input_precision=PRECISION)
            value_wide = given.to(tl.float32)
            into = tl.sum(value_wide * passed, 1) * size
            later = tl.sum(pairs, 1) + tl.sum(wide * read, 1) - tl.sum(pairs, 0) - into
            out = pieces + (tile * 2 * (heads * PARTS) + part) * Q + s
            tl.store(out, later)
            tl.store(out + heads * PARTS * Q, tl.sum(value_wide * du, 1))
            dx_at = at(dx + head * P, row * t, heads * P, heads * P, origin, first, Q, REVERSE)
            put(dx_at, p, P, first, length, du * size[:, None] + skipped[None, :] * wide, Q, PB)
            if D is not None:
                tl.store(dD + (tile * (heads * PARTS) + part) * PB + tl.arange(0, PB), tl.sum(wide * value_wide, 0))
            dc = tl.dot(operand(wide * enter[:, None], HALF), S, dc, input_precision=PRECISION)
            db = tl.dot(operand(value_wide * (leave * size)[:, None], HALF), G, db, input_precision=PRECISION)
            through = tl.sum(S.to(tl.float32) * G.to(tl.float32)) * tl.exp2(last + last_rest)
            tl.store(crossing + tile * (heads * PARTS) + part, tl.sum(into) + through)
        half = operand(dproduct, HALF)
        dc = tl.dot(half, b, dc, input_precision=PRECISION)
        db = tl.dot(tl.trans(half), c, db, input_precision=PRECISION)
        offset = share * size_of_part + group * N
        width = groups * N
        put(at(dC + offset, row * t, width, width, origin, first, Q, REVERSE), n, N, first, length, dc, Q, NB)
        put(at(dB + offset, row * t, width, width, origin, first, Q, REVERSE), n, N, first, length, db, Q, NB)


@triton.jit(do_not_specialize=("t", "each"))
def finish(
    dt, A, bias, clock, table, tiles, pieces, crossing, ddecay, decay, ddt, sums, t, each, low, high, dt_b, dt_t,
    heads: tl.constexpr, PARTS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr,
    H: tl.constexpr,
):  # fmt: skip
    """ddt of a tile and H heads, and its sums for A and dt_bias, (tile, 2, h)."""
    tile = tl.program_id(0).to(tl.int64)
    sequence, row, first, length, origin, exists = place(table, tiles, tile, t, each, Q, REVERSE)
    h, s = tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
    known = h < heads
    if not exists:
        length = length * 0 - 1
    live = known[:, None] & (first + s < length)[None, :]
    there = known & (length >= 0)
    later, direct = tl.zeros((H, Q), tl.float32), tl.zeros((H, Q), tl.float32)
    through = tl.load(ddecay + sequence * heads + h, mask=there, other=0.0)
    through *= tl.load(decay + sequence * heads + h, mask=there, other=0.0)
    for i in tl.static_range(PARTS):
        own = pieces + ((tile * 2 * heads + h) * PARTS + i)[:, None] * Q + s[None, :]
        later += tl.load(own, mask=live, other=0.0)
        direct += tl.load(own + heads * PARTS * Q, mask=live, other=0.0)
        through += tl.load(crossing + (tile * heads + h) * PARTS + i, mask=there, other=0.0)
    dexponent = tl.cumsum(later, 1, reverse=True) + through[:, None]
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
def add(partial, out, size, SHARES: tl.constexpr, C: tl.constexpr):
    """Sums over SHARES of (SHARES, size), in order."""
    c = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    live = c < size
    total = tl.load(partial + c, mask=live, other=0.0)
    for i in tl.static_range(1, SHARES):
        total += tl.load(partial + i * size.to(tl.int64) + c, mask=live, other=0.0)
    tl.store(out + c, total.to(out.dtype.element_ty), mask=live)
