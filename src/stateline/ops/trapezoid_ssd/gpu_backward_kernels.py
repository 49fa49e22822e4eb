"""trapezoid_ssd's gradients in Triton. A program of `inputs` and `projections` takes a head of a tile.

They read the state before the tile and the gradient that reaches the one after it, as ssd's do; k and q are the head's
own, so that nothing is summed over heads here, and the gate's gradient is found on the way. What turns at a step and
all after it gets the sum of what each of these gives; of pairs that both lie after the step it gets nothing, so that
sums end at the tile: what later tiles give is what the state between has turned, which it and its gradient tell.
`unturn` brings gradients of k and q back to B and C and sums them over heads, `finish` those of steps and angles over
time. A last state is read as it is, not turned, which `unmoved` takes off. Nothing is added by atomics.

Names as in gpu_kernels.py.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.ssd.gpu_backward_kernels import between
from stateline.ops.ssd.gpu_kernels import at, clock_of, decays, on_diagonal, operand, put, rows, silu
from stateline.ops.trapezoid_ssd.gpu_kernels import circle, halves_of, pair_of

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def slope_of_silu(x):
    """The derivative of x · sigmoid(x)."""
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def part_of(state, part, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr):
    """A part of a head's state, (PB, NB); zeros beyond the last."""
    p, n = part * PB + tl.arange(0, PB), tl.arange(0, NB)
    exist = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(state + p[:, None] * N + n[None, :], mask=exist, other=0.0)


@triton.jit
def facing(state, reach, R: tl.constexpr, NB: tl.constexpr):
    """Of rows of a state and of its gradient, what scaling them and what turning their pairs gives, (NB / 2)."""
    a, b = halves_of(state.to(tl.float32), R, NB)
    grad_a, grad_b = halves_of(reach.to(tl.float32), R, NB)
    return tl.sum(tl.sum(a * grad_a + b * grad_b, 1), 0), tl.sum(grad_a * b - grad_b * a, 0)


@triton.jit
def crossed(x, grad, R: tl.constexpr, NB: tl.constexpr):
    """What turning the pairs of x (R, NB) gives, (R, NB / 2), in radians."""
    a, b = halves_of(x.to(tl.float32), R, NB)
    grad_a, grad_b = halves_of(grad, R, NB)
    return a * grad_b - b * grad_a


@triton.jit(do_not_specialize=("t", "each"))
def inputs(
    dy, x, z, k, q, D, clock, own, table, tiles, before, after, last_dx, dx, dz, products, slopes, dD, t, each,
    dx_t, dz_t, dy_b, dy_t, dy_h, x_b, x_t, x_h, z_b, z_t, z_h,
    heads: tl.constexpr, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """dx and dz; products (tile, h, Q, Q), the gradient of q·k of two steps; dD (tile, h); slopes (tile, h, 3, Q),
    those of exponents, sizes and own weights. last_dx: what the last token's x gets from a state."""
    number, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        mine = number.to(tl.int64) * heads + head
        n, s = tl.arange(0, NB), tl.arange(0, Q)
        k_at = at(k + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
        q_at = at(q + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
        b, c = rows(k_at, n, N, first, length, Q, NB), rows(q_at, n, N, first, length, Q, NB)
        before += mine * (P * N)
        after += mine * (P * N)
        state, reach = part_of(before, 0, P, N, PB, NB), part_of(after, 0, P, N, PB, NB)  # early, to be there in time
        both = tl.zeros((Q, Q), tl.float32)
        for part in tl.range(0, (P + PB - 1) // PB, num_stages=1):
            p = part * PB + tl.arange(0, PB)
            given = rows(at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            slope = rows(at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            slope, given = slope.to(tl.float32), operand(given, HALF)
            if z is not None:
                z_at = at(z + head * z_h, row, z_b, z_t, origin, first, Q, REVERSE)
                slope *= silu(rows(z_at, p, P, first, length, Q, PB).to(tl.float32))
            grad = operand(slope, HALF)
            both = tl.dot(grad, tl.trans(given), both, input_precision=PRECISION)
            if HALF and z is not None:  # what bfloat16 leaves out of what went through a gate
                both = tl.dot(operand(slope - grad.to(tl.float32), HALF), tl.trans(given), both)
        if D is not None:
            tl.store(dD + mine, tl.sum(tl.sum(tl.where(s[:, None] == s[None, :], both, 0.0), 1), 0))
        size, enter, leave, exponent, rest, _whole = clock_of(clock, number.to(tl.int64), head, heads, Q, HALF)
        apart = on_diagonal(decays(exponent, rest, Q, HALF), s * 0.0, Q)
        weight = on_diagonal(apart * size[None, :], tl.load(own + mine * Q + s), Q)
        product = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        matrix = operand(product * weight, HALF)
        tl.store(products + (mine * Q + s)[:, None] * Q + s[None, :], operand(both * weight, HALF))
        both *= product
        tl.store(slopes + (mine * 3 + 2) * Q + s, tl.sum(tl.where(s[:, None] == s[None, :], both, 0.0), 0))
        both *= apart
        direct = tl.sum(both, 0)
        both *= size[None, :]
        across = tl.sum(both, 1) if HALF else between(both, s, PRECISION)
        into, later = tl.zeros((Q,), tl.float32), tl.zeros((Q,), tl.float32)
        for part in tl.range(0, (P + PB - 1) // PB, num_stages=1):
            p = part * PB + tl.arange(0, PB)
            slope = rows(at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            given = rows(at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            slope, value, given = slope.to(tl.float32), given.to(tl.float32), operand(given, HALF)
            out = tl.dot(c, tl.trans(state), input_precision=PRECISION) * enter[:, None]
            state = part_of(before, part + 1, P, N, PB, NB)
            if z is None:
                later += tl.sum(slope * out, 1)
            else:
                z_at = at(z + head * z_h, row, z_b, z_t, origin, first, Q, REVERSE)
                gate = rows(z_at, p, P, first, length, Q, PB).to(tl.float32)
                later += tl.sum(slope * silu(gate) * out, 1)
                y = tl.dot(matrix, given, out, input_precision=PRECISION)
                if D is not None:
                    y += tl.load(D + head) * value
                y *= slope * slope_of_silu(gate)
                dz_at = at(dz + head * P, row * t, dz_t, dz_t, origin, first, Q, REVERSE)
                put(dz_at, p, P, first, length, y, Q, PB)
                slope *= silu(gate)
            du = tl.dot(b, tl.trans(reach), input_precision=PRECISION) * leave[:, None]
            reach = part_of(after, part + 1, P, N, PB, NB)
            into += tl.sum(value * du, 1)
            du = tl.dot(tl.trans(matrix), operand(slope, HALF), du * size[:, None], input_precision=PRECISION)
            if D is not None:
                du += tl.load(D + head) * slope
            if last_dx is not None:
                more = tl.load(last_dx + (sequence * heads + head) * P + p, mask=p < P, other=0.0)
                du += tl.where((first + s + 1 == length)[:, None], more[None, :], 0.0)
            dx_at = at(dx + head * P, row * t, dx_t, dx_t, origin, first, Q, REVERSE)
            put(dx_at, p, P, first, length, du, Q, PB)
        timed(direct + into, across, into * size, size, later, slopes + mine * (3 * Q), HALF, Q)


@triton.jit
def timed(direct, across, into, size, later, out, HALF: tl.constexpr, Q: tl.constexpr):
    """Store gradients of each step's exponent and size, (2, Q).

    A step's exponent gets the sum over pairs of an earlier input and an output at or after it, as in ssd's gradient,
    here but for what scaling the state before gives. across: pairs of the tile, summed for each output or, unless HALF,
    around each step; into: what inputs add to the state after it.
    """
    s = tl.arange(0, Q)
    if HALF:
        exponent = tl.cumsum(later + across - direct * size, 0, reverse=True) + tl.sum(into, 0)
    else:
        exponent = tl.cumsum(later, 0, reverse=True) + across
        exponent += tl.sum(tl.where(s[:, None] < s[None, :], into[:, None], 0.0), 0)
    tl.store(out + s, exponent)
    tl.store(out + Q + s, direct)


@triton.jit(do_not_specialize=("t", "each"))
def projections(
    dy, x, z, k, q, clock, table, tiles, before, after, last_dk, products, dk, dq, turns, carries, crossing, t, each,
    dy_b, dy_t, dy_h, x_b, x_t, x_h, z_b, z_t, z_h,
    heads: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, Q: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """dk and dq of what is turned, and for `finish`: turns (tile, h, Q, S), what steps turn; carries (tile, h, S),
    what those after the tile have turned; crossing (tile, h), what scaling the state gives.

    last_dk: gradient of the last token's k that a state gets.
    """
    number, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        mine = number.to(tl.int64) * heads + head
        n, s, i = tl.arange(0, NB), tl.arange(0, Q), tl.arange(0, NB // 2)
        where, used = (mine * Q + s)[:, None] * S + i[None, :], (s >= 0)[:, None] & (i < S)[None, :]
        size, enter, leave, _exponent, _rest, whole = clock_of(clock, number.to(tl.int64), head, heads, Q, HALF)
        before += mine * (P * N)
        after += mine * (P * N)
        state, reach = part_of(before, 0, P, N, PB, NB), part_of(after, 0, P, N, PB, NB)
        scaled, carry = facing(state, reach, PB, NB)
        for part in tl.range(1, (P + PB - 1) // PB):
            more = facing(part_of(before, part, P, N, PB, NB), part_of(after, part, P, N, PB, NB), PB, NB)
            scaled += more[0]
            carry += more[1]
        tl.store(crossing + mine, scaled * whole)
        dproduct = tl.load(products + (mine * Q + s)[:, None] * Q + s[None, :])
        k_at = at(k + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
        b = rows(k_at, n, N, first, length, Q, NB)
        grads = tl.zeros((Q, NB), tl.float32)  # of k, then of q
        for part in tl.range(0, (P + PB - 1) // PB, num_stages=1):
            p = part * PB + tl.arange(0, PB)
            value = rows(at(x + head * x_h, row, x_b, x_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            value = value.to(tl.float32) * (leave * size)[:, None]
            grads = tl.dot(operand(value, HALF), reach, grads, input_precision=PRECISION)
            reach = part_of(after, part + 1, P, N, PB, NB)
        if S > 0:
            carry = carry * whole - tl.sum(crossed(b, grads, Q, NB), 0)
            tl.store(carries + mine * S + i, TURN * carry, mask=i < S)
        q_at = at(q + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE)
        c = rows(q_at, n, N, first, length, Q, NB)
        grads = tl.dot(tl.trans(dproduct), c, grads, input_precision=PRECISION)
        angle = tl.zeros((Q, NB // 2), tl.float32)
        if S > 0:
            angle = crossed(b, grads, Q, NB)
        if last_dk is not None:
            more = tl.load(last_dk + (sequence * heads + head) * N + n, mask=n < N, other=0.0)
            grads += tl.where((first + s + 1 == length)[:, None], more[None, :], 0.0)
        put(at(dk + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE), n, N, first, length, grads, Q,
            NB)  # fmt: skip
        grads = tl.zeros((Q, NB), tl.float32)
        for part in tl.range(0, (P + PB - 1) // PB, num_stages=1):
            p = part * PB + tl.arange(0, PB)
            slope = rows(at(dy + head * dy_h, row, dy_b, dy_t, origin, first, Q, REVERSE), p, P, first, length, Q, PB)
            slope = slope.to(tl.float32) * enter[:, None]
            if z is not None:
                z_at = at(z + head * z_h, row, z_b, z_t, origin, first, Q, REVERSE)
                slope *= silu(rows(z_at, p, P, first, length, Q, PB).to(tl.float32))
            grads = tl.dot(operand(slope, HALF), state, grads, input_precision=PRECISION)
            state = part_of(before, part + 1, P, N, PB, NB)
        grads = tl.dot(dproduct, b, grads, input_precision=PRECISION)
        if S > 0:
            tl.store(turns + where, TURN * (angle + crossed(c, grads, Q, NB)), mask=used)
        put(at(dq + head * N, row * t, heads * N, heads * N, origin, first, Q, REVERSE), n, N, first, length, grads, Q,
            NB)  # fmt: skip


@triton.jit
def unmoved(
    state, dstate, last_k, last_dk, dangle, out,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """What turns all steps of a sequence and head gets: dangle and what turns its last k, less what turning the last
    state would give."""
    mine = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NB // 2)
    state += mine * (P * N)
    dstate += mine * (P * N)
    total = tl.zeros((NB // 2,), tl.float32)
    for part in tl.range(0, (P + PB - 1) // PB):
        total += facing(part_of(state, part, P, N, PB, NB), part_of(dstate, part, P, N, PB, NB), PB, NB)[1]
    a, b = tl.load(last_k + mine * N + 2 * i, mask=i < S, other=0.0), tl.load(last_k + mine * N + 2 * i + 1, mask=i < S)
    grad_a = tl.load(last_dk + mine * N + 2 * i, mask=i < S, other=0.0)
    grad_b = tl.load(last_dk + mine * N + 2 * i + 1, mask=i < S, other=0.0)
    given = tl.load(dangle + mine * S + i, mask=i < S, other=0.0)
    tl.store(out + mine * S + i, given + TURN * (a * grad_b - b * grad_a - total), mask=i < S)


@triton.jit(do_not_specialize=("t", "each"))
def unturn(
    dk, dq, angles, table, tiles, dB, dC, partial, t, each,
    heads: tl.constexpr, groups: tl.constexpr, N: tl.constexpr, S: tl.constexpr, INTERLEAVED: tl.constexpr,
    REVERSE: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dB and dC of R steps of a tile and a group; partial (Q / R of each tile, 2, h·N): sums for their biases."""
    number, rest = tl.program_id(0) // (Q // R * groups), tl.program_id(0) % (Q // R * groups)
    cut, group = rest // groups, rest % groups
    _sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        s, n, i = tl.arange(0, R), tl.arange(0, NB), tl.arange(0, NB // 2)
        first += cut * R
        live = first + s < length
        one, two = pair_of(N, NB, INTERLEAVED)
        tile = number.to(tl.int64)
        a, b = tl.zeros((R, NB // 2), tl.float32), tl.zeros((R, NB // 2), tl.float32)
        c, d = tl.zeros((R, NB // 2), tl.float32), tl.zeros((R, NB // 2), tl.float32)
        begin, end = (group * heads + groups - 1) // groups, ((group + 1) * heads + groups - 1) // groups
        for head in tl.range(begin, end, num_stages=STAGES):
            k_at = at(dk + head * N, row * t, heads * N, heads * N, origin, first, R, REVERSE)
            q_at = at(dq + head * N, row * t, heads * N, heads * N, origin, first, R, REVERSE)
            key_a, key_b = halves_of(rows(k_at, n, N, first, length, R, NB).to(tl.float32), R, NB)
            query_a, query_b = halves_of(rows(q_at, n, N, first, length, R, NB).to(tl.float32), R, NB)
            if S > 0:
                where = ((tile * heads + head) * Q + cut * R + s)[:, None] * S + i[None, :]
                cosine, sine = circle(tl.load(angles + where, mask=live[:, None] & (i < S)[None, :], other=0.0))
                key_a, key_b = key_a * cosine + key_b * sine, key_b * cosine - key_a * sine
                query_a, query_b = query_a * cosine + query_b * sine, query_b * cosine - query_a * sine
            a, b, c, d = a + key_a, b + key_b, c + query_a, d + query_b
            if partial is not None:
                out = partial + ((tile * (Q // R) + cut) * (2 * heads) + head) * N
                tl.store(out + one, tl.sum(key_a, 0), mask=one < N)
                tl.store(out + two, tl.sum(key_b, 0), mask=two < N)
                tl.store(out + heads * N + one, tl.sum(query_a, 0), mask=one < N)
                tl.store(out + heads * N + two, tl.sum(query_b, 0), mask=two < N)
        b_at = at(dB + group * N, row * t, groups * N, groups * N, origin, first, R, REVERSE)
        c_at = at(dC + group * N, row * t, groups * N, groups * N, origin, first, R, REVERSE)
        if INTERLEAVED:
            put(b_at, n, N, first, length, tl.reshape(tl.join(a, b), (R, NB)), R, NB)
            put(c_at, n, N, first, length, tl.reshape(tl.join(c, d), (R, NB)), R, NB)
        else:
            kind = dB.dtype.element_ty
            tl.store(b_at + one[None, :], a.to(kind), mask=live[:, None] & (one < N)[None, :])
            tl.store(b_at + two[None, :], b.to(kind), mask=live[:, None] & (two < N)[None, :])
            kind = dC.dtype.element_ty
            tl.store(c_at + one[None, :], c.to(kind), mask=live[:, None] & (one < N)[None, :])
            tl.store(c_at + two[None, :], d.to(kind), mask=live[:, None] & (two < N)[None, :])


@triton.jit(do_not_specialize=("t", "each", "size_of_share"))
def finish(
    dt, A, blend, rates, slopes, crossing, turns, carries, dangle, edge, table, tiles, ddt, dA, dblend, drates, start,
    t, each, size_of_share,
    heads: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr, SHARES: tl.constexpr, TAKEN: tl.constexpr,
    Q: tl.constexpr, SB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, A and blend of a tile and TAKEN heads, and a share of those of rates, (SHARES, b, t, S).

    dangle: what turns all steps gets.   start: what the first one gets.   edge: (n_seq, h) what the weight of the token
    before the first gets.
    """
    number, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    sequence, row, first, length, origin, exists = place(table, tiles, number, t, each, Q, REVERSE)
    if exists:
        s, i = tl.arange(0, Q), tl.arange(0, SB)
        live, tile = first + s < length, number.to(tl.int64)
        drate = tl.zeros((Q, SB), tl.float32)
        if S > 0:
            rate = rows(at(rates, row * t, S, S, origin, first, Q, REVERSE), i, S, first, length, Q, SB)
        for head in tl.range(share * TAKEN, tl.minimum((share + 1) * TAKEN, heads), num_stages=STAGES):
            mine, there = tile * heads + head, live[:, None]
            step_at = at(dt + head, row * t, heads, heads, origin, first, Q, REVERSE)
            blend_at = at(blend + head, row * t, heads, heads, origin, first, Q, REVERSE)
            rate_at = at(A + head, row * t, heads, heads, origin, first, Q, REVERSE)
            step, newer = tl.load(step_at, mask=there, other=0.0), tl.load(blend_at, mask=there, other=0.0)
            decay = tl.load(rate_at, mask=there, other=0.0)
            at_step = slopes + mine * (3 * Q) + s[:, None]
            exponent = tl.load(at_step, mask=there, other=0.0) + tl.load(crossing + mine)
            size = tl.load(at_step + Q, mask=there, other=0.0)
            both = size + tl.load(at_step + 2 * Q, mask=there, other=0.0)
            earlier = tl.where(s == 0, mine - heads, mine) * (3 * Q) + Q + tl.where(s == 0, Q - 1, s - 1)
            earlier = tl.load(slopes + earlier[:, None], mask=(live & (first + s > 0))[:, None], other=0.0)
            if edge is not None:
                before = tl.load(edge + sequence * heads + head)
                earlier += tl.where(first + s == 0, before, 0.0)[:, None]
            grad = exponent * decay + both * newer + earlier * (1.0 - newer)
            if S > 0:
                where = (mine * Q + s)[:, None] * S + i[None, :]
                turned = tl.load(turns + where, mask=there & (i < S)[None, :], other=0.0)
                reach = tl.load(carries + mine * S + i, mask=i < S, other=0.0)
                reach += tl.load(dangle + (sequence * heads + head) * S + i, mask=i < S, other=0.0)
                turned = tl.cumsum(turned, 0, reverse=True) + reach[None, :]
                drate += step * turned
                grad += tl.sum(rate * turned, 1)[:, None]
                if start is not None:
                    into = start + (sequence * heads + head) * S + i[None, :] + s[:, None] * 0
                    tl.store(into, turned, mask=(live & (first + s == 0))[:, None] & (i < S)[None, :])
            tl.store(at(ddt + head, row * t, heads, heads, origin, first, Q, REVERSE), grad, mask=there)
            grad = exponent * step
            tl.store(at(dA + head, row * t, heads, heads, origin, first, Q, REVERSE), grad, mask=there)
            grad = step * (both - earlier)
            tl.store(at(dblend + head, row * t, heads, heads, origin, first, Q, REVERSE), grad, mask=there)
        if S > 0:
            drates += share * size_of_share.to(tl.int64)
            put(at(drates, row * t, S, S, origin, first, Q, REVERSE), i, S, first, length, drate, Q, SB)
