"""Engines: many texts at once against each text alone, whatever comes, ends or fails meanwhile."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from engines import FILTERS, GREEDY, alone, leaves, on_device, peaked_model, texts
from hypothesis import given, settings
from scripted import Scripted

import stateline
from stateline import Engine, backends
from stateline.generation import SamplingConfig, Stream
from stateline.models import LanguageModel, ModelConfig

PROMPTS = ["", "a", "A rather longer prompt than the others, read in several pieces", b"\xff\xfe", "né😀", list(b"ids")]


@pytest.fixture(params=["host", "device"])
def slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots as they are here, and those of a device."""
    if request.param == "device":
        on_device(monkeypatch)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return peaked_model()


# ---- against each text alone -----------------------------------------------------------------------------------------


def asked(i: int) -> dict[str, Any]:
    """The i-th request: lengths, stops and sampling of all kinds, one longer than random numbers lie ready."""
    sampling = SamplingConfig(seed=i, **FILTERS[i % len(FILTERS)])
    stops = ["e", "\x07"] if i % 3 == 0 else ()
    return {"prompt": PROMPTS[i % 6], "max_tokens": [0, 1, 9, 30, 200][i % 5], "sampling": sampling, "stop": stops}


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> list[str]:
    return [alone(model, **asked(i)) for i in range(14)]


@pytest.mark.parametrize(
    ("max_batch", "chunk", "deterministic"), [(1, 2048, False), (3, 5, False), (64, 64, False), (8, 5, True)]
)
@pytest.mark.usefixtures("slots")
def test_every_text_is_what_it_is_alone(
    model: LanguageModel, expected: list[str], max_batch: int, chunk: int, deterministic: bool
) -> None:
    engine = Engine(model, max_batch=max_batch, chunk=chunk, deterministic=deterministic)
    requests = [engine.add(**asked(i)) for i in range(14)]
    found = texts(engine.run())
    assert [found[request] for request in requests] == expected
    assert {request.reason for request in requests} == {"length", "stop"}
    assert not engine.busy


@pytest.mark.usefixtures("slots")
def test_tokens_and_their_probabilities(model: LanguageModel) -> None:
    engine = Engine(model, max_batch=4)
    for prompt in ("abc", "d"):
        engine.add(prompt, max_tokens=20, sampling=SamplingConfig(seed=3, top_p=0.9))
    events = list(engine.run())
    for number, prompt in enumerate(("abc", "d")):
        stream = Stream(model, sampling=SamplingConfig(seed=3, top_p=0.9))
        stream.feed(prompt)
        expected = list(stream.tokens(20))
        tokens = [event.token for event in events if event.request.number == number and event.token]
        assert [t.id for t in tokens] == [t.id for t in expected]
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes(data: st.DataObject) -> None:
    """Requests added and cancelled at random steps: those that end by themselves have their own text, none is lost."""
    torch.manual_seed(1)
    model = LanguageModel(
        ModelConfig(d_model=8, n_layer=1, vocab_size=256, ssm_cfg={"d_state": 2}), dtype=torch.float64
    )
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            on_device(patch)
        engine = Engine(model, max_batch=data.draw(st.integers(1, 4)), chunk=data.draw(st.integers(1, 9)))
        asked, said = {}, {}
        for i in range(30):
            if i < 12 and data.draw(st.booleans()):
                prompt, count = data.draw(st.binary(max_size=12)), data.draw(st.integers(0, 6))
                asked[engine.add(prompt, max_tokens=count, sampling=SamplingConfig(seed=i))] = (prompt, count, i)
            if asked and data.draw(st.integers(0, 5)) == 0:
                engine.cancel(data.draw(st.sampled_from(sorted(asked, key=lambda r: r.number))))
            for event in engine.step():
                said.setdefault(event.request, []).append(event)
        for event in engine.run():
            said.setdefault(event.request, []).append(event)
    assert set(said) == set(asked)
    for request, events in said.items():
        assert [e.reason for e in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].reason == request.reason
        prompt, count, seed = asked[request]
        whole = alone(model, prompt, max_tokens=count, sampling=SamplingConfig(seed=seed))
        got = "".join(e.text for e in events)
        assert got == whole if request.reason == "length" else whole.startswith(got)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_packed_models_step_in_one_call(layer: str) -> None:
    plain = stateline.load("bundled")
    if layer == "Mamba2":
        torch.manual_seed(5)
        plain = LanguageModel(ModelConfig(64, 2, vocab_size=256, ssm_cfg={"layer": "Mamba2", "headdim": 32}))
    model = stateline.prepare_for_decode(plain, weights="int8")
    assert model.token_step is not None or backends.native_problem()
    engine = Engine(model, max_batch=8)
    found = engine.generate(["My fellow citizens", "War", "The economy"], max_tokens=12, sampling=GREEDY)
    expected = [alone(model, p, max_tokens=12, sampling=GREEDY) for p in ("My fellow citizens", "War", "The economy")]
    assert found == expected


# ---- deterministic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("slots")
def test_deterministic_text_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(d_model=48, n_layer=3, vocab_size=256, d_intermediate=64)).to(dtype)

    def logprobs(others: int, place: int) -> list[Any]:
        engine = Engine(model, max_batch=7, chunk=16, deterministic=True)
        for i in range(others + 1):
            if i == place:
                mine = engine.add("The prompt in question, of more than a chunk", max_tokens=25, sampling=GREEDY)
            else:
                engine.add("x" * (7 * i + 1), max_tokens=5 + i, sampling=SamplingConfig(seed=i))
        return [event.token for event in engine.run() if event.request is mine]

    expected = logprobs(0, 0)
    assert len(expected) == 25
    for others, place in ((1, 0), (6, 3), (11, 11)):
        assert logprobs(others, place) == expected


# ---- ends, failures --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slots")
def test_nan_ends_one_request_only() -> None:
    model: Any = Scripted({ord("a"): b"1", ord("b"): b"2"})
    engine = Engine(model, max_batch=2)
    fine, broken = engine.add("a", max_tokens=8, sampling=GREEDY), engine.add("b", max_tokens=8, sampling=GREEDY)
    step = model.step_

    def damaged(ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        logits = step(ids, memory)
        logits[(memory[:, 0] == ord("b")) & (memory[:, 1] == 4)] = math.nan
        return logits

    model.step_ = damaged
    found = texts(engine.run())
    assert found == {fine: "11111111", broken: "222"}
    assert broken.reason == "error"
    assert str(broken.error).startswith("sample: the logits at generated token 3 hold NaN.")
    assert texts(engine.run()) == {}
    after = engine.add("b", max_tokens=2, sampling=GREEDY)  # into the row that was left
    assert texts(engine.run()) == {after: "22"}


@pytest.mark.usefixtures("slots")
def test_a_prompt_that_fails_harms_no_other(model: LanguageModel, tmp_path: Path) -> None:
    engine = Engine(model, max_batch=4, context=40)
    fine = engine.add("fine", max_tokens=5, sampling=GREEDY)
    stream = Stream(model)
    stream.feed("x" * 60)
    missing, long = engine.add(tmp_path / "absent", keep=True), engine.add("x" * 41)
    beyond = engine.add(after=stream)
    found = texts(engine.run())
    assert found[fine] == alone(model, "fine", max_tokens=5, sampling=GREEDY)
    assert isinstance(missing.error, FileNotFoundError)
    assert missing.stream is None
    assert "has more than 40 tokens, the engine's context" in str(long.error)
    assert "has more than 40 tokens, the engine's context" in str(beyond.error)


def test_a_penalty_that_looks_too_far_back_for_a_device_is_refused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = SamplingConfig(temperature=0, repetition_penalty=1.1, repetition_window=10**11)
    expected = alone(model, "a", max_tokens=6, sampling=far)
    assert Engine(model).generate(["a"], max_tokens=6, sampling=far) == [expected]
    on_device(monkeypatch)
    engine, stream = Engine(model, max_batch=4), Stream(model, sampling=far)
    for ask in (
        lambda: engine.add("b", sampling=far),
        lambda: engine.add("b", after=stream),
        lambda: engine.stream(["b"], sampling=far),
        lambda: engine.prepare(far),
    ):
        with pytest.raises(ValueError, match=r"repetition_window is 100000000000, .* at most 65536 .*None"):
            ask()
    for window in (65536, None):
        near = SamplingConfig(temperature=0, repetition_penalty=1.1, repetition_window=window)
        assert engine.generate(["a"], max_tokens=6, sampling=near) == [expected]
    unused = SamplingConfig(temperature=0, repetition_window=10**11)
    assert engine.generate(["a"], max_tokens=6, sampling=unused) == [alone(model, "a", max_tokens=6, sampling=GREEDY)]


@pytest.mark.usefixtures("slots")
def test_a_failing_call_for_prompts_harms_no_text(model: LanguageModel) -> None:
    engine = Engine(model, max_batch=4)
    fine = engine.add("a", max_tokens=6, sampling=GREEDY)
    events = engine.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "extend", lambda *_, **__: 1 / 0)
        failed = engine.add("too much")
        events += engine.step()
    events += engine.run()
    assert isinstance(failed.error, ZeroDivisionError)
    assert texts(iter(events))[fine] == alone(model, "a", max_tokens=6, sampling=GREEDY)


@pytest.mark.usefixtures("slots")
def test_a_context_ends_texts(model: LanguageModel) -> None:
    engine = Engine(model, max_batch=2, context=10)
    request = engine.add("123456", max_tokens=None, keep=True)
    assert len(list(engine.run())) == request.count == 4
    assert request.reason == "length"
    assert request.stream is not None
    assert request.stream.length == 10
    full, none = engine.add("1234567890"), engine.add(after=request.stream)
    beyond = engine.add("1", after=request.stream)
    assert [event.token for event in engine.run()] == [None] * 3
    assert full.reason == none.reason == "length"
    message = "Engine: the prompt, with any text before it, has more than 10 tokens, the engine's context. Shorten it"
    assert str(beyond.error).startswith(message)


@pytest.mark.usefixtures("slots")
def test_ends_of_text_and_stops() -> None:
    model: Any = Scripted({ord("a"): b"12.3", ord("b"): b"123456789"})
    tokenizer = stateline.generation.ByteTokenizer()
    tokenizer.end = ord(".")
    engine = Engine(model, max_batch=4, tokenizer=tokenizer)
    options: dict[str, Any] = {"max_tokens": 6, "sampling": GREEDY}
    ended, past = engine.add("a", **options), engine.add("a", ignore_end=True, **options)
    stopped, none = engine.add("b", stop=["56", "34"], **options), engine.add("b", stop="7", **options)
    assert texts(engine.run()) == {ended: "12", past: "12.312", stopped: "12", none: "123456"}
    assert [r.reason for r in (ended, past, stopped, none)] == ["end", "length", "stop", "length"]
    assert [r.count for r in (ended, past, stopped, none)] == [3, 6, 4, 6]


@pytest.mark.usefixtures("slots")
def test_memory_is_constant() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model, max_batch=4)
    places = {x.data_ptr() for x in leaves(engine._slots.rows.tree)}
    for i in range(20):
        engine.add("abc", max_tokens=i % 5, sampling=SamplingConfig(seed=i))
    list(engine.run())
    assert {x.data_ptr() for x in leaves(engine._slots.rows.tree)} == places
    assert not any((engine._waiting, engine._reading, engine._flying, engine._events, *engine._rows))


def test_requests_come_from_other_threads(model: LanguageModel) -> None:
    engine, requests = Engine(model, max_batch=3), []

    def ask() -> None:
        for i in range(8):
            requests.append(engine.add("abc"[: i % 3 + 1], max_tokens=3, sampling=GREEDY))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    events = []
    while engine.busy or any(thread.is_alive() for thread in threads):
        events += engine.step()
    assert sorted(request.number for request in requests) == list(range(24))
    assert {event.request for event in events if event.reason == "length"} == set(requests)


def test_leaving_the_loop_loses_nothing(model: LanguageModel) -> None:
    engine = Engine(model)
    requests = [engine.add(p, max_tokens=6, sampling=GREEDY) for p in ("a", "bb", "ccc")]
    said = dict.fromkeys(requests, "")
    while engine.busy:
        for event in engine.run():
            said[event.request] += event.text
            break
    assert list(said.values()) == [alone(model, p, max_tokens=6, sampling=GREEDY) for p in ("a", "bb", "ccc")]


def test_only_its_own_requests_are_cancelled(model: LanguageModel) -> None:
    engine, foreign = Engine(model), Engine(model).add("a")
    with pytest.raises(ValueError, match="cancel: request is of another engine"):
        engine.cancel(foreign)
    assert not engine.busy
    assert foreign.reason is None


def test_an_interrupt_inside_a_step_is_not_glossed_over() -> None:
    model: Any = Scripted(b"x")
    engine = Engine(model)
    engine.add("a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "step_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    with pytest.raises(ValueError, match="interrupted inside a step"):
        engine.step()


def test_nothing_to_do(model: LanguageModel) -> None:
    engine = Engine(model)
    engine.prepare()
    assert not engine.busy
    assert engine.step() == []
    assert list(engine.run()) == engine.generate([]) == []
    assert engine.generate(["a", ""], max_tokens=0) == ["", ""]


def test_ids_alone_need_no_tokenizer() -> None:
    model: Any = Scripted(b"abc", vocab_size=300)
    engine = Engine(model, max_batch=2)
    engine.add([299], max_tokens=4, sampling=GREEDY)
    assert bytes(event.token.id for event in engine.run() if event.token) == b"abca"
    for refused in (lambda: engine.add("text"), lambda: engine.add([1], stop="x"), lambda: engine.generate([[1]])):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            refused()


def test_refusals(model: LanguageModel) -> None:
    for options, message in (
        ({"max_batch": 0}, "max_batch is 0"), ({"chunk": 0}, "chunk is 0"), ({"context": 0}, "context is 0"),
        ({"graphs": True}, "graphs is True and the model is on cpu. Only CUDA devices capture graphs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Engine(model, **options)  # type: ignore[arg-type]
    engine = Engine(model)
    other = Stream(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=256)))
    plain = Stream(model)
    plain.feed("abc")
    penalty = SamplingConfig(repetition_penalty=1.5)
    larger = Stream(model)
    larger.state.layers[0].conv = torch.zeros(1, 9, 32, dtype=torch.float64)
    for options, message in (
        ({"after": other}, "after is a stream of another model"),
        ({"after": larger}, "after has a state of other sizes than the engine's. Has the engine another context"),
        ({"after": plain, "sampling": penalty}, "did not keep the tokens that a repetition penalty over 64 tokens"),
        ({"max_tokens": -1}, "max_tokens is -1"), ({"stop": ""}, "a stop string is empty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            engine.add("x", **options)  # type: ignore[arg-type]
    assert not engine.busy
    engine.add("x", after=Stream(model), sampling=penalty)  # which has nothing to forget
