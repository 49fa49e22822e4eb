"""s4_scan as a loop: the definition. Suffixes: b batch, t time step, h channel, c read-out, n complex state."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.segments import pieces


def scan(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
    segments: Tensor | None, padding: str | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x[t] = Ā x[t−1] + B̄ u[t],  y[t] = 2 Re(C x[t]) + D u[t], on states that stand for themselves and conjugates.

    u (b, t, h), A_bar, B_bar (h, n), C (c, h, n), D (c, h), initial (n_seq, h, 2n) real pairs -> y (b, t, c, h), state.
    Gu, Gupta, Goel & Ré 2022, equation 3.
    """
    (b, t, h), c, n = u.shape, C.shape[0], A_bar.shape[1]
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    rows = b if segments is None else segments.shape[0]
    start = u.new_zeros(rows, h, 2 * n, dtype=full) if initial is None else initial
    y = torch.zeros(b, t, c, h, dtype=full, device=u.device)
    ends = start
    for where, which, cut in pieces(segments, t):
        x = torch.view_as_complex(start[which].to(torch.float64).unflatten(-1, (n, 2)))
        ys = []
        steps = list(range(cut.start, cut.stop))
        for i in steps[::-1] if reverse else steps:
            now = u[where, i].double()
            x = A_bar * x + B_bar * now[..., None]
            out = 2 * torch.einsum("chn,bhn->bch", C, x).real
            ys.append(out if D is None else out + D * now[:, None])
        if ys:
            index = torch.arange(cut.start, cut.stop, device=u.device)
            batch = torch.arange(b, device=u.device)[where]
            y = y.index_put((batch[:, None], index[None]), torch.stack(ys[::-1] if reverse else ys, 1).to(full))
        sequence = torch.arange(rows, device=u.device)[which]
        ends = ends.index_put((sequence,), torch.view_as_real(x).flatten(-2).to(full))
    return y.to(u.dtype), ends


def step(
    state: Tensor, u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, index: Tensor | None
) -> Tensor:
    """One token, in place: state (slots, h, n, 2), u (b, h) -> y (b, c, h); index (b) picks slots, negative: skip.

    The system is as for `scan`, in real pairs.
    """
    A_bar, B_bar, C = (torch.view_as_complex(x.to(state.dtype)) for x in (A_bar, B_bar, C))
    if index is None:
        return _take(torch.view_as_complex(state), u.to(state.dtype), A_bar, B_bar, C, D).to(u.dtype)
    keep = (index >= 0).nonzero()[:, 0]
    rows = index[keep].long()
    now, own = torch.view_as_complex(state[rows]), u[keep].to(state.dtype)
    y = u.new_zeros(u.shape[0], *C.shape[:2])
    y[keep] = _take(now, own, A_bar, B_bar, C, D).to(u.dtype)
    state[rows] = torch.view_as_real(now)
    return y


def _take(x: Tensor, u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """y (b, c, h), after x (b, h, n) has taken in u (b, h)."""
    x.mul_(A_bar).addcmul_(B_bar, u[..., None].to(x.dtype))
    y = 2 * torch.einsum("chn,bhn->bch", C, x).real
    return y if D is None else y + D.to(u.dtype) * u[:, None]
