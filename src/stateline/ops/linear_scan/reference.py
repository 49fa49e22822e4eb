"""linear_scan, defined.

    h[t] = a[t] h[t-1] + b[t]

Suffixes: b batch, t time step, d channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.segments import pieces


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """a (b, t, d) or (d), b (b, t, d) -> h (b, t, d), state (n_seq, d)."""
    h = torch.zeros_like(b, memory_format=torch.contiguous_format)
    state = _initial(b, initial_state, segments)
    for rows, seq, time in pieces(segments, b.shape[1]):
        now = state[seq]
        for t in _steps(time, reverse):
            now = decay(a, rows, t).to(state.dtype) * now + b[rows, t].to(state.dtype)
            h[rows, t] = now.to(h.dtype)
        state[seq] = now
    return h, state


def backward(
    dh: Tensor,
    dstate: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of a, b, initial_state (None where there was none), from what `forward` gave as h."""
    wide = state_dtype(b)
    da = torch.zeros(a.shape, dtype=wide if a.dim() == 1 else a.dtype, device=a.device)
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device)
    start = _initial(b, initial_state, segments)
    dstart = dstate.to(wide).clone(memory_format=torch.contiguous_format)
    for rows, seq, time in pieces(segments, b.shape[1]):
        g, steps = dstart[seq], _steps(time, reverse)
        for i in range(len(steps) - 1, -1, -1):
            g = g + dh[rows, steps[i]].to(wide)
            db[rows, steps[i]] = g.to(db.dtype)
            before = h[rows, steps[i - 1]].to(wide) if i else start[seq]
            slope = g * before.conj_physical()
            if a.dim() == 1:
                da += slope.sum(0)
            else:
                da[rows, steps[i]] = slope.to(da.dtype)
            g = g * decay(a, rows, steps[i]).to(wide).conj_physical()
        dstart[seq] = g
    return da.to(a.dtype), db, None if initial_state is None else dstart.to(initial_state.dtype)


def step(state: Tensor, a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. a (b, d) or (d), b (b, d); index (b) picks rows of state, negative: skip."""
    keep = slice(None) if index is None else (index >= 0).nonzero()[:, 0]
    rows = slice(None) if index is None else index[keep].long()
    now = (a if a.dim() == 1 else a[keep]).to(state.dtype) * state[rows] + b[keep].to(state.dtype)
    state[rows] = now
    h = torch.zeros_like(b, memory_format=torch.contiguous_format)
    h[keep] = now.to(h.dtype)
    return h


def state_dtype(b: Tensor) -> torch.dtype:
    """Of states, and what is computed in: float64 or complex128 for data of that precision, else half of it."""
    if b.is_complex():
        return b.dtype
    return torch.float64 if b.dtype == torch.float64 else torch.float32


def decay(a: Tensor, rows: slice, t: int) -> Tensor:
    """a at one step, (b, d) or (d)."""
    return a if a.dim() == 1 else a[rows, t]


def _steps(time: slice, reverse: bool) -> list[int]:
    steps = list(range(time.start, time.stop))
    return steps[::-1] if reverse else steps


def _initial(b: Tensor, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A fresh copy of the initial state, zeros if there is none."""
    if initial_state is not None:
        return initial_state.to(state_dtype(b)).clone(memory_format=torch.contiguous_format)
    rows = b.shape[0] if segments is None else segments.shape[0]
    return torch.zeros(rows, b.shape[2], dtype=state_dtype(b), device=b.device)
