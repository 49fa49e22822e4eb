"""Token shards: they hold the documents, survive interruption, and prove that they are whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import DOCUMENTS, contents, request, tiny, write_lines

from stateline.training import Interrupted, resume, shards, train
from stateline.training.prepare import prepare
from stateline.training.shards import open_dataset
from stateline.training.vocabulary import Vocabulary, learn


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_data_set_holds_the_documents(tokenizer: str, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    folder = lines.parent / "set"
    index = prepare(request(lines, tokenizer=tokenizer), folder, progress="off")
    text, vocabulary, _ = open_dataset(folder)
    assert len(text.parts) == len(index.shards) > 2
    assert all(isinstance(part, np.memmap) for part in text.parts)
    starts = text.documents(0, len(text))
    assert len(starts) == index.documents == len(DOCUMENTS)
    ends = [*starts[1:], len(text)]
    ids = [text.read(a, b) for a, b in zip(starts, ends, strict=True)]
    if tokenizer == "bytes":
        assert [row.tobytes().decode() for row in ids] == [f"{d}\n" for d in DOCUMENTS]
    else:
        assert [row[0] for row in ids] == [vocabulary.end] * len(ids)
        assert ids[-1][-1] == vocabulary.end, "the last document ends too"
        decode = vocabulary.tokenizer.decode  # type: ignore[union-attr]
        assert [decode(row.tolist()) for row in ids] == DOCUMENTS
    size = sum(len(d.encode()) for d in DOCUMENTS) + (len(DOCUMENTS) if tokenizer == "bytes" else 0)
    assert index.bytes == index.source_bytes == text.num_bytes == size
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare(request(lines, tokenizer=tokenizer), folder, progress="off").digest == index.digest
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before, "nothing is done twice"


def test_wide_ids_have_wide_types(tmp_path: Path) -> None:
    assert [str(Vocabulary(n).dtype) for n in (256, 257, 1 << 16, (1 << 16) + 1)] == [
        "uint8", "uint16", "uint16", "uint32",
    ]  # fmt: skip


def test_an_interrupted_preparation_goes_on_and_ends_the_same(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, a signal, a kill: the shards that are complete are kept, and the bytes are those of a straight one."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    monkeypatch.setattr("stateline.training.prepare.BATCH", 4)
    wanted = request(lines, learn(DOCUMENTS, 300))
    straight = prepare(wanted, lines.parent / "straight", progress="off")
    folder, original = lines.parent / "set", Vocabulary.encode
    calls = 0

    def failing(vocabulary: Vocabulary, texts: list[bytes]) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(28, "No space left on device")
        if calls == 9:
            signal.raise_signal(signal.SIGTERM)
        if calls == 12:
            os._exit(9)
        return original(vocabulary, texts)

    monkeypatch.setattr(Vocabulary, "encode", failing)
    with pytest.raises(RuntimeError, match="could not be written: No space left"):
        prepare(wanted, folder, progress="off")
    with pytest.raises(ValueError, match=r"was interrupted \(dataset.json is missing\).*stateline tokenize again"):
        open_dataset(folder)
    done = len(shards.read_index(folder, shards.PROGRESS).shards)
    assert done > 0
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM .*the same command goes on"):
        prepare(wanted, folder, progress="off")
    if not (child := os.fork()):
        prepare(wanted, folder, progress="off")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(shards.read_index(folder, shards.PROGRESS).shards) > done
    calls = 20
    assert prepare(wanted, folder, progress="off").digest == straight.digest
    assert calls <= 20 + len(DOCUMENTS) / 4 - 10, "what was done was done again"
    assert contents(folder) == contents(lines.parent / "straight")


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_preparation_that_fails_at_its_very_end_goes_on_to_the_same_data(
    size: int, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the closing end of text was written and before the index was."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", size)
    wanted, folder = request(lines, learn(DOCUMENTS, 300)), lines.parent / "set"
    straight = prepare(wanted, lines.parent / "straight", progress="off")
    original = shards.write_atomically

    def failing(path: Path, text: str) -> None:
        if path.name == shards.INDEX:
            raise OSError(28, "No space left on device")
        original(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_atomically", failing)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="could not be written: No space left"):
                prepare(wanted, folder, progress="off")
    assert prepare(wanted, folder, progress="off").digest == straight.digest
    assert contents(folder) == contents(lines.parent / "straight")


def test_other_requests_do_not_touch_a_data_set(lines: Path) -> None:
    folder = lines.parent / "set"
    first = prepare(request(lines), folder, progress="off")
    with pytest.raises(ValueError, match=r"other sources, or made in another way.*--overwrite"):
        prepare(request(lines, tokenizer="bpe:300"), folder, progress="off")
    assert prepare(request(lines, tokenizer="bpe:300"), folder, progress="off", replace=True).digest != first.digest
    os.utime(lines, ns=(1, 1))
    again = prepare(request(lines), folder, progress="off", replace=True)
    assert again.digest == first.digest, "a file that was only touched gives the same data"
    assert "tokenizer.json" not in contents(folder)
    (lines.parent / "mine").mkdir()
    (lines.parent / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match=r"not empty and holds no data set: letter\.txt"):
        prepare(request(lines), lines.parent / "mine", progress="off", replace=True)
    with resume.locked(folder), pytest.raises(ValueError, match="another process is preparing data in"):
        prepare(request(lines), folder, progress="off")


def damage(folder: Path, name: str) -> None:
    """One kind of damage to a data set of a BPE."""
    file, _, how = name.partition(" ")
    path = folder / file
    raw = path.read_bytes() if path.exists() else b""
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "altered":
        path.write_bytes(raw[:300] + bytes([raw[300] ^ 1]) + raw[301:])
    elif how == "foreign":
        learn(DOCUMENTS[:3], 300).save(folder)
    elif how == "newer":
        path.write_text(raw.decode().replace('"version": 1', '"version": 2'))
    else:
        path.write_text(raw.decode().replace('"documents": 60', '"documents": 59'))


DAMAGE = {
    "tokens-00000.bin gone": r"tokens-00000\.bin is missing",
    "tokens-00001.bin short": r"tokens-00001\.bin has \d+ bytes, its index says \d+",
    "tokens-00001.bin altered": r"tokens-00001\.bin is damaged",
    "documents.bin altered": r"documents\.bin is damaged",
    "tokenizer.json foreign": r"tokenizer\.json is not the tokenizer that made the shards",
    "dataset.json short": r"dataset\.json is damaged",
    "dataset.json newer": r"dataset\.json has format 'stateline-tokens' version 2, this release reads",
    "dataset.json contradicting": r"dataset\.json is damaged: it contradicts itself",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    folder = lines.parent / "set"
    prepare(request(lines, tokenizer="bpe:300"), folder, progress="off")
    damage(folder, name)
    with pytest.raises(ValueError, match=DAMAGE[name]):
        train(tiny(folder))
    assert not resume.holds_run(lines.parent / "run")
