"""What tests of engines share: a small model, the slots of a device, and what is said of whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stateline.generation import Event, Request, SamplingConfig, generate
from stateline.generation import engine as engine_module
from stateline.generation.slots import DeviceSlots
from stateline.models import LanguageModel, ModelConfig

GREEDY = SamplingConfig(temperature=0)
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 5, "temperature": 0.7},
    {"top_p": 0.8, "repetition_penalty": 1.5},
    {"min_p": 0.1, "repetition_penalty": 1.3, "repetition_window": None},
    {"temperature": 0.0, "repetition_penalty": 2.0, "repetition_window": 200},
]


def on_device(patch: pytest.MonkeyPatch) -> None:
    """Give engines the slots of a CUDA device, without its graphs: tokens are looked at a step later."""
    patch.setattr(engine_module, "HostSlots", lambda *given: DeviceSlots(*given, False))


def peaked_model() -> LanguageModel:
    torch.manual_seed(5)
    config = ModelConfig(d_model=16, n_layer=2, vocab_size=256, ssm_cfg={"d_state": 4}, tie_embeddings=False)
    model = LanguageModel(config, dtype=torch.float64)
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
    return model


def texts(events: Iterator[Event]) -> dict[Request, str]:
    found: dict[Request, str] = {}
    for event in events:
        found[event.request] = found.get(event.request, "") + event.text
    return found


def alone(model: Any, prompt: Any, **options: Any) -> str:
    return "".join(generate(model, prompt, **options))


def leaves(tree: Any) -> list[Tensor]:
    return list(pytree.tree_leaves(tree))
