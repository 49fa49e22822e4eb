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


class GatedRMSNorm(nn.Module):
    """RMSNorm of y · silu(z) or, `norm_before_gate`, RMSNorm of y, times silu(z), a group of channels at a time.

    Statistics and gate in float32, rounded once. `groups` must divide `d_model`; each has d_model / groups neighbours.

    >>> GatedRMSNorm(4)(torch.ones(1, 4), torch.zeros(1, 4)).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        groups: int = 1,
        norm_before_gate: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.number("GatedRMSNorm", "d_model", d_model, low=1, integer=True)
        checks.number("GatedRMSNorm", "groups", groups, low=1, integer=True)
        checks.number("GatedRMSNorm", "eps", eps, low=0, open_low=True)
        if d_model % groups:
            raise checks.fail("GatedRMSNorm", f"d_model is {d_model}, which {groups} groups do not divide.")
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        """y, z (…, d_model) -> (…, d_model) in y's dtype; z None: y was gated already."""
        if z is None:
            return self._norm(y)
        return ops.gated_rms_norm(
            y, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=self.norm_before_gate
        )

    def _norm(self, y: Tensor) -> Tensor:
        if self.groups == 1:
            return ops.rms_norm(y, self.weight, eps=self.eps)[0]
        real = torch.float64 if y.dtype == torch.float64 else torch.float32
        grouped = y.to(real).unflatten(-1, (self.groups, -1))
        return (F.rms_norm(grouped, grouped.shape[-1:], None, self.eps).flatten(-2) * self.weight.to(real)).to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        order = ", norm_before_gate=True" if self.norm_before_gate else ""
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}{order}"


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
