"""Text out of tokens: the UTF-8 decoder and stop strings under any split, tokenizers against their library."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from scripted import Scripted

from stateline.generation import (
    ByteTokenizer,
    JsonTokenizer,
    SamplingConfig,
    StopFilter,
    Utf8Decoder,
    generate,
    generate_batch,
    load_tokenizer,
)

#: Pieces of UTF-8 and of its violations: short ends, lone continuations, overlong forms, surrogates, beyond U+10FFFF.
SCRAPS = [b"a", b"\xc3\xa9", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\x80", b"\xff"]
SCRAPS += [b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf"]


def cut(whole: Any, places: list[int]) -> list[Any]:
    at = sorted(p % (len(whole) + 1) for p in places)
    return [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(SCRAPS) | st.binary(max_size=3), max_size=12), st.lists(st.integers(0, 99), max_size=12)
)
@example([b"\xf0\x9f\x98\x80"], [1, 2, 3])
def test_any_split_of_bytes_gives_the_same_text(scraps: list[bytes], places: list[int]) -> None:
    data = b"".join(scraps)
    decoder = Utf8Decoder()
    shown = b""
    text = ""
    for piece in cut(data, places):
        shown += piece
        text += decoder.push(piece)
        assert len(decoder.pending) <= 3
        # nothing waits but the beginning of a character
        assert text == shown[: len(shown) - len(decoder.pending)].decode("utf-8", "replace")
    assert text + decoder.flush() == data.decode("utf-8", "replace")
    assert decoder.pending == b""


@settings(max_examples=600, deadline=None)
@given(
    st.text("ab", max_size=14),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 99), max_size=8),
)
@example("aab", ["ab"], [2])
@example("abab", ["abb", "ba"], [2, 3])
def test_a_stop_never_appears_however_text_is_split(text: str, stops: list[str], places: list[int]) -> None:
    expected = _until_first_stop(text, stops)
    waiting = StopFilter(stops)
    out, pushed = "", ""
    for piece in cut(text, places):
        out += waiting.push(piece)
        if waiting.stopped:
            break
        pushed += piece
        assert pushed[len(out) :] == _longest_beginning(pushed, stops)  # no more is held back than must be
    assert waiting.stopped == (len(expected) < len(text))
    out += waiting.flush()
    assert out == expected
    assert not any(s in out for s in stops)
    assert waiting.push("more") == ("" if waiting.stopped else "more") or stops


def _until_first_stop(text: str, stops: list[str]) -> str:
    """Read letter by letter; the first stop to be complete ends the text, the longest of those that end together."""
    for end in range(len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))]
    return text


def _longest_beginning(text: str, stops: list[str]) -> str:
    ends = [text[at:] for at in range(len(text))]
    return next((e for e in ends if any(s.startswith(e) and s != e for s in stops)), "")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()
    assert tokenizer.decode_bytes(ids) == bytes(ids)
    assert all(0 <= i < 256 for i in ids)


def make_tokenizer(directory: Path, kind: str) -> Any:
    """A small BPE saved as tokenizer.json, returned as the library sees it."""
    library = pytest.importorskip("tokenizers", reason="tokenizer.json is read by an optional package")
    tokenizer = library.Tokenizer(library.models.BPE(byte_fallback=kind == "fallback", unk_token=None))
    if kind == "bytes":
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    elif kind == "fallback":
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme="never")
        parts = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
        tokenizer.decoder = library.decoders.Sequence(parts)
        alphabet = list("abcdefghijklmnopqrstuvwxyz")
    else:
        tokenizer.decoder = library.decoders.WordPiece()
        alphabet = list("ab")
    special = ["<end>", *(f"<0x{b:02X}>" for b in range(256))] if kind == "fallback" else ["<end>"]
    trainer = library.trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(["the theory of the thing, the other thing; naïve café 😀"] * 3, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:1]  # byte pieces belong to the vocabulary, they are not special
    (directory / "tokenizer.json").write_text(json.dumps(made))
    return library.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize("text", ["the theory", "naïve café 😀 ", "日本語 and the rest", "zq~", ""])
def test_json_tokenizer_gives_the_librarys_ids_and_text(tmp_path: Path, kind: str, text: str) -> None:
    library = make_tokenizer(tmp_path, kind)
    ours = JsonTokenizer(tmp_path / "tokenizer.json")
    ids = ours.encode(text)
    assert ids == library.encode(text).ids
    assert ours.decode(ids) == text == library.decode(ids)
    decoder = Utf8Decoder()
    assert "".join(decoder.push(ours.token_bytes(i)) for i in ids) + decoder.flush() == text


def test_end_of_text_stops_and_is_not_shown(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, "bytes")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    tokenizer = load_tokenizer(tmp_path, 700)
    assert tokenizer.end == tokenizer.start == 0
    said = [*tokenizer.encode("the thing"), 0, *tokenizer.encode("more")]
    model: Any = Scripted(said, vocab_size=700)
    options: dict[str, Any] = {"tokenizer": tokenizer, "sampling": SamplingConfig(temperature=0)}
    assert "".join(generate(model, "x", **options)) == "the thing"
    longer = generate(model, "x", max_tokens=len(said), ignore_end=True, **options)
    assert "".join(longer) == "the thingmore"
    assert "".join(generate(model, "", max_tokens=1, **options)) != ""  # starts from the end-of-text id


def test_ids_beyond_the_tokenizer_are_never_drawn(tmp_path: Path) -> None:
    """A table padded beyond the vocabulary may hold anything there."""

    class Padded(Scripted):
        def step_(self, ids: Any, memory: Any) -> Any:
            logits = super().step_(ids, memory)
            logits[:, 256:] = 99.0
            return logits

    model: Any = Padded(b"ab", vocab_size=264)
    out = generate(model, "x", max_tokens=4, tokenizer=ByteTokenizer(), sampling=SamplingConfig(temperature=0))
    assert "".join(out) == "abab"


def test_text_that_the_library_begins_with_a_special_id(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="tokenizer.json is read by an optional package")
    tokenizer = make_tokenizer(tmp_path, "bytes")
    tokenizer.post_processor = library.processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [0, 5]}')
    loaded = load_tokenizer(tmp_path, 700)
    assert loaded.prefix == (0,)
    assert 0 not in loaded.encode("the")
    model: Any = Scripted({0: loaded.encode("t")}, vocab_size=700)  # knows nothing but what begins with 0
    greedy = SamplingConfig(temperature=0)
    assert list(generate(model, "the", tokenizer=loaded, sampling=greedy, max_tokens=2)) == ["t", "t"]
    assert list(generate(model, "", tokenizer=loaded, sampling=greedy, max_tokens=2)) == ["t", "t"]
    assert generate_batch(model, ["the", ""], tokenizer=loaded, sampling=greedy, max_tokens=2) == ["tt", "tt"]


def test_load_tokenizer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(None, 256), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)
    with pytest.raises(ValueError, match="the model has 50277 ids and no directory was given"):
        load_tokenizer(None, 50277)
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path, 50277)
    make_tokenizer(tmp_path, "bytes")
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ ids, the model 100"):
        load_tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path, 700)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path, 700)
    make_tokenizer(tmp_path, "words")
    with pytest.raises(ValueError, match="has WordPiece, expected a ByteLevel or ByteFallback decoder"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers. pip install stateline\[hf\]"):
        load_tokenizer(tmp_path, 700)


def test_a_foreign_tokenizer_is_anything_with_the_right_names() -> None:
    """The protocol is small enough to write by hand: here ids 0 to 9 are digits."""
    digits: Any = SimpleNamespace(
        vocab_size=10, start=0, end=9, prefix=(), piecewise=True,
        encode=lambda text: [byte - ord("0") for byte in text], token_bytes=lambda i: b"%d" % i,
    )  # fmt: skip
    model: Any = Scripted([4, 2, 9], vocab_size=16)
    assert "".join(generate(model, b"123", tokenizer=digits, sampling=SamplingConfig(temperature=0))) == "42"
    with pytest.raises(ValueError, match="the prompt's token 4 has id 49, the vocabulary has ids 0 to 15"):
        list(generate(model, b"1234a", tokenizer=digits, chunk=2))
