"""Streams that live for days: saved and continued in another process, forked, rolled back, all to the bit."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, safe_open, save_file
from scripted import Scripted

import stateline
from stateline import state
from stateline.generation import SamplingConfig, Stream
from stateline.models import LanguageModel, ModelConfig

SAMPLING = SamplingConfig(temperature=0.9, top_p=0.9, repetition_penalty=1.3, repetition_window=12, seed=3)


def make(**options: Any) -> LanguageModel:
    torch.manual_seed(5)
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 256, "ssm_cfg": {"d_state": 4}, "tie_embeddings": False}
    model = LanguageModel(ModelConfig(**{**config, **options}))
    with torch.no_grad():  # neither uniform nor certain, so that a slip in the state shows in the text
        model.backbone.embedding.weight.mul_(10)
        model.lm_head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make()


def facts(stream: Stream) -> dict[str, Any]:
    """All that decides the future of a stream, comparable with ==."""
    leaves = [x.numpy().tobytes() for x in state.named(stream.state).values()]
    sampler = stream.sampler
    return {
        "state": leaves,
        "pending": stream.pending,
        "length": stream.length,
        "random": bytes(sampler.generator.get_state().numpy()),
        "drawn": sampler.drawn,
        "history": sampler.history.recall(),
        "tail": stream.decoder.pending,
        "held": stream._held,
    }


def ids(stream: Stream, count: int) -> list[int]:
    return [t.id for t in stream.tokens(count)]


# ---- files -----------------------------------------------------------------------------------------------------------

CONTINUE = """
import sys, torch
torch.set_num_threads(1)
import stateline
from stateline.generation import Stream
model = stateline.load(sys.argv[1])
for path, more in zip(sys.argv[2::2], sys.argv[3::2]):
    stream = Stream.load(path, model)
    if more:
        stream.feed(more)
    said = "".join(stream.text(40))
    stream.rollback(11)
    print(repr((said, list(stream.tokens(5)), stream.length, stream.sampler.drawn)))
"""


def test_another_process_continues_to_the_bit(model: LanguageModel, tmp_path: Path) -> None:
    """In the middle of a text, of a prompt that is fed in parts, of a character."""
    stateline.save(model, tmp_path / "model")
    expected, arguments = [], [str(tmp_path / "model")]
    for i, (begin, before, more) in enumerate([("The first", 21, ""), ("In two", 0, " parts"), ("né", 1, b"\xf0\x9f")]):
        stream = Stream(model, sampling=SAMPLING, rollback=20)
        stream.feed(begin)
        "".join(stream.text(before))
        if i == 2:
            stream.feed(more)
            stream.decoder.push(b"\xf0\x9f")
        stream.save(tmp_path / str(i))
        if i == 1:
            stream.feed(more)
        said = "".join(stream.text(40))
        stream.rollback(11)
        expected.append(repr((said, list(stream.tokens(5)), stream.length, stream.sampler.drawn)))
        arguments += [str(tmp_path / str(i)), str(more) if i == 1 else ""]
    command = [sys.executable, "-c", CONTINUE, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert out.splitlines() == expected
    assert len(set(expected[0])) > 10  # a text that depends on little shows little


def test_a_file_keeps_everything(model: LanguageModel, tmp_path: Path) -> None:
    for sampling in (SAMPLING, SamplingConfig(temperature=0), replace(SAMPLING, repetition_window=None, top_k=9)):
        stream = Stream(model, sampling=sampling, chunk=7, rollback=9)
        for step in range(4):
            path = tmp_path / "stream"
            stream.save(path)
            again = Stream.load(path, model)
            assert facts(again) == facts(stream)
            assert again.sampler.config == sampling
            assert again._chunk == 7
            stream.feed("Some text of some length")
            again.feed("Some text of some length")
            assert ids(again, 11) == ids(stream, 11)
            if step % 2:  # the way back is in the file too
                stream.save(path)
                again = Stream.load(path, model)
                for each in (stream, again):
                    each.rollback(9)
                assert facts(again) == facts(stream)


def test_a_character_and_a_stop_cut_in_two_go_on(tmp_path: Path) -> None:
    model: Any = Scripted("a😀b stop".encode())
    stream = Stream(model, sampling=SamplingConfig(temperature=0))
    stream.feed("x")
    assert "".join(stream.text(3)) == "a"
    stream.save(tmp_path / "stream")
    again = Stream.load(tmp_path / "stream", model)
    assert again.decoder.pending == "😀".encode()[:2]
    pieces = again.text(None, stop="stop")
    assert "".join(itertools.islice(pieces, 3)) == "😀b "
    assert next(again.text(None)) == "s"  # nothing held back here

    stream = Stream(Scripted(b"one two"), sampling=SamplingConfig(temperature=0))  # type: ignore[arg-type]
    stream.feed("x")
    shown = "".join(itertools.islice(stream.text(None, stop=["wo", "n two"]), 1))  # left at "o", "n" not yet drawn
    assert shown == "o"
    stream.text(None)  # making an iterator changes nothing
    held = stream.text(3, stop="n tw!")
    stream._hold("ne")  # as if the loop had been left while these waited
    stream.save(tmp_path / "stream")
    again = Stream.load(tmp_path / "stream", stream.model)
    assert "".join(again.text(0)) == "ne"
    assert "".join(held) == "nene "


def test_empty_streams_and_streams_of_ids(tmp_path: Path) -> None:
    model = make(vocab_size=300)
    stream = Stream(model, sampling=SAMPLING)
    stream.save(tmp_path / "stream")
    again = Stream.load(tmp_path / "stream", model)
    for each in (stream, again):
        each.feed([299, 3])
    assert ids(again, 9) == ids(stream, 9)


def test_foreign_files_are_refused_by_name(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    stream = Stream(model, sampling=SAMPLING)
    stream.feed("abc")
    stream.save(path)
    other = make()
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(ValueError, match=r"Stream.load: .*stream was made by another model or other weights"):
        Stream.load(path, other)
    with pytest.raises(ValueError, match="was made in float32, the model is in float64"):
        Stream.load(path, make().double())
    foreign: Any = SimpleNamespace(
        vocab_size=256, start=10, end=None, prefix=(), encode=str.encode, token_bytes=lambda i: bytes([255 - i])
    )
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        Stream.load(path, model, foreign)
    state.save(stream.state, tmp_path / "state", model)
    with pytest.raises(ValueError, match=r"is not a saved stream\. state.load reads states"):
        Stream.load(tmp_path / "state", model)
    (tmp_path / "text").write_text("no tensors at all")
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=f"Stream.load: .*{name} cannot be read"):
            Stream.load(tmp_path / name, model)


def test_damaged_and_newer_files_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    Stream(model, sampling=SAMPLING).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        Stream.load(path, model)
    for place in (-1, -3000, len(whole) // 2):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged: its contents do not match its checksum"):
            Stream.load(path, model)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "version": "2", "package": "9.9"})
    with pytest.raises(ValueError, match=r"was written by stateline 9\.9 in format 2; .*Update stateline"):
        Stream.load(path, model)
    record = json.loads(metadata["stream"])
    record["settings"]["sampling"]["seed"] = 4
    save_file(load_file(path), path, metadata={**metadata, "stream": json.dumps(record)})
    with pytest.raises(ValueError, match="is damaged"):
        Stream.load(path, model)


def test_a_save_that_fails_leaves_the_old_file(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(model, sampling=SAMPLING)
    stream.save(tmp_path / "stream")
    before = (tmp_path / "stream").read_bytes()
    stream.feed("more")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"Stream.save: .*could not be written"):
        stream.save(tmp_path / "stream")
    assert [p.name for p in tmp_path.iterdir()] == ["stream"]
    assert (tmp_path / "stream").read_bytes() == before
    with pytest.raises(ValueError, match="there is no directory"):
        stream.save(tmp_path / "nowhere" / "stream")


# ---- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_writes_the_same_and_shares_nothing(model: LanguageModel) -> None:
    stream = Stream(model, sampling=SAMPLING, rollback=6)
    stream.feed("A fork")
    "".join(stream.text(9))
    fork, other = stream.fork(), stream.fork(seed=8)
    before = facts(fork)
    first = ids(stream, 20)
    assert facts(fork) == before
    assert ids(fork, 20) == first
    assert facts(fork) == facts(stream)
    assert ids(other, 20) != first
    assert other.sampler.config.seed == 8
    early = Stream(model, sampling=SAMPLING, rollback=6).fork()
    early.feed("A fork")
    assert early.length == 6
    again, reseeded = stream.fork(), stream.fork(seed=1)
    again.rollback(6)
    assert again.length == stream.length - 6
    with pytest.raises(ValueError, match="1 tokens asked, 0 can be taken back"):
        reseeded.rollback(1)


# ---- rollback --------------------------------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.binary(min_size=1, max_size=14)),
    st.tuples(st.just("text"), st.integers(1, 14)),
    st.tuples(st.just("tokens"), st.integers(1, 5)),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=5), st.integers(1, 40), st.data())
def test_rolled_back_is_never_happened(actions: list[tuple[str, Any]], limit: int, data: st.DataObject) -> None:
    """Against a stream that stopped where the other went back to, whatever led there."""
    model = MODEL
    stream = Stream(model, sampling=SAMPLING, chunk=5, rollback=limit)
    for name, value in actions:
        _act(stream, name, value)
    k = data.draw(st.integers(0, min(limit, stream.length)))
    stream.rollback(k)
    fresh = Stream(model, sampling=SAMPLING, chunk=5)
    for name, value in actions:
        room = stream.length - fresh.length
        if not room:
            break
        if name == "feed":
            _act(fresh, name, value[:room])
        else:
            started = fresh.pending is None
            if started and room == 1:
                fresh._take([10])  # only the newline that a stream starts from is left
            else:
                _act(fresh, name, min(value, room - started))
    expected, got = facts(fresh), facts(stream)
    assert got == expected
    assert ids(stream, 6) == ids(fresh, 6)


def _act(stream: Stream, name: str, value: Any) -> None:
    if name == "feed":
        stream.feed(value)
    elif name == "text":
        "".join(stream.text(value))
    else:
        list(stream.tokens(value))


MODEL = make()


def test_rollback_again_and_again(model: LanguageModel) -> None:
    stream = Stream(model, sampling=SAMPLING, rollback=30)
    stream.feed("Again")
    whole = ids(stream, 60)
    for k in (1, 7, 0, 12, 3):
        stream.rollback(k)
        assert ids(stream, k) == whole[60 - k :] if k else True
    stream.rollback(10)
    stream.rollback(10)
    stream.rollback(10)
    assert ids(stream, 30) == whole[30:]
    with pytest.raises(ValueError, match=r"rollback: 31 tokens asked, 30 can be taken back. Make.*rollback=31"):
        stream.rollback(31)
    with pytest.raises(ValueError, match="1 tokens asked, 0 can be taken back"):
        Stream(model).rollback(1)
    with pytest.raises(ValueError, match="k is -1"):
        stream.rollback(-1)
    with pytest.raises(ValueError, match="Stream: rollback is -1"):
        Stream(model, rollback=-1)


@pytest.mark.parametrize("limit", [1, 8, 200])
def test_the_way_back_is_bounded(model: LanguageModel, limit: int) -> None:
    stream = Stream(model, sampling=SAMPLING, rollback=limit, chunk=64)
    most = 0
    for _ in range(3):
        stream.feed("x" * 150)
        for _ in itertools.islice(stream.tokens(None), 60):
            assert stream._past is not None
            most = max(most, len(stream._past.parts))
            assert stream._past.reach == min(limit, stream.length)
            assert sum(len(e.ids) for p in stream._past.parts for e in p.events) <= limit + 2 * 64 + limit // 8 + 8
    assert most <= 11


def test_an_interrupted_token_is_noticed_and_repaired(model: LanguageModel, tmp_path: Path) -> None:
    plain, safe = (Stream(model, sampling=SAMPLING, rollback=n) for n in (0, 1))
    for stream in (plain, safe):
        stream.feed("abc")
        ids(stream, 3)
        block = model.backbone.layers[1]
        handle = block.mixer.in_proj.register_forward_hook(_interrupt)  # the first layer's state has gone on by then
        with pytest.raises(KeyboardInterrupt):
            ids(stream, 1)
        handle.remove()
        for act in (lambda s: ids(s, 1), lambda s: s.feed("x"), lambda s: s.fork(), lambda s: s.save(tmp_path / "s")):
            with pytest.raises(ValueError, match="the stream was interrupted inside a token"):
                act(stream)
    fresh = Stream(model, sampling=SAMPLING)
    fresh.feed("abc")
    ids(fresh, 3)
    safe.rollback(0)
    assert facts(safe) == facts(fresh)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# ---- k tokens, of which n count --------------------------------------------------------------------------------------


def leaves(memory: Any) -> list[torch.Tensor]:
    return list(state.named(memory).values())


@pytest.mark.parametrize("commit", [0, 1, 3, 5])
def test_step_many_commits_what_extend_gives(model: LanguageModel, commit: int) -> None:
    tokens = torch.randint(256, (3, 12))
    with torch.no_grad():
        _, memory = model.extend(tokens[:, :7], model.init_state(3))
        wanted, _ = model.extend(tokens[:, 7:], memory)
        _, after = model.extend(tokens[:, 7 : 7 + commit], memory)
        steps = state.clone(memory)
        one_by_one = torch.stack([model.step_(tokens[:, 7 + i], steps) for i in range(5)], 1)
        kept, known = leaves(memory), leaves(state.clone(memory))
        logits = model.step_many(tokens[:, 7:], memory, commit)
    assert all(a is b for a, b in zip(leaves(memory), kept, strict=True))  # in place
    assert torch.equal(logits, wanted)
    torch.testing.assert_close(logits, one_by_one, rtol=1e-4, atol=1e-4)
    for x, y, before in zip(leaves(memory), leaves(after), known, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, before) == (commit == 0)


def test_step_many_commits_by_rows(model: LanguageModel) -> None:
    tokens = torch.randint(256, (4, 9))
    counts = torch.tensor([0, 4, 2, 1])
    with torch.no_grad():
        _, memory = model.extend(tokens[:, :5], model.init_state(4))
        before = state.clone(memory)
        chosen = state.clone(memory)
        model.step_many(tokens[:, 5:], memory, counts)
        model.step_many(tokens[:, 5:], chosen, lambda logits: counts[: logits.shape[0]])
        _, wanted = model.extend(tokens[:, 5:], before, lengths=counts)
        for row, count in enumerate(counts.tolist()):
            _, alone = model.extend(tokens[row : row + 1, 5 : 5 + count], state.index(before, row))
            for x, y in zip(leaves(state.index(memory, row)), leaves(alone), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y, z in zip(leaves(memory), leaves(wanted), leaves(chosen), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        (6, "commit is 6, expected a whole number at least 0 and at most 5"),
        (-1, "commit is -1"),
        (1.5, "commit is 1.5"),
        (torch.tensor([1, 2, 6]), "commit is 6"),
        (torch.tensor([1, 2]), r"commit has shape \(2,\), expected \(b,\) with b = 3"),
        (torch.tensor([1.0, 2.0, 3.0]), "commit is float32"),
    ],
)
def test_step_many_refuses_other_counts(model: LanguageModel, commit: Any, message: str) -> None:
    memory = model.init_state(3)
    with pytest.raises((ValueError, TypeError), match=f"step_many: {message}"):
        model.step_many(torch.randint(256, (3, 5)), memory, commit)
    assert not any(x.any() for x in leaves(memory))


def test_a_streams_state_takes_gradients(model: LanguageModel) -> None:
    """States are values: one that came from generating serves training too."""
    stream = Stream(model, sampling=SamplingConfig(temperature=0))
    stream.feed(b"abc")
    next(iter(stream.tokens(2)))
    logits, _ = model.extend(torch.tensor([[1, 2]]), stream.state)
    logits.sum().backward()
    gradient = model.backbone.layers[0].mixer.in_proj.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    model.zero_grad(set_to_none=True)
