"""The one search: many functions side by side, each with its own steps, its own end and its own reason."""

from __future__ import annotations

import math

import pytest
import torch

from stateline.classical import minimise as search
from stateline.classical.minimise import minimise


def test_minima_of_many_functions_are_found_each_in_its_own_time() -> None:
    """Rosenbrock's valley, stretched differently for each; one that is flat from the start."""
    stretch = torch.tensor([0.0, 1.0, 10.0, 100.0], dtype=torch.float64)

    def valley(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = stretch[rows]
        bend = x[:, 1] - x[:, 0] ** 2
        value = s * bend**2 + (1 - x[:, 0]) ** 2 * (s > 0)
        slope = torch.stack([-4 * s * bend * x[:, 0] - 2 * (1 - x[:, 0]) * (s > 0), 2 * s * bend], 1)
        return value, slope

    found = minimise(valley, torch.tensor([[-1.2, 1.0]], dtype=torch.float64).expand(4, 2).clone(), tolerance=1e-8)
    assert found.converged.all()
    assert (found.x[1:] - 1).abs().max() < 1e-4
    assert found.x[0].tolist() == [-1.2, 1.0]
    assert found.evaluations[0] < found.evaluations[1] < found.evaluations[3]
    steep = minimise(  # down from beside a peak, where nothing bends up
        lambda x, rows: (10 * torch.cos(x[:, 0] / 10), -torch.sin(x / 10)), 0.1 * torch.ones(1, 1).double(), longest=9
    )
    assert steep.x.item() == pytest.approx(10 * math.pi, abs=1e-3)
    assert steep.evaluations.item() < 30
    short = minimise(valley, torch.tensor([[-1.2, 1.0]], dtype=torch.float64).expand(4, 2).clone(), evaluations=3)
    assert short.converged.tolist() == [True, False, False, False]
    assert short.reason.tolist() == [search.FLAT, *[search.EVALUATIONS] * 3]


def test_a_search_tells_its_steps_and_why_it_ended_and_does_not_depend_on_others() -> None:
    def bowl(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row 0 is round, row 1 long, row 2 a wall from where it starts, row 3 nowhere finite."""
        weight = torch.tensor([[1.0, 1.0], [1.0, 300.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)[rows]
        value, slope = (weight * x**2).sum(1), 2 * weight * x
        wall = rows == 2
        value = torch.where(wall, torch.where((x == 2).all(1), 5.0, 6.0), value)
        slope = torch.where(wall[:, None], 1.0, slope)
        return torch.where(rows == 3, torch.nan, value), slope

    start, told = torch.full((4, 2), 2.0, dtype=torch.float64), []
    found = minimise(
        bowl, start, tolerance=0.0, gain=1e-9, steps=30, report=lambda n, v, x: told.append((n, v.clone(), x.clone()))
    )
    assert found.reason.tolist() == [search.FLAT, search.LITTLE, search.STUCK, search.NOWHERE]
    assert found.converged.tolist() == [True, True, False, False]
    assert (found.trace[:, :2].diff(dim=0) <= 0).all()
    assert torch.equal(found.trace[-1, :3], found.value[:3])
    assert [step for step, _, _ in told] == list(range(1, len(found.trace)))
    torch.testing.assert_close(told[-1][1], found.value, equal_nan=True, rtol=0, atol=1e-9)
    alone = minimise(lambda x, rows: bowl(x, rows + 1), start[1:2], tolerance=0.0, gain=1e-9, steps=30)
    assert torch.equal(alone.x[0], found.x[1])
    assert torch.equal(alone.trace[:, 0], found.trace[: len(alone.trace), 1])
    few = minimise(bowl, start[:2], steps=2)
    assert few.reason.tolist() == [search.STEPS] * 2
    assert len(few.trace) == 3


def test_a_memory_that_leads_nowhere_is_forgotten() -> None:
    """Where no step of a remembered direction lowers a function, the slope is tried; only then is it stuck."""
    weight, calls = torch.tensor([1.0, 30.0], dtype=torch.float64), 0

    def bowl(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        value = (weight * x**2).sum(1)
        return (value if calls not in range(6, 6 + failing) else value + torch.inf), 2 * weight * x

    start = torch.full((1, 2), 2.0, dtype=torch.float64)
    failing = 9
    found = minimise(bowl, start, tolerance=1e-6)
    assert found.reason.tolist() == [search.FLAT]
    failing, calls = 100, 0
    found = minimise(bowl, start, tolerance=1e-6)
    assert found.reason.tolist() == [search.STUCK]
    assert 2 * 8 < found.evaluations.item() - 5 <= 2 * 9


def told(values: list[float], slopes: list[float] | None = None, **options: float) -> tuple[int, int]:
    """Why a search ended, and after how many evaluations, of a function that answers with these values in turn."""
    left = iter(zip(values, slopes or [1.0] * len(values), strict=True))

    def script(x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, slope = next(left)
        return torch.tensor([value], dtype=torch.float64), torch.full_like(x, slope)

    start = torch.zeros(1, 1, dtype=torch.float64)
    found = minimise(script, start, **({"tolerance": 0.0, "gain": 0.1, "evaluations": len(values)} | options))  # type: ignore[arg-type]  # numbers
    return found.reason.item(), found.evaluations.item()


def test_a_search_ends_when_three_trials_in_a_row_are_little() -> None:
    """They succeed and bring less than `gain`, or fail after promising less; a better one starts the count anew."""
    fall = torch.tensor([0.0, *[-0.01] * 20]).cumsum(0).tolist()
    assert told(fall) == (search.LITTLE, 1 + 3)
    assert told([0.0, -0.01, -0.02, -0.5, -0.51, -0.52, -0.53, -0.54]) == (search.LITTLE, 1 + 2 + 1 + 3)
    above, small = [0.0, *[1.0] * 20], [0.01] * 21  # the slope promises its square, 1e-4
    assert told(above, small) == (search.LITTLE, 1 + 3)
    assert told(above, [1.0] * 21)[0] == search.STUCK  # it promises 1: steps are shortened until they are too short
    assert told([0.0, -0.01, 1.0, -0.02, 1.0, -0.03, 1.0, -0.04]) == (search.LITTLE, 6)  # such a failure is neither


def test_where_steps_stop_succeeding_it_is_lowest_if_they_promised_next_to_nothing() -> None:
    above = [0.0, *[1.0] * 20]
    reason, taken = told(above, [1e-5] * 21, gain=0.0)
    assert reason == search.LOWEST
    once = (
        [0.0, -2e-8, *[1.0] * 40],
        [2e-4, *[1e-4] * 41],
    )  # curvature is remembered, and nothing is gained by forgetting
    assert told(*once, gain=0.0) == (search.LOWEST, taken + 1)
    wall = [0.0, -0.5, *[1.0] * 40], [1.0, *[0.5] * 41]
    reason, twice = told(*wall, gain=0.0)
    assert reason == search.STUCK
    assert twice > 1.5 * taken  # first the remembered direction, then the slope


def test_what_is_next_to_nothing() -> None:
    """`gain`, but never less than rounding; without it a part of the tolerance, of values above 1 relatively."""
    assert told([0.0, *[-0.11 * i for i in range(1, 9)]], gain=0.1)[0] == search.EVALUATIONS
    assert told([0.0, *[-0.09 * i for i in range(1, 9)]], gain=0.1)[0] == search.LITTLE
    short = {"longest": 0.01}  # so that steps promise as little
    rounding = search.ROUNDING * 1e3
    for part, reason in ((1.5, search.EVALUATIONS), (0.5, search.LITTLE)):
        gains = [1e3 - part * rounding * i for i in range(8)]
        assert told(gains, [1e-4] * 8, gain=0.0, **short)[0] == reason
        assert told(gains, [1e-4] * 8, gain=None, **short)[0] == reason  # type: ignore[arg-type]  # its default
        for size in (0.0, 1e3):
            floor = search.SMALL * 0.5 * (1 + size)
            values = [size - part * floor * i for i in range(8)]
            assert told(values, tolerance=0.5, gain=None, **short)[0] == reason  # type: ignore[arg-type]  # its default
