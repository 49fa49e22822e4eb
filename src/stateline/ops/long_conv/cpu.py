"""long_conv on CPUs: short kernels by the C++ of causal_conv1d, long ones by Fourier transforms."""

from __future__ import annotations

from torch import Tensor

from stateline.ops.causal_conv1d import cpu as short
from stateline.ops.long_conv import chunked, spectrum

#: Taps that a transformed number is worth (benchmarks/NOTES.md): a tap costs 0.06 ns, a number of a transform 12.
WORTH = 200


def forward(
    u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """u (b, t, i), k (d, l) with d = i, or (l, o, i) -> y (b, t, o), state (n_seq, l-1, i)."""
    if _short(u, k):
        return short.forward(u, k.flip(1), None, False, initial_state, segments, reverse)
    return chunked.forward(u, k, initial_state, segments, reverse)


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
    if _short(u, k):
        du, dk, _, dinitial = short.backward(dy, dstate, u, k.flip(1), None, False, initial_state, segments, reverse)
        return du, dk.flip(1), dinitial
    return chunked.backward(dy, dstate, u, k, initial_state, segments, reverse)


def step(state: Tensor, u: Tensor, k: Tensor, index: Tensor | None) -> Tensor:
    """One token, in place. u (b, i); index (b) picks rows of state, negative: skip."""
    if k.dim() == 3:
        return chunked.step(state, u, k, index)
    return short.step(state, u, k.flip(1), None, False, index)


def _short(u: Tensor, k: Tensor) -> bool:
    """Whether every tap of every output is less work than transforms; by sizes alone, never the batch."""
    t = u.shape[1]
    if k.dim() == 3 or t == 0:
        return k.dim() == 2
    s, n = spectrum.plan(t, k.shape[1])
    return t * k.shape[1] <= WORTH * n * -(-t // s)
