"""Block: norm, mixer and optionally a gated MLP round a residual stream that is added first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline import checks
from stateline.nn.mixer import Lengths, Mixer, zero_padding
from stateline.nn.norm import LayerNorm, RMSNorm

MULTIPLE = 128  # hidden sizes of mamba_ssm's GatedMLP are rounded up to it


class GatedMLP(nn.Module):
    """fc2(value · silu(gate)) with [value, gate] = fc1(x), in this order; no biases.

    d_intermediate: hidden width, rounded up to a multiple of 128 as in mamba_ssm.

    >>> GatedMLP(8, 100).fc1.weight.shape
    torch.Size([256, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.number("GatedMLP", "d_model", d_model, low=1, integer=True)
        checks.number("GatedMLP", "d_intermediate", d_intermediate, low=1, integer=True)
        hidden = -(-d_intermediate // MULTIPLE) * MULTIPLE
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d) -> (…, d)."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    """(x, residual) -> (mixer(norm(x + residual)), x + residual), then the same with norm2 and mlp where there is one.

    The sum comes first, so that it is fused with the norm; the last block's output is added by the model's final norm.
    residual_in_fp32: keep the stream in float32 under 16-bit weights and autocast.
    """

    def __init__(
        self,
        mixer: Mixer,
        norm: RMSNorm | LayerNorm,
        *,
        mlp: nn.Module | None = None,
        norm2: RMSNorm | LayerNorm | None = None,
        residual_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if (mlp is None) != (norm2 is None):
            raise checks.fail("Block", "mlp and norm2 come together, only one was given.")
        self.norm = norm
        self.mixer = mixer
        self.norm2 = norm2
        self.mlp = mlp
        self.residual_in_fp32 = residual_in_fp32

    def init_state(self, batch: int, *, max_tokens: int | None = None, device: torch.device | str | None = None) -> Any:
        """The mixer's state for `batch` sequences."""
        return self.mixer.init_state(batch, max_tokens=max_tokens, device=device)

    def check_room(self, state: Any, tokens: int = 1) -> None:
        """Raise ValueError if the mixer's `state` has no room for so many more tokens."""
        self.mixer.check_room(state, tokens)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x, residual (b, t, d) -> output, residual (b, t, d); their sum is the stream. Others: as for Mixer.

        more: `gate=`, for a mixer that takes one.
        """
        x, residual = self._enter(x, residual, lengths)
        return self._leave(self.mixer(x, lengths=lengths, cu_seqlens=cu_seqlens, **more), residual)

    def extend(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: Any,
        *,
        lengths: Lengths | None = None,
        cu_seqlens: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, Tensor, Any]:
        """`forward` from a state: (output, residual, new state); the state given is never changed."""
        x, residual = self._enter(x, residual, lengths)
        y, state = self.mixer.extend(x, state, lengths=lengths, cu_seqlens=cu_seqlens, **more)
        return *self._leave(y, residual), state

    @torch.no_grad()
    def step_(self, x: Tensor, residual: Tensor | None, state: Any, **more: Tensor) -> tuple[Tensor, Tensor]:
        """One token: x, residual (b, d) -> output, residual (b, d), writing into `state`. No gradient."""
        x, residual = self._enter(x, residual, None)
        return self._leave(self.mixer.step_(x, state, **more), residual)

    def _enter(self, x: Tensor, residual: Tensor | None, lengths: Lengths | None) -> tuple[Tensor, Tensor]:
        if residual is None:  # later blocks get what this one left, which is clean
            x = zero_padding(x, lengths)
        return self.norm(x, residual, residual_dtype=self._stream_dtype(x, residual))

    def _leave(self, y: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is None or self.norm2 is None:
            return y, residual
        y, residual = self.norm2(y, residual, residual_dtype=self._stream_dtype(y, residual))
        return self.mlp(y), residual

    def _stream_dtype(self, x: Tensor, residual: Tensor | None) -> torch.dtype:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        return torch.promote_types(dtype, torch.float32) if self.residual_in_fp32 else dtype
