"""rms_norm on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py. Suffixes: d channel."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.rms_norm import gpu_kernels as kernels

DTYPES = cuda.DTYPES
#: Rows of a program, forwards and for the gradient (whose partial sums they divide).
ROWS, GRADIENT_ROWS = 1, 16
#: Rows of the gradient in flight.
STAGES = 2


def _rows(x: Tensor) -> Tensor:
    """x (…, d) -> (rows, d), the last dimension adjacent."""
    return cuda.data(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def _warps(width: int) -> int:
    """Eight numbers a thread, within what a block may have."""
    return max(1, min(16, width // 256))


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, residual (…, d), weight (d) -> y (…, d) in x's dtype, h (…, d) in `residual_dtype`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    if x.numel():
        x_in, r_in = _rows(x), None if residual is None else _rows(residual)
        (rows, d), width = x_in.shape, cuda.power_of_2(x.shape[-1])
        with cuda.on(x):
            kernels.forward[(cuda.ceil_div(rows, ROWS),)](
                x_in, r_in, cuda.plain(weight), y, h, rows, d, eps, x_in.stride(0),
                0 if r_in is None else r_in.stride(0), ROWS, width, num_warps=_warps(width),
            )  # fmt: skip
    return y, h


def backward(
    dy: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and residual (None if there was none), from the h that `forward` returned."""
    h, grads, dh = _rows(residual_out), _rows(dy), _rows(dresidual_out)
    (rows, d), width = h.shape, cuda.power_of_2(h.shape[-1])
    dx = torch.empty(dy.shape, dtype=x_dtype, device=dy.device)
    dresidual = None if residual_dtype is None else torch.empty(dy.shape, dtype=residual_dtype, device=dy.device)
    dweight = torch.empty((d,), dtype=weight.dtype, device=dy.device)
    programs = cuda.ceil_div(rows, GRADIENT_ROWS)
    partial = torch.empty((programs, d), dtype=torch.float32, device=dy.device)
    with cuda.on(dy):
        if h.numel():
            kernels.backward[(programs,)](
                h, grads, dh, cuda.plain(weight), dx, dresidual, partial, rows, d, eps, h.stride(0), grads.stride(0),
                dh.stride(0), GRADIENT_ROWS, width, STAGES, num_warps=_warps(width),
            )  # fmt: skip
        if d:
            shared.reduce[(cuda.ceil_div(d, 32), 1)](partial, dweight, None, programs, d, 1, 1, 32, 32)
    return dx, dweight, dresidual
