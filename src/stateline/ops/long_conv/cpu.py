"""long_conv on CPUs: short kernels by the C++ of causal_conv1d, long ones by Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.causal_conv1d import cpu as short
from stateline.ops.long_conv import chunked, spectrum

#: Taps up to which summing them is less work than transforms, whatever the length (benchmarks/NOTES.md).
SHORT = 96


def forward(
    u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """u (b, t, i), k (d, l) with d = i, or (l, o, i) -> y (b, t, o), state (n_seq, l-1, i)."""
    if _short(k):
        return short.forward(u, k.flip(1), None, False, initial_state, segments, reverse)
    y, state = chunked.forward(native.data(u), k, initial_state, segments, reverse, turn)
    return y.to(u.dtype), state


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
    if _short(k):
        du, dk, _, dinitial = short.backward(dy, dstate, u, k.flip(1), None, False, initial_state, segments, reverse)
        return du, dk.flip(1), dinitial
    du, dk, dinitial = chunked.backward(
        native.data(dy), dstate, native.data(u), k, initial_state, segments, reverse, turn
    )
    return du.to(u.dtype), dk, dinitial


def step(state: Tensor, u: Tensor, k: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. u (b, i); index (b) picks rows of state, negative: skip."""
    if k.dim() == 3:
        return chunked.step(state, u, k, index)
    return short.step(state, u, k.flip(1), None, False, index)


def turn(x: Tensor, y: Tensor, add: bool = False, lead: int | None = None) -> None:
    """`spectrum.turn` in C++."""
    y = spectrum.inner(x, y, lead)
    if 0 in x.shape:
        return
    given = x if x.stride(2) == 1 else x.contiguous()
    b, rows, columns = x.shape
    source = (given.data_ptr(), native.DTYPES[x.dtype], given.stride(0), given.stride(1))
    target = (y.data_ptr(), native.DTYPES[y.dtype], y.stride(0), y.stride(1))
    native.call("long_conv_turn", (b, rows, columns, add, torch.get_num_threads(), *source, *target))


def _short(k: Tensor) -> bool:
    return k.dim() == 2 and k.shape[1] <= SHORT
