"""causal_conv1d in C++: the same functions as reference.py, over the kernels of cpu.cpp.

Suffixes: b batch, t time step, d channel, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    real, (b, t, d), k = _real(x), x.shape, weight.shape[1]
    x_in, w, shift = native.data(x), native.parameter(weight, real), native.optional_parameter(bias, real)
    start = native.optional_parameter(initial_state, real)
    segments, where = native.table(segments, b, reverse)
    y = native.empty(x.shape, native.out_dtype(x.dtype), segments)
    state = torch.empty((where[1], k - 1, d), dtype=real)
    native.call(
        "causal_conv1d_forward",
        (
            b, t, d, k, *where, real == torch.float64, silu, *native.rows(x_in), w.data_ptr(), native.pointer(shift),
            native.pointer(start), *native.output(y), state.data_ptr(), 0, 0, 0,
        ),
    )  # fmt: skip
    return y if y.dtype == x.dtype else y.to(x.dtype), state


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
    real, (b, t, d), k = _real(x), x.shape, weight.shape[1]
    x_in, w, shift = native.data(x), native.parameter(weight, real), native.optional_parameter(bias, real)
    dy, dstate = native.data(dy), native.parameter(dstate, real)
    start = native.optional_parameter(initial_state, real)
    segments, where = native.table(segments, b, reverse)
    dx = native.empty(x.shape, native.out_dtype(x.dtype), segments)
    dweight = torch.empty(weight.shape, dtype=real)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=real)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=real)
    native.call(
        "causal_conv1d_backward",
        (
            b, t, d, k, *where, real == torch.float64, silu, *native.rows(x_in), w.data_ptr(), native.pointer(shift),
            native.pointer(start), *native.ABSENT2, 0, 0, 0, 0, *native.rows(dy), dstate.data_ptr(), *native.output(dx),
            dweight.data_ptr(), native.pointer(dbias), native.pointer(dinitial),
        ),
    )  # fmt: skip
    return (
        dx.to(x.dtype),
        dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        None if dinitial is None or initial_state is None else dinitial.to(initial_state.dtype),
    )


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, index: Tensor | None) -> Tensor:
    """One token, in place. x (b, d); index (b) picks rows of state, negative: skip."""
    real, (b, d), k = _real(x), x.shape, weight.shape[1]
    x_in, w, shift = native.data(x), native.parameter(weight, real), native.optional_parameter(bias, real)
    index = native.slots(index)
    y = native.empty(x.shape, native.out_dtype(x.dtype), index)
    direct = state.dtype == real and state.stride()[1:] == (d, 1)
    slots = state if direct else native.parameter(state, real)
    native.call(
        "causal_conv1d_step",
        (
            b, 1, d, k, 0, b, 0, torch.get_num_threads(), real == torch.float64, silu, *native.rows(x_in), w.data_ptr(),
            native.pointer(shift), slots.data_ptr(), *native.output(y), 0, native.pointer(index), slots.shape[0],
            slots.stride(0),
        ),
    )  # fmt: skip
    if not direct:
        state.copy_(slots)
    return y if y.dtype == x.dtype else y.to(x.dtype)
