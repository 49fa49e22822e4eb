"""Tokens drawn by kernels against those that the host draws from the same logits and random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from device_sampling_cases import configs, logits_of, made, samplers_after
from where import DEVICE, INTERPRETED

from stateline.generation import SamplingConfig, distribution, gpu_sampling
from stateline.generation import device_sampling as on_device
from stateline.generation.sampling import Sampler

PROMPTS = [[3], [5, 5, 9, 299, 1], list(range(100, 190))]
SIZES = [300] if INTERPRETED else [1, 200, 1024, 3000, 50_280]
EVERY = 7 if INTERPRETED else 1  # the interpreter takes a minute for all


@pytest.mark.parametrize("kind", ["half", "ruled"] if INTERPRETED else ["flat", "peaked", "half", "coarse", "ruled"])
@pytest.mark.parametrize("v", SIZES)
def test_tokens_are_those_of_the_host(kind: str, v: int) -> None:
    samplers = samplers_after(PROMPTS)
    if kind in ("half", "coarse"):  # numbers of 16 bits; a penalty's are of 32
        samplers = [s for s in samplers if s.config.repetition_penalty == 1]
    samplers = samplers[::EVERY]
    rows, plan = made(samplers, v, DEVICE)
    for _ in range(1 if INTERPRETED else 70 if v == 200 else 5):  # longer than any window
        logits = logits_of(kind, len(samplers), v)
        found = gpu_sampling.draw(logits.to(DEVICE), rows, plan).cpu()
        for i, sampler in enumerate(samplers):
            token = sampler.draw(logits[i])
            assert found[i, 0] == token.id, sampler.config
            assert found[i, 1] == pytest.approx(token.logprob, abs=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="each configuration has variants of its own; the interpreter takes long")
@pytest.mark.parametrize("config", configs(), ids=str)
def test_each_configuration_alone(config: SamplingConfig) -> None:
    """With its own plan: kernels leave out what it does not ask for."""
    sampler, v = Sampler(config), 3000
    sampler.see([1, 2, 3, 2])
    rows, plan = made([sampler], v, DEVICE)
    for kind in ("peaked", "coarse", "half"):
        logits = logits_of(kind, 1, v)
        assert gpu_sampling.draw(logits.to(DEVICE), rows, plan).cpu()[0, 0] == sampler.draw(logits[0]).id


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter too long")
@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.5, "min_p": 0.01}])
def test_frequencies_are_the_distribution(filters: dict[str, float]) -> None:
    config, b, v = SamplingConfig(seed=0, **filters), 4000, 50_280  # type: ignore[arg-type]
    rows, plan = made([Sampler(config)], v, DEVICE)
    rows = {name: x.repeat(b, 1) for name, x in rows.items()}
    rows["uniforms"] = torch.rand(b, on_device.READY, dtype=torch.float64, device=DEVICE)
    logits = logits_of("peaked", 1, v)
    expected = distribution(logits[0], config)
    drawn = gpu_sampling.draw(logits.to(DEVICE).expand(b, v), rows, plan)[:, 0].long().cpu()
    assert (expected[drawn] > 0).all()
    found = torch.bincount(drawn, minlength=v) / b
    error = (expected * (1 - expected) / b).sqrt()
    assert ((found - expected).abs() <= 6 * error + 2 / b).all()


@pytest.mark.parametrize("broken", [math.nan] if INTERPRETED else [math.nan, math.inf, -math.inf])
def test_broken_logits_harm_no_other_row(broken: float) -> None:
    samplers = [Sampler(c) for c in configs()[1 :: 2 * EVERY]]
    for s in samplers:
        s.see([1])
    rows, plan = made(samplers, 50, DEVICE)
    twin = {name: x.clone() for name, x in rows.items()}
    logits = logits_of("flat", len(samplers), 50, DEVICE)
    whole = gpu_sampling.draw(logits, twin, plan)
    logits[::2] = broken if broken < 0 else logits[::2].clone().index_fill_(1, torch.tensor([7], device=DEVICE), broken)
    found = gpu_sampling.draw(logits, rows, plan)
    assert (found[::2, 0] == -1).all()
    assert torch.equal(found[::2, 1], torch.full_like(found[::2, 1], broken)) or found[::2, 1].isnan().all()
    assert torch.equal(found[1::2], whole[1::2])


@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter too long")
def test_rows_of_a_wider_table() -> None:
    """As a model's logits are, whose table is padded; and a row's bits do not depend on its batch."""
    samplers = samplers_after(PROMPTS)[1 :: 2 * EVERY]
    wide = logits_of("peaked", len(samplers), 310, DEVICE)
    rows, plan = made(samplers, 300, DEVICE)
    alone = {name: x[1:2].clone() for name, x in rows.items()}
    found = gpu_sampling.draw(wide[:, :300], rows, plan)
    assert torch.equal(gpu_sampling.draw(wide[1:2, :300].contiguous(), alone, plan), found[1:2])
