"""ssd as matrix products, in PyTorch: the fast form where there is no kernel of our own.

A chunk of Q steps is a masked matrix that maps inputs to outputs, (C Bᵀ) ∘ L with L[i, j] = exp of the sum of dt·A from
step j + 1 to i; chunks hand a state on (Dao & Gu 2024, section 6). Arguments and results are those of reference.py, the
definition. Exponents are summed and subtracted in float64: their differences are small, they need not be.

Suffixes: b batch, c chunk, q and k steps of a chunk, h head, p head width, n state. Time runs forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.segments import pieces
from stateline.ops.ssd.reference import (
    Gradients,
    Piece,
    finish,
    flip,
    initial,
    prepare,
    skip,
    start_sums,
    step,
    through_gate,
)

__all__ = ["backward", "forward", "step"]

#: Q. The matrix costs Q·(n + p) multiplications a step, the states n·p·2: equal at common sizes of n and p.
CHUNK = 64


@dataclass
class _Chunks:
    """A piece cut into chunks, the last one filled up with steps that change nothing (dt = 0)."""

    u_bchqp: Tensor  # dt · x
    B_bchqn: Tensor
    C_bchqn: Tensor
    L_bchqk: Tensor  # decay from after step k to after step q, 0 where k comes later
    enter_bchq: Tensor  # decay from the chunk's start to after step q
    leave_bchq: Tensor  # decay from after step q to the chunk's end
    t: int

    @classmethod
    def of(cls, piece: Piece) -> _Chunks:
        t = piece.x_bthp.shape[1]
        exponent = split((piece.dt_bth * piece.A_h)[..., None])[..., 0].double()
        total = exponent.cumsum(-1)
        gap = total[..., :, None] - total[..., None, :]
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=gap.device).triu(1)
        narrow = piece.A_h.dtype
        L, enter = gap.masked_fill(later, -torch.inf).exp().to(narrow), total.exp().to(narrow)
        leave = (total[..., -1:] - total).exp().to(narrow)
        u = piece.dt_bth[..., None] * piece.x_bthp
        return cls(split(u), split(piece.B_bthn), split(piece.C_bthn), L, enter, leave, t)

    def matrix(self) -> Tensor:
        """(b, c, h, q, k): what input k adds to output q."""
        return (self.C_bchqn @ self.B_bchqn.mT) * self.L_bchqk

    def states(self, S_bhpn: Tensor) -> tuple[Tensor, Tensor]:
        """The state before every chunk, (b, c, h, p, n), and the last one."""
        gain = (self.u_bchqp * self.leave_bchq[..., None]).mT @ self.B_bchqn
        before = []
        for c in range(gain.shape[1]):
            before.append(S_bhpn)
            S_bhpn = self.enter_bchq[:, c, :, -1, None, None] * S_bhpn + gain[:, c]
        return torch.stack(before, 1), S_bhpn

    def reach(self, dy_bchqp: Tensor, G_bhpn: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the state after every chunk (what later ones send back), and of the first state."""
        gain = (dy_bchqp * self.enter_bchq[..., None]).mT @ self.C_bchqn
        after = []
        for c in reversed(range(gain.shape[1])):
            after.append(G_bhpn)
            G_bhpn = self.enter_bchq[:, c, :, -1, None, None] * G_bhpn + gain[:, c]
        return torch.stack(after[::-1], 1), G_bhpn


def split(v_bthx: Tensor) -> Tensor:
    """(b, t, h, …) -> (b, c, h, q, …), zeros after the last step."""
    v = F.pad(v_bthx, (0, 0, 0, 0, 0, -v_bthx.shape[1] % CHUNK))
    return v.unflatten(1, (-1, CHUNK)).transpose(2, 3)


def join(v_bchqx: Tensor, t: int) -> Tensor:
    """The inverse of `split`."""
    return v_bchqx.transpose(2, 3).flatten(1, 2)[:, :t]


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
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    state = initial(x, A, B, initial_state, segments)
    decay = A.new_ones(state.shape[:2])
    for rows, seq, time in pieces(segments, x.shape[1]):
        if time.start == time.stop:
            continue
        piece = prepare(x, dt, A, B, C, z, dt_bias, (dt_softplus, dt_low, dt_high), rows, time, reverse)
        chunks = _Chunks.of(piece)
        before, state[seq] = chunks.states(state[seq])
        y[rows, time] = flip(finish(_read(chunks, before), piece, D), reverse).to(y.dtype)
        decay[seq] = torch.exp(piece.dt_bth.sum(1) * A)
    return y, state, decay


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
) -> Gradients:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None."""
    sums = start_sums(dstate, x, dt, A, B, C, D, z)
    begin = initial(x, A, B, initial_state, segments)
    for rows, seq, time in pieces(segments, x.shape[1]):
        if time.start == time.stop:
            continue
        piece = prepare(x, dt, A, B, C, z, dt_bias, (dt_softplus, dt_low, dt_high), rows, time, reverse)
        chunks = _Chunks.of(piece)
        before, _ = chunks.states(begin[seq])
        dy_bthp = flip(dy[rows, time].to(A.dtype), reverse)
        dy_bthp, dz = through_gate(_read(chunks, before), piece, D, dy_bthp)
        (du, dB, dC, dexponent), sums.state[seq] = _gradients(chunks, before, dy_bthp, sums.state[seq])
        dexponent = dexponent + (ddecay[seq] * torch.exp(piece.dt_bth.sum(1) * A))[:, None]
        sums.A += (dexponent * piece.dt_bth).sum((0, 1))
        ddt = (du * piece.x_bthp).sum(-1) + dexponent * A
        dx = du * piece.dt_bth[..., None] + skip(D, dy_bthp)
        sums.add_skip(D, dy_bthp, piece.x_bthp)
        tokens: tuple[Any, ...] = (dx, ddt, dB, dC) if dz is None else (dx, ddt, dB, dC, dz)
        sums.add(piece, tokens, rows, time, reverse)
    return sums.results(x, dt, A, B, C, D, z, dt_bias, initial_state)


def _read(chunks: _Chunks, before: Tensor) -> Tensor:
    """y (b, t, h, p) before D and gate."""
    inside = chunks.matrix() @ chunks.u_bchqp
    return join(inside + chunks.enter_bchq[..., None] * (chunks.C_bchqn @ before.mT), chunks.t)


def _gradients(chunks: _Chunks, before: Tensor, dy_bthp: Tensor, G: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """((du, dB, dC per head, d exponent) (b, t, h, …), gradient of the first state); u is dt·x, the exponent dt·A."""
    dy = split(dy_bthp)
    after, first = chunks.reach(dy, G)
    u, B, C, enter, leave = chunks.u_bchqp, chunks.B_bchqn, chunks.C_bchqn, chunks.enter_bchq, chunks.leave_bchq
    dmatrix = dy @ u.mT
    dproduct = dmatrix * chunks.L_bchqk
    du_out = leave[..., None] * (B @ after.mT)  # through the state at the chunk's end
    dC_in = enter[..., None] * (dy @ before)  # through the state at its start
    du = chunks.matrix().mT @ dy + du_out
    dC = dproduct @ B + dC_in
    dB = dproduct.mT @ C + leave[..., None] * (u @ after)
    # Decay t lies on every path from an input before it to an output at or after it.
    weight = (dmatrix * chunks.matrix()).tril(-1)
    earlier = weight.cumsum(-1) - weight  # [q, t]: inputs before t into output q
    crossing = earlier.tril().sum(-2)
    outputs = (C * dC_in).sum(-1).flip(-1).cumsum(-1).flip(-1)
    inputs = (u * du_out).sum(-1)
    inputs = inputs.cumsum(-1) - inputs
    through = (enter[..., -1] * (before * after).sum((-1, -2)))[..., None]
    dexponent = crossing + outputs + inputs + through
    t = chunks.t
    return (join(du, t), join(dB, t), join(dC, t), join(dexponent[..., None], t)[..., 0]), first
