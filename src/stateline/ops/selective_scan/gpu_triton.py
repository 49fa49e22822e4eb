"""selective_scan in Triton (gpu*_kernels.py): the same functions as reference.py, for every system.

It serves systems that the CUDA kernels of gpu.py do not cover, and all of them where NVRTC cannot be loaded. Everything
is computed in float32.

Suffixes: b batch, t time step, d channel, n state, g group, P parts of a number (2 if complex).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.selective_scan import gpu_backward_kernels as backward_kernels
from stateline.ops.selective_scan import gpu_kernels as kernels

_sweep, _combine, _outputs, _step = map(
    cuda.Kernel, (kernels.sweep, kernels.combine, kernels.outputs, kernels.step)
)  # fmt: skip
_channels, _projections = map(cuda.Kernel, (backward_kernels.channels, backward_kernels.projections))
_reduce = cuda.Kernel(shared.reduce)
#: Bytes of states before tiles that are held at once, and per byte of u: a gradient of more works in waves.
WAVE, WAVE_OF_DATA = 2**28, 4


@dataclass(frozen=True)
class Plan:
    """How work is cut: steps of a tile, tiles of a chunk, channels of a program, states that a sweep takes at once."""

    tile: int = 8
    tiles: int = 16
    channels: int = 32
    states: int = 2

    @property
    def chunk(self) -> int:
        """Steps of a chunk."""
        return self.tile * self.tiles


def plan(parts: int) -> Plan:
    """From the kind of system alone, so that a sequence has the same bits in every batch (see benchmarks/NOTES.md).

    More states in a sweep would make it 7 % faster and take twice as long to compile.
    """
    return Plan(states=4 // parts)


class _System:
    """A, B and C as kernels read them, and what they are: part of every launch's constants."""

    def __init__(self, A: Tensor, B: Tensor, C: Tensor, step: bool = False) -> None:
        self.parts = 2 if A.is_complex() else 1
        self.d, self.n = A.shape
        self.A, self.B_token, self.C_token = _real(A), B.dim() != 2, C.dim() != 2
        self.B, self.C = (self._projection(x, token) for x, token in ((B, self.B_token), (C, self.C_token)))
        tokens = [x for x, token in ((B, self.B_token), (C, self.C_token)) if token]
        self.g = tokens[0].shape[1 if step else 2] if tokens else 1

    def _projection(self, x: Tensor, token: bool) -> Tensor:
        if not token:
            return _real(x)
        return cuda.data(x if self.parts == 1 else x.movedim(-1, -2).contiguous())  # the latter (…, g, P, n)

    def planar(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and C with constants as (n, P, d), so that neighbouring channels lie side by side."""
        fixed = ((self.A, False), (self.B, self.B_token), (self.C, self.C_token))
        A, B, C = (x if token else x.permute(1, 2, 0).contiguous() for x, token in fixed)
        return A, B, C

    def strides(self, x: Tensor, token: bool) -> tuple[tuple[int, int], int]:
        """((batch, group), time) of B or C; the latter is a constant of a kernel."""
        if not token:
            return (0, 0), 0
        return (x.stride(0), x.stride(2)), x.stride(1) if x.shape[1] > 1 else 0

    def given(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient of B or C per token as those were given."""
        return gradient if gradient is None or self.parts == 1 else gradient.movedim(-2, -1).contiguous()


def _real(x: Tensor) -> Tensor:
    """A parameter (d, n) as (d, n, P), contiguous."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())
    return x.resolve_neg().contiguous()[..., None]


def _state(x: Tensor | None) -> Tensor | None:
    """A state (n_seq, d, n) as (n_seq, d, n, P), contiguous."""
    return None if x is None else _real(x)


class _Call:
    """The inputs that every kernel of this op reads, and where sequences are cut."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, segments: Tensor | None,
        reverse: bool,
    ) -> None:  # fmt: skip
        (self.b, self.t, self.d), self.n = u.shape, A.shape[1]
        self.system = _System(A, B, C)
        self.plan = plan(self.system.parts)
        self.A, self.B, self.C = self.system.planar()
        self.u, self.dt, self.z = cuda.data(u), cuda.data(dt), None if z is None else cuda.data(z)
        self.D, self.bias, self.initial = cuda.plain(D), cuda.plain(dt_bias), _state(initial_state)
        self.segments, self.softplus, self.reverse = segments, dt_softplus, reverse
        self.runs = cuda.runs(segments, self.b, self.t, self.plan.chunk)
        self.sequences = self.b if segments is None else segments.shape[0]
        g = self.system.g
        self.blocks = g * cuda.ceil_div(cuda.ceil_div(self.d, g), self.plan.channels) if g else 0
        self.parts = self.system.parts
        (self.B_outer, self.B_inner), (self.C_outer, self.C_inner) = (
            self.system.strides(x, token)
            for x, token in ((self.B, self.system.B_token), (self.C, self.system.C_token))
        )  # fmt: skip
        self.cut = (self.plan.tiles, self.plan.tile)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return cuda.empty(shape, dtype, self.u)

    def zeros(self, *shape: int) -> Tensor:
        return self.empty(*shape).zero_()

    def time(self, x: Tensor | None) -> tuple[int, int]:
        """Strides of batch and time; a stride of time that is never taken is no constant worth compiling for."""
        return (0, 0) if x is None else (x.stride(0), x.stride(1) if self.t > 1 else 0)

    def sweep(
        self, out: Tensor, sums: Tensor | None, starts: Tensor | None, dy: Tensor | None, wave: tuple[int, int]
    ) -> None:
        """Run the kernel over `wave`, (first, count) of the chunks: against time if there is a `dy`."""
        X, outer, inner = (self.B, self.B_outer, self.B_inner) if dy is None else (self.C, self.C_outer, self.C_inner)
        token = self.system.B_token if dy is None else self.system.C_token
        u, z = (self.u, None) if dy is None else (None, self.z)
        (u_b, u_t), (dt_b, dt_t), (dy_b, dy_t), (z_b, z_t) = map(self.time, (u, self.dt, dy, z))
        arguments = (
            self.dt if u is None else u, self.dt, dy, z, self.A, X, self.bias, starts, out, sums,
            self.runs.table, self.runs.tiles, wave[0], self.t, self.blocks, self.runs.each,
            u_b, dt_b, dy_b, z_b, *outer,
        )  # fmt: skip
        constants = (
            self.d, self.n, self.system.g, self.parts, u_t, dt_t, dy_t, z_t, inner, token, dy is not None,
            self.softplus, self.reverse, *self.cut, self.plan.states, self.plan.channels,
        )  # fmt: skip
        grid = (wave[1] * self.blocks, cuda.ceil_div(self.n, self.plan.states), 1)
        _sweep(grid, arguments, constants, self.plan.channels // 32)

    def combine(self, ends: Tensor, sums: Tensor, initial: Tensor | None, adjoint: bool) -> None:
        """States before chunks, in place of those that chunks leave behind."""
        runs = self.runs
        blocks = cuda.ceil_div(self.d, self.plan.channels)
        arguments = (ends, sums, self.A, initial, runs.table, runs.firsts, self.t, runs.each, blocks)
        constants = (self.d, self.n, self.parts, adjoint, runs.each == 1, self.plan.chunk, self.plan.channels)
        _combine((self.sequences * blocks, self.n, 1), arguments, constants, self.plan.channels // 32)

    def starts(self, dy: Tensor | None = None, initial: Tensor | None = None, sums: Tensor | None = None) -> Any:
        """(states before each chunk (chunks, n, P, d), summed steps of each chunk); with `dy`, from the end of time."""
        states = self.empty(self.runs.count, self.n, self.parts, self.d)
        elapsed = self.empty(self.runs.count, self.d, dtype=torch.float64) if sums is None else sums
        if self.runs.each > 1:
            self.sweep(states, elapsed if sums is None else None, None, dy, (0, self.runs.count))
        self.combine(states, elapsed, initial, dy is not None)
        return states, elapsed

    def works(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.runs.count and self.blocks)


@cuda.side_by_side
def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """u, dt, z (b, t, d); A (d, n); B, C (b, t, g, n[, 2]) or (d, n) -> y (b, t, d), state (n_seq, d, n)."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    y = cuda.tokens(call.u, segments)
    state = call.empty(call.sequences, call.d, call.n, call.parts)
    if call.works():
        starts = call.empty(call.runs.count, 0)
        if call.n:
            starts, _ = call.starts(initial=call.initial)
        (u_b, u_t), (dt_b, dt_t), (z_b, z_t) = map(call.time, (call.u, call.dt, call.z))
        arguments = (
            call.u, call.dt, call.z, call.A, call.B, call.C, call.D, call.bias, starts, call.runs.table,
            call.runs.tiles, y, state, call.t, call.blocks, call.runs.each, u_b, dt_b, z_b, *call.B_outer,
            *call.C_outer,
        )  # fmt: skip
        constants = (
            call.d, call.n, call.system.g, call.parts, u_t, dt_t, z_t, call.B_inner, call.C_inner,
            call.system.B_token, call.system.C_token, dt_softplus, reverse, *call.cut, call.plan.channels,
        )  # fmt: skip
        _outputs((call.runs.count * call.blocks, 1, 1), arguments, constants, call.plan.channels // 32)
    return y, _number(state)


def _number(x: Tensor) -> Tensor:
    """(…, P) as real or complex numbers."""
    return torch.view_as_complex(x) if x.shape[-1] == 2 else x[..., 0]


class _Gradient:
    """What the gradient's kernels write."""

    def __init__(self, call: _Call, dy: Tensor) -> None:
        system, segments = call.system, call.segments
        self.dy = cuda.data(dy)
        self.du, self.ddt = cuda.tokens(call.u, segments), cuda.tokens(call.dt, segments)
        self.dz = None if call.z is None else cuda.tokens(call.z, segments)
        self.dB = cuda.tokens(call.B, segments) if system.B_token else None
        self.dC = cuda.tokens(call.C, segments) if system.C_token else None
        self.dinitial = None if call.initial is None else cuda.empty(call.initial.shape, torch.float32, dy)
        self.numbers = 3 - system.B_token - system.C_token
        self.sums = call.zeros(call.runs.count, call.n, self.numbers * call.parts, call.d)
        self.edges = call.zeros(call.runs.count, 2, call.d)

    def totals(self, call: _Call) -> tuple[list[Tensor], Tensor]:
        """Gradients of A and of constant B and C, each (d, n), and those of D and the bias (2, d)."""
        width = call.n * self.numbers * call.parts
        system, edges = call.empty(call.d, width), call.empty(call.d, 2)
        for partial, out, wide in ((self.sums, system, width), (self.edges, edges, 2)):
            if wide:
                grid = (cuda.ceil_div(call.d, 32), wide, 1)
                _reduce(grid, (partial, out, None, call.runs.count, call.d), (wide, wide, 32, 32), 4)
        split = system.view(call.d, call.n, self.numbers, call.parts)
        return [_number(split[:, :, i].contiguous()) for i in range(self.numbers)], edges.t().contiguous()


@cuda.side_by_side
def backward(
    dy: Tensor,
    dstate: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None."""
    call = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    back = _Gradient(call, dy)
    if call.works():
        before, after = call.empty(call.runs.count, 0), call.empty(call.runs.count, 0)
        if call.n:
            before, elapsed = call.starts(initial=call.initial)
            after, _ = call.starts(back.dy, _state(dstate), elapsed)
        per_chunk = 2 * call.plan.tiles * call.n * call.parts * call.d * 4
        allowed = max(WAVE, WAVE_OF_DATA * u.numel() * u.element_size())
        most = max(1, min(call.runs.count, allowed // max(per_chunk, 1)))
        for first in range(0, call.runs.count, most):
            _wave(call, back, before, after, (first, min(most, call.runs.count - first)))
    (dA, *constants), (dD, dbias) = back.totals(call)
    dC = constants.pop() if back.dC is None else call.system.given(back.dC)
    dB = constants.pop() if back.dB is None else call.system.given(back.dB)
    grads = (back.du, back.ddt, dA, dB, dC, dD, back.dz, dbias)
    given = (u, dt, A, B, C, D, z, dt_bias)
    dinitial = None if back.dinitial is None else _number(back.dinitial)
    return (*(None if x is None else g for x, g in zip(given, grads, strict=True)), dinitial)


def _wave(call: _Call, back: _Gradient, before: Tensor, after: Tensor, wave: tuple[int, int]) -> None:
    """The gradient of (first, count) chunks, given the states around each."""
    first, count = wave
    shape, system = (count, call.plan.tiles, call.n, call.parts, call.d), call.system
    states, reaching = call.empty(*shape), call.empty(*shape)
    if call.n:
        call.sweep(states, None, before, None, wave)
        call.sweep(reaching, None, after, back.dy, wave)
    token = system.B_token or system.C_token
    prepared = call.empty(count, call.plan.chunk, 2, call.d) if token else None
    (u_b, u_t), (dt_b, dt_t), (dy_b, dy_t), (z_b, z_t) = map(call.time, (call.u, call.dt, back.dy, call.z))
    place = (call.runs.table, call.runs.tiles)
    arguments = (
        call.u, call.dt, back.dy, call.z, call.A, call.B, call.C, call.D, call.bias, states, reaching, *place, back.du,
        back.ddt, back.dz, back.dinitial, back.sums, back.edges, prepared, first, call.t, call.blocks, call.runs.each,
        u_b, dt_b, dy_b, z_b, *call.B_outer, *call.C_outer,
    )  # fmt: skip
    kinds = (system.B_token, system.C_token)
    constants = (
        call.d, call.n, system.g, call.parts, u_t, dt_t, dy_t, z_t, call.B_inner, call.C_inner, *kinds,
        call.softplus, call.reverse, *call.cut, call.plan.channels,
    )  # fmt: skip
    _channels((count * call.blocks, 1, 1), arguments, constants, call.plan.channels // 32)
    if not (token and call.n and system.g):
        return
    lanes = max(32, min(128, cuda.power_of_2(call.n)))
    inputs = (
        call.u, system.A, system.B, system.C, states, reaching, *place, prepared, back.dB, back.dC, first, call.t,
        call.runs.each, u_b, *call.B_outer, *call.C_outer,
    )  # fmt: skip
    numbers = (
        call.d, call.n, system.g, call.parts, u_t, call.B_inner, call.C_inner, *kinds, call.reverse, *call.cut, lanes,
    )  # fmt: skip
    grid = (count * call.plan.tiles, system.g, cuda.ceil_div(call.n, lanes))
    _projections(grid, inputs, numbers, lanes // 32)


def step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    index: Tensor | None,
) -> Tensor:
    """One token, in place. u, dt, z (b, d); B, C (b, g, n[, 2]) or (d, n); index (b): state rows, negative: skip."""
    system = _System(A, B, C, step=True)
    (b, d), n = u.shape, A.shape[1]
    u, dt, z = cuda.data(u), cuda.data(dt), None if z is None else cuda.data(z)
    y = cuda.empty((b, d), u.dtype, u)
    if b and d:
        states = torch.view_as_real(state) if state.is_complex() else state[..., None]
        outer = []
        for x, token in ((system.B, system.B_token), (system.C, system.C_token)):
            outer += [x.stride(0), x.stride(1)] if token else [0, 0]
        arguments = (
            states, u, dt, z, system.A, system.B, system.C, cuda.plain(D), cuda.plain(dt_bias), cuda.plain(index), y,
            states.stride(0), states.shape[0], u.stride(0), dt.stride(0), 0 if z is None else z.stride(0), *outer,
        )  # fmt: skip
        lanes = min(64, cuda.power_of_2(n))
        channels = max(8, min(128, 512 // lanes))
        constants = (
            d, n, system.g, system.parts, system.B_token, system.C_token, dt_softplus, channels, lanes,
        )  # fmt: skip
        _step((b, cuda.ceil_div(d, channels), 1), arguments, constants, 4)
    return y
