"""cross_entropy in C++: the same functions as reference.py, over the kernels of cpu.cpp. Suffixes: r row, v column."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native


def _rows(logits: Tensor) -> tuple[int, int, int, int, int]:
    """Fields of logits (r, v): rows, threads, address, dtype, stride."""
    return logits.shape[0], torch.get_num_threads(), logits.data_ptr(), native.DTYPES[logits.dtype], logits.stride(0)


def _real(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def forward(logits: Tensor, targets: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """logits (r, v), targets (r) -> loss (r), log Σ exp (r), 0 where ignored; both float32 (float64)."""
    x, places = native.data(logits), targets.to(torch.int64).contiguous()
    loss, log_sum = (torch.empty(logits.shape[:1], dtype=_real(logits)) for _ in range(2))
    where = (classes, logits.shape[1], places.data_ptr(), ignore_index)
    native.call("cross_entropy_forward", (*_rows(x), *where, loss.data_ptr(), log_sum.data_ptr(), 0, 0))
    return loss, log_sum


def backward(
    dloss: Tensor, logits: Tensor, log_sum: Tensor, targets: Tensor, classes: int, ignore_index: int
) -> Tensor:
    """The gradient of logits (r, v), from the log Σ exp that `forward` returned."""
    x, places = native.data(logits), targets.to(torch.int64).contiguous()
    given, total = (native.parameter(v, _real(logits)) for v in (dloss, log_sum))
    dlogits = torch.empty(logits.shape, dtype=native.out_dtype(logits.dtype))
    where = (classes, logits.shape[1], places.data_ptr(), ignore_index)
    fields = (given.data_ptr(), total.data_ptr(), *native.output(dlogits))
    native.call("cross_entropy_backward", (*_rows(x), *where, *fields))
    return dlogits if dlogits.dtype == logits.dtype else dlogits.to(logits.dtype)
