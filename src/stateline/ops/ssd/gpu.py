"""ssd on a GPU: the same functions as reference.py, over the Triton kernels of gpu_kernels.py.

Data of bfloat16 enters matrix products as it is; other data, and mixed, as float32. States and all sums are float32.

Suffixes: b batch, t time step, h head, p head width, n state, g group.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stateline.ops import cuda, parts
from stateline.ops import gpu_kernels as shared
from stateline.ops.ssd import gpu_backward_kernels as backward_kernels
from stateline.ops.ssd import gpu_kernels as kernels

#: Precision of A that the kernels compute in.
DTYPES = frozenset({torch.float32})
#: Its step reads and writes states of bfloat16 as they are.
NARROW = True
#: Its gradients can be written into parts of wider rows.
ROOMS = True
#: States that a tile's registers hold, and those of a step.
MOST_STATES, MOST_STATES_OF_STEP = 128, 4096

_prepare, _sweep, _combine, _outputs, _step = map(
    cuda.Kernel, (kernels.prepare, kernels.sweep, kernels.combine, kernels.outputs, kernels.step)
)
_inputs, _projections, _finish, _add = map(
    cuda.Kernel,
    (backward_kernels.inputs, backward_kernels.projections, backward_kernels.finish, backward_kernels.add),
)
_reduce = cuda.Kernel(shared.reduce)
#: How float32 enters matrix products: three numbers of bfloat16 each, of which the six larger products are summed.
PRECISION = "bf16x6"
#: Heads of a program of `prepare` and `finish`.
HEADS = 32


@dataclass(frozen=True)
class Plan:
    """How work is cut.

    tile: Q, steps of a matrix product.   run: steps of a program of the scan.   channels, states: of a part of a head.
    share: parts of a group whose dB and dC one program sums.   warps, stages: of sweep, outputs, inputs, projections.
    """

    tile: int
    run: int
    channels: int
    states: int
    share: int
    warps: tuple[int, int, int, int]
    stages: tuple[int, int, int, int]


def plan(t: int, h: int, p: int, n: int, half: bool, memory: int) -> Plan:
    """From sizes of a sequence, the operands' dtype and a block's shared memory, so that a sequence has the same bits
    in every batch (timings: benchmarks/NOTES.md)."""
    states = max(16, cuda.power_of_2(n))
    most = 64 if half else 16 if states > 64 else 32
    channels = max(16, min(most, cuda.power_of_2(p)))
    programs = h * cuda.ceil_div(p, channels)
    run = next((r for r, least in ((2048, 512), (1024, 128), (512, 128)) if t * programs >= least * r), 256)
    tile = 64 if half and memory >= 200 * 1024 else 32
    # a share in which 128 programs take a sequence: fewer sums to add, where it is long
    shares = min(cuda.ceil_div(programs, 16), cuda.ceil_div(128 * tile, max(t, 1)))
    share = cuda.ceil_div(programs, max(shares, 1))
    if tile == 64:
        return Plan(tile, run, channels, states, share, (4, 4, 4, 8), (3, 2, 3, 3))
    return Plan(tile, run, channels, states, share, (4, 4, 4, 8) if half else (2, 2, 4, 4), (1, 1, 1, 1))


def halves(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether matrix products take bfloat16: where the data is that, at the sizes of published models.

    Heads of a multiple of 64 channels, 64 or 128 states. Others are rare, padded tiles would gain little, and of those
    of 16 channels ptxas 12.8 makes wrong code (benchmarks/NOTES.md, ssd).
    """
    return x.dtype == B.dtype == C.dtype == torch.bfloat16 and x.shape[-1] % 64 == 0 and B.shape[-1] in (64, 128)


def problem(*args: Any) -> str | None:
    """Why the kernels do not cover (x, dt, A, B, …), or None if they do."""
    if len(args) < 4:
        return None
    n, most = args[3].shape[-1], MOST_STATES if args[0].dim() == 4 else MOST_STATES_OF_STEP
    if n > most:
        return f"its GPU kernels hold up to {most} states, not {n}."
    return "its GPU kernels need heads and channels." if 0 in args[0].shape[-2:] else None


def detail(*args: Any) -> str:
    """Which operands the matrix products of (x, dt, A, B, C, …) get."""
    if len(args) < 5:
        return ""
    if halves(args[0], args[3], args[4]):
        return "matrix products of bfloat16, summed in float32"
    return "matrix products of float32, each number as three of bfloat16"


@functools.cache
def _memory(device: int) -> int:
    """Shared memory that a block may have, in bytes."""
    if device < 0:
        return 227 * 1024
    of: Any = torch.cuda.get_device_properties(device)  # torch's types leave out half of it
    return int(of.shared_memory_per_block_optin)


Steps = tuple[int, int, int]


def _heads(x: Tensor) -> tuple[Tensor, Steps]:
    """A (b, t, h, p) tensor as kernels read it, and its strides of b, t and h; a tile's steps are 32-bit offsets."""
    x = cuda.data(x) if x.stride(1) < 2**24 else x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _gate(x: Tensor | None) -> tuple[Tensor | None, Steps]:
    """As `_heads`, of what there may be."""
    return (None, (0, 0, 0)) if x is None else _heads(x)


def _aligned(x: Tensor) -> Tensor:
    """`x` with every row (b, t, h) at a multiple of 16 bytes, which is what is copied at once; nearly always itself."""
    steps = [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    fine = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps[:-1])
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def rows_of(x: Tensor, half: bool) -> Tensor:
    """A (b, t, h, p) tensor as kernels read it, `half`: copied at once."""
    return _heads(_aligned(x) if half else x)[0]


class Call:
    """The inputs that every kernel of this op reads, where sequences are cut, and each launch."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, options: tuple[bool, float, float], initial_state: Tensor | None,
        segments: Tensor | None, reverse: bool,
    ) -> None:  # fmt: skip
        (self.b, self.t, self.h, self.p), (self.g, self.n) = x.shape, B.shape[2:]
        self.half = halves(x, B, C)
        self.plan = plan(self.t, self.h, self.p, self.n, self.half, _memory(x.get_device()))
        if self.half:
            x, B, C = map(_aligned, (x, B, C))
        (self.x, self.x_at), (self.B, self.w_at), (self.C, C_at) = map(_heads, (x, B, C))
        self.z, self.z_at = _gate(z)
        if self.w_at != C_at:  # kernels step through both at once
            self.B, self.C = self.B.contiguous(), self.C.contiguous()
            self.w_at = _heads(self.B)[1]
        self.dt, self.A = cuda.data(dt), (A.resolve_neg() if A.is_neg() else A).contiguous()
        self.D, self.bias = cuda.plain(D), cuda.plain(dt_bias)
        self.softplus, self.low, self.high = options
        self.initial, self.segments, self.reverse = cuda.plain(initial_state), segments, reverse
        self.tiles = cuda.runs(segments, self.b, self.t, self.plan.tile)
        self.runs = cuda.runs(segments, self.b, self.t, self.plan.run)
        self.sequences = self.b if segments is None else segments.shape[0]
        self.parts = self.h * cuda.ceil_div(self.p, self.plan.channels)
        self.precision = PRECISION
        self.like = self.A

    def works(self) -> bool:
        """Whether there is a sequence and a channel."""
        return bool(self.tiles.count and self.parts)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for numbers of this shape."""
        return cuda.empty(shape, dtype, self.x)

    def sums(self, *shape: int) -> Tensor:
        """Room for numbers of every tile, all of which are added up: those of tiles that do not exist are 0."""
        made = self.empty(self.tiles.count, *shape)
        return made if self.segments is None else made.zero_()

    def clock(self) -> Tensor:
        """Step sizes and exponents of every tile, (tiles, h, 3, Q)."""
        clock = self.empty(self.tiles.count, self.h, 3, self.plan.tile)
        strides = self.dt.stride()[:2]
        arguments = (
            self.dt, self.A, self.bias, self.tiles.table, self.tiles.tiles, clock, self.t, self.tiles.each,
            self.low, self.high, *strides,
        )  # fmt: skip
        constants = (self.h, self.softplus, self.reverse, self.plan.tile, HEADS)
        _prepare((self.tiles.count, cuda.ceil_div(self.h, HEADS), 1), arguments, constants, 4)
        return clock

    def sweep(
        self, clock: Tensor, ends: Tensor, dy: Tensor | None = None, mark: bool = False, gated: bool = False,
        last: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """Write what each run adds to a state into `ends`; `mark`: states before tiles from those before runs.

        With dy, gradients of states, from the end of time; those after tiles. gated: dy has not passed the gate.
        last: whether `combine` will give a result, which what the last run adds is for.
        """
        adjoint = dy is not None
        u, u_at = (self.x, self.x_at) if dy is None else _heads(dy)
        made = None
        if mark:
            made = self.empty(self.tiles.count, self.h, self.p, self.n, dtype=_kind(self.half))
        plan = self.plan
        terms = 2 if self.half and not adjoint and not mark else 1
        w, (z, z_at) = self.C if adjoint else self.B, _gate(self.z if gated else None)
        arguments = (
            u, z, w, clock, self.runs.table, self.runs.tiles, self.tiles.firsts, ends, made, self.t,
            self.runs.each, self.tiles.each, *u_at, *z_at, *self.w_at,
        )  # fmt: skip
        constants = (
            self.h, self.g, self.p, self.n, adjoint, mark, self.reverse, self.half, terms, self.precision, plan.tile,
            plan.run, plan.channels, plan.states, plan.stages[0], last,
        )  # fmt: skip
        _sweep((self.runs.count * self.parts, 1, 1), arguments, constants, plan.warps[0])
        return made

    def combine(
        self, clock: Tensor, ends: Tensor, edge: Tensor | None, result: Tensor | None, decay: Tensor | None,
        adjoint: bool = False,
    ) -> None:  # fmt: skip
        """Turn what runs add into the states before them (`adjoint`: the gradients of those after them)."""
        size, block = self.p * self.n, 1024
        blocks = max(1, cuda.ceil_div(size, block))
        arguments = (
            ends, clock, self.runs.table, self.runs.firsts, self.tiles.firsts, edge, result, decay, self.t,
            self.runs.each, self.tiles.each,
        )  # fmt: skip
        constants = (self.h, size, adjoint, self.plan.tile, self.plan.run, blocks, block)
        _combine((self.sequences * self.h * blocks, 1, 1), arguments, constants, 4)

    def states(self, clock: Tensor, starts: Tensor, state: Tensor | None, decay: Tensor | None) -> None:
        """The state before each run, (runs, h, p, n), the last one and the total decay into what is given."""
        self.sweep(clock, starts, last=state is not None)
        self.combine(clock, starts, self.initial, state, decay)

    def outputs(
        self, clock: Tensor, starts: Tensor, y: Tensor, dy: Tensor | None = None, dz: Tensor | None = None,
        own: Tensor | None = None,
    ) -> None:  # fmt: skip
        """y from the states before runs; with dy, dz and, in y's place, the gradient before the gate.

        own: what a step's input counts with in its own output, if not with its size, as `clock` a tile and head.
        """
        plan, (grad, dy_at) = self.plan, _gate(dy)
        arguments = (
            self.x, self.z, self.B, self.C, self.D, grad, clock, own, self.runs.table, self.runs.tiles,
            self.tiles.firsts, starts, y, dz, self.t, self.runs.each, self.tiles.each, *self.x_at, *self.z_at,
            *self.w_at, *dy_at,
        )  # fmt: skip
        constants = (
            self.h, self.g, self.p, self.n, _wide(self.D), self.reverse, self.half, self.precision, plan.tile, plan.run,
            plan.channels, plan.states, plan.stages[1],
        )  # fmt: skip
        _outputs((self.runs.count * self.parts, 1, 1), arguments, constants, plan.warps[1])


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_low: float, dt_high: float, initial_state: Tensor | None, segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, z (b, t, h, p); dt (b, t, h); A (h); B, C (b, t, g, n) -> y (b, t, h, p), state (n_seq, h, p, n), decay."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_low, dt_high, initial_state, segments, reverse)
    return forward_kept(*inputs)[:3]


@cuda.side_by_side
def forward_kept(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, dt_low: float, dt_high: float, initial_state: Tensor | None, segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `forward`, and last what spares `backward` a sweep: the state before each run, h·p·n·4 bytes each."""
    options = (dt_softplus, dt_low, dt_high)
    call = Call(x, dt, A, B, C, D, z, dt_bias, options, initial_state, segments, reverse)
    y = cuda.tokens(call.x, segments)
    state = call.empty(call.sequences, call.h, call.p, call.n)
    decay, starts = call.empty(call.sequences, call.h), call.empty(*kept_shape(x, B, C, segments))
    if call.works():
        clock = call.clock()
        call.states(clock, starts, state, decay)
        call.outputs(clock, starts, y)
    return y, state, decay, starts


def kept_shape(x: Tensor, B: Tensor, C: Tensor, segments: Tensor | None) -> tuple[int, ...]:
    """Shape of what `forward_kept` keeps for `backward`, float32."""
    (b, t, h, p), n = x.shape, B.shape[3]
    run = plan(t, h, p, n, halves(x, B, C), _memory(x.get_device())).run
    sequences = b if segments is None else segments.shape[0]
    return cuda.run_count(b, t, run, None if segments is None else sequences), h, p, n


def tiles_of(x: Tensor, B: Tensor, C: Tensor, segments: Tensor | None) -> tuple[int, int]:
    """Steps of a tile, and how many tiles there are."""
    (b, t, h, p), n = x.shape, B.shape[3]
    tile = plan(t, h, p, n, halves(x, B, C), _memory(x.get_device())).tile
    return tile, cuda.run_count(b, t, tile, None if segments is None else segments.shape[0])


def _kind(half: bool) -> torch.dtype:
    """What matrix products take."""
    return torch.bfloat16 if half else torch.float32


def _wide(D: Tensor | None) -> bool:
    return D is not None and D.dim() == 2


class _Gradient:
    """What the gradient's kernels write, and their launches."""

    def __init__(self, call: Call, dy: Tensor, dstate: Tensor, ddecay: Tensor, in_room: bool) -> None:
        self.call, self.dy = call, rows_of(dy, call.half)
        self.dstate, self.ddecay = dstate.contiguous(), ddecay.contiguous()
        segments = call.segments
        self.dx = parts.gradients([call.x], segments)[0] if in_room else cuda.tokens(call.x, segments)
        self.ddt = cuda.tokens(call.dt, segments)
        self.dz = None if call.z is None else cuda.tokens(call.z, segments)
        self.dB, self.dC = cuda.tokens(call.B, segments), cuda.tokens(call.C, segments)
        self.dinitial = None if call.initial is None else call.empty(*call.initial.shape)
        make = call.empty if call.works() else call.A.new_zeros
        self.dA, self.dbias = make(call.h), make(call.h)
        self.dD = None if call.D is None else make(*call.D.shape)

    def run(self, starts: Tensor | None) -> None:
        """starts: what `forward_kept` kept, or None."""
        call = self.call
        clock, decay = call.clock(), call.empty(call.sequences, call.h)
        ends = call.empty(call.runs.count, call.h, call.p, call.n)
        if starts is None:
            starts = call.empty(*ends.shape)
            call.states(clock, starts, None, None)
        if call.z is not None:
            gated = cuda.empty(self.dy.shape, torch.float32, self.dy)
            call.outputs(clock, starts, gated, self.dy, self.dz)
            self.dy = gated
        before = call.sweep(clock, starts, mark=True)
        call.sweep(clock, ends, self.dy, last=self.dinitial is not None)
        call.combine(clock, ends, self.dstate, self.dinitial, decay, adjoint=True)
        after = call.sweep(clock, ends, self.dy, mark=True)
        pieces, crossing = self.tiles(clock, before, after)
        self.steps(clock, pieces, crossing, decay)

    def tiles(self, clock: Tensor, before: Tensor | None, after: Tensor | None) -> tuple[Tensor, Tensor]:
        """All gradients but those of dt, A and its bias; what those are summed from."""
        call, plan, size = self.call, self.call.plan, self.dB.numel()
        per_head, count = call.parts // call.h, call.tiles.count
        shares = cuda.ceil_div(cuda.ceil_div(call.h, call.g) * per_head, plan.share)
        pieces, crossing = call.empty(count, 3, call.parts, plan.tile), call.empty(count, 2, call.parts)
        width = call.parts * (plan.channels if _wide(call.D) else 1)
        dD = None if call.D is None else call.sums(width)
        pairs = call.empty(count, call.g, shares, 2, plan.tile, plan.tile, dtype=_kind(call.half))
        dB, dC = self.dB, self.dC
        if shares > 1:
            dB, dC = (call.empty(shares, *self.dB.shape) for _ in "BC")
            if call.segments is not None:
                dB.zero_(), dC.zero_()
        where, strides = (clock, call.tiles.table, call.tiles.tiles), (*self.dy.stride()[:3], *call.x_at, *call.w_at)
        data = (self.dy, call.x, call.B, call.C)
        sizes = (call.h, call.g, call.p, call.n)
        how = (call.reverse, call.half, call.precision, shares, plan.share, plan.tile, plan.channels, plan.states)
        grid = (count * call.g * shares, 1, 1)
        arguments = (*data, call.D, *where, after, self.dx, pairs, pieces, crossing, dD, call.t, call.tiles.each)
        _inputs(
            grid,
            (*arguments, self.dx.stride(1), *strides),
            (*sizes, _wide(call.D), *how, plan.stages[2]),
            plan.warps[2],
        )
        inputs = (*data, *where, before, after, pairs, dB, dC, pieces, crossing, call.t, call.tiles.each, size)
        _projections(grid, (*inputs, *strides), (*sizes, *how, plan.stages[3]), plan.warps[3])
        if size and shares > 1:
            _add((cuda.ceil_div(size, 1024), 1, 1), (dB, dC, self.dB, self.dC, size), (shares, 1024), 4)
        if dD is not None and self.dD is not None:
            total = self.dD if width == self.dD.numel() else call.empty(width)
            _reduce((cuda.ceil_div(width, 32), 1, 1), (dD, total, None, count, width), (1, 1, 32, 32), 4)
            if total is not self.dD:  # channels that do not exist, or several parts of a head
                each = total.view(call.h, -1)
                self.dD.copy_(each[:, : call.p] if _wide(call.D) else each.sum(1))
        return pieces, crossing

    def steps(self, clock: Tensor, pieces: Tensor, crossing: Tensor, decay: Tensor) -> None:
        """Gradients of dt, A and its bias."""
        call, count = self.call, self.call.tiles.count
        sums = call.empty(count, 2, call.h)
        arguments = (
            call.dt, call.A, call.bias, clock, call.tiles.table, call.tiles.tiles, pieces, crossing, self.ddecay, decay,
            self.ddt, sums, call.t, call.tiles.each, call.low, call.high, *call.dt.stride()[:2],
        )  # fmt: skip
        constants = (call.h, call.parts // call.h, call.softplus, call.reverse, call.half, call.plan.tile, HEADS)
        _finish((count, cuda.ceil_div(call.h, HEADS), 1), arguments, constants, 4)
        grid = (cuda.ceil_div(call.h, 32), 2, 1)
        _reduce(grid, (sums, self.dA, self.dbias, count, call.h), (1, 2, 32, 32), 4)


@cuda.side_by_side
def backward(
    dy: Tensor, dstate: Tensor, ddecay: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_low: float, dt_high: float,
    initial_state: Tensor | None, segments: Tensor | None, reverse: bool, kept: Tensor | None = None,
    in_room: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None.

    kept: the last result of `forward_kept` for the same inputs; without it a sweep makes it again.
    in_room: see ops/parts.py.
    """
    options = (dt_softplus, dt_low, dt_high)
    call = Call(x, dt, A, B, C, D, z, dt_bias, options, initial_state, segments, reverse)
    grad = _Gradient(call, dy, dstate, ddecay, in_room)
    if call.works():
        grad.run(kept)
    dbias = None if dt_bias is None else grad.dbias
    return grad.dx, grad.ddt, grad.dA, grad.dB, grad.dC, grad.dD, grad.dz, dbias, grad.dinitial


def step(state: Tensor, *given: Any) -> Tensor:
    """One token, in place. x, z (b, h, p); dt (b, h); B, C (b, g, n); index (b): state rows, negative: skip."""
    return _advance(state, *given, log_A=False)


def step_log_A(state: Tensor, *given: Any) -> Tensor:
    """As `step`, for log(−A) in A's place."""
    return _advance(state, *given, log_A=True)


def _advance(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, dt_low: float, dt_high: float, index: Tensor | None, *, log_A: bool,
) -> Tensor:  # fmt: skip
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    x, dt, B, C, z = cuda.data(x), cuda.data(dt), cuda.data(B), cuda.data(C), None if z is None else cuda.data(z)
    y = cuda.empty(x.shape, x.dtype, x)
    states = max(16, cuda.power_of_2(n))
    channels = max(1, min(cuda.power_of_2(p), 4096 // states))
    if b:
        z_at = (0, 0) if z is None else z.stride()[:2]
        arguments = (
            state, x, dt, z, cuda.plain(A), B, C, cuda.plain(D), cuda.plain(dt_bias), cuda.plain(index), y,
            state.shape[0], dt_low, dt_high, *x.stride()[:2], dt.stride(0), *z_at, *B.stride()[:2], *C.stride()[:2],
        )  # fmt: skip
        constants = (h, g, p, n, _wide(D), dt_softplus, log_A, channels, states)
        _step((b * h * cuda.ceil_div(p, channels), 1, 1), arguments, constants, 4)
    return y
