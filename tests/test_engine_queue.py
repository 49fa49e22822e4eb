"""Whose turn it is in an engine: prompts between tokens, queues, and rows that a step computes."""

from __future__ import annotations

from typing import Any

import pytest
from scripted import Scripted

from stateline import Engine
from stateline.generation import SamplingConfig
from stateline.generation import engine as engine_module
from stateline.generation.slots import DeviceSlots

GREEDY = SamplingConfig(temperature=0)


def test_a_long_prompt_delays_others_by_a_chunk_a_token() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=4, chunk=10)
    writing = engine.add("a", max_tokens=None, sampling=GREEDY)
    engine.step()
    engine.add("y" * 101, max_tokens=1, sampling=GREEDY)
    for _ in range(10):
        assert [event.request for event in engine.step()][:1] == [writing]
    assert model.read == [(1, 10)] * 10
    several = [engine.add("z" * 7, max_tokens=1, sampling=GREEDY) for _ in range(2)]
    engine.step()
    assert model.read[-1] == (2, 5)
    engine.cancel(writing)
    assert {event.request for event in engine.run()} == {writing, *several}


def test_what_was_cancelled_is_not_read() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=1, chunk=4)
    writing, waiting = (engine.add("abcdefghijklm", max_tokens=3, sampling=GREEDY) for _ in range(2))
    engine.step()
    engine.cancel(waiting)
    assert [event.reason for event in engine.run() if event.request is waiting] == ["cancelled"]
    assert sum(t for _, t in model.read) == 12
    reading = engine.add("abcdefghijklm", max_tokens=3, sampling=GREEDY)
    engine.step()
    engine.cancel(reading)
    assert [event.reason for event in engine.run()] == ["cancelled"]
    assert sum(t for _, t in model.read) == 16
    assert (writing.count, waiting.count, reading.count) == (3, 0, 0)


def test_those_who_queue_are_read_in_groups() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=24)
    for i in range(60):
        engine.add("abc", max_tokens=i % 24 + 1, sampling=GREEDY)
    assert len([event for event in engine.run() if event.reason == "length"]) == 60
    assert min(b for b, _ in model.read[:-1]) >= 3
    assert max(model.stepped) == 24


def test_nobody_queues_for_ever() -> None:
    """Where texts have no end, the few rows that are free are not kept for a group that never comes."""
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=32)
    for _ in range(30):
        engine.add("abc", max_tokens=None, sampling=GREEDY)
    engine.step()
    short = [engine.add("abc", max_tokens=2, sampling=GREEDY) for _ in range(9)]
    for _ in range(100):
        engine.step()
    assert [request.reason for request in short] == ["length"] * 9


def test_steps_compute_no_more_rows_than_texts() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=8)
    for i in range(5):
        engine.add("a", max_tokens=i + 1, sampling=GREEDY)
    assert [event.reason for event in engine.run()].count("length") == 5
    assert model.stepped == [5, 4, 3, 2, 1]


def test_device_slots_step_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HostSlots", lambda *given: DeviceSlots(*given, False))
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=6)
    for i in range(6):
        engine.add("a", max_tokens=2 * i + 1, sampling=GREEDY)
    assert sum(event.token is not None for event in engine.run()) == 36
    assert model.stepped == [6, 6, 6, 4, 4, 4, 4, 2, 2, 1, 1]
