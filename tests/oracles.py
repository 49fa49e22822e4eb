"""Independent answers in float64, sharing no algorithm with the library: weight matrices instead of recurrences."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise as neighbours

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h0: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence: u, dt, z (t, d), A (d, n), B, C (t, d, n), h0 (d, n) -> y (t, d), h (d, n).

    Writes every state as an explicit sum over all earlier inputs, weighted by exp of the dt·A between.
    """
    t = u.shape[0]
    elapsed = torch.cat([torch.zeros_like(dt[:1]), dt.cumsum(0)])  # (t+1, d): time at which each state holds
    gap = elapsed[1:, None] - elapsed[None, 1:]  # (to, from, d)
    past = torch.tril(torch.ones(t, t, dtype=torch.bool))[..., None]
    weight = torch.exp(torch.where(past, gap, 0.0)[..., None] * A) * past[..., None]
    states = torch.einsum("tsdn,sdn->tdn", weight, (dt * u)[..., None] * B) + torch.exp(elapsed[1:, :, None] * A) * h0
    y = (C * states).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    y = y if D is None else y + D * u
    y = y if z is None else y * F.silu(z)
    return y, states[-1] if t else h0


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, S0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence: x (t, h, p), dt (t, h), A (h), B, C (t, h, n), S0 (h, p, n) -> y (t, h, p), S (h, p, n), decay (h).

    Solves one bidiagonal system a head for all its states: each state less the decayed one before it is what came in.
    """
    t = x.shape[0]
    if t == 0:
        return x, S0, torch.ones_like(A)
    decay = torch.exp(dt * A).T  # (h, t)
    system = torch.eye(t, dtype=x.dtype) - torch.diag_embed(decay[:, 1:], -1)
    drive = torch.einsum("th,thp,thn->htpn", dt, x, B)
    drive = torch.cat([drive[:, :1] + decay[:, :1, None, None] * S0[:, None], drive[:, 1:]], 1)
    states = torch.linalg.solve_triangular(system, drive.flatten(2), upper=False).view(drive.shape)
    y = torch.einsum("htpn,thn->thp", states, C)
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    y = y if z is None else y * F.silu(z)
    return y, states[:, -1], decay.prod(1)


def turned(rows: Tensor, turns: Tensor, interleaved: bool) -> Tensor:
    """rows (…, r, n), turns (…, s): pairs as complex numbers, times e^(2πi·turns)."""
    n, s = rows.shape[-1], turns.shape[-1]
    first = torch.arange(s) * (2 if interleaved else 1)
    second = first + (1 if interleaved else n // 2)
    circle = torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)[..., None, :]
    pairs = torch.complex(rows[..., first], rows[..., second]) * circle
    return rows.index_copy(-1, first, pairs.real).index_copy(-1, second, pairs.imag)


def trapezoid_ssd(
    x: Tensor, dt: Tensor, A: Tensor, blend: Tensor, B: Tensor, C: Tensor, turns: Tensor, mix: Tensor, D: Tensor,
    interleaved: bool, state: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """One sequence: x (t, h, p), dt, A, blend (t, h), B, C (t, h, r, n) with biases, turns (t, h, s), mix (h, r, p).

    Every state as an explicit sum over all earlier tokens. What is turned is C alone, by the angle since each of them.
    """
    t, (angle, S0, k0, x0) = x.shape[0], state
    if t == 0:
        return x.new_zeros(*x.shape[:2], *mix.shape[1:]), state
    log = (dt * A).cumsum(0)
    theta = turns.cumsum(0)  # since the initial state
    own, next_end = blend * dt, F.pad(((1 - blend) * dt)[1:], (0, 0, 0, 1))
    past = torch.tril(torch.ones(t, t, dtype=torch.bool))[..., None]
    reach = torch.exp(torch.where(past, log[:, None] - log[None], 0.0)) * past
    weight = reach * (own + torch.where(past & past.transpose(0, 1), 0.0, next_end))
    v = x[:, :, None] * mix
    start = S0 + ((1 - blend) * dt)[0, :, None, None] * torch.einsum("hrp,hrn->hpn", x0[:, None] * mix, k0)
    since = theta[:, None] - theta[None]  # (to, from, h, s)
    back = turned(C[:, None].expand(t, t, *C.shape[1:]), since, interleaved)
    y = torch.einsum("tsh,tshrn,shqn,shqp->thrp", weight, back, B, v)
    q = turned(C, angle + theta, interleaved)
    y = y + torch.einsum("th,thrn,hpn->thrp", torch.exp(log), q, start) + D[:, None, None] * v
    k = turned(B, angle + theta, interleaved)
    S = torch.einsum("sh,shrp,shrn->hpn", weight[-1], v, k) + torch.exp(log[-1])[:, None, None] * start
    return y, (angle + theta[-1], S, k[-1], x[-1])


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, taps: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: x (t, d), weight (d, k), taps (k-1, d) -> y (t, d), taps; by torch's own grouped convolution."""
    padded = torch.cat([taps, x])
    d, k = weight.shape
    if x.shape[0] == 0:
        return x, taps
    y = F.conv1d(padded.T[None], weight[:, None], bias, groups=d)[0].T
    return F.silu(y) if silu else y, padded[padded.shape[0] - (k - 1) :]


def gated_scan(v: Tensor, g: Tensor, A: Tensor, activation: str, h0: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: v, g (t, n), A (n) or (n, n), h0 (n) -> states before each token (t, n), after the last (n).

    By iterating on all states at once: after k rounds the first k are right, whatever one begins with.
    """
    f = {"identity": lambda x: x, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation]
    matrix = torch.diag(A) if A.dim() == 1 else A
    states = torch.cat([h0[None], torch.zeros_like(v)])
    for _ in range(v.shape[0]):
        states = torch.cat([h0[None], f(torch.einsum("nm,tm->tn", matrix, states[:-1]) + v) * g])
    return states[:-1], states[-1]


def linear_scan(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: a, b (t, d), h0 (d) -> h (t, d), the last one; a bidiagonal system a channel, solved."""
    t = b.shape[0]
    if t == 0:
        return b, h0
    system = torch.eye(t, dtype=b.dtype) - torch.diag_embed(a[1:].T, -1)
    drive = torch.cat([b[:1] + a[:1] * h0, b[1:]])
    h = torch.linalg.solve_triangular(system, drive.T[..., None], upper=False)[..., 0].T
    return h, h[-1]


def long_conv(u: Tensor, k: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: u (t, i), k (l, o, i) or (i, l), past (l-1, i) -> y (t, o), past; the whole Toeplitz matrix."""
    taps = torch.diag_embed(k.T) if k.dim() == 2 else k
    length, t = taps.shape[0], u.shape[0]
    padded = torch.cat([past, u])
    lag = torch.arange(t)[:, None] + length - 1 - torch.arange(t + length - 1)[None]  # of output t behind padded input
    inside = (lag >= 0) & (lag < length)
    weights = taps[lag.clamp(0, length - 1)] * inside[..., None, None]  # (t, t + l - 1, o, i)
    return torch.einsum("tpoi,pi->to", weights, padded), padded[t:]


@dataclass
class JointGaussian:
    """All states h[0 … T] of one series and all its observations as a single Gaussian, to be conditioned.

    A, C, Q, R (T, …), m0 (n), P0 (n, n), b (T, n), d (T, m), y (T, m) with NaN where missing; float64.
    """

    mean: Tensor  # (T+1)·n states, then the observed entries
    cov: Tensor
    y: Tensor  # the observed entries, in order of time
    time: Tensor  # of each
    n: int

    @staticmethod
    def of(
        y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, m0: Tensor, P0: Tensor, b: Tensor, d: Tensor
    ) -> JointGaussian:  # fmt: skip
        (T, m), n = y.shape, m0.shape[0]
        rows, mean = [torch.eye(n, n * (T + 1), dtype=y.dtype)], [m0]  # states in terms of h[0] and all noises
        for t in range(T):
            fresh = torch.zeros(n, n * (T + 1), dtype=y.dtype)
            fresh[:, n * (t + 1) : n * (t + 2)] = torch.eye(n, dtype=y.dtype)
            rows.append(A[t] @ rows[-1] + fresh)
            mean.append(A[t] @ mean[-1] + b[t])
        M, noise = torch.cat(rows), torch.block_diag(P0, *Q)
        states = torch.cat(mean)
        if T == 0:
            return JointGaussian(states, M @ noise @ M.mT, y.reshape(0), torch.zeros(0, dtype=torch.long), n)
        seen = ~torch.isnan(y).flatten()
        look = torch.cat([torch.block_diag(*C), torch.zeros(T * m, n, dtype=y.dtype)], 1)[seen]
        see = torch.block_diag(*R)[seen][:, seen]
        full = torch.cat([M, look @ M])
        cov = full @ noise @ full.mT + torch.block_diag(torch.zeros(n * (T + 1), n * (T + 1), dtype=y.dtype), see)
        return JointGaussian(
            torch.cat([states, look @ states + d.flatten()[seen]]), cov, y.flatten()[seen],
            torch.arange(T).repeat_interleave(m)[seen], n,
        )  # fmt: skip

    def given(self, times: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of all states given what was observed before step `times`."""
        size = len(self.mean) - len(self.y)
        keep = torch.cat([torch.ones(size, dtype=torch.bool), self.time < times])
        mean, cov, y = self.mean[keep], self.cov[keep][:, keep], self.y[self.time < times]
        gain = torch.linalg.solve(cov[size:, size:], cov[size:, :size]).mT
        return mean[:size] + gain @ (y - mean[size:]), cov[:size, :size] - gain @ cov[size:, :size]

    def state(self, t: int, times: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of h[t] given what was observed before step `times`."""
        mean, cov = self.given(times)
        span = slice(t * self.n, (t + 1) * self.n)
        return mean[span], cov[span, span]

    def loglik(self, times: int) -> Tensor:
        """log p of what was observed before step `times`."""
        size = len(self.mean) - len(self.y)
        keep = torch.cat([torch.zeros(size, dtype=torch.bool), self.time < times])
        cov, e = self.cov[keep][:, keep], self.y[self.time < times] - self.mean[keep]
        return -0.5 * (e @ torch.linalg.solve(cov, e) + torch.linalg.slogdet(2 * torch.pi * cov)[1])


@dataclass
class Layout:
    """Sequences of a batch, as a test writes them down: (batch row, first token, past the last token)."""

    b: int
    t: int
    sequences: list[tuple[int, int, int]]
    kwargs: dict[str, object] = field(default_factory=dict)

    def valid(self) -> Tensor:
        """(b, t) True where a token belongs to a sequence."""
        mask = torch.zeros(self.b, self.t, dtype=torch.bool)
        for row, start, stop in self.sequences:
            mask[row, start:stop] = True
        return mask


def layout(kind: str, t: int) -> Layout:
    """A layout of about t tokens a row, with an empty sequence where padding or packing allows one."""
    if kind == "whole":
        return Layout(2, t, [(0, 0, t), (1, 0, t)])
    if kind == "packed":
        bounds = [0, 0, t // 3, t // 3, t]
        cuts = list(neighbours(bounds))
        return Layout(1, t, [(0, a, b) for a, b in cuts], {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    lengths = [t, t // 2, 0]
    left = kind == "left"
    spans = [(i, t - n if left else 0, t if left else n) for i, n in enumerate(lengths)]
    return Layout(3, t, spans, {"lengths": torch.tensor(lengths), "padding_side": kind})


def pairwise(factors: dict[str, list[object]], seed: int = 0) -> list[dict[str, object]]:
    """Cases that cover every pair of values of every two factors, by greedy random search with a fixed seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    names = list(factors)
    todo = {
        (a, i, b, j)
        for x, a in enumerate(names)
        for b in names[x + 1 :]
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while todo:
        seed_pair = min(todo)
        best: dict[str, int] = {}
        best_new: set[tuple[str, int, str, int]] = set()
        for _ in range(30):
            case = {name: draw(len(factors[name])) for name in names}
            case[seed_pair[0]], case[seed_pair[2]] = seed_pair[1], seed_pair[3]
            pairs = {(a, case[a], b, case[b]) for x, a in enumerate(names) for b in names[x + 1 :]} & todo
            if len(pairs) > len(best_new):
                best, best_new = case, pairs
        todo -= best_new
        cases.append({name: factors[name][i] for name, i in best.items()})
    return cases
