"""kalman in PyTorch: the definition, a loop over time that reads like its equations, batched over series.

    h[t+1] = A[t] h[t] + b[t] + v[t], v ~ N(0, Q[t]);    y[t] = C[t] h[t] + d[t] + n[t], n ~ N(0, R[t])

Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
Sources: Anderson & Moore 1979, "Optimal Filtering", sections 3.1 and 6.5; Bucy & Joseph 1968, the form that stays
semidefinite; Kaminski, Bryson & Schmidt 1971, the square root by orthogonal transformations.

What every back end takes. y (N, T, m), NaN where an entry is missing. The first two dimensions of A (·, ·, n, n),
C (·, ·, m, n), Q (·, ·, n, n), R (·, ·, m, m), b (·, ·, n) and d (·, ·, m) are N or 1, and T or 1; b, d may be None.
mean0 (N, n), cov0 (N, n, n): the prior at the first observation. `shared` promises that A, C, Q, R and cov0 have one
series, (1, …), and that all rows of y miss the same entries: covariances are then those of one series, (1, T, n, n).

form="joseph": Q, R, cov0 and all results are covariances.
form="sqrt":   Q, R, cov0 are square roots F of theirs, Q = F Fᵀ, and so are the results, lower triangular with a
diagonal ≥ 0. Float32 data is computed in float64 from the first step of a call to its last: a triangularisation in
float32 loses what nearly collinear sensors tell apart. Results and state are float32 all the same.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import checks

#: What `forward` returns before the status, in order, and what each `keep` leaves out (None). "predicted" is what a
#: gradient needs where a user keeps only log-likelihoods.
RESULTS = ("mean", "cov", "predicted_mean", "predicted_cov", "loglik", "mean_next", "cov_next")
DROPPED = {"all": (), "filtered": RESULTS[2:4], "predicted": RESULTS[:2], "loglik": RESULTS[:4]}


def forward(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean0: Tensor,
    cov0: Tensor,
    *,
    form: str,
    keep: str,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """mean (N, T, n), cov (s, T, n, n), predicted_mean, predicted_cov, loglik (N, T), mean_next (N, n), cov_next
    (s, n, n), info; None for what `keep` leaves out.

    info: int64 (3), the series and step of the first innovation covariance (by step, then series) that is not positive
    definite, or −1 and −1, and 1 if the last state is not finite: an input was not, or the numbers are too large; not
    above 0 if it is, or nobody looked. What comes after a failure has no meaning.
    """
    correct, predict = (joseph_correct, joseph_predict) if form == "joseph" else (sqrt_correct, sqrt_predict)
    (N, T, _), n, s, dtype = y.shape, mean0.shape[1], 1 if shared else y.shape[0], y.dtype
    if form == "sqrt":
        y, A, C, Q, R, mean0, cov0 = (v.double() for v in (y, A, C, Q, R, mean0, cov0))
    m, P, failure = mean0, (cov0 if form == "sqrt" else symmetric(cov0)).expand(s, n, n), (-1, -1)
    steps: list[tuple[Tensor, ...]] = []
    for t in range(T):
        seen = ~torch.isnan(y[:, t])
        e = residual(y[:, t], at(C, t), at(d, t), m, seen)
        m_filtered, P_filtered, loglik, failed = correct(m, P, e, at(C, t), at(R, t), seen)
        steps.append((m_filtered, P_filtered, m, P, loglik))
        if failure[1] < 0 and failed.any():
            failure = (int(failed.nonzero()[0, 0]), t)
        m = moved(at(A, t), at(b, t), m_filtered)
        P = predict(P_filtered, at(A, t), at(Q, t)).expand(s, n, n)
    shapes = ((N, 0, n), (s, 0, n, n), (N, 0, n), (s, 0, n, n), (N, 0))
    columns = [torch.stack(c, 1) for c in zip(*steps, strict=True)] if steps else [y.new_empty(x) for x in shapes]
    kept = (None if name in DROPPED[keep] else c.to(dtype) for name, c in zip(RESULTS, columns, strict=False))
    last = (v.to(dtype).clone(memory_format=torch.contiguous_format) for v in (m, P))
    odd = not bool(torch.isfinite(m).all() and torch.isfinite(P).all())
    return (*kept, *last, torch.tensor([*failure, odd]))


def backward(
    grads: tuple[Tensor | None, ...],
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean0: Tensor,
    cov0: Tensor,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, A, C, Q, R, b, d, mean0, cov0 in their own shapes, None where there was no b or d.

    grads: those of the seven results of `forward`, in their shapes; None counts as zero. Whatever the form, Q, R, cov0
    and grads are here those of covariances (the forms are one function), and so is predicted_cov (s, T, n, n), which
    with predicted_mean (N, T, n) spares back ends a second forward pass. Gradients of Q, R and cov0 are symmetric.
    """
    dmean, dcov, dpredicted_mean, dpredicted_cov, dloglik, dm, dP = grads
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    sums = [None if v is None else torch.zeros_like(v) for v in (y, A, C, Q, R, b, d)]
    need_digits(y, C, R, predicted_cov)
    dm = y.new_zeros(N, n) if dm is None else dm
    dP = y.new_zeros(s, n, n) if dP is None else symmetric(dP)
    for t in reversed(range(T)):
        system = (at(A, t), at(C, t), at(R, t), at(d, t))
        given = tuple(None if v is None else v[:, t] for v in (dmean, dcov, dloglik))
        parts, dm, dP = step_backward(y[:, t], system, (predicted_mean[:, t], predicted_cov[:, t]), given, dm, dP)
        for total, found in zip(sums, parts, strict=True):
            if total is not None:
                row = total[:, t if total.shape[1] > 1 else 0]
                for v in found:
                    row += v.sum_to_size(row.shape)
        dm = dm if dpredicted_mean is None else dm + dpredicted_mean[:, t]
        dP = dP if dpredicted_cov is None else dP + symmetric(dpredicted_cov[:, t])
    return (*sums, dm if T else dm.clone(), dP.sum_to_size(cov0.shape))  # never memory of what was given


def step_backward(
    y: Tensor,
    system: tuple[Tensor, Tensor, Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    given: tuple[Tensor | None, ...],
    dm: Tensor,
    dP: Tensor,
) -> tuple[tuple[tuple[Tensor, ...], ...], Tensor, Tensor]:
    """What one step adds to the gradients of y, A, C, Q, R, b, d, and the gradients of its predicted moments.

    system: A, C, R, d.   before: predicted moments.   given: gradients of filtered mean, cov and loglik.   dm, dP: of
    the moments predicted for the next step. Parts with a row for each series stand beside those of the covariances,
    which may have one for all. The gain K makes the filtered covariance smallest, so its slope in K is zero.
    """
    (A, C, R, d), (m, P) = system, before
    seen = ~torch.isnan(y)
    e = residual(y, C, d, m, seen)
    hole = seen[: P.shape[0]]
    C, R = masked(C, R, hole)
    L = torch.linalg.cholesky_ex(symmetric(C @ P @ C.mT + R)).L
    K, inverse = torch.cholesky_solve(C @ P, L).mT, torch.cholesky_inverse(L)
    rest = torch.eye(P.shape[-1]).to(P) - K @ C
    m_filtered, P_filtered = m + times(K, e), symmetric(rest @ P @ rest.mT + K @ R @ K.mT)
    dA = (outer(dm, m_filtered), 2 * dP @ A @ P_filtered)
    g, W = times(A.mT, dm), symmetric(A.mT @ dP @ A)  # of the filtered moments
    g = g if given[0] is None else g + given[0]
    W = W if given[1] is None else W + symmetric(given[1])
    slope = torch.zeros_like(y[:, 0]) if given[2] is None else given[2]
    w, z = times(inverse, e), times(K.mT, g)  # the mean is m + P Cᵀ w
    de = z - slope[:, None] * w
    dS = slope[:, None, None] / 2 * (outer(w, w) - inverse) - symmetric(outer(z, w))
    dC = (outer(w, times(P, g)) + 2 * dS @ C @ P - outer(de, m), -2 * K.mT @ W @ rest @ P)
    both = hole[..., None] & hole[..., None, :]
    dR = (torch.where(both, dS, 0.0), K.mT @ W @ K)
    through_mean = symmetric(outer(g, times(C.mT, w))) + C.mT @ dS @ C
    before_P = symmetric(rest.mT @ W @ rest) + through_mean.sum_to_size(P.shape)
    return ((de,), dA, dC, (dP,), dR, (dm,), (-de,)), g - times(C.mT, de), before_P


def step(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean: Tensor,
    cov: Tensor,
    index: Tensor | None,
    *,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One observation y (b, m), in place: filtered mean (b, n), cov (b, n, n), loglik (b), and info as of `forward`.

    A (·, n, n), C (·, m, n), Q, R, b (·, n), d (·, m): the first dimension is that of y or 1. mean (slots, n) and cov
    (slots, n, n) hold predicted moments, those at the next observation afterwards; index (b) picks their rows, a
    negative one skips: its results are 0 and no slot is touched.
    """
    keep = torch.arange(len(y), device=y.device) if index is None else (index >= 0).nonzero()[:, 0]
    rows = keep if index is None else index[keep].long()

    def picked(v: Tensor | None) -> Tensor | None:
        return None if v is None else (v if v.shape[0] == 1 < len(y) else v[keep])[:, None]

    inputs: Any = (*map(picked, (y, A, C, Q, R, b, d)), mean[rows], cov[rows])
    results: Any = forward(*inputs, form=form, keep="filtered", shared=False)
    filtered_mean, filtered_cov, _, _, loglik, mean_next, cov_next, info = results
    if info[1] < 0 and not info[2]:
        mean[rows], cov[rows] = mean_next, cov_next
    out = (y.new_zeros(len(y), *mean.shape[1:]), y.new_zeros(len(y), *cov.shape[1:]), y.new_zeros(len(y)))
    for whole, part in zip(out, (filtered_mean, filtered_cov, loglik), strict=True):
        whole[keep] = part[:, 0]
    return (*out, torch.stack([keep[info[0]] if info[1] >= 0 else info[0], *info[1:]]))


def smooth(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    R: Tensor,
    d: Tensor | None,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Given all of y: mean (N, T, n), cov (s, T, n, n) and Cov(h[t], h[t+1]) (s, T−1, n, n), by Bryson & Frazier 1963.

        r[t−1] = Cᵀ S⁻¹ e + Fᵀ Aᵀ r[t],   W[t−1] = Cᵀ S⁻¹ C + Fᵀ Aᵀ W[t] A F,   F = I − K C
        mean = m + P Aᵀ r[t],   cov = P − P Aᵀ W[t] A P,   Cov(h[t], h[t+1]) = P Aᵀ (I − W[t] P'[t+1])

    with m, P filtered and P' predicted moments: from the filtered side, a precise sensor costs no digits. P' (s, T, n,
    n) and predicted_mean (N, T, n) are those of `forward`; only innovation covariances are inverted.
    """
    v = backwards(y, A, C, R, d, predicted_mean, predicted_cov)
    PA = v.P @ A.mT
    lag = PA[:, :-1] @ (torch.eye(A.shape[-1]).to(A) - v.W[:, :-1] @ predicted_cov[:, 1:])
    return v.m + times(PA, v.r), symmetric(v.P - PA @ v.W @ PA.mT), lag


class Backwards(NamedTuple):
    """All steps of a smoother: C where it is seen, K, F = I − K C, D = S⁻¹ C, S⁻¹ e, filtered m and P, r and W."""

    C: Tensor
    K: Tensor
    F: Tensor
    D: Tensor
    e: Tensor
    m: Tensor
    P: Tensor
    r: Tensor
    W: Tensor


def backwards(
    y: Tensor, A: Tensor, C: Tensor, R: Tensor, d: Tensor | None, predicted_mean: Tensor, predicted_cov: Tensor
) -> Backwards:
    """The recursion of `smooth`, whose arguments these are."""
    seen = ~torch.isnan(y)
    e = residual(y, C, y.new_zeros(()) if d is None else d, predicted_mean, seen)
    m, P, _, _ = joseph_correct(predicted_mean, predicted_cov, e, C, R, seen)
    C, R = masked(C, R, seen[: predicted_cov.shape[0]])
    CP = C @ predicted_cov
    S = torch.linalg.cholesky_ex(symmetric(CP @ C.mT + R)).L
    K, D = torch.cholesky_solve(CP, S).mT, torch.cholesky_solve(C, S)
    F = torch.eye(A.shape[-1]).to(A) - K @ C
    L, g, H = A @ F, times(D.mT, e), C.mT @ D
    r, W = torch.zeros_like(g[:, :0].sum(1)), torch.zeros_like(H[:, :0].sum(1))
    after_r, after_W = [], []
    for g_t, H_t, L_t in zip(reversed(g.unbind(1)), reversed(H.unbind(1)), reversed(L.unbind(1)), strict=True):
        after_r.append(r)
        after_W.append(W)
        r, W = g_t + times(L_t.mT, r), symmetric(H_t + L_t.mT @ W @ L_t)
    r, W = (torch.stack(v[::-1], 1) if v else like for v, like in ((after_r, g), (after_W, H)))
    return Backwards(C, K, F, D, torch.cholesky_solve(e[..., None], S)[..., 0], m, P, r, W)


def smooth_backward(
    grads: tuple[Tensor | None, ...],
    y: Tensor,
    A: Tensor,
    C: Tensor,
    R: Tensor,
    d: Tensor | None,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, A, C, R, d, predicted_mean, predicted_cov in their shapes from those of `smooth`'s results.

    From the first step to the last. With a, G, L the gradients of mean, cov and Cov(h[t], h[t+1]), p and O those of
    r[t−1] and W[t−1], z = Aᵀ r, B = Aᵀ W A and X = A P, those of z and B and of r[t] and W[t] are

        dz = P a + F p,   dB = F O Fᵀ − P G P,   dr = A dz,   dW = A dB Aᵀ − sym(X L P')
        dA = r dzᵀ + 2 W A dB + Y Lᵀ P,   Y = I − W P',   dP' = −sym(W X L)  of the step after
        dP = G + sym(a zᵀ) − G P B − B P G + sym(Aᵀ Y Lᵀ)  and  dm = a  of the filtered moments: `step_backward`

    and with D = S⁻¹ C, x = S⁻¹ e − Kᵀ z, s = D p and E = D − Kᵀ B F, what C, R, e and the step's own P' have besides is

        dC = x (F p)ᵀ − s (m + P z)ᵀ + 2 E O Fᵀ − 2 D O Fᵀ B P,   dR = −sym(x sᵀ) − sym((2 E − D) O Dᵀ),   de = s
        dP' = −sym(r[t−1] (Cᵀ s)ᵀ) − sym((2 W[t−1] − Cᵀ D) O Dᵀ C)
    """
    (N, T, _), n, covs = y.shape, predicted_mean.shape[2], predicted_cov.shape[0]
    given = (y, A, C, R, d, predicted_mean, predicted_cov)
    sums = [None if v is None else torch.zeros_like(v, memory_format=torch.contiguous_format) for v in given]
    need_digits(y, C, R, predicted_cov)
    v = backwards(y, A, C, R, d, predicted_mean, predicted_cov)
    p, O, carry = y.new_zeros(N, n), y.new_zeros(N, n, n), y.new_zeros(N, n, n)

    def into(i: int, t: int, *parts: Tensor) -> None:
        total = sums[i]
        if total is not None:
            row = total[:, t if total.shape[1] > 1 else 0]
            for part in parts:
                row += part.sum_to_size(row.shape)

    for t in range(T):
        a, G, lag = (None if g is None or t == g.shape[1] else g[:, t] for g in grads)
        A_t, F, D, K, P, r, W, C_t = (at(w, t) for w in (A, v.F, v.D, v.K, v.P, v.r, v.W, v.C))
        a = y.new_zeros(N, n) if a is None else a
        G = y.new_zeros(covs, n, n) if G is None else symmetric(G)
        G = torch.cat([G, G.new_zeros(N - covs, n, n)])  # covariances of all are the first series'
        z, B, Fp, FO = times(A_t.mT, r), A_t.mT @ W @ A_t, times(F, p), F @ O
        dz, dB = times(P, a) + Fp, FO @ F.mT - P @ G @ P
        into(1, t, outer(r, dz), 2 * W @ A_t @ dB)
        dP = G + symmetric(outer(a, z)) - 2 * symmetric(G @ P @ B)
        x, s, E = v.e[:, t] - times(K.mT, z), times(D, p), D - K.mT @ B @ F
        mean = v.m[:, t] + times(P, z)
        into(2, t, outer(x, Fp), -outer(s, mean), 2 * E @ FO.mT, -2 * D @ FO.mT @ B @ P)
        into(3, t, -symmetric(outer(x, s)), -symmetric((2 * E - D) @ O @ D.mT))
        into(6, t, carry)
        if t:
            before = symmetric(outer(v.r[:, t - 1], times(C_t.mT, s)))
            into(6, t, -before, -symmetric((2 * v.W[:, t - 1] - C_t.mT @ D) @ O @ D.mT @ C_t))
        p, O, carry = times(A_t, dz), A_t @ dB @ A_t.mT, torch.zeros_like(carry)
        if lag is not None:
            lag = torch.cat([lag, lag.new_zeros(N - covs, n, n)])
            after = predicted_cov[:, t + 1]
            XL, YL = A_t @ P @ lag, (torch.eye(n).to(A) - W @ after) @ lag.mT
            O, carry = O - symmetric(XL @ after), -symmetric(W @ XL)
            into(1, t, YL @ P)
            dP = dP + symmetric(A_t.mT @ YL)
        system = (A_t, at(C, t), at(R, t), at(d, t))
        moments = (predicted_mean[:, t], predicted_cov[:, t].expand(N, n, n))
        nothing = torch.zeros_like(a), torch.zeros_like(dP)
        parts, dm, dP = step_backward(y[:, t], system, moments, (a, dP, None), *nothing)
        into(0, t, *parts[0], s)
        into(2, t, *parts[2])
        into(3, t, *parts[4])
        into(4, t, *parts[6], -s)
        into(5, t, dm, -times(C_t.mT, s))
        into(6, t, dP)
    return tuple(sums)


# ---- the equations ---------------------------------------------------------------------------------------------------


def at(v: Tensor | None, t: int) -> Tensor:
    """What holds at step t of a tensor that is constant or varies in time; 0 where there is none."""
    return torch.zeros(()) if v is None else v[:, t if v.shape[1] > 1 else 0]


def residual(y: Tensor, C: Tensor, d: Tensor, m: Tensor, seen: Tensor) -> Tensor:
    """e = y − C m − d, 0 at missing entries."""
    return torch.where(seen, y - times(C, m) - d.to(m), 0.0)


def masked(C: Tensor, R: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """C and R as they are where entries (…, m) are missing; one row of `seen` where covariances are shared."""
    both = seen[..., None] & seen[..., None, :]
    return torch.where(seen[..., None], C, 0.0), torch.where(both, R, torch.eye(C.shape[-2]).to(R))


def moved(A: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """A m + b, the mean one step on."""
    return times(A, m) + b.to(m)


def joseph_correct(
    m: Tensor, P: Tensor, e: Tensor, C: Tensor, R: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filtered mean and covariance, loglik, whether S failed.

    S = C P Cᵀ + R,  K = P Cᵀ S⁻¹,  P ← (I − K C) P (I − K C)ᵀ + K R Kᵀ. A missing entry has a row of zeros in C and in
    R, but for a unit diagonal: exact, since nothing then depends on it. S has failed too where a pivot of
    its factorisation is no more than rounding of the variance it is left from.
    """
    C, R = masked(C, R, seen[: P.shape[0]])
    CP = C @ P
    L, failed = factorised(symmetric(CP @ C.mT + R))
    K = torch.cholesky_solve(CP, L).mT
    rest = torch.eye(P.shape[-1]).to(P) - K @ C
    loglik = normal(e, L, seen)
    return m + times(K, e), symmetric(rest @ P @ rest.mT + K @ R @ K.mT), loglik, failed


def factorised(S: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of S (…, m, m), and whether there is none (…) as far as the digits of S tell."""
    L, problem = torch.linalg.cholesky_ex(S)
    pivots, tolerance = L.diagonal(dim1=-2, dim2=-1).square(), S.shape[-1] * torch.finfo(S.dtype).eps
    return L, (problem != 0) | ~(pivots > tolerance * S.diagonal(dim1=-2, dim2=-1)).all(-1)


def need_digits(y: Tensor, C: Tensor, R: Tensor, predicted_cov: Tensor) -> None:
    """Raise if the way back from factors, through covariances, has lost their digits; on the CPU only."""
    if checks.can_read(y) and y.numel():
        s, T = predicted_cov.shape[:2]
        C, R = masked(C, R, ~torch.isnan(y[:s]))
        lost = factorised(symmetric(C @ predicted_cov @ C.mT + R))[1].expand(s, T)
        if bool(lost.any()):
            step, series = lost.mT.nonzero()[0].tolist()
            raise too_few_digits(series, step, y.dtype)


def too_few_digits(series: int, step: int, dtype: torch.dtype) -> Exception:
    """What `need_digits` raises."""
    kind = str(dtype).removeprefix("torch.")
    problem = f"the gradient of series {series} at step {step} takes more digits than {kind} covariances have."
    return checks.fail("kalman", problem, "The values stand. Merge sensors that are all but one, or cut the graph.")


def joseph_predict(P: Tensor, A: Tensor, Q: Tensor) -> Tensor:
    """A P Aᵀ + Q."""
    return symmetric(A @ P @ A.mT + Q)


def sqrt_correct(
    m: Tensor, G: Tensor, e: Tensor, C: Tensor, F: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `joseph_correct`, with P = G Gᵀ and R = F Fᵀ: an orthogonal U makes

        [C G  F]  U = [S½        0 ]
        [G    0]      [P Cᵀ S⁻ᵀ½ G']

    lower triangular, where G' is the filtered factor. A missing entry has a row of zeros and a 1
    in a column of its own.
    """
    hole = seen[: G.shape[0], :, None]
    n, p = G.shape[-1], C.shape[-2]
    lead = torch.broadcast_shapes(G.shape[:-2], C.shape[:-2], F.shape[:-2], hole.shape[:-2])
    F, CG = (torch.where(hole, v, 0.0).expand(*lead, *v.shape[-2:]) for v in (F, C @ G))
    holes = (torch.eye(p) * ~hole).to(G).expand(*lead, p, p)
    above = torch.cat([CG, F, holes], -1)
    below = torch.cat([G.expand(*lead, n, n), G.new_zeros(*lead, n, 2 * p)], -1)
    whole = lower(torch.cat([above, below], -2))
    L, gain, G = whole[..., :p, :p], whole[..., p:, :p], whole[..., p:, p:]
    failed = ~(L.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    white = torch.linalg.solve_triangular(L, e[..., None], upper=False)
    return m + (gain @ white)[..., 0], G, normal(e, L, seen), failed


def sqrt_predict(G: Tensor, A: Tensor, F: Tensor) -> Tensor:
    """The triangular factor of A P Aᵀ + Q, from P = G Gᵀ and Q = F Fᵀ."""
    AG = A @ G
    lead = torch.broadcast_shapes(AG.shape[:-2], F.shape[:-2])
    return lower(torch.cat([v.expand(*lead, *v.shape[-2:]) for v in (AG, F)], -1))


def normal(e: Tensor, L: Tensor, seen: Tensor) -> Tensor:
    """log N(e; 0, L Lᵀ) of the entries seen; the others have e = 0 and a unit diagonal in L."""
    white = torch.linalg.solve_triangular(L, e[..., None], upper=False)[..., 0]
    logdet = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * ((white * white).sum(-1) + logdet + seen.sum(-1).to(e) * math.log(2 * math.pi))


def lower(M: Tensor) -> Tensor:
    """L (r, r), lower triangular with a diagonal ≥ 0, such that L Lᵀ = M Mᵀ; M (r, c), c ≥ r."""
    L = torch.linalg.qr(M.mT, mode="r").R.mT
    sign = torch.where(L.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(M)
    return (L * sign[..., None, :]).tril()


def times(M: Tensor, x: Tensor) -> Tensor:
    """M x, matrices (…, m, n) and vectors (…, n)."""
    return (M @ x[..., None])[..., 0]


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ, vectors (…, m) and (…, n)."""
    return x[..., :, None] * y[..., None, :]


def symmetric(P: Tensor) -> Tensor:
    """(P + Pᵀ)/2."""
    return (P + P.mT) / 2
