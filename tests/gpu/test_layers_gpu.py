"""Whole layers on a CUDA device: values and gradients of the CPU's float64, and the law of layers, tokens included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from where import INTERPRETED

from stateline import nn

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
D_MODEL = 48
#: Largest error over largest value, of whole layers.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
#: Rounded to bfloat16, what was just above 0 may lie just below, where relu has no slope: so on a CPU, too.
KINKED = {"GatedSSM, relu": 2.5}
LAYERS = {
    "Mamba": lambda: nn.Mamba(D_MODEL, d_state=8),
    "Mamba2": lambda: nn.Mamba2(D_MODEL, d_state=24, headdim=16),
    "Mamba2, groups and limits": lambda: nn.Mamba2(
        D_MODEL, d_state=16, headdim=8, ngroups=2, dt_limit=(0.01, 0.1), D_has_hdim=True, norm_before_gate=True
    ),
    "Mamba2, no norm, a gated unit": lambda: nn.Mamba2(D_MODEL, d_state=16, headdim=8, d_ssm=64, rmsnorm=False),
    "Mamba3": lambda: nn.Mamba3(D_MODEL, d_state=24, headdim=16),
    "Mamba3, groups and a norm": lambda: nn.Mamba3(D_MODEL, d_state=16, headdim=8, ngroups=3, is_outproj_norm=True),
    "GatedSSM": lambda: nn.GatedSSM(D_MODEL),
    "GatedSSM, dense, tanh": lambda: nn.GatedSSM(D_MODEL, 40, "tanh", "dense"),
    "GatedSSM, relu": lambda: nn.GatedSSM(D_MODEL, 70, "relu"),
    "S4D": lambda: nn.S4D(D_MODEL, d_state=16),
    "S4": lambda: nn.S4(D_MODEL, d_state=16),
    "S5": lambda: nn.S5(D_MODEL, d_state=64, blocks=2),
    "Mamba3, ranks": lambda: nn.Mamba3(D_MODEL, d_state=16, headdim=8, is_mimo=True, mimo_rank=3),
}


def near(got: Tensor, wanted: Tensor, bound: float, what: str) -> None:
    assert got.shape == wanted.shape, what
    error = (got.cpu().double() - wanted.cpu().double()).abs().max() / wanted.double().abs().max().cpu().clamp_min(1e-6)
    assert error < bound, f"{what}: {error:.1e}"


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = LAYERS[name]().to(dtype)
    x, dy = torch.randn(2, 2, 150, D_MODEL, dtype=dtype).unbind()
    lengths = torch.tensor([150, 97])
    found = []
    for layer, kind in ((copy.deepcopy(given).cuda(), dtype), (copy.deepcopy(given).double(), torch.float64)):
        device = next(layer.parameters()).device
        u = x.to(device, kind, copy=True).requires_grad_()
        y = layer(u, lengths=lengths.to(device))
        y.backward(dy.to(device, kind))
        found.append({"y": y.detach(), "input": u.grad} | {k: p.grad for k, p in layer.named_parameters()})
    for what, value in found[1].items():
        bound = BOUND[dtype] * (KINKED.get(name, 1) if dtype == torch.bfloat16 else 1)
        near(found[0][what], value, bound, f"{name}: {what}")


@pytest.mark.parametrize("name", LAYERS)
def test_pieces_and_tokens_are_the_whole(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name]().cuda(), torch.randn(2, 90, D_MODEL, device="cuda")
    with torch.no_grad():
        whole, last = layer.extend(x, layer.init_state(2))
        pieces, state = [], layer.init_state(2)
        for part in (x[:, :1], x[:, 1:40], x[:, 40:81]):
            y, state = layer.extend(part, state)
            pieces.append(y)
        tokens = [layer.step_(x[:, i], state) for i in range(81, 90)]
    near(torch.cat([*pieces, torch.stack(tokens, 1)], 1), whole, BOUND[torch.float32], name)
    for a, b in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(last), strict=True):
        near(a, b, BOUND[torch.float32], f"{name}: state")
