"""selective_scan in Triton, for every system: real or complex, B and C per token or constant, any number of states.

Time is cut into chunks of K tiles of T steps. A tile (T, C) lies in registers with all its steps in one lane, so that
running through it needs neither shuffles nor memory. Kernels:
`sweep` finds what each chunk leaves to the next, and the states before each tile; `combine` turns the former into the
state before each chunk; `outputs` walks chunks with a channel a lane. For the gradient `sweep` and `combine` also run
from the end of time; then every tile is on its own: `channels` has a channel a lane and walks the states, `projections`
has a state a lane and walks the channels, so that neither sum crosses lanes.

A number is a tuple (real,) or (real, imaginary). What reaches a state from the future is kept conjugated, which leaves
plain products everywhere; gradients are conjugated when stored. Systems come planar, (n, P, d), P parts of a number.

Suffixes: c channels of a program, i step of a tile, j state, k tile, s step of a sequence.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place

LOG2E = tl.constexpr(1.4426950408889634)
#: Quarter turns in a radian, in two float32 numbers.
QUARTERS, QUARTERS_REST = tl.constexpr(0.6366197466850281), tl.constexpr(2.5682553306261013e-08)
#: Added to a float32 number, leaves it rounded to a whole one in the last bits.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def times(a, b):
    """The product of two numbers."""
    if len(a) == 1:
        product = (a[0] * b[0],)
    else:
        product = (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])
    return product


@triton.jit
def real_times(a, b):
    """The real part of a product."""
    product = a[0] * b[0]
    if len(a) == 2:
        product -= a[1] * b[1]
    return product


@triton.jit
def scaled(x, a):
    """A number times a real one."""
    scaled = (x * a[0],)
    if len(a) == 2:
        scaled = scaled + (x * a[1],)
    return scaled


@triton.jit
def plus(a, b):
    """The sum of two numbers."""
    total = (a[0] + b[0],)
    if len(a) == 2:
        total = total + (a[1] + b[1],)
    return total


@triton.jit
def load(at, apart, live, P: tl.constexpr, CONJUGATE: tl.constexpr = False):
    """A number whose parts lie `apart`."""
    number = (tl.load(at, mask=live, other=0.0).to(tl.float32),)
    if P == 2:
        imaginary = tl.load(at + apart, mask=live, other=0.0).to(tl.float32)
        number = number + (-imaginary if CONJUGATE else imaginary,)
    return number


@triton.jit
def store(at, apart, number, live, CONJUGATE: tl.constexpr = False):
    """Write a number as `load` reads it."""
    tl.store(at, number[0].to(at.dtype.element_ty), mask=live)
    if len(number) == 2:
        imaginary = -number[1] if CONJUGATE else number[1]
        tl.store(at + apart, imaginary.to(at.dtype.element_ty), mask=live)


@triton.jit
def add(at, apart, number, live, CONJUGATE: tl.constexpr = False):
    """Add to memory that belongs to this lane alone."""
    tl.store(at, tl.load(at, mask=live, other=0.0) + number[0], mask=live)
    if len(number) == 2:
        imaginary = -number[1] if CONJUGATE else number[1]
        tl.store(at + apart, tl.load(at + apart, mask=live, other=0.0) + imaginary, mask=live)


@triton.jit
def rate_of(A):
    """A in the units of `_decay`: powers of two, and quarter turns in two numbers, whose sum float32 cannot hold."""
    rate = (A[0] * LOG2E,)
    if len(A) == 2:
        turns = A[1] * QUARTERS
        rate = rate + (turns, tl.fma(A[1], QUARTERS, -turns) + A[1] * QUARTERS_REST)
    return rate


@triton.jit
def _turned(size, quarters, rest):
    """size · exp(i π/2 quarters), given what exceeds whole quarters: polynomials on an eighth of a turn."""
    shifted = quarters + ROUND
    part = tl.minimum(tl.maximum(rest, -0.5), 0.5)
    q = part * part
    sine = part * (((-0.004602163 * q + 0.07968022286) * q - 0.64596347815) * q + 1.57079632196)
    cosine = (((0.00090674165 * q - 0.02086152899) * q + 0.25366941042) * q - 1.23370054937) * q + 1.0
    quarter = shifted.to(tl.int32, bitcast=True)
    swap = (quarter & 1) != 0
    real, imaginary = size * tl.where(swap, sine, cosine), size * tl.where(swap, cosine, sine)
    real = (real.to(tl.int32, bitcast=True) ^ (((quarter + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    imaginary = (imaginary.to(tl.int32, bitcast=True) ^ ((quarter & 2) << 30)).to(tl.float32, bitcast=True)
    return real, imaginary


@triton.jit
def decay_of(dt, rate):
    """exp(dt · A)."""
    size = tl.exp2(dt * rate[0])
    if len(rate) == 1:
        decay = (size,)
    else:
        quarters = dt * rate[1]
        whole = (quarters + ROUND) - ROUND
        decay = _turned(size, quarters, tl.fma(dt, rate[1], -whole) + dt * rate[2])
    return decay


@triton.jit
def _decay_long(dt, A):
    """exp(dt · A) for a float64 dt that sums many steps, whose turns float32 would blur."""
    size = tl.exp2((dt * A[0] * LOG2E).to(tl.float32))
    if len(A) == 1:
        decay = (size,)
    else:
        quarters = dt * A[1] * 0.6366197723675814
        quarters -= 4 * tl.floor(quarters * 0.25 + 0.5)
        near = quarters.to(tl.float32)
        decay = _turned(size, near, (quarters - ((near + ROUND) - ROUND)).to(tl.float32))
    return decay


@triton.jit
def softplus(x):
    """log(1 + exp(x)), keeping small values: log(1 + e) is 2 artanh(e / (2 + e)), a series in at most 1/9."""
    e = tl.exp(-tl.abs(x))
    ratio = e / (2.0 + e)
    q = ratio * ratio
    series = q * (1.0 / 15) + 1.0 / 13
    series = ((series * q + 1.0 / 11) * q + 1.0 / 9) * q + 1.0 / 7
    series = ((series * q + 1.0 / 5) * q + 1.0 / 3) * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * ratio * series


@triton.jit
def rows_of(tile, T: tl.constexpr):
    """The steps of a tile (T, C) as T vectors: moves nothing, since adding zeros to whole numbers compiles away."""
    index = tl.arange(0, T)[:, None]
    bits = tile.to(tl.int32, bitcast=True)
    rows = ()
    for i in tl.static_range(T):
        rows = rows + (tl.sum(tl.where(index == i, bits, 0), 0).to(tl.float32, bitcast=True),)
    return rows


@triton.jit
def stacked(rows, T: tl.constexpr):
    """T vectors as a tile (T, C)."""
    index = tl.arange(0, T)[:, None]
    tile = tl.where(index == 0, rows[0][None, :], 0.0)
    for i in tl.static_range(1, T):
        tile = tl.where(index == i, rows[i][None, :], tile)
    return tile


@triton.jit
def wide(a):
    """A number of each lane, for all steps of a tile."""
    spread = (a[0][None, :],)
    if len(a) == 2:
        spread = spread + (a[1][None, :],)
    return spread


@triton.jit
def carried(state, decays, drives, ADJOINT: tl.constexpr, T: tl.constexpr):
    """The state after a tile, h = a h + x, and a h at each step; with ADJOINT, backwards, q = a (q + x), and q + x."""
    a_real, x_real = rows_of(decays[0], T), rows_of(drives[0], T)
    if len(state) == 2:
        a_rest, x_rest = rows_of(decays[1], T), rows_of(drives[1], T)
    kept_real, kept_rest = (), ()
    for i in tl.static_range(T - 1 if ADJOINT else 0, -1 if ADJOINT else T, -1 if ADJOINT else 1):
        a, x = (a_real[i],), (x_real[i],)
        if len(state) == 2:
            a, x = (a_real[i], a_rest[i]), (x_real[i], x_rest[i])
        if ADJOINT:
            kept = plus(state, x)
            state = times(a, kept)
            kept_real = (kept[0],) + kept_real
            if len(state) == 2:
                kept_rest = (kept[1],) + kept_rest
        else:
            kept = times(a, state)
            state = plus(kept, x)
            kept_real = kept_real + (kept[0],)
            if len(state) == 2:
                kept_rest = kept_rest + (kept[1],)
    tiles = (stacked(kept_real, T),)
    if len(state) == 2:
        tiles = tiles + (stacked(kept_rest, T),)
    return state, tiles


@triton.jit
def at_steps(base, batch, row, stride: tl.constexpr, origin, s0, REVERSE: tl.constexpr, T: tl.constexpr):
    """Where the steps of a tile lie in a batch row, (T, 1)."""
    s = s0 + tl.arange(0, T)
    time = origin - s if REVERSE else origin + s
    return (base + row * batch + time.to(tl.int64) * stride)[:, None]


@triton.jit
def inside_of(s0, length, live, T: tl.constexpr):
    """Which entries of a tile (T, C) belong to the sequence."""
    return live[None, :] & (s0 + tl.arange(0, T) < length)[:, None]


@triton.jit
def tokens(x, batch, row, stride: tl.constexpr, origin, s0, lane, inside, REVERSE: tl.constexpr, T: tl.constexpr):
    """A tile of data in float32; `lane` places (1, C) or the like."""
    at = at_steps(x, batch, row, stride, origin, s0, REVERSE, T) + lane
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def step_sizes(raw, inside, SOFTPLUS: tl.constexpr):
    """Step sizes; those past the sequence are 0, which changes no state."""
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(inside, raw, 0.0)


@triton.jit
def lanes(block, blocks, d: tl.constexpr, g: tl.constexpr, C: tl.constexpr):
    """Of a block, which lies in one group: its channels, which of them exist, and the group."""
    group = block // (blocks // g)
    c = (group * d + g - 1) // g + block % (blocks // g) * C + tl.arange(0, C)
    return c, c < ((group + 1) * d + g - 1) // g, group


@triton.jit
def bias_of(bias, c, live, C: tl.constexpr):
    """dt_bias, or zeros."""
    shift = tl.zeros((C,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=live, other=0.0)
    return shift


@triton.jit
def of_tokens(
    X, batch, row, time: tl.constexpr, group_step, group, origin, s0, length, j, n: tl.constexpr, P: tl.constexpr,
    REVERSE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """State j of B or C at each step of a tile, (T, 1): few enough addresses that every lane loads its own copy."""
    inside = ((s0 + tl.arange(0, T) < length) & (j < n))[:, None]
    return load(at_steps(X + group * group_step + j, batch, row, time, origin, s0, REVERSE, T), n, inside, P)


@triton.jit
def given_of(dy, dy_b, dy_t: tl.constexpr, z, z_b, z_t: tl.constexpr, row, origin, s0, c, inside,
             REVERSE: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The gradient of what goes into the gate."""
    value = tokens(dy, dy_b, row, dy_t, origin, s0, c[None, :], inside, REVERSE, T)
    if z is not None:
        gate = tokens(z, z_b, row, z_t, origin, s0, c[None, :], inside, REVERSE, T)
        value *= gate * tl.sigmoid(gate)
    return value


#: Pointers whose alignment must stay unknown: a lane would take neighbouring channels at once, and a tile's steps would
#: be spread over lanes.
UNALIGNED = (
    "u", "dt", "dy", "z", "A", "B", "Cs", "X", "starts", "out", "y", "state",
    "before", "after", "du", "ddt", "dz", "dB", "dC", "prepared", "sums", "edges",
)  # fmt: skip


def kernel(*numbers: str):
    """`triton.jit` for kernels over tiles; `numbers` are arguments that are compiled for no particular value."""

    def compiled(function):
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        unaligned = [name for name in UNALIGNED if name in names]
        return triton.jit(do_not_specialize=numbers, do_not_specialize_on_alignment=unaligned)(function)

    return compiled


@kernel("skipped", "t", "blocks", "runs")
def sweep(
    u, dt, dy, z, A, X, bias, starts, out, sums, table, tiles, skipped, t, blocks, runs, u_b, dt_b, dy_b, z_b, X_b, X_g,
    d: tl.constexpr, n: tl.constexpr, g: tl.constexpr, P: tl.constexpr, u_t: tl.constexpr, dt_t: tl.constexpr,
    dy_t: tl.constexpr, z_t: tl.constexpr, X_t: tl.constexpr, TOKEN: tl.constexpr,
    ADJOINT: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The state at each chunk's end from nothing, (rows, n, P, d), or those before its tiles, (rows, K, n, P, d).

    The former without `starts`, the states before each chunk; also its summed step sizes (rows, d). X is B, or with
    ADJOINT, against time and conjugated, C. A program takes N states of a chunk, and a channel a lane.
    """
    local, first_state = tl.program_id(0) // blocks, tl.program_id(1) * N
    _sequence, row, first, length, origin, exists = place(table, tiles, skipped + local, t, runs, K * T, REVERSE)
    if exists:
        c, live, group = lanes(tl.program_id(0) % blocks, blocks, d, g, C)
        shift = bias_of(bias, c, live, C)[None, :]
        held = local.to(tl.int64)
        chunk = skipped + held
        rates, states = (), ()
        for m in tl.static_range(N):
            j = first_state + m
            A_c = load(A + j * (P * d) + c, d, live & (j < n), P)
            rates = rates + (rate_of(A_c),)
            if starts is None:
                states = states + (scaled(0.0, A_c),)
            else:
                states = states + (load(starts + (chunk * n + j) * (P * d) + c, d, live & (j < n), P),)
        elapsed = tl.zeros((C,), tl.float64)
        for turn in range(0, K):
            k = K - 1 - turn if ADJOINT else turn
            s0 = first + k * T
            inside = inside_of(s0, length, live, T)
            if starts is not None:
                for m in tl.static_range(N):
                    j = first_state + m
                    store(out + ((held * K + k) * n + j) * (P * d) + c, d, states[m], live & (j < n))
            size = step_sizes(tokens(dt, dt_b, row, dt_t, origin, s0, c[None, :], inside, REVERSE, T) + shift, inside,
                              SOFTPLUS)  # fmt: skip
            if ADJOINT:
                drive = P * given_of(dy, dy_b, dy_t, z, z_b, z_t, row, origin, s0, c, inside, REVERSE, T)
            else:
                drive = size * tokens(u, u_b, row, u_t, origin, s0, c[None, :], inside, REVERSE, T)
            if starts is None:
                elapsed += tl.sum(size.to(tl.float64), 0)
            moved = ()
            for m in tl.static_range(N):
                j = first_state + m
                if TOKEN:
                    x = of_tokens(X, X_b, row, X_t, X_g, group, origin, s0, length, j, n, P, REVERSE, T)
                else:
                    x = wide(load(X + j * (P * d) + c, d, live & (j < n), P))
                state, _kept = carried(states[m], decay_of(size, rates[m]), scaled(drive, x), ADJOINT, T)
                moved = moved + (state,)
            states = moved
        if starts is None:
            for m in tl.static_range(N):
                j = first_state + m
                store(out + (chunk * n + j) * (P * d) + c, d, states[m], live & (j < n))
            if sums is not None:
                tl.store(sums + chunk * d + c, elapsed, mask=live & (first_state == 0))


@triton.jit(do_not_specialize=("t", "runs", "blocks"))
def combine(
    ends, sums, A, initial, table, firsts, t, runs, blocks,
    d: tl.constexpr, n: tl.constexpr, P: tl.constexpr, ADJOINT: tl.constexpr, ONE: tl.constexpr, L: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """States at the ends of chunks become those before them, in place; ONE: no sequence has more than one chunk."""
    sequence, j = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    c, live, _group = lanes(tl.program_id(0) % blocks, blocks, d, 1, C)
    A_c = load(A + j * (P * d) + c, d, live, P)
    state = scaled(0.0, A_c)
    if initial is not None:
        state = load(initial + ((sequence * d + c) * n + j) * P, 1, live, P, ADJOINT)
    if table is None:
        first, count = sequence * runs, runs
    else:
        first = tl.load(firsts + sequence)
        length = tl.load(table + 3 * sequence + 2) - tl.load(table + 3 * sequence + 1)
        count = tl.maximum((length + L - 1) // L, 1)
    if ONE:
        store(ends + (first * n + j) * (P * d) + c, d, state, live)
    else:
        done = 0
        while done < count:
            row = first + (count - 1 - done if ADJOINT else done)
            at = ends + (row * n + j) * (P * d) + c
            end = load(at, d, live, P)
            store(at, d, state, live)
            decay = _decay_long(tl.load(sums + row * d + c, mask=live, other=0.0), A_c)
            state = plus(times(decay, state), end)
            done += 1


@kernel("t", "blocks", "runs")
def outputs(
    u, dt, z, A, B, Cs, D, bias, starts, table, tiles, y, state, t, blocks, runs,
    u_b, dt_b, z_b, B_b, B_g, Cs_b, Cs_g, d: tl.constexpr, n: tl.constexpr, g: tl.constexpr,
    P: tl.constexpr, u_t: tl.constexpr, dt_t: tl.constexpr, z_t: tl.constexpr, B_t: tl.constexpr,
    Cs_t: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y, and the last states (n_seq, d, n, P), from the states before chunks, which serve as memory on the way."""
    chunk = tl.program_id(0) // blocks
    sequence, row, first, length, origin, exists = place(table, tiles, chunk, t, runs, K * T, REVERSE)
    if exists:
        c, live, group = lanes(tl.program_id(0) % blocks, blocks, d, g, C)
        shift = bias_of(bias, c, live, C)[None, :]
        states = starts + chunk.to(tl.int64) * (n * P * d) + c
        for k in range(0, K):
            s0 = first + k * T
            if s0 < length:
                inside = inside_of(s0, length, live, T)
                lane = c[None, :]
                size = step_sizes(tokens(dt, dt_b, row, dt_t, origin, s0, lane, inside, REVERSE, T) + shift, inside,
                                  SOFTPLUS)  # fmt: skip
                value = tokens(u, u_b, row, u_t, origin, s0, lane, inside, REVERSE, T)
                drive = size * value
                total = tl.zeros((T, C), tl.float32)
                for j in range(0, n):
                    if B_TOKEN:
                        b = of_tokens(B, B_b, row, B_t, B_g, group, origin, s0, length, j, n, P, REVERSE, T)
                    else:
                        b = wide(load(B + j * (P * d) + c, d, live, P))
                    if C_TOKEN:
                        out = of_tokens(Cs, Cs_b, row, Cs_t, Cs_g, group, origin, s0, length, j, n, P, REVERSE, T)
                    else:
                        out = wide(load(Cs + j * (P * d) + c, d, live, P))
                    rate = rate_of(load(A + j * (P * d) + c, d, live, P))
                    x = scaled(drive, b)
                    h, past = carried(load(states + j * (P * d), d, live, P), decay_of(size, rate), x, False, T)
                    total += real_times(out, plus(past, x))
                    store(states + j * (P * d), d, h, live)
                total = P * total
                if D is not None:
                    total += tl.load(D + c, mask=live, other=0.0)[None, :] * value
                if z is not None:
                    gate = tokens(z, z_b, row, z_t, origin, s0, lane, inside, REVERSE, T)
                    total *= gate * tl.sigmoid(gate)
                y_at = at_steps(y + row * t * d, 0, row, d, origin, s0, REVERSE, T) + lane
                tl.store(y_at, total.to(y.dtype.element_ty), mask=inside)
        if first + K * T >= length:
            for j in range(0, n):
                last = load(states + j * (P * d), d, live, P)
                store(state + ((sequence * d + c) * n + j) * P, 1, last, live)


@triton.jit
def step(
    state, u, dt, z, A, B, Cs, D, bias, index, y, state_b, slots, u_b, dt_b, z_b, B_b, B_g, Cs_b, Cs_g,
    d: tl.constexpr, n: tl.constexpr, g: tl.constexpr, P: tl.constexpr,
    B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, SOFTPLUS: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One token, in place: a program takes a row and some channels, N states at once. A and constants are (d, n, P)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    live = c < d
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = live & (slot >= 0) & (slot < slots)
    value = tl.load(u + row * u_b + c, mask=taken, other=0.0).to(tl.float32)
    size = tl.load(dt + row * dt_b + c, mask=taken, other=0.0).to(tl.float32) + bias_of(bias, c, live, C)
    if SOFTPLUS:
        size = softplus(size)
    total = tl.zeros((C,), tl.float32)
    for block in range(0, n, N):
        j = block + tl.arange(0, N)
        known = taken[:, None] & (j < n)[None, :]
        own = (c[:, None] * n + j[None, :]) * P
        B_at, C_at = B + own, Cs + own
        group = (c * g // d)[:, None]
        if B_TOKEN:
            B_at = B + row * B_b + group * B_g + j[None, :]
        if C_TOKEN:
            C_at = Cs + row * Cs_b + group * Cs_g + j[None, :]
        at = state + slot * state_b + own
        a = decay_of(size[:, None], rate_of(load(A + own, 1, known, P)))
        h = plus(
            times(a, load(at, 1, known, P)), scaled((size * value)[:, None], load(B_at, n if B_TOKEN else 1, known, P))
        )
        store(at, 1, h, known)
        total += tl.sum(real_times(load(C_at, n if C_TOKEN else 1, known, P), h), 1)
    total = P * total
    if D is not None:
        total += tl.load(D + c, mask=live, other=0.0) * value
    if z is not None:
        gate = tl.load(z + row * z_b + c, mask=taken, other=0.0).to(tl.float32)
        total *= gate * tl.sigmoid(gate)
    tl.store(y + row * d + c, tl.where(slot >= 0, total, 0.0).to(y.dtype.element_ty), mask=live)
