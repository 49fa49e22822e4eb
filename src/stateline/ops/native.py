"""How tensors reach the C++ kernels: one packed record of pointers, strides and sizes for each call.

The records are declared in the kernels' sources, field for field, eight bytes each. Tensors must outlive the call: keep
them in a local variable.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from stateline.backends import load_native

#: As native/tile.h numbers them. Other dtypes are computed in float32.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_BITS_OF_DOUBLE = struct.Struct("=d"), struct.Struct("=q")
ABSENT2, ABSENT4 = (0, 0), (0, 0, 0, 0)

_PROBLEMS = {
    -1: (RuntimeError, "no instruction set was chosen when the library was loaded"),
    1: (MemoryError, "no scratch memory"),
    2: (ValueError, "a segment lies outside the tensor; lengths or cu_seqlens hold wrong values"),
    3: (ValueError, "index points beyond the state's rows"),
}


@functools.cache
def _kernel(name: str) -> Callable[[bytes], int]:
    kernel = getattr(load_native(), f"sl_{name}")
    kernel.restype = ctypes.c_int
    kernel.argtypes = [ctypes.c_char_p]
    return kernel


@functools.cache
def record(count: int) -> Callable[..., bytes]:
    """A function that packs `count` integers."""
    return struct.Struct(f"={count}q").pack


def call(name: str, fields: tuple[int, ...]) -> None:
    """Run a kernel on its record; its complaints become exceptions."""
    status = _kernel(name)(record(len(fields))(*fields))
    if status:
        error, what = _PROBLEMS[status]
        raise error(f"{name}: {what}.")


def double_bits(x: float) -> int:
    """The bits of a double, to travel in a record of integers."""
    as_double, as_integer = _BITS_OF_DOUBLE
    return as_integer.unpack(as_double.pack(x))[0]


def large_pages(memory: Tensor) -> None:
    """Ask for large pages under memory that was just allocated and not yet touched."""
    advise = load_native().sl_large_pages
    advise.restype, advise.argtypes = None, [ctypes.c_void_p, ctypes.c_int64]
    advise(memory.data_ptr(), memory.numel() * memory.element_size())


def data(x: Tensor) -> Tensor:
    """`x` as kernels read data: a dtype they know, the last dimension adjacent."""
    if x.dtype not in DTYPES:
        x = x.float()
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def parameter(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as kernels read parameters and states: compute precision, contiguous."""
    if x.dtype is not dtype:
        x = x.to(dtype)
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    return x if x.is_contiguous() else x.contiguous()


def optional_parameter(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`parameter`, or None."""
    return None if x is None else parameter(x, dtype)


def pointer(x: Tensor | None) -> int:
    """Address of a tensor, 0 if there is none."""
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """Fields of a (b, t, d) tensor, or of a (b, d) one as a single step."""
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1) if x.dim() == 3 else 0


def output(x: Tensor | None) -> tuple[int, int]:
    """Fields of a contiguous result."""
    return ABSENT2 if x is None else (x.data_ptr(), DTYPES[x.dtype])


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes a result that is wanted in `dtype`."""
    return dtype if dtype in DTYPES else torch.float32


def empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, segments: Tensor | None = None) -> Tensor:
    """Memory for a result; zeros where segments may leave tokens unwritten."""
    return torch.empty(shape, dtype=dtype) if segments is None else torch.zeros(shape, dtype=dtype)


def table(segments: Tensor | None, batch: int, reverse: bool) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """Segments as kernels read them (keep it alive), and the fields table, count, reverse, threads."""
    if segments is None:
        return None, (0, batch, reverse, torch.get_num_threads())
    segments = segments.contiguous()
    return segments, (segments.data_ptr(), segments.shape[0], reverse, torch.get_num_threads())


def slots(index: Tensor | None) -> Tensor | None:
    """Slot numbers of a step form as kernels read them."""
    return None if index is None else index.to(torch.int64).contiguous()
