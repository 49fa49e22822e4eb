"""gated_scan, defined.

    h[t+1] = f(A h[t] + v[t]) ⊙ g[t]

A (n, n), or (n) for a diagonal one; f one of identity, relu, tanh, sigmoid. What comes out is the state before each
token, h[t], and the one after the last.

Suffixes: b batch, t time step, n state.
The gradient recomputes f from the stored states, from the last step to the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline.ops.segments import pieces


def activate(x: Tensor, activation: str) -> Tensor:
    """f(x)."""
    return x if activation == "identity" else getattr(torch, activation)(x)


def slope(y: Tensor, activation: str) -> Tensor:
    """f'(x) from y = f(x); 0 where a relu is 0."""
    if activation == "relu":
        return (y > 0).to(y.dtype)
    if activation == "tanh":
        return 1 - y * y
    return y * (1 - y) if activation == "sigmoid" else torch.ones_like(y)


def apply(A: Tensor, h: Tensor) -> Tensor:
    """A h for rows h (…, n)."""
    return h * A if A.dim() == 1 else h @ A.T


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
    b, t, n = v.shape
    count = b if segments is None else segments.shape[0]
    states = A.new_zeros(b, t, n)
    last = A.new_zeros(count, n) if initial_state is None else initial_state.clone()
    for rows, seq, time in pieces(segments, t):
        v_btn, g_btn, h_bn, seen = _cut(v, rows, time, reverse, A), _cut(g, rows, time, reverse, A), last[seq], []
        for i in range(v_btn.shape[1]):
            seen.append(h_bn)
            h_bn = activate(apply(A, h_bn) + v_btn[:, i], activation) * g_btn[:, i]
        if seen:
            h_btn = torch.stack(seen, 1)
            states[rows, time] = h_btn.flip(1) if reverse else h_btn
            last[seq] = h_bn
    return states, last


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
    dv, dg = torch.zeros(v.shape, dtype=A.dtype, device=A.device), torch.zeros(v.shape, dtype=A.dtype, device=A.device)
    dA, dinitial = torch.zeros_like(A), dstate.clone()
    for rows, seq, time in pieces(segments, v.shape[1]):
        dh_btn, h_btn, v_btn, g_btn = (_cut(x, rows, time, reverse, A) for x in (dh, h, v, g))
        y = activate(apply(A, h_btn) + v_btn, activation)
        dx, grads, G = g_btn * slope(y, activation), [], dstate[seq]
        for i in reversed(range(v_btn.shape[1])):
            grads.append(G)  # of the state after step i
            G = apply(A.T if A.dim() == 2 else A, G * dx[:, i]) + dh_btn[:, i]
        dinitial[seq] = G
        if grads:
            after = torch.stack(grads[::-1], 1)
            for total, part in ((dv, after * dx), (dg, after * y)):
                total[rows, time] = part.flip(1) if reverse else part
            dA += torch.einsum("btn,btn->n" if A.dim() == 1 else "btn,btm->nm", after * dx, h_btn)
    return dv.to(v.dtype), dg.to(g.dtype), dA, dinitial


def step(state: Tensor, v: Tensor, g: Tensor, A: Tensor, activation: str, index: Tensor | None) -> Tensor:
    """One token, in place. v, g (b, n); index (b) picks rows of state, negative: skip. -> state before it (b, n)."""
    return step_by(forward, state, v, g, A, activation, index)


def step_by(run: Any, state: Tensor, v: Tensor, g: Tensor, A: Tensor, activation: str, index: Tensor | None) -> Tensor:
    """`step` by a `forward` of one token: rows are gathered, continued and put back."""
    if index is None:
        before, after = run(v[:, None], g[:, None], A, activation, state, None, False)
        state.copy_(after)
        return before[:, 0]
    keep = (index >= 0).nonzero()[:, 0]
    rows = index[keep].long()
    before, after = run(v[keep][:, None], g[keep][:, None], A, activation, state[rows], None, False)
    state[rows] = after
    out = A.new_zeros(v.shape)
    out[keep] = before[:, 0]
    return out


def _cut(x: Tensor, rows: slice, time: slice, reverse: bool, A: Tensor) -> Tensor:
    x = x[rows, time].to(A.dtype)
    return x.flip(1) if reverse else x
