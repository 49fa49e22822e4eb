"""Engines' graphs without a GPU: captures are pretended, and a replay does what was captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import GREEDY

import stateline
from stateline import Engine
from stateline.generation import SamplingConfig, Stream, generate
from stateline.generation import engine as engine_module
from stateline.generation.slots import DeviceSlots
from stateline.models import LanguageModel, ModelConfig


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: FakeStream) -> None:
        pass


class FakeGraph:
    """A captured step. What it would read lies where it lay at the capture, or a replay fails."""

    def __init__(self) -> None:
        self.step: Callable[[], None] = lambda: None
        self.model: Any = None
        self.places: list[Any] = []

    def pool(self) -> None:
        return None

    def holds(self, model: Any, step: Callable[[], None]) -> None:
        self.step, self.model, self.places = step, model, places(model)

    def replay(self) -> None:
        assert places(self.model) == self.places, "a graph reads tensors that have moved"
        self.step()


def places(model: Any) -> list[Any]:
    step = getattr(model, "token_step", None)
    return [step and step.network, *(x.data_ptr() for x in (*model.parameters(), *model.buffers()))]


class Fake:
    """Stands in for torch's streams and graphs. `warmed`, `captured`: each step's rows and stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.main = self.now = FakeStream()
        self.everyones = FakeStream()  # what torch captures on where no stream is named
        self.graph: FakeGraph | None = None
        self.warmed: list[tuple[int, FakeStream]] = []
        self.captured: list[tuple[int, FakeStream]] = []
        for name, value in (
            ("Stream", FakeStream), ("CUDAGraph", FakeGraph), ("stream", self.on), ("graph", self.capture),
            ("current_stream", lambda *_: self.now), ("synchronize", lambda *_: None),
        ):  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        patch.setattr(engine_module, "HostSlots", lambda *given: DeviceSlots(*given, True))
        self.step = DeviceSlots._step
        patch.setattr(DeviceSlots, "_step", lambda *given: self.seen(*given))

    def seen(self, slots: DeviceSlots, view: Any, plan: Any) -> None:
        rows = len(view["ids"])
        if self.graph is not None:
            self.captured.append((rows, self.now))
            self.graph.holds(slots._model, lambda: self.step(slots, view, plan))
            return
        if self.now is not self.main:
            self.warmed.append((rows, self.now))
        self.step(slots, view, plan)

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    @contextlib.contextmanager
    def capture(self, graph: FakeGraph, pool: Any = None, stream: FakeStream | None = None, **_: Any) -> Iterator[None]:
        with self.on(stream or self.everyones):
            self.graph = graph
            yield
            self.graph = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def random_model(seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256, tie_embeddings=False))
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
    return model


def test_steps_are_warmed_up_and_captured_on_the_engines_own_stream(fake: Fake) -> None:
    model, streams = random_model(1), []
    for _ in range(2):
        fake.warmed.clear()
        fake.captured.clear()
        engine = Engine(model, max_batch=6)
        engine.prepare(GREEDY, SamplingConfig())
        (stream,) = {stream for _, stream in fake.captured}
        assert {stream for _, stream in fake.warmed} == {stream}
        assert {rows for rows, _ in fake.captured} == {rows for rows, _ in fake.warmed} == {1, 2, 4, 6}
        assert stream.device == torch.device("cpu")
        streams.append(stream)
    assert streams[0] is not streams[1]
    assert fake.everyones not in streams


def test_graphs_write_what_streams_write(fake: Fake) -> None:
    model = random_model(2)
    engine = Engine(model, max_batch=4)
    prompts = ["abc", "d", "ef", "g", "hijk"]
    sampling = SamplingConfig(seed=5, top_p=0.9)
    expected = [
        "".join(generate(model, prompt, max_tokens=9 + i, sampling=sampling)) for i, prompt in enumerate(prompts)
    ]
    requests = [engine.add(prompt, max_tokens=9 + i, sampling=sampling) for i, prompt in enumerate(prompts)]
    found = dict.fromkeys(requests, "")
    for event in engine.run():
        found[event.request] += event.text
    assert list(found.values()) == expected
    assert fake.captured


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_between_texts_are_those_that_graphs_read(fake: Fake, packed: bool, assign: bool) -> None:
    """A packed model's step reads copies that are made anew; others' tensors move where they are not copied into."""
    old, new = (stateline.prepare_for_decode(m, "int8") if packed else m for m in (random_model(3), random_model(4)))
    engine = Engine(old, max_batch=2)
    before = engine.generate(["abc", "d"], max_tokens=9, sampling=GREEDY)
    captures = len(fake.captured)
    assert before == engine.generate(["abc", "d"], max_tokens=9, sampling=GREEDY)
    assert len(fake.captured) == captures
    old.load_state_dict({name: x.clone() for name, x in new.state_dict().items()}, assign=assign)
    after = engine.generate(["abc", "d"], max_tokens=9, sampling=GREEDY)
    assert after == ["".join(generate(new, prompt, max_tokens=9, sampling=GREEDY)) for prompt in ("abc", "d")]
    assert after != before
    assert (len(fake.captured) > captures) == (packed or assign)


def test_a_stream_beside_an_engine_does_no_harm_after_weights_were_loaded(fake: Fake) -> None:
    """It makes the copies that a packed model's step reads, before the engine asks for them."""
    model = stateline.prepare_for_decode(random_model(3), "int8")
    engine = Engine(model, max_batch=1)
    engine.prepare(GREEDY)
    model.load_state_dict(stateline.prepare_for_decode(random_model(4), "int8").state_dict())
    stream = Stream(model, sampling=GREEDY)
    stream.feed("abc")
    expected = "".join(stream.text(9, final=True))
    assert engine.generate(["abc"], max_tokens=9, sampling=GREEDY) == [expected]
