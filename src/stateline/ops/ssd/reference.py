"""ssd, defined.

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t]⊗B[t]          y[t] = S[t] C[t]

one decay for the whole (p, n) state of a head (Dao & Gu 2024, "Transformers are SSMs", section 5). dt may first go
through softplus(dt + dt_bias) and limits; y then gets D·x and is gated by silu(z).

Suffixes: b batch, t time step, h head, p head width, n state, g group.  dt: unitless; > 0.
The gradient is written out, from the last step to the first, so that only a chunk's states are held at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.segments import pieces
from stateline.ops.selective_scan.reference import group_of_channel, softplus

#: Steps whose (b, t, h, p, n) states are held at once. Bounds memory; results do not depend on it.
CHUNK = 64

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass
class Piece:
    """A piece of sequence in compute precision, time already running forwards."""

    x_bthp: Tensor
    dt_bth: Tensor
    A_h: Tensor
    B_bthn: Tensor
    C_bthn: Tensor
    gate_bthp: Tensor | None
    slope_bth: Tensor | None  # d dt / d raw dt, None where it is 1

    def chunk(self, start: int, stop: int) -> Piece:
        """Steps start … stop."""
        x, dt, B, C = (v[:, start:stop] for v in (self.x_bthp, self.dt_bth, self.B_bthn, self.C_bthn))
        gate, slope = (None if v is None else v[:, start:stop] for v in (self.gate_bthp, self.slope_bth))
        return Piece(x, dt, self.A_h, B, C, gate, slope)

    def states(self, S_bhpn: Tensor) -> Tensor:
        """All states of the piece, (b, t, h, p, n)."""
        decay_bth = torch.exp(self.dt_bth * self.A_h)
        drive = (self.dt_bth[..., None] * self.x_bthp)[..., None] * self.B_bthn[..., None, :]
        states = []
        for t in range(drive.shape[1]):
            S_bhpn = decay_bth[:, t, :, None, None] * S_bhpn + drive[:, t]
            states.append(S_bhpn)
        return torch.stack(states, 1)


@dataclass
class Sums:
    """Gradients of a call while pieces add to them, in compute precision."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    state: Tensor

    def add(self, piece: Piece, tokens: tuple[Tensor, ...], rows: slice, where: slice, reverse: bool) -> None:
        """Put the gradients (x, dt, B, C, and z if any) of one chunk in their place; those of B, C still per head."""
        dx, ddt, dB, dC, *dz = tokens
        if piece.slope_bth is not None:
            ddt = ddt * piece.slope_bth
        for total, part in ((self.x, dx), (self.dt, ddt), *((self.z, v) for v in dz)):
            assert total is not None
            total[rows, where] = flip(part, reverse)
        for total, part in ((self.B, dB), (self.C, dC)):
            summed = part.new_zeros(*part.shape[:2], *total.shape[2:])
            summed.index_add_(2, group_of_channel(part.shape[2], total.shape[2], part.device), part)
            total[rows, where] = flip(summed, reverse)

    def add_skip(self, D: Tensor | None, dy: Tensor, x: Tensor) -> None:
        """The gradient of D from that of y before the gate."""
        if D is not None and self.D is not None:
            self.D += (dy * x).sum((0, 1) if D.dim() == 2 else (0, 1, 3))

    def results(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, initial_state: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """In the order and the dtypes of the inputs; None where there was none."""

        def like(total: Tensor | None, given: Tensor | None) -> Tensor | None:
            return None if given is None or total is None else total.to(given.dtype)

        pairs = ((self.x, x), (self.dt, dt), (self.A, A), (self.B, B), (self.C, C), (self.D, D), (self.z, z))
        ends = ((self.dt.sum((0, 1)), dt_bias), (self.state, initial_state))
        return tuple(like(total, given) for total, given in (*pairs, *ends))  # type: ignore[return-value]  # nine of them


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
        piece = prepare(x, dt, A, B, C, z, dt_bias, (dt_softplus, dt_low, dt_high), rows, time, reverse)
        S, out = state[seq], []
        for start in range(0, piece.x_bthp.shape[1], CHUNK):
            part = piece.chunk(start, start + CHUNK)
            states = part.states(S)
            S = states[:, -1]
            out.append((states * part.C_bthn[..., None, :]).sum(-1))
        if out:
            y[rows, time] = flip(finish(torch.cat(out, 1), piece, D), reverse).to(y.dtype)
            state[seq], decay[seq] = S, torch.exp(piece.dt_bth.sum(1) * A)
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
        piece = prepare(x, dt, A, B, C, z, dt_bias, (dt_softplus, dt_low, dt_high), rows, time, reverse)
        length, marks, S = piece.x_bthp.shape[1], [], begin[seq]
        for start in range(0, length, CHUNK):
            marks.append((start, S))
            S = piece.chunk(start, start + CHUNK).states(S)[:, -1]
        dy_bthp = flip(dy[rows, time].to(piece.x_bthp.dtype), reverse)
        # What the total decay, exp(A·Σ dt), sends back to dt[t]·A of every step.
        through_decay = ddecay[seq] * torch.exp(piece.dt_bth.sum(1) * A)
        G = sums.state[seq]  # gradient that reaches the state from the future, already multiplied by later decays
        for start, S in reversed(marks):
            part, dy_part = piece.chunk(start, start + CHUNK), dy_bthp[:, start : start + CHUNK]
            states = part.states(S)
            y_part = (states * part.C_bthn[..., None, :]).sum(-1)
            dy_part, dz = through_gate(y_part, part, D, dy_part)
            before = torch.cat([S[:, None], states[:, :-1]], 1)
            tokens, dA, G = _chunk_backward(part, states, before, dy_part, through_decay, G)
            sums.A += dA
            sums.add_skip(D, dy_part, part.x_bthp)
            tokens = (tokens[0] + skip(D, dy_part), *tokens[1:], *(() if dz is None else (dz,)))
            sums.add(part, tokens, rows, span(time, start, start + part.x_bthp.shape[1], reverse), reverse)
        sums.state[seq] = G
    return sums.results(x, dt, A, B, C, D, z, dt_bias, initial_state)


def step(
    state: Tensor,
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
    index: Tensor | None,
) -> Tensor:
    """One token, in place. x, z (b, h, p); dt (b, h); B, C (b, g, n); index (b): state rows, negative: skip."""
    keep = slice(None) if index is None else (index >= 0).nonzero()[:, 0]
    rows: Any = slice(None) if index is None else index[keep].long()
    tokens: list[Any] = [None if v is None else v[keep][:, None] for v in (x, dt, B, C, z)]
    options = (dt_bias, dt_softplus, dt_low, dt_high, state[rows], None, False)
    y, new, _ = forward(tokens[0], tokens[1], A, tokens[2], tokens[3], D, tokens[4], *options)
    state[rows] = new
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    out[keep] = y[:, 0]
    return out


def initial(x: Tensor, A: Tensor, B: Tensor, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A fresh copy of the initial state, zeros if there is none."""
    if initial_state is not None:
        return initial_state.to(A.dtype).clone(memory_format=torch.contiguous_format)
    rows = x.shape[0] if segments is None else segments.shape[0]
    return A.new_zeros(rows, *x.shape[2:], B.shape[3])


def prepare(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None,
    options: tuple[bool, float, float], rows: slice, time: slice, reverse: bool,
) -> Piece:  # fmt: skip
    """A piece in compute precision; options: dt_softplus and the limits of dt."""
    dt_softplus, low, high = options

    def cut(v: Tensor) -> Tensor:
        return flip(v[rows, time].to(A.dtype), reverse)

    head = group_of_channel(A.shape[0], B.shape[2], A.device)
    raw = cut(dt) if dt_bias is None else cut(dt) + dt_bias
    size = softplus(raw) if dt_softplus else raw
    slope = torch.sigmoid(raw) if dt_softplus else None
    if (low, high) != (-float("inf"), float("inf")):
        inside = ((size >= low) & (size <= high)).to(size.dtype)
        slope = inside if slope is None else slope * inside
        size = size.clamp(low, high)
    gate = None if z is None else cut(z)
    return Piece(cut(x), size, A, cut(B)[:, :, head], cut(C)[:, :, head], gate, slope)


def start_sums(
    dstate: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> Sums:
    """Zeros for every gradient, the state's as it comes."""

    def zeros(v: Tensor) -> Tensor:
        return torch.zeros(v.shape, dtype=A.dtype, device=v.device)

    D0, z0 = (None if v is None else zeros(v) for v in (D, z))
    x0, dt0, A0, B0, C0 = map(zeros, (x, dt, A, B, C))
    return Sums(x0, dt0, A0, B0, C0, D0, z0, dstate.to(A.dtype).clone(memory_format=torch.contiguous_format))


def flip(x: Tensor, reverse: bool) -> Tensor:
    """Time backwards."""
    return x.flip(1) if reverse else x


def span(time: slice, start: int, stop: int, reverse: bool) -> slice:
    """Where steps start … stop of a piece lie in memory."""
    return slice(time.stop - stop, time.stop - start) if reverse else slice(time.start + start, time.start + stop)


def skip(D: Tensor | None, x: Tensor) -> Tensor | int:
    """D·x; D a head or a channel."""
    return 0 if D is None else (D if D.dim() == 2 else D[:, None]) * x


def finish(y: Tensor, piece: Piece, D: Tensor | None) -> Tensor:
    """(y + D·x) · silu(z)."""
    y = y + skip(D, piece.x_bthp)
    return y if piece.gate_bthp is None else y * F.silu(piece.gate_bthp)


def through_gate(y: Tensor, piece: Piece, D: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of `finish` before the gate and of the gate, None if there is none."""
    if piece.gate_bthp is None:
        return dy, None
    gate = piece.gate_bthp
    s = torch.sigmoid(gate)
    return dy * gate * s, dy * (y + skip(D, piece.x_bthp)) * s * (1 + gate * (1 - s))


def _chunk_backward(
    x: Piece, states: Tensor, before: Tensor, dy: Tensor, through_decay: Tensor, G: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """((dx, ddt, dB, dC), dA, gradient of the state before) of one chunk; dB, dC still per head."""
    decay = torch.exp(x.dt_bth * x.A_h)
    dC = (states * dy[..., None]).sum(-2)
    reach = dy[..., None] * x.C_bthn[..., None, :]  # becomes d loss / d S[t]
    for t in reversed(range(states.shape[1])):
        reach[:, t] += G
        G = decay[:, t, :, None, None] * reach[:, t]
    dexponent = (reach * before).sum((-1, -2)) * decay + through_decay[:, None]
    drive = (reach * x.B_bthn[..., None, :]).sum(-1)  # d loss / d (dt x)
    dB = (reach * (x.dt_bth[..., None] * x.x_bthp)[..., None]).sum(-2)
    ddt = (drive * x.x_bthp).sum(-1) + dexponent * x.A_h
    return (drive * x.dt_bth[..., None], ddt, dB, dC), (dexponent * x.dt_bth).sum((0, 1)), G
