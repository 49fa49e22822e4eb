"""gated_rms_norm on a GPU: the functions of reference.py, over the kernels of gpu_kernels.py. Suffixes: d channel."""

from __future__ import annotations

from torch import Tensor, float32

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.gated_rms_norm import gpu_kernels as kernels

DTYPES = cuda.DTYPES
_forward, _backward, _reduce = map(cuda.Kernel, (kernels.forward, kernels.backward, shared.reduce))
#: Rows of a program of the gradient, which divide the number of partial sums.
GRADIENT_ROWS = 16


def _rows(x: Tensor) -> Tensor:
    """x (…, d) -> (rows, d), the last dimension adjacent."""
    return cuda.data(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def _warps(width: int) -> int:
    """Sixteen numbers a thread, within what a block may have."""
    return max(1, min(16, width // 512))


def forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    """y, z (…, d), weight (d) -> (…, d) in y's dtype."""
    out = cuda.empty(y.shape, y.dtype, y)
    if y.numel():
        y_in, z_in = _rows(y), _rows(z)
        (rows, d), each = y_in.shape, y.shape[-1] // groups
        arguments = (y_in, z_in, cuda.plain(weight), out, d, eps, y_in.stride(0), z_in.stride(0))
        width = cuda.power_of_2(each)
        _forward((rows, groups, 1), arguments, (each, norm_before_gate, width), _warps(width))
    return out


def backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    grads, y_in, z_in = map(_rows, (dout, y, z))
    rows, d = y_in.shape
    dy, dz = cuda.empty(y.shape, y.dtype, y), cuda.empty(z.shape, z.dtype, y)
    dweight = cuda.empty((d,), weight.dtype, y)
    programs = cuda.ceil_div(rows, GRADIENT_ROWS)
    partial = cuda.empty((programs, d), float32, y)
    if y.numel():
        each = d // groups
        width = cuda.power_of_2(each)
        arguments = (grads, y_in, z_in, cuda.plain(weight), dy, dz, partial, rows, d, eps)
        strides = (grads.stride(0), y_in.stride(0), z_in.stride(0))
        constants = (each, norm_before_gate, GRADIENT_ROWS, width)
        _backward((programs, groups, 1), (*arguments, *strides), constants, _warps(width))
    if d:
        _reduce((cuda.ceil_div(d, 32), 1, 1), (partial, dweight, None, programs, d), (1, 1, 32, 32), 4)
    return dy, dz, dweight
