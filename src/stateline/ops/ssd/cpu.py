"""ssd in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: b batch, t time step, h head, p head width, n state, g group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native

#: As in cpu_backward.cpp: heads whose gradients of B and C are summed by one task.
HEADS_IN_PART = 4
_ABSENT = (0, 0, 0, 0, 0)


def _heads(x: Tensor, tokens: bool) -> tuple[int, int, int, int, int]:
    """Fields of a (b, t, h[, p]) tensor or, without `tokens`, of a single step's (b, h[, p])."""
    stride = x.stride()
    time = (stride[1],) if tokens else (0,)
    return (x.data_ptr(), native.DTYPES[x.dtype], stride[0], *time, stride[2 if tokens else 1])


class _Call:
    """The inputs that every kernel of this op reads, converted and kept alive, and their fields."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, options: tuple[bool, float, float],
    ) -> None:  # fmt: skip
        self.real, self.tokens, self.options = A.dtype, x.dim() == 4, options
        self.x, self.B, self.C = native.data(x), native.data(B), native.data(C)
        self.z = None if z is None else native.data(z)
        self.dt = native.data(dt)
        self.A, self.bias = native.parameter(A, self.real), native.optional_parameter(dt_bias, self.real)
        h, p = x.shape[-2:]
        wide = None if D is None else D if D.dim() == 2 else D[:, None].expand(h, p)
        self.D = native.optional_parameter(wide, self.real)
        b, t = x.shape[0], x.shape[1] if self.tokens else 1
        self.sizes = (b, t, h, p, *B.shape[-2:])

    def fields(
        self, where: tuple[int, int, int, int], initial: int, y: tuple[int, int], state: int, decay: int
    ) -> tuple[int, ...]:
        softplus, low, high = self.options
        z = _ABSENT if self.z is None else _heads(self.z, self.tokens)
        inputs = (f for v in (self.B, self.C) for f in _heads(v, self.tokens))
        return (
            *self.sizes, *where, self.real == torch.float64, softplus, native.double_bits(low),
            native.double_bits(high), *_heads(self.x, self.tokens), *_heads(self.dt, self.tokens), *z, *inputs,
            self.A.data_ptr(), native.pointer(self.D), native.pointer(self.bias), initial, *y, state, decay,
        )  # fmt: skip


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, z (b, t, h, p); dt (b, t, h); A (h); B, C (b, t, g, n) -> y (b, t, h, p), state (n_seq, h, p, n), decay."""
    inputs = _Call(x, dt, A, B, C, D, z, dt_bias, (dt_softplus, dt_low, dt_high))
    segments, where = native.table(segments, x.shape[0], reverse)
    start = native.optional_parameter(initial_state, inputs.real)
    y = native.empty(x.shape, native.out_dtype(x.dtype), segments)
    state = torch.empty((where[1], *x.shape[2:], B.shape[3]), dtype=inputs.real)
    decay = torch.empty((where[1], x.shape[2]), dtype=inputs.real)
    call = inputs.fields(where, native.pointer(start), native.output(y), state.data_ptr(), decay.data_ptr())
    native.call("ssd_forward", call)
    return y if y.dtype == x.dtype else y.to(x.dtype), state, decay


def backward(
    dy: Tensor,
    dstate: Tensor,
    ddecay: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None."""
    inputs = _Call(x, dt, A, B, C, D, z, dt_bias, (dt_softplus, dt_low, dt_high))
    segments, where = native.table(segments, x.shape[0], reverse)
    start, real = native.optional_parameter(initial_state, inputs.real), inputs.real
    dy, dstate, ddecay = native.data(dy), native.parameter(dstate, real), native.parameter(ddecay, real)
    h, p = x.shape[2:]
    g = B.shape[2]
    largest = -(-h // g)  # heads of the largest group
    parts = -(-largest // HEADS_IN_PART)
    even = parts == 1 if h % g else True  # else some group has fewer parts, whose rows nobody writes

    def like(v: Tensor | None) -> Tensor | None:
        return None if v is None else native.empty(v.shape, native.out_dtype(v.dtype), segments)

    def sums(v: Tensor | None, *shape: int) -> Tensor | None:
        return None if v is None else torch.zeros((where[1], *shape), dtype=real)

    dx, ddt, dz = like(x), like(dt), like(z)
    unwritten = segments if even and h >= g else torch.empty(0)
    dB, dC = (native.empty((parts, *B.shape), real, unwritten) for _ in "BC")
    dA, dD, dbias = sums(A, h), sums(D, h, p), sums(dt_bias, h)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=real)
    fields = inputs.fields(where, native.pointer(start), native.ABSENT2, 0, 0)
    results = (f for v in (dx, ddt, dz) for f in native.output(v))
    sums_of = (dB, dC, dA, dD, dbias, dinitial)
    call = (*fields, 0, 0, 0, *_heads(dy, True), dstate.data_ptr(), ddecay.data_ptr(), *results, parts)
    native.call("ssd_backward", (*call, *map(native.pointer, sums_of)))
    if dD is not None and D is not None:
        dD = dD.sum((0, 2)) if D.dim() == 1 else dD.sum(0)
    dB, dC = (v[0] if parts == 1 else v.sum(0) for v in (dB, dC))
    bias = None if dbias is None else dbias.sum(0)
    assert dA is not None
    grads = (dx, ddt, dA.sum(0), dB, dC, dD, dz, bias, dinitial)
    wanted = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(None if v is None or w is None else v.to(w.dtype) for v, w in zip(grads, wanted, strict=True))


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    index: Tensor | None,
) -> Tensor:
    """One token, in place. x, z (b, h, p); dt (b, h); B, C (b, g, n); index (b): state rows, negative: skip."""
    inputs = _Call(x, dt, A, B, C, D, z, dt_bias, (dt_softplus, dt_low, dt_high))
    index = native.slots(index)
    y = native.empty(x.shape, native.out_dtype(x.dtype), index)
    slots = state if state.is_contiguous() and not state.is_neg() else native.parameter(state, inputs.real)
    where = (0, x.shape[0], 0, torch.get_num_threads())
    fields = inputs.fields(where, slots.data_ptr(), native.output(y), 0, 0)
    native.call("ssd_step", (*fields, native.pointer(index), slots.shape[0], slots[:1].numel()))
    if slots is not state:
        state.copy_(slots)
    return y if y.dtype == x.dtype else y.to(x.dtype)
