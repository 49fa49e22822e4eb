"""s4_scan as a loop: the definition. Suffixes: b batch, t time step, h channel, c read-out, n complex state."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.segments import pieces


def scan(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
    segments: Tensor | None, padded: bool,
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
        for i in range(cut.start, cut.stop):
            now = u[where, i].double()
            x = A_bar * x + B_bar * now[..., None]
            out = 2 * torch.einsum("chn,bhn->bch", C, x).real
            ys.append(out if D is None else out + D * now[:, None])
        if ys:
            index = torch.arange(cut.start, cut.stop, device=u.device)
            batch = torch.arange(b, device=u.device)[where]
            y = y.index_put((batch[:, None], index[None]), torch.stack(ys, 1).to(full))
        sequence = torch.arange(rows, device=u.device)[which]
        ends = ends.index_put((sequence,), torch.view_as_real(x).flatten(-2).to(full))
    return y.to(u.dtype), ends
