"""selective_scan in CUDA C++ (gpu*.cu), compiled at first use: the same functions as reference.py.

Real A, B and C per token, data in bfloat16, float16 or float32 (mixed data is read as float32); everything is computed
in float32. `problem` says what is not covered.

Suffixes: b batch, t time step, d channel, n state, g group.
"""

from __future__ import annotations

import functools
import importlib.resources

import torch
from torch import Tensor

from stateline.ops import nvrtc

#: Precision of A that the kernels compute in.
DTYPES = frozenset({torch.float32})
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Steps a lane keeps in registers, and blocks that share a multiprocessor: what registers allow (benchmarks/NOTES.md).
RUN, FORWARD_BLOCKS, BACKWARD_BLOCKS = 8, 4, 2
#: Steps of a lane where only sums are needed.
ENDS_RUN = 16
THREADS, WARPS, WIDTH, PAIRS, LANES = 128, 4, 32, 16, 8
#: A chunk is not shorter: finding what it leaves to the next has to pay.
LEAST_CHUNK = 2048


def problem(A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the kernels do not cover this system, or None if they do."""
    if A.dtype not in DTYPES:
        return f"A is {A.dtype}, its GPU kernels compute in float32."
    if B.dim() == 2 or C.dim() == 2:
        return "a constant B or C is not covered by its GPU kernels."
    if A.shape[1] == 0:
        return "there are no states."
    if not _fits(A.shape[1], torch.float32):
        return f"{A.shape[1]} states do not fit into shared memory."
    return None


@functools.cache
def _fits(n: int, dtype: torch.dtype) -> bool:
    return _shared_backward(n, dtype) <= 226 * 1024  # a block may have 227 KiB, some of it is static


@functools.cache
def _source(name: str) -> str:
    folder = importlib.resources.files("stateline.ops.selective_scan")
    return "".join((folder / part).read_text() for part in ("gpu_common.cuh", name))


@functools.cache
def _library(name: str, dtype: torch.dtype, device: int, run: int) -> nvrtc.Library:
    options = {
        "DATA": _KINDS[dtype], "RUN": run, "FORWARD_BLOCKS": FORWARD_BLOCKS, "BACKWARD_BLOCKS": BACKWARD_BLOCKS,
    }  # fmt: skip
    return nvrtc.Library(_source(name), [f"-D{k}={v}" for k, v in options.items()], device)


def _tile() -> int:
    return LANES * RUN


def _buffer(tile: int) -> int:
    return tile * WIDTH + LANES * 8


def _raw(n: int, dtype: torch.dtype, tile: int) -> int:
    vector = 16 // dtype.itemsize
    return tile * -(-n // vector) * vector * dtype.itemsize


def _shared_forward(n: int, dtype: torch.dtype) -> int:
    tile = _tile()
    return 3 * _buffer(tile) * dtype.itemsize + 2 * _raw(n, dtype, tile) + 2 * n * tile * 4 + n * PAIRS * 16


def _shared_sweep(n: int, dtype: torch.dtype, tile: int) -> int:
    return 3 * _buffer(tile) * dtype.itemsize + _raw(n, dtype, tile) + n * tile * 4 + n * PAIRS * 16


def _shared_backward(n: int, dtype: torch.dtype) -> int:
    tile = _tile()
    group = 8 if dtype == torch.float32 else 16
    parts = 4 * WARPS * 2 * (PAIRS // WARPS * (2 * tile + 8) + group * tile)  # of pairs, in turn; of warps
    rows = 8 * _buffer(tile) * dtype.itemsize
    return rows + 2 * _raw(n, dtype, tile) + 2 * n * tile * 4 + parts + 2 * n * PAIRS * (16 + 8)


@functools.cache
def chunk_length(t: int, d: int, processors: int, resident: int) -> int:
    """Steps of a chunk: few chunks, but enough that one sequence fills the processors. Never depends on the batch.

    `resident`: blocks that share a processor. One that holds fewer works at four fifths of its rate at best.
    """
    across = max(1, -(-d // WIDTH))

    def time(chunks: int) -> float:
        full, rest = divmod(-(-across * chunks // processors), resident)
        return (full * resident + (max(rest, 0.8 * resident) if rest else 0)) / chunks

    counts = range(1, max(1, t // LEAST_CHUNK) + 1)
    counts = counts[:64]  # more chunks than that are never needed to fill a device
    best = min(map(time, counts))
    chunks = next(c for c in counts if time(c) <= 1.03 * best)
    tile = LANES * ENDS_RUN  # the coarser one
    return max(1, -(-t // chunks // tile)) * tile


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _common(*data: Tensor | None) -> torch.dtype:
    """The dtype that all data is read in: its own if it is the same everywhere."""
    kinds = {x.dtype for x in data if x is not None}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _data(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as kernels read data: the last dimension adjacent, steps less than 2 GiB apart."""
    if x.is_neg():  # its sign is still to be changed in memory
        x = x.resolve_neg()
    if x.dtype != dtype:
        x = x.to(dtype)
    near = x.stride(-1) == 1 or x.shape[-1] <= 1
    return x if near and x.stride(1) * dtype.itemsize < 2**31 else x.contiguous()


def _parameter(x: Tensor | None) -> Tensor | None:
    """`x` as kernels read parameters and states."""
    return None if x is None else x.resolve_neg().contiguous()


def _rows(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


class _Call:
    """The inputs that every kernel of this op reads, converted and kept alive, and where sequences are cut."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, segments: Tensor | None,
        reverse: bool, resident: int,
    ) -> None:  # fmt: skip
        self.dtype = _common(u, dt, B, C, z)
        self.device = u.device.index
        self.u, self.dt, self.B, self.C = (self.data(x) for x in (u, dt, B, C))
        self.z = None if z is None else self.data(z)
        self.A = A.resolve_neg().contiguous()
        self.D, self.bias, self.initial = (_parameter(x) for x in (D, dt_bias, initial_state))
        self.table = None if segments is None else segments.contiguous()
        self.b, self.t, self.d = u.shape
        self.g, self.n = B.shape[2:]
        self.sequences = self.b if segments is None else segments.shape[0]
        self.chunk = chunk_length(self.t, self.d, _processors(self.device), resident)
        self.chunks = max(1, -(-self.t // self.chunk))
        self.flags = (int(dt_softplus), int(reverse))
        self.blocks_in_group = (self.d + self.g * WIDTH - 1) // (self.g * WIDTH)
        self.blocks = self.blocks_in_group * self.g * self.chunks * self.sequences

    def data(self, x: Tensor) -> Tensor:
        return _data(x, self.dtype)

    def rows_of(self, length: int) -> int:
        """Rows that hold one entry for each `length` steps of each sequence."""
        return self.b * self.t // length + self.sequences + 1

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def _aligned(self, *tensors: Tensor | None) -> int:
        together = 0  # bits below 16 of any address or step in bytes
        for x in tensors:
            if x is not None:
                bits = 0
                for step in x.stride()[:-1]:
                    bits |= step
                together |= x.data_ptr() | bits * self.dtype.itemsize
        return int(together % 16 == 0)

    def record(
        self,
        y: Tensor | None,
        state: Tensor | None,
        ends: Tensor | None,
        sums: Tensor | None,
        marks: Tensor | None = None,
        back: _Gradient | None = None,
    ) -> list[int]:
        """The kernels' record `Call`."""
        outputs = () if back is None else (back.dy, back.du, back.ddt, back.dz)
        groups = [f for x in (self.B, self.C) for f in (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))]
        return [
            self.b, self.t, self.d, self.g, self.n, self.chunk, self.chunks, self.sequences, *self.flags,
            self._aligned(self.u, self.dt, self.z, y, *outputs), self._aligned(self.B, self.C),
            *_rows(self.u), *_rows(self.dt), *_rows(self.z), *_rows(y), *_rows(None if back is None else back.dy),
            *groups, _address(self.A), _address(self.D), _address(self.bias), _address(self.initial),
            _address(self.table), _address(state), _address(ends), _address(sums), _address(marks),
            *([0] * 19 if back is None else back.record()),
        ]  # fmt: skip

    def run(self, source: str, kernel: str, shared: int, record: list[int], blocks: int | None = None) -> None:
        library = _library(source, self.dtype, self.device, RUN)
        library.launch(kernel, self.blocks if blocks is None else blocks, THREADS, shared, record)

    def sweep(self, kernel: str, record: list[int], run: int) -> None:
        library = _library("gpu_sweep.cu", self.dtype, self.device, run)
        library.launch(kernel, self.blocks, THREADS, _shared_sweep(self.n, self.dtype, LANES * run), record)

    def ends(self) -> tuple[Tensor | None, Tensor | None]:
        """Room for the state at the end of each chunk and for its summed step sizes, if there is more than one."""
        if self.chunks == 1:
            return None, None
        rows = self.rows_of(self.chunk)
        return self.empty(rows, self.d, self.n), self.empty(rows, self.d)


class _Gradient:
    """What the backward kernels write, and the gradients they read."""

    def __init__(self, call: _Call, dy: Tensor, dstate: Tensor, padded: bool) -> None:
        self.dy, self.dstate = call.data(dy), dstate.to(torch.float32).resolve_neg().contiguous()
        make = torch.zeros if padded else torch.empty

        def like(x: Tensor | None) -> Tensor | None:
            return None if x is None else make(x.shape, dtype=call.dtype, device=x.device)

        def rows(*shape: int) -> Tensor:
            return torch.zeros(call.rows_of(call.chunk), *shape, dtype=torch.float32, device=dy.device)

        self.du, self.ddt, self.dz, self.dB, self.dC = (like(x) for x in (call.u, call.dt, call.z, call.B, call.C))
        self.adjoint_ends, self.adjoint_sums = call.ends()
        self.dinitial = None if call.initial is None else torch.empty_like(call.initial)
        self.dA = rows(call.d, call.n)
        self.dD = None if call.D is None else rows(call.d)
        self.dbias = None if call.bias is None else rows(call.d)
        blocks = call.blocks_in_group * call.g
        self.parts = make(blocks, call.b, 2, call.n, call.t, dtype=torch.float32, device=dy.device)

    def record(self) -> list[int]:
        plain = (self.adjoint_ends, self.adjoint_sums, self.dinitial, self.dA, self.dD, self.dbias, self.parts)
        return [
            _address(self.dstate), *_rows(self.du), *_rows(self.ddt), *_rows(self.dz), *(_address(x) for x in plain),
            _address(self.dB), _address(self.dC),
        ]  # fmt: skip


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    """u, dt, z (b, t, d); A (d, n); B, C (b, t, g, n) -> y (b, t, d), state (n_seq, d, n)."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    with torch.cuda.device_of(u):
        call = _Call(*inputs, FORWARD_BLOCKS)
        make = torch.empty if segments is None else torch.zeros
        y = make(u.shape, dtype=call.dtype, device=u.device)
        state = call.empty(call.sequences, call.d, call.n)
        ends, sums = call.ends()
        record = call.record(y, state, ends, sums)
        if call.chunks > 1:
            call.sweep("chunk_ends", record, ENDS_RUN)
        call.run("gpu.cu", "scan_forward", _shared_forward(call.n, call.dtype), record)
    return y if y.dtype == u.dtype else y.to(u.dtype), state


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
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    with torch.cuda.device_of(u):
        call = _Call(*inputs, BACKWARD_BLOCKS)
        back = _Gradient(call, dy, dstate, segments is not None)
        ends, sums = call.ends()
        marks = call.empty(call.rows_of(_tile()), call.blocks_in_group * call.g, call.n, WIDTH)
        record = call.record(None, None, ends, sums, marks, back)
        if call.chunks > 1:
            call.sweep("chunk_ends", record, ENDS_RUN)
            call.sweep("adjoint_ends", record, ENDS_RUN)
        call.sweep("tile_marks", record, RUN)
        call.run("gpu_backward.cu", "scan_backward", _shared_backward(call.n, call.dtype), record)
        call.run("gpu_backward.cu", "sum_parts", 0, record, -(-2 * call.b * call.g * call.n * call.t // THREADS))
    dA, dD, dbias = (None if x is None else x.sum(0) for x in (back.dA, back.dD, back.dbias))
    grads = (back.du, back.ddt, dA, back.dB, back.dC, dD, back.dz, dbias, back.dinitial)
    wanted = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, wanted, strict=True))


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
    """One token, in place. u, dt, z (b, d); B, C (b, g, n); index (b) picks rows of state, negative: skip."""
    dtype = _common(u, dt, B, C, z)

    with torch.cuda.device_of(u):
        inputs = [_data(x, dtype) for x in (u, dt)] + [None if z is None else _data(z, dtype)]
        systems = [_data(x, dtype) for x in (B, C)]
        A, D, dt_bias = A.resolve_neg().contiguous(), *(_parameter(x) for x in (D, dt_bias))
        index = None if index is None else index.contiguous()
        (b, d), (g, n) = u.shape, B.shape[1:]
        y = torch.empty((b, d), dtype=dtype, device=u.device)
        record = [
            b, d, g, n, state.shape[0], state.stride(0), int(dt_softplus),
            *(f for x in inputs for f in ((0, 0) if x is None else (x.data_ptr(), x.stride(0)))),
            *(f for x in systems for f in (x.data_ptr(), x.stride(0), x.stride(1))),
            _address(A), _address(D), _address(dt_bias), state.data_ptr(), y.data_ptr(), _address(index),
            int(index is not None and index.dtype == torch.int64),
        ]  # fmt: skip
        _library("gpu.cu", dtype, u.device.index, RUN).launch("scan_step", -(-4 * b * d // 256), 256, 0, record)
    return y.to(u.dtype)
