"""Mixers of transformers as they come, and the same modules after `accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.cases import OURS, Case, without_grad
from benchmarks.measure import Work
from torch import Tensor, nn

from stateline.interop.transformers import MIXERS, accelerate

D_MODEL, FORWARD, BACKWARD = 768, 2048, 256
ATTENTION = {"num_attention_heads": 12, "num_key_value_heads": 12, "mamba_dt_rank": 48, "intermediate_size": 64}
#: model -> what its configuration needs besides the width; as few layers as it can have.
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 1},
    "falcon_mamba": {"num_hidden_layers": 1},
    "jamba": ATTENTION | {"num_hidden_layers": 1, "num_experts": 1},
    "zamba": ATTENTION | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2},
    "mamba2": {"num_hidden_layers": 1, "num_heads": 24, "head_dim": 64, "n_groups": 1},
}


def accelerated() -> Iterator[Case]:
    """One mixer of each model, forward, and with gradients of everything.

    transformers' backward pass of Mamba-1 grows with the square of the length (minutes at 2,048), so the two are
    compared at 256.
    """
    if not find_spec("transformers"):
        return
    for name in SHAPES:
        for backward, lengths in ((False, (FORWARD,)), (True, (BACKWARD, FORWARD))):
            for t in lengths:

                def make(with_peers: bool, name: str = name, backward: bool = backward, t: int = t) -> dict[str, Work]:
                    slow = mixer(name)
                    fast = copy.deepcopy(slow)
                    accelerate(fast)
                    x = torch.randn(1, t, D_MODEL)
                    found = {OURS: work(fast, x, backward)}
                    if with_peers and not (backward and t == FORWARD and name != "mamba2"):
                        found["transformers"] = work(slow, x, backward)
                    return found

                op = f"accelerate {name} {'fwd+bwd' if backward else 'fwd'}"
                yield Case(op, f"b1 t{t} d{D_MODEL}", "float32", make, t)


def mixer(name: str) -> nn.Module:
    """A mixer of transformers with random weights, out of a small model of its kind."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, **SHAPES[name], hidden_size=D_MODEL, vocab_size=256))
    return next(m for m in model.modules() if type(m).__name__ in MIXERS).eval()


def work(module: nn.Module, x: Tensor, backward: bool) -> Work:
    """A call of a mixer, or a call and the gradients of x and of every parameter."""
    if not backward:
        return without_grad(lambda: module(x))
    x = x.clone().requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(module(x).sum(), leaves)
