"""cross_entropy on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py. Suffixes: r row."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops.cross_entropy import gpu_kernels as kernels

DTYPES = cuda.DTYPES
_forward, _backward = map(cuda.Kernel, (kernels.forward, kernels.backward))
#: Columns of a row that are worked on at once; a row's numbers stay in the cache until its gradient is taken, or not.
COLUMNS = 4096


def _plan(columns: int) -> tuple[int, int]:
    """Columns at once, and warps with 16 of them a thread."""
    width = min(COLUMNS, cuda.power_of_2(columns))
    return width, max(1, min(16, width // 512))


def forward(logits: Tensor, targets: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logits (r, v), targets (r) -> loss (r), log Σ exp (r), 0 where ignored; both float32."""
    rows = logits.shape[0]
    loss, log_sum = (cuda.empty((rows,), torch.float32, logits) for _ in range(2))
    if rows:
        x, columns = cuda.data(logits), targets.contiguous()
        width, warps = _plan(classes)
        arguments = (x, columns, loss, log_sum, classes, ignore_index, x.stride(0))
        _forward((rows, 1, 1), arguments, (width,), warps)
    return loss, log_sum


def backward(
    dloss: Tensor, logits: Tensor, log_sum: Tensor, targets: Tensor, classes: int, ignore_index: int
) -> Tensor:
    """The gradient of logits (r, v), from the log Σ exp that `forward` returned."""
    rows, columns = logits.shape
    dlogits = cuda.empty(logits.shape, logits.dtype, logits)
    if dlogits.numel():
        x, places, given = cuda.data(logits), targets.contiguous(), dloss.contiguous()
        width, warps = _plan(columns)
        arguments = (given, x, log_sum, places, dlogits, classes, columns, ignore_index, x.stride(0))
        _backward((rows, cuda.ceil_div(columns, width), 1), arguments, (width,), warps)
    return dlogits
