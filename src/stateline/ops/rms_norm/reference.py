"""rms_norm, defined.

    h = x + residual          y = h · (mean(h²) + eps)^(-1/2) · weight

and gated, a group of neighbouring channels at a time, the gate before the norm or after it:

    out = norm(y · silu(z)) · weight          out = norm(y) · weight · silu(z)

Sum, mean and product in float32 (float64 where the data is), one rounding at the end. Suffixes: d channel.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the gate: Dao & Gu 2024,
"Transformers are SSMs", section 7.
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


def _wide(*data: Tensor) -> list[Tensor]:
    real = torch.float64 if data[0].dtype == torch.float64 else torch.float32
    return [x.to(real) for x in data]


def _slopes(z: Tensor) -> tuple[Tensor, Tensor]:
    """silu(z) and its derivative."""
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


def _normalised(v: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """v (…, d) over its root mean square, and 1 over that (…, groups, 1)."""
    v = v.unflatten(-1, (groups, -1))
    inverse = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v * inverse).flatten(-2), inverse


def gated_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    """y, z (…, d), weight (d) -> (…, d) in y's dtype."""
    v, gate, w = _wide(y, z, weight)
    gate, _ = _slopes(gate)
    out = _normalised(v, eps, groups)[0] * gate if norm_before_gate else _normalised(v * gate, eps, groups)[0]
    return (out * w).to(y.dtype).contiguous()


def gated_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    v, grad, gate, w = _wide(y, dout, z, weight)
    gate, slope = _slopes(gate)
    normed, inverse = _normalised(v if norm_before_gate else v * gate, eps, groups)
    dweight = grad * normed * gate if norm_before_gate else grad * normed
    dnormed = grad * w * gate if norm_before_gate else grad * w
    along = (dnormed * normed).unflatten(-1, (groups, -1)).mean(-1, keepdim=True)
    dv = (inverse * (dnormed.unflatten(-1, (groups, -1)) - normed.unflatten(-1, (groups, -1)) * along)).flatten(-2)
    dy, dgate = (dv, grad * w * normed) if norm_before_gate else (dv * gate, dv * v)
    dweight = dweight.reshape(-1, weight.shape[0]).sum(0)
    return dy.to(y.dtype).contiguous(), (dgate * slope).to(z.dtype).contiguous(), dweight.to(weight.dtype)
