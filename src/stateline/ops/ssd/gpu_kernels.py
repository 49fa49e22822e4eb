"""ssd in Triton, forwards: tiles of Q steps as matrix products, runs of tiles in a program's registers.

`prepare` makes step sizes and the logarithms of decays; `sweep` finds what each run leaves to the next, `combine` hands
it on, and `outputs` walks each run from the state before it. Tiles and runs are anchored where a sequence starts.

Suffixes and names: s step of a tile, running forwards or backwards through memory; h head, p head width, n state, g
group. A *part* is PB channels of a head: a head wider than that is several, with one decay. The *clock* of a tile and
head is (3, Q): step sizes, sums of their dt·A·log2(e) from the tile's start in float32, and what these sums leave out.
HALF: operands of matrix products are bfloat16, otherwise float32 of PRECISION. All sums are float32.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.selective_scan.gpu_kernels import softplus


@triton.jit
def operand(x, HALF: tl.constexpr):
    """What a matrix product takes."""
    return x.to(tl.bfloat16) if HALF else x.to(tl.float32)


@triton.jit
def at(base, row, stride_b, stride_t, origin, s0, Q: tl.constexpr, REVERSE: tl.constexpr):
    """Where Q steps from s0 of a sequence lie, (Q, 1): 64-bit offsets, small ones between steps of a tile."""
    s = tl.arange(0, Q)
    time = origin - s0 if REVERSE else origin + s0
    step = -s if REVERSE else s
    return base + row * stride_b + time.to(tl.int64) * stride_t + (step * stride_t)[:, None]


@triton.jit
def rows(where, c, width: tl.constexpr, s0, length, Q: tl.constexpr, C: tl.constexpr):
    """Channels c of Q steps: 0 beyond the sequence or the width."""
    live = (s0 + tl.arange(0, Q) < length)[:, None]
    if width % C != 0 or width == 0:
        live = live & (c < width)[None, :]
    return tl.load(where + c[None, :], mask=live, other=0.0)


@triton.jit
def put(where, c, width: tl.constexpr, s0, length, value, Q: tl.constexpr, C: tl.constexpr):
    """Store what `rows` loads."""
    live = (s0 + tl.arange(0, Q) < length)[:, None]
    if width % C != 0 or width == 0:
        live = live & (c < width)[None, :]
    tl.store(where + c[None, :], value.to(where.dtype.element_ty), mask=live)


@triton.jit
def sheet(p0, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr):
    """Offsets of a head's state from row p0 as (NB, PB), and which exist."""
    p, n = p0 + tl.arange(0, PB), tl.arange(0, NB)
    if P % PB == 0 and N == NB:  # known before the kernel runs
        exist = tl.full((NB, PB), True, tl.int1)
    else:
        exist = (n < N)[:, None] & (p < P)[None, :]
    return n[:, None] + p[None, :] * N, exist


@triton.jit
def group_of(head, heads: tl.constexpr, groups: tl.constexpr):
    """The group whose B and C a head reads."""
    return head * groups // heads


@triton.jit
def tile_of(firsts, sequence, first, each, Q: tl.constexpr):
    """Number of the tile that holds step `first` of a sequence."""
    if firsts is None:
        number = sequence * each
    else:
        number = tl.load(firsts + sequence)
    return number + first // Q


@triton.jit
def clock_of(clock, tile, head, heads: tl.constexpr, Q: tl.constexpr, HALF: tl.constexpr):
    """Of a tile's steps: sizes, decays into and out of it, exponents, what these leave out; the decay of all of it."""
    base = clock + (tile * heads + head) * (3 * Q)
    s = tl.arange(0, Q)
    size, exponent, last = tl.load(base + s), tl.load(base + Q + s), tl.load(base + 2 * Q - 1)
    rest = exponent
    if HALF:  # nobody would see what is left out
        enter, leave, whole = tl.exp2(exponent), tl.exp2(last - exponent), tl.exp2(last)
    else:
        rest, last_rest = tl.load(base + 2 * Q + s), tl.load(base + 3 * Q - 1)
        enter, whole = tl.exp2(exponent + rest), tl.exp2(last + last_rest)
        leave = tl.exp2((last - exponent) + (last_rest - rest))
    return size, enter, leave, exponent, rest, whole


@triton.jit
def decays(exponent, rest, Q: tl.constexpr, HALF: tl.constexpr):
    """(Q, Q): the decay from after step j to after step i, 0 where j comes later."""
    s = tl.arange(0, Q)
    between = exponent[:, None] - exponent[None, :]
    if not HALF:
        between += rest[:, None] - rest[None, :]
    return tl.exp2(tl.where(s[:, None] >= s[None, :], between, float("-inf")))


@triton.jit
def on_diagonal(matrix, value, Q: tl.constexpr):
    """The matrix (Q, Q) with `value` on its diagonal."""
    s = tl.arange(0, Q)
    return tl.where(s[:, None] == s[None, :], value[None, :], matrix)


@triton.jit
def skip(D, head, p, P: tl.constexpr, D_WIDE: tl.constexpr):
    """The skip weight of a part's channels, (PB) or one."""
    if D_WIDE:
        value = tl.load(D + head * P + p, mask=p < P, other=0.0)
    else:
        value = tl.load(D + head) + p * 0.0
    return value


@triton.jit
def silu(x):
    """x · sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def sized(raw, low, high, SOFTPLUS: tl.constexpr):
    """A step size from what was given; NaN stays NaN."""
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(raw < low, low, tl.where(raw > high, high, raw))


@triton.jit(do_not_specialize=("t", "each"))
def prepare(
    dt, A, bias, table, tiles, clock, t, each, low, high, dt_b, dt_t,
    heads: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The clock of a tile, of H heads."""
    _sequence, row, first, length, origin, exists = place(table, tiles, tl.program_id(0), t, each, Q, REVERSE)
    if exists:
        tile = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * H + tl.arange(0, H)
        s = tl.arange(0, Q)
        live = (first + s < length)[:, None] & (h < heads)[None, :]
        where = at(dt, row, dt_b, dt_t, origin, first, Q, REVERSE)
        raw = tl.load(where + h[None, :], mask=live, other=0.0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + h, mask=h < heads, other=0.0)[None, :]
        size = tl.where(live, sized(raw, low, high, SOFTPLUS), 0.0)
        rate = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float64) * 1.4426950408889634
        total = tl.cumsum(size.to(tl.float64) * rate[None, :], 0)
        exponent = total.to(tl.float32)
        out = clock + (tile * heads + h)[None, :] * (3 * Q) + s[:, None]
        own = (s >= 0)[:, None] & (h < heads)[None, :]
        tl.store(out, size, mask=own)
        tl.store(out + Q, exponent, mask=own)
        tl.store(out + 2 * Q, (total - exponent.to(tl.float64)).to(tl.float32), mask=own)


@triton.jit(do_not_specialize=("t", "runs", "each"))
def sweep(
    u, z, W, clock, table, tiles, firsts, ends, marks, t, runs, each, u_b, u_t, u_h, z_b, z_t, z_h, w_b, w_t, w_g,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, ADJOINT: tl.constexpr,
    MARK: tl.constexpr, REVERSE: tl.constexpr, HALF: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, RUN: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Sums of decayed u⊗W of a run: the states from x and B or, ADJOINT, their gradients from dy and C, from the end.

    MARK: start from `ends` and leave what is before (ADJOINT: after) each tile in `marks`; otherwise start from 0 and
    leave the sum in `ends`, float32, but for the last run's unless LAST: only the state after it would need it.
    TERMS: bfloat16 numbers that the scaled u is cut into. z: u counts times silu(z).
    """
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    run, part = program // (heads * PARTS), program % (heads * PARTS)
    sequence, row, first, length, origin, exists = place(table, tiles, run, t, runs, RUN, REVERSE)
    if not LAST:
        exists = exists & (first > 0 if ADJOINT else first + RUN < length)
    if exists:
        wide = run.to(tl.int64)
        head, p0 = (part // PARTS).to(tl.int64), part % PARTS * PB
        p, n = p0 + tl.arange(0, PB), tl.arange(0, NB)
        own, exist = sheet(p0, P, N, PB, NB)
        ends += (wide * heads + head) * (P * N)
        first_tile = tile_of(firsts, sequence, first, each, Q)
        count = (tl.minimum(length - first, RUN) + Q - 1) // Q
        u += head * u_h
        W += group_of(head, heads, groups) * w_g
        S = tl.zeros((NB, PB), tl.float32)
        if MARK:
            S = tl.load(ends + own, mask=exist, other=0.0)
        for i in tl.range(0, count, num_stages=STAGES):
            k = count - 1 - i if ADJOINT else i
            s0 = first + k * Q
            tile = first_tile + k
            value = rows(at(u, row, u_b, u_t, origin, s0, Q, REVERSE), p, P, s0, length, Q, PB).to(tl.float32)
            if z is not None:
                gate = rows(at(z + head * z_h, row, z_b, z_t, origin, s0, Q, REVERSE), p, P, s0, length, Q, PB)
                value *= silu(gate.to(tl.float32))
            w = operand(rows(at(W, row, w_b, w_t, origin, s0, Q, REVERSE), n, N, s0, length, Q, NB), HALF)
            size, enter, leave, _, _, whole = clock_of(clock, tile, head, heads, Q, HALF)
            if MARK:
                tl.store(marks + (tile * heads + head) * (P * N) + own, S.to(marks.dtype.element_ty), mask=exist)
            value *= (enter if ADJOINT else leave * size)[:, None]
            S *= whole
            most = operand(value, HALF)
            S = tl.dot(tl.trans(w), most, S, input_precision=PRECISION)
            if TERMS == 2:
                S = tl.dot(tl.trans(w), operand(value - most.to(tl.float32), HALF), S, input_precision=PRECISION)
        if not MARK:
            tl.store(ends + own, S, mask=exist)


@triton.jit(do_not_specialize=("t", "runs", "each"))
def combine(
    ends, clock, table, run_firsts, firsts, edge, result, decay, t, runs, each,
    heads: tl.constexpr, SIZE: tl.constexpr, ADJOINT: tl.constexpr, Q: tl.constexpr, RUN: tl.constexpr,
    BLOCKS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Replace what each run adds to a state by the state before it, and find the last one and the total decay.

    ADJOINT: from the last run to the first. SIZE: numbers of a head's state; BLOCKS programs take C of them each.
    """
    program = tl.program_id(0)
    sequence, rest = (program // (heads * BLOCKS)).to(tl.int64), program % (heads * BLOCKS)
    head = rest // BLOCKS
    c = rest % BLOCKS * C + tl.arange(0, C)
    live = c < SIZE
    if table is None:
        run, length = sequence * runs, t
    else:
        run = tl.load(run_firsts + sequence)
        length = (tl.load(table + 3 * sequence + 2) - tl.load(table + 3 * sequence + 1)).to(tl.int32)
    first_tile = tile_of(firsts, sequence, 0, each, Q)
    count = tl.maximum((length + RUN - 1) // RUN, 1)
    own = (sequence * heads + head) * SIZE + c
    state = tl.zeros((C,), tl.float32)
    if edge is not None:
        state = tl.load(edge + own, mask=live, other=0.0).to(tl.float32)
    elapsed = tl.zeros((1,), tl.float64)
    k = count - 1 if ADJOINT else 0
    ahead = tl.load(ends + ((run + k) * heads + head) * SIZE + c, mask=live, other=0.0)
    i = tl.arange(0, RUN // Q)
    for done in tl.range(0, count):
        k = count - 1 - done if ADJOINT else done
        added = ahead
        following = k - 1 if ADJOINT else k + 1
        wanted = live & (done + 1 < count)
        ahead = tl.load(ends + ((run + following) * heads + head) * SIZE + c, mask=wanted, other=0.0)
        tile = first_tile + k * (RUN // Q) + i
        used = (k * RUN + i * Q) < length
        last = tl.load(clock + (tile * heads + head) * (3 * Q) + 2 * Q - 1, mask=used, other=0.0).to(tl.float64)
        last += tl.load(clock + (tile * heads + head) * (3 * Q) + 3 * Q - 1, mask=used, other=0.0)
        tl.store(ends + ((run + k) * heads + head) * SIZE + c, state, mask=live)
        total = tl.sum(last, 0)
        elapsed += total
        state = state * tl.exp2(total.to(tl.float32)) + added
    if result is not None:
        tl.store(result + own, state, mask=live)
    if decay is not None:
        if rest % BLOCKS == 0:
            tl.store(decay + sequence * heads + head + tl.arange(0, 1), tl.exp2(elapsed.to(tl.float32)))


@triton.jit(do_not_specialize=("t", "runs", "each"))
def outputs(
    x, z, B, Cs, D, dy, clock, own, table, tiles, firsts, starts, y, dz, t, runs, each, x_b, x_t, x_h, z_b, z_t, z_h,
    w_b, w_t, w_g, dy_b, dy_t, dy_h,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_WIDE: tl.constexpr,
    REVERSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr, RUN: tl.constexpr,
    PB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of a run and a part, from the state before it. With dy, dz and, in y's place, dy through the gate.

    own: (tile, h, Q) what a step's input counts with in its own output, if not with its size.
    """
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    run, part = program // (heads * PARTS), program % (heads * PARTS)
    sequence, row, first, length, origin, exists = place(table, tiles, run, t, runs, RUN, REVERSE)
    if exists:
        wide = run.to(tl.int64)
        head, p0 = (part // PARTS).to(tl.int64), part % PARTS * PB
        p, n = p0 + tl.arange(0, PB), tl.arange(0, NB)
        place_in, exist = sheet(p0, P, N, PB, NB)
        S = tl.load(starts + (wide * heads + head) * (P * N) + place_in, mask=exist, other=0.0)
        first_tile = tile_of(firsts, sequence, first, each, Q)
        count = (tl.minimum(length - first, RUN) + Q - 1) // Q
        group = group_of(head, heads, groups)
        x += head * x_h
        B += group * w_g
        Cs += group * w_g
        y += head * P
        for k in tl.range(0, count, num_stages=STAGES):
            s0 = first + k * Q
            given = rows(at(x, row, x_b, x_t, origin, s0, Q, REVERSE), p, P, s0, length, Q, PB)
            b = operand(rows(at(B, row, w_b, w_t, origin, s0, Q, REVERSE), n, N, s0, length, Q, NB), HALF)
            c = operand(rows(at(Cs, row, w_b, w_t, origin, s0, Q, REVERSE), n, N, s0, length, Q, NB), HALF)
            size, enter, leave, exponent, rest, whole = clock_of(clock, first_tile + k, head, heads, Q, HALF)
            matrix = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            weight = decays(exponent, rest, Q, HALF) * size[None, :]
            if own is not None:
                mine = tl.load(own + ((first_tile + k) * heads + head) * Q + tl.arange(0, Q))
                weight = on_diagonal(weight, mine, Q)
            matrix *= weight
            out = tl.dot(c, operand(S, HALF), input_precision=PRECISION) * enter[:, None]
            out = tl.dot(operand(matrix, HALF), operand(given, HALF), out, input_precision=PRECISION)
            value = given.to(tl.float32)
            if D is not None:
                out += skip(D, head, p, P, D_WIDE)[None, :] * value
            if z is not None:
                gate_at = at(z + head * z_h, row, z_b, z_t, origin, s0, Q, REVERSE)
                gate = rows(gate_at, p, P, s0, length, Q, PB).to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                if dy is None:
                    out *= gate * sigmoid
                else:
                    dy_at = at(dy + head * dy_h, row, dy_b, dy_t, origin, s0, Q, REVERSE)
                    grad = rows(dy_at, p, P, s0, length, Q, PB).to(tl.float32)
                    out *= grad * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                    dz_at = at(dz + head * P, row * t, heads * P, heads * P, origin, s0, Q, REVERSE)
                    put(dz_at, p, P, s0, length, out, Q, PB)
                    out = grad * gate * sigmoid
            put(at(y, row * t, heads * P, heads * P, origin, s0, Q, REVERSE), p, P, s0, length, out, Q, PB)
            value *= (leave * size)[:, None]
            S *= whole
            S = tl.dot(tl.trans(b), operand(value, HALF), S, input_precision=PRECISION)


@triton.jit
def step(
    state, x, dt, z, A, B, Cs, D, bias, index, y, slots, low, high, x_b, x_h, dt_b, z_b, z_h, B_b, B_g, Cs_b, Cs_g,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_WIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One token, in place: a program takes PB channels of a head of a row. LOG_A: A holds log(−A)."""
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    row, part = (program // (heads * PARTS)).to(tl.int64), program % (heads * PARTS)
    head, p0 = (part // PARTS).to(tl.int64), part % PARTS * PB
    p, n = p0 + tl.arange(0, PB), tl.arange(0, NB)
    own, exist = p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = (slot >= 0) & (slot < slots)
    state += (slot * heads + head) * (P * N)
    S = tl.load(state + own, mask=exist & taken, other=0.0).to(tl.float32)
    group = group_of(head, heads, groups)
    value = tl.load(x + row * x_b + head * x_h + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(B + row * B_b + group * B_g + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(Cs + row * Cs_b + group * Cs_g + n, mask=n < N, other=0.0).to(tl.float32)
    raw = tl.load(dt + row * dt_b + head).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + head)
    size = sized(raw, low, high, SOFTPLUS)
    rate = tl.load(A + head)
    if LOG_A:
        rate = -tl.exp(rate)
    S = S * tl.exp(size * rate) + (size * value)[:, None] * b[None, :]
    tl.store(state + own, S.to(state.dtype.element_ty), mask=exist & taken)
    out = tl.sum(S * c[None, :], 1)
    if D is not None:
        out += skip(D, head, p, P, D_WIDE) * value
    if z is not None:
        gate = tl.load(z + row * z_b + head * z_h + p, mask=p < P, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    where = y + (row * heads + head) * P + p
    tl.store(where, tl.where(taken, out, 0.0).to(y.dtype.element_ty), mask=p < P)
