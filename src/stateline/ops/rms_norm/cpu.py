"""rms_norm in C++: the same functions as reference.py, over the kernels of cpu.cpp. Suffixes: d channel."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native


def _plain(x: Tensor) -> Tensor:
    x = native.data(x)
    return x if x.is_contiguous() else x.contiguous()


def _sizes(x: Tensor, double: bool, eps: float) -> tuple[int, int, int, int, int]:
    d = x.shape[-1]
    return x.numel() // d if d else 0, d, torch.get_num_threads(), double, native.double_bits(eps)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, residual (…, d), weight (d) -> y (…, d) in x's dtype, h (…, d) in `residual_dtype`."""
    double = x.dtype == torch.float64
    x_in, r_in = _plain(x), None if residual is None else _plain(residual)
    w = native.parameter(weight, torch.float64 if double else torch.float32)
    y = torch.empty(x.shape, dtype=x_in.dtype)
    h = torch.empty(x.shape, dtype=native.out_dtype(residual_dtype))
    fields = (*_sizes(x, double, eps), *native.output(x_in), *native.output(r_in), w.data_ptr())
    native.call("rms_norm_forward", (*fields, *native.output(y), *native.output(h)))
    return y if y.dtype == x.dtype else y.to(x.dtype), h if h.dtype == residual_dtype else h.to(residual_dtype)


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
    double = x_dtype == torch.float64
    real = torch.float64 if double else torch.float32
    dy, dh, h = _plain(dy), _plain(dresidual_out), _plain(residual_out)
    w = native.parameter(weight, real)
    dx = torch.empty(h.shape, dtype=native.out_dtype(x_dtype))
    dresidual = None if residual_dtype is None else torch.empty(h.shape, dtype=native.out_dtype(residual_dtype))
    dweight = torch.empty(w.shape, dtype=real)
    native.call(
        "rms_norm_backward",
        (
            *_sizes(h, double, eps), 0, 0, 0, 0, w.data_ptr(), 0, 0, *native.output(h), *native.output(dy),
            *native.output(dh), *native.output(dx), *native.output(dresidual), dweight.data_ptr(),
        ),
    )  # fmt: skip
    if dresidual is not None and residual_dtype is not None:
        dresidual = dresidual.to(residual_dtype)
    return dx.to(x_dtype), dweight.to(weight.dtype), dresidual
