"""gated_rms_norm, defined.

    norm(v) = v · (mean(v²) + eps)^(-1/2), a group of neighbouring channels at a time

    out = norm(y · silu(z)) · weight          or, norm_before_gate,          out = norm(y) · weight · silu(z)

Gate, sum, mean and products in float32 (float64 where the data is), one rounding at the end. Suffixes: d channel.
Source: Dao & Gu 2024, "Transformers are SSMs", section 7: a layer's output is gated and normalised before its last projection.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    """y, z (…, d), weight (d) -> (…, d) in y's dtype."""
    v, gate, w = _wide(y, z, weight)
    gate, _ = _slopes(gate)
    out = _normalised(v, eps, groups)[0] * gate if norm_before_gate else _normalised(v * gate, eps, groups)[0]
    return (out * w).to(y.dtype).contiguous()


def backward(
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
