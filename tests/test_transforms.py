"""Every layer under what PyTorch runs models in: torch.func, dispatch modes, activations computed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from stateline import nn as sl

D = 8
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Mamba": lambda: sl.Mamba(D, 3),
    "Mamba2": lambda: sl.Mamba2(D, 4, headdim=4, ngroups=2, d_ssm=8),
    "Mamba3": lambda: sl.Mamba3(D, 4, headdim=4, ngroups=2),
    "Mamba3 of ranks": lambda: sl.Mamba3(D, 4, headdim=4, is_mimo=True, mimo_rank=2, is_outproj_norm=True),
    "S4D": lambda: sl.S4D(D, 4, mode="scan"),
    "S4D by convolution": lambda: sl.S4D(D, 4, mode="convolution"),
    "S4": lambda: sl.S4(D, 4, mode="scan"),
    "S4 by convolution": lambda: sl.S4(D, 4, mode="convolution"),
    "S5": lambda: sl.S5(D, 4),
    "GatedSSM": lambda: sl.GatedSSM(D),
    "Attention": lambda: sl.Attention(D, 2),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def gradients(layer: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    y = (run or layer)(x.clone().requires_grad_())
    return list(torch.autograd.grad(y.square().sum(), list(layer.parameters())))


@pytest.mark.filterwarnings("ignore:.*not yet implemented the batching rule")  # torch's own attention
def test_gradients_of_every_sample(layer: nn.Module) -> None:
    if isinstance(layer, sl.S4):
        pytest.skip("the gradient of torch.linalg.solve, which samples an S4, fails under vmap")
    x, names = torch.randn(3, 5, D, dtype=torch.float64), [name for name, _ in layer.named_parameters()]
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x[:, None])
    for i in range(3):
        for name, want in zip(names, gradients(layer, x[i : i + 1]), strict=True):
            torch.testing.assert_close(each[name][i], want)


def test_a_dispatch_mode_changes_nothing(layer: nn.Module) -> None:
    x = torch.randn(2, 5, D, dtype=torch.float64)
    want = gradients(layer, x)
    with FlopCounterMode(display=False) as counter:
        got = gradients(layer, x)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_activations_may_be_computed_again(layer: nn.Module) -> None:
    """Wholly or but for products: saved tensors are there once."""
    x = torch.randn(2, 5, D, dtype=torch.float64)
    want = gradients(layer, x)
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    for more in ({}, {"context_fn": lambda: create_selective_checkpoint_contexts(products)}):
        got = gradients(layer, x, lambda x, more=more: checkpoint(layer, x, use_reentrant=False, **more))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
