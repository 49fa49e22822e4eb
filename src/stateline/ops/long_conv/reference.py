"""long_conv, defined.

    y[t] = Σ_i k[i] u[t-i],   i = 0 … l-1

Inputs before the first come from the state: the last l-1 inputs, oldest first, zeros at a fresh start. Taps are
numbers, a kernel a channel (depthwise), or matrices that mix channels.
Suffixes: b batch, t time step, d channel, o and i channels out and in, l taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.segments import pieces


def forward(
    u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """u (b, t, i), k (d, l) with d = i, or (l, o, i) -> y (b, t, o), state (n_seq, l-1, i)."""
    y = u.new_zeros(*u.shape[:2], width(k))
    state = initial(u, k, initial_state, segments)
    for rows, seq, time in pieces(segments, u.shape[1]):
        padded = torch.cat([state[seq], flip(u[rows, time].to(state.dtype), reverse)], 1)
        length = time.stop - time.start
        out = sum(apply(tap(k, i).to(state.dtype), shifted(padded, k, i, length)) for i in range(taps(k)))
        y[rows, time] = flip(torch.as_tensor(out), reverse).to(y.dtype)
        state[seq] = padded[:, length:].clone()
    return y, state


def backward(
    dy: Tensor,
    dstate: Tensor,
    u: Tensor,
    k: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, k, initial_state; None where the input was None."""
    real = compute_dtype(u)
    du = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
    dk = torch.zeros(k.shape, dtype=real, device=k.device)
    start = initial(u, k, initial_state, segments)
    dstart = dstate.to(real).clone(memory_format=torch.contiguous_format)
    for rows, seq, time in pieces(segments, u.shape[1]):
        padded = torch.cat([start[seq], flip(u[rows, time].to(real), reverse)], 1)
        g = flip(dy[rows, time].to(real), reverse)
        length = time.stop - time.start
        dpadded = torch.zeros_like(padded)
        dpadded[:, length:] += dstart[seq]
        for i in range(taps(k)):
            weight = tap(k, i).to(real)
            shifted(dpadded, k, i, length).add_(apply(weight.T if k.dim() == 3 else weight, g))
            before = shifted(padded, k, i, length)
            if k.dim() == 3:
                dk[i] += torch.einsum("bto,bti->oi", g, before)
            else:
                dk[:, i] += (g * before).sum((0, 1))
        du[rows, time] = flip(dpadded[:, taps(k) - 1 :], reverse).to(du.dtype)
        dstart[seq] = dpadded[:, : taps(k) - 1]
    return du, dk.to(k.dtype), None if initial_state is None else dstart.to(initial_state.dtype)


def step(state: Tensor, u: Tensor, k: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. u (b, i); index (b) picks rows of state, negative: skip."""
    keep = slice(None) if index is None else (index >= 0).nonzero()[:, 0]
    rows = slice(None) if index is None else index[keep].long()
    padded = torch.cat([state[rows], u[keep][:, None].to(state.dtype)], 1)
    weight = k.to(state.dtype)
    if k.dim() == 3:
        out = torch.einsum("bli,loi->bo", padded, weight.flip(0))
    else:
        out = torch.einsum("bld,dl->bd", padded, weight.flip(1))
    state[rows] = padded[:, 1:]
    y = u.new_zeros(u.shape[0], width(k))
    y[keep] = out.to(y.dtype)
    return y


def compute_dtype(u: Tensor) -> torch.dtype:
    """float64 for float64 data, else float32; also the dtype of the state."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def taps(k: Tensor) -> int:
    """l, of either form of k."""
    return k.shape[0] if k.dim() == 3 else k.shape[1]


def width(k: Tensor) -> int:
    """Channels that come out."""
    return k.shape[1] if k.dim() == 3 else k.shape[0]


def tap(k: Tensor, i: int) -> Tensor:
    """Tap i: (o, i) or (d)."""
    return k[i] if k.dim() == 3 else k[:, i]


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """A tap on x (b, t, i)."""
    return x @ weight.T if weight.dim() == 2 else x * weight


def shifted(padded: Tensor, k: Tensor, i: int, length: int) -> Tensor:
    """What tap i sees of (b, l-1 + t, i): the inputs i steps back; a view."""
    first = taps(k) - 1 - i
    return padded[:, first : first + length]


def initial(u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A fresh copy of the initial state, zeros if there is none."""
    if initial_state is not None:
        return initial_state.to(compute_dtype(u)).clone(memory_format=torch.contiguous_format)
    rows = u.shape[0] if segments is None else segments.shape[0]
    return torch.zeros(rows, taps(k) - 1, u.shape[2], dtype=compute_dtype(u), device=u.device)


def flip(x: Tensor, reverse: bool) -> Tensor:
    """x (b, t, …), time running the other way if `reverse`."""
    return x.flip(1) if reverse else x
