"""s4_scan in Triton: a chunk of q steps at a time, on the tables that gpu_table_kernels.py makes.

Rows are chunks, of every sequence from its start; `counts` says how many tokens each has. What a channel's chunks take
in is turned to (channel, row, step) first, so that everything else is products of small matrices, one channel a
program: `project` brings inputs into states, `outputs` states and inputs into outputs, and between them `advance`
carries the state from chunk to chunk. The gradient is the same turned round. A chunk that is not full is read as if its
tokens stood at the end (`shift` steps later) where it meets the state after it, and at the start where it meets the
state before.
Suffixes: c read-out, h channel, r row, j and l step of a chunk in and out, s real number of a state, x, y a complex
number.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place


@triton.jit(do_not_specialize=("t", "runs", "rows", "d"))
def pack(
    x, table, tiles, out, counts, t, runs, rows, d, x_b, x_t, x_d,
    REVERSE: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x (b, t, d) as (d, r, q) float32, zeros after a row's tokens; and how many each has."""
    index = tl.program_id(0)
    _, row, first, length, origin, _ = place(table, tiles, index, t, runs, Q, REVERSE)
    count = tl.minimum(tl.maximum(length - first, 0), Q)
    step, c = tl.arange(0, Q), tl.program_id(1) * C + tl.arange(0, C)
    time = origin - first - step if REVERSE else origin + first + step
    at = x + row * x_b + time[:, None].to(tl.int64) * x_t + c[None, :].to(tl.int64) * x_d
    value = tl.load(at, mask=(step < count)[:, None] & (c < d)[None, :], other=0.0).to(tl.float32)
    tl.store(out + (c[None, :].to(tl.int64) * rows + index) * Q + step[:, None], value, mask=(c < d)[None, :])
    if tl.program_id(1) == 0:
        tl.store(counts + index, count)


@triton.jit(do_not_specialize=("t", "runs", "rows", "d"))
def unpack(x, table, tiles, out, t, runs, rows, d, REVERSE: tl.constexpr, Q: tl.constexpr, C: tl.constexpr):
    """x (d, r, q) back into out (b, t, d)."""
    index = tl.program_id(0)
    _, row, first, length, origin, _ = place(table, tiles, index, t, runs, Q, REVERSE)
    count = tl.minimum(tl.maximum(length - first, 0), Q)
    step, c = tl.arange(0, Q), tl.program_id(1) * C + tl.arange(0, C)
    time = origin - first - step if REVERSE else origin + first + step
    value = tl.load(x + (c[None, :].to(tl.int64) * rows + index) * Q + step[:, None], mask=(c < d)[None, :], other=0.0)
    at = out + (row * t + time[:, None].to(tl.int64)) * d + c[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=(step < count)[:, None] & (c < d)[None, :])


@triton.jit(do_not_specialize=("rows", "h", "s", "c"))
def project(
    x, w, counts, out, rows, h, s, c, SHIFT: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """out (r, h, s) = Σ over c and j of x (c, h, r, j) · w (c, h, j, s). A program: a channel, M rows, S numbers."""
    channel, j = tl.program_id(0), tl.arange(0, Q)
    r, col = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(2) * S + tl.arange(0, S)
    shift = j * 0
    if SHIFT:
        shift = Q - tl.load(counts + r, mask=r < rows, other=0)[:, None]
        source = j[None, :] - shift
        live = (r < rows)[:, None] & (source >= 0)
    else:
        source = j[None, :]
        live = (r < rows)[:, None] & (source >= 0)
    total = tl.zeros((M, S), tl.float32)
    k = 0
    while k < c:
        line = (k * h + channel).to(tl.int64)
        a = tl.load(x + ((line * rows + r) * Q)[:, None] + source, mask=live, other=0.0)
        b = tl.load(w + ((line * Q + j) * s)[:, None] + col[None, :], mask=(col < s)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PREC)
        k += 1
    at = out + ((r.to(tl.int64) * h + channel) * s)[:, None] + col[None, :]
    tl.store(at, total, mask=(r < rows)[:, None] & (col < s)[None, :])


@triton.jit
def _chunks(table, firsts, sequence, each, Q: tl.constexpr):
    """The first row of a sequence, and how many it has."""
    if table is None:
        first = sequence.to(tl.int64) * each
        number = each
    else:
        first = tl.load(firsts + sequence).to(tl.int64)
        length = tl.load(table + 3 * sequence + 2) - tl.load(table + 3 * sequence + 1)
        number = tl.maximum((length + Q - 1) // Q, 1).to(tl.int32)
    return first, number


@triton.jit
def _pair(base, live):
    return tl.load(base, mask=live, other=0.0), tl.load(base + 1, mask=live, other=0.0)


@triton.jit
def _put(base, x, y, live):
    tl.store(base, x, mask=live)
    tl.store(base + 1, y, mask=live)


@triton.jit(do_not_specialize=("each", "width"))
def advance(
    states, powers, initial, table, firsts, counts, end, each, width, Q: tl.constexpr, C: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """In `states` (r, width, 2): what each chunk adds becomes the state before it. T rows are loaded at once."""
    sequence, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    live = c < width
    first, number = _chunks(table, firsts, sequence, each, Q)
    x, y = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    if initial is not None:
        x, y = _pair(initial + (sequence.to(tl.int64) * width + c) * 2, live)
    last = tl.load(counts + first + number - 1).to(tl.int64)
    full_x, full_y = _pair(powers + (tl.full((1,), Q, tl.int64) * width + c) * 2, live)
    last_x, last_y = _pair(powers + (last * width + c) * 2, live)
    done = 0
    while done < number:  # not a range: the interpreter's numbers are no indices
        adds_x = ()
        adds_y = ()
        for i in tl.static_range(T):
            ax, ay = _pair(states + ((first + done + i) * width + c) * 2, live & (done + i < number))
            adds_x = adds_x + (ax,)
            adds_y = adds_y + (ay,)
        for i in tl.static_range(T):
            inside, ends = done + i < number, done + i == number - 1
            _put(states + ((first + done + i) * width + c) * 2, x, y, live & inside)
            px, py = tl.where(ends, last_x, full_x), tl.where(ends, last_y, full_y)
            new_x, new_y = px * x - py * y + adds_x[i], px * y + py * x + adds_y[i]
            x, y = tl.where(inside, new_x, x), tl.where(inside, new_y, y)
        done += T
    _put(end + (sequence.to(tl.int64) * width + c) * 2, x, y, live)


@triton.jit(do_not_specialize=("each", "width"))
def retreat(
    slopes, states, powers, dend, table, firsts, counts, dinitial, dfull, dlast, each, width,
    Q: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """In `slopes` (r, width, 2): what outputs tell the state before a chunk becomes the gradient of what it adds.

    Also those of the initial state, and of the powers that whole chunks and the last one take, (n_seq, width, 2)."""
    sequence, c = tl.program_id(0), tl.program_id(1) * C + tl.arange(0, C)
    live = c < width
    first, number = _chunks(table, firsts, sequence, each, Q)
    own = (sequence.to(tl.int64) * width + c) * 2
    x, y = _pair(dend + own, live)
    last = tl.load(counts + first + number - 1).to(tl.int64)
    full_x, full_y = _pair(powers + (tl.full((1,), Q, tl.int64) * width + c) * 2, live)
    last_x, last_y = _pair(powers + (last * width + c) * 2, live)
    sum_x, sum_y = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    done = 0
    while done < number:
        said = ()
        before = ()
        for i in tl.static_range(T):
            at = ((first + number - 1 - done - i) * width + c) * 2
            sx, sy = _pair(slopes + at, live & (done + i < number))
            bx, by = _pair(states + at, live & (done + i < number))
            said = said + (sx, sy)
            before = before + (bx, by)
        for i in tl.static_range(T):
            inside, ends = done + i < number, done + i == 0
            _put(slopes + ((first + number - 1 - done - i) * width + c) * 2, x, y, live & inside)
            bx, by = before[2 * i], before[2 * i + 1]
            dx, dy = x * bx + y * by, y * bx - x * by
            if i == 0:
                _put(dlast + own, dx, dy, live & ends)
            counted = inside & (done + i > 0)
            sum_x, sum_y = tl.where(counted, sum_x + dx, sum_x), tl.where(counted, sum_y + dy, sum_y)
            px, py = tl.where(ends, last_x, full_x), tl.where(ends, last_y, full_y)
            new_x, new_y = px * x + py * y + said[2 * i], px * y - py * x + said[2 * i + 1]
            x, y = tl.where(inside, new_x, x), tl.where(inside, new_y, y)
        done += T
    _put(dfull + own, sum_x, sum_y, live)
    if dinitial is not None:
        _put(dinitial + own, x, y, live)


@triton.jit(do_not_specialize=("each", "width", "sequences"))
def powers_back(
    dfull, dlast, table, firsts, counts, out, each, width, sequences, Q: tl.constexpr, L: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Gradients of the powers (q + 1, width) of real numbers, from what `retreat` noted of each sequence."""
    step, c = tl.arange(0, L), tl.program_id(0) * C + tl.arange(0, C)
    live = c < width
    total = tl.zeros((L, C), tl.float32)
    sequence = tl.program_id(1)  # 0, of a kind that counts
    while sequence < sequences:
        first, number = _chunks(table, firsts, sequence, each, Q)
        last = tl.load(counts + first + number - 1)
        at = sequence.to(tl.int64) * width + c
        whole, end = tl.load(dfull + at, mask=live, other=0.0), tl.load(dlast + at, mask=live, other=0.0)
        total += tl.where(step[:, None] == Q, whole[None, :], 0.0) + tl.where(step[:, None] == last, end[None, :], 0.0)
        sequence += 1
    tl.store(out + step[:, None].to(tl.int64) * width + c[None, :], total, mask=(step <= Q)[:, None] & live[None, :])


@triton.jit(do_not_specialize=("rows", "h", "s"))
def outputs(
    x, taps, states, read, out, rows, h, s, Q: tl.constexpr, M: tl.constexpr, S: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """out (c, h, r, l) from inputs x (h, r, j) and the states before (r, h, s). A program: channel, rows, read-out."""
    channel, j = tl.program_id(0), tl.arange(0, Q)
    r = tl.program_id(1) * M + tl.arange(0, M)
    line = tl.program_id(2).to(tl.int64) * h + channel
    here = channel.to(tl.int64) * rows + r
    since = j[None, :] - j[:, None]
    a = tl.load(x + (here * Q)[:, None] + j[None, :], mask=(r < rows)[:, None], other=0.0)
    b = tl.load(taps + line * Q + since, mask=since >= 0, other=0.0)
    total = tl.dot(a, b, input_precision=PREC)
    done = 0
    while done < s:
        col = done + tl.arange(0, S)
        at = states + ((r.to(tl.int64) * h + channel) * s)[:, None] + col[None, :]
        before = tl.load(at, mask=(r < rows)[:, None] & (col < s)[None, :], other=0.0)
        reads = tl.load(read + ((line * Q + j) * s)[None, :] + col[:, None], mask=(col < s)[:, None], other=0.0)
        total = tl.dot(before, reads, total, input_precision=PREC)
        done += S
    tl.store(out + ((line * rows + r) * Q)[:, None] + j[None, :], total, mask=(r < rows)[:, None])


@triton.jit(do_not_specialize=("rows", "h", "s", "c"))
def inputs(
    g, taps, forces, write, counts, out, rows, h, s, c, Q: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Gradient of the inputs, out (h, r, j), from those of outputs g (c, h, r, l) and of what chunks add (r, h, s)."""
    channel, j = tl.program_id(0), tl.arange(0, Q)
    r = tl.program_id(1) * M + tl.arange(0, M)
    here = channel.to(tl.int64) * rows + r
    count = tl.load(counts + r, mask=r < rows, other=0)
    total = tl.zeros((M, Q), tl.float32)
    done = 0
    while done < s:
        col = done + tl.arange(0, S)
        at = forces + ((r.to(tl.int64) * h + channel) * s)[:, None] + col[None, :]
        force = tl.load(at, mask=(r < rows)[:, None] & (col < s)[None, :], other=0.0)
        writes = tl.load(
            write + ((channel.to(tl.int64) * Q + j) * s)[None, :] + col[:, None], mask=(col < s)[:, None], other=0.0
        )
        total = tl.dot(force, writes, total, input_precision=PREC)
        done += S
    target = j[None, :] - (Q - count)[:, None]  # by way of memory, for every row moves by its own number of steps
    tl.store(out + (here * Q)[:, None] + target, total, mask=(r < rows)[:, None] & (target >= 0))
    tl.debug_barrier()
    since = j[:, None] - j[None, :]
    inside = (r < rows)[:, None] & (j[None, :] < count[:, None])
    total = tl.load(out + (here * Q)[:, None] + j[None, :], mask=inside, other=0.0)
    k = 0
    while k < c:
        line = (k * h + channel).to(tl.int64)
        a = tl.load(g + ((line * rows + r) * Q)[:, None] + j[None, :], mask=(r < rows)[:, None], other=0.0)
        b = tl.load(taps + line * Q + since, mask=since >= 0, other=0.0)
        total = tl.dot(a, b, total, input_precision=PREC)
        k += 1
    tl.debug_barrier()
    tl.store(out + (here * Q)[:, None] + j[None, :], total, mask=(r < rows)[:, None])


@triton.jit(do_not_specialize=("rows", "h", "s"))
def outer(
    x, states, counts, out, rows, h, s, SHIFT: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """out (c, h, l, s) = Σ over rows of x (c, h, r, l) · states (r, h, s). A program: channel, read-out, S numbers."""
    channel, j, col = tl.program_id(0), tl.arange(0, Q), tl.program_id(2) * S + tl.arange(0, S)
    line = tl.program_id(1).to(tl.int64) * h + channel
    total = tl.zeros((Q, S), tl.float32)
    done = 0
    while done < rows:
        r = done + tl.arange(0, M)
        live = r < rows
        source = j[:, None] + r[None, :] * 0
        if SHIFT:
            source = j[:, None] - Q + tl.load(counts + r, mask=live, other=0)[None, :]
        a = tl.load(x + ((line * rows + r) * Q)[None, :] + source, mask=live[None, :] & (source >= 0), other=0.0)
        at = states + ((r.to(tl.int64) * h + channel) * s)[:, None] + col[None, :]
        b = tl.load(at, mask=live[:, None] & (col < s)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PREC)
        done += M
    tl.store(out + ((line * Q + j) * s)[:, None] + col[None, :], total, mask=(col < s)[None, :])


@triton.jit(do_not_specialize=("rows", "h"))
def taps_back(x, g, square, out, rows, h, Q: tl.constexpr, M: tl.constexpr, PREC: tl.constexpr):
    """Gradient of the taps, out (c, h, k) = Σ over rows and l of g (c, h, r, l) x (h, r, l − k), by way of `square`."""
    channel, j = tl.program_id(0), tl.arange(0, Q)
    line = tl.program_id(1).to(tl.int64) * h + channel
    total = tl.zeros((Q, Q), tl.float32)
    done = 0
    while done < rows:
        r = done + tl.arange(0, M)
        live = r < rows
        a = tl.load(x + ((channel.to(tl.int64) * rows + r) * Q)[None, :] + j[:, None], mask=live[None, :], other=0.0)
        b = tl.load(g + ((line * rows + r) * Q)[:, None] + j[None, :], mask=live[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PREC)
        done += M
    own = square + line * Q * Q
    tl.store(own + j[:, None] * Q + j[None, :], total)
    tl.debug_barrier()
    out_of = j[:, None] + j[None, :]  # row j, column j + k
    tl.store(out + line * Q + j, tl.sum(tl.load(own + j[:, None] * Q + out_of, mask=out_of < Q, other=0.0), 0))


@triton.jit
def step(
    state, u, A, B, C, D, index, y, u_b, u_h, slots, h, n, c, H: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """One token of a row, in place; its slot is index[row], a negative one is skipped: y = 0. H channels a program."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * H + tl.arange(0, H)
    i = tl.arange(0, N)
    live = (channel < h)[:, None] & (i < n)[None, :]
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = (slot >= 0) & (slot < slots)
    own = (channel * n)[:, None] + i[None, :]
    now = tl.load(u + row * u_b + channel * u_h, mask=(channel < h) & taken, other=0.0).to(tl.float32)
    at = state + (slot * h * n + own) * 2
    x, z = _pair(at, live & taken)
    ax, ay = _pair(A + own * 2, live)
    bx, by = _pair(B + own * 2, live)
    ax, ay, bx, by = ax.to(tl.float32), ay.to(tl.float32), bx.to(tl.float32), by.to(tl.float32)
    new_x, new_z = ax * x - ay * z + bx * now[:, None], ax * z + ay * x + by * now[:, None]
    _put(at, new_x, new_z, live & taken)
    k = 0
    while k < c:
        cx, cy = _pair(C + (k * h * n + own) * 2, live)
        out = 2 * tl.sum(cx.to(tl.float32) * new_x - cy.to(tl.float32) * new_z, 1)
        if D is not None:
            out += tl.load(D + k * h + channel, mask=channel < h, other=0.0).to(tl.float32) * now
        where = y + (row * c + k) * h + channel
        tl.store(where, tl.where(taken, out, 0.0).to(y.dtype.element_ty), mask=channel < h)
        k += 1
