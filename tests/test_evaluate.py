"""Bits per byte of texts: against plain sums over model.forward, naive loops over windows, and synthetic intervals."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generation_text import make_tokenizer

import stateline
from stateline.apps.confidence import CELL, Tally, ratio_interval, student
from stateline.apps.evaluate import Corpus, Document, EvalConfig, Evaluator, evaluate
from stateline.cli import main
from stateline.generation import ByteTokenizer, JsonTokenizer
from stateline.models import LanguageModel, ModelConfig

NEWLINE = 10
TEXTS = [b"a short one", "naïve café, a longer one that goes on a little\n".encode(), b"x", b"the last of them"]


def sensitive(vocab_size: int = 256, **options: Any) -> LanguageModel:
    """A model to which everything it has read matters."""
    config = ModelConfig(d_model=16, n_layer=2, vocab_size=vocab_size, ssm_cfg={"d_state": 4}, **options)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.mul_(30)
    return model


@torch.no_grad()
def nats(model: LanguageModel, ids: Sequence[int]) -> list[float]:
    """−log p of all ids but the first, from one call of forward."""
    likely = model(torch.tensor([list(ids)])).double().log_softmax(-1)[0]
    return [-float(likely[i, token]) for i, token in enumerate(ids[1:])]


def windows(model: LanguageModel, ids: Sequence[int], context: int, stride: int) -> list[float]:
    """−log p of ids[1:], each from the window that scores it first, token by token."""
    scored: list[float] = []
    for start in range(0, len(ids), stride):
        inside = nats(model, ids[start : start + context + 1])
        scored += inside[len(scored) - start :]
    return scored


def documents(texts: Sequence[bytes] = TEXTS) -> list[Document]:
    return [Document.of(text, f"file {i % 2}") for i, text in enumerate(texts)]


def run(model: LanguageModel, texts: Sequence[bytes], config: EvalConfig, tokenizer: Any = None) -> Any:
    evaluator = Evaluator(model, tokenizer, config)
    evaluator.run(documents(texts))
    return evaluator.report()


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 1000])
def test_documents_are_read_whole_from_fresh_states(chunk: int) -> None:
    """Whatever is packed or cut together; files keep their own sums."""
    model = sensitive().train()
    report = run(model, TEXTS, EvalConfig(chunk=chunk))
    assert model.training, "the mode must come back"
    model.eval()
    costs = [math.fsum(nats(model, [NEWLINE, *text])) for text in TEXTS]
    sizes = [len(text) for text in TEXTS]
    assert report.total.nats == pytest.approx(sum(costs), rel=1e-5)
    assert report.total.bytes == report.total.tokens == sum(sizes)
    assert report.total.bits_per_byte == pytest.approx(sum(costs) / math.log(2) / sum(sizes), rel=1e-5)
    assert report.total.perplexity == pytest.approx(math.exp(sum(costs) / sum(sizes)), rel=1e-5)
    assert [f.name for f in report.files] == ["file 0", "file 1"]
    assert [f.nats for f in report.files] == pytest.approx([costs[0] + costs[2], costs[1] + costs[3]], rel=1e-5)
    assert [(f.documents, f.bytes) for f in report.files] == [(2, sizes[0] + sizes[2]), (2, sizes[1] + sizes[3])]


@pytest.mark.parametrize(("context", "stride"), [(1, None), (4, None), (4, 4), (4, 1), (7, 3), (5, 4), (99, 50)])
@pytest.mark.parametrize("chunk", [3, 64])
def test_windows_and_sliding_windows_against_naive_loops(context: int, stride: int | None, chunk: int) -> None:
    model = sensitive()
    mode = "window" if stride is None else "sliding"
    report = run(model, TEXTS, EvalConfig(mode, context, stride, chunk))
    costs = [cost for text in TEXTS for cost in windows(model, [NEWLINE, *text], context, stride or context)]
    assert len(costs) == report.total.tokens == sum(map(len, TEXTS))
    assert report.total.nats == pytest.approx(math.fsum(costs), rel=1e-5)


def test_more_context_is_more_information(tmp_path: Path) -> None:
    """On the bundled model: windows cost most, sliding windows less, whole documents least."""
    text = (Path(stateline.__file__).parent / "bundled" / "excerpt" / "test.txt").read_bytes()[:400]
    (tmp_path / "text.txt").write_bytes(text)
    model = stateline.load("bundled")
    configs = [EvalConfig(), EvalConfig("sliding", 32, 16), EvalConfig("window", 32)]
    bits = [evaluate(model, [tmp_path], config=config).total.bits_per_byte for config in configs]
    assert 1 < bits[0] < bits[1] < bits[2] < 3


@pytest.mark.parametrize("start", [None, 0])
def test_tokens_of_several_bytes(tmp_path: Path, start: int | None) -> None:
    """Bits per byte divide by the text's bytes; without a start id the first token is a uniform guess."""
    library = make_tokenizer(tmp_path, "bytes")
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", start=start)
    texts = [b"the theory of the other thing", "naïve café".encode(), b"t"]
    model = sensitive(704)
    report = run(model, texts, EvalConfig(chunk=5), tokenizer)
    cost, tokens = 0.0, 0
    for text in texts:
        ids = library.encode(text.decode()).ids
        tokens += len(ids)
        cost += sum(nats(model, ids)) + math.log(704) if start is None else sum(nats(model, [start, *ids]))
    assert tokens < sum(map(len, texts))
    assert (report.total.tokens, report.total.bytes) == (tokens, sum(map(len, texts)))
    assert report.total.nats == pytest.approx(cost, rel=1e-5)
    assert report.total.bits_per_byte == pytest.approx(cost / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert any("uniform guess" in note for note in report.notes) == (start is None)


def test_what_a_tokenizer_loses_is_told_and_still_counts() -> None:
    """Ids that stand for other bytes than the text's, and texts without any id."""

    class Lossy(ByteTokenizer):
        def encode(self, text: str | bytes) -> list[int]:
            return [b for b in super().encode(text) if b != ord(" ")]

        def token_bytes(self, token: int) -> bytes:
            return bytes((token,))

    class Wrapped:
        vocab_size, start, end, prefix, piecewise = 256, NEWLINE, None, (), True
        encode, token_bytes = Lossy().encode, Lossy().token_bytes

    model = sensitive()
    report = run(model, [b"a b c", b"  ", b"d"], EvalConfig(), Wrapped())
    assert report.total.bytes == 8
    assert report.total.tokens == 4
    expected = sum(nats(model, [NEWLINE, *b"abc"])) + nats(model, [NEWLINE, *b"d"])[0]
    assert report.total.nats == pytest.approx(expected, rel=1e-5)
    assert any("in 2 document(s)" in note for note in report.notes)
    with pytest.raises(ValueError, match=r"eval: file 0 is not UTF-8 \(invalid start byte at byte 1"):
        run(model, [b"a\xff"], EvalConfig(), Wrapped())


def test_bfloat16_and_float64_models() -> None:
    figures = [run(sensitive_as(d), TEXTS, EvalConfig()).total for d in (torch.float64, torch.bfloat16)]
    assert figures[1].nats == pytest.approx(figures[0].nats, rel=0.1)
    assert figures[1].nats != figures[0].nats


def sensitive_as(dtype: torch.dtype) -> LanguageModel:
    torch.manual_seed(0)
    return sensitive().to(dtype)


def test_broken_models_give_no_figure() -> None:
    model = sensitive(tie_embeddings=False)
    with torch.no_grad():
        model.backbone.embedding.weight[ord("g")] = math.nan
    with pytest.raises(ValueError, match=r"no probability for token 5 of a document in file 1"):
        run(model, [b"abc", b"defgh"], EvalConfig("window", 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "whole"}, "mode is 'whole', expected one of"), ({"mode": "window"}, "'window' needs context"),
        ({"context": 4}, "context goes with mode 'window' and 'sliding'"), ({"stride": 4}, "stride goes with mode"),
        ({"mode": "sliding", "context": 4}, "needs stride"), ({"mode": "window", "context": 0}, "context is 0"),
        ({"mode": "window", "context": 4, "stride": 2}, "stride goes with mode 'sliding'"),
        ({"mode": "sliding", "context": 4, "stride": 5}, "stride is 5, expected a whole number .* at most 4"),
        ({"chunk": 0}, "chunk is 0"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def test_models_of_other_ids_need_their_tokenizer() -> None:
    with pytest.raises(ValueError, match="ids are not bytes and no tokenizer was given"):
        Evaluator(sensitive(300))


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\nlines\n")
    (tmp_path / "a.jsonl").write_text('{"text": "né", "id": 1}\n\n{"text": ""}\n{"text": "end"}')
    (tmp_path / "sub" / "c.txt").write_text("c")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def read(corpus: Corpus) -> list[tuple[str, bytes]]:
    return [(Path(d.source).name, d.data.tobytes()) for d in corpus.documents()]


def test_folders_files_lines_and_limits(folder: Path) -> None:
    whole = [("a.jsonl", "né".encode()), ("a.jsonl", b"end"), ("b.txt", b"two\nlines\n"), ("c.txt", b"c")]
    assert read(Corpus.of([folder])) == read(Corpus.of([folder, folder / "b.txt"])) == whole
    lines = read(Corpus.of([folder / "b.txt"], lines=True))
    assert lines == [("b.txt", b"two\n"), ("b.txt", b"lines\n")]
    for limit in range(1, 20):
        cut = read(Corpus.of(folder, limit=limit))
        joined = b"".join(text for _, text in cut)
        assert joined == b"".join(text for _, text in whole)[: limit - (limit == 2)]  # é is never halved
    ends = [d.consumed for d in Corpus.of([folder]).documents()]
    assert ends == sorted(ends)
    assert ends[-1] == Corpus.of([folder]).size


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_compressed_files_are_the_texts_in_them(folder: Path, kind: str) -> None:
    compress = gzip.compress if kind == ".gz" else pytest.importorskip("zstandard").compress
    for name in ("a.jsonl", "b.txt"):
        (folder / f"{name}{kind}").write_bytes(compress((folder / name).read_bytes()))
    for lines in (False, True):
        for limit in (None, 3, 100):
            for name in ("a.jsonl", "b.txt"):
                plain, packed = (Corpus.of(folder / f, lines=lines, limit=limit) for f in (name, f"{name}{kind}"))
                assert [text for _, text in read(packed)] == [text for _, text in read(plain)]
    ends = [(d.consumed, d.stored) for d in Corpus.of(folder / f"b.txt{kind}").documents()]
    assert ends == [((folder / f"b.txt{kind}").stat().st_size,) * 2]
    whole = (folder / f"b.txt{kind}").read_bytes()
    for damaged, message in ((whole[:-6], "is cut short"), (b"plain", "is damaged, or no")):
        (folder / f"b.txt{kind}").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"eval: .*b.txt{kind} {message}"):
            read(Corpus.of(folder / f"b.txt{kind}"))


@pytest.mark.parametrize("lines", [False, True])
def test_binary_files_are_no_texts(folder: Path, lines: bool) -> None:
    image = folder / "picture"
    for content, message in (
        (b"a\0b\n", r"picture holds NUL bytes"),
        (b"caf\xe9\n", r"20.0 % of the bytes of .*picture"),
    ):
        image.write_bytes(content)
        with pytest.raises(ValueError, match=rf"eval: .*{message}.*with --force-binary"):
            read(Corpus.of(image, lines=lines))
        assert read(Corpus.of(image, lines=lines, force_binary=True)) == [("picture", content)]


def test_bad_files_are_named(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    for content, message in [
        ("{}", r"bad.jsonl:1 has no field 'text'; it has none"), ("[1]", r"bad.jsonl:1 holds a list"),
        ('{"text": "a"}\n{"te', r"bad.jsonl:2 is not JSON"), ('{"text": 3}', r"'text' is a int, expected a string"),
        ('{"text": "\\ud800"}', "half a surrogate pair"), ("\udcff", "bad.jsonl:1 is not JSON"),
        ("[" * 100_000, "bad.jsonl:1 is not JSON"),
    ]:  # fmt: skip
        bad.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=message):
            read(Corpus.of([bad]))
    (folder / "none").mkdir()
    for paths, message in [
        ([folder / "nowhere"], "there is no file or folder"), ([folder / "none"], r"holds no .txt, .jsonl, .ndjson"),
        ([folder / "empty.txt"], r"1 file\(s\) with 0 bytes"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Corpus.of(paths)
    with pytest.raises(ValueError, match="limit is 0"):
        Corpus.of([folder], limit=0)


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_students_quantiles() -> None:
    """Against a printed table (two-sided 95 and 99 %)."""
    for freedom, table in {
        7: (2.3646, 3.4995),
        10: (2.2281, 3.1693),
        30: (2.0423, 2.7500),
        1000: (1.9623, 2.5808),
    }.items():
        found = student(0.975, freedom), student(0.995, freedom)
        assert found == pytest.approx(table, abs=2e-3)


def correlated(rng: np.random.Generator, n: int, reach: int = 300) -> np.ndarray:
    """Costs of n bytes around a mean of 2 that rise and fall over `reach` bytes, as topics do."""
    sums = np.cumsum(rng.standard_normal(n + reach))
    return 2 + 0.5 * (sums[reach:] - sums[:-reach]) / math.sqrt(reach) + rng.standard_normal(n) * 0.5


def interval_of(values: np.ndarray, document: int) -> tuple[float, float]:
    tally = Tally()
    for at in range(0, len(values), document):
        number = tally.begin()
        for start in range(at, min(at + document, len(values)), 1000):
            piece = values[start : min(start + 1000, at + document)]
            tally.add(piece, np.ones(len(piece)), number)
    found = ratio_interval(*tally.units()[:2])
    assert found is not None
    return found


@pytest.mark.parametrize("document", [60_000, 1_000], ids=["one document", "60 documents"])
def test_intervals_cover_dependent_data(document: int) -> None:
    """95 % intervals hold the truth in 90 to 99 % of 200 texts; tokens taken for independent do in far fewer."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(200):
        values = correlated(rng, 60_000)
        low, high = interval_of(values, document)
        covered += low < 2 < high
        naive += abs(values.mean() - 2) < 1.96 * values.std() / math.sqrt(len(values))
    assert 180 <= covered <= 198
    assert naive < 60


def test_units_of_a_tally() -> None:
    tally = Tally()
    tally.add(np.ones(100), np.full(100, 3.0), tally.begin())  # tokens of three bytes
    assert [len(c) for c in tally.cells] == [2, 2]
    assert list(tally.cells[1]) == [258, 42]  # token 85 begins at byte 255
    assert tally.units()[2] == f"2 blocks of {CELL} bytes"
    assert ratio_interval(*tally.units()[:2]) is None
    for _ in range(30):
        tally.add(np.ones(10), np.ones(10), tally.begin())
    assert "blocks" in tally.units()[2], "one document has nearly all bytes"
    many = Tally.joined([tally, *(_of_size(10_000) for _ in range(30))])
    assert many.units()[2] == "61 documents"
    assert many.size == tally.size + 300_000
    assert sum(many.documents[1]) == sum(many.cells[1]) == many.size
    assert Tally().units()[2] == "no blocks"


def _of_size(size: int) -> Tally:
    tally = Tally()
    tally.add(np.ones(size), np.ones(size), tally.begin())
    return tally


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("eval") / "model"
    stateline.save(sensitive(), path)
    return path


def test_command_shows_what_the_api_gives(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(stateline.load(home), Corpus.of([folder], lines=True), config=EvalConfig("window", 3))
    words = ["eval", str(home), str(folder), "--lines", "--mode", "window", "--context", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "windows of 3 tokens, each from a fresh state" in out
    rows = [line.split() for line in out.splitlines()[1:5]]
    for row, score in zip(rows, [*report.files, report.total], strict=True):
        name, documents, size, tokens, bits, *_, perplexity = row
        assert (name, documents, size, tokens) == (
            score.name,
            str(score.documents),
            str(score.bytes),
            str(score.tokens),
        )
        assert (bits, perplexity) == (f"{score.bits_per_byte:.4f}", f"{score.perplexity:,.3f}")
    assert main([*words, "--json", "--threads", "1", "--dtype", "float32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["nats"] == report.total.nats
    assert told["total"]["interval"] is None
    assert (told["mode"], told["context"], told["complete"]) == ("window", 3, True)
    assert main(["eval", str(home), str(folder / "b.txt"), "--limit", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["bytes"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "window"], "--mode window needs --context N"),
        (["--mode", "sliding", "--context", "4"], "needs --stride S"),
        (["--context", "4"], "context goes with mode 'window' and 'sliding'"),
        (["--field", "body"], "no field 'body'; it has id, text. Choose one with --field."),
        (["nowhere.txt"], "there is no file or folder nowhere.txt"),
    ],
)
def test_command_complains_in_one_line(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["eval", str(home), str(folder), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert sum("error" in line for line in lines) == 1


def test_an_interrupt_shows_what_is_known(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "b.txt").write_bytes(b"x" * 5000)
    whole = Corpus.documents

    def interrupted(self: Corpus) -> Iterator[Document]:
        for document in whole(self):
            if document.source.endswith("c.txt"):
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(Corpus, "documents", interrupted)
    assert main(["eval", str(home), str(folder), "--json"]) == 130
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert told["complete"] is False
    assert 4000 < told["total"]["bytes"] < 5008  # what was read before the last chunk was full
    assert "interrupted" in out.err
