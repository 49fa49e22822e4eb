"""rms_norm on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py. Suffixes: d channel."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.rms_norm import gpu_kernels as kernels

DTYPES = cuda.DTYPES
_forward, _backward, _reduce = map(cuda.Kernel, (kernels.forward, kernels.backward, shared.reduce))
_gated_forward, _gated_backward = map(cuda.Kernel, (kernels.gated_forward, kernels.gated_backward))
#: Rows of a program of the gradient, which divide the number of partial sums.
GRADIENT_ROWS = 16


def _rows(x: Tensor) -> Tensor:
    """x (…, d) -> (rows, d), the last dimension adjacent."""
    return cuda.data(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def _warps(width: int) -> int:
    """Sixteen numbers a thread, within what a block may have."""
    return max(1, min(16, width // 512))


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, residual (…, d), weight (d) -> y (…, d) in x's dtype, h (…, d) in `residual_dtype`."""
    y = cuda.empty(x.shape, x.dtype, x)
    h = cuda.empty(x.shape, residual_dtype, x)
    if x.numel():
        x_in, r_in = _rows(x), None if residual is None else _rows(residual)
        (rows, d), width = x_in.shape, cuda.power_of_2(x.shape[-1])
        strides = x_in.stride(0), 0 if r_in is None else r_in.stride(0)
        arguments = (x_in, r_in, cuda.plain(weight), y, h, d, eps, *strides)
        _forward((rows, 1, 1), arguments, (width,), _warps(width))
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
    dx = cuda.empty(dy.shape, x_dtype, dy)
    dresidual = None if residual_dtype is None else cuda.empty(dy.shape, residual_dtype, dy)
    dweight = cuda.empty((d,), weight.dtype, dy)
    programs = cuda.ceil_div(rows, GRADIENT_ROWS)
    partial = cuda.empty((programs, d), torch.float32, dy)
    if h.numel():
        arguments = (h, grads, dh, cuda.plain(weight), dx, dresidual, partial, rows, d, eps)
        strides = (h.stride(0), grads.stride(0), dh.stride(0))
        _backward((programs, 1, 1), (*arguments, *strides), (GRADIENT_ROWS, width), _warps(width))
    if d:
        _reduce((cuda.ceil_div(d, 32), 1, 1), (partial, dweight, None, programs, d), (1, 1, 32, 32), 4)
    return dx, dweight, dresidual


def gated_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    """y, z (…, d), weight (d) -> (…, d) in y's dtype."""
    out = cuda.empty(y.shape, y.dtype, y)
    if y.numel():
        y_in, z_in = _rows(y), _rows(z)
        (rows, d), each = y_in.shape, y.shape[-1] // groups
        arguments = (y_in, z_in, cuda.plain(weight), out, d, eps, y_in.stride(0), z_in.stride(0))
        width = cuda.power_of_2(each)
        _gated_forward((rows, groups, 1), arguments, (each, norm_before_gate, width), _warps(width))
    return out


def gated_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    grads, y_in, z_in = map(_rows, (dout, y, z))
    rows, d = y_in.shape
    dy, dz = cuda.empty(y.shape, y.dtype, y), cuda.empty(z.shape, z.dtype, y)
    dweight = cuda.empty((d,), weight.dtype, y)
    programs = cuda.ceil_div(rows, GRADIENT_ROWS)
    partial = cuda.empty((programs, d), torch.float32, y)
    if y.numel():
        each = d // groups
        width = cuda.power_of_2(each)
        arguments = (grads, y_in, z_in, cuda.plain(weight), dy, dz, partial, rows, d, eps)
        strides = (grads.stride(0), y_in.stride(0), z_in.stride(0))
        constants = (each, norm_before_gate, GRADIENT_ROWS, width)
        _gated_backward((programs, groups, 1), (*arguments, *strides), constants, _warps(width))
    if d:
        _reduce((cuda.ceil_div(d, 32), 1, 1), (partial, dweight, None, programs, d), (1, 1, 32, 32), 4)
    return dy, dz, dweight
