"""kalman in Triton, Joseph's form: a lane walks one series, its matrices number by number in registers.

A matrix is a tuple of numbers of all lanes: row by row, or, if symmetric, its lower triangle row by row. Loops over
entries are unrolled, so sizes are small (gpu.py says how small, and why). The definition is in reference.py; gradients
are those of its `step_backward`, under the same names.

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
def _at(i, j):
    """Place of entry (i, j) of a symmetric matrix."""
    return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i


@triton.constexpr_function
def _index(i, j, rows, columns, kind):
    """Place of entry (i, j) of a matrix (rows, columns)."""
    if kind == 2:
        return i * (i + 1) // 2 + j if i >= j else j * (j + 1) // 2 + i
    return i * columns + j if kind == 0 else j * rows + i


@triton.jit
def _times(X, Y, I: tl.constexpr, K: tl.constexpr, J: tl.constexpr, XK: tl.constexpr, YK: tl.constexpr):
    """X Y (I, J) row by row; X (I, K) and Y (K, J) lie as XK and YK say."""
    out = ()
    for i in tl.static_range(I):
        for j in tl.static_range(J):
            v = X[_index(i, 0, I, K, XK)] * Y[_index(0, j, K, J, YK)]
            for k in tl.static_range(1, K):
                v += X[_index(i, k, I, K, XK)] * Y[_index(k, j, K, J, YK)]
            out = out + (v,)
    return out


@triton.jit
def _times_symmetric(X, Y, I: tl.constexpr, K: tl.constexpr, XK: tl.constexpr, YK: tl.constexpr):
    """X Y (I, I), which is known to be symmetric."""
    out = ()
    for i in tl.static_range(I):
        for j in tl.static_range(i + 1):
            v = X[_index(i, 0, I, K, XK)] * Y[_index(0, j, K, I, YK)]
            for k in tl.static_range(1, K):
                v += X[_index(i, k, I, K, XK)] * Y[_index(k, j, K, I, YK)]
            out = out + (v,)
    return out


@triton.jit
def _plus(X, Y, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (X[i] + Y[i],)
    return out


@triton.jit
def _minus(X, Y, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (X[i] - Y[i],)
    return out


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros_like(like),)
    return out


@triton.jit
def _own(where, s, stride, OWN: tl.constexpr):
    """Where a series' own matrices lie; those of all series are loaded once, as plain numbers."""
    if OWN:
        where += s * stride
    return where


@triton.jit
def _load(where, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load(where + i),)
    return out


@triton.jit
def _load_symmetric(where, N: tl.constexpr):
    """The symmetric part of (N, N)."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i):
            out = out + ((tl.load(where + i * N + j) + tl.load(where + j * N + i)) * 0.5,)
        out = out + (tl.load(where + i * N + i),)
    return out


@triton.jit
def _save(where, X, live, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(where + i, X[i], mask=live)


@triton.jit
def _save_symmetric(where, X, live, N: tl.constexpr):
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            tl.store(where + i * N + j, X[_at(i, j)], mask=live)


@triton.jit
def _masked(C, R, y, N: tl.constexpr, M: tl.constexpr):
    """C and R as they are where entries of y are missing: rows of zeros, in R but for a unit diagonal."""
    C_masked = ()
    R_masked = ()
    for i in tl.static_range(M):
        here = y[i] == y[i]
        for k in tl.static_range(N):
            C_masked = C_masked + (tl.where(here, C[i * N + k], 0.0),)
        for j in tl.static_range(i + 1):
            R_masked = R_masked + (tl.where(here & (y[j] == y[j]), R[_at(i, j)], 1.0 if i == j else 0.0),)
    return C_masked, R_masked


@triton.jit
def _residual(y, C, d, mean, N: tl.constexpr, M: tl.constexpr):
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
def _factorise(S, M: tl.constexpr):
    """S = L D Lᵀ: L below the diagonal, D⁻¹ on it, and log det S; NaN from the first pivot that is not above 0."""
    L = ()
    logdet = tl.zeros_like(S[0])
    for i in tl.static_range(M):
        row = ()
        for j in tl.static_range(i):
            v = S[_at(i, j)]
            for k in tl.static_range(j):
                v -= row[k] * L[_at(j, k)]
            row = row + (v,)
            L = L + (v * L[_at(j, j)],)
        pivot = S[_at(i, i)]
        for k in tl.static_range(i):
            pivot -= row[k] * L[_at(i, k)]
        pivot = tl.where(pivot > 0, pivot, float("nan"))
        logdet += tl.log(pivot)
        L = L + (1 / pivot,)
    return L, logdet


@triton.jit
def _solve(L, X, columns: tl.constexpr, M: tl.constexpr):
    """(S⁻¹ X)ᵀ (columns, M), row by row; X (M, columns)."""
    out = ()
    for c in tl.static_range(columns):
        z = ()
        for i in tl.static_range(M):
            v = X[i * columns + c]
            for k in tl.static_range(i):
                v -= L[_at(i, k)] * z[k]
            z = z + (v,)
        w = ()
        for last in tl.static_range(M):
            v = z[M - 1 - last] * L[_at(M - 1 - last, M - 1 - last)]
            for k in tl.static_range(last):
                v -= L[_at(M - last + k, M - 1 - last)] * w[k]
            w = (v,) + w
        out = out + w
    return out


@triton.jit
def _correct(P, C, R, N: tl.constexpr, M: tl.constexpr):
    """Z = C P, the factors of S = Z Cᵀ + R, log det S, K = P Cᵀ S⁻¹, rest = I − K C, rest P, and the filtered
    covariance rest P restᵀ + K R Kᵀ."""
    Z = _times(C, P, M, N, N, PLAIN, PACKED)
    S = _plus(_times_symmetric(Z, C, M, N, PLAIN, TURNED), R, M * (M + 1) // 2)
    L, logdet = _factorise(S, M)
    K = _solve(L, Z, N, M)
    KC = _times(K, C, N, M, N, PLAIN, PLAIN)
    rest = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            rest = rest + ((1.0 - KC[i * N + j]) if i == j else -KC[i * N + j],)
    rest_P = _times(rest, P, N, N, N, PLAIN, PACKED)
    KR = _times(K, R, N, M, M, PLAIN, PACKED)
    filtered = _plus(
        _times_symmetric(rest_P, rest, N, N, PLAIN, TURNED), _times_symmetric(KR, K, N, M, PLAIN, TURNED),
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
    A, C = _own(A, s, A_s, ROWS & 1), _own(C, s, C_s, ROWS & 2)
    Q, R = _own(Q, s, Q_s, ROWS & 4), _own(R, s, R_s, ROWS & 8)
    m = _load(mean0 + row * mean0_s, N)
    P = _load_symmetric(cov0 + row * cov0_s, N)
    A_now, C_now, Q_now, R_now = _load(A, N * N), _load(C, M * N), _load_symmetric(Q, N), _load_symmetric(R, M)
    b_now, d_now = _zeros(m[0], N), _zeros(m[0], M)
    if b is not None:
        b = _own(b, s, b_s, ROWS & 16)
        b_now = _load(b, N)
    if d is not None:
        d = _own(d, s, d_s, ROWS & 32)
        d_now = _load(d, M)
    token = s * steps
    when = tl.zeros_like(s) + steps
    t = tl.program_id(0).to(tl.int64) * 0
    ahead = _load(y, M)  # under way while the step before is computed
    while t < steps:
        here = ahead
        ahead = _load(y + tl.minimum(t + 1, steps - 1) * y_t, M)
        if TIMES & 1:
            A_now = _load(A + t * A_t, N * N)
        if TIMES & 2:
            C_now = _load(C + t * C_t, M * N)
        if TIMES & 4:
            Q_now = _load_symmetric(Q + t * Q_t, N)
        if TIMES & 8:
            R_now = _load_symmetric(R + t * R_t, M)
        if TIMES & 16:
            b_now = _load(b + t * b_t, N)
        if TIMES & 32:
            d_now = _load(d + t * d_t, M)
        if predicted_mean is not None:
            _save(predicted_mean + token * N, m, live, N)
            _save_symmetric(predicted_cov + token * (N * N), P, live_cov, N)
        e, seen = _residual(here, C_now, d_now, m, N, M)
        C_here, R_here = _masked(C_now, R_now, here, N, M)
        _, L, logdet, K, _, _, P = _correct(P, C_here, R_here, N, M)
        when = tl.where((logdet != logdet) & (when == steps), t, when)
        w = _solve(L, e, 1, M)
        square = w[0] * e[0]
        for i in tl.static_range(1, M):
            square += w[i] * e[i]
        tl.store(loglik + token, -0.5 * (square + logdet + seen * 1.8378770664093453), mask=live)
        m = _plus(m, _times(K, e, N, M, 1, PLAIN, PLAIN), N)
        if mean is not None:
            _save(mean + token * N, m, live, N)
            _save_symmetric(cov + token * (N * N), P, live_cov, N)
        m = _plus(_times(A_now, m, N, N, 1, PLAIN, PLAIN), b_now, N)
        AP = _times(A_now, P, N, N, N, PLAIN, PACKED)
        P = _plus(_times_symmetric(AP, A_now, N, N, PLAIN, TURNED), Q_now, TRIANGLE)
        token += 1
        t += 1
    _save(mean_next + row * N, m, live, N)
    _save_symmetric(cov_next + row * (N * N), P, live_cov, N)
    tl.store(failed + s, when, mask=live)


@triton.jit
def _give(out, X, s, live, t, steps, COUNT: tl.constexpr, OWN: tl.constexpr, VARIES: tl.constexpr):
    """A gradient (series or programs, steps or 1, COUNT): what each series has, or the sum over those of a program."""
    place = s if OWN else tl.program_id(0).to(tl.int64)
    if VARIES:
        place = place * steps + t
    for i in tl.static_range(COUNT):
        if OWN:
            tl.store(out + place * COUNT + i, X[i], mask=live)
        else:
            tl.store(out + place * COUNT + i, tl.sum(tl.where(live, X[i], 0.0), 0))


@triton.jit
def _whole(X, N: tl.constexpr):
    """A symmetric matrix row by row."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            out = out + (X[_at(i, j)],)
    return out


@triton.jit
def _receive(to, where, weight, N: tl.constexpr):
    """`to` and the symmetric part of a gradient (N, N), of series whose weight is 1."""
    given = _load_symmetric(where, N)
    out = ()
    for i in tl.static_range(N * (N + 1) // 2):
        out = out + (to[i] + tl.where(weight, given[i], 0.0),)
    return out


@triton.jit
def _back_through_noise(l, w, z, L, here, M: tl.constexpr):
    """dS = l (w wᵀ − S⁻¹)/2 − sym(z wᵀ), and the part of it that reaches R: 0 at missing entries."""
    one = tl.zeros_like(l) + 1.0
    eye = ()
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            eye = eye + ((one if i == j else one * 0.0),)
    inverse = _solve(L, eye, M, M)
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
    Wr = _times(W, rest, N, N, N, PACKED, PLAIN)
    inner = _times_symmetric(rest, Wr, N, N, TURNED, PLAIN)
    SC = _times(dS, C, M, M, N, PACKED, PLAIN)
    seen = _times_symmetric(C, SC, N, M, TURNED, PLAIN)
    Cw = _times(C, w, N, M, 1, TURNED, PLAIN)
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1):
            out = out + (inner[_at(i, j)] + seen[_at(i, j)] + (g[i] * Cw[j] + Cw[i] * g[j]) * 0.5,)
    return out


@triton.jit
def _back_to_observer(w, Pg, dS, Z, de, m, KW, rest_P, N: tl.constexpr, M: tl.constexpr):
    """dC = w (P g)ᵀ + 2 dS C P − de mᵀ − 2 Kᵀ W rest P."""
    SZ = _times(dS, Z, M, M, N, PACKED, PLAIN)
    through_gain = _times(KW, rest_P, M, N, N, PLAIN, PLAIN)
    out = ()
    for i in tl.static_range(M):
        for k in tl.static_range(N):
            both = SZ[i * N + k] - through_gain[i * N + k]
            out = out + (w[i] * Pg[k] - de[i] * m[k] + 2 * both,)
    return out


@triton.jit
def _back_to_transition(dm, m, dP, A, P, N: tl.constexpr):
    """dA = dm mᵀ + 2 dP A P, with the filtered moments m, P."""
    PAP = _times(dP, _times(A, P, N, N, N, PLAIN, PACKED), N, N, N, PACKED, PLAIN)
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
    """Gradients of everything, from the last step to the first; g…: those of the results, contiguous, None for zero.

    before, before_cov: predicted moments. SHARED: those of covariances came once, and belong to the first series.
    """
    TRIANGLE: tl.constexpr = N * (N + 1) // 2
    s = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = s < series
    s = tl.minimum(s, series - 1)
    weight = live & (s == 0) if SHARED else live
    cov_row = s * 0 if SHARED else s
    y += s * y_s
    A, C, R = _own(A, s, A_s, ROWS & 1), _own(C, s, C_s, ROWS & 2), _own(R, s, R_s, ROWS & 8)
    zero = tl.zeros((LANES,), before.dtype.element_ty)
    before += s * m_s
    before_cov += s * P_s
    A_now, C_now, R_now = _load(A, N * N), _load(C, M * N), _load_symmetric(R, M)
    dm, dP = _zeros(zero, N), _zeros(zero, TRIANGLE)
    d_now = _zeros(zero, M)
    if d is not None:
        d = _own(d, s, d_s, ROWS & 32)
        d_now = _load(d, M)
    if gnext is not None:
        dm = _load(gnext + s * N, N)
    if gnext_cov is not None:
        dP = _receive(dP, gnext_cov + cov_row * (N * N), weight, N)
    sum_A, sum_C = _zeros(zero, N * N), _zeros(zero, M * N)
    sum_Q, sum_R = _zeros(zero, TRIANGLE), _zeros(zero, M * (M + 1) // 2)
    sum_b, sum_d = _zeros(zero, N), _zeros(zero, M)
    t = tl.program_id(0).to(tl.int64) * 0 + steps - 1
    while t >= 0:
        token, cov_token = s * steps + t, cov_row * steps + t
        here, m, P = _load(y + t * y_t, M), _load(before + t * m_t, N), _load_symmetric(before_cov + t * P_t, N)
        if TIMES & 1:
            A_now = _load(A + t * A_t, N * N)
        if TIMES & 2:
            C_now = _load(C + t * C_t, M * N)
        if TIMES & 8:
            R_now = _load_symmetric(R + t * R_t, M)
        if TIMES & 32:
            d_now = _load(d + t * d_t, M)
        e, _ = _residual(here, C_now, d_now, m, N, M)
        C_here, R_here = _masked(C_now, R_now, here, N, M)
        Z, L, _, K, rest, rest_P, P_filtered = _correct(P, C_here, R_here, N, M)
        m_filtered = _plus(m, _times(K, e, N, M, 1, PLAIN, PLAIN), N)
        # through the prediction
        sum_A = _plus(sum_A, _back_to_transition(dm, m_filtered, dP, A_now, P_filtered, N), N * N)
        sum_Q, sum_b = _plus(sum_Q, dP, TRIANGLE), _plus(sum_b, dm, N)
        if TIMES & 1:
            _give(dA, sum_A, s, live, t, steps, N * N, ROWS & 1, True)
            sum_A = _zeros(dm[0], N * N)
        if TIMES & 4:
            _give(dQ, _whole(sum_Q, N), s, live, t, steps, N * N, ROWS & 4, True)
            sum_Q = _zeros(dm[0], TRIANGLE)
        if TIMES & 16:
            _give(db, sum_b, s, live, t, steps, N, ROWS & 16, True)
            sum_b = _zeros(dm[0], N)
        g = _times(A_now, dm, N, N, 1, TURNED, PLAIN)
        W = _times_symmetric(A_now, _times(dP, A_now, N, N, N, PACKED, PLAIN), N, N, TURNED, PLAIN)
        if gmean is not None:
            g = _plus(g, _load(gmean + token * N, N), N)
        if gcov is not None:
            W = _receive(W, gcov + cov_token * (N * N), weight, N)
        slope = tl.zeros_like(dm[0])
        if gloglik is not None:
            slope = tl.load(gloglik + token)
        # through the correction
        w, z = _solve(L, e, 1, M), _times(K, g, M, N, 1, TURNED, PLAIN)
        de = ()
        for i in tl.static_range(M):
            de = de + (z[i] - slope * w[i],)
        _save(dy + token * M, de, live, M)
        sum_d = _minus(sum_d, de, M)
        dS, seen = _back_through_noise(slope, w, z, L, here, M)
        KW = _times(K, W, M, N, N, TURNED, PACKED)
        sum_R = _plus(sum_R, _plus(seen, _times_symmetric(KW, K, M, N, PLAIN, PLAIN), M * (M + 1) // 2),
                      M * (M + 1) // 2)  # fmt: skip
        Pg = _times(P, g, N, N, 1, PACKED, PLAIN)
        sum_C = _plus(sum_C, _back_to_observer(w, Pg, dS, Z, de, m, KW, rest_P, N, M), M * N)
        if TIMES & 2:
            _give(dC, sum_C, s, live, t, steps, M * N, ROWS & 2, True)
            sum_C = _zeros(dm[0], M * N)
        if TIMES & 8:
            _give(dR, _whole(sum_R, M), s, live, t, steps, M * M, ROWS & 8, True)
            sum_R = _zeros(dm[0], M * (M + 1) // 2)
        if TIMES & 32:
            _give(dd, sum_d, s, live, t, steps, M, ROWS & 32, True)
            sum_d = _zeros(dm[0], M)
        dP = _back_to_cov(W, rest, g, w, dS, C_here, N, M)
        dm = _minus(g, _times(C_here, de, N, M, 1, TURNED, PLAIN), N)
        if gbefore is not None:
            dm = _plus(dm, _load(gbefore + token * N, N), N)
        if gbefore_cov is not None:
            dP = _receive(dP, gbefore_cov + cov_token * (N * N), weight, N)
        t -= 1
    if not TIMES & 1:
        _give(dA, sum_A, s, live, t, steps, N * N, ROWS & 1, False)
    if not TIMES & 2:
        _give(dC, sum_C, s, live, t, steps, M * N, ROWS & 2, False)
    if not TIMES & 4:
        _give(dQ, _whole(sum_Q, N), s, live, t, steps, N * N, ROWS & 4, False)
    if not TIMES & 8:
        _give(dR, _whole(sum_R, M), s, live, t, steps, M * M, ROWS & 8, False)
    if not TIMES & 16 and db is not None:
        _give(db, sum_b, s, live, t, steps, N, ROWS & 16, False)
    if not TIMES & 32 and dd is not None:
        _give(dd, sum_d, s, live, t, steps, M, ROWS & 32, False)
    _save(dmean0 + s * N, dm, live, N)
    _save_symmetric(dcov0 + s * (N * N), dP, live, N)
