"""decode_token in PyTorch: the definition, a model's step in float32 with packed products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline.ops.decode_token import HeadLayer, Layer, Matrix, Network, Norm
from stateline.ops.packed_linear import reference as packed
from stateline.ops.packed_linear.pack import unpack_rows


def step(states: Sequence[Tensor], ids: Tensor, network: Network) -> Tensor:
    """ids (b) -> logits (b, v), writing into states."""
    e = network.embedding
    x = unpack_rows(e.data, e.scales, e.format, ids, e.columns)
    stream = torch.zeros_like(x)
    for layer, conv, ssm in zip(network.layers, states[::2], states[1::2], strict=True):
        stream = stream + x
        x = _norm(stream, layer.norm, network.eps)
        x = _mix(layer, x, conv, ssm) if isinstance(layer, Layer) else _mix_heads(layer, x, conv, ssm)
        if layer.mlp is not None:
            norm, fc1, fc2 = layer.mlp
            stream = stream + x
            value, gate = _product(_norm(stream, norm, network.eps), fc1).chunk(2, dim=-1)
            x = _product(value * F.silu(gate), fc2)
    return _product(_norm(stream + x, network.norm, network.eps), network.head)


def _mix(layer: Layer, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
    """h ← exp(dt A) h + dt u B;  y = (C·h + D u) · silu(z), with u the convolution of the first half of in_proj."""
    n = layer.A2.shape[1]
    x, z = _product(x, layer.in_proj).chunk(2, dim=-1)
    u = _convolve(layer, x, conv)
    dt, B, C = _product(u, layer.x_proj).split([layer.dt_proj.columns, n, n], dim=-1)
    dt = F.softplus(_product(dt.contiguous(), layer.dt_proj) + layer.dt_bias, threshold=1e9)
    ssm.copy_(torch.exp2(dt[..., None] * layer.A2) * ssm + (dt * u)[..., None] * B[:, None])
    y = (ssm * C[:, None]).sum(-1) + layer.D * u
    return _product(y * F.silu(z), layer.out_proj)


def _mix_heads(layer: HeadLayer, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
    """S ← exp(dt A) S + dt x⊗B;  y = norm((S C + D x) · silu(z)), x, B, C convolved; and silu(gate) · value."""
    s, d, (h, p, n) = layer.heads, layer.D.shape[0], ssm.shape[1:]
    widths = [s.beside, s.beside, d, conv.shape[2], h]
    gate, value, z, u, dt = _product(x, layer.in_proj).split(widths, dim=-1)
    u, B, C = _convolve(layer, u, conv).split([d, s.g * n, s.g * n], dim=-1)
    dt = F.softplus(dt + layer.dt_bias, threshold=1e9).clamp(s.low, s.high)
    B, C = (v.unflatten(-1, (s.g, n)).repeat_interleave(h // s.g, 1)[:, :, None] for v in (B, C))
    drive = dt[..., None] * u.unflatten(-1, (h, p))
    now = torch.exp(dt * layer.A)[..., None, None] * ssm + drive[..., None] * B
    ssm.copy_(now)
    y = (now * C).sum(-1).flatten(-2) + layer.D * u
    if not s.gate_last:
        y = y * F.silu(z)
    if s.normalise:
        grouped = y.unflatten(-1, (s.g, -1))
        y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + s.eps)).flatten(-2) * layer.scale
    if s.gate_last:
        y = y * F.silu(z)
    return _product(torch.cat([F.silu(gate) * value, y], -1), layer.out_proj)


def _convolve(layer: Layer | HeadLayer, x: Tensor, state: Tensor) -> Tensor:
    """silu of the convolution at x (b, channels), the newest of the taps, which `state` (b, k−1, channels) takes in."""
    taps = torch.cat([state, x[:, None]], 1)
    state.copy_(taps[:, 1:])
    return F.silu((taps * layer.taps).sum(1) + (0 if layer.conv_bias is None else layer.conv_bias))


def _norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    if norm.bias is not None:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.weight


def _product(x: Tensor, m: Matrix) -> Tensor:
    return packed.forward(x, m.data, m.scales, m.bias, m.format, m.rows, m.columns)
