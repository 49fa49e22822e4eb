"""Engines and streams: texts that go on after one, that leave one, and loops that share an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import FILTERS, GREEDY, alone, leaves, on_device, peaked_model, texts
from scripted import Scripted

from stateline import Engine, state
from stateline.generation import Request, SamplingConfig, Stream
from stateline.models import LanguageModel


@pytest.fixture(params=["host", "device"])
def slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots as they are here, and those of a device."""
    if request.param == "device":
        on_device(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return peaked_model()


# ---- after a stream, and leaving one ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("slots")
@pytest.mark.parametrize("options", FILTERS)
def test_a_prefix_is_read_once_and_serves_many(model: LanguageModel, options: dict[str, Any]) -> None:
    sampling = SamplingConfig(seed=4, **options)
    prefix = Stream(model, sampling=sampling)
    prefix.feed("A prefix that many have in common: é"[:-1].encode() + b"\xc3")
    before = state.clone(prefix.state)
    engine = Engine(model, max_batch=4)
    requests = [engine.add(p, after=prefix, max_tokens=75) for p in ("", "one", "two, longer")]
    other = engine.add("one", after=prefix, max_tokens=20, sampling=SamplingConfig(seed=9))
    found = texts(engine.run())
    for request, prompt in zip(requests, ("", "one", "two, longer"), strict=True):
        stream = prefix.fork()
        stream.feed(prompt)
        assert found[request] == "".join(stream.text(75, final=True))
    assert found[other] != found[requests[1]][: len(found[other])]
    assert all(map(torch.equal, leaves(before), leaves(prefix.state)))


def test_requests_that_wait_after_a_stream_share_one_copy(model: LanguageModel) -> None:
    engine, stream = Engine(model, max_batch=1), Stream(model, sampling=GREEDY, rollback=8)
    expected = []

    def ask(end: str) -> Request:
        turn = stream.fork()
        turn.feed(end)
        expected.append("".join(turn.text(5, final=True)))
        return engine.add(end, after=stream, max_tokens=5)

    def places(requests: list[Request]) -> set[int]:
        return {leaves(request.part[0])[0].data_ptr() for request in requests if request.part}

    stream.feed("A prefix")
    requests = [ask(end) for end in ("a", "b", "c")]
    assert len(places(requests)) == 1
    assert places(requests) != {leaves(stream.state)[0].data_ptr()}
    for change in (
        lambda: list(stream.tokens(1)),
        lambda: stream.feed("d"),
        lambda: (stream.rollback(1), stream.feed("e")),  # as long, and another text
        lambda: (stream.rollback(1), list(stream.tokens(1))),
    ):
        before = places(requests)
        change()
        new = [ask("f"), ask("g")]
        assert len(places(new) - before) == len(places(new)) == 1
        requests += new
    found = texts(engine.run())
    assert [found[request] for request in requests] == expected
    assert engine.add(after=stream).part[0] is not stream.state


@pytest.mark.usefixtures("slots")
@pytest.mark.parametrize("options", FILTERS)
def test_a_kept_stream_goes_on_where_the_text_ended(model: LanguageModel, options: dict[str, Any]) -> None:
    sampling = SamplingConfig(seed=6, **options)
    engine = Engine(model, max_batch=3)
    engine.add("company", max_tokens=40)
    ends: dict[str, dict[str, Any]] = {
        "length": {"max_tokens": 70}, "stop": {"stop": ["e", "a", " "]}, "read": {"max_tokens": 0},
    }  # fmt: skip
    requests = {name: engine.add("A prompt", sampling=sampling, keep=True, **given) for name, given in ends.items()}
    found = texts(engine.run())
    for name, request in requests.items():
        stream = Stream(model, sampling=sampling)
        stream.feed("A prompt")
        given = {"max_tokens": 256, **ends[name]}
        assert found[request] == "".join(stream.text(given["max_tokens"], stop=given.get("stop", ()), final=True))
        assert request.stream is not None
        assert request.stream.length == stream.length
        assert list(request.stream.tokens(30)) == list(stream.tokens(30))


@pytest.mark.usefixtures("slots")
def test_turns_of_a_talk(model: LanguageModel, tmp_path: Path) -> None:
    """Kept, saved, loaded, continued: as one stream would have written it; cancelled texts go on, too."""
    engine = Engine(model, max_batch=2)
    first = engine.add("Question", max_tokens=None, keep=True, sampling=SamplingConfig(seed=1, repetition_penalty=1.2))
    told = ""
    for event in engine.run():
        told += event.text
        if first.count == 15 and not event.reason:
            engine.cancel(first)
    assert first.reason == "cancelled"
    assert first.stream is not None
    first.stream.save(tmp_path / "talk")
    second = engine.add(" more", after=Stream.load(tmp_path / "talk", model), max_tokens=20)
    found = texts(engine.run())[second]
    stream = Stream(model, sampling=SamplingConfig(seed=1, repetition_penalty=1.2))
    stream.feed("Question")
    assert told == "".join(stream.text(first.count))
    stream.feed(" more")
    assert found == "".join(stream.text(20, final=True))


@pytest.mark.usefixtures("slots")
def test_a_kept_text_is_cancelled_after_any_step(model: LanguageModel) -> None:
    """Its stream goes on after what was told, also where the last token was under way."""
    whole = Stream(model, sampling=GREEDY)
    whole.feed("War and")
    expected = [token.id for token in whole.tokens(9)]
    for steps in range(1, 6):
        engine = Engine(model, max_batch=2)
        request = engine.add("War and", max_tokens=4, sampling=GREEDY, keep=True)
        events = [event for _ in range(steps) for event in engine.step()]
        engine.cancel(request)
        events += engine.run()
        assert request.stream is not None
        told = [event.token.id for event in events if event.token]
        assert told + [token.id for token in request.stream.tokens(9 - len(told))] == expected


@pytest.mark.usefixtures("slots")
def test_a_character_begun_by_a_stream_is_finished() -> None:
    model: Any = Scripted("né!".encode())
    stream = Stream(model, sampling=GREEDY)
    stream.feed("x")
    assert "".join(stream.text(2)) == "n"
    engine = Engine(model)
    request = engine.add(after=stream, max_tokens=2)
    assert texts(engine.run()) == {request: "é!"}


# ---- loops over an engine's streams ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("slots")
def test_streams_and_requests_share_an_engine(model: LanguageModel) -> None:
    """Each loop is told of its own, whichever of them made the step."""
    prompts, options = ["a", "bb", "ccc", "dddd"], {"max_tokens": 9, "sampling": GREEDY}
    engine = Engine(model, max_batch=3)
    first, second = engine.stream(prompts[:2], **options), engine.stream(prompts[2:], **options)
    found, requests = [""] * 4, []
    for row, piece in first:
        found[row] += piece
        if len(requests) < 3:
            requests.append(engine.add("e", max_tokens=5, sampling=GREEDY))
        for row, piece in second:
            found[2 + row] += piece
            break
    assert engine.generate(["f"], **options) == [alone(model, "f", **options)]
    told = texts(engine.run())
    for row, piece in second:
        found[2 + row] += piece
    assert found == [alone(model, prompt, **options) for prompt in prompts]
    assert told == dict.fromkeys(requests, alone(model, "e", max_tokens=5, sampling=GREEDY))
    assert not engine.busy


@pytest.mark.usefixtures("slots")
def test_a_stream_is_queued_at_once_and_left_at_any_time(model: LanguageModel) -> None:
    engine = Engine(model, max_batch=2)
    pieces = engine.stream(["a", "b"], max_tokens=4, sampling=GREEDY)
    assert engine.busy
    assert list(engine.run()) == []  # nobody else's to tell
    assert "".join(piece for row, piece in pieces if row == 1) == alone(model, "b", max_tokens=4, sampling=GREEDY)
    engine.stream(["a"], max_tokens=None)  # never looked at
    for _ in engine.stream(["a", "b", "c"], max_tokens=None):
        break
    other = engine.add("b", max_tokens=4, sampling=GREEDY)
    assert texts(engine.run()) == {other: alone(model, "b", max_tokens=4, sampling=GREEDY)}
    assert not engine.busy


@pytest.mark.usefixtures("slots")
def test_a_failed_prompt_of_a_list_raises_and_the_others_are_dropped(model: LanguageModel, tmp_path: Path) -> None:
    engine = Engine(model, max_batch=2)
    other = engine.add("b", max_tokens=4, sampling=GREEDY)
    with pytest.raises(FileNotFoundError):
        engine.generate(["a", tmp_path / "absent", "c"], max_tokens=10**9)
    assert texts(engine.run()) == {other: alone(model, "b", max_tokens=4, sampling=GREEDY)}
