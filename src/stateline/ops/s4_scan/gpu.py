"""s4_scan on a GPU: chunks of a system on the tables of chunked.py, over the kernels of gpu_kernels.py.

Suffixes: b batch, t time step, h channel, c read-out, q step in a chunk, s real numbers of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops.s4_scan import gpu_kernels as kernels
from stateline.ops.s4_scan import gpu_table_kernels as tabular

DTYPES = cuda.DTYPES
#: How float32 is multiplied: as sums of three products of its parts in TensorFloat-32, which lose nothing that counts.
PRECISION = "tf32x3"
#: Rows and numbers of a state that a product takes; channels that are turned, and complex numbers that are carried, at
#: once; rows loaded ahead.
ROWS, NUMBERS, TURNED, CARRIED, AHEAD = 64, 64, 32, 64, 8
#: Complex numbers of a state that are raised to powers at once.
STATES = 16
_pack, _unpack, _project, _advance, _outputs = map(
    cuda.Kernel, (kernels.pack, kernels.unpack, kernels.project, kernels.advance, kernels.outputs)
)
_retreat, _powers_back, _inputs, _outer, _taps_back = map(
    cuda.Kernel, (kernels.retreat, kernels.powers_back, kernels.inputs, kernels.outer, kernels.taps_back)
)
_sample, _sample_back, _tables, _tables_back = map(
    cuda.Kernel, (tabular.sample, tabular.sample_back, tabular.tables, tabular.tables_back)
)
_step = cuda.Kernel(kernels.step)


@cuda.side_by_side
def forward(
    u: Tensor,
    taps: Tensor,
    read: Tensor,
    write: Tensor,
    powers: Tensor,
    initial: Tensor | None,
    segments: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """u (b, t, h), tables of chunked.Tables, powers (q + 1, h, s), initial (n_seq, h, s) -> y (b, t, c, h), state."""
    work = _Work(u, taps, read, write, powers, segments, reverse)
    inputs = work.packed(u)
    states, end = work.states(inputs, initial)
    (b, t, h), c = u.shape, taps.shape[0]
    out = cuda.empty((c * h, work.rows, work.q), torch.float32, u)
    y = cuda.empty((b, t, c * h), u.dtype, u)
    if segments is not None:
        y.zero_()
    if out.numel():
        grid = (h, work.blocks, c)
        _outputs(grid, (inputs, work.taps, states, work.read, out, work.rows, h, work.s), work.cut, 4)
        work.unpacked(out, y)
    return y.view(b, t, c, h), end


@cuda.side_by_side
def backward(
    dy: Tensor, dstate: Tensor, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor,
    initial: Tensor | None, segments: Tensor | None, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of u, the four tables and initial (None if there is none)."""
    work = _Work(u, taps, read, write, powers, segments, reverse)
    inputs, given = work.packed(u), work.packed(dy.flatten(2))
    states, _ = work.states(inputs, initial)
    slopes = work.projected(given, work.read, taps.shape[0], shift=False)
    dinitial, dpowers = work.retreat(slopes, states, dstate, initial)
    h, c, s, rows = work.h, taps.shape[0], work.s, work.rows
    dtaps, dread, dwrite = (cuda.empty(x.shape, torch.float32, u) for x in (taps, read, write))
    du, turned = cuda.tokens(u, segments), cuda.empty((h, rows, work.q), torch.float32, u)
    if h and rows:
        numbers = cuda.ceil_div(s, work.cut[2])
        tensors = (given, work.taps, slopes, work.write, work.counts, turned)
        _inputs((h, work.blocks, 1), (*tensors, rows, h, s, c), work.cut, 4)
        work.unpacked(turned, du)
        if numbers:
            _outer((h, 1, numbers), (inputs, slopes, work.counts, dwrite, rows, h, s), (True, *work.cut), 4)
            _outer((h, c, numbers), (given, states, work.counts, dread, rows, h, s), (False, *work.cut), 4)
        square = cuda.empty((c * h, work.q, work.q), torch.float32, u)
        _taps_back((h, c, 1), (inputs, given, square, dtaps, rows, h), (work.q, ROWS, PRECISION), 4)
    else:
        for x in (dtaps, dread, dwrite):
            x.zero_()
    return du, dtaps, dread, dwrite, dpowers, dinitial


def step(
    state: Tensor, u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, index: Tensor | None
) -> Tensor:
    """One token, in place: state (slots, h, n, 2), u (b, h), a system as pairs -> y (b, c, h)."""
    (b, h), (c, _, n, _) = u.shape, C.shape
    y = cuda.empty((b, c, h), u.dtype, u)
    width = cuda.power_of_2(n)
    channels = max(1, min(cuda.power_of_2(h), 1024 // width))
    if y.numel():
        tensors = (state, u, cuda.plain(A_bar), cuda.plain(B_bar), cuda.plain(C), cuda.plain(D), cuda.plain(index), y)
        numbers = (u.stride(0), u.stride(1), state.shape[0], h, n, c)
        _step((b, cuda.ceil_div(h, channels), 1), (*tensors, *numbers), (channels, width), 4)
    return y


def tables(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """taps, read, write and powers of chunked.diagonal_tables, as real numbers in float32."""
    return _tabulated(_pairs(A_bar), _pairs(B_bar), _pairs(C), D, q)


def tables_backward(
    dtaps: Tensor, dread: Tensor, dwrite: Tensor, dpowers: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor,
    D: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of A_bar, B_bar (h, n), C (c, h, n) and D (c, h) from those of the tables."""
    made = _tabulated_back((dtaps, dread, dwrite, dpowers), *(_pairs(x) for x in (A_bar, B_bar, C)))
    return (*(torch.view_as_complex(x) for x in made), None if D is None else dtaps[..., 0].double())  # type: ignore[return-value]  # three


@cuda.side_by_side
def system(
    inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor | None, rate: float, bilinear: bool,
    q: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`tables` of what S4D learns: inv_dt (h, 1), A_real, A_imag (S, n), B (1, S, n, 2), C (c, h, n, 2), D (c, h)."""
    given = [x.contiguous() for x in (inv_dt, A_real, A_imag, B)]
    return _tabulated(*_sampled(given, rate, bilinear), C.contiguous(), D, q)


@cuda.side_by_side
def system_backward(
    dtaps: Tensor, dread: Tensor, dwrite: Tensor, dpowers: Tensor, inv_dt: Tensor, A_real: Tensor, A_imag: Tensor,
    B: Tensor, C: Tensor, D: Tensor | None, rate: float, bilinear: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of inv_dt, A_real, A_imag, B, C and D from those of the tables."""
    given = [x.contiguous() for x in (inv_dt, A_real, A_imag, B)]
    (systems, n), h = A_real.shape, inv_dt.shape[0]
    A_bar, B_bar = _sampled(given, rate, bilinear)
    dA, dB, dC = _tabulated_back((dtaps, dread, dwrite, dpowers), A_bar, B_bar, C.contiguous())
    shapes = (inv_dt.shape, (h, n), (h, n), (h, n, 2))
    made = [cuda.empty(shape, torch.float32, dA) for shape in shapes]
    if h:
        arguments = (*given, dA, dB, *made, *_parts(rate), h, n, systems)
        _sample_back((h, 1, 1), arguments, (bilinear, cuda.power_of_2(n)), 1)
    if systems < h:
        made[1:] = [x.view(-1, systems, *x.shape[1:]).sum(0) for x in made[1:]]
    return made[0], made[1], made[2], made[3].view(B.shape), dC, None if D is None else dtaps[..., 0].contiguous()


def system_step(
    state: Tensor, u: Tensor, inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    rate: float, bilinear: bool,
) -> Tensor:  # fmt: skip
    """`step` of what S4D learns, as `system` takes it: two launches a token."""
    given = [x.contiguous() for x in (inv_dt, A_real, A_imag, B)]
    return step(state, u, *_sampled(given, rate, bilinear), C, D, None)


def _sampled(given: list[Tensor], rate: float, bilinear: bool) -> tuple[Tensor, Tensor]:
    """Ā and B̄ (h, n, 2) float64."""
    h, (systems, n) = given[0].shape[0], given[1].shape
    A_bar, B_bar = (cuda.empty((h, n, 2), torch.float64, given[0]) for _ in range(2))
    if h:
        _sample((h, 1, 1), (*given, A_bar, B_bar, *_parts(rate), h, n, systems), (bilinear, cuda.power_of_2(n)), 1)
    return A_bar, B_bar


def _parts(rate: float) -> tuple[float, float]:
    """The rate in float32, as Triton takes numbers, and what that leaves of it: phases of many turns show it."""
    near = float(torch.tensor(rate, dtype=torch.float32))
    return near, rate - near


def _tabulated(A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """taps, read, write, powers of A, B (h, n, 2), C (c, h, n, 2)."""
    c, h, n, _ = C.shape
    shapes = ((c, h, q), (c, h, q, 2 * n), (h, q, 2 * n), (q + 1, h, 2 * n))
    taps, read, write, powers = (cuda.empty(shape, torch.float32, A) for shape in shapes)
    if h:
        arguments = (A, B, C, cuda.plain(D), taps, read, write, powers, h, n, c)
        _tables((h, 1, 1), arguments, (q, q.bit_length() - 1, min(cuda.power_of_2(n), STATES)), 4)
    return taps, read, write, powers


def _tabulated_back(slopes: tuple[Tensor, ...], A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and C, in their dtypes."""
    (c, h, n, _), q = C.shape, slopes[0].shape[-1]
    dA, dB, dC = (cuda.empty(x.shape, x.dtype, x) for x in (A, B, C))
    if h and n:
        states = min(cuda.power_of_2(n), STATES)
        arguments = (*(x.contiguous() for x in slopes), A, B, C, dA, dB, dC, h, n, c)
        _tables_back((h, cuda.ceil_div(n, states), 1), arguments, (q, q.bit_length() - 1, states), 4)
    return dA, dB, dC


class _Work:
    """What both passes share: how time is cut, and the tables as kernels read them."""

    def __init__(
        self, u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, segments: Tensor | None,
        reverse: bool,
    ) -> None:  # fmt: skip
        b, self.t, self.h = u.shape
        self.q, self.s, self.reverse = taps.shape[-1], read.shape[-1], reverse
        self.taps, self.read, self.write, self.powers = (x.contiguous() for x in (taps, read, write, powers))
        self.runs = cuda.runs(segments, b, self.t, self.q)
        self.rows, self.sequences = self.runs.count, b if segments is None else segments.shape[0]
        self.blocks = cuda.ceil_div(self.rows, ROWS)
        self.cut = (self.q, ROWS, max(16, min(cuda.power_of_2(self.s), NUMBERS)), PRECISION)
        self.counts = cuda.empty((self.rows,), torch.int32, u)

    def packed(self, x: Tensor) -> Tensor:
        """x (b, t, d) as (d, rows, q) float32; counts the tokens of rows on the way."""
        d = x.shape[2]
        out = cuda.empty((d, self.rows, self.q), torch.float32, x)
        if out.numel():
            x = x.resolve_neg()
            arguments = (x, self.runs.table, self.runs.tiles, out, self.counts, self.t, self.runs.each, self.rows, d)
            grid = (self.rows, cuda.ceil_div(d, TURNED), 1)
            _pack(grid, (*arguments, *x.stride()), (self.reverse, self.q, TURNED), 4)
        return out

    def unpacked(self, x: Tensor, out: Tensor) -> None:
        """Write x (d, rows, q) into out (b, t, d)."""
        if out.numel():
            tensors = (x, self.runs.table, self.runs.tiles, out)
            numbers = (self.t, self.runs.each, self.rows, out.shape[2])
            grid = (self.rows, cuda.ceil_div(out.shape[2], TURNED), 1)
            _unpack(grid, (*tensors, *numbers), (self.reverse, self.q, TURNED), 4)

    def projected(self, x: Tensor, w: Tensor, c: int, *, shift: bool) -> Tensor:
        """x (c, h, rows, q) · w (c, h, q, s) -> (rows, h, s)."""
        out = cuda.empty((self.rows, self.h, self.s), torch.float32, x)
        if out.numel():
            grid = (self.h, self.blocks, cuda.ceil_div(self.s, self.cut[2]))
            _project(grid, (x, w, self.counts, out, self.rows, self.h, self.s, c), (shift, *self.cut), 4)
        return out

    def states(self, inputs: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states before every row, (rows, h, s), and after every sequence."""
        states = self.projected(inputs, self.write, 1, shift=True)
        end = cuda.empty((self.sequences, self.h, self.s), torch.float32, inputs)
        if end.numel():
            where = (self.runs.table, self.runs.firsts, self.counts)
            grid, width = self._carried()
            arguments = (states, self.powers, cuda.plain(initial), *where, end, self.runs.each, width)
            _advance(grid, arguments, (self.q, CARRIED, AHEAD), 2)
        return states, end

    def retreat(
        self, slopes: Tensor, states: Tensor, dend: Tensor, initial: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Turn `slopes` into gradients of what rows add; those of the initial state and the powers."""
        dinitial = None if initial is None else cuda.empty(initial.shape, torch.float32, slopes)
        dpowers = cuda.empty(self.powers.shape, torch.float32, slopes)
        dfull, dlast = (cuda.empty((self.sequences, self.h, self.s), torch.float32, slopes) for _ in range(2))
        if not dfull.numel():
            return dinitial, dpowers.zero_()
        where = (self.runs.table, self.runs.firsts, self.counts)
        grid, width = self._carried()
        tensors = (slopes, states, self.powers, dend.contiguous(), *where, dinitial, dfull, dlast)
        _retreat(grid, (*tensors, self.runs.each, width), (self.q, CARRIED, AHEAD), 2)
        arguments = (dfull, dlast, *where, dpowers, self.runs.each, 2 * width, self.sequences)
        _powers_back((cuda.ceil_div(2 * width, 32), 1, 1), arguments, (self.q, 2 * self.q, 32), 4)
        return dinitial, dpowers

    def _carried(self) -> tuple[cuda.Grid, int]:
        width = self.h * self.s // 2
        return (self.sequences, cuda.ceil_div(width, CARRIED), 1), width


def _pairs(x: Tensor) -> Tensor:
    """(…) complex as (…, 2) real, contiguous."""
    return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())
