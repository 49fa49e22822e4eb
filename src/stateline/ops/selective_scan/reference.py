"""selective_scan, defined.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]          y[t] = C[t]·h[t]   (complex A: 2 Re C[t]·h[t])

A is discretised by zero-order hold, B by Euler (Gu & Dao 2023, "Mamba", Algorithm 2 and its code); dt may first go
through softplus(dt + dt_bias), y then gets D·u and is gated by silu(z).

Suffixes: b batch, t time step, d channel, n state, g group.  dt: seconds for sampled signals, unitless for tokens; > 0.
The gradient is written out, from the last step to the first, so that the states need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.segments import pieces

#: Steps whose (b, t, d, n) states are held at once. Bounds memory; results do not depend on it.
CHUNK = 128

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass
class _Inputs:
    """A piece of sequence in compute precision, time already running forwards."""

    u_btd: Tensor
    dt_btd: Tensor
    A_dn: Tensor
    B: Tensor  # (b, t, d, n) or (b, t, 1, n) or (d, n), complex where A is
    C: Tensor

    def chunk(self, start: int, stop: int) -> _Inputs:
        def cut(x: Tensor) -> Tensor:
            return x if x.dim() == 2 else x[:, start:stop]

        return _Inputs(cut(self.u_btd), cut(self.dt_btd), self.A_dn, cut(self.B), cut(self.C))

    @property
    def scale(self) -> int:
        """2 for complex systems, whose conjugate half is implied."""
        return 2 if self.A_dn.is_complex() else 1

    def decay_btdn(self) -> Tensor:
        return torch.exp(self.dt_btd[..., None] * self.A_dn)

    def states(self, h_bdn: Tensor) -> tuple[Tensor, Tensor]:
        """All states of the piece and its decays, both (b, t, d, n)."""
        decay = self.decay_btdn()
        states = (self.dt_btd * self.u_btd)[..., None] * self.B
        for t in range(states.shape[1]):
            h_bdn = torch.addcmul(states[:, t], decay[:, t], h_bdn, out=states[:, t])
        return states, decay


def forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """u, dt, z (b, t, d); A (d, n); B, C (b, t, g, n[, 2]) or (d, n) -> y (b, t, d), state (n_seq, d, n)."""
    y = torch.zeros_like(u, memory_format=torch.contiguous_format)
    state = _initial(u, A, initial_state, segments)
    for rows, seq, time in pieces(segments, u.shape[1]):
        x, gate, _ = _prepare(u, dt, A, B, C, z, dt_bias, dt_softplus, rows, time, reverse)
        h, out = state[seq], []
        for start in range(0, x.u_btd.shape[1], CHUNK):
            part = x.chunk(start, start + CHUNK)
            states, _ = part.states(h)
            h = states[:, -1]
            out.append(_read(part, states))
        if not out:
            continue
        y_btd = torch.cat(out, 1)
        if D is not None:
            y_btd = y_btd + D * x.u_btd
        if gate is not None:
            y_btd = y_btd * F.silu(gate)
        y[rows, time] = _flip(y_btd, reverse).to(y.dtype)
        state[seq] = h
    return y, state


def backward(
    dy: Tensor,
    dstate: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> Gradients:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None."""
    real = _real(u, A)
    start_state = _initial(u, A, initial_state, segments)
    dstart = dstate.to(A.dtype).clone(memory_format=torch.contiguous_format)
    grads = {name: torch.zeros(x.shape, dtype=_grad_dtype(x, A), device=x.device) for name, x in
             {"u": u, "dt": dt, "A": A, "B": B, "C": C}.items()}  # fmt: skip
    dD = None if D is None else torch.zeros_like(D, dtype=real)
    dz = None if z is None else torch.zeros(z.shape, dtype=real, device=z.device)
    for rows, seq, time in pieces(segments, u.shape[1]):
        x, gate, slope = _prepare(u, dt, A, B, C, z, dt_bias, dt_softplus, rows, time, reverse)
        length = x.u_btd.shape[1]
        if length == 0:
            continue
        dy_btd = _flip(dy[rows, time].to(real), reverse)
        marks = _states_at_chunks(x, start_state[seq])
        G = dstart[seq]  # gradient that reaches the state from the future, already multiplied by later decays
        for start, h in reversed(marks):
            part = x.chunk(start, start + CHUNK)
            stop = start + part.u_btd.shape[1]
            states, decay = part.states(h)
            dy_part = dy_btd[:, start:stop]
            where = slice(time.start + start, time.start + stop)
            if reverse:
                where = slice(time.stop - stop, time.stop - start)
            if gate is not None and dz is not None:
                dy_part, dz_part = _through_gate(part, states, D, gate[:, start:stop], dy_part)
                dz[rows, where] = _flip(dz_part, reverse)
            du, ddt, dA, dB, dC, G = _chunk_backward(part, states, decay, h, dy_part, G)
            if D is not None and dD is not None:
                du = du + D * dy_part
                dD += (dy_part * part.u_btd).sum((0, 1))
            if slope is not None:
                ddt = ddt * slope[:, start:stop]
            grads["u"][rows, where] = _flip(du, reverse)
            grads["dt"][rows, where] = _flip(ddt, reverse)
            grads["A"] += dA
            _put(grads["B"], dB, rows, where, reverse)
            _put(grads["C"], dC, rows, where, reverse)
        dstart[seq] = G
    return (
        grads["u"].to(u.dtype),
        grads["dt"].to(dt.dtype),
        grads["A"].to(A.dtype),
        grads["B"].to(B.dtype),
        grads["C"].to(C.dtype),
        dD if D is None or dD is None else dD.to(D.dtype),
        dz if z is None or dz is None else dz.to(z.dtype),
        None if dt_bias is None else grads["dt"].sum((0, 1)).to(dt_bias.dtype),
        None if initial_state is None else dstart.to(initial_state.dtype),
    )


def step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    index: Tensor | None,
) -> Tensor:
    """One token, in place. u, dt, z (b, d); B, C (b, g, n[, 2]) or (d, n); index (b): state rows, negative: skip."""

    def with_time(x: Tensor | None, constant_dims: int = 0) -> Tensor | None:
        return x if x is None or x.dim() == constant_dims else x[:, None]

    keep = None if index is None else (index >= 0).nonzero()[:, 0]
    rows = torch.arange(u.shape[0], device=u.device) if index is None or keep is None else index[keep].long()

    def pick(x: Tensor | None, constant_dims: int = 0) -> Tensor | None:
        return x if x is None or keep is None or x.dim() == constant_dims else x[keep]

    args: list[Any] = [with_time(pick(u)), with_time(pick(dt)), A, with_time(pick(B, 2), 2), with_time(pick(C, 2), 2)]
    y, new = forward(*args, D, with_time(pick(z)), dt_bias, dt_softplus, state[rows], None, False)  # type: ignore[call-arg]
    state[rows] = new
    if keep is None:
        return y[:, 0]
    out = torch.zeros_like(u)
    out[keep] = y[:, 0]
    return out


def _real(u: Tensor, A: Tensor) -> torch.dtype:
    """float64 where the data or the system is, else float32."""
    return torch.float64 if torch.float64 in (u.dtype, A.dtype) or A.dtype == torch.complex128 else torch.float32


def _grad_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """Gradients are summed in compute precision, real or complex as their input is."""
    real = _real(x, A)
    return x.dtype if x.is_complex() else real


def _initial(u: Tensor, A: Tensor, initial_state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A fresh copy of the initial state, zeros if there is none."""
    if initial_state is not None:
        return initial_state.to(A.dtype).clone(memory_format=torch.contiguous_format)
    rows = u.shape[0] if segments is None else segments.shape[0]
    return A.new_zeros(rows, *A.shape)


def _prepare(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    rows: slice, time: slice, reverse: bool,
) -> tuple[_Inputs, Tensor | None, Tensor | None]:  # fmt: skip
    """A piece in compute precision: its inputs, its gate, and d dt / d raw dt where softplus was asked for."""
    real = _real(u, A)

    def cut(x: Tensor) -> Tensor:
        return _flip(x[rows, time].to(real), reverse)

    def project(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.to(A.dtype)
        x = cut(x)
        x = torch.complex(x[..., 0], x[..., 1]) if A.is_complex() else x
        g = x.shape[2]
        return x if g == 1 else x[:, :, group_of_channel(A.shape[0], g, x.device)]

    raw = cut(dt) if dt_bias is None else cut(dt) + dt_bias
    slope = torch.sigmoid(raw) if dt_softplus else None
    step_size = softplus(raw) if dt_softplus else raw
    return _Inputs(cut(u), step_size, A, project(B), project(C)), None if z is None else cut(z), slope


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow, and without losing small values to the 1."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def group_of_channel(d: int, g: int, device: torch.device) -> Tensor:
    """Channel i uses group floor(i·g/d)."""
    return torch.arange(d, device=device) * g // d


def _flip(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x


def _read(x: _Inputs, states: Tensor) -> Tensor:
    y = (states * x.C).sum(-1)
    return 2 * y.real if y.is_complex() else y


def _states_at_chunks(x: _Inputs, h: Tensor) -> list[tuple[int, Tensor]]:
    """(first step, state before it) of every chunk."""
    marks = []
    for start in range(0, x.u_btd.shape[1], CHUNK):
        marks.append((start, h))
        h = x.chunk(start, start + CHUNK).states(h)[0][:, -1]
    return marks


def _through_gate(x: _Inputs, states: Tensor, D: Tensor | None, gate: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y = ungated · silu(gate): (d ungated, d gate)."""
    ungated = _read(x, states) if D is None else _read(x, states) + D * x.u_btd
    s = torch.sigmoid(gate)
    return dy * gate * s, dy * ungated * s * (1 + gate * (1 - s))


def _chunk_backward(
    x: _Inputs, states: Tensor, decay: Tensor, h: Tensor, dy: Tensor, G: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(du, ddt, dA, dB, dC, gradient of h) of one chunk; dB, dC still per channel (b, t, d, n)."""
    dC = x.scale * states.conj() * dy[..., None]
    reach = (x.scale * dy[..., None] * x.C.conj()).expand(states.shape).contiguous()  # becomes d loss / d h[t]
    decay_conj = decay.conj().resolve_conj()
    for t in reversed(range(states.shape[1])):
        later = reach[:, t]
        torch.add(later, G, out=later)
        G = decay_conj[:, t] * later
    before = torch.cat([h[:, None], states[:, :-1]], 1)
    dexponent = reach * before.conj() * decay_conj
    drive = (reach * x.B.conj()).sum(-1)
    drive = drive.real if drive.is_complex() else drive
    pull = (dexponent * x.A_dn.conj()).sum(-1)
    pull = pull.real if pull.is_complex() else pull
    dA = (dexponent * x.dt_btd[..., None]).sum((0, 1))
    dB = reach * (x.dt_btd * x.u_btd)[..., None]
    return drive * x.dt_btd, drive * x.u_btd + pull, dA, dB, dC, G


def _put(grad: Tensor, per_channel: Tensor, rows: slice, where: slice, reverse: bool) -> None:
    """Add a (b, t, d, n) gradient to that of a B or C: summed over time if constant, else over a group's channels."""
    if grad.dim() == 2:
        grad += per_channel.sum((0, 1))
        return
    g, d = grad.shape[2], per_channel.shape[2]
    if g == 1:
        summed = per_channel.sum(2, keepdim=True)
    else:
        summed = per_channel.new_zeros(*per_channel.shape[:2], g, per_channel.shape[3])
        summed.index_add_(2, group_of_channel(d, g, grad.device), per_channel)
    grad[rows, where] = _flip(torch.view_as_real(summed) if summed.is_complex() else summed, reverse)
