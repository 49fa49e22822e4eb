"""linear_scan in Triton: time is cut into runs, which are walked twice.

`summarise` walks every run from nothing and notes where that leads and the product of its decays; `carry` goes through
a sequence's runs, which gives each the state it begins with; `forward` and `backward` walk them again and write. Where
one run is the whole sequence the first two are left out. The gradient walks backwards: what reaches h[t] is g, and what
it hands to the step before is conj(a[t]) g.

A complex number is two neighbours in memory. Suffixes: s step of a sequence; c channels of a program.
"""

import triton
import triton.language as tl

from stateline.ops.gpu_kernels import place


@triton.jit
def _get(base, c, live, CPX: tl.constexpr):
    """Real and imaginary parts at channels c of a row, in float32; the same twice if there are no complex numbers."""
    if CPX:
        real = tl.load(base + 2 * c, mask=live, other=0.0).to(tl.float32)
        imaginary = tl.load(base + 2 * c + 1, mask=live, other=0.0).to(tl.float32)
    else:
        real = tl.load(base + c, mask=live, other=0.0).to(tl.float32)
        imaginary = real
    return real, imaginary


@triton.jit
def _put(base, c, live, real, imaginary, CPX: tl.constexpr):
    if CPX:
        tl.store(base + 2 * c, real.to(base.dtype.element_ty), mask=live)
        tl.store(base + 2 * c + 1, imaginary.to(base.dtype.element_ty), mask=live)
    else:
        tl.store(base + c, real.to(base.dtype.element_ty), mask=live)


@triton.jit
def _optional(base, row, width: tl.constexpr, c, live, C: tl.constexpr, CPX: tl.constexpr):
    """A row of states, zeros if there are none."""
    if base is None:
        real = tl.zeros((C,), tl.float32)
        imaginary = tl.zeros((C,), tl.float32)
    else:
        real, imaginary = _get(base + row.to(tl.int64) * width, c, live, CPX)
    return real, imaginary


@triton.jit
def _times(ar, ai, xr, xi, CPX: tl.constexpr, CONJ: tl.constexpr):
    """a·x, or conj(a)·x."""
    if CPX:
        if CONJ:
            ai = -ai
        real = ar * xr - ai * xi
        imaginary = ar * xi + ai * xr
    else:
        real = ar * xr
        imaginary = real
    return real, imaginary


@triton.jit
def _row(base, stride: tl.constexpr, origin, s, REVERSE: tl.constexpr):
    time = origin - s if REVERSE else origin + s
    return base + time.to(tl.int64) * stride


@triton.jit
def _rows(
    base, stride: tl.constexpr, origin, s0, low, high, c, live, TILE: tl.constexpr, CPX: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Steps s0 … s0 + TILE - 1 of those from low on and below high: so many loads are in flight at once."""
    reals = ()
    imaginaries = ()
    for i in tl.static_range(TILE):
        s = s0 + i
        real, imaginary = _get(_row(base, stride, origin, s, REVERSE), c, live & (s >= low) & (s < high), CPX)
        reals = reals + (real,)
        imaginaries = imaginaries + (imaginary,)
    return reals, imaginaries


@triton.jit(do_not_specialize=("t", "blocks", "runs"))
def summarise(
    a, x, table, tiles, product, local, t, blocks, runs, a_b, x_b,
    d: tl.constexpr, a_t: tl.constexpr, x_t: tl.constexpr, CPX: tl.constexpr, CONST: tl.constexpr, BACK: tl.constexpr,
    REVERSE: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of every run: the product of its decays (conjugate if BACK), and what it hands on when nothing enters it."""
    index = tl.program_id(0) // blocks
    _, row, first, length, origin, exists = place(table, tiles, index, t, runs, RUN, REVERSE)
    if exists:
        c = tl.program_id(0) % blocks * C + tl.arange(0, C)
        live = c < d
        width: tl.constexpr = 2 * d if CPX else d
        x = x + row * x_b
        pr = tl.full((C,), 1.0, tl.float32)
        pi = tl.zeros((C,), tl.float32)
        hr = tl.zeros((C,), tl.float32)
        hi = tl.zeros((C,), tl.float32)
        fixed_r, fixed_i = hr, hi
        if CONST:
            fixed_r, fixed_i = _get(a, c, live, CPX)
        else:
            a = a + row * a_b
        for done in range(0, RUN, TILE):
            s0 = first + (RUN - TILE - done if BACK else done)
            xr, xi = _rows(x, x_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            if not CONST:
                ar, ai = _rows(a, a_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            for i in tl.static_range(TILE - 1 if BACK else 0, -1 if BACK else TILE, -1 if BACK else 1):
                inside = s0 + i < length
                decay_r, decay_i = fixed_r, fixed_i
                if not CONST:
                    decay_r, decay_i = ar[i], ai[i]
                if BACK:
                    nr, ni = _times(decay_r, decay_i, hr + xr[i], hi + xi[i], CPX, True)
                else:
                    nr, ni = _times(decay_r, decay_i, hr, hi, CPX, False)
                    nr, ni = nr + xr[i], ni + xi[i]
                qr, qi = _times(decay_r, decay_i, pr, pi, CPX, BACK)
                hr, hi = tl.where(inside, nr, hr), tl.where(inside, ni, hi)
                pr, pi = tl.where(inside, qr, pr), tl.where(inside, qi, pi)
        place_of = index.to(tl.int64) * width
        _put(product + place_of, c, live, pr, pi, CPX)
        _put(local + place_of, c, live, hr, hi, CPX)


@triton.jit(do_not_specialize=("t", "each"))
def carry(
    product, local, start, table, firsts, into, t, each,
    d: tl.constexpr, CPX: tl.constexpr, BACK: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What enters each run, from what enters the sequence: one program a sequence and block of channels."""
    sequence = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    live = c < d
    width: tl.constexpr = 2 * d if CPX else d
    if table is None:
        first = (sequence * each).to(tl.int64)
        count = each
    else:
        first = tl.load(firsts + sequence).to(tl.int64)
        length = tl.load(table + 3 * sequence + 2) - tl.load(table + 3 * sequence + 1)
        count = tl.maximum((length + RUN - 1) // RUN, 1).to(tl.int32)
    hr, hi = _optional(start, sequence, width, c, live, C, CPX)
    done = 0
    while done < count:  # not a range: the interpreter's numbers are no indices
        at = (first + (count - 1 - done if BACK else done)) * width
        _put(into + at, c, live, hr, hi, CPX)
        pr, pi = _get(product + at, c, live, CPX)
        lr, li = _get(local + at, c, live, CPX)
        nr, ni = _times(pr, pi, hr, hi, CPX, False)
        hr, hi = nr + lr, ni + li
        done += 1


@triton.jit(do_not_specialize=("t", "blocks", "runs"))
def forward(
    a, b, into, table, tiles, h, state, t, blocks, runs, a_b, b_b,
    d: tl.constexpr, a_t: tl.constexpr, b_t: tl.constexpr, CPX: tl.constexpr, CONST: tl.constexpr, ONE: tl.constexpr,
    REVERSE: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """h and the last state. into: what enters each run, or with ONE each sequence."""
    index = tl.program_id(0) // blocks
    sequence, row, first, length, origin, exists = place(table, tiles, index, t, runs, RUN, REVERSE)
    if exists:
        c = tl.program_id(0) % blocks * C + tl.arange(0, C)
        live = c < d
        width: tl.constexpr = 2 * d if CPX else d
        b = b + row * b_b
        h = h + row * t * width
        hr, hi = _optional(into, sequence if ONE else index, width, c, live, C, CPX)
        fixed_r, fixed_i = hr, hi
        if CONST:
            fixed_r, fixed_i = _get(a, c, live, CPX)
        else:
            a = a + row * a_b
        for done in range(0, RUN, TILE):
            s0 = first + done
            xr, xi = _rows(b, b_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            if not CONST:
                ar, ai = _rows(a, a_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            for i in tl.static_range(TILE):
                inside = s0 + i < length
                decay_r, decay_i = fixed_r, fixed_i
                if not CONST:
                    decay_r, decay_i = ar[i], ai[i]
                nr, ni = _times(decay_r, decay_i, hr, hi, CPX, False)
                hr, hi = tl.where(inside, nr + xr[i], hr), tl.where(inside, ni + xi[i], hi)
                _put(_row(h, width, origin, s0 + i, REVERSE), c, live & inside, hr, hi, CPX)
        if first + RUN >= length:
            _put(state + sequence * width, c, live, hr, hi, CPX)


@triton.jit(do_not_specialize=("t", "blocks", "runs"))
def backward(
    a, dh, h, initial, into, table, tiles, da, db, dinitial, partial, t, blocks, runs, a_b, dh_b, h_b,
    d: tl.constexpr, a_t: tl.constexpr, dh_t: tl.constexpr, h_t: tl.constexpr, CPX: tl.constexpr, CONST: tl.constexpr,
    ONE: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Gradients of a, a sum a run in `partial` if constant, of b and of the initial state."""
    index = tl.program_id(0) // blocks
    sequence, row, first, length, origin, exists = place(table, tiles, index, t, runs, RUN, REVERSE)
    if exists:
        c = tl.program_id(0) % blocks * C + tl.arange(0, C)
        live = c < d
        width: tl.constexpr = 2 * d if CPX else d
        dh = dh + row * dh_b
        h = h + row * h_b
        db = db + row * t * width
        gr, gi = _optional(into, sequence if ONE else index, width, c, live, C, CPX)
        start_r, start_i = _optional(initial, sequence, width, c, live, C, CPX)
        sum_r = tl.zeros((C,), tl.float32)
        sum_i = tl.zeros((C,), tl.float32)
        fixed_r, fixed_i = sum_r, sum_i
        if CONST:
            fixed_r, fixed_i = _get(a, c, live, CPX)
        else:
            a = a + row * a_b
            da = da + row * t * width
        for done in range(0, RUN, TILE):
            s0 = first + RUN - TILE - done
            xr, xi = _rows(dh, dh_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            pr, pi = _rows(h, h_t, origin, s0 - 1, 0, length - 1, c, live, TILE, CPX, REVERSE)
            if not CONST:
                ar, ai = _rows(a, a_t, origin, s0, 0, length, c, live, TILE, CPX, REVERSE)
            for i in tl.static_range(TILE - 1, -1, -1):
                s = s0 + i
                inside = s < length
                gr, gi = gr + xr[i], gi + xi[i]  # zeros past the end
                before_r, before_i = tl.where(s == 0, start_r, pr[i]), tl.where(s == 0, start_i, pi[i])
                slope_r, slope_i = _times(before_r, before_i, gr, gi, CPX, True)
                _put(_row(db, width, origin, s, REVERSE), c, live & inside, gr, gi, CPX)
                decay_r, decay_i = fixed_r, fixed_i
                if CONST:
                    sum_r, sum_i = tl.where(inside, sum_r + slope_r, sum_r), tl.where(inside, sum_i + slope_i, sum_i)
                else:
                    _put(_row(da, width, origin, s, REVERSE), c, live & inside, slope_r, slope_i, CPX)
                    decay_r, decay_i = ar[i], ai[i]
                nr, ni = _times(decay_r, decay_i, gr, gi, CPX, True)
                gr, gi = tl.where(inside, nr, gr), tl.where(inside, ni, gi)
        if CONST:
            _put(partial + index.to(tl.int64) * width, c, live, sum_r, sum_i, CPX)
        if dinitial is not None:  # known before the kernel runs, and only alone
            if first == 0:
                _put(dinitial + sequence * width, c, live, gr, gi, CPX)


@triton.jit
def step(
    state, a, b, index, h, a_b, b_b, slots, d: tl.constexpr, CPX: tl.constexpr, CONST: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """One token of a row, in place; its slot is index[row], and a negative one is skipped: h = 0."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    live = c < d
    width: tl.constexpr = 2 * d if CPX else d
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    taken = live & (slot >= 0) & (slot < slots)
    hr, hi = _get(state + slot * width, c, taken, CPX)
    ar, ai = _get(a if CONST else a + row * a_b, c, live, CPX)
    xr, xi = _get(b + row * b_b, c, live, CPX)
    nr, ni = _times(ar, ai, hr, hi, CPX, False)
    nr, ni = tl.where(taken, nr + xr, 0.0), tl.where(taken, ni + xi, 0.0)
    _put(state + slot * width, c, taken, nr, ni, CPX)
    _put(h + row * width, c, live, nr, ni, CPX)
