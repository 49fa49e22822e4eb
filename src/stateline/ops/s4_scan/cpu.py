"""s4_scan in C++, over the kernels of cpu.cpp: chunks of a system whose tables chunked.py makes.

Suffixes: b batch, t time step, h channel, c read-out, q step in a chunk, s real numbers of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native

#: Steps of a chunk here: fewer than in PyTorch, since tables should stay in the cache, and short calls make them too.
CHUNK = 16


def forward(
    u: Tensor,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    powers: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """u (b, t, h), tables of chunked.Tables, powers (q + 1, h, s), initial (n_seq, h, s) -> y (b, t, c, h), state."""
    call = _Call(u, taps, read, write, powers, initial, segments)
    (b, t, h), c = u.shape, taps.shape[0]
    y = native.empty((b, t, c * h), native.out_dtype(u.dtype), segments)
    state = torch.empty((call.count, h, read.shape[-1]), dtype=taps.dtype)
    native.call("s4_scan_forward", (*call.fields, *native.rows(y), state.data_ptr(), *native.ABSENT4, *[0] * 5))
    return y.view(b, t, c, h).to(u.dtype), state


def backward(
    dy: Tensor, dstate: Tensor, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor,
    initial: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, the four tables and initial (empty if there is none)."""
    call = _Call(u, taps, read, write, powers, initial, segments)
    given, after = native.data(dy.flatten(2)), native.parameter(dstate, taps.dtype)
    du = native.empty(u.shape, native.out_dtype(u.dtype), segments)
    tables = [torch.empty(x.shape, dtype=taps.dtype) for x in (taps, read, write, powers)]
    dinitial = torch.empty(0 if initial is None else initial.shape, dtype=taps.dtype)
    pointers = [*(x.data_ptr() for x in tables), 0 if initial is None else dinitial.data_ptr()]
    fields = (*call.fields, *native.rows(given), after.data_ptr(), *native.rows(du), *pointers)
    native.call("s4_scan_backward", fields)
    return du.to(u.dtype), *tables, dinitial


class _Call:
    """The inputs both kernels read, converted and kept alive, and their fields."""

    def __init__(
        self, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, initial: Tensor | None,
        segments: Tensor | None,
    ) -> None:  # fmt: skip
        self.u = native.data(u)
        self.tables = [native.parameter(x, taps.dtype) for x in (taps, read, write, powers)]
        self.initial = native.optional_parameter(initial, taps.dtype)
        self.table, where = native.table(segments, u.shape[0], False)
        self.count = where[1]
        sizes = (*u.shape, read.shape[-1] // 2, taps.shape[0], taps.shape[-1])
        pointers = (x.data_ptr() for x in self.tables)
        self.fields = (
            *sizes, *where, taps.dtype == torch.float64, *native.rows(self.u), *pointers, native.pointer(self.initial)
        )  # fmt: skip
