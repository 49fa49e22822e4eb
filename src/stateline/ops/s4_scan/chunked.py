"""s4_scan in PyTorch: a linear time-invariant system, a chunk of steps at a time, as matrix products.

    x[t] = Ā x[t−1] + B̄ u[t],   y[t] = C x[t],   the same for every t, a system a channel

Within a chunk of q steps the outputs are a triangular Toeplitz matrix of the system's first q taps times the inputs,
plus what the state before the chunk adds; from chunk to chunk goes the state alone. Nothing of size (state × time)
exists: memory grows with the sequence as its inputs do, and a state may come in and go out anywhere.
Suffixes: b batch, t time step, h channel, c read-outs a channel, m chunk, q step in a chunk, s real numbers of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.checks import fail
from stateline.ops.library import first_only
from stateline.ops.s4_scan.reference import step
from stateline.ops.segments import gathered

__all__ = ["step"]


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
    prepared: taps, read and write as a kernel arranges them, if somebody keeps them.
    """

    taps: Tensor
    read: Tensor
    write: Tensor
    advance: Advance
    prepared: Tensor | None = None

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


#: Steps of a chunk: as many as make the products within a chunk cost what the state costs (benchmarks/NOTES.md).
CHUNK = 64


def steps(t: int, most: int = CHUNK) -> int:
    """q for sequences of up to t steps: a power of two from 4 to `most`, whatever their number.

    `most` where t is a symbol, in a graph for sequences of any length.
    """
    if not isinstance(t, int):
        return most
    return min(most, max(4, 1 << max(0, t - 1).bit_length()))


def diagonal_tables(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, q: int, dtype: torch.dtype) -> Tables:
    """Tables in `dtype` of a sampled diagonal system: A_bar, B_bar (h, n), C (c, h, n) complex128, D (c, h) float64."""
    powers = torch.stack([torch.ones_like(A_bar), A_bar])  # Ā^0 … Ā^q: each from about log2(q) products
    while powers.shape[0] <= q:
        powers = torch.cat([powers, powers * (powers[-1] * A_bar)])
    powers = powers[: q + 1]
    taps = 2 * torch.einsum("chn,qhn->chq", C * B_bar, powers[:q]).real
    if D is not None:
        taps = torch.cat([taps[..., :1] + D[..., None], taps[..., 1:]], -1)
    read = 2 * torch.einsum("chn,qhn->chqn", C, powers[1:])
    write = (powers[:q].flip(0) * B_bar).transpose(0, 1).contiguous()
    narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
    return Tables(taps.to(dtype), row(read).to(dtype), as_real(write).to(dtype), Diagonal(powers.to(narrow)))


def row(x: Tensor) -> Tensor:
    """(…, n) complex as the real row (…, 2n) with row · (Re, Im pairs of a state) = Re(x · state)."""
    return as_real(x.conj().resolve_conj())


def scan(
    u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, initial: Tensor | None,
    segments: Tensor | None, padding: str | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u (b, t, h), initial (n_seq, h, s) -> y (b, t, c, h) in u's dtype, state (n_seq, h, s); see reference.py."""
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    tables = diagonal_tables(A_bar, B_bar, C, D, steps(u.shape[1]), real)
    y, state = run(tables, u.to(real), initial, segments, padding=padding, reverse=reverse)
    return y.to(u.dtype), state


def as_complex(state: Tensor) -> Tensor:
    """(…, 2n) real pairs as (…, n) complex."""
    return torch.view_as_complex(state.unflatten(-1, (-1, 2)))


def as_real(state: Tensor) -> Tensor:
    """(…, n) complex as (…, 2n) real pairs."""
    return torch.view_as_real(state).flatten(-2)


def run(
    tables: Tables, u: Tensor, initial: Tensor | None, segments: Tensor | None, *, padding: str | None,
    reverse: bool = False, free: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u (b, t, h) -> y (b, t, c, h), state (n_seq, h, s).

    initial: (n_seq, h, s) or None for zeros.   segments: (n_seq, 3) rows [batch row, start, stop] or None.
    padding: the segments are one a batch row, and what follows them ("right") or precedes them ("left") is skipped;
        None: they lie one after another in the only batch row.   reverse: time runs backwards.
    free: y is what the initial state alone brings; the state that comes back knows the inputs all the same.
    """
    if not isinstance(u.shape[1], int):
        problem = "chunks in PyTorch are counted when a graph is made, and this one's length is free."
        raise fail("s4_scan", problem, "Export S4D, which has a kernel, on a CPU; S4 has none.")
    rows = u.shape[0] if segments is None else segments.shape[0]
    s = tables.read.shape[-1]
    start = u.new_zeros(u.shape[2], rows, s) if initial is None else initial.transpose(0, 1)
    if u.shape[1] == 0:
        return u.new_zeros(u.shape[0], 0, tables.taps.shape[0], u.shape[2]), start.transpose(0, 1).contiguous()
    if segments is None:
        y, state = _rows(tables, u.flip(1) if reverse else u, start, None, free)
        return (y.flip(1) if reverse else y), state
    if padding is None:
        return _packed(tables, u, start, segments, reverse, free)
    lengths = segments[:, 2] - segments[:, 1]
    if padding == "right" and not reverse:  # what stands outside is skipped, not multiplied away
        outside = (torch.arange(u.shape[1], device=u.device) >= segments[:, 2:])[..., None]
        y, state = _rows(tables, u.masked_fill(outside, 0), start, lengths, free)
        return y.masked_fill(outside[..., None], 0), state
    y, state = _rows(tables, gathered(u, segments, reverse, back=False), start, lengths, free)
    return gathered(y.flatten(2), segments, reverse, back=True).view(y.shape), state


def _rows(tables: Tables, u: Tensor, start: Tensor, lengths: Tensor | None, free: bool) -> tuple[Tensor, Tensor]:
    """Every batch row is one sequence from its first token on; start (h, b, s)."""
    b, t, h = u.shape
    q = tables.q
    m = -(-t // q)
    inputs = F.pad(u, (0, 0, 0, m * q - t)).view(b, m, q, h).permute(3, 0, 1, 2).contiguous()  # (h, b, m, q)
    most, final = inputs.split((m - 1, 1), 2)  # views taken at once: the gradient of each alone would fill a whole
    written = (most.reshape(h, b * (m - 1), q) @ tables.write).unflatten(1, (b, m - 1))
    states = before(tables.advance, torch.cat([start[:, :, None], written], 2))
    unforced = states
    if free:
        unforced = before(tables.advance, F.pad(start[:, :, None], (0, 0, 0, m - 1)))
    if lengths is None:
        rest = t - (m - 1) * q
        end = tables.advance.steps(states[:, :, -1], rest) + final[:, :, 0, :rest] @ tables.write[:, q - rest :]
    else:
        last = ((lengths - 1) // q).clamp(min=0)  # (b): the chunk in which a sequence ends
        each = torch.arange(b, device=u.device)
        end = _finish(tables, states[:, each, last], inputs[:, each, last], lengths - last * q)
    y = _outputs(tables, inputs.view(h, b * m, q), unforced, free)
    c = tables.taps.shape[0]
    y = y.view(h, b, m, c, q).permute(1, 2, 4, 3, 0).reshape(b, m * q, c, h)
    return y[:, :t], end.transpose(0, 1).contiguous()


def _packed(
    tables: Tables, u: Tensor, start: Tensor, segments: Tensor, reverse: bool, free: bool
) -> tuple[Tensor, Tensor]:
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
    place = first[owner] * q + (stop[owner] - 1 - token if reverse else token - begin[owner])
    inputs = u.new_zeros(m * q, h).index_copy(0, place, u[0]).view(m, q, h).permute(2, 0, 1).contiguous()  # (h, m, q)
    chunk = torch.arange(m, device=u.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=n_seq - 1)
    place_of = chunk - first[sequence]  # which chunk of its sequence
    fresh = (place_of == 0)[:, None]
    added = F.pad((inputs @ tables.write)[:, :-1], (0, 0, 1, 0))
    runs = Runs(place_of, counts[sequence] - 1 - place_of)
    states = before(tables.advance, torch.where(fresh, start[:, sequence], added)[:, None], runs)[:, 0]
    unforced = states
    if free:
        alone = torch.where(fresh, start[:, sequence], torch.zeros_like(added))
        unforced = before(tables.advance, alone[:, None], runs)[:, 0]
    last = ends - 1
    end = _finish(tables, states[:, last], inputs[:, last], length - (counts - 1) * q)
    y = _outputs(tables, inputs, unforced, free)
    c = tables.taps.shape[0]
    y = y.view(h, m, c, q).permute(1, 3, 2, 0).reshape(m * q, c, h)
    return y[place][None], end.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Runs:
    """Of each chunk (m): how many of its sequence come before it, and how many after."""

    place: Tensor
    rest: Tensor


def before(advance: Advance, given: Tensor, runs: Runs | None = None) -> Tensor:
    """The state before each chunk, X[i] = Ā^q X[i−1] + given[i] within a sequence: given (h, b, m, s) -> (h, b, m, s).

    given: what enters a sequence at its first chunk, and what the chunk before added at the others.
    On a GPU dense systems take log2(m) products of all chunks, since m products of one would wait for each other.
    """
    if isinstance(advance, Dense) and given.is_cuda:
        made: Tensor = DenseScan.apply(
            given, advance.powers[-1], *((None, None) if runs is None else (runs.place, runs.rest))
        )
        return made
    state, states = given[:, :, 0], []
    for i, now in enumerate(given.unbind(2)):
        if i:
            onward = advance.chunk(state)
            state = onward + now if runs is None else torch.where(runs.place[i] > 0, onward, 0) + now
        states.append(state)
    return torch.stack(states or [given[:, :, 0]], 2)


class DenseScan(torch.autograd.Function):
    """`before` of a dense matrix (h, s, s) that takes a state from chunk to chunk, by doubling."""

    @staticmethod
    def forward(given: Tensor, matrix: Tensor, place: Tensor | None, rest: Tensor | None) -> Tensor:
        states = _doubled(given, matrix, place)
        return states.clone() if states is given else states  # of one chunk: autograd wants a tensor of its own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        matrix, place, rest, states = ctx.saved_tensors
        dgiven = _doubled(slope.flip(2), matrix.mT, None if rest is None else rest.flip(0)).flip(2)
        onward = dgiven[:, :, 1:]
        if place is not None:
            onward = onward * (place[1:] > 0)[:, None]
        dmatrix = onward.flatten(1, 2).mT @ states[:, :, :-1].flatten(1, 2)
        dgiven, dmatrix = (first_only("s4_scan", g, slope, matrix, states) for g in (dgiven, dmatrix))
        return dgiven, dmatrix, None, None


def _doubled(given: Tensor, matrix: Tensor, place: Tensor | None) -> Tensor:
    """X[i] = matrix X[i−1] + given[i], but where place[i] is 0: each round looks back twice as far as the last."""
    states, power, reach = given, matrix.double(), 1
    h, b, m, s = given.shape
    while reach < m:
        back = states[:, :, :-reach]
        if place is not None:
            back = back * (place[reach:] >= reach)[:, None]
        moved = back.reshape(h, b * (m - reach), s) @ power.mT.to(given.dtype)
        states = torch.cat([states[:, :, :reach], states[:, :, reach:] + moved.view(h, b, m - reach, s)], 2)
        power, reach = power @ power, 2 * reach
    return states


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
