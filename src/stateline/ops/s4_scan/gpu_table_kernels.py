"""A diagonal system sampled, its tables for s4_scan, and the gradients of both, in Triton and float64.

A power is a product of squares, one for each bit of its exponent. What the tables are is told in chunked.py.
Suffixes: c read-out, h channel, n complex state, l step.
"""

import triton
import triton.language as tl


@triton.jit
def _times(ax, ay, bx, by):
    return ax * bx - ay * by, ax * by + ay * bx


@triton.jit
def _back(gx, gy, bx, by):
    """g · conj(b)."""
    return gx * bx + gy * by, gy * bx - gx * by


@triton.jit
def _power(l, ax, ay, BITS: tl.constexpr):
    """a^l for whole numbers l ≥ 0 below 2^BITS: l (L, 1), a (1, N) -> (L, N)."""
    px, py = l * 0.0 + ax * 0.0 + 1.0, l * 0.0 + ax * 0.0
    for bit in tl.static_range(BITS):
        qx, qy = _times(px, py, ax, ay)
        odd = ((l >> bit) & 1) == 1
        px, py = tl.where(odd, qx, px), tl.where(odd, qy, py)
        ax, ay = _times(ax, ay, ax, ay)
    return px, py


@triton.jit
def _pair(base, live):
    x, y = tl.load(base, mask=live, other=0.0), tl.load(base + 1, mask=live, other=0.0)
    return x.to(tl.float64), y.to(tl.float64)


@triton.jit
def _put(base, x, y, live):
    tl.store(base, x.to(base.dtype.element_ty), mask=live)
    tl.store(base + 1, y.to(base.dtype.element_ty), mask=live)


@triton.jit
def _inverse(x, y):
    size = x * x + y * y
    return x / size, -y / size


@triton.jit
def _series(zx, zy, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    """a + b z + c z² + d z³."""
    x, y = _times(zx, zy, c + d * zx, d * zy)
    x, y = _times(zx, zy, b + x, y)
    return a + x, y


@triton.jit
def _sampled(zx, zy, BILINEAR: tl.constexpr):
    """Of z = dt·A: Ā and its slope in z; B̄ / (dt·B) and its slope. Near 0 quotients are sums of powers."""
    if BILINEAR:
        wx, wy = _inverse(1.0 - 0.5 * zx, -0.5 * zy)
        ax, ay = _times(1.0 + 0.5 * zx, 0.5 * zy, wx, wy)
        sx, sy = _times(wx, wy, wx, wy)
        vx, vy = 0.5 * sx, 0.5 * sy
    else:
        size = tl.exp(zx)
        ax, ay = size * tl.cos(zy), size * tl.sin(zy)
        sx, sy = ax, ay
        tiny = zx * zx + zy * zy < 1e-6
        ix, iy = _inverse(tl.where(tiny, 1.0, zx), tl.where(tiny, 0.0, zy))
        wx, wy = _times(ax - 1.0, ay, ix, iy)
        px, py = _series(zx, zy, 1.0, 0.5, 1.0 / 6, 1.0 / 24)
        wx, wy = tl.where(tiny, px, wx), tl.where(tiny, py, wy)
        vx, vy = _times(ax - wx, ay - wy, ix, iy)
        px, py = _series(zx, zy, 0.5, 1.0 / 3, 0.125, 1.0 / 30)
        vx, vy = tl.where(tiny, px, vx), tl.where(tiny, py, vy)
    return ax, ay, sx, sy, wx, wy, vx, vy


@triton.jit(do_not_specialize=("h", "n", "systems"))
def sample(
    inv_dt, A_real, A_imag, B, A_bar, B_bar, rate, rest, h, n, systems, BILINEAR: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Ā and B̄ (h, n, 2) float64 from what S4D learns. A program: a channel, with A and B of channel mod systems.

    rate, rest: the rate in float32, which is how numbers come, and what that leaves of it."""
    channel, i = tl.program_id(0), tl.arange(0, N)
    live = i < n
    own = (channel % systems).to(tl.int64) * n + i
    dt = tl.exp(tl.load(inv_dt + channel).to(tl.float64))
    dt = dt * rate + dt * rest
    ax = -tl.exp(tl.load(A_real + own, mask=live, other=0.0).to(tl.float64))
    ay = -tl.load(A_imag + own, mask=live, other=0.0).to(tl.float64)
    px, py, _, _, wx, wy, _, _ = _sampled(dt * ax, dt * ay, BILINEAR)
    bx, by = _pair(B + own * 2, live)
    bx, by = _times(dt * bx, dt * by, wx, wy)
    at = (channel.to(tl.int64) * n + i) * 2
    _put(A_bar + at, px, py, live)
    _put(B_bar + at, bx, by, live)


@triton.jit(do_not_specialize=("h", "n", "systems"))
def sample_back(
    inv_dt, A_real, A_imag, B, dA_bar, dB_bar, dinv_dt, dA_real, dA_imag, dB, rate, rest, h, n, systems,
    BILINEAR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of inv_dt (h), and of each channel's A_real, A_imag (h, n) and B (h, n, 2). A program: a channel."""
    channel, i = tl.program_id(0), tl.arange(0, N)
    live = i < n
    own = (channel % systems).to(tl.int64) * n + i
    dt = tl.exp(tl.load(inv_dt + channel).to(tl.float64))
    dt = dt * rate + dt * rest
    ax = -tl.exp(tl.load(A_real + own, mask=live, other=0.0).to(tl.float64))
    ay = -tl.load(A_imag + own, mask=live, other=0.0).to(tl.float64)
    _, _, sx, sy, wx, wy, vx, vy = _sampled(dt * ax, dt * ay, BILINEAR)
    bx, by = _pair(B + own * 2, live)
    at = channel.to(tl.int64) * n + i
    gx, gy = _pair(dA_bar + at * 2, live)
    hx, hy = _pair(dB_bar + at * 2, live)
    zx, zy = _back(gx, gy, sx, sy)
    ux, uy = _back(hx, hy, dt * wx, dt * wy)
    _put(dB + at * 2, ux, uy, live)
    tx, ty = _times(dt * bx, dt * by, vx, vy)
    ux, uy = _back(hx, hy, tx, ty)
    zx, zy = zx + ux, zy + uy
    tx, ty = _times(bx, by, wx, wy)
    slope = hx * tx + hy * ty + zx * ax + zy * ay
    tl.store(dinv_dt + channel, (tl.sum(tl.where(live, slope, 0.0), 0) * dt).to(tl.float32))
    tl.store(dA_real + at, (zx * dt * ax).to(tl.float32), mask=live)
    tl.store(dA_imag + at, (-zy * dt).to(tl.float32), mask=live)


@triton.jit(do_not_specialize=("h", "n", "c"))
def tables(
    A, B, C, D, taps, read, write, powers, h, n, c, Q: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """taps (c, h, q), read (c, h, q, 2n), write (h, q, 2n), powers (q + 1, h, 2n), float32. A program: a channel."""
    channel = tl.program_id(0).to(tl.int64)
    l = tl.arange(0, Q)
    k = 0
    while k < c:
        line = k * h + channel
        total = tl.zeros((Q,), tl.float64)
        if D is not None:
            total += tl.where(l == 0, tl.load(D + line), 0.0)
        done = 0
        while done < n:
            i = done + tl.arange(0, N)
            live = (i < n)[None, :]
            ax, ay = _pair(A + ((channel * n + i) * 2)[None, :], live)
            bx, by = _pair(B + ((channel * n + i) * 2)[None, :], live)
            cx, cy = _pair(C + ((line * n + i) * 2)[None, :], live)
            px, py = _power(l[:, None], ax, ay, BITS)
            qx, qy = _times(px, py, ax, ay)
            at = (l * n)[:, None] + i[None, :]
            sx, sy = _times(cx, cy, qx, qy)
            _put(read + (line * Q * n + at) * 2, 2 * sx, -2 * sy, live)
            bx, by = _times(bx, by, px, py)
            total += 2 * tl.sum(tl.where(live, cx * bx - cy * by, 0.0), 1)
            if k == 0:
                _put(write + (channel * Q * n + ((Q - 1 - l) * n)[:, None] + i[None, :]) * 2, bx, by, live)
                own = powers + (channel * n + i)[None, :] * 2
                row = (l.to(tl.int64) * h * n * 2)[:, None]
                _put(own + row, px, py, live)
                _put(own + row + h * n * 2, qx, qy, live & (l == Q - 1)[:, None])
            done += N
        tl.store(taps + line * Q + l, total.to(tl.float32))
        k += 1


@triton.jit(do_not_specialize=("h", "n", "c"))
def tables_back(
    dtaps, dread, dwrite, dpowers, A, B, C, dA, dB, dC, h, n, c, Q: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Gradients of A, B (h, n, 2) and C (c, h, n, 2) from those of the tables. A program: a channel, N states."""
    channel = tl.program_id(0).to(tl.int64)
    l, i = tl.arange(0, Q), tl.program_id(1) * N + tl.arange(0, N)
    live = (i < n)[None, :]
    own = ((channel * n + i) * 2)[None, :]
    ax, ay = _pair(A + own, live)
    bx, by = _pair(B + own, live)
    px, py = _power(l[:, None], ax, ay, BITS)
    qx, qy = _times(px, py, ax, ay)
    # of the power l, and of the one after it
    gx, gy = _pair(dwrite + (channel * Q * n + ((Q - 1 - l) * n)[:, None] + i[None, :]) * 2, live)
    sum_x, sum_y = _back(gx, gy, px, py)
    db_x, db_y = tl.sum(sum_x, 0), tl.sum(sum_y, 0)
    now_x, now_y = _back(gx, gy, bx, by)
    next_x, next_y = _pair(dpowers + ((l + 1).to(tl.int64) * h * n * 2)[:, None] + own, live)
    k = 0
    while k < c:
        line = k * h + channel
        cx, cy = _pair(C + ((line * n + i) * 2)[None, :], live)
        gx, gy = _pair(dread + (line * Q * n + (l * n)[:, None] + i[None, :]) * 2, live)
        gx, gy = 2 * gx, -2 * gy
        rx, ry = _back(gx, gy, qx, qy)
        tx, ty = _back(gx, gy, cx, cy)
        next_x, next_y = next_x + tx, next_y + ty
        g = 2 * tl.load(dtaps + line * Q + l).to(tl.float64)[:, None]
        wx, wy = _times(bx, by, px, py)  # the tap is 2 Re(C B Ā^l)
        rx, ry = rx + g * wx, ry - g * wy
        _put(dC + (line * n + i) * 2, tl.sum(rx, 0), tl.sum(ry, 0), i < n)
        wx, wy = _times(cx, cy, px, py)
        db_x, db_y = db_x + tl.sum(g * wx, 0), db_y - tl.sum(g * wy, 0)
        wx, wy = _times(cx, cy, bx, by)
        now_x, now_y = now_x + g * wx, now_y - g * wy
        k += 1
    _put(dB + (channel * n + i) * 2, db_x, db_y, i < n)
    ex, ey = _power(tl.maximum(l - 1, 0)[:, None], ax, ay, BITS)
    step = l.to(tl.float64)[:, None]
    da_x, da_y = _back(now_x, now_y, step * ex, step * ey)
    more_x, more_y = _back(next_x, next_y, (step + 1) * px, (step + 1) * py)
    _put(dA + (channel * n + i) * 2, tl.sum(da_x + more_x, 0), tl.sum(da_y + more_y, 0), i < n)
