"""causal_conv1d on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py.

Suffixes: b batch, t time step, d channel, k taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.causal_conv1d import gpu_kernels as kernels

DTYPES = cuda.DTYPES


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts its work: unrolled steps, steps and channels of a program, warps."""

    tile: int
    run: int
    channels: int
    warps: int


def plan_forward(d: int, k: int, dtype: torch.dtype) -> Plan:
    """From sizes alone, so that a sequence has the same bits in every batch."""
    warps = 4
    return Plan(8 if k > 8 else 16, 64, _channels(d, warps, 4), warps)


def plan_backward(d: int, k: int, dtype: torch.dtype) -> Plan:
    """As `plan_forward`; the gradient holds two tensors in registers."""
    warps = 4
    return Plan(4 if k > 8 else 8, 128, _channels(d, warps, 4 if k <= 8 else 1), warps)


def _channels(d: int, warps: int, vector: int) -> int:
    return max(32, min(cuda.power_of_2(d), 32 * warps * vector))


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
    x, weight, bias, initial_state = cuda.data(x), weight.resolve_neg(), cuda.plain(bias), cuda.plain(initial_state)
    runs = cuda.runs(segments, b, t, plan.run)
    y = (torch.empty if segments is None else torch.zeros)((b, t, d), dtype=x.dtype, device=x.device)
    n_seq = b if segments is None else segments.shape[0]
    state = torch.empty((n_seq, k - 1, d), dtype=torch.float32, device=x.device)
    blocks = cuda.ceil_div(d, plan.channels)
    if runs.count and blocks:
        with cuda.on(x):
            kernels.forward[(runs.count * blocks,)](
                x, weight, bias, initial_state, runs.table, runs.tiles, y, state, t, blocks, runs.each,
                x.stride(0), weight.stride(0), weight.stride(1), d, x.stride(1),
                k, silu, reverse, plan.tile, plan.run, plan.channels, num_warps=plan.warps,
            )  # fmt: skip
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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, initial_state; None where the input was None."""
    (b, t, d), k = x.shape, weight.shape[1]
    plan = plan or plan_backward(d, k, x.dtype)
    x, dy, weight, bias = cuda.data(x), cuda.data(dy), weight.resolve_neg(), cuda.plain(bias)
    start, dstate = cuda.plain(initial_state), dstate.contiguous()
    runs = cuda.runs(segments, b, t, plan.run)
    dx = (torch.empty if segments is None else torch.zeros)((b, t, d), dtype=x.dtype, device=x.device)
    dinitial = None if start is None else torch.empty_like(start)
    dweight = torch.empty((d, k), dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty_like(bias)
    sums = k if bias is None else k + 1
    partial = torch.empty((runs.count, sums, d), dtype=torch.float32, device=x.device)
    blocks = cuda.ceil_div(d, plan.channels)
    if not blocks:
        return dx, dweight, dbias, dinitial
    with cuda.on(x):
        if runs.count:
            kernels.backward[(runs.count * blocks,)](
                x, weight, bias, start, runs.table, runs.tiles, dy, dstate, dx, dinitial, partial, t, blocks,
                runs.each, x.stride(0), dy.stride(0), weight.stride(0), weight.stride(1), d, x.stride(1), dy.stride(1),
                k, silu, reverse, plan.tile, plan.run, plan.channels, num_warps=plan.warps,
            )  # fmt: skip
        shared.reduce[(cuda.ceil_div(d, 32), sums)](partial, dweight, dbias, runs.count, d, k, sums, 32, 32)
    return dx, dweight, dbias, dinitial


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, index: Tensor | None) -> Tensor:
    """One token, in place. x (b, d); index (b) picks rows of state, negative: skip."""
    (b, d), k = x.shape, weight.shape[1]
    x, weight, bias = cuda.data(x), weight.resolve_neg(), cuda.plain(bias)
    index = None if index is None else index.contiguous()
    y = torch.empty((b, d), dtype=x.dtype, device=x.device)
    channels = max(32, min(cuda.power_of_2(d), 512))
    if b and d:
        with cuda.on(x):
            kernels.step[(b, cuda.ceil_div(d, channels))](
                state, x, weight, bias, index, y, x.stride(0), weight.stride(0), weight.stride(1),
                state.stride(0), d, k, silu, channels, num_warps=4,
            )  # fmt: skip
    return y
