"""selective_scan in CUDA C++ (gpu*.cu), compiled at first use: the same functions as reference.py.

Real A, B and C per token, data in bfloat16, float16 or float32 (mixed data is read as float32); everything is computed
in float32. What these kernels do not cover, and everything where they cannot be compiled, goes to gpu_triton.py.

Suffixes: b batch, t time step, d channel, n state, g group.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline import backends
from stateline.ops import cuda, nvrtc
from stateline.ops.selective_scan.gpu_plan import (
    THREADS,
    WIDTH,
    Limits,
    Plan,
    backward_plan,
    chunk_length,
    covers,
    ends_plan,
    forward_plan,
    step_plan,
)

#: Precision of A that the kernels compute in; complex ones are Triton's.
DTYPES = frozenset({torch.float32, torch.complex64})


def problem(*args: Tensor) -> str | None:
    """Why neither kernel covers (u, dt, A, B, C), or None if one does."""
    why = _uncovered(*args[2:5]) if len(args) >= 5 else None
    if why is None or _triton_is_there():
        return None
    return f"{why}, and the Triton kernel needs triton, which is not installed. pip install triton"


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def detail(*args: Tensor) -> str:
    """Which kernel runs for (u, dt, A, B, C), and why not the faster one."""
    if len(args) < 5:
        return ""
    why = _uncovered(*args[2:5])
    return "the CUDA kernels run" if why is None else f"{why}; the Triton kernel runs"


def _uncovered(A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why the CUDA kernels do not serve this system, or None if they do."""
    if A.dtype != torch.float32:
        return "CUDA kernels do not cover complex A"
    if B.dim() == 2 or C.dim() == 2:
        return f"CUDA kernels do not cover constant {'B' if B.dim() == 2 else 'C'}"
    n = int(A.shape[1])
    if n == 0:
        return "CUDA kernels do not cover systems without states"
    if not covers(n, _limits(A.device.index)):
        return f"CUDA kernels do not cover {n} states, which do not fit into shared memory"
    why = nvrtc.problem(A.get_device())
    return why and f"CUDA kernels cannot be compiled here: {why.rstrip('.')}"


def _instead(A: Tensor, B: Tensor, C: Tensor) -> ModuleType | None:
    """The Triton kernels where the CUDA kernels do not serve this system; said once where they never can."""
    why = _uncovered(A, B, C)
    if why is None:
        return None
    if why.startswith("CUDA kernels cannot"):
        backends.say_once(f"selective_scan: {why}; the Triton kernel runs. Results agree within the published bounds.")
    from stateline.ops.selective_scan import gpu_triton

    return gpu_triton


@functools.cache
def _limits(device: int) -> Limits:
    of: Any = torch.cuda.get_device_properties(device)  # torch's types leave out half of it
    return Limits(of.multi_processor_count, of.shared_memory_per_block_optin, of.shared_memory_per_multiprocessor)


@functools.cache
def source(name: str) -> str:
    """A kernel file with what all of them share in front."""
    folder = importlib.resources.files("stateline.ops.selective_scan")
    return "".join((folder / part).read_text() for part in ("gpu_common.cuh", name))


@functools.cache
def _library(name: str, options: tuple[str, ...], device: int) -> nvrtc.Library:
    return nvrtc.Library(source(name), options, device)


class _View(NamedTuple):
    """A tensor as kernels read it, kept alive; its address and the elements between entries of all dimensions but the
    last; and what of these, in bytes, may keep it from being read 16 bytes at a time."""

    tensor: Tensor | None
    fields: tuple[int, ...]
    bits: int


def _view(x: Tensor, dtype: torch.dtype) -> _View:
    """`x` as kernels read data: the last dimension adjacent, steps less than 16 MiB apart (a tile's bytes: 32 bits)."""
    if x.is_neg():  # its sign is still to be changed in memory
        x = x.resolve_neg()
    if x.dtype != dtype:
        x = x.to(dtype)
    steps, size = x.stride(), dtype.itemsize
    if (steps[-1] != 1 and x.shape[-1] > 1) or (len(steps) > 2 and steps[1] * size >= 2**24):
        x = x.contiguous()
        steps = x.stride()
    at, bits = x.data_ptr(), 0
    for step in steps[:-1]:
        bits |= step
    return _View(x, (at, *steps[:-1]), at | bits * size)


_NO_ROWS = _View(None, (0, 0, 0), 0)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _common(*data: Tensor | None) -> torch.dtype:
    """The dtype that all data is read in: its own if it is the same everywhere."""
    kinds = {x.dtype for x in data if x is not None}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _parameter(x: Tensor | None) -> Tensor | None:
    """`x` as kernels read parameters and states."""
    if x is None:
        return None
    return (x.resolve_neg() if x.is_neg() else x).contiguous()


class _Call:
    """The inputs that every kernel of this op reads, converted and kept alive, and where sequences are cut."""

    def __init__(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, segments: Tensor | None,
        reverse: bool,
    ) -> None:  # fmt: skip
        self.dtype = _common(u, dt, B, C, z)
        self.device = u.get_device()
        self.limits = _limits(self.device)
        self.u, self.dt, self.z = self.rows(u), self.rows(dt), self.rows(z)
        self.B, self.C = _view(B, self.dtype), _view(C, self.dtype)
        self.table = None if segments is None else segments.contiguous()
        self.parameters = tuple(map(_parameter, (A, D, dt_bias, initial_state)))
        self.like = A  # float32, on the device
        self.b, self.t, self.d = u.shape
        self.g, self.n = B.shape[2:]
        self.sequences = self.b if segments is None else segments.shape[0]
        self.flags = (int(dt_softplus), int(reverse))
        self.across = _across(self.d, self.g)

    def cut(self, plan: Plan) -> None:
        """Cut sequences into chunks for kernels of this plan."""
        self.chunk = chunk_length(self.t, self.d, self.limits.processors, plan.resident)
        self.chunks = max(1, -(-self.t // self.chunk))
        self.blocks = self.across * self.chunks * self.sequences

    def rows(self, x: Tensor | None) -> _View:
        return _NO_ROWS if x is None else _view(x, self.dtype)

    def result(self, x: _View) -> _View:
        """Memory for a result or gradient like x; zeros where segments may leave tokens unwritten."""
        if x.tensor is None:
            return x
        made = cuda.empty(x.tensor.shape, x.tensor.dtype, x.tensor)
        return _view(made if self.table is None else made.zero_(), self.dtype)

    def empty(self, *shape: int) -> Tensor:
        return cuda.empty(shape, self.like.dtype, self.like)

    def chunk_rows(self, *shape: int) -> Tensor:
        """Room for something of this shape for each chunk of each sequence."""
        return self.empty(rows_of(self.b, self.t, self.sequences, self.chunk), *shape)

    def record(
        self,
        y: _View,
        state: Tensor | None,
        ends: tuple[Tensor | None, Tensor | None],
        marks: Tensor | None,
        back: _Gradient | None = None,
    ) -> list[int]:
        """The kernels' record `Call`."""
        bits, dy = self.u.bits | self.dt.bits | self.z.bits | y.bits, _NO_ROWS
        if back is not None:
            dy = back.dy
            bits |= dy.bits | back.du.bits | back.ddt.bits | back.dz.bits
        return [
            self.b, self.t, self.d, self.g, self.n, self.chunk, self.chunks, self.sequences, *self.flags,
            int(bits % 16 == 0), int((self.B.bits | self.C.bits) % 16 == 0),
            *self.u.fields, *self.dt.fields, *self.z.fields, *y.fields, *dy.fields, *self.B.fields, *self.C.fields,
            *map(_address, (*self.parameters, self.table, state, *ends, marks)),
            *([0] * 22 if back is None else back.record()),
        ]  # fmt: skip

    def run(self, file: str, kernel: str, plan: Plan, record: list[int], blocks: int | None = None) -> None:
        library = _library(file, plan.options, self.device)
        library.launch(kernel, self.blocks if blocks is None else blocks, THREADS, plan.shared, record)

    def ends(self) -> tuple[Tensor | None, Tensor | None]:
        """Room for the state at the end of each chunk and for its summed step sizes, if there is more than one."""
        return (None, None) if self.chunks == 1 else (self.chunk_rows(self.d, self.n), self.chunk_rows(self.d))

    def scan(self, y: _View, state: Tensor | None, marks: Tensor | None) -> None:
        """The forward pass, into what is given."""
        plan = forward_plan(self.n, self.dtype, self.limits)
        self.cut(plan)
        ends = self.ends()
        record = self.record(y, state, ends, marks)
        if self.chunks > 1:
            self.run("gpu_sweep.cu", "chunk_ends", ends_plan(self.n, self.dtype, self.limits), record)
        self.run("gpu.cu", "scan_forward", plan, record)


class _Gradient:
    """What the backward kernels write, and the gradients they read."""

    def __init__(self, call: _Call, dy: Tensor, dstate: Tensor) -> None:
        self.dy = call.rows(dy)
        self.dstate = _parameter(dstate if dstate.dtype == torch.float32 else dstate.float())
        self.du, self.ddt, self.dz, self.dB, self.dC = map(call.result, (call.u, call.dt, call.z, call.B, call.C))
        self.adjoint = call.ends()
        *summed, initial = call.parameters
        self.dinitial = None if initial is None else cuda.empty(initial.shape, initial.dtype, initial)
        # Of A, D and the bias: a row for each chunk, and their sums.
        self.rows = [None if x is None else call.chunk_rows(*x.shape) for x in summed]
        self.sums = [None if x is None else cuda.empty(x.shape, x.dtype, x) for x in summed]
        self.parts = call.empty(call.across, call.b, 2, call.n, call.t)
        if call.table is not None:
            self.parts.zero_()

    def record(self) -> list[int]:
        plain = (*self.adjoint, self.dinitial, *self.rows, self.parts, *self.sums)
        return [
            _address(self.dstate), *self.du.fields, *self.ddt.fields, *self.dz.fields, *map(_address, plain),
            self.dB.fields[0], self.dC.fields[0],
        ]  # fmt: skip


def rows_of(b: int, t: int, sequences: int, length: int) -> int:
    """Rows that hold one entry for each `length` steps of each sequence."""
    return b * t // length + sequences + 1


def _across(d: int, g: int) -> int:
    """Blocks across channels; none reads two groups."""
    return (d + g * WIDTH - 1) // (g * WIDTH) * g


def kept_shape(u: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Tensor | None) -> tuple[int, ...]:
    """Shape of what `forward_kept` keeps for `backward`, float32: a state (d, n) every 64 steps (or 32).

    Nothing where the Triton kernels run.
    """
    if _instead(A, B, C) is not None:
        return (0,)
    (b, t, d), (g, n) = u.shape, B.shape[2:]
    sequences = b if segments is None else segments.shape[0]
    return rows_of(b, t, sequences, _limits(u.get_device()).mark), _across(d, g), n, WIDTH


def forward_kept(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, segments: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `forward`, and third what spares `backward` a scan, n·d·4 bytes every 64 steps."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    kept = cuda.empty(kept_shape(u, A, B, C, segments), torch.float32, u)
    if (other := _instead(A, B, C)) is not None:
        return *other.forward(*inputs), kept
    return *_forward(inputs, kept), kept


def forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, segments: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u, dt, z (b, t, d); A (d, n); B, C (b, t, g, n) -> y (b, t, d), state (n_seq, d, n)."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    if (other := _instead(A, B, C)) is not None:
        return other.forward(*inputs)
    return _forward(inputs, None)


def _forward(inputs: tuple[Any, ...], kept: Tensor | None) -> tuple[Tensor, Tensor]:
    u = inputs[0]
    with torch.cuda.device_of(u):
        call = _Call(*inputs)
        y = cuda.empty(u.shape, call.dtype, u)
        if call.table is not None:
            y.zero_()
        state = call.empty(call.sequences, call.d, call.n)
        call.scan(_view(y, call.dtype), state, kept)
    return y if y.dtype == u.dtype else y.to(u.dtype), state


def backward(
    dy: Tensor, dstate: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None,
    segments: Tensor | None, reverse: bool, kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; None where the input was None.

    kept: the third result of `forward_kept` for the same inputs; without it a forward pass makes it again.
    """
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segments, reverse)
    if (other := _instead(A, B, C)) is not None:
        return other.backward(dy, dstate, *inputs)
    with torch.cuda.device_of(u):
        call = _Call(*inputs)
        if kept is None:
            kept = call.empty(*kept_shape(u, A, B, C, segments))
            call.scan(_NO_ROWS, None, kept)
        plan = backward_plan(call.n, call.dtype, call.limits)
        call.cut(plan)
        back = _Gradient(call, dy, dstate)
        record = call.record(_NO_ROWS, None, (None, None), kept, back)
        if call.chunks > 1:
            call.run("gpu_sweep.cu", "adjoint_ends", ends_plan(call.n, call.dtype, call.limits), record)
        call.run("gpu_backward.cu", "scan_backward", _crowded(plan, call), record)
        pieces = 2 * call.b * call.g * call.n * -(-call.t // THREADS) + -(-call.d * (call.n + 2) // THREADS)
        call.run("gpu_backward.cu", "add_up", plan._replace(shared=0), record, pieces)
    du, ddt, dB, dC, dz = (x.tensor for x in (back.du, back.ddt, back.dB, back.dC, back.dz))
    dA, dD, dbias = back.sums
    grads = (du, ddt, dA, dB, dC, dD, dz, dbias, back.dinitial)
    wanted = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(
        None if g is None or x is None else g if g.dtype == x.dtype else g.to(x.dtype)
        for g, x in zip(grads, wanted, strict=True)
    )


def _crowded(plan: Plan, call: _Call) -> Plan:
    """`plan`, or the one of three blocks a multiprocessor where it saves so many rounds that its slower blocks pay."""
    crowded = backward_plan(call.n, call.dtype, call.limits, crowded=True)
    if crowded.resident <= plan.resident:
        return plan

    def rounds(resident: int) -> int:
        return -(-call.blocks // (resident * call.limits.processors))

    return crowded if 1.4 * rounds(crowded.resident) < rounds(plan.resident) else plan


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
    return _step(state, (u, dt, A, B, C, D, z, dt_bias, dt_softplus, index), False)


def step_log_A(state: Tensor, *given: Any) -> Tensor:
    """As `step`, for log(−A) in A's place."""
    return _step(state, given, True)


def _step(state: Tensor, given: tuple[Any, ...], log_A: bool) -> Tensor:
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, index = given
    if (other := _instead(A, B, C)) is not None:
        return other.step(state, u, dt, -torch.exp(A) if log_A else A, *given[3:])
    dtype = _common(u, dt, B, C, z)
    with torch.cuda.device_of(u):
        (b, d), (g, n) = u.shape, B.shape[1:]
        rows = [_view(x, dtype) for x in (u, dt)] + [_View(None, (0, 0), 0) if z is None else _view(z, dtype)]
        systems = [_view(x, dtype) for x in (B, C)]
        parameters = tuple(map(_parameter, (A, D, dt_bias)))
        index = None if index is None else index.contiguous()
        y = cuda.empty((b, d), dtype, u)
        # Four states at a time: 16 bytes of the state and of A, as many of B and C as four take.
        bits = (systems[0].bits | systems[1].bits) * (4 // dtype.itemsize) | state.data_ptr() | _address(parameters[0])
        across = -(-4 * d // THREADS)
        record = [
            b, d, g, n, across, state.shape[0], state.stride(0), int(dt_softplus),
            int(bits % 16 == n % 4 == 0), int(log_A),
            *(f for x in rows for f in x.fields), *(f for x in systems for f in x.fields),
            *map(_address, (*parameters, state, y, index)), int(index is not None and index.dtype == torch.int64),
        ]  # fmt: skip
        library = _library("gpu_step.cu", step_plan(dtype).options, u.get_device())
        library.launch("scan_step", across * -(-b // 4), THREADS, 0, record)
    return y if y.dtype == u.dtype else y.to(u.dtype)
