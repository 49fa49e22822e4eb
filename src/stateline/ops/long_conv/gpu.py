"""long_conv on a GPU: short kernels by the Triton of causal_conv1d, long ones by Fourier transforms (cuFFT)."""

from __future__ import annotations

from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.causal_conv1d import gpu as short
from stateline.ops.long_conv import chunked

DTYPES = cuda.DTYPES
_turn = cuda.Kernel(shared.turn)
#: Taps that a kernel keeps in registers.
LONGEST = 16


def forward(
    u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """u (b, t, i), k (d, l) with d = i, or (l, o, i) -> y (b, t, o), state (n_seq, l-1, i)."""
    if _short(k):
        return short.forward(u, k.flip(1), None, False, initial_state, segments, reverse)
    return chunked.forward(u, k, initial_state, segments, reverse, turn)


def backward(
    dy: Tensor,
    dstate: Tensor,
    u: Tensor,
    k: Tensor,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, k, initial_state; None where the input was None."""
    if _short(k):
        du, dk, _, dinitial = short.backward(dy, dstate, u, k.flip(1), None, False, initial_state, segments, reverse)
        return du, dk.flip(1), dinitial
    return chunked.backward(dy, dstate, u, k, initial_state, segments, reverse, turn)


def step(state: Tensor, u: Tensor, k: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. u (b, i); index (b) picks rows of state, negative: skip."""
    if _short(k):
        return short.step(state, u, k.flip(1), None, False, index)
    return chunked.step(state, u, k, index)


def detail(u: Tensor, k: Tensor | None = None, *_: object) -> str:
    """Which form runs, for `explain`."""
    if k is None:
        return ""
    if _short(k):
        return "direct, in Triton"
    return f"more than {LONGEST} taps: Fourier transforms" if k.dim() == 2 else "matrix taps: products or transforms"


def turn(x: Tensor, y: Tensor, add: bool = False, lead: int | None = None) -> None:
    """`spectrum.turn` in tiles, since PyTorch's copy reads or writes one number a line."""
    b, rows, columns = x.shape
    if y.numel():
        x = cuda.data(x)
        numbers = (rows, columns, y.shape[2], lead or 0, x.stride(0), x.stride(1), y.stride(0), y.stride(1))
        grid = (b * cuda.ceil_div(y.shape[2], 64), cuda.ceil_div(columns, 32), 1)
        _turn(grid, (x, y, *numbers), (add, 64, 32), 4)


def _short(k: Tensor) -> bool:
    return k.dim() == 2 and k.shape[1] <= LONGEST
