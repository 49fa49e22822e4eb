"""trapezoid_ssd in Triton, what comes before ssd's kernels: steps as ssd counts them, B and C turned, a copy a head.

A token's input counts in later outputs with its own end of its trapezoid and the next one's other end, which is what
ssd calls its size; in its own output with the former alone. `prepare` writes both, so that ssd's `sweep`, `combine`
and `outputs` run this recurrence. `spans` and `wind` find the angle before each tile, `follow` those in it, `turn`
writes k and q; `gather` does so on the way of ssd's `sweep`.

Suffixes and names: as in ssd's gpu_kernels.py; i pair of states. k and q are (b, t, h, n), *paired*: the two states of
pair i are neighbours, whichever they are in B and C. Angles are turns, summed in float64.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.ssd.gpu_kernels import at, clock_of, group_of, put, rows, sheet, tile_of


@triton.jit
def pair_of(N: tl.constexpr, NB: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two states of each of NB / 2 pairs; N or more where there is none."""
    i = tl.arange(0, NB // 2)
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = tl.where(i < N // 2, i, i + N // 2), tl.where(i < N // 2, i + N // 2, N)
    return first, second


@triton.jit
def halves_of(x, R: tl.constexpr, NB: tl.constexpr):
    """The two states of each pair of (R, NB), paired, as (R, NB / 2) twice."""
    return tl.split(tl.reshape(x, (R, NB // 2, 2)))


@triton.jit
def pairs(where, live, N: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, INTERLEAVED: tl.constexpr):
    """States of R rows (R, 1) in float32, as (R, NB / 2) twice: the first and the second of each pair."""
    if INTERLEAVED:
        n = tl.arange(0, NB)
        there = live[:, None] & (n < N)[None, :]
        first, second = halves_of(tl.load(where + n[None, :], mask=there, other=0.0).to(tl.float32), R, NB)
    else:
        a, b = pair_of(N, NB, INTERLEAVED)
        first = tl.load(where + a[None, :], mask=live[:, None] & (a < N)[None, :], other=0.0).to(tl.float32)
        second = tl.load(where + b[None, :], mask=live[:, None] & (b < N)[None, :], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def whole(angle):
    """An angle within half a turn of 0."""
    return angle - tl.floor(angle + 0.5)


@triton.jit
def circle(angle):
    """Cosine and sine of float32 turns within half a turn of 0: polynomials on an eighth of a turn."""
    quarters = 4.0 * angle
    nearest = tl.floor(quarters + 0.5)
    part = quarters - nearest
    q = part * part
    sine = part * (((-0.004602163 * q + 0.07968022286) * q - 0.64596347815) * q + 1.57079632196)
    cosine = (((0.00090674165 * q - 0.02086152899) * q + 0.25366941042) * q - 1.23370054937) * q + 1.0
    quarter = nearest.to(tl.int32)
    odd = (quarter & 1) != 0
    across, along = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -across, across), tl.where((quarter & 2) != 0, -along, along)


@triton.jit(do_not_specialize=("t", "each"))
def prepare(
    dt, A, blend, table, tiles, clock, own, t, each,
    heads: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The clock of a tile, of H heads, and what each step's input counts with in its own output."""
    _sequence, row, first, length, origin, exists = place(table, tiles, tl.program_id(0), t, each, Q, REVERSE)
    if exists:
        tile = tl.program_id(0).to(tl.int64)
        h, s = tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q)
        live = (first + s < length)[:, None] & (h < heads)[None, :]
        more = (first + s + 1 < length)[:, None] & (h < heads)[None, :]
        step = tl.load(at(dt, row * t, heads, heads, origin, first, Q, REVERSE) + h[None, :], mask=live, other=0.0)
        newer = tl.load(at(blend, row * t, heads, heads, origin, first, Q, REVERSE) + h[None, :], mask=live, other=0.0)
        newer *= step
        next_at = at(dt, row * t, heads, heads, origin, first + 1, Q, REVERSE)
        size = tl.load(next_at + h[None, :], mask=more, other=0.0)
        next_at = at(blend, row * t, heads, heads, origin, first + 1, Q, REVERSE)
        size = newer + (1.0 - tl.load(next_at + h[None, :], mask=more, other=0.0)) * size
        rate = tl.load(at(A, row * t, heads, heads, origin, first, Q, REVERSE) + h[None, :], mask=live, other=0.0)
        total = tl.cumsum(step.to(tl.float64) * rate.to(tl.float64) * 1.4426950408889634, 0)
        exponent = total.to(tl.float32)
        out = clock + (tile * heads + h)[None, :] * (3 * Q) + s[:, None]
        known = (s >= 0)[:, None] & (h < heads)[None, :]
        tl.store(out, size, mask=known)
        tl.store(out + Q, exponent, mask=known)
        tl.store(out + 2 * Q, (total - exponent.to(tl.float64)).to(tl.float32), mask=known)
        tl.store(own + (tile * heads + h)[None, :] * Q + s[:, None], newer, mask=known)


@triton.jit(do_not_specialize=("t", "each"))
def spans(
    dt, rates, table, tiles, out, t, each,
    heads: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, SB: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """By how much a tile turns the pairs of H heads, (tile, h, S)."""
    _sequence, row, first, length, origin, exists = place(table, tiles, tl.program_id(0), t, each, Q, REVERSE)
    if exists:
        h, s, i = tl.program_id(1) * H + tl.arange(0, H), tl.arange(0, Q), tl.arange(0, SB)
        live = (first + s < length)[:, None]
        step_at = at(dt, row * t, heads, heads, origin, first, Q, REVERSE) + h[None, :]
        step = tl.load(step_at, mask=live & (h < heads)[None, :], other=0.0).to(tl.float64)
        rate_at = at(rates, row * t, S, S, origin, first, Q, REVERSE) + i[None, :]
        rate = tl.load(rate_at, mask=live & (i < S)[None, :], other=0.0).to(tl.float64)
        total = tl.sum(step[:, :, None] * rate[:, None, :], 0)
        where = (tl.program_id(0).to(tl.int64) * heads + h)[:, None] * S + i[None, :]
        tl.store(out + where, total, mask=(h < heads)[:, None] & (i < S)[None, :])


@triton.jit(do_not_specialize=("t", "each", "size"))
def wind(
    spans, initial, last, table, firsts, t, each, size,
    Q: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Replace what each tile turns by the angle before it, and find the last angle. size: angles of a tile."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    live = c < size
    length = t
    if table is not None:
        length = (tl.load(table + 3 * sequence + 2) - tl.load(table + 3 * sequence + 1)).to(tl.int32)
    first_tile = tile_of(firsts, sequence, 0, each, Q)
    count = tl.maximum((length + Q - 1) // Q, 1)
    start = tl.zeros((C,), tl.float32)
    if initial is not None:
        start = tl.load(initial + sequence * size + c, mask=live, other=0.0)
    angle = start.to(tl.float64)
    for k in tl.range(0, (count + ROWS - 1) // ROWS):
        tile = k * ROWS + tl.arange(0, ROWS)
        where = spans + (first_tile + tile)[:, None].to(tl.int64) * size + c[None, :]
        used = (tile < count)[:, None] & live[None, :]
        turned = tl.load(where, mask=used, other=0.0)
        tl.store(where, whole(angle[None, :] + tl.cumsum(turned, 0) - turned), mask=used)
        angle = whole(angle + tl.sum(turned, 0))
    tl.store(last + sequence * size + c, tl.where(length > 0, angle.to(tl.float32), start), mask=live)


@triton.jit(do_not_specialize=("t", "each"))
def follow(
    dt, rates, before, table, tiles, angles, t, each,
    heads: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    """The angles of a tile and head, (tile, h, Q, S), float32."""
    number, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    _sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        mine, s, i = number.to(tl.int64) * heads + head, tl.arange(0, Q), tl.arange(0, SB)
        live = (first + s < length)[:, None]
        step = tl.load(at(dt + head, row * t, heads, heads, origin, first, Q, REVERSE), mask=live, other=0.0)
        rate = rows(at(rates, row * t, S, S, origin, first, Q, REVERSE), i, S, first, length, Q, SB)
        turned = tl.cumsum(step.to(tl.float64) * rate.to(tl.float64), 0)
        angle = whole(tl.load(before + mine * S + i, mask=i < S, other=0.0)[None, :] + turned)
        where = (mine * Q + s)[:, None] * S + i[None, :]
        tl.store(angles + where, angle.to(tl.float32), mask=live & (i < S)[None, :])


@triton.jit
def bias_of(bias, head, N: tl.constexpr, NB: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A head's bias of B or C, as `pairs` has them; 0 if there is none."""
    first, second = tl.zeros((NB // 2,), tl.float32), tl.zeros((NB // 2,), tl.float32)
    if bias is not None:
        one, two = pair_of(N, NB, INTERLEAVED)
        first = tl.load(bias + head * N + one, mask=one < N, other=0.0)
        second = tl.load(bias + head * N + two, mask=two < N, other=0.0)
    return first, second


@triton.jit
def turned(pair, bias, cosine, sine, R: tl.constexpr, NB: tl.constexpr):
    """Pairs, biased and turned, (R, NB)."""
    a, b = pair[0] + bias[0][None, :], pair[1] + bias[1][None, :]
    return tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (R, NB))


@triton.jit
def pass_on(
    k, x, last_k, last_x, sequence, head, heads: tl.constexpr, row, origin, first, length, x_b, x_t, x_h,
    P: tl.constexpr, N: tl.constexpr, R: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Write k (R, NB) and x of a sequence's last token, if it is one of R steps from `first`."""
    if (first < length) & (first + R >= length):
        s, n, p = tl.arange(0, R), tl.arange(0, NB), tl.arange(0, PB)
        state = last_k + (sequence * heads + head) * N + n[None, :] + s[:, None] * 0
        tl.store(state, k, mask=(first + s + 1 == length)[:, None] & (n < N)[None, :])
        time = (origin - (length - 1) if REVERSE else origin + (length - 1)).to(tl.int64)
        value = tl.load(x + row * x_b + time * x_t + head * x_h + p, mask=p < P, other=0.0)
        tl.store(last_x + (sequence * heads + head) * P + p, value.to(tl.float32), mask=p < P)


@triton.jit(do_not_specialize=("t", "each"))
def turn(
    B, Cs, B_bias, C_bias, x, angles, table, tiles, k, q, last_k, last_x, t, each,
    B_b, B_t, B_g, C_b, C_t, C_g, x_b, x_t, x_h,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    INTERLEAVED: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, PB: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """k and q of R steps of a tile and a head, and of each sequence's last token k and x, float32."""
    rest, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    number, cut = rest // (Q // R), rest % (Q // R)
    sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        first += cut * R
        s, n, i = tl.arange(0, R), tl.arange(0, NB), tl.arange(0, NB // 2)
        live, group = first + s < length, group_of(head, heads, groups)
        B_at = at(B + group * B_g, row, B_b, B_t, origin, first, R, REVERSE)
        C_at = at(Cs + group * C_g, row, C_b, C_t, origin, first, R, REVERSE)
        key = pairs(B_at, live, N, R, NB, INTERLEAVED)
        query = pairs(C_at, live, N, R, NB, INTERLEAVED)
        cosine, sine = tl.full((R, NB // 2), 1.0, tl.float32), tl.zeros((R, NB // 2), tl.float32)
        if S > 0:
            where = ((number.to(tl.int64) * heads + head) * Q + cut * R + s)[:, None] * S + i[None, :]
            cosine, sine = circle(tl.load(angles + where, mask=live[:, None] & (i < S)[None, :], other=0.0))
        turned_k = turned(key, bias_of(B_bias, head, N, NB, INTERLEAVED), cosine, sine, R, NB)
        turned_q = turned(query, bias_of(C_bias, head, N, NB, INTERLEAVED), cosine, sine, R, NB)
        put(at(k + head * N, row * t, heads * N, heads * N, origin, first, R, REVERSE), n, N, first, length, turned_k,
            R, NB)  # fmt: skip
        put(at(q + head * N, row * t, heads * N, heads * N, origin, first, R, REVERSE), n, N, first, length, turned_q,
            R, NB)  # fmt: skip
        if last_k is not None:
            pass_on(turned_k, x, last_k, last_x, sequence, head, heads, row, origin, first, length, x_b, x_t, x_h,
                    P, N, R, PB, NB, REVERSE)  # fmt: skip


@triton.jit(do_not_specialize=("t", "runs", "each"))
def gather(
    B, Cs, B_bias, C_bias, x, angles, clock, table, tiles, firsts, k, q, ends, last_k, last_x, t, runs, each,
    B_b, B_t, B_g, C_b, C_t, C_g, x_b, x_t, x_h,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    INTERLEAVED: tl.constexpr, REVERSE: tl.constexpr, Q: tl.constexpr, RUN: tl.constexpr, PB: tl.constexpr,
    XB: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`turn` and ssd's `sweep` at once, of a run and a part: k is read by nobody before it is counted. bfloat16, two
    numbers of it for both factors of the sums in `ends`."""
    PARTS: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    run, part = program // (heads * PARTS), program % (heads * PARTS)
    sequence, row, begin, length, origin, exists = place(table, tiles, run, t, runs, RUN, REVERSE)
    if exists:
        head, p0 = (part // PARTS).to(tl.int64), part % PARTS * PB
        p, n, s, i = p0 + tl.arange(0, PB), tl.arange(0, NB), tl.arange(0, Q), tl.arange(0, NB // 2)
        own, exist = sheet(p0, P, N, PB, NB)
        ends += (run.to(tl.int64) * heads + head) * (P * N)
        first_tile = tile_of(firsts, sequence, begin, each, Q)
        count = (tl.minimum(length - begin, RUN) + Q - 1) // Q
        group = group_of(head, heads, groups)
        B_shift = bias_of(B_bias, head, N, NB, INTERLEAVED)
        C_shift = bias_of(C_bias, head, N, NB, INTERLEAVED)
        state = tl.zeros((NB, PB), tl.float32)
        for done in tl.range(0, count, num_stages=STAGES):
            first = begin + done * Q
            mine = (first_tile + done).to(tl.int64) * heads + head
            live = first + s < length
            value = rows(at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            cosine, sine = tl.full((Q, NB // 2), 1.0, tl.float32), tl.zeros((Q, NB // 2), tl.float32)
            if S > 0:
                where = (mine * Q + s)[:, None] * S + i[None, :]
                cosine, sine = circle(tl.load(angles + where, mask=live[:, None] & (i < S)[None, :], other=0.0))
            C_at = at(Cs + group * C_g, row, C_b, C_t, origin, first, Q, REVERSE)
            query = turned(pairs(C_at, live, N, Q, NB, INTERLEAVED), C_shift, cosine, sine, Q, NB)
            q_at = at(q + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
            put(q_at, n, N, first, length, query, Q, NB)
            B_at = at(B + group * B_g, row, B_b, B_t, origin, first, Q, REVERSE)
            key = turned(pairs(B_at, live, N, Q, NB, INTERLEAVED), B_shift, cosine, sine, Q, NB)
            most_k = key.to(tl.bfloat16)
            k_at = at(k + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
            put(k_at, n, N, first, length, most_k, Q, NB)
            pass_on(key, x, last_k, last_x, sequence, head, heads, row, origin, first, length, x_b, x_t, x_h,
                    P, N, Q, XB, NB, REVERSE)  # fmt: skip
            size, _enter, leave, _exponent, _rest, whole_tile = clock_of(clock, first_tile + done, head, heads, Q, True)
            value = value.to(tl.float32) * (leave * size)[:, None]
            state *= whole_tile
            most = value.to(tl.bfloat16)
            state = tl.dot(tl.trans(most_k), most, state)
            state = tl.dot(tl.trans(most_k), (value - most.to(tl.float32)).to(tl.bfloat16), state)
            state = tl.dot(tl.trans((key - most_k.to(tl.float32)).to(tl.bfloat16)), most, state)
        tl.store(ends + own, state, mask=exist)


@triton.jit
def step(
    angle, state, last_k, last_x, x, dt, A, blend, B, Cs, rates, B_bias, C_bias, D, z, index, y, slots,
    x_b, x_h, dt_b, A_b, blend_b, B_b, B_g, C_b, C_g, rates_b, z_b, z_h,
    heads: tl.constexpr, groups: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    INTERLEAVED: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One token, in place: a program takes a head of a row, PB channels at a time."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    group, n, slot = group_of(head, heads, groups), tl.arange(0, NB), row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = (slot >= 0) & (slot < slots)
    n_in, owned = n < N, slot * heads + head
    # each state's partner in its pair, itself if there is none, and on which side of it
    second = n % 2 == 1 if INTERLEAVED else n >= N // 2
    pair = n // 2 if INTERLEAVED else tl.where(second, n - N // 2, n)
    other = tl.where(second, n - 1, n + 1) if INTERLEAVED else tl.where(second, n - N // 2, n + N // 2)
    turns = pair < S
    other = tl.where(turns, other, n)
    b_at, c_at = B + row * B_b + group * B_g, Cs + row * C_b + group * C_g
    b, b_other = tl.load(b_at + n, mask=n_in, other=0.0), tl.load(b_at + other, mask=n_in, other=0.0)
    c, c_other = tl.load(c_at + n, mask=n_in, other=0.0), tl.load(c_at + other, mask=n_in, other=0.0)
    b, b_other, c, c_other = b.to(tl.float32), b_other.to(tl.float32), c.to(tl.float32), c_other.to(tl.float32)
    if B_bias is not None:
        b += tl.load(B_bias + head * N + n, mask=n_in, other=0.0)
        b_other += tl.load(B_bias + head * N + other, mask=n_in, other=0.0)
    if C_bias is not None:
        c += tl.load(C_bias + head * N + n, mask=n_in, other=0.0)
        c_other += tl.load(C_bias + head * N + other, mask=n_in, other=0.0)
    size, newer = tl.load(dt + row * dt_b + head), tl.load(blend + row * blend_b + head)
    older, newer = (1.0 - newer) * size, newer * size
    decay = tl.exp(size * tl.load(A + row * A_b + head))
    if S > 0:
        there = turns & n_in & taken
        start = tl.load(angle + owned * S + pair, mask=there, other=0.0).to(tl.float64)
        rate = tl.load(rates + row * rates_b + pair, mask=turns & n_in, other=0.0).to(tl.float64)
        now = whole(start + size.to(tl.float64) * rate).to(tl.float32)
        tl.store(angle + owned * S + pair, now, mask=there & (second == 0))
        cosine, sine = circle(now)
        sine = tl.where(second, sine, -sine)
        b, c = b * cosine + b_other * sine, c * cosine + c_other * sine
    before = tl.load(last_k + owned * N + n, mask=n_in & taken, other=0.0)
    for part in tl.static_range((P + PB - 1) // PB):
        p = part * PB + tl.arange(0, PB)
        p_in = p < P
        exist = p_in[:, None] & n_in[None, :] & taken
        mine = state + owned * (P * N) + p[:, None] * N + n[None, :]
        old = tl.load(last_x + owned * P + p, mask=p_in & taken, other=0.0)
        value = tl.load(x + row * x_b + head * x_h + p, mask=p_in, other=0.0).to(tl.float32)
        Sp = tl.load(mine, mask=exist, other=0.0) + (older * old)[:, None] * before[None, :]
        Sp = decay * Sp + (newer * value)[:, None] * b[None, :]
        tl.store(mine, Sp, mask=exist)
        tl.store(last_x + owned * P + p, value, mask=p_in & taken)
        out = tl.sum(Sp * c[None, :], 1)
        if D is not None:
            out += tl.load(D + head) * value
        if z is not None:
            gate = tl.load(z + row * z_b + head * z_h + p, mask=p_in, other=0.0).to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        where = y + (row * heads + head) * P + p
        tl.store(where, tl.where(taken, out, 0.0).to(y.dtype.element_ty), mask=p_in)
    tl.store(last_k + owned * N + n, b, mask=n_in & taken)
