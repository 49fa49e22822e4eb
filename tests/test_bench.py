"""`stateline bench`: what is counted and timed, on a tiny model; speeds themselves are not tested."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stateline
from stateline.apps import bench
from stateline.cli import main
from stateline.models import LanguageModel, ModelConfig

TINY = bench.Effort(0.01, 1 << 20, 64, 600, ModelConfig(d_model=16, n_layer=2, vocab_size=256))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(bench, "PREFILL", (8, 16))


def test_medians_follow_a_warm_up() -> None:
    pauses = iter([0.03, 0.001, 0.02, 0.001, *[0.001] * 100])
    calls = []

    def work() -> None:
        calls.append(pause := next(pauses))
        time.sleep(pause)

    assert bench.median_seconds(work, 0.1) < 0.01
    assert len(calls) == 1 + bench.FEWEST
    calls.clear()
    slow: Callable[[], None] = lambda: (calls.append(0.0), time.sleep(0.04))[1]  # noqa: E731
    assert bench.median_seconds(slow, 0.01) >= 0.04
    assert len(calls) == 2, "what takes too long is timed once"


def test_weights_are_counted_once() -> None:
    for tied in (True, False):
        model = LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256, tie_embeddings=tied))
        assert bench.weight_bytes(model) == 4 * model.num_parameters()
        half = bench.convert(model, "bfloat16")
        assert 2 * model.num_parameters() < bench.weight_bytes(half) < 3 * model.num_parameters()
        assert model.lm_head.weight.dtype == torch.float32, "the model given stays as it is"
    assert bench.convert(model, "float32") is model


def test_shares_are_of_the_limit_that_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every call taking a second, by hand: 2 flops a weight and token; all weights but a lookup's rows a step."""
    monkeypatch.setattr(bench, "median_seconds", lambda run, seconds: run() is not None and 1.0)
    model = bench.random_model(ModelConfig(d_model=16, n_layer=2, vocab_size=256, tie_embeddings=False))
    *_, (_, row) = bench.measure(model, "float32", bench.Limits(1e6, {"float32": 1e7, "bfloat16": 1e9}), TINY)
    inner, rank, state = 32, 1, 16
    products = 2 * (16 * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * 16)
    assert row.prefill == {8: 8.0, 16: 16.0}
    assert row.prefill_share[16] == pytest.approx(16 * 2 * products / 1e7)
    assert row.decode == {1: 1.0, 8: 8.0}
    read = 4 * (model.num_parameters() - 256 * 16)
    assert row.decode_share == {1: pytest.approx(read / 1e6), 8: pytest.approx(read / 1e6)}
    *_, (_, half) = bench.measure(model, "bfloat16", bench.Limits(1e6, {"float32": 1e7, "bfloat16": 1e9}), TINY)
    assert half.prefill_share[16] == pytest.approx(16 * 2 * products / 1e9)


def test_a_new_way_to_keep_weights_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package offers is used by its signature, and a worse model shows as a loss with an interval."""
    asked = []

    def prepare_for_decode(model: LanguageModel, weights: str) -> LanguageModel:
        asked.append(weights)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    monkeypatch.setattr(stateline, "prepare_for_decode", prepare_for_decode, raising=False)
    assert bench.ways() == ["float32", "bfloat16", "bf16", "int8", "int4"]
    quality = bench.Quality(stateline.load("bundled", dtype=torch.float32), None, bench.Effort(text=3000))
    rows = [bench.Row(way, 0.0) for way in ("float32", "int4")]
    for row in rows:
        quality.add(row)
    assert asked == ["int4"]
    assert (rows[0].loss, rows[0].loss_interval) == (0.0, (0.0, 0.0))
    loss, interval = rows[1].loss, rows[1].loss_interval
    assert loss is not None
    assert interval is not None
    assert rows[0].bits_per_byte is not None
    assert rows[1].bits_per_byte == pytest.approx(rows[0].bits_per_byte + loss)
    assert 0 < interval[0] < loss < interval[1]


def test_command_prints_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"machine", "limits", "model", "weights", "float32", "bfloat16"} <= set(lines)
    assert lines["float32"].count("%)") == 4
    assert ("note:" in lines) == (bench.prepare() is None)
    torch.manual_seed(0)
    stateline.save(LanguageModel(TINY.model), tmp_path / "m")
    assert main(["bench", "--quick", "--json", "--threads", "1", "--model", str(tmp_path / "m")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"] is True
    assert told["machine"]["threads"] == 1
    assert told["limits"]["read bytes/s"] > 0
    assert told["model"]["quality of"] == str(tmp_path / "m")
    for row in told["rows"]:
        figures = [*row["prefill"].values(), *row["decode"].values(), row["bits_per_byte"], row["megabytes"]]
        assert len(figures) == 6
        assert all(math.isfinite(f) and f > 0 for f in figures)


def test_attention_that_keeps_every_token_wants_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hybrid = ModelConfig(
        d_model=16, n_layer=2, vocab_size=256, d_intermediate=8, attn_layer_idx=[1], attn_cfg={"num_heads": 2}
    )
    stateline.save(LanguageModel(hybrid), tmp_path / "m")
    command = ["bench", "--quick", "--json", "--model", str(tmp_path / "m")]
    for room, why in (([], "--room"), (["--room", "600"], "becomes 601 tokens long, its state has room for 600")):
        assert main([*command, *room]) == 2
        assert why in capsys.readouterr().err
    assert main([*command, "--room", "700"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["weights"] for row in rows] == bench.ways()
    assert all(len(row["decode"]) == 2 and row["bits_per_byte"] > 0 for row in rows)


def test_an_interrupt_shows_what_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Quality, "add", interrupted)
    assert main(["bench", "--quick", "--json"]) == 130
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert told["complete"] is False
    assert [row["weights"] for row in told["rows"]] == ["float32"]
    assert "interrupted" in out.err
