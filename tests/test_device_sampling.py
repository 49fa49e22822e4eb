"""The sampler that works where the logits are, against the one on the host: probabilities, draws, memory of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from device_sampling_cases import configs, logits_of, made, samplers_after

from stateline.generation import SamplingConfig
from stateline.generation import device_sampling as on_device
from stateline.generation.sampling import Sampler, distribution, new_generator

PROMPTS = [[3], [5, 5, 9, 299, 1], list(range(100, 190))]


@pytest.mark.parametrize("kind", ["flat", "peaked", "coarse", "ruled"])
@pytest.mark.parametrize("v", [200, 256, 300])
def test_probabilities_are_those_of_the_host(kind: str, v: int) -> None:
    samplers = samplers_after(PROMPTS)
    logits = logits_of(kind, len(samplers), v)
    rows, plan = made(samplers, v)
    found = on_device.distribution(logits, rows, plan)
    for i, sampler in enumerate(samplers):
        if not sampler.config.greedy:
            expected = distribution(logits[i], sampler.config, sampler.history)
            torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-300, msg=f"{sampler.config}")


@pytest.mark.parametrize("v", [200, 300])
def test_tokens_are_those_of_the_host(v: int) -> None:
    """In a batch and alone, long enough for every window but the prompt's to be filled anew."""
    samplers = samplers_after(PROMPTS)
    rows, plan = made(samplers, v)
    some = range(0, len(samplers), 6)
    alone = [made([samplers[i]], v) for i in some]
    for step in range(40):
        logits = logits_of(["peaked", "coarse"][step % 2], len(samplers), v)
        found = on_device.draw(logits, rows, plan)
        for i, (own, own_plan) in zip(some, alone, strict=True):
            torch.testing.assert_close(on_device.draw(logits[i : i + 1], own, own_plan)[0], found[i])
        for i, sampler in enumerate(samplers):
            token = sampler.draw(logits[i])
            assert found[i, 0] == token.id, (step, sampler.config)
            assert found[i, 1] == pytest.approx(token.logprob, abs=1e-6)


@pytest.mark.parametrize("b", [1, 3, 40])
def test_a_nucleus_of_many_ids(b: int) -> None:
    """Whatever the number of thresholds tried at once."""
    config, v = SamplingConfig(top_p=0.7, seed=1), 5000
    rows, plan = made([Sampler(config)] * b, v)
    logits = logits_of("coarse", b, v)
    found = on_device.distribution(logits, rows, plan)
    for i in range(b):
        torch.testing.assert_close(found[i], distribution(logits[i], config), rtol=1e-12, atol=0)


def test_more_columns_change_nothing() -> None:
    v, samplers = 300, samplers_after(PROMPTS)
    samplers = [s for s in samplers if s.config.repetition_window is not None or s.config.repetition_penalty == 1]
    rows, plan = made(samplers, v)
    wide = {name: x.clone() for name, x in rows.items()}
    wide["recent"] = on_device.widened(rows, 300)
    wide["recent"] = on_device.widened(wide, 777)
    for _ in range(30):
        logits = logits_of("peaked", len(samplers), v)
        assert torch.equal(on_device.draw(logits, rows, plan), on_device.draw(logits, wide, plan))


def test_numbers_ready_in_advance_are_those_drawn_one_by_one() -> None:
    ready, single = new_generator(5), new_generator(5)
    for _ in range(3):
        block = torch.rand(on_device.HALF, dtype=torch.float64, generator=ready)
        assert block.tolist() == [torch.rand((), dtype=torch.float64, generator=single).item() for _ in block]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_logits_harm_no_other_row(broken: float) -> None:
    samplers = [Sampler(c) for c in configs()]
    for s in samplers:
        s.see([1])
    rows, plan = made(samplers, 50)
    twin = {name: x.clone() for name, x in rows.items()}
    logits = logits_of("flat", len(samplers), 50)
    whole = on_device.draw(logits, twin, plan)
    logits[::2] = broken if broken < 0 else logits[::2].clone().index_fill_(1, torch.tensor([7]), broken)
    found = on_device.draw(logits, rows, plan)
    assert (found[::2, 0] == -1).all()
    assert torch.equal(found[::2, 1], torch.full_like(found[::2, 1], broken)) or found[::2, 1].isnan().all()
    assert torch.equal(found[1::2], whole[1::2])


def test_a_plan_leaves_out_what_nobody_asks_for() -> None:
    greedy = SamplingConfig(temperature=0, top_k=5, top_p=0.5, min_p=0.5)
    assert on_device.plan_for([greedy], 300) == (False, 0, False, False, False)
    assert on_device.plan_for([greedy, SamplingConfig(top_k=5)], 300) == (True, 8, False, False, False)
    assert on_device.plan_for([SamplingConfig(top_k=290), SamplingConfig(min_p=0.1)], 300) == (
        True,
        300,
        False,
        True,
        False,
    )
    assert on_device.plan_for([SamplingConfig(top_k=300, top_p=0.9)], 300) == (True, 0, True, False, False)
    assert on_device.plan_for([SamplingConfig(temperature=0, repetition_penalty=2.0)], 300)[-1]
