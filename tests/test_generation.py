"""Generation: streams, batches, prompts of any kind and size, stops, characters, refusals."""

from __future__ import annotations

import collections
import io
import itertools
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scripted import Scripted

from stateline import state
from stateline.generation import (
    ByteTokenizer,
    Engine,
    SamplingConfig,
    Stream,
    generate,
    generate_batch,
    generate_tokens,
    stream_batch,
)
from stateline.models import LanguageModel, ModelConfig

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(5)
    config = ModelConfig(d_model=16, n_layer=2, vocab_size=256, ssm_cfg={"d_state": 4}, tie_embeddings=False)
    model = LanguageModel(config, dtype=torch.float64)
    with torch.no_grad():  # neither uniform nor certain, so that a slip in the state shows in the text
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
    return model


def text(model: Any, prompt: Any, **options: Any) -> str:
    return "".join(generate(model, prompt, **options))


# ---- against the whole sequence at once ------------------------------------------------------------------------------


def test_greedy_text_is_the_argmax_of_the_whole_forward(model: LanguageModel) -> None:
    prompt = list(b"What is the state of the")
    tokens = list(generate_tokens(model, prompt, max_tokens=12, sampling=GREEDY, chunk=7))
    ids = prompt + [t.id for t in tokens]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0, len(prompt) - 1 :]
    assert [t.id for t in tokens] == logprobs.argmax(-1).tolist()
    expected = [row[t.id].item() for row, t in zip(logprobs, tokens, strict=True)]
    assert [t.logprob for t in tokens] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5, 24, 25, 4096])
def test_chunks_change_nothing(model: LanguageModel, chunk: int) -> None:
    prompt, options = "A prompt of 25 characters", {"max_tokens": 30, "sampling": SamplingConfig(seed=2)}
    assert text(model, prompt, chunk=chunk, **options) == text(model, prompt, **options)


def test_same_seed_same_text_and_others_differ(model: LanguageModel) -> None:
    def run(seed: int | None) -> str:
        return text(model, "Seed", max_tokens=30, sampling=SamplingConfig(seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_the_model_is_left_as_it_was(model: LanguageModel) -> None:
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    text(model, "x", max_tokens=3)
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    model(torch.tensor([[1, 2]])).sum().backward()  # gradients still work afterwards
    model.zero_grad(set_to_none=True)


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_as_if_it_had_not_been_cut(model: LanguageModel) -> None:
    sampling = SamplingConfig(seed=3, repetition_penalty=1.3, repetition_window=9)
    whole = text(model, "Once upon a time", max_tokens=40, sampling=sampling)
    stream = Stream(model, sampling=sampling)
    for part in ("Once", b" upon", "", list(b" a time")):
        stream.feed(part)
    pieces = [*stream.text(13), *stream.text(0), *stream.text(20), *stream.text(7, final=True)]
    assert "".join(pieces) == whole
    assert stream.length == len("Once upon a time") + 40


def test_every_token_is_seen_once() -> None:
    """Feeding in parts neither repeats nor drops the token that waits between them."""
    sampling = SamplingConfig(temperature=0, repetition_penalty=1.5, repetition_window=8)
    whole, parts = (Stream(Scripted(b"xyz"), sampling=sampling) for _ in range(2))  # type: ignore[arg-type]
    whole.feed("abcdefgh")
    for part in ("abc", "d", "efgh"):
        parts.feed(part)
    assert sorted(parts.sampler.history.ids()) == sorted(whole.sampler.history.ids()) == sorted(b"abcdefgh")
    list(parts.tokens(2))
    parts.feed("ij")
    assert sorted(parts.sampler.history.ids()) == sorted(b"efghxyij")
    assert parts.length == 12


def test_leaving_the_loop_early_loses_nothing(model: LanguageModel) -> None:
    whole = [t.id for t in generate_tokens(model, "abc", max_tokens=12, sampling=SamplingConfig(seed=1))]
    stream = Stream(model, sampling=SamplingConfig(seed=1))
    stream.feed("abc")
    first = [t.id for t in itertools.islice(stream.tokens(None), 5)]
    assert first + [t.id for t in stream.tokens(7)] == whole


def test_state_and_pending_token_are_all_a_fork_needs(model: LanguageModel) -> None:
    stream = Stream(model, sampling=GREEDY)
    stream.feed("A fork")
    fork = Stream(model, sampling=GREEDY)
    fork.state, fork.pending = state.clone(stream.state), stream.pending
    assert [t.id for t in stream.tokens(15)] == [t.id for t in fork.tokens(15)]


def test_state_is_of_constant_size(model: LanguageModel) -> None:
    stream = Stream(model)
    size = state.num_bytes(stream.state)
    stream.feed("x" * 300)
    list(stream.tokens(20))
    assert state.num_bytes(stream.state) == size


# ---- batches ---------------------------------------------------------------------------------------------------------

PROMPTS = ["", "a", "A rather longer prompt than the others, read in several pieces", b"\xff\xfe", "né😀", list(b"ids")]


@pytest.mark.parametrize("chunk", [6, 64, 2048])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "repetition_penalty": 1.5}])
def test_a_row_of_a_batch_is_what_it_is_alone(model: LanguageModel, chunk: int, filters: dict[str, Any]) -> None:
    sampling = SamplingConfig(seed=7, **filters)
    options: dict[str, Any] = {"max_tokens": 25, "stop": ["e", "\x07"]}
    together = generate_batch(model, PROMPTS, sampling=sampling, chunk=chunk, **options)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == text(model, prompt, sampling=replace(sampling, seed=7 + row), **options)
    assert len({len(t) for t in together}) > 1  # some stopped early, or the test shows little


def test_rows_may_have_their_own_sampling(model: LanguageModel) -> None:
    configs = [GREEDY, SamplingConfig(seed=1), SamplingConfig(seed=1)]
    first, second, third = generate_batch(model, ["same"] * 3, max_tokens=20, sampling=configs)
    assert second == third != first == text(model, "same", max_tokens=20, sampling=GREEDY)


def test_finished_rows_leave_the_batch() -> None:
    model: Any = Scripted({ord("a"): b"12.", ord("b"): b"123456.", ord("c"): b"."})
    pieces = list(stream_batch(model, ["a", "bb", "ccc"], max_tokens=50, stop=".", sampling=GREEDY))
    assert model.stepped == [3, 2, 2, 1, 1, 1, 1]
    assert pieces[:3] == [(0, "1"), (1, "1"), (0, "2")]
    assert "".join(p for row, p in pieces if row == 1) == "123456"


def test_batches_of_none_and_of_no_tokens(model: LanguageModel) -> None:
    assert generate_batch(model, []) == []
    assert generate_batch(model, ["a", "b"], max_tokens=0) == ["", ""]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_prompt_reads_the_same(model: LanguageModel, tmp_path: Path) -> None:
    said = "Zürich: 12 °C — schön 😀"
    (tmp_path / "prompt.txt").write_bytes(said.encode())
    kinds: list[Any] = [
        said,
        said.encode(),
        list(said.encode()),
        tuple(said.encode()),
        torch.tensor(list(said.encode())),
        tmp_path / "prompt.txt",
        io.BytesIO(said.encode()),
    ]
    options = {"max_tokens": 12, "sampling": GREEDY, "chunk": 5}
    assert len({text(model, kind, **options) for kind in kinds}) == 1


@pytest.mark.parametrize("empty", ["", b"", [], io.BytesIO(b""), torch.zeros(0, dtype=torch.long)])
def test_an_empty_prompt_starts_from_a_newline(model: LanguageModel, empty: Any) -> None:
    options = {"max_tokens": 10, "sampling": GREEDY}
    assert text(model, empty, **options) == text(model, "\n", **options)
    assert generate_batch(model, [empty], **options) == [text(model, "\n", **options)]


def test_a_million_bytes_are_read_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(bytes(1_000_000))
    for prompt in (path, path.read_bytes(), "\0" * 1_000_000):
        model: Any = Scripted(b"x")
        assert text(model, prompt, max_tokens=2, sampling=GREEDY) == "xx"
        assert max(model.read) == (1, 2048)
        assert sum(t for _, t in model.read) == 999_999
    model = Scripted(b"x")
    generate_batch(model, [path, "short"], max_tokens=1, sampling=GREEDY)
    assert max(b * t for b, t in model.read) <= 2048


PEAK = """
import resource, sys, torch
from pathlib import Path
from stateline.generation import generate
sys.path.insert(0, {tests!r})
from scripted import Scripted
torch.set_num_threads(1)
print("".join(generate(Scripted(b"x"), Path(sys.argv[1]), max_tokens=1)), end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_does_not_grow_with_the_prompt(tmp_path: Path) -> None:
    """As ids, 8 MB of prompt would be 64 MB; the process may grow by a few."""
    peaks = []
    for size in (2_000, 8_000_000):
        path = tmp_path / str(size)
        path.write_bytes(b"a" * size)
        command = [sys.executable, "-c", PEAK.format(tests=str(Path(__file__).parent)), str(path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert out[0] == "x"
        peaks.append(int(out[1]) / (1024 if sys.platform == "linux" else 1024**2))
    assert peaks[1] - peaks[0] < 8, peaks


def test_text_without_end_takes_constant_memory() -> None:
    sampling = SamplingConfig(repetition_penalty=1.2, repetition_window=None, seed=0)
    model: Any = Scripted(b"the quick brown fox")
    model.stepped = collections.deque(maxlen=1)  # the test's own record must not grow either
    endless = generate(model, "", max_tokens=None, sampling=sampling, stop=["never said"])
    for _ in itertools.islice(endless, 500):
        pass
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in itertools.islice(endless, 4000):
        pass
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 8_000


# ---- characters and stops --------------------------------------------------------------------------------------------


def test_characters_are_never_cut() -> None:
    said = "né €😀!"
    model: Any = Scripted(said.encode())
    assert list(generate(model, "x", max_tokens=len(said.encode()), sampling=GREEDY)) == list(said)


@pytest.mark.parametrize(("count", "expected"), [(1, "\ufffd"), (3, "\ufffd"), (4, "😀"), (5, "😀a")])
def test_a_character_cut_short_by_the_limit(count: int, expected: str) -> None:
    model: Any = Scripted("😀a".encode())
    assert text(model, "x", max_tokens=count, sampling=GREEDY) == expected
    assert generate_batch(model, ["x"], max_tokens=count, sampling=GREEDY) == [expected]
    stream = Stream(model, sampling=GREEDY)  # a stream waits for the rest instead
    assert "".join(itertools.chain(stream.text(count), stream.text(5 - count))) == "😀a"


def test_invalid_bytes_become_replacement_characters() -> None:
    said = b"a\xff\xc3(\xed\xa0\x80b\xf0\x9f\x98"
    model: Any = Scripted(said)
    assert text(model, "x", max_tokens=len(said), sampling=GREEDY) == said.decode("utf-8", "replace")


def test_a_stop_ends_the_text_before_it() -> None:
    model: Any = Scripted(b"one two three ")
    options: dict[str, Any] = {"max_tokens": 40, "sampling": GREEDY}
    assert text(model, "x", stop="two", **options) == "one "
    assert text(model, "x", stop=["three", "o t"], **options) == "one tw"
    assert text(model, "x", stop="absent", **options) == (b"one two three " * 3)[:40].decode()
    assert text(model, "x", stop="two", max_tokens=6, sampling=GREEDY) == "one tw"  # held back, then set free
    steps = len(model.stepped)
    text(model, "x", stop="two", **options)
    assert len(model.stepped) - steps == 7  # and no token more is computed


def test_only_what_could_become_a_stop_waits() -> None:
    model: Any = Scripted(b"aab-aac")
    assert list(generate(model, "x", max_tokens=6, sampling=GREEDY, stop="aac")) == ["aab", "-", "aa"]


# ---- refusals --------------------------------------------------------------------------------------------------------

CALLS: list[Callable[..., Iterator[Any]]] = [
    lambda model, prompt, **options: generate(model, prompt, **options),
    lambda model, prompt, **options: generate_tokens(model, prompt, **options),
    lambda model, prompt, **options: stream_batch(model, [prompt], **options),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1, 2, 256, 300], {}, "the prompt's token 2 has id 256, the vocabulary has ids 0 to 255"),
        (torch.tensor([1, -1]), {}, "the prompt's token 1 has id -1"),
        ([0.5], {}, "the prompt is float64 of shape"),
        ([[1, 2], [3, 4]], {}, "expected text, bytes, a file or one list of token ids. For several prompts"),
        (["a", "b"], {}, "For several prompts take generate_batch"),
        (None, {}, "the prompt is NoneType"),
        ("x", {"max_tokens": -1}, "max_tokens is -1, expected a whole number at least 0"),
        ("x", {"max_tokens": 1.5}, "max_tokens is 1.5"),
        ("x", {"chunk": 0}, "chunk is 0, expected a whole number at least 1"),
        ("x", {"tokenizer": SimpleNamespace(vocab_size=300)}, "the tokenizer has 300 ids, the model 256"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    call: Callable[..., Any], prompt: Any, options: dict[str, Any], message: str
) -> None:
    model = Scripted(b"x")
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, prompt, **options)
    assert model.read == model.stepped == []


@pytest.mark.parametrize(("stop", "message"), [("", "a stop string is empty"), (["a", 3], "stop holds 3")])
def test_bad_stops_are_refused(stop: Any, message: str) -> None:
    model: Any = Scripted(b"x")
    for call in CALLS[::2]:
        with pytest.raises((ValueError, TypeError), match=message):
            call(model, "x", stop=stop)


def test_a_prompt_file_must_exist_and_be_binary(tmp_path: Path) -> None:
    model: Any = Scripted(b"x")
    with pytest.raises(FileNotFoundError):
        text(model, tmp_path / "absent")
    with pytest.raises(TypeError, match="open as text"):
        text(model, io.StringIO("text"))


def test_a_batch_is_a_list(model: LanguageModel) -> None:
    engine = Engine(model)
    calls: dict[str, Callable[..., Any]] = {
        "generate_batch": lambda *given, **options: generate_batch(model, *given, **options),
        "stream_batch": lambda *given, **options: stream_batch(model, *given, **options),
        "Engine.generate": engine.generate,
        "Engine.stream": engine.stream,
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name}: prompts is one text"):
            call("text")
        with pytest.raises(ValueError, match=f"^{name}: sampling has 1 configurations for 2 prompts"):
            call(["a", "b"], sampling=[GREEDY])


def test_other_vocabularies_take_ids_and_give_ids() -> None:
    model: Any = Scripted(b"abc", vocab_size=300)
    assert [t.id for t in generate_tokens(model, [299], max_tokens=2, sampling=GREEDY)] == list(b"ab")
    for call in CALLS:
        with pytest.raises(ValueError, match="needs a tokenizer"):
            call(model, "text")
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        generate(model, [1])
    with pytest.raises(ValueError, match="the prompt is empty and this vocabulary has no start id"):
        next(generate_tokens(model, []))
    assert text(model, [1], tokenizer=ByteTokenizer(), max_tokens=3, sampling=GREEDY) == "abc"


@pytest.mark.parametrize("call", CALLS)
def test_nan_in_the_logits_names_the_token(call: Callable[..., Any]) -> None:
    model = Scripted(b"abc")
    model.broken_at = 4
    with pytest.raises(ValueError, match="the logits at generated token 4 hold NaN"):
        list(call(model, "x", max_tokens=10))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=12), min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 2**31))
def test_any_batch_equals_its_rows_alone(prompts: list[bytes], chunk: int, seed: int) -> None:
    torch.manual_seed(1)
    config = ModelConfig(d_model=8, n_layer=1, vocab_size=256, ssm_cfg={"d_state": 2})
    model = LanguageModel(config, dtype=torch.float64)
    together = generate_batch(model, prompts, max_tokens=6, sampling=SamplingConfig(seed=seed), chunk=chunk)
    for row, prompt in enumerate(prompts):
        assert together[row] == text(model, prompt, max_tokens=6, sampling=SamplingConfig(seed=seed + row))
