"""trapezoid_ssd on a GPU, of one rank: the same functions as reference.py, over Triton kernels, ssd's among them.

B and C are biased and turned into k and q, a copy a head; on these ssd's kernels run, with steps that gpu_kernels.py
has counted for them. States reach them with pairs as neighbours, and with what the token before the first adds.

Suffixes: b batch, t time step, h head, p head width, n state, g group, s pairs that turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stateline.ops import cuda, parts
from stateline.ops import gpu_kernels as shared
from stateline.ops.ssd import gpu as ssd
from stateline.ops.trapezoid_ssd import gpu_backward_kernels as backward_kernels
from stateline.ops.trapezoid_ssd import gpu_kernels as kernels
from stateline.ops.trapezoid_ssd.gpu_controls import controls, controls_backward
from stateline.ops.trapezoid_ssd.reference import Inputs

__all__ = ["controls", "controls_backward"]

#: Precision of A that the kernels compute in.
DTYPES = frozenset({torch.float32})
#: Its gradients can be written into parts of wider rows.
ROOMS = True

_prepare, _spans, _wind, _follow, _turn, _gather, _step = map(
    cuda.Kernel,
    (kernels.prepare, kernels.spans, kernels.wind, kernels.follow, kernels.turn, kernels.gather, kernels.step),
)
_inputs, _projections = map(cuda.Kernel, (backward_kernels.inputs, backward_kernels.projections))
_unmoved, _finish = map(cuda.Kernel, (backward_kernels.unmoved, backward_kernels.finish))
_unturn = cuda.Kernel(backward_kernels.unturn, registers=128)
_reduce = cuda.Kernel(shared.reduce)
#: Heads of a program of `finish`, and steps of one of `turn` and `unturn`.
SHARE, ROWS = 8, 32
#: Warps of `inputs` and `projections`.
WARPS = (4, 4)
#: Loads of `unturn` and `finish` on their way; warps and loads of `gather`.
STAGES, GATHER = 3, (8, 3)


def problem(*args: Any) -> str | None:
    """Why the kernels do not cover (x, dt, A, blend, B, …, mix) of a scan or a step, or None if they do."""
    if len(args) < 5:
        return None
    x, B, mix = args[0], args[4], args[9] if len(args) > 9 else None
    scan = x.dim() == 4
    ranks = B.shape[-3] if B.dim() == x.dim() + 1 else 1
    if ranks > 1:
        return f"its GPU kernels compute one rank, not {ranks}."
    if mix is not None:
        return "its GPU kernels take no scales of ranks (mix, z_mix, y_mix)."
    most = ssd.MOST_STATES if scan else ssd.MOST_STATES_OF_STEP
    if not 0 < B.shape[-1] <= most:
        return f"its GPU kernels hold 1 to {most} states, not {B.shape[-1]}."
    return "its GPU kernels need heads and channels." if 0 in x.shape[-2:] else None


def detail(*args: Any) -> str:
    """Which operands the matrix products of (x, dt, A, blend, B, C, …) get."""
    if len(args) < 6 or args[0].dim() != 4:
        return ""
    return ssd.detail(args[0], None, None, args[4], args[5])


class _Call(ssd.Call):
    """A call of ssd's kernels whose B and C are k and q, `turned` or still to be, with the launches that turn them."""

    def __init__(self, given: Inputs, turned: tuple[Tensor, ...] = ()) -> None:
        self.given = given
        B, C = given.B[:, :, 0], given.C[:, :, 0]
        shape, kind = (*given.x.shape[:3], B.shape[3]), _kind(given.x, B, C)
        k, q = turned or (cuda.empty(shape, kind, given.x) for _ in "kq")
        self.dt_full, self.A_full, self.blend = (_contiguous(v) for v in (given.dt, given.A, given.blend))
        free = (False, -math.inf, math.inf)
        super().__init__(
            given.x, self.dt_full, self.A_full, k, q, given.D, given.z, None, free, None, given.segments, given.reverse
        )
        self.raw_B, self.raw_C = cuda.data(B), cuda.data(C)
        self.raw_g = B.shape[2]
        self.rates = cuda.plain(given.rates)
        self.pairs = 0 if self.rates is None else self.rates.shape[2]
        self.biases = tuple(cuda.plain(v) for v in (given.B_bias, given.C_bias))
        self.where = (self.tiles.table, self.tiles.tiles)
        self.steps = (*self.raw_B.stride()[:3], *self.raw_C.stride()[:3], *self.x_at)
        self.sizes = (self.h, self.raw_g, self.p, self.n, self.pairs, given.interleaved, given.reverse)
        self.firsts = self._firsts()
        if given.ssm is not None:  # what the token before adds, when the first one comes
            self.older = self._older()
            assert given.k is not None
            assert given.v is not None  # all four, or none
            self.initial = self.paired(given.ssm + (self.older[..., None] * given.v)[..., None] * given.k)

    def paired(self, v: Tensor, back: bool = False) -> Tensor:
        """v (…, n) with the two states of each pair side by side, contiguous; `back`: from there."""
        if self.given.interleaved:
            return v.contiguous()
        half, n = self.n // 2, self.n
        order = torch.arange(2 * half, device=v.device).view(2, half).mT.flatten()
        order = torch.cat([order, torch.arange(2 * half, n, device=v.device)])
        return v[..., order.argsort() if back else order].contiguous()

    def _firsts(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of each packed or padded sequence: its row, its first step, and whether it has one."""
        if self.segments is None:
            return None
        row, start, stop = self.segments.unbind(1)
        first = stop - 1 if self.reverse else start
        return row, first.clamp(0, max(self.t - 1, 0)), stop > start

    def _older(self) -> Tensor:
        """(n_seq, h): what the input of the token before a sequence counts with; 0 where the sequence is empty."""
        if not self.t:
            return self.like.new_zeros(self.sequences, self.h)
        if self.firsts is None:
            at = self.t - 1 if self.reverse else 0
            return (1 - self.blend[:, at]) * self.dt_full[:, at]
        row, first, there = self.firsts
        older = (1 - self.blend[row, first]) * self.dt_full[row, first]
        return torch.where(there[:, None], older, 0.0)

    def clocks(self) -> tuple[Tensor, Tensor]:
        """The clock of every tile, and what a step's input counts with in its own output, (tiles, h, Q)."""
        plan = self.plan
        clock = self.empty(self.tiles.count, self.h, 3, plan.tile)
        own = self.empty(self.tiles.count, self.h, plan.tile)
        arguments = (self.dt_full, self.A_full, self.blend, *self.where, clock, own, self.t, self.tiles.each)
        constants = (self.h, self.reverse, plan.tile, ssd.HEADS)
        _prepare((self.tiles.count, cuda.ceil_div(self.h, ssd.HEADS), 1), arguments, constants, 4)
        return clock, own

    def turn(self, angles: Tensor, state: tuple[Tensor | None, Tensor | None]) -> None:
        """Write k and q, and the last token's k and x into `state`, if given."""
        plan, count = self.plan, self.tiles.count
        rows = min(ROWS, plan.tile)
        arguments = (
            self.raw_B, self.raw_C, *self.biases, self.x, angles, *self.where, self.B, self.C, *state, self.t,
            self.tiles.each, *self.steps,
        )  # fmt: skip
        constants = (*self.sizes, plan.tile, rows, cuda.power_of_2(self.p), plan.states)
        _turn((count * (plan.tile // rows) * self.h, 1, 1), arguments, constants, 4)

    def gather(self, angles: Tensor, state: tuple[Tensor | None, Tensor | None], clock: Tensor, ends: Tensor) -> None:
        """`turn` and `sweep`, which with bfloat16 are one kernel."""
        if not self.half:
            self.turn(angles, state)
            self.sweep(clock, ends)
            return
        plan = self.plan
        arguments = (
            self.raw_B, self.raw_C, *self.biases, self.x, angles, clock, self.runs.table, self.runs.tiles,
            self.tiles.firsts, self.B, self.C, ends, *state, self.t, self.runs.each, self.tiles.each, *self.steps,
        )  # fmt: skip
        constants = (*self.sizes, plan.tile, plan.run, plan.channels, cuda.power_of_2(self.p), plan.states, GATHER[1])
        _gather((self.runs.count * self.parts, 1, 1), arguments, constants, GATHER[0])

    def angles(self, last: Tensor, angles: Tensor) -> None:
        """Write `angles` of all steps, (tiles, h, Q, s), and the last one of each sequence, into `last`."""
        if not self.pairs:
            return
        tile, count, size = self.plan.tile, self.tiles.count, self.h * self.pairs
        before = self.empty(count, self.h, self.pairs, dtype=torch.float64)
        wide = cuda.power_of_2(self.pairs)
        some = max(1, min(4, 128 // wide))
        steps, about = (self.dt_full, self.rates), (self.t, self.tiles.each)
        constants = (self.h, self.pairs, self.reverse, tile, wide)
        grid = (count, cuda.ceil_div(self.h, some), 1)
        _spans(grid, (*steps, *self.where, before, *about), (*constants, some), 4)
        first = cuda.plain(self.given.angle)
        arguments = (before, first, last, self.tiles.table, self.tiles.firsts, *about, size)
        _wind((self.sequences, cuda.ceil_div(size, 32), 1), arguments, (tile, 32, 32), 4)
        _follow((count * self.h, 1, 1), (*steps, before, *self.where, angles, *about), constants, 4)


def _contiguous(v: Tensor) -> Tensor:
    plain = cuda.plain(v)
    assert plain is not None
    return plain


def _passed_on(given: Inputs, wanted: tuple[Tensor | None, ...], call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of `wanted` (angle, k, x of every sequence), zeros where there is none: what an empty sequence returns."""
    shapes = ((call.h, call.pairs), (call.h, 1, call.n), (call.h, call.p))
    if call.segments is None and call.t and call.works():  # all of it will be written
        return tuple(call.empty(call.sequences, *shape) for shape in shapes)  # type: ignore[return-value]  # three of them
    return tuple(  # type: ignore[return-value]  # three of them
        call.like.new_zeros(call.sequences, *shape) if v is None else v.clone(memory_format=torch.contiguous_format)
        for v, shape in zip(wanted, shapes, strict=True)
    )


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments: the fields of `Inputs` -> y (b, t, h, 1, p), angle, ssm, k, v."""
    return forward_kept(*args)[:5]


@cuda.side_by_side
def forward_kept(*args: Any) -> tuple[Tensor, ...]:
    """As `forward`, and last what spares `backward` a sweep and turning: states before runs, angles, k and q."""
    given = Inputs(*args)
    call = _Call(given)
    y = cuda.tokens(call.x, call.segments)
    angle, k, v = _passed_on(given, (given.angle, None if given.k is None else call.paired(given.k), given.v), call)
    state = call.empty(call.sequences, call.h, call.p, call.n)
    starts, angles = (call.empty(*shape) for shape, _ in kept_shapes(given)[:2])
    if call.works():
        clock, own = call.clocks()
        call.angles(angle, angles)
        call.gather(angles, (k, v), clock, starts)
        call.combine(clock, starts, call.initial, state, None)
        call.outputs(clock, starts, y, own=own)
    last = (angle, call.paired(state, back=True), call.paired(k, back=True), v)
    return y.unsqueeze(3), *last, starts, angles, call.B, call.C


def kept_shapes(given: Inputs) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what `forward_kept` keeps for `backward`."""
    x, B, C = given.x, given.B[:, :, 0], given.C[:, :, 0]
    starts = ssd.kept_shape(x, B, C, given.segments)
    tile, count = ssd.tiles_of(x, B, C, given.segments)
    angles = (count, x.shape[2], tile, 0 if given.rates is None else given.rates.shape[2])
    turned = ((*x.shape[:3], B.shape[3]), _kind(x, B, C))
    return (starts, torch.float32), (angles, torch.float32), turned, turned


def _kind(x: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """Of k and q."""
    return torch.bfloat16 if ssd.halves(x, B, C) else torch.float32


class _Gradient:
    """What the gradient's kernels write, and their launches."""

    def __init__(self, call: _Call, ends: tuple[Tensor, ...], in_room: bool) -> None:
        dy, dangle, dssm, dk, dv = ends
        self.call, given, segments = call, call.given, call.segments
        dy = dy[:, :, :, 0]
        self.dy = ssd.rows_of(dy, call.half)
        self.dangle, self.dv, self.dk = dangle.contiguous(), dv.contiguous(), call.paired(dk)
        self.dssm = call.paired(dssm)
        read = [v for v in (call.x, call.z) if v is not None]
        made = parts.gradients(read, segments) if in_room else [cuda.tokens(v, segments) for v in read]
        self.dx, self.dz = made[0], None if call.z is None else made[1]
        self.ddt, self.dA, self.dblend = (cuda.tokens(call.dt_full, segments) for _ in range(3))
        self.dB, self.dC = (cuda.tokens(v, segments) for v in (call.raw_B, call.raw_C))
        self.drates = None if call.rates is None else cuda.tokens(call.rates, segments)
        self.dD: Tensor | None = None
        self.dbiases: tuple[Tensor | None, ...] = (None, None)
        self.start: Tensor | None = None if given.angle is None else dangle.clone(memory_format=torch.contiguous_format)
        self.dinitial = None if call.initial is None else call.empty(*call.initial.shape)

    def run(self, kept: tuple[Tensor, ...] | None) -> None:
        """kept: states before runs, angles, k, q, the last state and k, as the forward pass found them, or None."""
        call = self.call
        clock, own = call.clocks()
        if kept is None:
            starts, angles = (call.empty(*shape) for shape, _ in kept_shapes(call.given)[:2])
            last, last_k, last_x = (call.empty(*v.shape) for v in (self.dssm, self.dk, self.dv))
            call.angles(call.empty(*self.dangle.shape), angles)
            call.gather(angles, (last_k, last_x), clock, starts)
            call.combine(clock, starts, call.initial, last, None)
        else:
            starts, angles, last, last_k = *kept[:2], *map(call.paired, kept[4:])
        before = call.sweep(clock, starts, mark=True)
        self._unmoved(last, last_k)
        ends = call.empty(*starts.shape)
        gated = call.z is not None
        call.sweep(clock, ends, self.dy, gated=gated, last=self.dinitial is not None)
        call.combine(clock, ends, self.dssm, self.dinitial, None, adjoint=True)
        after = call.sweep(clock, ends, self.dy, mark=True, gated=gated)
        edge = None
        if self.dinitial is not None:
            edge = self._through_edge()
        pieces, dk, dq = self._tiles(clock, own, before, after)
        self._unturn(angles, dk, dq)
        self._finish(pieces, edge)

    def _unmoved(self, last: Tensor, k: Tensor) -> None:
        """Take off what the last state would give to turns, which it takes no part in."""
        call = self.call
        if call.pairs:
            everything = call.empty(*self.dangle.shape)
            constants = (call.p, call.n, call.pairs, call.plan.channels, call.plan.states)
            arguments = (last, self.dssm, k, self.dk, self.dangle, everything)
            _unmoved((call.sequences * call.h, 1, 1), arguments, constants, 4)
            self.dangle = everything

    def _through_edge(self) -> Tensor:
        """Gradients of the state, and of k, x and the weight of the token before each sequence, (n_seq, h)."""
        call, given = self.call, self.call.given
        assert self.dinitial is not None
        assert given.k is not None
        assert given.v is not None
        self.dinitial = call.paired(self.dinitial, back=True)
        read = (self.dinitial @ given.k.mT)[..., 0]  # (n_seq, h, p)
        self.dlast_x = call.older[..., None] * read
        self.dlast_k = call.older[..., None, None] * (given.v[..., None, :] @ self.dinitial)
        return (read * given.v).sum(-1).contiguous()

    def _tiles(
        self, clock: Tensor, own: Tensor, before: Tensor | None, after: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """dx, dz and dD; what dt, A, blend and rates are found from, and the gradients of k and q."""
        call, plan, count = self.call, self.call.plan, self.call.tiles.count
        dk, dq = (call.empty(*call.B.shape, dtype=call.B.dtype) for _ in "kq")
        turns, carries = call.empty(count, call.h, plan.tile, call.pairs), call.empty(count, call.h, call.pairs)
        slopes, crossing = call.empty(count, call.h, 3, plan.tile), call.empty(count, call.h)
        dD = None if call.D is None else call.sums(call.h)
        products = call.empty(count, call.h, plan.tile, plan.tile, dtype=call.B.dtype)
        data, where = (self.dy, call.x, call.z, call.B, call.C), (*call.where, before, after)
        strides = (*self.dy.stride()[:3], *call.x_at, *call.z_at)
        out_at = (self.dx.stride(1), 0 if self.dz is None else self.dz.stride(1))
        how = (call.reverse, call.half, call.precision, plan.tile, plan.channels, plan.states)
        grid, sizes = (count * call.h, 1, 1), (call.h, call.p, call.n)
        arguments = (*data, call.D, clock, own, *where, self.dv, self.dx, self.dz, products, slopes, dD, call.t)
        _inputs(grid, (*arguments, call.tiles.each, *out_at, *strides), (*sizes, *how), WARPS[0])
        more = (*data, clock, *where, self.dk, products, dk, dq, turns, carries, crossing, call.t)
        _projections(grid, (*more, call.tiles.each, *strides), (*sizes, call.pairs, *how), WARPS[1])
        if dD is not None:
            total = call.empty(call.h, 1)
            _reduce((cuda.ceil_div(call.h, 32), 1, 1), (dD, total, None, count, call.h), (1, 1, 32, 32), 4)
            self.dD = total.view(call.h)
        return (slopes, crossing, turns, carries), dk, dq

    def _unturn(self, angles: Tensor, dk: Tensor, dq: Tensor) -> None:
        """dB, dC and the gradients of their biases."""
        call, tile, count = self.call, self.call.plan.tile, self.call.tiles.count
        rows = min(ROWS, tile)
        biased = any(v is not None for v in call.biases)
        size = call.h * call.n
        partial = call.sums(tile // rows, 2, size) if biased else None
        arguments = (dk, dq, angles, *call.where, self.dB, self.dC, partial, call.t, call.tiles.each)
        constants = (
            call.h, call.raw_g, call.n, call.pairs, call.given.interleaved, call.reverse, tile, rows, call.plan.states,
            STAGES,
        )  # fmt: skip
        _unturn((count * (tile // rows) * call.raw_g, 1, 1), arguments, constants, 4)
        if partial is not None:
            dB, dC = call.empty(size, 1), call.empty(size)
            given = (partial, dB, dC, count * (tile // rows), size)
            _reduce((cuda.ceil_div(size, 32), 2, 1), given, (1, 2, 32, 32), 4)
            self.dbiases = tuple(
                None if v is None else d.view(v.shape) for v, d in zip(call.biases, (dB, dC), strict=True)
            )

    def _finish(self, pieces: tuple[Tensor, ...], edge: Tensor | None) -> None:
        """Gradients of dt, A, blend, rates and the first angle."""
        call, count = self.call, self.call.tiles.count
        shares, wide = cuda.ceil_div(call.h, SHARE), max(1, cuda.power_of_2(call.pairs))
        drates, size = None, 0
        if self.drates is not None:
            drates, size = call.empty(shares, *self.drates.shape), self.drates.numel()
            drates = drates if call.segments is None else drates.zero_()
        arguments = (
            call.dt_full, call.A_full, call.blend, call.rates, *pieces, self.dangle, edge, *call.where,
            self.ddt, self.dA, self.dblend, drates, self.start, call.t, call.tiles.each, size,
        )  # fmt: skip
        constants = (call.h, call.pairs, call.reverse, shares, SHARE, call.plan.tile, wide, STAGES)
        _finish((count * shares, 1, 1), arguments, constants, 4)
        if drates is not None:
            self.drates = drates.sum(0)


@cuda.side_by_side
def backward(
    dy: Tensor, dangle: Tensor, dssm: Tensor, dk: Tensor, dv: Tensor, *args: Any,
    kept: tuple[Tensor, ...] | None = None, in_room: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of the first fourteen fields of `Inputs` and of the state's four; None where the input was.

    kept: what `forward_kept` kept, and the ssm and k that it returned, for the same inputs.
    in_room: see ops/parts.py.
    """
    given = Inputs(*args)
    call = _Call(given, () if kept is None else kept[2:4])
    grad = _Gradient(call, (dy, dangle, dssm, dk, dv), in_room)
    first: tuple[Tensor | None, ...] = (None,) * 4
    if call.works():
        grad.run(kept)
        if grad.dinitial is not None:
            first = (grad.start, grad.dinitial, *_of_empty(call, dk, dv, grad))
    else:
        grad.dD = None if call.D is None else torch.zeros_like(call.D)
        grad.dbiases = tuple(None if v is None else torch.zeros_like(v) for v in call.biases)
        if given.ssm is not None:
            first = (dangle, dssm, dk, dv)
    tokens = (grad.dx, grad.ddt, grad.dA, grad.dblend, grad.dB.unsqueeze(2), grad.dC.unsqueeze(2), grad.drates)
    return (*tokens, *grad.dbiases, None, grad.dD, grad.dz, None, None, *first)


def _of_empty(call: _Call, dk: Tensor, dv: Tensor, grad: _Gradient) -> tuple[Tensor, Tensor]:
    """Gradients of the k and x before each sequence: those of an empty one reach it unchanged."""
    if call.firsts is None:
        return (grad.dlast_k, grad.dlast_x) if call.t else (dk, dv)
    there = call.firsts[2]
    first_k = torch.where(there[:, None, None, None], grad.dlast_k, dk)
    return first_k, torch.where(there[:, None, None], grad.dlast_x, dv)


def step(angle: Tensor, ssm: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """One token, in place; arguments as of reference.step."""
    x, dt, A, blend, B, C, rates, B_bias, C_bias, _, D, z, _, _, interleaved, index = args
    B, C = cuda.data(B[:, 0]), cuda.data(C[:, 0])
    x, dt, A, blend = map(cuda.data, (x, dt, A, blend))
    z, rates = (None if v is None else cuda.data(v) for v in (z, rates))
    (b, h, p), (g, n) = x.shape, B.shape[1:]
    y = cuda.empty(x.shape, x.dtype, x)
    if b:
        states = max(16, cuda.power_of_2(n))
        channels = max(1, min(cuda.power_of_2(p), 4096 // states))
        pairs, rates_b = (0, 0) if rates is None else (rates.shape[1], rates.stride(0))
        z_at = (0, 0) if z is None else z.stride()[:2]
        arguments = (
            angle, ssm, k, v, x, dt, A, blend, B, C, rates, cuda.plain(B_bias), cuda.plain(C_bias), cuda.plain(D), z,
            cuda.plain(index), y, ssm.shape[0], *x.stride()[:2], dt.stride(0), A.stride(0), blend.stride(0),
            *B.stride()[:2], *C.stride()[:2], rates_b, *z_at,
        )  # fmt: skip
        _step((b * h, 1, 1), arguments, (h, g, p, n, pairs, interleaved, channels, states), 4)
    return y.unsqueeze(2)
