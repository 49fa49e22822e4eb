"""trapezoid_ssd in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: b batch, t time step, h head, r rank, p head width, n state, g group, s pairs that turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.trapezoid_ssd.reference import Inputs

#: As in cpu_backward.cpp: heads whose gradients of B, C and rates are summed by one task.
HEADS_IN_PART = 4


def _strided(x: Tensor | None, tokens: bool) -> tuple[int, ...]:
    """Fields of a (b, t, …, width) tensor, its last dimension adjacent, or without `tokens` of a single step's."""
    if x is None:
        return (0,) * 5
    b, *rest = x.stride()[:-1]
    return (
        (x.data_ptr(), native.DTYPES[x.dtype], b, *rest)
        if tokens
        else (x.data_ptr(), native.DTYPES[x.dtype], b, 0, *rest)
    )


class _Call:
    """The inputs that every kernel of this op reads, converted and kept alive, and their fields."""

    def __init__(self, given: Inputs) -> None:
        self.real, self.tokens, self.interleaved = given.A.dtype, given.x.dim() == 4, given.interleaved
        self.data = [None if v is None else native.data(v) for v in (given.x, given.B, given.C, given.z)]
        full = [given.dt, given.A, given.blend, given.rates, given.B_bias, given.C_bias, given.mix, given.D]
        self.full = [native.optional_parameter(v, self.real) for v in (*full, given.z_mix, given.y_mix)]
        self.initial = [native.optional_parameter(v, self.real) for v in (given.angle, given.ssm, given.k, given.v)]
        b, (h, p), (r, g, n) = given.x.shape[0], given.x.shape[-2:], given.B.shape[-3:]
        s = 0 if given.rates is None else given.rates.shape[-1]
        self.sizes = (b, given.x.shape[1] if self.tokens else 1, h, p, g, n, r, s)
        self.outputs = r if given.z is None else 1

    def fields(
        self, where: tuple[int, int, int, int], initial: list[int], y: tuple[int, int], end: list[int]
    ) -> tuple[int, ...]:
        x, B, C, z = (_strided(v, self.tokens) for v in self.data)
        dt, A, blend, *rest, z_mix, y_mix = map(native.pointer, self.full)
        about = (*where, self.real == torch.float64, self.interleaved)
        return (*self.sizes, *about, *x, dt, A, blend, *B, *C, *rest, *z, z_mix, y_mix, *initial, *y, *end)

    def empty_state(self, rows: int) -> list[Tensor]:
        _, _, h, p, _, n, r, s = self.sizes
        return [torch.empty(rows, *shape, dtype=self.real) for shape in ((h, s), (h, p, n), (h, r, n), (h, p))]


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments: the fields of `Inputs` -> y (b, t, h, r or 1, p), angle, ssm, k, v."""
    given = Inputs(*args)
    call = _Call(given)
    segments, where = native.table(given.segments, given.x.shape[0], given.reverse)
    b, t, h, p = call.sizes[:4]
    y = native.empty((b, t, h, call.outputs, p), native.out_dtype(given.x.dtype), segments)
    end = call.empty_state(where[1])
    fields = call.fields(where, _pointers(call.initial), native.output(y), _pointers(end))
    native.call("trapezoid_ssd_forward", (*fields, 0, 0))
    return (y if y.dtype == given.x.dtype else y.to(given.x.dtype), *end)


def backward(dy: Tensor, dangle: Tensor, dssm: Tensor, dk: Tensor, dv: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the first fourteen fields of `Inputs` and of the state's four; None where the input was."""
    given = Inputs(*args)
    call = _Call(given)
    segments, where = native.table(given.segments, given.x.shape[0], given.reverse)
    b, t, h, p, g, n, r, s = call.sizes
    real, rows = call.real, where[1]
    dy = native.data(dy).reshape(b, t, h * call.outputs, p)
    incoming = [native.parameter(v, real) for v in (dangle, dssm, dk, dv)]
    largest = -(-h // g)  # heads of the largest group
    parts = -(-largest // HEADS_IN_PART)
    even = parts == 1 if h % g else True  # else some group has fewer parts, whose rows nobody writes
    unwritten = segments if even and h >= g else torch.empty(0)
    dx, dz = (
        None if v is None else native.empty(v.shape, native.out_dtype(v.dtype), segments) for v in (given.x, given.z)
    )
    per_step = [native.empty((b, t, h), real, segments) for _ in range(3)]
    dB, dC = (native.empty((parts, b, t, r, g, n), real, unwritten) for _ in "BC")
    drates = native.empty((g * parts, b, t, s), real, unwritten)
    sums = [torch.empty(rows, h, *shape, dtype=real) for shape in ((r, n), (r, n), (r, p), (r, p), (r, p), ())]
    start: Any = call.empty_state(rows) if given.ssm is not None else None
    fields = call.fields(where, _pointers(call.initial), native.ABSENT2, [0] * 4)
    to_state = [0] * 4 if start is None else _pointers(start)
    outgoing = (
        *native.output(dx),
        *native.output(dz),
        *_pointers(per_step),
        parts,
        *_pointers([dB, dC, drates, *sums]),
    )
    ends = (*_strided(dy, True), *_pointers(incoming), *to_state, *outgoing)
    native.call("trapezoid_ssd_backward", (*fields, 0, 0, *ends))
    dB_bias, dC_bias, dmix, dz_mix, dy_mix, dD = (v.sum(0) for v in sums)
    tokens = (dx, *per_step, dB.sum(0), dC.sum(0), drates.sum(0))
    grads = (*tokens, dB_bias, dC_bias, dmix, dD, dz, dz_mix, dy_mix, *(start or [None] * 4))
    wanted = (*args[:14], *args[15:19])
    return tuple(None if v is None or w is None else v.to(w.dtype) for v, w in zip(grads, wanted, strict=True))


def step(angle: Tensor, ssm: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """One token, in place; arguments as of reference.step."""
    *rest, index = args
    given = Inputs(*(*rest, angle, ssm, k, v, None, False))
    call = _Call(given)
    index = native.slots(index)
    b, _, h, p = call.sizes[:4]
    y = native.empty((b, h, call.outputs, p), native.out_dtype(given.x.dtype), index)
    where = (0, b, 0, torch.get_num_threads())
    fields = call.fields(where, _pointers(call.initial), native.output(y), [0] * 4)
    native.call("trapezoid_ssd_step", (*fields, native.pointer(index), ssm.shape[0]))
    for own, used in zip((angle, ssm, k, v), call.initial, strict=True):
        if used is not None and used is not own:
            own.copy_(used)
    return y if y.dtype == given.x.dtype else y.to(given.x.dtype)


def _pointers(tensors: Any) -> list[int]:
    return [native.pointer(v) for v in tensors]
