"""s4_scan in C++, over the kernels of cpu.cpp: chunks of a system whose tables chunked.py makes.

Suffixes: b batch, t time step, h channel, c read-out, q step in a chunk, s real numbers of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.s4_scan.reference import step

__all__ = ["backward", "forward", "step"]

#: Steps of a chunk here: fewer than in PyTorch, since tables should stay in the cache, and short calls make them too.
CHUNK = 16
#: Up to so many steps half as many: what such a call reads of tables from outside the cache takes as long as its work.
SHORT = 512


def forward(
    u: Tensor,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    powers: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u (b, t, h), tables of chunked.Tables, powers (q + 1, h, s), initial (n_seq, h, s) -> y (b, t, c, h), state.

    prepared: what `prepare` made of the tables, for whoever keeps them.
    """
    call = _Call(u, taps, read, write, powers, initial, segments, reverse)
    (b, t, h), c = u.shape, taps.shape[0]
    y = native.empty((b, t, c * h), native.out_dtype(u.dtype), segments)
    state = torch.empty((call.count, h, read.shape[-1]), dtype=taps.dtype)
    fields = (*call.fields, *native.rows(y), state.data_ptr(), *native.ABSENT4, *[0] * 5)
    native.call("s4_scan_forward", (*fields, native.pointer(prepared)))
    return y.view(b, t, c, h).to(u.dtype), state


def backward(
    dy: Tensor, dstate: Tensor, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor,
    initial: Tensor | None, segments: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of u, the four tables and initial (empty if there is none)."""
    call = _Call(u, taps, read, write, powers, initial, segments, reverse)
    given, after = native.data(dy.flatten(2)), native.parameter(dstate, taps.dtype)
    du = native.empty(u.shape, native.out_dtype(u.dtype), segments)
    tables = [torch.empty(x.shape, dtype=taps.dtype) for x in (taps, read, write, powers)]
    dinitial = torch.empty(0 if initial is None else initial.shape, dtype=taps.dtype)
    pointers = [*(x.data_ptr() for x in tables), 0 if initial is None else dinitial.data_ptr()]
    fields = (*call.fields, *native.rows(given), after.data_ptr(), *native.rows(du), *pointers, 0)
    native.call("s4_scan_backward", fields)
    return du.to(u.dtype), *tables, dinitial


def prepare(taps: Tensor, read: Tensor, write: Tensor, powers: Tensor) -> Tensor:
    """The tables as `forward` arranges them for itself, which takes longer than a short call's work."""
    (c, h, q), s = taps.shape, read.shape[-1]
    call = _Call(taps.new_zeros(0, 0, h), taps, read, write, powers, None, None, False)
    padded = (s + 3) // 4 * 4
    each = q * padded * (1 + c) + c * (q + 8) + padded
    prepared = torch.empty(((h + 15) // 16 * 16) * each, dtype=taps.dtype)
    native.call("s4_scan_prepare", (*call.fields, *native.ABSENT4, 0, *native.ABSENT4, *[0] * 5, prepared.data_ptr()))
    return prepared


class _Call:
    """The inputs both kernels read, converted and kept alive, and their fields."""

    def __init__(
        self, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, initial: Tensor | None,
        segments: Tensor | None, reverse: bool,
    ) -> None:  # fmt: skip
        self.u = native.data(u)
        self.tables = [native.parameter(x, taps.dtype) for x in (taps, read, write, powers)]
        self.initial = native.optional_parameter(initial, taps.dtype)
        self.table, where = native.table(segments, u.shape[0], reverse)
        self.count = where[1]
        sizes = (*u.shape, read.shape[-1] // 2, taps.shape[0], taps.shape[-1])
        pointers = (x.data_ptr() for x in self.tables)
        self.fields = (
            *sizes, *where, taps.dtype == torch.float64, *native.rows(self.u), *pointers, native.pointer(self.initial)
        )  # fmt: skip
