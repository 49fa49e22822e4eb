"""causal_conv1d, defined.

    y[t] = Σ_j weight[j] x[t - (k-1) + j] + bias,   j = 0 … k-1,   optionally followed by silu

Inputs before the first come from the state: the last k-1 inputs, oldest first, zeros at a fresh start.
Suffixes: b batch, t time step, d channel, k taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.segments import pieces


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """x (b, t, d), weight (d, k), bias (d) -> y (b, t, d), state (n_seq, k-1, d)."""
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    state = _initial(x, weight, initial_state, segments)
    for rows, seq, time in pieces(segments, x.shape[1]):
        padded = _with_state(x, state[seq], rows, time, reverse)
        out = _convolve(padded, weight, bias)
        y[rows, time] = _flip(F.silu(out) if silu else out, reverse).to(y.dtype)
        state[seq] = padded[:, out.shape[1] :].clone()
    return y, state


def backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, initial_state; None where the input was None."""
    real, k = compute_dtype(x), weight.shape[1]
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.zeros(weight.shape, dtype=real, device=x.device)
    dbias = torch.zeros(weight.shape[0], dtype=real, device=x.device)
    start = _initial(x, weight, initial_state, segments)
    dstart = dstate.to(real).clone(memory_format=torch.contiguous_format)
    for rows, seq, time in pieces(segments, x.shape[1]):
        padded = _with_state(x, start[seq], rows, time, reverse)
        g = _flip(dy[rows, time].to(real), reverse)
        if silu:
            out = _convolve(padded, weight, bias)
            s = torch.sigmoid(out)
            g = g * s * (1 + out * (1 - s))
        length = g.shape[1]
        dpadded = torch.zeros_like(padded)
        dpadded[:, length:] += dstart[seq]
        for j in range(k):
            dpadded[:, j : j + length] += g * weight[:, j].to(real)
            dweight[:, j] += (g * padded[:, j : j + length]).sum((0, 1))
        dbias += g.sum((0, 1))
        dx[rows, time] = _flip(dpadded[:, k - 1 :], reverse).to(dx.dtype)
        dstart[seq] = dpadded[:, : k - 1]
    return (
        dx,
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if initial_state is None else dstart.to(initial_state.dtype),
    )


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, index: Tensor | None) -> Tensor:
    """One token, in place. x (b, d); index (b) picks rows of state, negative: skip."""
    keep = slice(None) if index is None else (index >= 0).nonzero()[:, 0]
    rows = slice(None) if index is None else index[keep].long()
    out, new = forward(x[keep][:, None], weight, bias, silu, state[rows], None, False)
    state[rows] = new
    if index is None:
        return out[:, 0]
    y = torch.zeros_like(x)
    y[keep] = out[:, 0]
    return y


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 data, else float32; also the dtype of the state."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _initial(x: Tensor, weight: Tensor, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A fresh copy of the initial state, zeros if there is none."""
    if initial_state is not None:
        return initial_state.to(compute_dtype(x)).clone(memory_format=torch.contiguous_format)
    rows = x.shape[0] if segments is None else segments.shape[0]
    d, k = weight.shape
    return torch.zeros(rows, k - 1, d, dtype=compute_dtype(x), device=x.device)


def _with_state(x: Tensor, state: Tensor, rows: slice, time: slice, reverse: bool) -> Tensor:
    """State and inputs in one (b, k-1 + t, d) tensor, time running forwards."""
    return torch.cat([state, _flip(x[rows, time].to(state.dtype), reverse)], 1)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    k = weight.shape[1]
    length = padded.shape[1] - (k - 1)
    y = torch.zeros_like(padded[:, :length])
    if bias is not None:
        y += bias.to(padded.dtype)
    for j in range(k):
        y += padded[:, j : j + length] * weight[:, j].to(padded.dtype)
    return y


def _flip(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x
