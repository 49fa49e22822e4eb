"""The gradient of selective_scan in Triton; see gpu_kernels.py for how time is cut and numbers are held."""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place
from stateline.ops.selective_scan.gpu_kernels import (
    add,
    at_steps,
    bias_of,
    carried,
    decay_of,
    given_of,
    inside_of,
    kernel,
    lanes,
    load,
    of_tokens,
    plus,
    rate_of,
    real_times,
    scaled,
    step_sizes,
    store,
    times,
    tokens,
    wide,
)


@kernel("skipped", "t", "blocks", "runs")
def channels(
    u, dt, dy, z, A, B, Cs, D, bias, before, after, table, tiles, du, ddt, dz, dinitial, sums, edges, prepared,
    skipped, t, blocks, runs, u_b, dt_b, dy_b, z_b, B_b, B_g, Cs_b, Cs_g,
    d: tl.constexpr, n: tl.constexpr, g: tl.constexpr, P: tl.constexpr, u_t: tl.constexpr,
    dt_t: tl.constexpr, dy_t: tl.constexpr, z_t: tl.constexpr, B_t: tl.constexpr,
    Cs_t: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of u, dt, z and the initial state, and sums over a chunk: a channel a lane, states one by one.

    before, after: (rows, K, n, P, d) states before tiles, and what reaches them from the future, conjugated.
    sums (chunks, n, S, d), for A and then B and C where they are constant; edges (chunks, 2, d), for D and the bias:
    zeros to begin with.   prepared (rows, K, T, 2, d) or None: step sizes and gradients before the gate.
    """
    local = tl.program_id(0) // blocks
    sequence, row, first, length, origin, exists = place(table, tiles, skipped + local, t, runs, K * T, REVERSE)
    if exists:
        c, live, group = lanes(tl.program_id(0) % blocks, blocks, d, g, C)
        shift = bias_of(bias, c, live, C)[None, :]
        held = local.to(tl.int64)
        chunk = skipped + held
        S: tl.constexpr = P * (3 - B_TOKEN - C_TOKEN)
        for k in range(0, K):
            s0 = first + k * T
            if (s0 < length) | ((k == 0) & (first == 0)):
                inside = inside_of(s0, length, live, T)
                raw = tokens(dt, dt_b, row, dt_t, origin, s0, c[None, :], inside, REVERSE, T) + shift
                size = step_sizes(raw, inside, SOFTPLUS)
                value = tokens(u, u_b, row, u_t, origin, s0, c[None, :], inside, REVERSE, T)
                given = given_of(dy, dy_b, dy_t, z, z_b, z_t, row, origin, s0, c, inside, REVERSE, T)
                pushed = tl.zeros((T, C), tl.float32)
                pulled, read = pushed, pushed
                for j in range(0, n):
                    if B_TOKEN:
                        b = of_tokens(B, B_b, row, B_t, B_g, group, origin, s0, length, j, n, P, REVERSE, T)
                    else:
                        b = wide(load(B + j * (P * d) + c, d, live, P))
                    if C_TOKEN:
                        out = of_tokens(Cs, Cs_b, row, Cs_t, Cs_g, group, origin, s0, length, j, n, P, REVERSE, T)
                    else:
                        out = wide(load(Cs + j * (P * d) + c, d, live, P))
                    A_c = load(A + j * (P * d) + c, d, live, P)
                    at = ((held * K + k) * n + j) * (P * d) + c
                    decays, x = decay_of(size, rate_of(A_c)), scaled(size * value, b)
                    _last, past = carried(load(before + at, d, live, P), decays, x, False, T)
                    q, reach = carried(load(after + at, d, live, P), decays, scaled(P * given, out), True, T)
                    exponent = times(reach, past)
                    pushed += real_times(reach, b)
                    pulled += real_times(exponent, wide(A_c))
                    if z is not None:
                        read += real_times(out, plus(past, x))
                    sums_at = sums + (chunk * n + j) * (S * d) + c
                    add(sums_at, d, _over_time(scaled(size, exponent)), live, True)
                    if not B_TOKEN:
                        add(sums_at + P * d, d, _over_time(scaled(size * value, reach)), live, True)
                    if not C_TOKEN:
                        add(sums_at + (S - P) * d, d, _over_time(scaled(P * given, plus(past, x))), live, True)
                    if dinitial is not None:
                        where = dinitial + ((sequence * d + c) * n + j) * P
                        store(where, 1, q, live & (k == 0) & (first == 0), True)
                _put(dy, z, D, du, ddt, dz, edges, prepared, raw, size, value, given, pushed, pulled, P * read, dy_b,
                     z_b, t, dy_t, z_t, chunk, held * K + k, row, origin, s0, c, live, inside, P, d, SOFTPLUS, REVERSE,
                     T)  # fmt: skip


@triton.jit
def _put(
    dy, z, D, du, ddt, dz, edges, prepared, raw, size, value, given, pushed, pulled, read, dy_b, z_b, t,
    dy_t: tl.constexpr, z_t: tl.constexpr, chunk, tile, row, origin, s0, c, live, inside, P: tl.constexpr,
    d: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's tokens, and its sums for D and the bias."""
    lane = c[None, :]
    skip = lane * 0.0
    if D is not None:
        skip = tl.load(D + c, mask=live, other=0.0)[None, :]
    du_at = at_steps(du + row * t * d, 0, row, d, origin, s0, REVERSE, T) + lane
    tl.store(du_at, (pushed * size + skip * given).to(du.dtype.element_ty), mask=inside)
    slope = pushed * value + pulled
    if SOFTPLUS:
        slope *= tl.sigmoid(raw)
    slope = tl.where(inside, slope, 0.0)
    ddt_at = at_steps(ddt + row * t * d, 0, row, d, origin, s0, REVERSE, T) + lane
    tl.store(ddt_at, slope.to(ddt.dtype.element_ty), mask=inside)
    if z is not None:
        gate = tokens(z, z_b, row, z_t, origin, s0, lane, inside, REVERSE, T)
        part = tl.sigmoid(gate)
        change = tokens(dy, dy_b, row, dy_t, origin, s0, lane, inside, REVERSE, T) * part * (1 + gate * (1 - part))
        dz_at = at_steps(dz + row * t * d, 0, row, d, origin, s0, REVERSE, T) + lane
        tl.store(dz_at, (change * (read + skip * value)).to(dz.dtype.element_ty), mask=inside)
    if prepared is not None:
        ready = prepared + (tile * T + tl.arange(0, T))[:, None] * (2 * d) + lane
        tl.store(ready, size, mask=live[None, :])
        tl.store(ready + d, P * given, mask=live[None, :])
    edges_at = edges + chunk * (2 * d) + c
    add(edges_at, d, (tl.sum(given * value, 0), tl.sum(slope, 0)), live)


@kernel("skipped", "t", "runs")
def projections(
    u, A, B, Cs, before, after, table, tiles, prepared, dB, dC, skipped, t, runs, u_b, B_b, B_g, Cs_b, Cs_g,
    d: tl.constexpr, n: tl.constexpr, g: tl.constexpr, P: tl.constexpr, u_t: tl.constexpr, B_t: tl.constexpr,
    Cs_t: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr,
    REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C per token: a state a lane, the group's channels in turn. A and constants are (d, n, P)."""
    local, group = tl.program_id(0) // K, tl.program_id(1)
    k = tl.program_id(0) % K
    _sequence, row, first, length, origin, exists = place(table, tiles, skipped + local, t, runs, K * T, REVERSE)
    s0 = first + k * T
    if exists & (s0 < length):
        j = tl.program_id(2) * N + tl.arange(0, N)
        live = j < n
        inside = inside_of(s0, length, live, T)
        tile = local.to(tl.int64) * K + k
        if B_TOKEN:
            B_at = at_steps(B, B_b, row, B_t, origin, s0, REVERSE, T) + group * B_g
            b = load(B_at + j[None, :], n, inside, P)
        if C_TOKEN:
            C_at = at_steps(Cs, Cs_b, row, Cs_t, origin, s0, REVERSE, T) + group * Cs_g
            out = load(C_at + j[None, :], n, inside, P)
        total_B, total_C = _nothing(P, T, N), _nothing(P, T, N)
        ready = prepared + (tile * T + tl.arange(0, T))[:, None] * (2 * d)
        u_at, held = at_steps(u, u_b, row, u_t, origin, s0, REVERSE, T), (s0 + tl.arange(0, T) < length)[:, None]
        c = (group * d + g - 1) // g
        last = ((group + 1) * d + g - 1) // g
        while c < last:
            own = (c * n + j) * P
            if not B_TOKEN:
                b = wide(load(B + own, 1, live, P))
            if not C_TOKEN:
                out = wide(load(Cs + own, 1, live, P))
            size = tl.load(ready + c, mask=held, other=0.0)
            given = tl.load(ready + (d + c), mask=held, other=0.0)
            drive = size * tl.load(u_at + c, mask=held, other=0.0).to(tl.float32)
            decays = decay_of(size, rate_of(load(A + own, 1, live, P)))
            at = (tile * n + j) * (P * d) + c
            x = scaled(drive, b)
            if C_TOKEN:
                _last, past = carried(load(before + at, d, live, P), decays, x, False, T)
                total_C = plus(total_C, scaled(given, plus(past, x)))
            if B_TOKEN:
                _last, reach = carried(load(after + at, d, live, P), decays, scaled(given, out), True, T)
                total_B = plus(total_B, scaled(drive, reach))
            c += 1
        begin = (row * t * g + group) * (n * P)
        lane = j[None, :]
        if B_TOKEN:
            store(at_steps(dB + begin, 0, row, g * n * P, origin, s0, REVERSE, T) + lane, n, total_B, inside, True)
        if C_TOKEN:
            store(at_steps(dC + begin, 0, row, g * n * P, origin, s0, REVERSE, T) + lane, n, total_C, inside, True)


@triton.jit
def _over_time(a):
    """Sums of numbers over a tile's steps."""
    total = (tl.sum(a[0], 0),)
    if len(a) == 2:
        total = total + (tl.sum(a[1], 0),)
    return total


@triton.jit
def _nothing(P: tl.constexpr, T: tl.constexpr, N: tl.constexpr):
    number = (tl.zeros((T, N), tl.float32),)
    if P == 2:
        number = number + (tl.zeros((T, N), tl.float32),)
    return number
