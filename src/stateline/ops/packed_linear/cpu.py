"""packed_linear in C++: the same function as reference.py, over the kernel of cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.packed_linear.pack import FORMATS


def fields(
    data: Tensor, scales: Tensor, bias: Tensor | None, format: str, rows: int, columns: int
) -> tuple[int, int, int, int, int, int]:
    """A packed matrix as kernels read it."""
    return data.data_ptr(), scales.data_ptr(), native.pointer(bias), FORMATS.index(format), rows, columns


def forward(
    x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    """x (m, columns) -> y (m, rows) in x's dtype."""
    given = native.data(x)
    y = torch.empty(x.shape[0], rows, dtype=native.out_dtype(x.dtype))
    matrix = fields(data, scales, bias, format, rows, columns)
    where = (x.shape[0], torch.get_num_threads())
    native.call(
        "packed_linear",
        (*matrix, *where, given.data_ptr(), native.DTYPES[given.dtype], given.stride(0), *native.output(y), rows),
    )
    return y.to(x.dtype)
