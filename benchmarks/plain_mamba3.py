"""Mamba-3 as anyone writes it first in plain PyTorch, of one rank: a loop over time, or a matrix over pairs of tokens.

Both take the weights of our layer and give its output, as `tests/test_mamba3.py` holds them to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stateline.nn import Mamba3


class PlainMamba3(nn.Module):
    """(b, t, d_model) -> (b, t, d_model); form: "loop" or "quadratic"."""

    def __init__(self, d_model: int, form: str, layer: Mamba3 | None = None) -> None:
        super().__init__()
        self.layer, self.form = layer or Mamba3(d_model), form

    def forward(self, x: Tensor) -> Tensor:
        m = self.layer
        z, v, B, C, dt, A, trap, angles = m.in_proj(x).split(m._widths(), -1)
        v = v.unflatten(-1, (m.nheads, m.headdim))
        dt, blend = F.softplus(dt + m.dt_bias), torch.sigmoid(trap)
        log = -torch.where(A < 0, 1 / (1 - A.clamp(max=0)), 1 + A).clamp(min=m.A_floor) * dt
        theta = (torch.pi * torch.tanh(angles)[:, :, None] * dt[..., None]).cumsum(1)
        k, q = (
            self.turned(F.rms_norm(w.unflatten(-1, (1, m.d_state)), (m.d_state,), n.weight, n.eps) + bias[:, 0], theta)
            for w, n, bias in ((B, m.B_norm, m.B_bias), (C, m.C_norm, m.C_bias))
        )
        y = (self.loop if self.form == "loop" else self.quadratic)(v, k, q, log, blend * dt, (1 - blend) * dt)
        return m.out_proj((y + m.D[:, None] * v).flatten(2) * F.silu(z))

    def turned(self, w: Tensor, theta: Tensor) -> Tensor:
        """w (b, t, h, n), theta (b, t, h, s)."""
        s, cos, sin = theta.shape[-1], theta.cos(), theta.sin()
        a, b = w[..., 0 : 2 * s : 2], w[..., 1 : 2 * s : 2]
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), w[..., 2 * s :]], -1)

    def loop(self, v: Tensor, k: Tensor, q: Tensor, log: Tensor, newer: Tensor, older: Tensor) -> Tensor:
        """v (b, t, h, p), k, q (b, t, h, n), others (b, t, h) -> (b, t, h, p)."""
        state = last = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[3])
        out, decay = [], log.exp()
        for t in range(v.shape[1]):
            now = v[:, t, :, :, None] * k[:, t, :, None]
            decayed = decay[:, t, :, None, None] * (state + older[:, t, :, None, None] * last)
            state, last = decayed + newer[:, t, :, None, None] * now, now
            out.append((state @ q[:, t, :, :, None])[..., 0])
        return torch.stack(out, 1)

    def quadratic(self, v: Tensor, k: Tensor, q: Tensor, log: Tensor, newer: Tensor, older: Tensor) -> Tensor:
        """The same as attention with decays: everything that a token reads from every earlier one."""
        total = log.cumsum(1).transpose(1, 2)
        gap = total[..., :, None] - total[..., None, :]
        weight = (newer + F.pad(older[:, 1:], (0, 0, 0, 1))).transpose(1, 2)
        later = torch.ones(gap.shape[-2:], dtype=torch.bool).triu()
        L = gap.masked_fill(later, -torch.inf).exp() * weight[:, :, None] + torch.diag_embed(newer.transpose(1, 2))
        scores = torch.einsum("bthn,bshn->bhts", q, k)
        return torch.einsum("bhts,bshp->bthp", scores * L, v)
