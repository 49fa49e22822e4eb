"""trapezoid_ssd, defined.

    θ[t] = θ[t-1] + dt[t] rates[t]      k[t] = turn(B[t] + B_bias, θ[t])      q[t] = turn(C[t] + C_bias, θ[t])
    S[t] = exp(dt[t] A[t]) (S[t-1] + (1 − blend[t]) dt[t] Σ_r v_r[t-1]⊗k_r[t-1]) + blend[t] dt[t] Σ_r v_r[t]⊗k_r[t]
    y_r[t] = S[t] q_r[t] + D v_r[t]     with v_r = mix_r ∘ x, and gated y = Σ_r y_mix_r ∘ y_r ∘ silu(z_mix_r ∘ z)

The integral of the input over a step is taken by a trapezoid whose weight `blend` on the newer end is chosen by the
data; at blend = 1 it is Mamba-2's rule. Turning B and C by θ is a complex state whose phase the data drives. Ranks r
share one state.
Source: "Mamba-3: Improved Sequence Modeling using State Space Principles" (Lahoti et al. 2026).

Suffixes: b batch, t time step, h head, r rank, p head width, n state, g group, s pairs that turn. θ: turns, in [−½, ½].
Gradients are those of this loop, by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.library import autograd_inside
from stateline.ops.segments import pieces
from stateline.ops.selective_scan.reference import group_of_channel

#: θ (b, h, s), S (b, h, p, n), k (b, h, r, n) and x (b, h, p) of the last token.
State = tuple[Tensor, Tensor, Tensor, Tensor]
Scan = Callable[["Piece", State], tuple[Tensor, State]]


@dataclass
class Inputs:
    """The arguments of a call, as the raw operation takes them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    blend: Tensor
    B: Tensor
    C: Tensor
    rates: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    mix: Tensor | None
    D: Tensor | None
    z: Tensor | None
    z_mix: Tensor | None
    y_mix: Tensor | None
    interleaved: bool
    angle: Tensor | None
    ssm: Tensor | None
    k: Tensor | None
    v: Tensor | None
    segments: Tensor | None
    reverse: bool

    def state(self) -> State:
        """A fresh copy of the initial state, zeros if there is none."""
        rows = self.x.shape[0] if self.segments is None else self.segments.shape[0]
        return tuple(  # type: ignore[return-value]  # four of them
            self.A.new_zeros(rows, *shape) if given is None else given.to(self.A.dtype).clone()
            for given, shape in zip((self.angle, self.ssm, self.k, self.v), self.shapes(), strict=True)
        )

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """What the four tensors of a state measure, rows aside."""
        h, p = self.x.shape[-2:]
        r, n = self.B.shape[-3], self.B.shape[-1]
        return (h, 0 if self.rates is None else self.rates.shape[-1]), (h, p, n), (h, r, n), (h, p)


@dataclass
class Piece:
    """A piece of sequence in compute precision, time running forwards."""

    x_bthp: Tensor
    dt_bth: Tensor
    A_bth: Tensor
    blend_bth: Tensor
    K_bthrn: Tensor  # B and C with their biases, not turned yet
    Q_bthrn: Tensor
    turns_bths: Tensor  # what each step adds to θ
    mix_hrp: Tensor
    D_h: Tensor | None
    gate_bthrp: Tensor | None  # y_mix ∘ silu(z_mix ∘ z)
    interleaved: bool

    def values(self, x: Tensor) -> Tensor:
        """v: x (…, h, p) -> (…, h, r, p)."""
        return x[..., None, :] * self.mix_hrp

    def turned(self, rows: Tensor, angle: Tensor) -> Tensor:
        """rows (…, h, r, n) with their pairs turned by angle (…, h, s)."""
        return turn(rows, angle, self.interleaved)

    def weights(self) -> tuple[Tensor, Tensor]:
        """(b, t, h) weights of a step's own input and of the one before it, which decays on the way."""
        newer = self.blend_bth * self.dt_bth
        return newer, (1 - self.blend_bth) * self.dt_bth

    def finished(self, y: Tensor) -> Tensor:
        """y + D·v (b, t, h, r, p) or, with a gate, that gated and summed over ranks, (b, t, h, 1, p)."""
        if self.D_h is not None:
            y = y + self.D_h[:, None, None] * self.values(self.x_bthp)
        return y if self.gate_bthrp is None else (y * self.gate_bthrp).sum(3, keepdim=True)


def turn(rows: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """rows (…, r, n), angle (…, s) in turns: (a, b) -> (a cos − b sin, a sin + b cos) for s pairs of neighbours, or of
    channels n/2 apart."""
    s, half = angle.shape[-1], rows.shape[-1] // 2
    if s == 0:
        return rows
    cos, sin = (f(2 * math.pi * angle)[..., None, :] for f in (torch.cos, torch.sin))
    if interleaved:
        a, b = rows[..., 0 : 2 * s : 2], rows[..., 1 : 2 * s : 2]
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        return torch.cat([pairs, rows[..., 2 * s :]], -1)
    a, b = rows[..., :s], rows[..., half : half + s]
    return torch.cat([a * cos - b * sin, rows[..., s:half], a * sin + b * cos, rows[..., half + s :]], -1)


def whole(angle: Tensor) -> Tensor:
    """The same angle within half a turn of 0; exact."""
    return angle - angle.detach().round()


def outer(v: Tensor, k: Tensor) -> Tensor:
    """Σ_r v⊗k: (b, h, r, p), (b, h, r, n) -> (b, h, p, n)."""
    return v.mT @ k


def scan(piece: Piece, state: State) -> tuple[Tensor, State]:
    """The definition, a step at a time: y (b, t, h, r, p) and the state."""
    angle, S, k, x = state
    newer, older = piece.weights()
    out = []
    for t in range(piece.x_bthp.shape[1]):
        S = S + older[:, t, :, None, None] * outer(piece.values(x), k)
        angle, x = whole(angle + piece.turns_bths[:, t]), piece.x_bthp[:, t]
        k, q = piece.turned(piece.K_bthrn[:, t], angle), piece.turned(piece.Q_bthrn[:, t], angle)
        decay = torch.exp(piece.dt_bth[:, t] * piece.A_bth[:, t])
        S = decay[..., None, None] * S + newer[:, t, :, None, None] * outer(piece.values(x), k)
        out.append(q @ S.mT)
    return piece.finished(torch.stack(out, 1)), (angle, S, k, x)


def prepare(call: Inputs, rows: slice, time: slice) -> Piece:
    """A piece in compute precision."""
    real, h = call.A.dtype, call.x.shape[2]
    head = group_of_channel(h, call.B.shape[3], call.x.device)

    def cut(v: Tensor) -> Tensor:
        v = v[rows, time].to(real)
        return v.flip(1) if call.reverse else v

    def per_head(v: Tensor, bias: Tensor | None) -> Tensor:
        v = cut(v)[:, :, :, head].transpose(2, 3)
        return v if bias is None else v + bias

    x, dt = cut(call.x), cut(call.dt)
    turns = x.new_zeros(*x.shape[:3], 0) if call.rates is None else dt[..., None] * cut(call.rates)[:, :, None]
    mix = x.new_ones(h, call.B.shape[2], x.shape[3]) if call.mix is None else call.mix
    gate = None
    if call.z is not None:
        gate = F.silu(cut(call.z)[..., None, :] * (torch.ones_like(mix) if call.z_mix is None else call.z_mix))
        gate = gate if call.y_mix is None else gate * call.y_mix
    K, Q = per_head(call.B, call.B_bias), per_head(call.C, call.C_bias)
    return Piece(x, dt, cut(call.A), cut(call.blend), K, Q, turns, mix, call.D, gate, call.interleaved)


def run(scan: Scan, call: Inputs) -> tuple[Tensor, State]:
    """y (b, t, h, r, p), r = 1 where it is gated, and the state of all sequences, by a scan of each piece."""
    b, t, h, p = call.x.shape
    y = call.x.new_zeros(b, t, h, call.B.shape[2] if call.z is None else 1, p)
    begin, ends = call.state(), []
    for rows, seq, time in pieces(call.segments, t):
        own: Any = tuple(s[seq] for s in begin)
        if time.stop > time.start:
            out, own = scan(prepare(call, rows, time), own)
            y[rows, time] = (out.flip(1) if call.reverse else out).to(y.dtype)
        ends.append(own)
    if len(ends) == 1:
        return y, ends[0]
    return y, tuple(torch.cat(s) for s in zip(*ends, strict=True)) if ends else begin  # type: ignore[return-value]  # four


def forward_by(scan: Scan, *args: Any) -> tuple[Tensor, ...]:
    """The raw operation's forward pass by a scan."""
    y, state = run(scan, Inputs(*args))
    return (y, *(s.clone(memory_format=torch.contiguous_format) for s in state))  # none of them a view of an input


def backward_by(scan: Scan, grads: tuple[Tensor, ...], *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors among the arguments, None where there was none; the forward pass runs again."""
    with autograd_inside():
        leaves: list[Any] = [
            v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args
        ]
        y, state = run(scan, Inputs(*leaves))
        wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
        pairs = [(o, g) for o, g in zip((y, *state), grads, strict=True) if o.requires_grad]
        outs, given = zip(*pairs, strict=True) if pairs else ((), ())
        found = iter(torch.autograd.grad(outs, wanted, given, allow_unused=True) if pairs else [None] * len(wanted))
    tensors = [*leaves[:14], *leaves[15:19]]
    return tuple(None if v is None else torch.zeros_like(v) if (grad := next(found)) is None else grad for v in tensors)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Arguments: the fields of `Inputs` -> y (b, t, h, r or 1, p), angle, ssm, k, v."""
    return forward_by(scan, *args)


def backward(dy: Tensor, dangle: Tensor, dssm: Tensor, dk: Tensor, dv: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the first fourteen fields of `Inputs` and of the state's four; None where the input was."""
    return backward_by(scan, (dy, dangle, dssm, dk, dv), *args)


def step(angle: Tensor, ssm: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """One token, in place: the fields of `Inputs` up to `interleaved`, those of tokens without t, then index (b), which
    picks state rows, negative: skip. -> y (b, h, r or 1, p)"""
    *given, index = args
    x, B, z = given[0], given[4], given[11]
    keep = slice(None) if index is None else (index >= 0).nonzero()[:, 0]
    rows: Any = slice(None) if index is None else index[keep].long()
    own = [s[rows] for s in (angle, ssm, k, v)]
    tokens = (*range(7), 11)
    one = [v[keep][:, None] if i in tokens and v is not None else v for i, v in enumerate(given)]
    y, *new = forward_by(scan, *one, *own, None, False)
    for whole_state, part in zip((angle, ssm, k, v), new, strict=True):
        whole_state[rows] = part
    out = x.new_zeros(*x.shape[:2], B.shape[1] if z is None else 1, x.shape[2])
    out[keep] = y[:, 0]
    return out
