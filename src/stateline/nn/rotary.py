"""Rotary position embeddings: pairs of channels turned by an angle that grows with a token's place."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, width: int, base: float) -> Tensor:
    """positions (…) whole numbers -> angles (…, width/2) float64, in radians: position · base^(−2i/width).

    In float64, so that two tokens a million places into a stream still differ by the angle of two neighbours.
    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.2.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return positions.double()[..., None] * base**-exponents


def rotate(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """x (…, h, p) with its first 2r channels turned in pairs by angles (…, r), radians, the same for every head h.

    interleaved: pairs are channels (2i, 2i + 1); otherwise (i, i + r), as checkpoints of GPT-NeoX and Llama have them.
    Computed in float32 at least and rounded once.

    >>> rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([torch.pi / 2]), interleaved=True).round(decimals=3)
    tensor([[-0., 1.]])
    """
    real = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (f(angles)[..., None, :].to(real) for f in (torch.cos, torch.sin))
    r = angles.shape[-1]
    turned, rest = x[..., : 2 * r].to(real), x[..., 2 * r :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turned.split(r, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
