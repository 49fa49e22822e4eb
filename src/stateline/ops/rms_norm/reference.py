"""rms_norm, defined.

    h = x + residual          y = h · (mean(h²) + eps)^(-1/2) · weight

Sum, mean and product in float32 (float64 where the data is), one rounding at the end. Suffixes: d channel.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x, residual (…, d), weight (d) -> y (…, d) in x's dtype, h (…, d) in `residual_dtype`."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(real) if residual is None else x.to(real) + residual.to(real)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(real)
    return y.to(x.dtype).contiguous(), h.to(residual_dtype, copy=True, memory_format=torch.contiguous_format)


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
    real = torch.float64 if x_dtype == torch.float64 else torch.float32
    h, g = residual_out.to(real), dy.to(real)
    r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    gw = g * weight.to(real)
    dh = r * gw - h * r**3 * (gw * h).mean(-1, keepdim=True) + dresidual_out.to(real)
    dweight = (g * h * r).reshape(-1, h.shape[-1]).sum(0).to(weight.dtype)
    dx = dh.to(x_dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, dweight, None if residual_dtype is None else dh.to(residual_dtype, copy=True)
