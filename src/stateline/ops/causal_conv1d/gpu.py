"""causal_conv1d on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py.

Suffixes: b batch, t time step, d channel, k taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stateline.ops import cuda, parts
from stateline.ops import gpu_kernels as shared
from stateline.ops.causal_conv1d import gpu_kernels as kernels

DTYPES = cuda.DTYPES
#: Its gradient can be written into a part of wider rows.
ROOMS = True
_forward, _backward, _step = map(cuda.Kernel, (kernels.forward, kernels.backward, kernels.step))
_reduce = cuda.Kernel(shared.reduce)


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts its work: unrolled steps, steps and channels of a program, warps."""

    tile: int
    run: int
    channels: int
    warps: int


def plan_forward(d: int, k: int, dtype: torch.dtype) -> Plan:
    """From sizes alone, so that a sequence has the same bits in every batch (timings: benchmarks/NOTES.md)."""
    return Plan(16 if k <= 8 else 4, 32, 128, 1)


def plan_backward(d: int, k: int, dtype: torch.dtype) -> Plan:
    """As `plan_forward`. Few channels a thread, since inputs, slopes and sums of every tap stay in registers."""
    return Plan(8, 128, 256, 4) if k <= 4 else Plan(4, 128, 128, 4) if k <= 8 else Plan(2, 128, 128, 4)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """x (b, t, d), weight (d, k), bias (d) -> y (b, t, d), state (n_seq, k-1, d)."""
    (b, t, d), k = x.shape, weight.shape[1]
    plan = plan or plan_forward(d, k, x.dtype)
    x, taps, shift, start = cuda.data(x), cuda.plain(weight), cuda.plain(bias), cuda.plain(initial_state)
    runs = cuda.runs(segments, b, t, plan.run)
    y = cuda.tokens(x, segments)
    state = cuda.empty((b if segments is None else segments.shape[0], k - 1, d), torch.float32, x)
    blocks = cuda.ceil_div(d, plan.channels)
    if runs.count and blocks:
        _forward(
            (runs.count * blocks, 1, 1),
            (x, taps, shift, start, runs.table, runs.tiles, y, state, t, blocks, runs.each, x.stride(0)),
            (d, x.stride(1), k, silu, reverse, plan.tile, plan.run, plan.channels),
            plan.warps,
        )
    return y, state


@cuda.side_by_side
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
    plan: Plan | None = None,
    in_room: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, initial_state; None where the input was None. in_room: see ops/parts.py."""
    inputs = (x, weight, bias, silu, initial_state, segments, reverse)
    dx = parts.gradients([x], segments)[0] if in_room else cuda.tokens(x, segments)
    return dx, *_gradients(dx, dy, None, dstate, *inputs, plan)


@cuda.side_by_side
def backward_halves(
    dy: Tensor,
    more: Tensor,
    dz: Tensor,
    dstate: Tensor,
    xz: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`backward` of dy + more for the first half of xz (b, t, 2d), whose second half has the gradient dz."""
    d = weight.shape[0]
    dxz = cuda.tokens(xz, segments)
    cuda.paste(dxz[..., d:], dz)
    inputs = (xz[..., :d], weight, bias, silu, initial_state, segments, reverse)
    return dxz, *_gradients(dxz, dy, more, dstate, *inputs, None)


def _gradients(
    dx: Tensor, dy: Tensor, more: Tensor | None, dstate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
    silu: bool, initial_state: Tensor | None, segments: Tensor | None, reverse: bool, plan: Plan | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of weight, bias and initial_state; that of x is written into the first channels of dx."""
    (b, t, d), k = x.shape, weight.shape[1]
    plan = plan or plan_backward(d, k, x.dtype)
    x, dy, dstate = cuda.data(x), cuda.data(dy), dstate.contiguous()
    more = None if more is None else cuda.data(more)
    taps, shift, start = cuda.plain(weight), cuda.plain(bias), cuda.plain(initial_state)
    runs = cuda.runs(segments, b, t, plan.run)
    dinitial = None if start is None else cuda.empty(start.shape, start.dtype, x)
    dweight = cuda.empty((d, k), weight.dtype, x)
    dbias = None if bias is None else cuda.empty((d,), bias.dtype, x)
    sums = k if bias is None else k + 1
    partial = cuda.empty((runs.count, sums, d), torch.float32, x)
    blocks = cuda.ceil_div(d, plan.channels)
    more_b, more_t = (0, 0) if more is None else more.stride()[:2]
    if runs.count and blocks:
        _backward(
            (runs.count * blocks, 1, 1),
            (x, taps, shift, start, runs.table, runs.tiles, dy, more, dstate, dx, dinitial, partial, t, blocks,
             runs.each, x.stride(0), dy.stride(0), more_b),
            (d, x.stride(1), dy.stride(1), more_t, dx.stride(1), k, silu, reverse, plan.tile, plan.run, plan.channels),
            plan.warps,
        )  # fmt: skip
    if d:
        arguments = (partial, dweight, dbias, runs.count, d)
        _reduce((cuda.ceil_div(d, 32), sums, 1), arguments, (k, sums, 32, 32), 4)
    return dweight, dbias, dinitial


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, index: Tensor | None) -> Tensor:
    """One token, in place. x (b, d); index (b) picks rows of state, negative: skip."""
    (b, d), k = x.shape, weight.shape[1]
    x = cuda.data(x)
    y = cuda.empty((b, d), x.dtype, x)
    channels = max(32, min(cuda.power_of_2(d), 512))
    if b and d:
        tensors = (x, state, cuda.plain(weight), cuda.plain(bias), cuda.plain(index), y)
        numbers = (x.stride(0), state.stride(0), state.shape[0])
        _step((b, cuda.ceil_div(d, channels), 1), (*tensors, *numbers), (d, k, silu, channels), 4)
    return y
