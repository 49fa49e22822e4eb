"""causal_conv1d in Triton: a program walks a run of time for a block of channels, a tile of unrolled steps at a time.

Forwards all rows of a tile are loaded before the first is used, so that many loads are in flight; the k-1 rows before a
tile are loaded again, out of the cache. The gradient keeps the last k-1 inputs and slopes in registers and loads a tile
ahead; it walks k-1 steps past its run, since those reach back into it. Gradients of taps and bias leave as one partial
sum a program and are added in one fixed order.

Suffixes: s step of a sequence, running forwards or backwards through memory; j tap; c channels of a program.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place


@triton.jit
def _at(base, stride: tl.constexpr, origin, s, c, REVERSE: tl.constexpr):
    """Where step s of a sequence lies; later ones are a constant away."""
    time = origin - s if REVERSE else origin + s
    return base + time.to(tl.int64) * stride + c


@triton.jit
def _input(
    at, stride: tl.constexpr, i: tl.constexpr, s0, length, initial, c, live, d: tl.constexpr,
    K: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Input of step s0 + i, given where s0 lies; those before step 0 come from the initial state, in float32."""
    s = s0 + i
    value = tl.load(at + (-i if REVERSE else i) * stride, mask=live & (s >= 0) & (s < length), other=0.0)
    if initial is not None:
        before = tl.load(initial + (K - 1 + s) * d + c, mask=live & (s < 0) & (s >= 1 - K), other=0.0)
        value = tl.where(s < 0, before, value.to(tl.float32))
    return value


@triton.jit
def _channels(block, d: tl.constexpr, C: tl.constexpr):
    """Channels of a block, and which exist: all of them where C divides d, known before the kernel runs."""
    c = block * C + tl.arange(0, C)
    if d % C == 0:
        live = tl.full((C,), True, tl.int1)
    else:
        live = c < d
    return c, live


@triton.jit
def _taps(weight, c, live, K: tl.constexpr):
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (tl.load(weight + c * K + j, mask=live, other=0.0).to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=("t", "blocks", "runs"))
def forward(
    x, weight, bias, initial, table, tiles, y, state, t, blocks, runs, x_b,
    d: tl.constexpr, x_t: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y and the last state; one program a run and block of channels."""
    program = tl.program_id(0)
    sequence, row, first, length, origin, exists = place(table, tiles, program // blocks, t, runs, RUN, REVERSE)
    if exists:
        c, live = _channels(program % blocks, d, C)
        taps = _taps(weight, c, live, K)
        shift = tl.zeros((C,), tl.float32)
        if bias is not None:
            shift = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
        x = x + row * x_b
        y = y + row * t * d
        if initial is not None:
            initial = initial + sequence * (K - 1) * d
        for done in range(0, RUN, TILE):
            s0 = first + done
            x_at = _at(x, x_t, origin, s0, c, REVERSE)
            y_at = _at(y, d, origin, s0, c, REVERSE)
            rows = ()
            for i in tl.static_range(K - 1):
                rows = rows + (_input(x_at, x_t, i - (K - 1), s0, length, initial, c, live, d, K, REVERSE),)
            for i in tl.static_range(TILE):
                rows = rows + (_input(x_at, x_t, i, s0, length, None, c, live, d, K, REVERSE),)
            for i in tl.static_range(TILE):
                out = shift
                for j in tl.static_range(K):
                    out += taps[j] * rows[i + j].to(tl.float32)
                if SILU:
                    out = out * tl.sigmoid(out)
                where = y_at + (-i if REVERSE else i) * d
                tl.store(where, out.to(y.dtype.element_ty), mask=live & (s0 + i < length))
        if (first + RUN >= length) & (K > 1):
            kept = state + sequence * (K - 1) * d + c
            tail = _at(x, x_t, origin, length - (K - 1), c, REVERSE)
            for i in tl.static_range(K - 1):
                last = _input(tail, x_t, i, length - (K - 1), length, initial, c, live, d, K, REVERSE)
                tl.store(kept + i * d, last.to(tl.float32), mask=live)


@triton.jit
def _slope(out, dy, SILU: tl.constexpr):
    """Gradient of what goes into the activation, from a float32 dy."""
    if SILU:
        gate = tl.sigmoid(out)
        dy = dy * gate * (1 + out * (1 - gate))
    return dy


@triton.jit
def _ahead(
    x, stride: tl.constexpr, origin, s0, stop, c, live, TILE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Rows of a tile, to be used while the next ones are on their way."""
    at = _at(x, stride, origin, s0, c, REVERSE)
    rows = ()
    for i in tl.static_range(TILE):
        rows = rows + (tl.load(at + (-i if REVERSE else i) * stride, mask=live & (s0 + i < stop), other=0.0),)
    return rows


@triton.jit
def _more_ahead(
    given, more, stride: tl.constexpr, origin, s0, stop, c, live, TILE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Rows of a second gradient; `given`, which stands for nothing, if there is none."""
    rows = given
    if more is not None:
        rows = _ahead(more, stride, origin, s0, stop, c, live, TILE, REVERSE)
    return rows


@triton.jit
def _start_gradient(
    dinitial, dstate, x, dy, more, initial, taps, shift, origin, length, c, live,
    d: tl.constexpr, x_t: tl.constexpr, dy_t: tl.constexpr, more_t: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The initial state's gradient, from the first k-1 steps."""
    x_at = _at(x, x_t, origin, 0, c, REVERSE)
    dy_at = _at(dy, dy_t, origin, 0, c, REVERSE)
    if more is not None:
        more_at = _at(more, more_t, origin, 0, c, REVERSE)
    rows, slopes = (), ()
    for i in tl.static_range(K - 1):
        rows = rows + (_input(x_at, x_t, i - (K - 1), 0, length, initial, c, live, d, K, REVERSE),)
    for i in tl.static_range(K - 1):
        rows = rows + (_input(x_at, x_t, i, 0, length, None, c, live, d, K, REVERSE),)
        given = tl.load(dy_at + (-i if REVERSE else i) * dy_t, mask=live & (i < length), other=0.0).to(tl.float32)
        if more is not None:
            given += tl.load(more_at + (-i if REVERSE else i) * more_t, mask=live & (i < length), other=0.0)
        out = shift
        for j in tl.static_range(K):
            out += taps[j] * rows[i + j].to(tl.float32)
        slopes = slopes + (_slope(out, given, SILU),)
        grad = tl.load(dstate + (i - length) * d + c, mask=live & (i >= length), other=0.0).to(tl.float32)
        for j in tl.static_range(i + 1):
            grad += taps[j] * slopes[i - j]
        tl.store(dinitial + i * d + c, grad, mask=live)


@triton.jit(do_not_specialize=("t", "blocks", "runs"))
def backward(
    x, weight, bias, initial, table, tiles, dy, more, dstate, dx, dinitial, partial, t, blocks, runs, x_b, dy_b, more_b,
    d: tl.constexpr, x_t: tl.constexpr, dy_t: tl.constexpr, more_t: tl.constexpr, dx_t: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dx of dy + more, the initial state's gradient, and this program's sums for taps and bias, (program, k + 1, d)."""
    program = tl.program_id(0)
    sequence, row, first, length, origin, exists = place(table, tiles, program // blocks, t, runs, RUN, REVERSE)
    c, live = _channels(program % blocks, d, C)
    taps = _taps(weight, c, live, K)
    shift = tl.zeros((C,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    x = x + row * x_b
    dy = dy + row * dy_b
    dx = dx + row * t * dx_t
    if more is not None:
        more = more + row * more_b
    dstate = dstate + sequence * (K - 1) * d
    if initial is not None:
        initial = initial + sequence * (K - 1) * d
    if not exists:
        length *= 0
    stop = min(first + RUN, length)  # of what this program writes; its successors' slopes reach k-1 steps back
    seen = min(first + RUN + K - 1, length)
    sums, rows, slopes = (), (), ()
    for _ in tl.static_range(K + (bias is not None)):
        sums = sums + (tl.zeros((C,), tl.float32),)
    x_at = _at(x, x_t, origin, first, c, REVERSE)
    for i in tl.static_range(K - 1):
        row_before = _input(x_at, x_t, i - (K - 1), first, seen, initial, c, live, d, K, REVERSE)
        rows = rows + (row_before.to(tl.float32),)
        slopes = slopes + (tl.zeros((C,), tl.float32),)
    next_x = _ahead(x, x_t, origin, first, seen, c, live, TILE, REVERSE)
    next_dy = _ahead(dy, dy_t, origin, first, seen, c, live, TILE, REVERSE)
    next_more = _more_ahead(next_dy, more, more_t, origin, first, seen, c, live, TILE, REVERSE)
    for done in range(0, RUN + (K + TILE - 2) // TILE * TILE, TILE):
        s0 = first + done
        tile_x, tile_dy, tile_more = next_x, next_dy, next_more
        next_x = _ahead(x, x_t, origin, s0 + TILE, seen, c, live, TILE, REVERSE)
        next_dy = _ahead(dy, dy_t, origin, s0 + TILE, seen, c, live, TILE, REVERSE)
        next_more = _more_ahead(next_dy, more, more_t, origin, s0 + TILE, seen, c, live, TILE, REVERSE)
        dx_at = _at(dx, dx_t, origin, s0 - (K - 1), c, REVERSE)
        left = s0 - length  # place of step s0 - (k-1) in the last state
        dstate_at = dstate + left * d + c
        for i in tl.static_range(TILE):
            rows = rows + (tile_x[i].to(tl.float32),)
            out = shift
            for j in tl.static_range(K):
                out += taps[j] * rows[j]
            given = tile_dy[i].to(tl.float32)
            if more is not None:
                given += tile_more[i].to(tl.float32)
            slope = _slope(out, given, SILU)
            slopes = slopes + (slope,)
            own = tl.where(s0 + i < stop, slope, 0.0)
            added = ()
            for j in tl.static_range(K):
                added = added + (sums[j] + own * rows[j],)
            if bias is not None:
                added = added + (sums[K] + own,)
            sums = added
            n = s0 + i - (K - 1)
            inside = live & (n >= first) & (n < stop)
            grad = tl.load(dstate_at + i * d, mask=inside & (left + i >= 0), other=0.0).to(tl.float32)
            for j in tl.static_range(K):
                grad += taps[j] * slopes[K - 1 - j]
            tl.store(dx_at + (-i if REVERSE else i) * dx_t, grad.to(dx.dtype.element_ty), mask=inside)
            rows, slopes = rows[1:], slopes[1:]
    partial += (program // blocks).to(tl.int64) * len(sums) * d + c
    for j in tl.static_range(len(sums)):
        tl.store(partial + j * d, sums[j], mask=live)
    if dinitial is not None:
        if exists & (first == 0) & (K > 1):
            _start_gradient(
                dinitial + sequence * (K - 1) * d, dstate, x, dy, more, initial, taps, shift, origin, length, c, live,
                d, x_t, dy_t, more_t, K, SILU, REVERSE,
            )  # fmt: skip


@triton.jit
def step(
    x, state, weight, bias, index, y, x_b, state_b, slots,
    d: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One token, in place: one program a row and block of channels."""
    row = tl.program_id(0).to(tl.int64)
    c, live = _channels(tl.program_id(1), d, C)
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taps = _taps(weight, c, live, K)
    taken = live & (slot >= 0) & (slot < slots)
    token = tl.load(x + row * x_b + c, mask=taken, other=0.0).to(tl.float32)
    out = tl.zeros((C,), tl.float32)  # in the order of `forward`, so that a step has its bits
    if bias is not None:
        out = tl.load(bias + c, mask=live, other=0.0).to(tl.float32)
    state += slot * state_b + c
    kept = ()
    for i in tl.static_range(K - 1):
        kept = kept + (tl.load(state + i * d, mask=taken, other=0.0),)
        out += taps[i] * kept[i]
    out += taps[K - 1] * token
    for i in tl.static_range(K - 2):
        tl.store(state + i * d, kept[i + 1], mask=taken)
    if K > 1:
        tl.store(state + (K - 2) * d, token, mask=taken)
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + row * d + c, tl.where(slot >= 0, out, 0.0).to(y.dtype.element_ty), mask=live)
