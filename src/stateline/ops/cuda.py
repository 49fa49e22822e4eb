"""How tensors reach GPU kernels: layouts they read, where sequences are cut, launches on the right device, graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

#: What kernels compute in float32; wider data goes to the reference.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

Grid = tuple[int, int, int]
P = ParamSpec("P")
T = TypeVar("T")


def data(x: Tensor) -> Tensor:
    """`x` as kernels read data: the last dimension adjacent."""
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def plain(x: Tensor | None) -> Tensor | None:
    """`x` as kernels read parameters and states: contiguous."""
    return None if x is None else (x.resolve_neg() if x.is_neg() else x).contiguous()


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory for a result, where `like` is. Every buffer that a kernel writes comes from here: tests fence them."""
    return like.new_empty(shape, dtype=dtype)


def tokens(x: Tensor, segments: Tensor | None) -> Tensor:
    """Memory for a result like x (b, t, d), contiguous; zeros where segments may leave tokens unwritten."""
    y = empty(x.shape, x.dtype, x)
    return y if segments is None else y.zero_()


def paste(place: Tensor, x: Tensor) -> None:
    """Copy x into a part of wider rows, in pieces of eight bytes where they fit, which is twice as fast."""
    numbers = 8 // x.element_size()
    fits = x.is_contiguous() and not any(n % numbers for n in (x.shape[-1], x.storage_offset(), place.storage_offset()))
    if x.dtype == place.dtype and fits and not any(n % numbers for n in place.stride()[:-1]):
        place, x = place.view(torch.int64), x.view(torch.int64)
    place.copy_(x)


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Record what is launched inside as `graph`, on `stream` and with the memory of `pool`, as `torch.cuda.graph` does.

    A capture that fails leaves PyTorch's random generator waiting for its end, and every later draw on the device is
    refused; one that succeeds, here of a single launch, ends that. The failure itself is raised.
    """
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=stream.device)
        raise


class _NotCompiledError(Exception):
    """A kernel is wanted that has not been compiled, where those should be compiled side by side."""


class _Launching(threading.local):
    """What a launch of this thread does. held: inside `side_by_side`.   jobs: if not None, kernels to compile go there,
    (device, what Triton promises), and nothing is launched."""

    held = False
    jobs: list[tuple[int, Any]] | None = None


_launching = _Launching()


def side_by_side(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that launches several kernels: those not compiled yet are compiled at once, in threads.

    Nearly all of the compiler's time is spent outside Python. The function is begun again after it met such a kernel,
    so it must change nothing but memory of its own.
    """

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        if _launching.held:
            return function(*args, **named)
        _launching.held = True
        try:
            return function(*args, **named)
        except _NotCompiledError:
            pass
        finally:
            _launching.held = False
        _compile(lambda: function(*args, **named))
        return function(*args, **named)

    return run


def _compile(launches: Callable[[], object]) -> None:
    """Compile the kernels that `launches` wants, launching none. Errors are left to the launch that meets them."""
    import triton

    with ThreadPoolExecutor() as pool:
        _launching.jobs = []
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            try:
                launches()
            finally:
                jobs, _launching.jobs = _launching.jobs, None
            loads = [pool.submit(_load, job) for job in jobs]  # each when it is compiled, behind all that compile
        for load in loads:
            load.result()


def _load(job: tuple[int, Any]) -> None:
    """Load a compiled kernel, for which Triton builds a small library."""
    device, promised = job
    kernel = promised.result(ignore_errors=True) if hasattr(promised, "result") else promised
    if kernel is not None:
        with torch.cuda.device(device):
            kernel.run  # noqa: B018  # a property, which loads


class Kernel:
    """A Triton kernel that costs the host little to launch.

    Triton looks at every argument of every call to find the variant compiled for it; here a variant is found by what
    matters to these kernels: dtypes, alignment, and the constants. The first argument decides the device.

    registers: the most a thread may have, so that more programs fit on a multiprocessor; 0: as many as it takes.
    """

    def __init__(self, function: Any, registers: int = 0) -> None:
        self._function = function
        self._options = {"maxnreg": registers} if registers else {}
        self._variants: dict[tuple[object, ...], Any] = {}

    def __call__(self, grid: Grid, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int) -> None:
        """Launch on the current stream of the device of `arguments[0]`, where every other tensor is too."""
        device = arguments[0].get_device()
        if device < 0:  # Triton's interpreter, in tests
            self._function[grid](*arguments, *constants)
        elif device == torch.cuda.current_device():
            self._launch(device, grid, arguments, constants, warps)
        else:
            with torch.cuda.device(device):
                self._launch(device, grid, arguments, constants, warps)

    def _launch(self, device: int, grid: Grid, arguments: Any, constants: Any, warps: int) -> None:
        kinds: list[object] = [device, warps, constants]
        plain = []  # addresses instead of tensors, which Triton would look up with the driver one by one
        for x in arguments:
            if x is None or isinstance(x, float):
                kinds.append(x is None)
            elif isinstance(x, int):
                kinds.append((x == 1, x % 16 == 0, x >= 2**31))
            else:
                kinds.append(x.dtype)
                x = x.data_ptr()
                kinds.append(x % 16 == 0)
            plain.append(x)
        key = tuple(kinds)  # all that Triton compiles a variant for
        variant = self._variants.get(key)
        if _launching.jobs is not None:
            if variant is None:
                promised = self._function.warmup(*arguments, *constants, grid=grid, num_warps=warps, **self._options)
                _launching.jobs.append((device, promised))
        elif variant is None:
            if _launching.held:
                raise _NotCompiledError
            self._variants[key] = self._function[grid](*arguments, *constants, num_warps=warps, **self._options)
        else:
            variant[grid](*plain, *constants)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(x: int) -> int:
    """The least power of two that is not below x, at least 1."""
    return 1 << max(x - 1, 0).bit_length()


@dataclass(frozen=True)
class Runs:
    """Time cut into runs of equal length, anchored where each sequence starts.

    count: programs that cover all of them.   each: runs of a whole row (without a table).
    table, tiles: None, or the sequences (n_seq, 3) and for each program its sequence (-1: none) and run (count, 2),
        int64, found on the device: no value is read back.
    firsts: the program of each sequence's first run, (n_seq), if there is a table; its others follow.
    """

    count: int
    each: int
    table: Tensor | None = None
    tiles: Tensor | None = None
    firsts: Tensor | None = None


def run_count(b: int, t: int, steps: int, sequences: int | None) -> int:
    """Of how many programs there have to be for `runs`; sequences: rows of its table, None without one."""
    return b * max(1, ceil_div(t, steps)) if sequences is None else (b * (t // steps) + sequences if sequences else 0)


def runs(segments: Tensor | None, b: int, t: int, steps: int) -> Runs:
    """Runs of `steps` of (b, t); an empty sequence has one too, since it passes its state on."""
    each = max(1, ceil_div(t, steps))
    if segments is None:
        return Runs(run_count(b, t, steps, None), each)
    segments = segments.contiguous()
    needed = ((segments[:, 2] - segments[:, 1] + (steps - 1)) // steps).clamp(min=1)
    ends = needed.cumsum(0)
    count = run_count(b, t, steps, segments.shape[0])
    program = torch.arange(count, device=segments.device)
    sequence = torch.searchsorted(ends, program, right=True)
    if not segments.shape[0]:
        return Runs(0, each, segments, torch.empty(0, 2, dtype=torch.int64, device=segments.device), ends)
    used = sequence < segments.shape[0]
    nearest = sequence.clamp(max=segments.shape[0] - 1)
    firsts = ends - needed
    run = program - firsts[nearest]
    return Runs(count, each, segments, torch.stack([sequence.where(used, -1), run], 1), firsts)
