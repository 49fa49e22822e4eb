"""Attention on a CUDA device: as on the CPU, from fresh and used states, and captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from where import INTERPRETED

from stateline import nn as sl
from stateline import state as states

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")
OPTIONS = {"rotary_emb_dim": 16, "num_heads_kv": 2, "d_conv": 3}


@pytest.mark.parametrize("window", [None, 40])
@torch.no_grad()
def test_it_is_what_the_cpu_computes(window: int | None) -> None:
    torch.manual_seed(0)
    layer = sl.Attention(128, 4, window=window, max_tokens=256, **OPTIONS).double()
    x, bounds = torch.randn(3, 200, 128, dtype=torch.float64), torch.tensor([0, 70, 70, 200])
    want, packed = layer(x), layer(x[:1], cu_seqlens=bounds)
    layer, x = layer.cuda(), x.cuda()
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(layer(x).cpu(), want, **close)
    torch.testing.assert_close(layer(x[:1], cu_seqlens=bounds.cuda()).cpu(), packed, **close)
    y, state = layer.extend(x[:, :150], layer.init_state(3), lengths=torch.tensor([150, 20, 0]))
    torch.testing.assert_close(y[1, :20].cpu(), want[1, :20], **close)
    one = states.index(state, 1)
    y, one = layer.extend(x[1:2, 20:170], one)
    torch.testing.assert_close(y.cpu(), want[1:2, 20:170], **close)
    for i in range(170, 200):
        torch.testing.assert_close(layer.step_(x[1:2, i], one).cpu(), want[1:2, i], **close)


@torch.no_grad()
def test_steps_are_captured_in_a_graph_and_full_states_give_nan() -> None:
    torch.manual_seed(0)
    layer, x = sl.Attention(128, 4, max_tokens=8, **OPTIONS).cuda(), torch.randn(2, 12, 128, device="cuda")
    plain, captured, token = layer.init_state(2), layer.init_state(2), x[:, 0].clone()
    layer.step_(token, states.clone(captured))  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.step_(token, captured)
    for leaf in pytree.tree_leaves(captured):
        leaf.zero_()
    for i in range(12):
        token.copy_(x[:, i])
        graph.replay()
        want = layer.step_(x[:, i], plain)
        torch.testing.assert_close(y, want, equal_nan=True)
        assert bool(y.isnan().all()) == (i >= 8)


@pytest.mark.parametrize("window", [None, 40])
@torch.no_grad()
def test_sixteen_bits_in_the_cache_change_nothing_of_a_layer_in_them(window: int | None) -> None:
    torch.manual_seed(0)
    layer = sl.Attention(128, 4, window=window, max_tokens=64, **OPTIONS).to("cuda", torch.bfloat16)
    x = torch.randn(2, 60, 128, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for cache in (None, torch.bfloat16):
        layer.cache_dtype = cache
        y, state = layer.extend(x[:, :50], layer.init_state(2))
        assert state.keys.dtype == (cache or torch.float32)
        outputs.append(torch.cat([y, *(layer.step_(x[:, i], state)[:, None] for i in range(50, 60))], 1))
    assert torch.equal(*outputs)
    whole = layer(x).float()
    assert (outputs[1].float() - whole).abs().max() <= 2e-2 * whole.abs().max()  # the bound of layers
