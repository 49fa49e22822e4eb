"""Small models of transformers with Mamba mixers, and what they are compared by; tests on a GPU use them too."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stateline.interop import transformers as ours

try:
    import transformers
except ImportError:  # the `hf` extra
    if os.environ.get("CI"):
        raise
    pytest.skip("transformers (extra `hf`) is not installed", allow_module_level=True)

BOUND = 5e-6  # float32: of the largest value, as docs/numerics.md says of a layer fed in two ways
KINDS = ["mamba", "falcon_mamba", "jamba", "zamba"]
KINDS2 = ["mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1"]
KINDS += KINDS2
SIZES = {"hidden_size": 24, "vocab_size": 61}
ATTENTION = {"intermediate_size": 32, "num_attention_heads": 4, "mamba_d_state": 5, "mamba_dt_rank": 3}


CACHE_NAMES = dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), "cache_params")
_MAMBA2 = {
    "mamba_d_state": 5, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_head": 8, "mamba_chunk_size": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32,
}  # fmt: skip
#: kind -> its configuration, beside SIZES.
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 5, "num_hidden_layers": 2, "use_bias": True},
    "falcon_mamba": {"state_size": 5, "num_hidden_layers": 2},
    "jamba": ATTENTION | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4, "num_key_value_heads": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2,
    },
    "zamba": ATTENTION | {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2,
        "num_key_value_heads": 4, "attention_head_dim": 12, "attention_hidden_size": 48,
    },
    "mamba2": {
        "state_size": 5, "num_heads": 6, "head_dim": 8, "n_groups": 2, "num_hidden_layers": 2, "use_bias": True,
        "chunk_size": 4,
    },
    "bamba": _MAMBA2 | {
        "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_conv_bias": False, "mamba_proj_bias": True,
    },
    "zamba2": {
        "mamba_d_state": 5, "mamba_ngroups": 2, "n_mamba_heads": 6, "chunk_size": 4, "num_attention_heads": 4,
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "intermediate_size": 32, "adapter_rank": 4, "time_step_min": 1e-6,
    },
    "nemotron_h": {
        "ssm_state_size": 5, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4,
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"], "head_dim": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "time_step_min": 1e-6,
    },
    "granitemoehybrid": _MAMBA2 | {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 2, "shared_intermediate_size": 16,
    },
    "falcon_h1": _MAMBA2 | {
        "num_hidden_layers": 2, "mamba_d_ssm": 48, "mamba_rms_norm": True, "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.7, 1.1, 0.9, 1.2, 0.8],
    },
}  # fmt: skip


OLD = ours.release(transformers.__version__) < (5, 23, 0)
falcon_h1_goes_on = pytest.mark.skipif(
    OLD, reason=f"Falcon-H1 of transformers {transformers.__version__} miscounts its own cache, accelerated or not"
)


def cached(kinds: list[str]) -> list[Any]:
    """Kinds that go on from a cache in the installed release."""
    return [pytest.param(kind, marks=[falcon_h1_goes_on] if kind == "falcon_h1" else []) for kind in kinds]


def make(kind: str, **options: Any) -> Any:
    """A small model of transformers, in evaluation mode, none of whose weights has a value that one could guess."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | CONFIGS[kind] | options)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def pair(kind: str, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """(accelerated, as it came) with the same weights."""
    slow = make(kind, **options).to(device)
    fast = copy.deepcopy(slow)
    ours.accelerate(fast)
    return fast, slow


def padded(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids (2, 13) and the mask of a batch padded on the left."""
    ids = torch.randint(1, 61, (2, 13)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def assert_close(got: Tensor, wanted: Tensor, bound: float = BOUND) -> None:
    worst = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-6)
    assert worst <= bound, float(worst)


def worst_gradient(fast: nn.Module, slow: nn.Module) -> float:
    """The largest error of a gradient over the largest value of that gradient."""
    worst = 0.0
    for (name, got), wanted in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None and wanted.grad.abs().max() > 1e-6:
            worst = max(worst, float((got.grad - wanted.grad).abs().max() / wanted.grad.abs().max()))
    return worst


def in_pieces(model: Any, kind: str, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """The logits of ids (b, t) given a few at a time, each time with the cache of those before."""
    name = CACHE_NAMES.get(kind, "past_key_values")
    places = torch.arange(ids.shape[1], device=ids.device)[None].split(lengths, dim=1)
    cache, parts = None, []
    for piece, place in zip(ids.split(lengths, dim=1), places, strict=True):
        given = {} if cache is None else {name: cache}
        if kind == "bamba":  # which counts from 0 after a cache too, unless told
            given["position_ids"] = place
        out = model(piece, use_cache=True, **given)
        cache = out[name]
        parts.append(out.logits)
    return parts
