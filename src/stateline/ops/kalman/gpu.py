"""kalman in CUDA C++ (gpu.cu, gpu_common.cu, gpu_backward.cu), compiled at first use: the functions of reference.py.

A thread computes one series, or several lanes do where its numbers do not fit in one (gpu_plan.py); its bits depend on
no other. Whether all series miss the same entries, only y tells, and nothing is read back from a GPU. So where matrices
are one for all and a thread computes a series, a warp computes the covariances of the first series,
and warps of others look for themselves whether these are theirs: as long as they are, they take them (gpu_common.cu),
and else go on by themselves (gpu.cu), with the same bits. Results hold a covariance of each series all the same, unless
the caller says `shared`.

Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stateline.ops import cuda, nvrtc
from stateline.ops.kalman import gpu_plan, reference
from stateline.ops.kalman.reference import DROPPED, RESULTS

DTYPES = frozenset({torch.float32, torch.float64})
#: As in the sources: series of a warp, each of which is a block.
LANES = 32
#: Bytes of a series that a warp moves at a time, at least, where they lie series by series: what memory moves at once.
LINE = 32
#: The same where a warp does little else.
LONG_LINE = 128
#: How many times further each part of the steps goes at whose ends series tell whether they share covariances still.
FURTHER = 4
_DIMS = (1, 2, 2, 2, 2, 1, 1)  # adjacent dimensions of y, A, C, Q, R, b, d


def problem(y: object = None, A: object = None, C: object = None, *rest: object) -> str | None:
    """Why the kernels do not cover such a system, or None. rest: what else the operation takes, its form among it."""
    if "sqrt" in [v for v in rest if isinstance(v, str)] or any(hasattr(v, "factor") for v in rest):
        return 'its GPU kernels compute form="joseph"; square roots are those of the reference.'
    if isinstance(y, Tensor) and isinstance(C, Tensor) and (why := _too_large(y, *C.shape[-2:])):
        return why
    if isinstance(y, Tensor) and y.is_cuda and (why := nvrtc.problem(y.get_device())):
        return f"its GPU kernels cannot be compiled here: {why.rstrip('.')}."
    return None


def detail(y: object = None, A: object = None, C: object = None, *rest: object) -> str:
    """Whether a thread computes a series or several lanes do, in the filter and in its gradient."""
    if not isinstance(y, Tensor) or not isinstance(C, Tensor):
        return ""
    v = Variant(C.shape[-1], C.shape[-2], y.dtype.itemsize, False)
    rows, columns = gpu_plan.lanes(v)
    filtering, gradient = (
        f"{rows * columns} lanes a series" if gpu_plan.takes(file, v) else "a thread a series"
        for file in (gpu_plan.FORWARD, gpu_plan.BACKWARD)
    )
    return filtering if filtering == gradient else f"{filtering}, in the gradient {gradient}"


def _too_large(y: Tensor, m: int, n: int) -> str | None:
    """Why a system of that size has no room in a block of the device of y, or None."""
    system = f"the system has {n} states and {m} observed values"
    if max(n, m) > gpu_plan.MOST:
        return f"{system}, its GPU kernels know up to {gpu_plan.MOST} of each."
    need, have = gpu_plan.room(gpu_plan.BACKWARD, Variant(n, m, y.dtype.itemsize, True)), _block_room(y.get_device())
    if need > have and max(n, m) >= gpu_plan.FEWEST[gpu_plan.BACKWARD][y.dtype.itemsize]:
        kind = str(y.dtype).removeprefix("torch.")
        return f"{system} of {kind}, which take {need} bytes of shared memory where a block of this device has {have}."
    return None


@functools.cache
def _block_room(device: int) -> int:
    """Bytes of shared memory that a block may have; without a device, of those kernels are tuned for."""
    if device < 0:
        return gpu_plan.SHARED - gpu_plan.KEPT
    of: Any = torch.cuda.get_device_properties(device)
    return int(of.shared_memory_per_block_optin)


# ---- compiling -------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What a kernel is compiled for: sizes, bytes of a number, whether anything of the system is one series' alone."""

    n: int
    m: int
    size: int
    own: bool


def source(file: str) -> str:
    """A kernel file with what both share in front."""
    if file in gpu_plan.FEWEST:
        return gpu_plan.source(file)
    folder = importlib.resources.files("stateline.ops.kalman")
    forward = () if file == "gpu_backward.cu" else ("gpu_record.cuh", "gpu_filter.cuh")
    ahead = ("gpu_matrix.cuh", "gpu_stage.cuh", *forward)
    return "".join((folder / part).read_text() for part in (*ahead, file))


def options(file: str, v: Variant) -> tuple[str, ...]:
    """What a source is compiled with for a variant."""
    if file in gpu_plan.FEWEST:
        return gpu_plan.options(file, v)
    back, wide = file == "gpu_backward.cu", max(v.n, v.m) * v.size
    warps = 8 if back or wide > 16 else 16 if wide > 8 else 28  # of a multiprocessor (timings: benchmarks/NOTES.md)
    room = backward_room(v) if back else forward_room(v)[1]
    line = LINE
    more: tuple[str, ...] = ()
    if file == "gpu_common.cu":
        lead, room, _ = common_rooms(v)
        line, more = LONG_LINE, (f"-DLEAD={lead}",)
        warps = 8 if wide > 32 else 12 if wide > 16 else 24 if wide > 8 else 28
    return (
        f"-DSTATES={v.n}", f"-DOBSERVED={v.m}", f"-DNUMBER={'double' if v.size == 8 else 'float'}", f"-DOWN={v.own:d}",
        f"-DLINE={line}", f"-DWARPS={warps}", f"-DROOM={room}", *more, "--fmad=false",
    )  # fmt: skip


@functools.cache
def library(file: str, variant: Variant, device: int) -> nvrtc.Library:
    """The kernels of a file on a device, whose context is current."""
    return nvrtc.Library(source(file), options(file, variant), device)


def _after(offset: int, count: int, align: int) -> int:
    """Where a field of `count` bytes ends."""
    return -(-offset // align) * align + count


def _row(offset: int, count: int, steps: int, size: int) -> int:
    """Where 32 rows of `count` numbers a step end, an odd number of pieces apart."""
    piece = next(bytes_ for bytes_ in (16, 8, size) if count * size % bytes_ == 0)
    return _after(offset, LANES * (count * size // piece * steps | 1) * piece, piece)


def _steps(count: int, size: int, line: int) -> int:
    """Steps of `count` numbers in a run."""
    return 1 if count * size >= line else 2 * _steps(2 * count, size, line)


def _stage(offset: int, count: int, size: int, line: int = LINE) -> int:
    """Where a `Stage` of `count` numbers ends."""
    return _row(offset, count, _steps(count, size, line), size)


def _part(offset: int, count: int, v: Variant, own: bool = True) -> int:
    """Where a `Part` of `count` numbers ends; not `own`: of all lanes, whatever the variant."""
    return _after(offset, -(-count * v.size * (LANES if v.own and own else 1) // 16) * 16, 16)


@functools.cache
def forward_room(v: Variant) -> tuple[int, int]:
    """Bytes of shared memory of a warp of gpu.cu, without predicted moments and with them."""
    n, m, end = v.n, v.m, 0
    for count in (n * n, n * n, m * n, m * m, n, m):
        end = _part(end, count, v)
    filtered = _row(_stage(_after(end, LANES * 8, 8), m, v.size), n * n, 1, v.size)
    return _after(filtered, 0, 16), _after(_row(filtered, n * n, 1, v.size), 0, 16)


def _gain_size(v: Variant) -> int:
    """Bytes of a `Gain`."""
    return _after((v.n * v.m + v.m * v.m + 2 * v.m + 2) * v.size + 4, 0, 16)


def common_size(v: Variant) -> int:
    """Bytes of a `Common`, a step of covariances that series share."""
    return _after(_gain_size(v) + 2 * v.n * v.n * v.size, 0, 16)


@functools.cache
def common_rooms(v: Variant) -> tuple[int, int, int]:
    """Bytes of shared memory of warps of gpu_common.cu that lead, follow, and spread covariances."""
    n, m, lead, follow = v.n, v.m, 0, 0
    for count in (n * n, n * n, m * n, m * m):
        lead = _part(lead, count, v, own=False)
    lead += 4 * LANES
    for count in (n * n, n * n, n * n, n * m, m * n, m * n, m * m, n * n):
        lead = _part(lead, count, v, own=False)
    for count, own in ((n * n, False), (m * n, False), (n, True), (m, True)):
        follow = _part(follow, count, v, own)
    follow += _steps(m, v.size, LONG_LINE) * _gain_size(v)
    spread = 2 * n * n * v.size + 8 * LANES
    return lead, _after(_stage(follow, m, v.size, LONG_LINE), 0, 16), _after(spread, 0, 16)


@functools.cache
def backward_room(v: Variant) -> int:
    """Bytes of shared memory of a warp of gpu_backward.cu."""
    n, m, end = v.n, v.m, 0
    for count in (n * n, m * n, m * m, m):
        end = _part(end, count, v)
    for count in (m, m, 1, n, n * n):
        end = _stage(end, count, v.size)
    return _after(_after(end, LANES * (max(n, m) ** 2 | 1) * v.size, v.size), 0, 16)


# ---- operands --------------------------------------------------------------------------------------------------------


class _System:
    """y, A, C, Q, R, b, d as kernels read them, kept alive.

    views: for each its address and the elements between series and between steps.   times, rows: bits of A, C, Q, R, b,
    d (1, 2, 4 …) that vary in time, and that each series has of its own.
    """

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        self.used: list[Tensor | None] = []
        self.views: list[tuple[int, int, int]] = []
        self.times = self.rows = 0
        for i, (v, dims) in enumerate(zip(given, _DIMS, strict=True)):
            if v is not None:
                v = v if v[:1, :1].is_contiguous() and not v.is_neg() else cuda.plain(v)
                assert v is not None
                assert v.dim() == dims + 2
                self.times |= (1 << i - 1) if i and v.shape[1] > 1 else 0
                self.rows |= (1 << i - 1) if i and v.shape[0] > 1 else 0
            self.used.append(v)
            self.views.append(_view(v))
        y, C = given[0], given[2]
        assert y is not None
        assert C is not None
        self.like, self.device = y, y.get_device()
        self.variant = Variant(C.shape[-1], C.shape[-2], y.dtype.itemsize, any(s for _, s, _ in self.views[1:]))

    def launch(self, file: str, record: Sequence[int], *kernels: tuple[str, int, int]) -> None:
        """Run kernels of a file one after the other: name, blocks, bytes of shared memory."""
        with torch.cuda.device_of(self.like):
            there = library(file, self.variant, self.device)
            threads = gpu_plan.threads(self.variant) if file in gpu_plan.FEWEST else LANES
            for name, blocks, shared in kernels:
                there.launch(name, blocks, threads, shared, record)


def _view(v: Tensor | None) -> tuple[int, int, int]:
    """Address and strides over series and steps; 0 where there is one for all."""
    if v is None:
        return 0, 0, 0
    shape, strides = v.shape, v.stride()
    return v.data_ptr(), strides[0] if shape[0] > 1 else 0, strides[1] if shape[1] > 1 else 0


def _rows(cov: Tensor) -> Tensor:
    """Matrices (·, …, n, n) with adjacent entries; rows that are one in memory stay so."""
    return cov if cov.stride(0) == 0 and cov[0].is_contiguous() and not cov.is_neg() else cuda.plain(cov)  # type: ignore[return-value]  # a tensor is given


def _pieces(v: Tensor, dims: int) -> Tensor:
    """`v` (·, ·, …) with `dims` adjacent dimensions, for reading 16 bytes at a time."""
    fits = v[:1, :1].is_contiguous() and not v.is_neg() and v.data_ptr() % 16 == 0
    whole = v.shape[-1] ** dims
    if fits and not any(v.stride(i) % whole for i in (0, 1)):
        return v
    return v.resolve_neg().clone(memory_format=torch.contiguous_format)


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


# ---- the functions ---------------------------------------------------------------------------------------------------


def forward(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean0: Tensor,
    cov0: Tensor, *, form: str, keep: str, shared: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """mean (N, T, n), cov (s, T, n, n), predicted_mean, predicted_cov, loglik (N, T), mean_next (N, n), cov_next
    (s, n, n), info; None for what `keep` leaves out. A series that fails has NaN from there on."""
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n), (N, T), (N, n), (s, n, n))
    out = [
        None if name in DROPPED[keep] else cuda.empty(shape, y.dtype, y) if "next" in name else _steps_first(shape, y)
        for name, shape in zip(RESULTS, shapes, strict=True)
    ]
    if not y.numel():
        for v, start in zip(out[5:], (mean0, (cov0 + cov0.mT) / 2), strict=True):
            assert v is not None
            v.copy_(start)
        return (*out, torch.full((3,), -1, device=y.device))
    return (*out, _run((y, A, C, Q, R, b, d), mean0, cov0, None, out, keep, shared))


def _steps_first(shape: tuple[int, ...], y: Tensor) -> Tensor:
    """Memory for moments (s, T, …) that lie step by step."""
    s, T, *rest = shape
    return cuda.empty((T, s, *rest), y.dtype, y).transpose(0, 1)


def _run(
    given: Sequence[Tensor | None], mean0: Tensor, cov0: Tensor, index: Tensor | None, out: Sequence[Tensor | None],
    keep: str, shared: bool,
) -> Tensor:  # fmt: skip
    """Launch over y, A, C, Q, R, b, d into the seven results; info."""
    system = _System(given)
    y, mean0, cov0, index = system.like, cuda.plain(mean0), _rows(cov0), cuda.plain(index)  # type: ignore[assignment]  # given
    wide, steps = gpu_plan.takes(gpu_plan.FORWARD, system.variant), y.shape[1]
    blocks = cuda.ceil_div(y.shape[0], gpu_plan.series(system.variant) if wide else LANES)
    alone = wide or index is not None or not may_be_common(system.variant, system.views, *y.shape[:2])
    ends = () if alone else _parts(steps)
    failed = cuda.empty((blocks + 3,), torch.int64, y)
    record = [
        y.shape[0], y.shape[1], *(x for view in system.views for x in view),
        mean0.data_ptr(), mean0.stride(0), 0, cov0.data_ptr(), cov0.stride(0) if cov0.shape[0] > 1 else 0, 0,
        _address(index), index is not None and index.dtype == torch.int64, shared, system.times,
        *map(_address, out), failed.data_ptr(), *[0] * 7,
    ]  # fmt: skip
    if ends:
        common = cuda.empty((steps + 1, common_size(system.variant) // y.dtype.itemsize), y.dtype, y)
        marks = cuda.empty((blocks + 2 + len(ends),), torch.int64, y)
        record[-7:-3] = common.data_ptr(), *(marks.data_ptr() + 8 * i for i in (0, blocks, blocks + 2))
        lead, follow, spread = common_rooms(system.variant)
        for i, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
            record[-3:] = begin, end, i
            kernels = ("kalman_lead", 1, lead), ("kalman_follow", blocks, follow)
            system.launch("gpu_common.cu", record, *kernels)
        record[-3] = steps if keep == "loglik" else 0
        parts = 1 if shared else cuda.ceil_div(blocks, LANES)
        system.launch("gpu_common.cu", record, ("kalman_spread", (steps + 1 - record[-3]) * parts, spread))
    file, room, threads = "gpu.cu", forward_room(system.variant)[keep in ("all", "predicted")], LANES
    if wide:
        file, threads = gpu_plan.FORWARD, gpu_plan.threads(system.variant)
        room = gpu_plan.room(file, system.variant)
    system.launch(file, record, ("kalman_forward", blocks, room), ("first_failure", 1, threads * 8))
    return failed[blocks:]


def may_be_common(v: Variant, views: Sequence[tuple[int, int, int]], series: int, steps: int) -> bool:
    """Whether to look for series that share covariances. views: address and strides of y, A, C, Q, R, b, d.

    Not so for one or two states, whose covariances are computed about as fast as they are read, nor for few steps.
    """
    one = not any(rows for _, rows, _ in views[1:5])
    address, *strides = views[0]
    piece = next(size for size in (16, 8, v.size) if v.m * v.size % size == 0)
    aligned = not any(x % piece for x in (address, *(v.size * s for s in strides)))
    return one and aligned and v.n > 2 and series > 1 and steps >= LANES


def _parts(steps: int) -> tuple[int, ...]:
    """Where each part of the steps ends. First ones are short, for series that share nothing."""
    ends = [LANES]
    while ends[-1] < steps:
        ends.append(FURTHER * ends[-1])
    return (*ends[:-1], steps)


def backward(
    grads: tuple[Tensor | None, ...], y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None,
    d: Tensor | None, mean0: Tensor, cov0: Tensor, predicted_mean: Tensor, predicted_cov: Tensor, *, shared: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of y, A, C, Q, R, b, d, mean0, cov0 in their own shapes, None where there was no b or d, from those of
    the seven results of `forward` (None: zero)."""
    given = (y, A, C, Q, R, b, d, mean0, cov0)
    if not y.numel():
        return reference.backward(grads, *given, predicted_mean, predicted_cov, shared=shared)
    system = _System(given[:7])
    wide = gpu_plan.takes(gpu_plan.BACKWARD, system.variant)
    blocks = cuda.ceil_div(y.shape[0], gpu_plan.series(system.variant) if wide else LANES)
    n, shapes = mean0.shape[1], [y.shape]
    for v in given[1:7]:
        rows = blocks if v is None or v.shape[0] == 1 else v.shape[0]
        shapes.append(torch.Size((0,) if v is None else (rows, *v.shape[1:])))
    shapes += [torch.Size((y.shape[0], n)), torch.Size((y.shape[0], n, n))]
    parts = [None if v is None else cuda.empty(shape, y.dtype, y) for v, shape in zip(given, shapes, strict=True)]
    before = _pieces(predicted_mean, 1), _pieces(predicted_cov, 2)
    dloglik = grads[4].resolve_neg() if grads[4] is not None else None
    slopes = [cuda.plain(g) for i, g in enumerate(grads) if i != 4]
    record = [
        y.shape[0], y.shape[1], *(x for i in (0, 1, 2, 4, 6) for x in system.views[i]),
        *(x for v in (*before, dloglik) for x in _view(v)), *map(_address, slopes), *map(_address, parts),
        shared, system.times, system.rows,
    ]  # fmt: skip
    file = gpu_plan.BACKWARD if wide else "gpu_backward.cu"
    room = gpu_plan.room(file, system.variant) if wide else backward_room(system.variant)
    system.launch(file, record, ("kalman_backward", blocks, room))
    return tuple(
        None if v is None or part is None else part if part.shape == v.shape else part.sum(0, keepdim=True)
        for v, part in zip(given, parts, strict=True)
    )


def step(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean: Tensor,
    cov: Tensor, index: Tensor | None, *, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One observation y (b, m), in place: filtered mean (b, n), cov (b, n, n), loglik (b), and info as of `forward`.

    A (·, n, n), C (·, m, n), Q, R, b (·, n), d (·, m): the first dimension is that of y or 1. index (b) picks rows of
    mean and cov, a negative one skips. A series that fails has a state of NaN.
    """
    rows, n = y.shape[0], mean.shape[1]
    made = [cuda.empty(shape, y.dtype, y) for shape in ((rows, n), (rows, n, n), (rows,))]
    if not rows:
        return made[0], made[1], made[2], torch.full((3,), -1, device=y.device)
    system = [None if v is None else v[:, None] for v in (y, A, C, Q, R, b, d)]
    covs = cov if cov.data_ptr() % 16 == 0 else cov.clone()  # is written 16 bytes at a time
    out = [made[0], made[1], None, None, made[2], mean, covs]
    info = _run(system, mean, covs, index, out, "filtered", False)
    if covs is not cov:
        cov.copy_(covs)
    return made[0], made[1], made[2], info
