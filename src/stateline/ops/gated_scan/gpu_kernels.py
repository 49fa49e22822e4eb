"""gated_scan in Triton: a program walks one sequence, the state in registers; of a diagonal system a block of numbers.

A dense A stays in registers too: a step is its product with the state, summed over columns, in the gradient also with
what comes back, summed over rows. Loads of a few steps are under way before the first of them is used.
A linear diagonal system goes a tile of steps at a time, each by a parallel scan: composing two steps h -> a h + b gives
another, whichever are composed first.

Suffixes: s step of a sequence, running forwards or backwards through memory; c numbers of the state.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(x, F: tl.constexpr):
    """f(x); F as in gpu.py."""
    if F == 1:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    elif F == 2:
        a = tl.abs(x)
        e = tl.exp(-2 * a)
        large = (1 - e) / (1 + e)
        q = x * x
        above = ((q + 378) * q + 17325) * q + 135135  # a continued fraction: 1 - e has few bits where x is small
        below = ((28 * q + 3150) * q + 62370) * q + 135135
        x = tl.where(a < 0.5, x * above / below, tl.where(x < 0, -large, large))
    elif F == 3:
        x = tl.sigmoid(x)
    return x


@triton.jit
def _slope(y, F: tl.constexpr):
    """f'(x) from y = f(x)."""
    if F == 1:
        y = tl.where(y > 0, 1.0, 0.0)
    elif F == 2:
        y = 1 - y * y
    elif F == 3:
        y = y * (1 - y)
    else:
        y = y * 0 + 1
    return y


@triton.jit
def _place(table, sequence, t, REVERSE: tl.constexpr):
    """Batch row, steps, place of step 0."""
    if table is None:
        row, start, stop = sequence, 0, t
    else:
        row = tl.load(table + 3 * sequence)
        start = tl.load(table + 3 * sequence + 1).to(tl.int32)
        stop = tl.load(table + 3 * sequence + 2).to(tl.int32)
    origin = stop - 1 if REVERSE else start
    return row, stop - start, origin


@triton.jit
def _matrix(A, c, live, n, DENSE: tl.constexpr):
    if DENSE:
        both = live[:, None] & live[None, :]
        value = tl.load(A + c[:, None] * n + c[None, :], mask=both, other=0.0)
    else:
        value = tl.load(A + c, mask=live, other=0.0)
    return value


@triton.jit
def _times(A, h, DENSE: tl.constexpr):
    """A h."""
    if DENSE:
        out = tl.sum(A * h[None, :], 1)
    else:
        out = A * h
    return out


@triton.jit
def _times_transposed(A, d, DENSE: tl.constexpr):
    """Aᵀ d."""
    if DENSE:
        out = tl.sum(A * d[:, None], 0)
    else:
        out = A * d
    return out


@triton.jit
def _rows(at, stride, s0, stop, live, TILE: tl.constexpr, UP: tl.constexpr):
    """TILE rows of steps s0, s0 + 1, … (UP), or s0, s0 - 1, …; `at` is where step s0 lies, others are a stride away."""
    rows = ()
    for i in tl.static_range(TILE):
        inside = (s0 + i < stop) if UP else (s0 - i >= 0)
        rows = rows + (tl.load(at + i * stride, mask=live & inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit(do_not_specialize=("t", "blocks"))
def forward(
    v, g, A, initial, table, h, state, t, blocks, v_b, v_t, g_b, g_t, n,
    DENSE: tl.constexpr, F: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """States before each token and after the last; one program a sequence and block of numbers."""
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    c = (program % blocks) * C + tl.arange(0, C)
    live = c < n
    row, length, origin = _place(table, sequence, t, REVERSE)
    matrix = _matrix(A, c, live, n, DENSE)
    now = tl.zeros((C,), tl.float32)
    if initial is not None:
        now = tl.load(initial + sequence * n + c, mask=live, other=0.0)
    way = -1 if REVERSE else 1
    first = origin + row * 0  # 64 bits
    v += row * v_b + first * v_t + c
    g += row * g_b + first * g_t + c
    h += (row * t + first) * n + c
    s0 = 0
    while s0 < length:
        v_rows = _rows(v, way * v_t, s0, length, live, TILE, True)
        g_rows = _rows(g, way * g_t, s0, length, live, TILE, True)
        for i in tl.static_range(TILE):
            inside = s0 + i < length
            tl.store(h + i * way * n, now, mask=live & inside)
            new = _activate(_times(matrix, now, DENSE) + v_rows[i], F) * g_rows[i]
            now = tl.where(inside, new, now)
        v += TILE * way * v_t
        g += TILE * way * g_t
        h += TILE * way * n
        s0 += TILE
    tl.store(state + sequence * n + c, now, mask=live)


@triton.jit(do_not_specialize=("t", "blocks"))
def backward(
    v, g, A, dh, dstate, table, h, dv, dg, dA, dinitial, t, blocks, v_b, v_t, g_b, g_t, n,
    DENSE: tl.constexpr, F: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of v, g, the initial state and, for a diagonal A, of A by sequence; from the last step to the first."""
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    c = (program % blocks) * C + tl.arange(0, C)
    live = c < n
    row, length, origin = _place(table, sequence, t, REVERSE)
    matrix = _matrix(A, c, live, n, DENSE)
    grad = tl.load(dstate + sequence * n + c, mask=live, other=0.0)
    total = tl.zeros((C,), tl.float32)
    way = 1 if REVERSE else -1
    last = origin - way * (length - 1) + row * 0  # 64 bits
    v += row * v_b + last * v_t + c
    g += row * g_b + last * g_t + c
    token = (row * t + last) * n + c
    s0 = length - 1
    while s0 >= 0:
        v_rows = _rows(v, way * v_t, s0, length, live, TILE, False)
        g_rows = _rows(g, way * g_t, s0, length, live, TILE, False)
        h_rows = _rows(h + token, way * n, s0, length, live, TILE, False)
        dh_rows = _rows(dh + token, way * n, s0, length, live, TILE, False)
        for i in tl.static_range(TILE):
            inside = s0 - i >= 0
            y = _activate(_times(matrix, h_rows[i], DENSE) + v_rows[i], F)
            for_v = grad * g_rows[i] * _slope(y, F)
            tl.store(dv + token + i * way * n, for_v, mask=live & inside)
            tl.store(dg + token + i * way * n, grad * y, mask=live & inside)
            if not DENSE:
                total += tl.where(inside, for_v * h_rows[i], 0.0)
            new = _times_transposed(matrix, for_v, DENSE) + dh_rows[i]
            grad = tl.where(inside, new, grad)
        v += TILE * way * v_t
        g += TILE * way * g_t
        token += TILE * way * n
        s0 -= TILE
    tl.store(dinitial + sequence * n + c, grad, mask=live)
    if not DENSE:
        tl.store(dA + sequence * n + c, total, mask=live)


@triton.jit
def _compose(a, b, a_next, b_next):
    """h -> a h + b, then h -> a_next h + b_next."""
    return a * a_next, a_next * b + b_next


@triton.jit(do_not_specialize=("t", "blocks"))
def linear_forward(
    v, g, A, initial, table, h, state, t, blocks, v_b, v_t, g_b, g_t, n,
    REVERSE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`forward` of a linear diagonal system."""
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    c = (program % blocks) * C + tl.arange(0, C)
    live = c < n
    row, length, origin = _place(table, sequence, t, REVERSE)
    decay = tl.load(A + c, mask=live, other=0.0)
    now = tl.zeros((C,), tl.float32)
    if initial is not None:
        now = tl.load(initial + sequence * n + c, mask=live, other=0.0)
    way = -1 if REVERSE else 1
    tl.store(h + (row * t + origin) * n + c, now, mask=live & (length > 0))
    s = tl.arange(0, TILE)
    s0 = 0
    while s0 < length:
        steps = s0 + s
        token = (origin + way * steps + row * 0)[:, None]
        inside = (steps < length)[:, None] & live[None, :]
        gate = tl.load(g + row * g_b + token * g_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
        into = tl.load(v + row * v_b + token * v_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
        a = tl.where(inside, gate * decay[None, :], 1.0)  # beyond the last step the state stays
        a, b = tl.associative_scan((a, gate * into), 0, _compose)
        after = a * now[None, :] + b
        follows = (steps + 1 < length)[:, None] & live[None, :]
        tl.store(h + (row * t + token + way) * n + c[None, :], after, mask=follows)
        now = tl.sum(tl.where((s == TILE - 1)[:, None], after, 0.0), 0)
        s0 += TILE
    tl.store(state + sequence * n + c, now, mask=live)


@triton.jit(do_not_specialize=("t", "blocks"))
def linear_backward(
    v, g, A, dh, dstate, table, h, dv, dg, dA, dinitial, t, blocks, v_b, v_t, g_b, g_t, n,
    REVERSE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`backward` of a linear diagonal system: G of a state from that of the next, a scan the other way round."""
    program = tl.program_id(0)
    sequence = (program // blocks).to(tl.int64)
    c = (program % blocks) * C + tl.arange(0, C)
    live = c < n
    row, length, origin = _place(table, sequence, t, REVERSE)
    decay = tl.load(A + c, mask=live, other=0.0)
    grad = tl.load(dstate + sequence * n + c, mask=live, other=0.0)  # G of the state after the last step
    total = tl.zeros((TILE, C), tl.float32)
    way = -1 if REVERSE else 1
    v += row * v_b
    g += row * g_b
    s = tl.arange(0, TILE)
    s0 = length - 1
    while s0 >= 0:
        steps = s0 - s
        token = (origin + way * steps + row * 0)[:, None]
        inside = (steps >= 0)[:, None] & live[None, :]
        follows = (steps >= 0)[:, None] & (steps + 1 < length)[:, None] & live[None, :]
        where = (row * t + token) * n + c[None, :]
        later = tl.load(g + (token + way) * g_t + c[None, :], mask=follows, other=0.0).to(tl.float32)
        b = tl.load(dh + where + way * n, mask=follows, other=0.0)
        a = tl.where(follows, later * decay[None, :], 1.0)
        a, b = tl.associative_scan((a, b), 0, _compose)
        G = a * grad[None, :] + b
        gate = tl.load(g + token * g_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
        into = tl.load(v + token * v_t + c[None, :], mask=inside, other=0.0).to(tl.float32)
        before = tl.load(h + where, mask=inside, other=0.0)
        tl.store(dv + where, G * gate, mask=inside)
        tl.store(dg + where, G * (before * decay[None, :] + into), mask=inside)
        total += G * gate * before
        grad = tl.sum(tl.where((s == TILE - 1)[:, None], G, 0.0), 0)
        s0 -= TILE
    token = origin + row * 0
    some = live & (length > 0)
    first = tl.load(g + token * g_t + c, mask=some, other=0.0).to(tl.float32)
    own = tl.load(dh + (row * t + token) * n + c, mask=some, other=0.0)
    tl.store(dinitial + sequence * n + c, tl.where(length > 0, first * decay * grad + own, grad), mask=live)
    tl.store(dA + sequence * n + c, tl.sum(total, 0), mask=live)


@triton.jit(do_not_specialize=("blocks", "slots"))
def step(
    v, g, A, index, state, before, blocks, slots, v_b, g_b, n,
    DENSE: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One token, in place: one program a row and block of numbers."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    c = (program % blocks) * C + tl.arange(0, C)
    live = c < n
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = live & (slot >= 0) & (slot < slots)
    now = tl.load(state + slot * n + c, mask=taken, other=0.0)
    v_row = tl.load(v + row * v_b + c, mask=taken, other=0.0).to(tl.float32)
    g_row = tl.load(g + row * g_b + c, mask=taken, other=0.0).to(tl.float32)
    new = _activate(_times(_matrix(A, c, live, n, DENSE), now, DENSE) + v_row, F) * g_row
    tl.store(before + row * n + c, now, mask=live)
    tl.store(state + slot * n + c, new, mask=taken)
