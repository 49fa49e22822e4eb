"""kalman in Triton, Joseph's form: a lane walks one series, its matrices number by number in registers.

A matrix is a tuple of numbers of all lanes: row by row, or, if symmetric, its lower triangle row by row. Loops over
entries are unrolled, so sizes are small (gpu.py says how small, and why). The definition is in reference.py.

Suffixes: s series of a program, t time step; N states, M observations; TIMES and ROWS: bits of A, C, Q, R, b, d (1, 2,
4, 8, 16, 32) that vary in time, and that each series has of its own.
"""

import triton
import triton.language as tl

#: How a matrix lies in a tuple.
PLAIN: tl.constexpr = tl.constexpr(0)
TURNED: tl.constexpr = tl.constexpr(1)
PACKED: tl.constexpr = tl.constexpr(2)


@triton.constexpr_function
def at(i, j):
    """Place of entry (i, j) of a symmetric matrix."""
    return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i


@triton.constexpr_function
def index(i, j, rows, columns, kind):
    """Place of entry (i, j) of a matrix (rows, columns)."""
    if kind == 2:
        return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i
    return i * columns + j if kind == 0 else j * rows + i


@triton.jit
def times(X, Y, I: tl.constexpr, K: tl.constexpr, J: tl.constexpr, XK: tl.constexpr, YK: tl.constexpr):
    """X Y (I, J) row by row; X (I, K) and Y (K, J) lie as XK and YK say."""
    out = ()
    for i in tl.static_range(I):
        for j in tl.static_range(J):
            v = X[index(i, 0, I, K, XK)] * Y[index(0, j, K, J, YK)]
            for k in tl.static_range(1, K):
                v += X[index(i, k, I, K, XK)] * Y[index(k, j, K, J, YK)]
            out = out + (v,)
    return out


@triton.jit
def times_symmetric(X, Y, I: tl.constexpr, K: tl.constexpr, XK: tl.constexpr, YK: tl.constexpr):
    """X Y (I, I), which is known to be symmetric."""
    out = ()
    for i in tl.static_range(I):
        for j in tl.static_range(i + 1):
            v = X[index(i, 0, I, K, XK)] * Y[index(0, j, K, I, YK)]
            for k in tl.static_range(1, K):
                v += X[index(i, k, I, K, XK)] * Y[index(k, j, K, I, YK)]
            out = out + (v,)
    return out


@triton.jit
def plus(X, Y, COUNT: tl.constexpr):
    """X + Y, number by number."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (X[i] + Y[i],)
    return out


@triton.jit
def minus(X, Y, COUNT: tl.constexpr):
    """X − Y, number by number."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (X[i] - Y[i],)
    return out


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    """COUNT zeros like `like`."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros_like(like),)
    return out


@triton.jit
def own(where, s, stride, OWN: tl.constexpr):
    """Where a series' own matrices lie; those of all series are loaded once, as plain numbers."""
    if OWN and where is not None:
        where += s * stride
    return where


@triton.jit
def load(where, COUNT: tl.constexpr):
    """COUNT adjacent numbers."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(where + i),)
    return out


@triton.jit
def load_symmetric(where, N: tl.constexpr):
    """The symmetric part of (N, N)."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            out = out + ((tl.load(where + i * N + j) + tl.load(where + j * N + i)) * 0.5,)
        out = out + (tl.load(where + i * N + i),)
    return out


@triton.jit
def save(where, X, live, COUNT: tl.constexpr):
    """Store numbers side by side."""
    for i in tl.static_range(COUNT):
        tl.store(where + i, X[i], mask=live)


@triton.jit
def save_symmetric(where, X, live, N: tl.constexpr):
    """Store a symmetric matrix as (N, N)."""
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            tl.store(where + i * N + j, X[at(i, j)], mask=live)


@triton.jit
def masked(C, R, y, N: tl.constexpr, M: tl.constexpr):
    """C and R as they are where entries of y are missing: rows of zeros, in R but for a unit diagonal."""
    C_masked = ()
    R_masked = ()
    for i in tl.static_range(M):
        here = y[i] == y[i]
        for k in tl.static_range(N):
            C_masked = C_masked + (tl.where(here, C[i * N + k], 0.0),)
        for j in tl.static_range(i + 1):
            R_masked = R_masked + (tl.where(here & (y[j] == y[j]), R[at(i, j)], 1.0 if i == j else 0.0),)
    return C_masked, R_masked


@triton.jit
def residual(y, C, d, mean, N: tl.constexpr, M: tl.constexpr):
    """e = y − C mean − d, 0 where y is missing, and how many entries are not."""
    e = ()
    seen = tl.zeros_like(y[0])
    for i in tl.static_range(M):
        v = y[i] - d[i]
        for k in tl.static_range(N):
            v -= C[i * N + k] * mean[k]
        here = y[i] == y[i]
        e = e + (tl.where(here, v, 0.0),)
        seen += tl.where(here, 1.0, 0.0)
    return e, seen


@triton.jit
def factorise(S, M: tl.constexpr):
    """S = L D Lᵀ: L below the diagonal, D⁻¹ on it, and log det S; NaN from the first pivot that is not above 0."""
    L = ()
    logdet = tl.zeros_like(S[0])
    for i in tl.static_range(M):
        row = ()
        for j in tl.static_range(i):
            v = S[at(i, j)]
            for k in tl.static_range(j):
                v -= row[k] * L[at(j, k)]
            row = row + (v,)
            L = L + (v * L[at(j, j)],)
        pivot = S[at(i, i)]
        for k in tl.static_range(i):
            pivot -= row[k] * L[at(i, k)]
        pivot = tl.where(pivot > 0, pivot, float("nan"))
        logdet += tl.log(pivot)
        L = L + (1 / pivot,)
    return L, logdet


@triton.jit
def solve(L, X, columns: tl.constexpr, M: tl.constexpr):
    """(S⁻¹ X)ᵀ (columns, M), row by row; X (M, columns)."""
    out = ()
    for c in tl.static_range(columns):
        z = ()
        for i in tl.static_range(M):
            v = X[i * columns + c]
            for k in tl.static_range(i):
                v -= L[at(i, k)] * z[k]
            z = z + (v,)
        w = ()
        for last in tl.static_range(M):
            v = z[M - 1 - last] * L[at(M - 1 - last, M - 1 - last)]
            for k in tl.static_range(last):
                v -= L[at(M - last + k, M - 1 - last)] * w[k]
            w = (v,) + w
        out = out + w
    return out


@triton.jit
def correct(P, C, R, N: tl.constexpr, M: tl.constexpr):
    """Z = C P, the factors of S = Z Cᵀ + R, log det S, K = P Cᵀ S⁻¹, rest = I − K C, rest P, and the filtered
    covariance rest P restᵀ + K R Kᵀ."""
    Z = times(C, P, M, N, N, PLAIN, PACKED)
    S = plus(times_symmetric(Z, C, M, N, PLAIN, TURNED), R, M * (M + 1) // 2)
    L, logdet = factorise(S, M)
    K = solve(L, Z, N, M)
    KC = times(K, C, N, M, N, PLAIN, PLAIN)
    rest = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            rest = rest + ((1.0 - KC[i * N + j]) if i == j else -KC[i * N + j],)
    rest_P = times(rest, P, N, N, N, PLAIN, PACKED)
    KR = times(K, R, N, M, M, PLAIN, PACKED)
    filtered = plus(
        times_symmetric(rest_P, rest, N, N, PLAIN, TURNED), times_symmetric(KR, K, N, M, PLAIN, TURNED),
        N * (N + 1) // 2,
    )  # fmt: skip
    return Z, L, logdet, K, rest, rest_P, filtered


@triton.jit(do_not_specialize=("series", "steps"))
def forward(
    y, A, C, Q, R, b, d, mean0, cov0, index, mean, cov, predicted_mean, predicted_cov, loglik, mean_next, cov_next,
    failed, series, steps, y_s, y_t, A_s, A_t, C_s, C_t, Q_s, Q_t, R_s, R_t, b_s, b_t, d_s, d_t, mean0_s, cov0_s,
    N: tl.constexpr, M: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, SHARED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Moments, log-likelihoods and the next state; `failed`: the first step of each series without a gain, or `steps`.

    index: rows of the state, read and written, negative to skip a series. SHARED: of the covariances only those of the
    first series are wanted. There is a step at least.
    """
    TRIANGLE: tl.constexpr = N * (N + 1) // 2
    s = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = s < series
    s = tl.minimum(s, series - 1)
    row = s
    if index is not None:
        row = tl.load(index + s).to(tl.int64)
        live = live & (row >= 0)
        row = tl.maximum(row, 0)
    live_cov = live & (s == 0) if SHARED else live
    y += s * y_s
    A, C = own(A, s, A_s, ROWS & 1), own(C, s, C_s, ROWS & 2)
    Q, R = own(Q, s, Q_s, ROWS & 4), own(R, s, R_s, ROWS & 8)
    m = load(mean0 + row * mean0_s, N)
    P = load_symmetric(cov0 + row * cov0_s, N)
    A_now, C_now, Q_now, R_now = load(A, N * N), load(C, M * N), load_symmetric(Q, N), load_symmetric(R, M)
    b_now, d_now = zeros(m[0], N), zeros(m[0], M)
    if b is not None:
        b = own(b, s, b_s, ROWS & 16)
        b_now = load(b, N)
    if d is not None:
        d = own(d, s, d_s, ROWS & 32)
        d_now = load(d, M)
    token = s * steps
    when = tl.zeros_like(s) + steps
    t = tl.program_id(0).to(tl.int64) * 0
    ahead = load(y, M)  # under way while the step before is computed
    while t < steps:
        here = ahead
        ahead = load(y + tl.minimum(t + 1, steps - 1) * y_t, M)
        if TIMES & 1:
            A_now = load(A + t * A_t, N * N)
        if TIMES & 2:
            C_now = load(C + t * C_t, M * N)
        if TIMES & 4:
            Q_now = load_symmetric(Q + t * Q_t, N)
        if TIMES & 8:
            R_now = load_symmetric(R + t * R_t, M)
        if TIMES & 16:
            b_now = load(b + t * b_t, N)
        if TIMES & 32:
            d_now = load(d + t * d_t, M)
        if predicted_mean is not None:
            save(predicted_mean + token * N, m, live, N)
            save_symmetric(predicted_cov + token * (N * N), P, live_cov, N)
        e, seen = residual(here, C_now, d_now, m, N, M)
        C_here, R_here = masked(C_now, R_now, here, N, M)
        _, L, logdet, K, _, _, P = correct(P, C_here, R_here, N, M)
        when = tl.where((logdet != logdet) & (when == steps), t, when)
        w = solve(L, e, 1, M)
        square = w[0] * e[0]
        for i in tl.static_range(1, M):
            square += w[i] * e[i]
        tl.store(loglik + token, -0.5 * (square + logdet + seen * 1.8378770664093453), mask=live)
        m = plus(m, times(K, e, N, M, 1, PLAIN, PLAIN), N)
        if mean is not None:
            save(mean + token * N, m, live, N)
            save_symmetric(cov + token * (N * N), P, live_cov, N)
        m = plus(times(A_now, m, N, N, 1, PLAIN, PLAIN), b_now, N)
        AP = times(A_now, P, N, N, N, PLAIN, PACKED)
        P = plus(times_symmetric(AP, A_now, N, N, PLAIN, TURNED), Q_now, TRIANGLE)
        token += 1
        t += 1
    save(mean_next + row * N, m, live, N)
    save_symmetric(cov_next + row * (N * N), P, live_cov, N)
    tl.store(failed + s, when, mask=live)
