"""Runs a linear time-invariant system over sequences, a chunk of steps at a time, as matrix products.

    x[t] = Ā x[t−1] + B̄ u[t],   y[t] = C x[t],   the same for every t, a system a channel

Within a chunk of q steps the outputs are a triangular Toeplitz matrix of the system's first q taps times the inputs,
plus what the state before the chunk adds; from chunk to chunk goes the state alone. Nothing of size (state × time)
exists: memory grows with the sequence as its inputs do, and a state may come in and go out anywhere.
Suffixes: b batch, t time step, h channel, c read-outs a channel, m chunk, q step in a chunk, s real numbers of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Advance(Protocol):
    """The state some steps later, without any input."""

    def chunk(self, state: Tensor) -> Tensor:
        """state (h, b, s) -> (h, b, s), q steps later."""

    def steps(self, state: Tensor, count: Tensor | int) -> Tensor:
        """state (h, b, s) -> (h, b, s), `count` steps later, from 0 to q, a number or one a row (b)."""


@dataclass(frozen=True)
class Diagonal:
    """powers: (q + 1, h, n) complex, the diagonal of Ā^0 … Ā^q; a state is n complex numbers as real pairs."""

    powers: Tensor

    def chunk(self, state: Tensor) -> Tensor:
        """state (h, b, s) -> (h, b, s), q steps later."""
        return self.steps(state, self.powers.shape[0] - 1)

    def steps(self, state: Tensor, count: Tensor | int) -> Tensor:
        """state (h, b, s) -> (h, b, s), `count` steps later."""
        power = self.powers[count, :, None] if isinstance(count, int) else self.powers[count].transpose(0, 1)
        return as_real(as_complex(state) * power)


@dataclass(frozen=True)
class Dense:
    """powers: log2(q) + 1 real matrices (h, s, s), Ā^1, Ā^2, Ā^4 … Ā^q, that multiply a state from the left."""

    powers: tuple[Tensor, ...]

    def chunk(self, state: Tensor) -> Tensor:
        """state (h, b, s) -> (h, b, s), q steps later."""
        return state @ self.powers[-1].mT

    def steps(self, state: Tensor, count: Tensor | int) -> Tensor:
        """state (h, b, s) -> (h, b, s), `count` steps later."""
        for i, power in enumerate(self.powers):
            if isinstance(count, int):
                state = state @ power.mT if count >> i & 1 else state
            else:
                state = torch.where((count >> i & 1).bool()[:, None], state @ power.mT, state)
        return state


@dataclass(frozen=True)
class Tables:
    """A system, ready to run in chunks of q steps.

    taps: (c, h, q) y after an impulse, step by step.   read: (c, h, q, s) from a state to the q outputs after it.
    write: (h, q, s) what each of q inputs adds to the state after the last of them.   advance: Ā^q and its likes.
    """

    taps: Tensor
    read: Tensor
    write: Tensor
    advance: Advance

    @property
    def q(self) -> int:
        """Steps of a chunk."""
        return self.taps.shape[-1]

    def toeplitz(self) -> Tensor:
        """(h, q in, c · q out): outputs of a chunk from its inputs."""
        c, h, q = self.taps.shape
        since = torch.arange(q, device=self.taps.device)
        since = since - since[:, None]  # (in, out)
        full = self.taps[:, :, since.clamp(min=0)].masked_fill(since < 0, 0)  # (c, h, in, out)
        return full.permute(1, 2, 0, 3).reshape(h, q, c * q)

    def reader(self) -> Tensor:
        """(h, s, c · q out): outputs of a chunk from the state before it."""
        c, h, q, s = self.read.shape
        return self.read.permute(1, 3, 0, 2).reshape(h, s, c * q)


def as_complex(state: Tensor) -> Tensor:
    """(…, 2n) real pairs as (…, n) complex."""
    return torch.view_as_complex(state.unflatten(-1, (-1, 2)))


def as_real(state: Tensor) -> Tensor:
    """(…, n) complex as (…, 2n) real pairs."""
    return torch.view_as_real(state).flatten(-2)


def run(
    tables: Tables, u: Tensor, initial: Tensor | None, segments: Tensor | None, *, padded: bool, free: bool = False
) -> tuple[Tensor, Tensor]:
    """u (b, t, h) -> y (b, t, c, h), state (n_seq, h, s).

    initial: (n_seq, h, s) or None for zeros.   segments: (n_seq, 3) rows [batch row, start, stop] or None.
    padded: the segments are one a batch row, each from its first token on; otherwise they lie one after another in the
        only batch row. Inputs outside segments must be 0.
    free: y is what the initial state alone brings; the state that comes back knows the inputs all the same.
    """
    rows = u.shape[0] if segments is None else segments.shape[0]
    s = tables.read.shape[-1]
    start = u.new_zeros(u.shape[2], rows, s) if initial is None else initial.transpose(0, 1)
    if u.shape[1] == 0:
        return u.new_zeros(u.shape[0], 0, tables.taps.shape[0], u.shape[2]), start.transpose(0, 1).contiguous()
    if segments is None or padded:
        return _rows(tables, u, start, None if segments is None else segments[:, 2], free)
    return _packed(tables, u, start, segments, free)


def _rows(tables: Tables, u: Tensor, start: Tensor, lengths: Tensor | None, free: bool) -> tuple[Tensor, Tensor]:
    """Every batch row is one sequence from its first token on; start (h, b, s)."""
    b, t, h = u.shape
    q = tables.q
    m = -(-t // q)
    inputs = F.pad(u, (0, 0, 0, m * q - t)).view(b, m, q, h).permute(3, 0, 1, 2).contiguous()  # (h, b, m, q)
    most, final = inputs.split((m - 1, 1), 2)  # views taken at once: the gradient of each alone would fill a whole
    written = (most.reshape(h, b * (m - 1), q) @ tables.write).unflatten(1, (b, m - 1))
    state, before, alone, unforced = start, [start], start, [start]
    for added in written.unbind(2):
        state = tables.advance.chunk(state) + added
        before.append(state)
        if free:
            alone = tables.advance.chunk(alone)
            unforced.append(alone)
    states = torch.stack(before, 2)
    if lengths is None:
        rest = t - (m - 1) * q
        end = tables.advance.steps(state, rest) + final[:, :, 0, :rest] @ tables.write[:, q - rest :]
    else:
        last = ((lengths - 1) // q).clamp(min=0)  # (b): the chunk in which a sequence ends
        each = torch.arange(b, device=u.device)
        end = _finish(tables, states[:, each, last], inputs[:, each, last], lengths - last * q)
    y = _outputs(tables, inputs.view(h, b * m, q), torch.stack(unforced, 2) if free else states, free)
    c = tables.taps.shape[0]
    y = y.view(h, b, m, c, q).permute(1, 2, 4, 3, 0).reshape(b, m * q, c, h)
    return y[:, :t], end.transpose(0, 1).contiguous()


def _packed(tables: Tables, u: Tensor, start: Tensor, segments: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """Sequences one after another in one row, cut into chunks from each one's start; start (h, n_seq, s)."""
    t, h = u.shape[1:]
    q, n_seq = tables.q, segments.shape[0]
    begin, stop = segments[:, 1].contiguous(), segments[:, 2].contiguous()
    length = stop - begin
    counts = ((length + q - 1) // q).clamp(min=1)
    ends = counts.cumsum(0)
    first = ends - counts  # (n_seq): the first chunk of each
    m = t // q + n_seq  # enough for any lengths: no device need be asked
    token = torch.arange(t, device=u.device)
    owner = torch.searchsorted(stop, token, right=True)
    place = first[owner] * q + token - begin[owner]
    inputs = u.new_zeros(m * q, h).index_copy(0, place, u[0]).view(m, q, h).permute(2, 0, 1).contiguous()  # (h, m, q)
    chunk = torch.arange(m, device=u.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=n_seq - 1)
    fresh = chunk == first[sequence]
    starts = start[:, sequence]  # (h, m, s)
    state, before, alone, unforced = starts[:, :1], [], starts[:, :1], []
    for i, (given, added) in enumerate(zip(starts.split(1, 1), (inputs @ tables.write).split(1, 1), strict=True)):
        state = torch.where(fresh[i], given, state)
        before.append(state)
        if free:
            alone = torch.where(fresh[i], given, alone)
            unforced.append(alone)
            alone = tables.advance.chunk(alone)
        state = tables.advance.chunk(state) + added
    states = torch.cat(before, 1)
    last = ends - 1
    end = _finish(tables, states[:, last], inputs[:, last], length - (counts - 1) * q)
    y = _outputs(tables, inputs, torch.cat(unforced, 1) if free else states, free)
    c = tables.taps.shape[0]
    y = y.view(h, m, c, q).permute(1, 3, 2, 0).reshape(m * q, c, h)
    return y[place][None], end.transpose(0, 1).contiguous()


def _finish(tables: Tables, before: Tensor, inputs: Tensor, count: Tensor) -> Tensor:
    """The state (h, b, s) after the first `count` (b) inputs (h, b, q) of a chunk that began in `before` (h, b, s)."""
    q = tables.q
    source = torch.arange(q, device=inputs.device) - (q - count)[:, None]  # (b, q): those inputs moved to the end
    moved = inputs.gather(2, source.clamp(min=0).expand(inputs.shape)).masked_fill(source < 0, 0)
    return tables.advance.steps(before, count) + moved @ tables.write


def _outputs(tables: Tables, inputs: Tensor, states: Tensor, free: bool) -> Tensor:
    """inputs (h, m, q), states before them (h, …, s) -> (h, m, c · q)."""
    states = states.reshape(*inputs.shape[:2], states.shape[-1])
    if free:
        return states @ tables.reader()
    return torch.baddbmm(inputs @ tables.toeplitz(), states, tables.reader())
