"""Sampling: filters against tables worked out by hand, draws against their distribution, refusals one by one."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from stateline.generation import History, Sampler, SamplingConfig, distribution, sample
from stateline.generation.sampling import new_generator

#: Probabilities 0.5, 0.25, 0.125, 0.125 in another order, so that nothing works by position alone.
TABLE = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()


def seen(*ids: int, window: int | None = None) -> History:
    history = History(window)
    history.see(ids)
    return history


def probabilities(*, history: History | None = None, **options: Any) -> list[float]:
    return [round(p, 6) for p in distribution(TABLE, SamplingConfig(**options), history).tolist()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.125, 0.5, 0.125, 0.25]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        # squares 1/64, 1/4, 1/64, 1/16 over their sum 22/64
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 1 / 22, 4 / 22]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3}, [0.125, 0.5, 0.125, 0.25]),  # the two at 0.125 are equals: both stay
        ({"top_k": 99}, [0.125, 0.5, 0.125, 0.25]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),  # 0.5 reaches it alone
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [1 / 7, 4 / 7, 0, 2 / 7]),  # of equals the lower id
        ({"top_p": 0.9}, [0.125, 0.5, 0.125, 0.25]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),  # never fewer than one
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),  # 0.25 is half of 0.5, 0.125 a quarter
        ({"min_p": 0.6}, [0, 1, 0, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # temperature first: after squaring, the likeliest has 16/22 and reaches 0.7 alone
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
        # top-k before top-p: of the two kept, 2/3 reaches 0.6 alone (of all four, 0.5 would not)
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ],
)
def test_filters_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert probabilities(**options) == [round(e, 6) for e in expected]


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0, 0.0])
    config = SamplingConfig(repetition_penalty=2.0)
    expected = torch.tensor([1.0, 1.0, -2.0, 0.0]).double().softmax(0)  # 2/2, untouched, -1·2, 0 either way
    torch.testing.assert_close(distribution(logits, config, seen(0, 2, 3, 3)), expected)
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=3.0)
    assert sample(logits, greedy, new_generator(0), seen(0)).id == 1  # the penalty works under greedy too


@pytest.mark.parametrize("window", [1, 3, None])
def test_history_forgets_what_leaves_its_window(window: int | None) -> None:
    fed = [5, 1, 5, 2, 2, 9, 1, 7, 7, 7]
    history, together = History(window), History(window)
    for n, token in enumerate(fed, 1):
        history.see([token])
        expected = set(fed[:n] if window is None else fed[max(0, n - window) : n])
        assert set(history.ids()) == expected
    together.see(fed)
    assert set(together.ids()) == set(history.ids())


def test_history_is_bounded() -> None:
    for window in (8, None):
        history = History(window)
        history.see(i % 256 for i in range(10_000))
        assert len(history.ids()) == (8 if window else 256)
        assert len(history._recent) <= 8


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 9}],
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over 4,000 draws with a fixed seed: passes a right sampler, fails one that is off by some per cent."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    config = SamplingConfig(seed=11, **options)
    generator = new_generator(config.seed)
    draws = 4_000
    counts = np.bincount([sample(logits, config, generator).id for _ in range(draws)], minlength=12)
    expected = _plain_distribution(logits.double().numpy(), **options) * draws
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = float((((counts - expected) ** 2)[kept] / expected[kept]).sum())
    assert statistic < _chi_square_bound(int(kept.sum()) - 1), (counts, expected)


def _plain_distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The definition once more, over a sorted list and without any care for speed."""
    p = np.exp(logits / temperature)
    p /= p.sum()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        ranked = ranked[:top_k]
    total, kept = sum(p[i] for i in ranked), []
    for i in ranked:
        if top_p < 1 and sum(p[j] for j in kept) >= top_p * total:
            break
        kept.append(i)
    kept = [i for i in kept if p[i] >= min_p * p[ranked[0]]]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


def _chi_square_bound(freedom: int) -> float:
    """The 99.9 % point (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32)),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.integers(0, 6),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_any_filters_leave_the_likeliest_and_only_draw_what_is_left(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    config = SamplingConfig(temperature, top_k, top_p, min_p, seed=0)
    p = distribution(torch.from_numpy(logits), config).numpy()
    assert p.sum() == pytest.approx(1.0)
    assert p.max() > 0
    assert logits[p.argmax()] >= logits.max() - 1e-6  # logits nearer than that are equal in probability
    token = sample(torch.from_numpy(logits), config, new_generator(0)).id
    assert p[token] > 0


def test_extremes_of_the_random_number_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for u, expected in ((0.0, 1), (math.nextafter(1.0, 0.0), 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor(u, dtype=torch.float64))
        assert sample(logits, SamplingConfig(), new_generator(0)).id == expected


def test_same_seed_same_draws_and_the_global_state_is_left_alone() -> None:
    logits = torch.randn(50)
    before = torch.get_rng_state()

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingConfig(seed=seed))
        return [sampler.draw(logits).id for _ in range(30)]

    assert draws(4) == draws(4) != draws(5)
    assert draws(None) != draws(None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logprob_is_the_models_own(dtype: torch.dtype) -> None:
    logits = torch.randn(20).to(dtype)
    drawn = SamplingConfig(temperature=3.0, top_k=2, seed=1)
    for config in (SamplingConfig(temperature=0.0), drawn, SamplingConfig(temperature=0.0, repetition_penalty=9.0)):
        token = sample(logits, config, new_generator(0), seen(*range(20)))
        assert token.logprob == pytest.approx(logits.double().log_softmax(0)[token.id].item(), abs=1e-6)


def test_a_sampler_sees_what_it_draws() -> None:
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=2.0, repetition_window=2))
    logits = torch.tensor([4.0, 3.0, 2.5, 0.0])
    # 0 halves to 2; then 1 to 1.5; then 0 is forgotten again
    assert [sampler.draw(logits).id for _ in range(5)] == [0, 1, 2, 0, 1]
    assert sampler.drawn == 5


def test_greedy_takes_the_first_of_equals_and_needs_no_random_number() -> None:
    generator = new_generator(0)
    before = generator.get_state()
    assert sample(torch.tensor([1.0, 3.0, 3.0, 2.0]), SamplingConfig(temperature=0), generator).id == 1
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0.0, math.nan], "the logits at generated token 7 hold NaN"),
        ([math.inf, 0.0], r"the logits at generated token 7 hold \+inf"),
        ([-math.inf, -math.inf], "no logit is above -inf at generated token 7"),
        ([math.inf, math.nan], "hold NaN"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(logits: list[float], message: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=message):
        sample(torch.tensor(logits), SamplingConfig(temperature=temperature), new_generator(0), step=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"top_k": -1}, "top_k is -1, expected a whole number at least 0"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"repetition_window": 0}, "repetition_window is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_settings_are_refused_one_by_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"SamplingConfig: {message}"):
        SamplingConfig(**options)
