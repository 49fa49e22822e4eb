"""`controls` on a GPU, over gpu_controls_kernels.py. Names as in controls.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops import gpu_kernels as shared
from stateline.ops.trapezoid_ssd import gpu_controls_kernels as kernels

_forward, _backward, _reduce = map(cuda.Kernel, (kernels.forward, kernels.backward, shared.reduce))
#: Tokens of a program.
ROWS = 16


def controls(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt, A, blend (…, h), rates (…, s), float32."""
    flat, constants = _sizes(raw, dt_bias, activation)
    h, s = constants[:2]
    dt, A, blend, rates = (cuda.empty((*raw.shape[:-1], n), torch.float32, raw) for n in (h, h, h, s))
    if flat.shape[0]:
        arguments = (flat, cuda.plain(dt_bias), dt, A, blend, rates, flat.shape[0], float(floor), flat.stride(0))
        _forward((cuda.ceil_div(flat.shape[0], ROWS), 1, 1), arguments, constants, 4)
    return dt, A, blend, rates


@cuda.side_by_side
def controls_backward(
    slopes: tuple[Tensor, ...], raw: Tensor, dt_bias: Tensor, activation: str, floor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of raw, in its dtype, and of dt_bias."""
    flat, constants = _sizes(raw, dt_bias, activation)
    rows, h = flat.shape[0], constants[0]
    if not rows:
        return torch.zeros_like(raw), torch.zeros_like(dt_bias)
    count = cuda.ceil_div(rows, ROWS)
    draw, partial = cuda.empty(raw.shape, raw.dtype, raw), cuda.empty((count, h), torch.float32, raw)
    dbias = cuda.empty((h, 1), torch.float32, raw)
    given = (*map(cuda.plain, slopes), flat, cuda.plain(dt_bias), draw, partial)
    _backward((count, 1, 1), (*given, rows, float(floor), flat.stride(0)), constants, 4)
    _reduce((cuda.ceil_div(h, 32), 1, 1), (partial, dbias, None, count, h), (1, 1, 32, 32), 4)
    return draw, dbias.view(h)


def _sizes(raw: Tensor, dt_bias: Tensor, activation: str) -> tuple[Tensor, tuple[Any, ...]]:
    """raw as rows, and the kernels' constants."""
    h = dt_bias.shape[0]
    s = raw.shape[-1] - 3 * h
    flat = cuda.data(raw.flatten(0, -2))
    return flat, (h, s, activation == "heavy_tail", ROWS, cuda.power_of_2(max(h, s)))
