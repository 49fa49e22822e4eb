"""linear_scan in C++: the same functions as reference.py, over the kernels of cpu.cpp.

A complex channel reaches them as two numbers side by side. Suffixes: b batch, t time step, d channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.linear_scan.reference import state_dtype


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """a (b, t, d) or (d), b (b, t, d) -> h (b, t, d), state (n_seq, d)."""
    segments, where = native.table(segments, b.shape[0], reverse)
    decays, inputs, start = _decays(a, b), _data(b), _state(initial_state, b)
    h = native.empty(b.shape, _stored(b), segments)
    state = torch.empty((where[1], b.shape[2]), dtype=state_dtype(b))
    native.call(
        "linear_scan_forward",
        (
            *inputs.shape, *where, *_kind(a, b), *_rows(decays), *native.rows(inputs), native.pointer(start),
            *_output(h), state.data_ptr(), 0, 0, *native.ABSENT4, *native.ABSENT4, 0, *native.ABSENT4, 0,
        ),
    )  # fmt: skip
    return h.to(b.dtype), state


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
    segments, where = native.table(segments, b.shape[0], reverse)
    decays, inputs, start = _decays(a, b), _data(b), _state(initial_state, b)
    slopes, past, last = _data(dh), _data(h), _state(dstate, b)
    assert last is not None
    wide = state_dtype(b)
    stored = a.dtype if a.is_complex() else decays.dtype
    da = torch.empty(a.shape, dtype=wide) if a.dim() == 1 else native.empty(a.shape, stored, segments)
    db = native.empty(b.shape, _stored(b), segments)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=wide)
    native.call(
        "linear_scan_backward",
        (
            *inputs.shape, *where, *_kind(a, b), *_rows(decays), *native.rows(inputs), native.pointer(start),
            *native.ABSENT2, 0, 0, 0, *native.rows(slopes), *native.rows(past), last.data_ptr(), *_output(da),
            *_output(db), native.pointer(dinitial),
        ),
    )  # fmt: skip
    return da.to(a.dtype), db.to(b.dtype), dinitial


def step(state: Tensor, a: Tensor, b: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. a (b, d) or (d), b (b, d); index (b) picks rows of state, negative: skip."""
    decays, inputs, index = _decays(a, b), _data(b), native.slots(index)
    h = native.empty(b.shape, _stored(b), index)
    direct = state.dtype == state_dtype(b) and state.is_contiguous() and not (state.is_conj() or state.is_neg())
    slots = state if direct else state.to(state_dtype(b)).resolve_conj().resolve_neg().contiguous()
    rows, width = inputs.shape
    native.call(
        "linear_scan_step",
        (
            rows, 1, width, 0, rows, 0, 1, *_kind(a, b), *_rows(decays), *native.rows(inputs), slots.data_ptr(),
            *_output(h), 0, native.pointer(index), slots.shape[0], *native.ABSENT4, *native.ABSENT4, 0,
            *native.ABSENT4, 0,
        ),
    )  # fmt: skip
    if not direct:
        state.copy_(slots)
    return h.to(b.dtype)


def _real(b: Tensor) -> torch.dtype:
    return torch.float64 if b.dtype in (torch.float64, torch.complex128) else torch.float32


def _kind(a: Tensor, b: Tensor) -> tuple[bool, bool, bool]:
    """Double precision, complex, constant decays."""
    return _real(b) == torch.float64, b.is_complex(), a.dim() == 1


def _numbers(x: Tensor) -> Tensor:
    """Complex numbers as pairs along the last dimension; a view wherever that is adjacent."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def _data(b: Tensor) -> Tensor:
    return native.data(_numbers(b))


def _decays(a: Tensor, b: Tensor) -> Tensor:
    """a as the kernel reads it: constant ones in compute precision, others in that or in bfloat16."""
    real = _real(b)
    if a.dim() == 1 or real == torch.float64:
        return native.data(native.parameter(_numbers(a), real) if a.dim() == 1 else _numbers(a).to(real))
    return native.data(_numbers(a.float() if a.dtype == torch.float64 else a))


def _rows(a: Tensor) -> tuple[int, int, int, int]:
    return (a.data_ptr(), native.DTYPES[a.dtype], 0, 0) if a.dim() == 1 else native.rows(a)


def _state(state: Tensor | None, b: Tensor) -> Tensor | None:
    return None if state is None else native.parameter(_numbers(state), _real(b))


def _stored(b: Tensor) -> torch.dtype:
    """In what results like b are written; not as a view of pairs, which torch.compile could not take in again."""
    return b.dtype if b.is_complex() else native.out_dtype(b.dtype)


def _output(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), native.DTYPES[x.real.dtype if x.is_complex() else x.dtype]
