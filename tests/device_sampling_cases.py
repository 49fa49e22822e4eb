"""Cases for the sampler that works where the logits are, on any device."""

from __future__ import annotations

from typing import Any

import torch
from oracles import pairwise
from torch import Tensor

from stateline.generation import Sampler, SamplingConfig
from stateline.generation import device_sampling as on_device
from stateline.generation.sampling import new_generator

GRID = {
    "temperature": [0.0, 0.3, 1.0, 2.5, 1e-300],
    "top_k": [0, 1, 7, 50, 10_000],
    "top_p": [1.0, 1e-9, 0.3, 0.9, 0.999],
    "min_p": [0.0, 0.05, 1.0],
    "repetition_penalty": [1.0, 1.4, 0.7],
    "repetition_window": [1, 5, 64, None],
}


def configs() -> list[SamplingConfig]:
    """Every pair of settings, each with a seed of its own."""
    return [SamplingConfig(**case, seed=i) for i, case in enumerate(pairwise(GRID))]


def logits_of(kind: str, b: int, v: int, device: str = "cpu") -> Tensor:
    """Logits (b, v): "flat" and "peaked" ones, "coarse" and "half" with many equals, "ruled" with -inf among them."""
    x = torch.randn(b, v) * {"flat": 0.1, "peaked": 8.0}.get(kind, 3.0)
    if kind == "coarse":
        x = x.bfloat16()
    if kind == "half":
        x = x.round(decimals=1).half()
    if kind == "ruled":
        x = x.masked_fill(torch.rand(b, v) < 0.5, -torch.inf)
        x[:, 0] = 0.0
    return x.to(device)


def made(samplers: list[Sampler], v: int, device: str = "cpu") -> tuple[dict[str, Tensor], on_device.Plan]:
    """Rows for these sequences, and the plan that serves them."""
    width = max(on_device.width_for(s.config, v) for s in samplers)
    rows = []
    for s in samplers:
        uniforms = torch.rand(on_device.READY, dtype=torch.float64, generator=new_generator(s.config.seed))
        rows.append(on_device.row(s.config, s.history, uniforms, v, width))
    together: dict[str, Any] = {name: torch.cat([r[name] for r in rows]).to(device) for name in rows[0]}
    return together, on_device.plan_for([s.config for s in samplers], v)


def samplers_after(prompts: list[list[int]]) -> list[Sampler]:
    """A sampler for every configuration, which has seen a prompt."""
    found = [Sampler(config) for config in configs()]
    for i, sampler in enumerate(found):
        sampler.see(prompts[i % len(prompts)])
    return found
