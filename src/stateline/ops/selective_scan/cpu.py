"""selective_scan in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: b batch, t time step, d channel, n state, g group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


class _Call:
    """The inputs that every kernel of this op reads, converted and kept alive, and their fields."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool,
    ) -> None:  # fmt: skip
        double = u.dtype == torch.float64 or A.dtype in (torch.float64, torch.complex128)
        real = torch.float64 if double else torch.float32
        self.real = real
        self.state_dtype = _COMPLEX[real] if A.dtype.is_complex else real
        self.u, self.dt, self.z = native.data(u), native.data(dt), None if z is None else native.data(z)
        self.A, self.B, self.C = native.parameter(A, self.state_dtype), self._projection(B), self._projection(C)
        self.D, self.bias = native.optional_parameter(D, real), native.optional_parameter(dt_bias, real)
        b, t = u.shape[0], u.shape[1] if u.dim() == 3 else 1
        d, n = A.shape
        groups = next((x.shape[-3 if A.dtype.is_complex else -2] for x in (B, C) if x.dim() > 2), 1)
        self.sizes = (b, t, d, groups, n)
        self.flags = (double, A.dtype.is_complex, dt_softplus, B.dim() == 2, C.dim() == 2)

    def _projection(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return native.parameter(x, self.state_dtype)
        x = native.data(x)
        if self.state_dtype.is_complex and x.stride(-2) != 2:
            x = x.contiguous()
        return x

    def _projection_fields(self, x: Tensor) -> tuple[int, int, int, int, int]:
        if x.dim() == 2:
            return x.data_ptr(), 0, 0, 0, 0
        stride, pair = x.stride(), 1 if self.state_dtype.is_complex else 0
        has_time = x.dim() - pair == 4
        time = stride[1] if has_time else 0
        return x.data_ptr(), native.DTYPES[x.dtype], stride[0], time, stride[2 if has_time else 1]

    def fields(self, where: tuple[int, int, int, int], initial: int, y: tuple[int, int], state: int) -> tuple[int, ...]:
        return (
            *self.sizes, *where, *self.flags,
            *native.rows(self.u), *native.rows(self.dt), *(native.ABSENT4 if self.z is None else native.rows(self.z)),
            *self._projection_fields(self.B), *self._projection_fields(self.C),
            self.A.data_ptr(), native.pointer(self.D), native.pointer(self.bias), initial, *y, state,
        )  # fmt: skip


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
    inputs = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    segments, where = native.table(segments, u.shape[0], reverse)
    start = native.optional_parameter(initial_state, inputs.state_dtype)
    y = native.empty(u.shape, native.out_dtype(u.dtype), segments)
    state = torch.empty((where[1], *A.shape), dtype=inputs.state_dtype)
    call = inputs.fields(where, native.pointer(start), native.output(y), state.data_ptr())
    native.call("selective_scan_forward", (*call, 0, 0, 0))
    return y if y.dtype == u.dtype else y.to(u.dtype), state


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
    inputs = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    segments, where = native.table(segments, u.shape[0], reverse)
    start = native.optional_parameter(initial_state, inputs.state_dtype)
    dy, dstate = native.data(dy), native.parameter(dstate, inputs.state_dtype)

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else native.empty(x.shape, native.out_dtype(x.dtype), segments)

    def sums(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=dtype)

    du, ddt, dz = like(u), like(dt), like(z)
    dB, dC = (sums(x, inputs.state_dtype) if x.dim() == 2 else like(x) for x in (B, C))
    dA, dD, dbias = sums(A, inputs.state_dtype), sums(D, inputs.real), sums(dt_bias, inputs.real)
    dinitial = sums(initial_state, inputs.state_dtype)
    fields = inputs.fields(where, native.pointer(start), native.ABSENT2, 0)
    projections = (
        f for x in (dB, dC) for f in ((x.data_ptr(), native.DTYPES.get(x.dtype, 0)) if x is not None else (0, 0))
    )
    native.call(
        "selective_scan_backward",
        (
            *fields, 0, 0, 0, *native.rows(dy), dstate.data_ptr(), *native.output(du), *native.output(ddt),
            *native.output(dz), *projections, native.pointer(dA), native.pointer(dD), native.pointer(dbias),
            native.pointer(dinitial),
        ),
    )  # fmt: skip
    grads = (du, ddt, dA, dB, dC, dD, dz, dbias, dinitial)
    wanted = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, wanted, strict=True))


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
    """One token, in place. u, dt, z (b, d); B, C (b, g, n[, 2]) or (d, n).

    index (b) picks rows of state, negative: skip.
    """
    inputs = _Call(u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    index = native.slots(index)
    y = native.empty(u.shape, native.out_dtype(u.dtype), index)
    n = A.shape[1]
    direct = state.dtype == inputs.state_dtype and state.stride()[1:] == (n, 1) and not state.is_conj()
    slots = state if direct else native.parameter(state, inputs.state_dtype)
    where = (0, u.shape[0], 0, torch.get_num_threads())
    fields = inputs.fields(where, slots.data_ptr(), native.output(y), 0)
    native.call("selective_scan_step", (*fields, native.pointer(index), slots.shape[0], slots.stride(0)))
    if not direct:
        state.copy_(slots)
    return y if y.dtype == u.dtype else y.to(u.dtype)
