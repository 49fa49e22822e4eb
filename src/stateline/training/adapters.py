"""Low-rank adapters (LoRA) beside frozen weights, by the peft library.

y = W x + (alpha / rank) · B (A x): only A (rank, in) and B (out, rank) learn; B starts at 0, so training starts at the
given model. Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stateline.checks import fail
from stateline.models import LanguageModel, checkpoint
from stateline.training.config import AdapterConfig

_WRAPPED = ".base_layer"  # where peft puts the Linear that it wraps


def targets(model: LanguageModel, config: AdapterConfig) -> list[str]:
    """Full names of the Linears that get adapters. Raises ValueError for a name that no Linear has."""
    found = [name for name, module in model.backbone.named_modules() if isinstance(module, nn.Linear)]
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    wanted = kinds
    if config.lora_targets is not None:
        wanted = [name.strip() for name in config.lora_targets.split(",")]
    for name in wanted:
        if name not in kinds:
            raise fail("train", f"lora_targets has {name!r}; the blocks' Linears are {', '.join(kinds)}.")
    return [f"backbone.{name}" for name in found if name.rpartition(".")[2] in wanted]


def require() -> Any:
    """The library. Raises ValueError naming the extra if it is missing."""
    try:
        import peft
    except ImportError as error:
        remedy = "Install it: pip install 'stateline[lora]'."
        raise fail("train", "lora needs peft, which is not installed.", remedy) from error
    return peft


def add(model: LanguageModel, config: AdapterConfig) -> None:
    """Give a model adapters, in place, and freeze everything else. Draws A from the global random state.

    Raises ValueError naming the extra if peft is missing.
    """
    peft = require()
    alpha: Any = 2 * config.lora if config.lora_alpha is None else config.lora_alpha
    names = targets(model, config)
    with warnings.catch_warnings():
        # peft looks for a transformers configuration; ours says nothing that it needs
        warnings.filterwarnings("ignore", module="peft")
        wanted = peft.LoraConfig(r=config.lora, lora_alpha=alpha, target_modules=names)
        peft.inject_adapter_in_model(wanted, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names), "an A and a B each"


def present(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put stored adapters in place. Raises KeyError if they are another model's."""
    own = learnt(model)
    if set(own) != set(tensors):
        raise KeyError(f"the adapters' names are not the model's: {sorted(set(own) ^ set(tensors))[:4]}")
    for name, value in own.items():
        value.copy_(tensors[name])


@torch.no_grad()
def without(model: LanguageModel, *, merged: bool = True) -> LanguageModel:
    """A plain copy of a model, its adapters merged into the weights, or left out; the model itself stays as it is."""
    tensors = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name or (model.config.tie_embeddings and name == checkpoint.HEAD):
            continue
        tensors[name.replace(_WRAPPED, "")] = value
    if merged:
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                # peft's own arithmetic, added where it would add it
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + module.get_delta_weight("default")
    dtype = model.backbone.embedding.weight.dtype
    plain = checkpoint.assemble(model.config, tensors, Path("the adapted model"), dtype=dtype)
    plain.metadata = model.metadata
    return plain
