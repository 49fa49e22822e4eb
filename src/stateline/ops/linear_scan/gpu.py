"""linear_scan on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py.

Suffixes: b batch, t time step, d channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.linear_scan import gpu_kernels as kernels
from stateline.ops.linear_scan.reference import state_dtype

DTYPES = cuda.DTYPES | {torch.complex64}
_summarise, _carry = map(cuda.Kernel, (kernels.summarise, kernels.carry))
_forward, _backward, _step = map(cuda.Kernel, (kernels.forward, kernels.backward, kernels.step))
_reduce = cuda.Kernel(shared.reduce)


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts its work: unrolled steps, steps and channels of a program, warps."""

    tile: int
    run: int
    channels: int
    warps: int


def plan(t: int, d: int) -> Plan:
    """From sizes alone, so that a sequence has the same bits in every batch.

    Runs of about √t steps: what is walked in a run and the runs of a sequence, which follow each other, are as many.
    """
    run = min(max(cuda.power_of_2(math.isqrt(max(t, 1))), 32), 256)
    return Plan(8, run, max(32, min(cuda.power_of_2(d), 128)), 1 if d <= 32 else 4)


@cuda.side_by_side
def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """a (b, t, d) or (d), b (b, t, d) -> h (b, t, d), state (n_seq, d)."""
    work = _Work(a, b, segments, reverse)
    inputs, start = cuda.data(_numbers(b)), _state(initial_state)
    h = cuda.tokens(b, segments)
    state = cuda.empty((work.sequences, b.shape[2]), state_dtype(b), b)
    if work.programs:
        into = start if work.one else work.carried(inputs, start, back=False)
        _forward(
            (work.programs, 1, 1),
            (work.decays, inputs, into, work.runs.table, work.runs.tiles, _numbers(h), _numbers(state), work.t,
             work.blocks, work.runs.each, work.batch_stride, inputs.stride(0)),
            (work.d, work.time_stride, inputs.stride(1), work.complex, work.constant, work.one, *work.cut),
            work.plan.warps,
        )  # fmt: skip
    return h, state


@cuda.side_by_side
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
    work = _Work(a, b, segments, reverse)
    slopes, past, last = cuda.data(_numbers(dh)), cuda.data(_numbers(h)), _state(dstate)
    start = _state(initial_state)
    db = cuda.tokens(b, segments)
    da = cuda.empty((work.d,), a.dtype, b) if work.constant else cuda.tokens(a, segments)
    dinitial = None if initial_state is None else cuda.empty(initial_state.shape, initial_state.dtype, b)
    width = work.d * (2 if work.complex else 1)
    partial = cuda.empty((work.runs.count, width), torch.float32, b) if work.constant else None
    if partial is not None and segments is not None:
        partial.zero_()  # there may be more programs than runs
    if work.programs:
        into = last if work.one else work.carried(slopes, last, back=True)
        tensors = (work.decays, slopes, past, start, into, work.runs.table, work.runs.tiles)
        results = (_numbers(da), _numbers(db), None if dinitial is None else _numbers(dinitial), partial)
        strides = (work.batch_stride, slopes.stride(0), past.stride(0))
        _backward(
            (work.programs, 1, 1),
            (*tensors, *results, work.t, work.blocks, work.runs.each, *strides),
            (work.d, work.time_stride, slopes.stride(1), past.stride(1), work.complex, work.constant, work.one,
             *work.cut),
            work.plan.warps,
        )  # fmt: skip
    if work.constant and width:
        arguments = (partial, _numbers(da), None, work.runs.count, width)
        _reduce((cuda.ceil_div(width, 32), 1, 1), arguments, (1, 1, 32, 32), 4)
    return da, db, dinitial


def step(state: Tensor, a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. a (b, d) or (d), b (b, d); index (b) picks rows of state, negative: skip."""
    rows, d = b.shape
    inputs, decays, constant = cuda.data(_numbers(b)), _decays(a), a.dim() == 1
    h = cuda.empty((rows, d), b.dtype, b)
    channels = max(32, min(cuda.power_of_2(d), 512))
    if rows and d:
        tensors = (_numbers(state), decays, inputs, cuda.plain(index), _numbers(h))
        numbers = (0 if constant else decays.stride(0), inputs.stride(0), state.shape[0])
        grid = (rows, cuda.ceil_div(d, channels), 1)
        _step(grid, (*tensors, *numbers), (d, b.is_complex(), constant, channels), 4)
    return h


class _Work:
    """What both passes share: how time and channels are cut, and the decays as kernels read them."""

    def __init__(self, a: Tensor, b: Tensor, segments: Tensor | None, reverse: bool) -> None:
        rows, self.t, self.d = b.shape
        self.complex, self.constant = b.is_complex(), a.dim() == 1
        self.plan = plan(self.t, self.d)
        self.runs = cuda.runs(segments, rows, self.t, self.plan.run)
        self.sequences = rows if segments is None else segments.shape[0]
        self.blocks = cuda.ceil_div(self.d, self.plan.channels)
        self.programs = self.runs.count * self.blocks
        self.one = self.t <= self.plan.run
        self.cut = (reverse, self.plan.tile, self.plan.run, self.plan.channels)
        self.decays = _decays(a)
        self.batch_stride, self.time_stride = (0, 0) if self.constant else self.decays.stride()[:2]

    def carried(self, x: Tensor, start: Tensor | None, *, back: bool) -> Tensor:
        """What enters each run, (runs, numbers), of x (b, t, numbers) and what enters the sequences."""
        width = x.shape[2]
        product, local, into = (cuda.empty((self.runs.count, width), torch.float32, x) for _ in range(3))
        strides = (self.batch_stride, x.stride(0))
        _summarise(
            (self.programs, 1, 1),
            (self.decays, x, self.runs.table, self.runs.tiles, product, local, self.t, self.blocks, self.runs.each,
             *strides),
            (self.d, self.time_stride, x.stride(1), self.complex, self.constant, back, *self.cut),
            self.plan.warps,
        )  # fmt: skip
        _carry(
            (self.sequences, self.blocks, 1),
            (product, local, start, self.runs.table, self.runs.firsts, into, self.t, self.runs.each),
            (self.d, self.complex, back, self.plan.run, self.plan.channels),
            self.plan.warps,
        )
        return into


def _numbers(x: Tensor) -> Tensor:
    """Complex numbers as pairs along the last dimension; a view wherever that is adjacent."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def _decays(a: Tensor) -> Tensor:
    narrow = a.float() if a.dtype == torch.float64 else a
    return cuda.data(_numbers(narrow.contiguous() if a.dim() == 1 else narrow))


def _state(state: Tensor | None) -> Tensor | None:
    return None if state is None else cuda.plain(_numbers(state))
