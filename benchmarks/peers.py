"""What others offer for the same work, each behind its own import: absent ones are left out, not imitated.

The torch loop is no library: it is the scan that anyone writes by hand first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Block = Callable[[Tensor], Tensor]


def torch_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The scan (b, t, d) as a loop over time in torch; dt is ready to use."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    out = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((h * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def blocks(d_model: int) -> dict[str, nn.Module]:
    """Mamba-1 blocks of the peers that are installed, by name, with random weights."""
    found: dict[str, nn.Module] = {}
    if find_spec("transformers"):
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(hidden_size=d_model, state_size=16, num_hidden_layers=1, vocab_size=256)
        found["transformers"] = MambaMixer(config, 0)
    if find_spec("mambapy"):
        from mambapy.mamba import MambaBlock
        from mambapy.mamba import MambaConfig as MambapyConfig

        found["mambapy"] = MambaBlock(MambapyConfig(d_model=d_model, n_layers=1, d_state=16))
    return found


def blocks_of_mamba2(d_model: int) -> dict[str, nn.Module]:
    """Mamba-2 blocks of the peers that are installed, by name, with random weights and one group of B and C."""
    if not find_spec("transformers"):
        return {}
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    heads = {"head_dim": 64, "num_heads": 2 * d_model // 64, "n_groups": 1, "state_size": 128}
    return {"transformers": Mamba2Mixer(Mamba2Config(hidden_size=d_model, num_hidden_layers=1, **heads), 0)}


def blocks_of_mamba3(d_model: int) -> dict[str, nn.Module]:
    """Mamba-3 of one rank in plain PyTorch, in two forms: no library has one that runs on a CPU."""
    from benchmarks.plain_mamba3 import PlainMamba3

    return {f"torch {form}": PlainMamba3(d_model, form) for form in ("loop", "quadratic")}


def language_model(d_model: int, n_layer: int, vocab_size: int) -> Any:
    """transformers' Mamba of that shape, random weights; None where it is not installed."""
    if not find_spec("transformers"):
        return None
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"hidden_size": d_model, "num_hidden_layers": n_layer, "state_size": 16, "vocab_size": vocab_size}
    return MambaForCausalLM(MambaConfig(**shape)).eval()


def mambapy_language_model(
    d_model: int, n_layer: int, vocab_size: int
) -> tuple[nn.Module, Callable[..., Tensor]] | None:
    """mambapy's blocks between an embedding and a tied output matrix, and its loss (ids, targets) -> scalar."""
    if not find_spec("mambapy"):
        return None
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm  # its own LM needs einops as well

    embedding = nn.Embedding(vocab_size, d_model)
    model = nn.Sequential(
        embedding, Mamba(MambaConfig(d_model=d_model, n_layers=n_layer, d_state=16)), RMSNorm(d_model)
    )

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = nn.functional.linear(model(ids), embedding.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return model, loss


def cuda_scan() -> Callable[..., Tensor] | None:
    """mamba_ssm's scan with gate and softplus, of channels-first u, dt, z (b, d, t) and B, C (b, n, t)."""
    if not find_spec("mamba_ssm"):
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return lambda u, dt, A, B, C, D, z, dt_bias: selective_scan_fn(u, dt, A, B, C, D, z, dt_bias, True)


def cuda_scan_step() -> Callable[..., Tensor] | None:
    """mamba_ssm's token of the scan, in place."""
    if not find_spec("mamba_ssm"):
        return None
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return lambda h, u, dt, A, B, C, D, z, dt_bias: selective_state_update(h, u, dt, A, B, C, D, z, dt_bias, True)


def cuda_convolution() -> Callable[..., Tensor] | None:
    """causal_conv1d's convolution with silu, of channels-first x (b, d, t)."""
    if not find_spec("causal_conv1d"):
        return None
    from causal_conv1d import causal_conv1d_fn

    return lambda x, weight, bias: causal_conv1d_fn(x, weight, bias, activation="silu")
