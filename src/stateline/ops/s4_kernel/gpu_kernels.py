"""GPU kernels of s4_kernel and s4_cauchy, in Triton. The definition is in reference.py.

A phase is a product of a step's number and turns a step, reduced to a fraction of a turn in float64; what follows is
float32. The Cauchy sums are float64 throughout. Sums over steps and frequencies run in a fixed order.
Suffixes: r read-out, h system, n state, l step, k frequency.
"""

import triton
import triton.language as tl

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def powers(l, re, turns):
    """exp(l z) of z = re + 2πi·turns, for float64 steps l: (real, imaginary) float32."""
    phase = l * turns
    angle = ((phase - tl.floor(phase + 0.5)) * TURN).to(tl.float32)
    size = tl.exp((l * re).to(tl.float32))
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def forward(c, z, out, tiles, h, n, t, L: tl.constexpr):
    """K (r, h, t) from c (r, h, n, 2) and z (h, n, 2): re and turns. A program: a read-out of a system, L steps."""
    index = tl.program_id(0)
    line = (index // tiles).to(tl.int64)
    l = (index % tiles) * L + tl.arange(0, L)
    step = l.to(tl.float64)
    system = line % h
    total = tl.zeros((L,), tl.float32)
    s = 0
    while s < n:
        at, own = 2 * (line * n + s), 2 * (system * n + s)
        x, y = powers(step, tl.load(z + own), tl.load(z + own + 1))
        total += tl.load(c + at) * x - tl.load(c + at + 1) * y
        s += 1
    tl.store(out + line * t + l, 2 * total, mask=l < t)


@triton.jit
def backward(dk, c, z, dc, dz, blocks, h, n, t, N: tl.constexpr, L: tl.constexpr):
    """dc (r, h, n, 2) and each read-out's share of dz (r, h, n, 2) float64. A program: a line, N states, all steps."""
    index = tl.program_id(0)
    line = (index // blocks).to(tl.int64)
    s = (index % blocks) * N + tl.arange(0, N)
    live = s < n
    own = 2 * ((line % h) * n + s)
    re, turns = tl.load(z + own, mask=live, other=0.0), tl.load(z + own + 1, mask=live, other=0.0)
    sum_re, sum_im = tl.zeros((N,), tl.float64), tl.zeros((N,), tl.float64)
    first_re, first_im = tl.zeros((N,), tl.float64), tl.zeros((N,), tl.float64)
    j = tl.arange(0, L)
    start = 0
    while start < t:
        l = start + j
        g = tl.load(dk + line * t + l, mask=l < t, other=0.0)[None, :]
        x, y = powers(l.to(tl.float64)[None, :], re[:, None], turns[:, None])
        part_re, part_im = tl.sum(g * x, 1).to(tl.float64), tl.sum(g * y, 1).to(tl.float64)
        near = g * j.to(tl.float32)[None, :]
        sum_re += part_re
        sum_im += part_im
        first_re += tl.sum(near * x, 1).to(tl.float64) + start * part_re
        first_im += tl.sum(near * y, 1).to(tl.float64) + start * part_im
        start += L
    at = 2 * (line * n + s)
    c_re, c_im = tl.load(c + at, mask=live, other=0.0), tl.load(c + at + 1, mask=live, other=0.0)
    tl.store(dc + at, (2 * sum_re).to(tl.float32), mask=live)
    tl.store(dc + at + 1, (-2 * sum_im).to(tl.float32), mask=live)
    tl.store(dz + at, 2 * (c_re * first_re - c_im * first_im), mask=live)
    tl.store(dz + at + 1, -2 * (c_re * first_im + c_im * first_re), mask=live)


@triton.jit
def fraction(p, q, s, c):
    """1 / ((c² q − 4 s²) − 4i s c p): (real, imaginary)."""
    below, side = c * c * q - 4 * s * s, -4 * s * c * p
    size = 1.0 / (below * below + side * side)
    return below * size, -side * size


@triton.jit
def cauchy(alpha, beta, p, q, sine, cosine, out, tiles, r, h, n, k, R: tl.constexpr, K: tl.constexpr):
    """Sums (r, h, k, 2). A program: a system, R read-outs, K frequencies."""
    index = tl.program_id(0)
    system = (index // tiles).to(tl.int64)
    f = (index % tiles) * K + tl.arange(0, K)
    s, c = tl.load(sine + f, mask=f < k, other=0.0), tl.load(cosine + f, mask=f < k, other=1.0)
    row = tl.program_id(1) * R + tl.arange(0, R)
    re, im = tl.zeros((R, K), tl.float64), tl.zeros((R, K), tl.float64)
    i = 0
    while i < n:
        x, y = fraction(tl.load(p + system * n + i), tl.load(q + system * n + i), s, c)
        at = (row * h + system) * n + i
        a = tl.load(alpha + at, mask=row < r, other=0.0)[:, None]
        b = tl.load(beta + at, mask=row < r, other=0.0)[:, None]
        re += a * (c * x)[None, :] - b * (s * y)[None, :]
        im += a * (c * y)[None, :] + b * (s * x)[None, :]
        i += 1
    at = 2 * (((row * h + system) * k)[:, None] + f[None, :])
    live = (row < r)[:, None] & (f < k)[None, :]
    tl.store(out + at, re, mask=live)
    tl.store(out + at + 1, im, mask=live)


@triton.jit
def cauchy_backward(g, alpha, beta, p, q, sine, cosine, da, db, dp, dq, r, h, n, k, K: tl.constexpr):
    """Gradients of the four. A program: a state of a system, all read-outs and frequencies."""
    index = tl.program_id(0).to(tl.int64)
    system, i = index // n, index % n
    own_p, own_q = tl.load(p + index), tl.load(q + index)
    sum_p, sum_q = tl.zeros((K,), tl.float64), tl.zeros((K,), tl.float64)
    row = 0
    while row < r:
        line = row * h + system
        at = line * n + i
        a, b = tl.load(alpha + at), tl.load(beta + at)
        sum_a, sum_b = tl.zeros((K,), tl.float64), tl.zeros((K,), tl.float64)
        first = 0
        while first < k:
            f = first + tl.arange(0, K)
            s, c = tl.load(sine + f, mask=f < k, other=0.0), tl.load(cosine + f, mask=f < k, other=1.0)
            x, y = fraction(own_p, own_q, s, c)
            g_re = tl.load(g + 2 * (line * k + f), mask=f < k, other=0.0)
            g_im = tl.load(g + 2 * (line * k + f) + 1, mask=f < k, other=0.0)
            back_re, back_im = g_re * x + g_im * y, g_re * y - g_im * x  # conj(g) times the fraction
            sum_a += back_re * c
            sum_b -= back_im * s
            above_re, above_im = a * c, b * s
            part_re, part_im = back_re * above_re - back_im * above_im, back_re * above_im + back_im * above_re
            sum_q -= (part_re * x - part_im * y) * c * c
            sum_p -= 4 * (part_re * y + part_im * x) * s * c
            first += K
        tl.store(da + at, tl.sum(sum_a, 0))
        tl.store(db + at, tl.sum(sum_b, 0))
        row += 1
    tl.store(dp + index, tl.sum(sum_p, 0))
    tl.store(dq + index, tl.sum(sum_q, 0))
