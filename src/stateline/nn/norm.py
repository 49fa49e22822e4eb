"""Normalisations that add the residual stream on the way: `norm(x, residual) -> (y, new residual)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks, ops


class RMSNorm(nn.Module):
    """y = h / rms(h) · weight with h = x + residual, added in float32 and rounded once.

    >>> y, residual = RMSNorm(4)(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    >>> residual.flatten()[0].item()
    2.0
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.number("RMSNorm", "d_model", d_model, low=1, integer=True)
        checks.number("RMSNorm", "eps", eps, low=0, open_low=True)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, residual_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, residual (…, d) -> y (…, d) in x's dtype, x + residual (…, d) in `residual_dtype` (x's if None)."""
        return ops.rms_norm(x, self.weight, residual=residual, eps=self.eps, residual_dtype=residual_dtype)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """y = (h − mean h) / std(h) · weight + bias with h = x + residual, added in float32 and rounded once.

    For checkpoints trained with it (`rms_norm=False`); plain PyTorch, not fused.
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.number("LayerNorm", "d_model", d_model, low=1, integer=True)
        checks.number("LayerNorm", "eps", eps, low=0, open_low=True)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, residual_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, residual (…, d) -> y (…, d) in x's dtype, x + residual (…, d) in `residual_dtype` (x's if None)."""
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        h = x.to(real) if residual is None else x.to(real) + residual.to(real)
        y = F.layer_norm(h, self.weight.shape, self.weight.to(real), self.bias.to(real), self.eps)
        return y.to(x.dtype), h.to(residual_dtype or x.dtype)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
