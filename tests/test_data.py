"""Training data: what is read, tokenizers, shards that prove they are whole, and documents kept apart."""

from __future__ import annotations

import gzip
import json
import math
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from texts import DOCUMENTS, contents, json_lines, request, tiny, write_lines

import stateline
from stateline.cli import main
from stateline.generation import load_tokenizer
from stateline.models import LanguageModel, ModelConfig
from stateline.training import Interrupted, bits_per_byte, corpus, load_data, resume, train
from stateline.training.config import DataConfig
from stateline.training.data import Windows, read_text, split
from stateline.training.prepare import prepare
from stateline.training.shards import Index, open_dataset
from stateline.training.text import IGNORED, Layout, TokenText
from stateline.training.vocabulary import Vocabulary, learn, named


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path)


def documents(path: Path, **settings: Any) -> list[bytes]:
    """What the corpus gives, pieces joined; every document has one first and one last piece."""
    config = DataConfig(path=str(path), **settings)
    found: list[bytes] = []
    inside = False
    for piece in corpus.pieces(corpus.find_files(path, config.pattern), config):
        assert piece.first != inside
        assert piece.data
        found = [*found, piece.data] if piece.first else [*found[:-1], found[-1] + piece.data]
        inside = not piece.last
    assert not inside
    return found


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("read", [3, 1 << 16])
def test_text_and_json_lines_plain_and_compressed(
    suffix: str, read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_READ", read)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    raw, wanted = json_lines(DOCUMENTS[:9]), [text.encode() for text in DOCUMENTS[:9]]
    path = tmp_path / f"text.jsonl{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + raw[:100]) + pack(raw[100:] + b"\n\n"))  # two frames, blank lines
    assert documents(path) == wanted
    other = tmp_path / f"other.ndjson{suffix}"
    other.write_bytes(pack(json_lines(["", *DOCUMENTS[:9]], "body").rstrip()))
    assert documents(other, text_field="body") == wanted
    text = tmp_path / f"text.txt{suffix}"
    text.write_bytes(pack("<>>".join(["", *DOCUMENTS[:4], "", DOCUMENTS[5], ""]).encode()))
    assert documents(text, document_separator="<>>") == [*wanted[:4], wanted[5]]
    assert len(documents(text)) == 1
    (tmp_path / "sub").mkdir()
    for i in range(2):
        (tmp_path / "sub" / f"{i}.md{suffix}").write_bytes(pack(wanted[i]))
    assert documents(tmp_path / "sub", pattern=f"*.md{suffix}") == wanted[:2]


def test_long_documents_come_in_pieces_with_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bpe = learn(DOCUMENTS, 400)
    text = "\n".join(DOCUMENTS).encode()
    monkeypatch.setattr(corpus, "PIECE", 200)
    pieces = [data for data, _, _ in corpus._cut(iter([(text[:3000], False), (text[3000:], True)]))]
    assert len(pieces) > 10
    assert max(map(len, pieces)) <= 200
    assert b"".join(pieces) == text
    assert np.concatenate(bpe.encode(pieces)).tolist() == bpe.encode([text])[0].tolist()
    for awkward in (b"x" * 500, "é".encode() * 300, b"\n" * 500):
        pieces = [data for data, _, _ in corpus._cut(iter([(awkward, True)]))]
        assert b"".join(pieces) == awkward
        assert all(piece.decode() for piece in pieces), "a character was cut"


BAD: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "no json": ("a.jsonl", b'{"text": "a"}\nhello\n', {}, r"a\.jsonl, line 2, is not JSON"),
    "no object": ("a.jsonl", b"[1]\n", {}, "line 1, holds a list"),
    "no field": ("a.jsonl", b'{"body": "a"}\n', {}, "no field 'text'; it has body. Name it with --text-field"),
    "no text": ("a.jsonl", b'{"text": 3}\n', {}, "has int in 'text'"),
    "no documents": ("a.jsonl", b'\n{"text": ""}\n', {}, "holds no text"),
    "nothing": ("a.jsonl", b"", {}, "is empty"),
    "cut zst": ("a.txt.zst", zstandard.compress(b"word " * 9999)[:-9], {}, r"a\.txt\.zst is cut short"),
    "cut gz": ("a.txt.gz", gzip.compress(b"word " * 9999)[:-9], {}, r"a\.txt\.gz is cut short"),
    "no zst": ("a.txt.zst", b"hello " * 99, {}, r"a\.txt\.zst is damaged, or no \.zst file"),
    "no gz": ("a.txt.gz", b"hello " * 99, {}, r"a\.txt\.gz is damaged, or no \.gz file"),
    "binary": ("a.txt.gz", gzip.compress(b"a\0" * 99), {}, "holds NUL bytes"),
    "latin": ("a.txt.gz", gzip.compress("déjà ".encode("latin-1") * 99), {}, "40.0 % of the bytes"),
    "separator": ("a.jsonl", b'{"text": "a"}\n', {"document_separator": "x"}, "JSON lines.*Drop --document-separator"),
    "field": ("a.txt.gz", gzip.compress(b"a" * 99), {"text_field": "body"}, "no file is JSON lines"),
    "small bpe": ("a.txt", b"hello " * 99, {"tokenizer": "bpe:257"}, "expected bpe:N with N from 258"),
    "odd bpe": ("a.txt", b"hello " * 99, {"tokenizer": "bpe:many"}, "expected bpe:N"),
    "no tokenizer": ("a.txt", b"hello " * 99, {"tokenizer": "/nowhere"}, "there is no file /nowhere.*bpe:8192"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_by_name(name: str, tmp_path: Path) -> None:
    file, raw, settings, message = BAD[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path / file, **settings))
    assert not resume.holds_run(tmp_path / "run")


@pytest.mark.parametrize(("package", "settings"), [("zstandard", {}), ("tokenizers", {"tokenizer": "bpe:300"})])
def test_absent_packages_are_named(
    package: str, settings: dict[str, Any], lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}. pip install 'stateline\[train\]'"):
        train(tiny(lines, **settings))


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def test_a_learnt_vocabulary_keeps_every_byte_and_is_the_same_everywhere(tmp_path: Path) -> None:
    bpe = learn(DOCUMENTS, 320)
    assert (bpe.size, bpe.dtype, bpe.is_bytes) == (320, np.dtype("<u2"), False)
    text = "déjà\r\n\tvu ☃ <|endoftext|> \x00".encode()
    ids = bpe.encode([text, b""])
    assert ids[1].size == 0
    assert bpe.end not in ids[0], "a text that spells the end of text does not end"
    assert bpe.widths is not None
    assert bpe.widths[ids[0]].sum() == len(text)
    assert b"".join(bpe.tokenizer.token_bytes(int(i)) for i in ids[0]) == text  # type: ignore[union-attr]
    bpe.save(tmp_path)
    again = load_tokenizer(tmp_path, 320)
    assert (again.end, again.start) == (bpe.end, bpe.end)
    assert Vocabulary.read(tmp_path / "tokenizer.json").fingerprint == bpe.fingerprint
    assert named(str(tmp_path)).fingerprint == bpe.fingerprint  # type: ignore[union-attr]
    code = "import test_data as t; print(t.learn(t.DOCUMENTS, 320).fingerprint)"
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert out.stdout.strip() == bpe.fingerprint, out.stderr
    assert learn(DOCUMENTS[:1], 5000).size < 400


# ---- training on it --------------------------------------------------------------------------------------------------


def test_training_prepares_by_itself_and_resumes_with_the_same_bits(
    lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the source is gone: its data set is in the run's folder."""
    settings = {"tokenizer": "bpe:300", "packing": "documents", "accumulate": 2}
    straight = train(tiny(lines, "straight", **settings))
    original = resume.save

    def interrupted(root: Path, position: resume.Position, *args: Any) -> Path:
        path = original(root, position, *args)
        if position.step == 8:  # noticed after the next step
            signal.raise_signal(signal.SIGINT)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", interrupted)
        with pytest.raises(Interrupted, match="Saved at step 9"):
            train(tiny(lines, **settings))
    lines.unlink()
    resumed = train(tiny(lines, resume=True, **settings))
    assert resumed.best_bpb == straight.best_bpb
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    root = resumed.directory
    assert resumed.model.config.vocab_size == 300
    for folder in (root, root / "model", *(root / "checkpoints").glob("step-*/model")):
        assert load_tokenizer(folder, 300).vocab_size == 300
    with pytest.raises(ValueError, match=r"tokenizer is 'bytes', but .* has its own"):
        train(tiny(lines, resume=True, **settings | {"tokenizer": "bytes"}))
    with pytest.raises(ValueError, match=r"packing: documents → stream"):
        train(tiny(lines, resume=True, **settings | {"packing": "stream"}))


def test_resuming_keeps_what_was_prepared(tmp_path: Path) -> None:
    """A source that has changed or gone costs a run nothing; another one is refused, and nothing is written."""
    source = tmp_path / "text.jsonl"
    source.write_bytes(json_lines(DOCUMENTS))
    root = train(tiny(source, steps=2)).directory
    prepared = contents(root / "data" / "train")
    with source.open("ab") as file:
        file.write(json_lines(["one more"]))
    assert train(tiny(source, steps=3, resume=True)).steps == 3
    other = tmp_path / "other.jsonl"
    other.write_bytes(json_lines(DOCUMENTS[:50], "body"))
    with pytest.raises(ValueError, match=r"path and text_field changed, and .*train, which the run learns from"):
        train(tiny(other, steps=4, resume=True, text_field="body"))
    assert contents(root / "data" / "train") == prepared
    source.unlink()
    assert train(tiny(source, steps=4, resume=True)).steps == 4


def test_bits_per_byte_of_any_vocabulary(lines: Path) -> None:
    """The plain definition, over all bytes; in the log, on the way and at the end."""
    result = train(tiny(lines, tokenizer="bpe:300", log_every=1, eval_every=0, sample_every=0))
    data = load_data(tiny(lines).data, home=result.directory, model=result.directory / "model", resumed=True)
    ids = torch.from_numpy(data.val.read(0, len(data.val)).astype(np.int64))[None]
    logp = result.model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert data.vocabulary.tokenizer is not None
    text = data.vocabulary.tokenizer.decode_bytes(ids[0, 1:].tolist())  # type: ignore[attr-defined]
    expected = float(-logp.detach().double().sum()) / math.log(2) / len(text)
    assert result.best_bpb == pytest.approx(expected, rel=1e-5)
    first = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    batch = Windows(data.train, 24, 0).fetch(0, 2)
    per_byte = batch.count / data.train.count(batch.targets)
    assert first["bpb"] == pytest.approx(math.log2(300) * per_byte, rel=0.02), "an untrained model knows nothing"
    tokenizer = load_tokenizer(result.directory / "model", 300)
    alone = bits_per_byte(result.model, "It rained.", tokenizer=tokenizer)
    ids = torch.tensor([[tokenizer.start, *tokenizer.encode("It rained.")]])
    assert alone == pytest.approx(
        float(result.model.loss(ids[:, :-1], ids[:, 1:]).detach()) * (ids.numel() - 1) / math.log(2) / 10
    )
    with pytest.raises(ValueError, match="300 ids, and no tokenizer was given"):
        bits_per_byte(result.model, "It rained.")


def test_prepared_and_plain_bytes_are_the_same_training(tmp_path: Path) -> None:
    """Bytes through shards, through the bytes of a file, compressed or not: the same windows, the same model."""
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS) + "\n")
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress((tmp_path / "text.txt").read_bytes()))
    prepare(request(tmp_path / "text.txt"), tmp_path / "set", progress="off")
    results = [train(tiny(tmp_path / name, name + ".run")) for name in ("text.txt", "text.txt.gz", "set")]
    for other in results[1:]:
        assert other.best_bpb == results[0].best_bpb
        for name, value in results[0].model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value), name


def test_a_model_keeps_its_tokenizer(lines: Path) -> None:
    first = train(tiny(lines, "first", tokenizer="bpe:300", steps=2)).directory
    shape = {"d_model": None, "n_layer": None, "d_state": 16, "steps": 1}
    tuned = train(tiny(lines, "tuned", init_from=first, **shape))
    assert tuned.model.config.vocab_size == 300
    assert load_tokenizer(tuned.directory / "model", 300).vocab_size == 300
    for spec in ("bytes", "bpe:300"):
        with pytest.raises(ValueError, match=rf"tokenizer is '{spec}', but .*first.* has its own.*drop --tokenizer"):
            train(tiny(lines, "other", init_from=first, tokenizer=spec, **shape))
    train(tiny(lines, "same", init_from=first, tokenizer=str(first / "tokenizer.json"), **shape))
    folder = lines.parent / "set"
    prepare(request(lines, tokenizer="bpe:310"), folder, progress="off")
    with pytest.raises(
        ValueError, match=r"set was made with a tokenizer of 310 ids .*first.* reads a tokenizer of 300"
    ):
        train(tiny(folder, "other", init_from=first, **shape))
    with pytest.raises(ValueError, match=r"a prepared data set.*tokenize instead"):
        train(tiny(folder, "other", cache="somewhere"))
    with pytest.raises(ValueError, match=r"made for the tokenizer"):
        train(tiny(folder, "other", **shape | {"steps": 1}), model=_renamed(first))
    with pytest.raises(ValueError, match="vocabulary has 256 entries, training reads a tokenizer of 310 ids"):
        train(tiny(folder, "other", **shape), model=LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=256)))
    assert not (lines.parent / "other" / "run.json").exists()


def _renamed(run: Path) -> LanguageModel:
    model = LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=310))
    model.metadata = stateline.load(run).metadata
    return model


def test_a_cache_serves_several_runs(lines: Path) -> None:
    settings = {"tokenizer": "bpe:300", "cache": str(lines.parent / "cache"), "steps": 1}
    train(tiny(lines, "a", **settings))
    (kept,) = (lines.parent / "cache").iterdir()
    before = kept.stat().st_mtime_ns, contents(kept)
    run = train(tiny(lines, "b", **settings))
    assert (kept.stat().st_mtime_ns, contents(kept)) == before
    assert not (run.directory / "data").exists()
    train(tiny(lines, "b", **settings, resume=True))
    run = train(tiny(lines, "a", **settings | {"cache": None}, overwrite=True))
    assert (run.directory / "data" / "train" / "dataset.json").is_file()
    (lines.parent / "text.txt").write_text("".join(DOCUMENTS))
    train(tiny(lines.parent / "text.txt", "a", steps=1, overwrite=True))
    assert not (run.directory / "data").exists(), "what an older run had prepared goes with it"


def test_validation_is_whole_documents_near_the_share_asked_for(lines: Path) -> None:
    folder = lines.parent / "set"
    prepare(request(lines, tokenizer="bpe:300"), folder, progress="off")
    text, vocabulary, index = open_dataset(folder)
    learnt, val = split(text, 0.1)
    assert len(learnt) + len(val) == len(text)
    assert learnt.num_bytes + val.num_bytes == index.bytes
    assert 0.05 * index.bytes < val.num_bytes <= 0.1 * index.bytes
    assert val.documents(0, 1) == [0]
    assert int(val.read(0, 1)[0]) == vocabulary.end
    assert 100 < val.head(150).num_bytes <= 150
    ids = [*range(3)] * 50
    single = TokenText([np.array(ids, np.uint16)], layout=Layout(np.array([1, 2, 3])))
    learnt, val = split(single, 0.1)
    assert (len(learnt) + len(val), val.num_bytes) == (150, pytest.approx(30, abs=3))


# ---- documents apart -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [True, False])
def test_packed_loss_is_that_of_the_documents_alone(opened: bool) -> None:
    """Windows of two epochs: the packed batch's loss, and its gradient, are those of every stretch on its own."""
    lengths = [3, 1, 17, 2, 40, 9, 1, 1, 26]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = torch.randint(1, 50, (sum(lengths),)).numpy().astype(np.uint8)
    if opened:
        ids[starts] = 0
    text = TokenText([ids], layout=Layout(starts=starts, opened=opened))
    model = LanguageModel(ModelConfig(d_model=12, n_layer=2, vocab_size=50, ssm_cfg={"d_state": 4}))
    windows = Windows(text, 20, seed=3, apart=True)
    for first in (0, 2):
        batch = windows.fetch(first, 3)
        assert batch.cu_seqlens is not None
        total, count = torch.zeros(()), 0
        for at in windows.starts(first, 3):
            edges = [at, *(int(s) for s in starts if at < s < at + 20), at + 20]
            for a, b in pairwise(edges):
                last = b + 1 if opened or b not in starts else b  # whether the stretch may predict what follows
                row = torch.from_numpy(ids[a:last].astype(np.int64))[None]
                total = total + model.loss(row[:, :-1], row[:, 1:]) * (row.shape[1] - 1)
                count += row.shape[1] - 1
        packed = batch.loss(model, torch.device("cpu"))
        assert batch.count == count
        torch.testing.assert_close(packed, total / count)
        weight = model.backbone.layers[0].mixer.in_proj.weight
        wanted, got = (torch.autograd.grad(loss, weight)[0] for loss in (total / count, packed))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    together = windows.fetch(1, 4)
    one_by_one = [windows.fetch(1 + i, 1) for i in range(4)]
    assert torch.equal(together.targets, torch.cat([b.targets for b in one_by_one], 1)), "the counter alone decides"


@pytest.mark.parametrize("opened", [True, False])
def test_score_of_documents_apart_is_that_of_each_alone(opened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateline.training.text.MOST_CUTS", 3)
    lengths = [3, 1, 17, 2, 40, 9, 1, 1, 26]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.arange(sum(lengths)).astype(np.uint8) % 50
    widths = np.arange(50) % 3
    text = TokenText([ids], layout=Layout(widths, starts, opened))
    model = LanguageModel(ModelConfig(d_model=12, n_layer=2, vocab_size=50, ssm_cfg={"d_state": 4}))
    nats, count = 0.0, 0
    for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
        row = torch.from_numpy(ids[a : b + opened].astype(np.int64))[None]
        nats += float(model.loss(row[:, :-1], row[:, 1:]).detach()) * (row.shape[1] - 1) if row.shape[1] > 1 else 0.0
        count += int(widths[row[0, 1:]].sum())
    for chunk in (1, 4, 33, 1000):
        assert bits_per_byte(model, text, chunk=chunk, apart=True) == pytest.approx(
            nats / count / math.log(2), rel=1e-5
        )
    assert bits_per_byte(model, text) != pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_files_of_a_folder_are_documents(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    text = read_text(tmp_path)
    assert text.documents(0, len(text)) == [0, 51, 102]
    piece = text.section(40, 153).piece(5, 70, apart=True)
    assert piece.cuts == [6, 57]
    assert [i for i, t in enumerate(piece.targets.tolist()) if t == IGNORED] == [5, 56]
    assert train(tiny(tmp_path, out=tmp_path / "run", packing="documents", val_fraction=0.3, steps=3)).steps == 3


def test_index_is_about_its_contents() -> None:
    index = Index({"files": []}, 256, "uint8", "bytes", None, shards=[("a", 1, "x")])
    other = Index({"files": ["renamed"]}, 256, "uint8", "bytes", None, shards=[("b", 1, "x")])
    assert index.digest == other.digest


# ---- the command line ------------------------------------------------------------------------------------------------


def test_tokenize_train_generate(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = str(lines.parent / "set"), str(lines.parent / "run")
    assert main(["tokenize", str(lines), "--out", folder, "--tokenizer", "bpe:300", "--progress", "lines"]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith(f"{folder}: 60 documents, ")
    assert "learning a BPE of 300 ids" in seen.err
    assert main(["tokenize", str(lines), "--out", folder, "--tokenizer", "bpe:300", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 300
    assert main(["tokenize", str(lines), "--out", folder]) == 2
    assert "--overwrite" in capsys.readouterr().err
    small = ["--d-model", "16", "--n-layer", "1", "--context", "24", "--steps", "2", "--progress", "lines"]
    assert main(["train", folder, "--out", run, "--packing", "documents", *small]) == 0
    assert "tokens of 300 ids) to learn" in capsys.readouterr().err
    assert main(["generate", "Day", "--model", run, "--max-tokens", "4"]) == 0
    assert main(["tokenize", str(lines.parent / "absent"), "--out", folder]) == 2
