"""The gradient of kalman in Triton: that of `step_backward` in reference.py, under the same names.

Suffixes and layouts as in gpu_kernels.py; before, before_cov: predicted moments. SHARED: gradients of covariances came
once, and belong to the first series.
"""

import triton
import triton.language as tl

from stateline.ops.kalman.gpu_kernels import (
    PACKED,
    PLAIN,
    TURNED,
    at,
    correct,
    load,
    load_symmetric,
    masked,
    minus,
    own,
    plus,
    residual,
    save,
    save_symmetric,
    solve,
    times,
    times_symmetric,
    zeros,
)


@triton.jit
def _whole(X, N: tl.constexpr):
    """A symmetric matrix row by row."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            out = out + (X[at(i, j)],)
    return out


@triton.jit
def _give(out, X, place, live, COUNT: tl.constexpr, OWN: tl.constexpr):
    """Store what each series has, or the sum over those of a program."""
    for i in tl.static_range(COUNT):
        if OWN:
            tl.store(out + place * COUNT + i, X[i], mask=live)
        else:
            tl.store(out + place * COUNT + i, tl.sum(tl.where(live, X[i], 0.0), 0))


@triton.jit
def _flush(out, X, s, live, t, steps, COUNT: tl.constexpr, OWN: tl.constexpr, VARIES: tl.constexpr):
    """Give a step's part of a gradient (series or programs, steps, COUNT) and begin anew; of a constant, go on."""
    rest = X
    if VARIES:
        place = s if OWN else tl.program_id(0).to(tl.int64)
        _give(out, X, place * steps + t, live, COUNT, OWN)
        rest = zeros(X[0], COUNT)
    return rest


@triton.jit
def _flush_symmetric(out, X, s, live, t, steps, N: tl.constexpr, OWN: tl.constexpr, VARIES: tl.constexpr):
    """The same of a symmetric matrix (N, N)."""
    rest = X
    if VARIES:
        place = s if OWN else tl.program_id(0).to(tl.int64)
        _give(out, _whole(X, N), place * steps + t, live, N * N, OWN)
        rest = zeros(X[0], N * (N + 1) // 2)
    return rest


@triton.jit
def _finish(out, X, s, live, COUNT: tl.constexpr, OWN: tl.constexpr, VARIES: tl.constexpr):
    """Give the gradient of a constant (series or programs, COUNT), if there is one."""
    if not VARIES and out is not None:
        _give(out, X, s if OWN else tl.program_id(0).to(tl.int64), live, COUNT, OWN)


@triton.jit
def _receive(dm, dP, gm, gP, token, cov_token, weight, N: tl.constexpr):
    """dm and dP with the gradients of results added, if there are any; of covariances, of series whose weight is 1."""
    if gm is not None:
        dm = plus(dm, load(gm + token * N, N), N)
    if gP is not None:
        given = load_symmetric(gP + cov_token * (N * N), N)
        out = ()
        for i in tl.static_range(N * (N + 1) // 2):
            out = out + (dP[i] + tl.where(weight, given[i], 0.0),)
        dP = out
    return dm, dP


@triton.jit
def _back_to_residual(z, l, w, M: tl.constexpr):
    """de = z − l w."""
    out = ()
    for i in tl.static_range(M):
        out = out + (z[i] - l * w[i],)
    return out


@triton.jit
def _back_through_noise(l, w, z, L, here, M: tl.constexpr):
    """dS = l (w wᵀ − S⁻¹)/2 − sym(z wᵀ), and the part of it that reaches R: 0 at missing entries."""
    one = tl.zeros_like(l) + 1.0
    eye = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            eye = eye + ((one if i == j else one * 0.0),)
    inverse = solve(L, eye, M, M)
    dS = ()
    dR = ()
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1):
            v = (l * (w[i] * w[j] - inverse[i * M + j]) - z[i] * w[j] - w[i] * z[j]) * 0.5
            dS = dS + (v,)
            dR = dR + (tl.where((here[i] == here[i]) & (here[j] == here[j]), v, 0.0),)
    return dS, dR


@triton.jit
def _back_to_cov(W, rest, g, w, dS, C, N: tl.constexpr, M: tl.constexpr):
    """restᵀ W rest + sym(g (Cᵀ w)ᵀ) + Cᵀ dS C."""
    Wr = times(W, rest, N, N, N, PACKED, PLAIN)
    inner = times_symmetric(rest, Wr, N, N, TURNED, PLAIN)
    SC = times(dS, C, M, M, N, PACKED, PLAIN)
    seen = times_symmetric(C, SC, N, M, TURNED, PLAIN)
    Cw = times(C, w, N, M, 1, TURNED, PLAIN)
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1):
            out = out + (inner[at(i, j)] + seen[at(i, j)] + (g[i] * Cw[j] + Cw[i] * g[j]) * 0.5,)
    return out


@triton.jit
def _back_to_observer(w, Pg, dS, Z, de, m, KW, rest_P, N: tl.constexpr, M: tl.constexpr):
    """dC = w (P g)ᵀ + 2 dS C P − de mᵀ − 2 Kᵀ W rest P."""
    SZ = times(dS, Z, M, M, N, PACKED, PLAIN)
    through_gain = times(KW, rest_P, M, N, N, PLAIN, PLAIN)
    out = ()
    for i in tl.static_range(M):
        for k in tl.static_range(N):
            both = SZ[i * N + k] - through_gain[i * N + k]
            out = out + (w[i] * Pg[k] - de[i] * m[k] + 2 * both,)
    return out


@triton.jit
def _back_to_transition(dm, m, dP, A, P, N: tl.constexpr):
    """dA = dm mᵀ + 2 dP A P, with the filtered moments m, P."""
    PAP = times(dP, times(A, P, N, N, N, PLAIN, PACKED), N, N, N, PACKED, PLAIN)
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            out = out + (dm[i] * m[j] + 2 * PAP[i * N + j],)
    return out


@triton.jit(do_not_specialize=("series", "steps"))
def backward(
    y, A, C, R, d, before, before_cov, gmean, gcov, gbefore, gbefore_cov, gloglik, gnext, gnext_cov, dy, dA, dC, dQ, dR,
    db, dd, dmean0, dcov0, series, steps, y_s, y_t, A_s, A_t, C_s, C_t, R_s, R_t, d_s, d_t, m_s, m_t, P_s, P_t,
    N: tl.constexpr, M: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of everything, from the last step to the first; g…: those of the results, contiguous, None for zero."""
    TRIANGLE: tl.constexpr = N * (N + 1) // 2
    s = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = s < series
    s = tl.minimum(s, series - 1)
    weight = live & (s == 0) if SHARED else live
    cov_row = s * 0 if SHARED else s
    y += s * y_s
    A, C, R = own(A, s, A_s, ROWS & 1), own(C, s, C_s, ROWS & 2), own(R, s, R_s, ROWS & 8)
    zero = tl.zeros((LANES,), before.dtype.element_ty)
    before += s * m_s
    before_cov += s * P_s
    A_now, C_now, R_now = load(A, N * N), load(C, M * N), load_symmetric(R, M)
    d = own(d, s, d_s, ROWS & 32)
    d_now = zeros(zero, M) if d is None else load(d, M)
    dm, dP = _receive(zeros(zero, N), zeros(zero, TRIANGLE), gnext, gnext_cov, s, cov_row, weight, N)
    sum_A, sum_C = zeros(zero, N * N), zeros(zero, M * N)
    sum_Q, sum_R = zeros(zero, TRIANGLE), zeros(zero, M * (M + 1) // 2)
    sum_b, sum_d = zeros(zero, N), zeros(zero, M)
    t = tl.program_id(0).to(tl.int64) * 0 + steps - 1
    while t >= 0:
        token, cov_token = s * steps + t, cov_row * steps + t
        here, m, P = load(y + t * y_t, M), load(before + t * m_t, N), load_symmetric(before_cov + t * P_t, N)
        if TIMES & 1:
            A_now = load(A + t * A_t, N * N)
        if TIMES & 2:
            C_now = load(C + t * C_t, M * N)
        if TIMES & 8:
            R_now = load_symmetric(R + t * R_t, M)
        if TIMES & 32:
            d_now = load(d + t * d_t, M)
        e, _ = residual(here, C_now, d_now, m, N, M)
        C_here, R_here = masked(C_now, R_now, here, N, M)
        Z, L, _, K, rest, rest_P, P_filtered = correct(P, C_here, R_here, N, M)
        m_filtered = plus(m, times(K, e, N, M, 1, PLAIN, PLAIN), N)
        # through the prediction
        sum_A = plus(sum_A, _back_to_transition(dm, m_filtered, dP, A_now, P_filtered, N), N * N)
        sum_Q, sum_b = plus(sum_Q, dP, TRIANGLE), plus(sum_b, dm, N)
        sum_A = _flush(dA, sum_A, s, live, t, steps, N * N, ROWS & 1, TIMES & 1)
        sum_Q = _flush_symmetric(dQ, sum_Q, s, live, t, steps, N, ROWS & 4, TIMES & 4)
        sum_b = _flush(db, sum_b, s, live, t, steps, N, ROWS & 16, TIMES & 16)
        g = times(A_now, dm, N, N, 1, TURNED, PLAIN)
        W = times_symmetric(A_now, times(dP, A_now, N, N, N, PACKED, PLAIN), N, N, TURNED, PLAIN)
        g, W = _receive(g, W, gmean, gcov, token, cov_token, weight, N)
        slope = zero if gloglik is None else tl.load(gloglik + token)
        # through the correction
        w, z = solve(L, e, 1, M), times(K, g, M, N, 1, TURNED, PLAIN)
        de = _back_to_residual(z, slope, w, M)
        save(dy + token * M, de, live, M)
        sum_d = minus(sum_d, de, M)
        dS, seen = _back_through_noise(slope, w, z, L, here, M)
        KW = times(K, W, M, N, N, TURNED, PACKED)
        sum_R = plus(sum_R, plus(seen, times_symmetric(KW, K, M, N, PLAIN, PLAIN), M * (M + 1) // 2),
                      M * (M + 1) // 2)  # fmt: skip
        Pg = times(P, g, N, N, 1, PACKED, PLAIN)
        sum_C = plus(sum_C, _back_to_observer(w, Pg, dS, Z, de, m, KW, rest_P, N, M), M * N)
        sum_C = _flush(dC, sum_C, s, live, t, steps, M * N, ROWS & 2, TIMES & 2)
        sum_R = _flush_symmetric(dR, sum_R, s, live, t, steps, M, ROWS & 8, TIMES & 8)
        sum_d = _flush(dd, sum_d, s, live, t, steps, M, ROWS & 32, TIMES & 32)
        dP = _back_to_cov(W, rest, g, w, dS, C_here, N, M)
        dm = minus(g, times(C_here, de, N, M, 1, TURNED, PLAIN), N)
        dm, dP = _receive(dm, dP, gbefore, gbefore_cov, token, cov_token, weight, N)
        t -= 1
    _finish(dA, sum_A, s, live, N * N, ROWS & 1, TIMES & 1)
    _finish(dC, sum_C, s, live, M * N, ROWS & 2, TIMES & 2)
    _finish(dQ, _whole(sum_Q, N), s, live, N * N, ROWS & 4, TIMES & 4)
    _finish(dR, _whole(sum_R, M), s, live, M * M, ROWS & 8, TIMES & 8)
    _finish(db, sum_b, s, live, N, ROWS & 16, TIMES & 16)
    _finish(dd, sum_d, s, live, M, ROWS & 32, TIMES & 32)
    save(dmean0 + s * N, dm, live, N)
    save_symmetric(dcov0 + s * (N * N), dP, live, N)
