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
HEADS = {"mamba_d_state": 128, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1} | {
    k: v for k, v in ATTENTION.items() if k != "mamba_dt_rank"
}
#: model -> what its configuration needs besides the width; as few layers as it can have.
SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 1},
    "falcon_mamba": {"num_hidden_layers": 1},
    "jamba": ATTENTION | {"num_hidden_layers": 1, "num_experts": 1},
    "zamba": ATTENTION | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2},
    "mamba2": {"num_hidden_layers": 1, "num_heads": 24, "head_dim": 64, "n_groups": 1},
    "bamba": HEADS | {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "zamba2": {
        "mamba_d_state": 128, "mamba_ngroups": 1, "n_mamba_heads": 24, "num_attention_heads": 12,
        "num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"], "intermediate_size": 64,
        "adapter_rank": 4,
    },
    "nemotron_h": {
        "ssm_state_size": 128, "mamba_num_heads": 24, "mamba_head_dim": 64, "n_groups": 1, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64, "layers_block_type": ["linear_attention", "full_attention"],
        "intermediate_size": 64,
    },
    "granitemoehybrid": HEADS | {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
        "shared_intermediate_size": 16,
    },
    "falcon_h1": HEADS | {"num_hidden_layers": 1, "mamba_d_ssm": 1536, "mamba_rms_norm": True},
}  # fmt: skip
#: Those whose gradient transformers takes in time that grows with the length alone.
LINEAR = ("mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1")


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
                    if with_peers and not (backward and t == FORWARD and name not in LINEAR):
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
