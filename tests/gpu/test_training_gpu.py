"""Training on a GPU through a recording of each batch: the figures of plain training, launch by launch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from where import INTERPRETED

from stateline.training import TrainConfig, train

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no device")

EXCERPT = files("stateline") / "bundled" / "excerpt"


@pytest.fixture(autouse=True)
def _plain_memory(monkeypatch: pytest.MonkeyPatch, _fenced: None) -> None:
    """Guard bytes are filled by launches that a recording would replay."""
    monkeypatch.undo()


def run(out: Path, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Bits a byte of every step, and the weights at the end."""
    given: dict[str, Any] = {
        "path": str(EXCERPT / "train.txt"), "val": str(EXCERPT / "validation.txt"), "out": str(out), "d_model": 64,
        "n_layer": 2, "context": 128, "batch_size": 4, "steps": 6, "eval_every": 3, "eval_bytes": 2000, "log_every": 1,
        "sample_every": 0, "save_every": 0, "progress": "off", "device": "cuda", **settings,
    }  # fmt: skip
    result = train(TrainConfig.of(**given))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = {name: p.detach().float().cpu() for name, p in result.model.named_parameters()}
    return [line["bpb"] for line in lines if "bpb" in line], weights


@pytest.mark.parametrize("settings", [
    {}, {"dtype": "bfloat16"}, {"accumulate": 2, "ema": 0.9}, {"clip": 0.1, "on_spike": "skip"},
], ids=str)  # fmt: skip
def test_a_recorded_run_is_the_plain_one(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, wanted = run(tmp_path / "plain", **settings)
    recorded, got = run(tmp_path / "recorded", cuda_graphs=True, **settings)
    assert len(set(plain)) == 6, "training changed nothing"
    assert recorded == pytest.approx(plain, rel=1e-5)
    for name, weight in wanted.items():
        assert torch.allclose(got[name], weight, atol=1e-4), name  # Adam divides small gradients by their own size


def test_a_resumed_run_goes_on_recorded(tmp_path: Path) -> None:
    found = []
    for recorded in (False, True):
        run(tmp_path / str(recorded), cuda_graphs=recorded, steps=3)
        found.append(run(tmp_path / str(recorded), cuda_graphs=recorded, steps=6, resume=True)[0])
    assert len(found[0]) == 6
    assert found[1] == pytest.approx(found[0], rel=1e-5)
