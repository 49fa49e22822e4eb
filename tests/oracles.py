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


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, taps: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence: x (t, d), weight (d, k), taps (k-1, d) -> y (t, d), taps; by torch's own grouped convolution."""
    padded = torch.cat([taps, x])
    d, k = weight.shape
    if x.shape[0] == 0:
        return x, taps
    y = F.conv1d(padded.T[None], weight[:, None], bias, groups=d)[0].T
    return F.silu(y) if silu else y, padded[padded.shape[0] - (k - 1) :]


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
