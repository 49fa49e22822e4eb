"""gated_scan in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: b batch, t time step, n state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops import native
from stateline.ops.gated_scan.reference import step_by

#: As in cpu_gated.h.
_CODES = {"identity": 0, "relu": 1, "tanh": 2, "sigmoid": 3}
#: Numbers by whose multiples matrices' rows are apart: a vector of the widest instruction set.
_LANES = 16


class _Call:
    """The inputs that both kernels read, converted and kept alive, and their fields."""

    def __init__(
        self, v: Tensor, g: Tensor, A: Tensor, activation: str, segments: Tensor | None, reverse: bool
    ) -> None:
        self.real, self.sizes, dense = A.dtype, tuple(v.shape), A.dim() == 2
        if v.dtype != g.dtype:
            v, g = v.to(A.dtype), g.to(A.dtype)
        self.v, self.g = native.data(v), native.data(g)
        n = v.shape[2]
        self.pitch = -(-n // _LANES) * _LANES
        self.A = native.parameter(F.pad(A, (0, self.pitch - n)) if dense else A, self.real)
        self.At = native.parameter(F.pad(A.T, (0, self.pitch - n)), self.real) if dense else None
        self.segments, self.where = native.table(segments, v.shape[0], reverse)
        self.count = self.where[1]
        self.options = (self.real == torch.float64, dense, _CODES[activation])

    def fields(self) -> tuple[int, ...]:
        tokens = (*native.rows(self.v), *native.rows(self.g))
        matrices = (self.A.data_ptr(), native.pointer(self.At), self.pitch)
        return (*self.sizes, *self.where, *self.options, *tokens, *matrices)

    def states(self) -> Tensor:
        return torch.empty((self.count, self.sizes[2]), dtype=self.real)

    def tokens(self) -> Tensor:
        return native.empty(self.sizes, self.real, self.segments)


def forward(
    v: Tensor,
    g: Tensor,
    A: Tensor,
    activation: str,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """v, g (b, t, n), A (n) or (n, n) -> states before each token (b, t, n), last (n_seq, n), both in A's dtype."""
    inputs = _Call(v, g, A, activation, segments, reverse)
    start = native.optional_parameter(initial_state, inputs.real)
    h, state = inputs.tokens(), inputs.states()
    results = (native.pointer(start), h.data_ptr(), state.data_ptr())
    native.call("gated_scan_forward", (*inputs.fields(), *results, *[0] * 6))
    return h, state


def backward(
    dh: Tensor,
    dstate: Tensor,
    h: Tensor,
    v: Tensor,
    g: Tensor,
    A: Tensor,
    activation: str,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, g, A and the initial state; h (b, t, n): the states that `forward` gave."""
    inputs = _Call(v, g, A, activation, segments, reverse)
    h, dh, dstate = (native.parameter(x, inputs.real) for x in (h, dh, dstate))
    dv, dg, dinitial = inputs.tokens(), inputs.tokens(), inputs.states()
    dA = inputs.states() if A.dim() == 1 else None
    results = (dv.data_ptr(), dg.data_ptr(), native.pointer(dA), dinitial.data_ptr())
    given = (0, h.data_ptr(), 0, dh.data_ptr(), dstate.data_ptr())
    native.call("gated_scan_backward", (*inputs.fields(), *given, *results))
    total = dv.flatten(0, 1).T @ h.flatten(0, 1) if dA is None else dA.sum(0)
    return dv.to(v.dtype), dg.to(g.dtype), total, dinitial


def step(state: Tensor, v: Tensor, g: Tensor, A: Tensor, activation: str, index: Tensor | None) -> Tensor:
    """One token, in place. v, g (b, n); index (b) picks rows of state, negative: skip. -> state before it (b, n)."""
    return step_by(forward, state, v, g, A, activation, index)
