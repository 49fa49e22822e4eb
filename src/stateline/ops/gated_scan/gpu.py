"""gated_scan on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py.

Suffixes: b batch, t time step, n state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops.gated_scan import gpu_kernels as kernels

#: Of A, in which everything is computed.
DTYPES = frozenset({torch.float32})
#: The largest dense A that a program keeps in its registers.
LARGEST = 128
_CODES = {"identity": 0, "relu": 1, "tanh": 2, "sigmoid": 3}
_forward, _backward, _step = map(cuda.Kernel, (kernels.forward, kernels.backward, kernels.step))
_linear_forward, _linear_backward = map(cuda.Kernel, (kernels.linear_forward, kernels.linear_backward))


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts its work: steps loaded together, numbers of a program, warps."""

    tile: int
    numbers: int
    warps: int


def plan(n: int, dense: bool, linear: bool) -> Plan:
    """From sizes alone, so that a sequence has the same bits in every batch. linear: f is the identity."""
    if not dense:
        return Plan(64, 16, 4) if linear else Plan(8, 32, 1)
    width = max(16, cuda.power_of_2(n))
    return Plan(4, width, 8 if width > 64 else 4)


def problem(v: object = None, g: object = None, A: object = None, *_: object) -> str | None:
    """Why the kernels do not cover such a system, or None."""
    if isinstance(A, Tensor) and A.dim() == 2 and A.shape[0] > LARGEST:
        return f"a dense A has {A.shape[0]} states, its GPU kernels keep up to {LARGEST} in registers."
    return None


def _prepared(v: Tensor, g: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """What kernels read, and the strides of v and g."""
    v, g = cuda.data(v), cuda.data(g)
    return v, g, (A.resolve_neg() if A.is_neg() else A).contiguous(), (*v.stride()[:-1], *g.stride()[:-1])


def _variant(
    one_by_one: cuda.Kernel, scan: cuda.Kernel, A: Tensor, activation: str
) -> tuple[cuda.Kernel, tuple[bool, int] | tuple[()]]:
    """The kernel for a system, and the constants by which it is told of it."""
    if A.dim() == 1 and activation == "identity":
        return scan, ()
    return one_by_one, (A.dim() == 2, _CODES[activation])


def _tokens(shape: tuple[int, ...], A: Tensor, segments: Tensor | None) -> Tensor:
    """Memory for a result, zeros where segments may leave tokens unwritten."""
    out = cuda.empty(shape, A.dtype, A)
    return out if segments is None else out.zero_()


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
    (b, t, n), p = v.shape, plan(v.shape[2], A.dim() == 2, activation == "identity")
    v, g, A, strides = _prepared(v, g, A)
    count, blocks = b if segments is None else segments.shape[0], cuda.ceil_div(n, p.numbers)
    h = _tokens((b, t, n), A, segments)
    state = cuda.empty((count, n), A.dtype, A)
    if count and n:
        tensors = (v, g, A, cuda.plain(initial_state), cuda.plain(segments), h, state)
        kernel, kind = _variant(_forward, _linear_forward, A, activation)
        constants = (*kind, reverse, p.tile, p.numbers)
        kernel((count * blocks, 1, 1), (*tensors, t, blocks, *strides, n), constants, p.warps)
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
    (b, t, n), p = v.shape, plan(v.shape[2], A.dim() == 2, activation == "identity")
    kinds, dense = (v.dtype, g.dtype), A.dim() == 2
    v, g, A, strides = _prepared(v, g, A)
    h = h.contiguous()
    count, blocks = b if segments is None else segments.shape[0], cuda.ceil_div(n, p.numbers)
    dv, dg = (_tokens((b, t, n), A, segments) for _ in "vg")
    dinitial, dA = (cuda.empty((count, n), A.dtype, A) for _ in "hA")
    if count and n:
        tensors = (v, g, A, cuda.plain(dh), cuda.plain(dstate), cuda.plain(segments), h, dv, dg, dA, dinitial)
        kernel, kind = _variant(_backward, _linear_backward, A, activation)
        constants = (*kind, reverse, p.tile, p.numbers)
        kernel((count * blocks, 1, 1), (*tensors, t, blocks, *strides, n), constants, p.warps)
    total = dv.flatten(0, 1).T @ h.flatten(0, 1) if dense else dA.sum(0)
    return dv.to(kinds[0]), dg.to(kinds[1]), total, dinitial


def step(state: Tensor, v: Tensor, g: Tensor, A: Tensor, activation: str, index: Tensor | None) -> Tensor:
    """One token, in place. v, g (b, n); index (b) picks rows of state, negative: skip. -> state before it (b, n)."""
    (b, n), p = v.shape, plan(v.shape[1], A.dim() == 2, False)
    v, g, A, strides = _prepared(v, g, A)
    before, blocks = cuda.empty((b, n), A.dtype, A), cuda.ceil_div(n, p.numbers)
    if b and n:
        numbers = (blocks, state.shape[0], *strides, n)
        constants = (A.dim() == 2, _CODES[activation], p.numbers)
        _step((b * blocks, 1, 1), (v, g, A, cuda.plain(index), state, before, *numbers), constants, p.warps)
    return before
