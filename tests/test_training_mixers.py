"""Models of every mixer are trained by their name, and come back from the run's folder as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import tiny

import stateline
from stateline.training import train


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("The state of the Union is strong. " * 200)
    return path


@pytest.mark.parametrize(("d_model", "headdim"), [(64, 64), (20, 8)])
def test_models_of_mamba2_are_trained(text: Path, d_model: int, headdim: int) -> None:
    shape = {"size": None, "d_model": d_model, "n_layer": 2, "mixer": "Mamba2", "d_state": 32, "attention_every": 2}
    model = train(tiny(text, **shape, steps=2)).model
    first, last = (block.mixer for block in model.backbone.layers)
    assert (type(first).__name__, first.headdim, first.d_state, type(last).__name__) == (
        "Mamba2", headdim, 32, "Attention",
    )  # fmt: skip
    assert stateline.load(text.parent / "run").config == model.config


@pytest.mark.parametrize("ranks", [1, 2])
def test_models_of_mamba3_are_trained(text: Path, ranks: int) -> None:
    shape = {"size": None, "d_model": 20, "n_layer": 2, "mixer": "Mamba3", "mimo_rank": ranks, "attention_every": 2}
    model = train(tiny(text, **shape, steps=2)).model
    first, last = (block.mixer for block in model.backbone.layers)
    assert (type(first).__name__, first.headdim, first.mimo_rank, first.is_mimo, type(last).__name__) == (
        "Mamba3", 8, ranks, ranks > 1, "Attention",
    )  # fmt: skip
    assert stateline.load(text.parent / "run").config == model.config


def test_models_of_gated_ssm_are_trained_and_no_other_format_takes_them(text: Path) -> None:
    shape = {"size": None, "d_model": 20, "n_layer": 1, "mixer": "GatedSSM", "activation": "tanh", "d_state": 16}
    model = train(tiny(text, **shape, steps=2)).model
    mixer = model.backbone.layers[0].mixer
    assert (type(mixer).__name__, mixer.d_state, mixer.activation) == ("GatedSSM", 40, "tanh")
    assert stateline.load(text.parent / "run").config == model.config
    for format in ("mamba_ssm", "huggingface"):
        with pytest.raises(ValueError, match=r'GatedSSM.*Use format="stateline"'):
            stateline.save(model, text.parent / format, format=format)


@pytest.mark.parametrize(("lr", "slow"), [(1e-2, 1e-3), (1e-4, 1e-4)])
def test_models_of_s4d_are_trained_with_slower_time_constants(
    text: Path, lr: float, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[float]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW) -> Any:
        used.append([group["lr"] for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = train(tiny(text, mixer="S4D", lr=lr, warmup_steps=0)).model
    mixer = model.backbone.layers[0].mixer
    assert (type(mixer).__name__, mixer.d_state) == ("S4D", 4)
    assert used[0] == pytest.approx([lr, lr, slow])
    assert used[-1][2] / used[0][2] == pytest.approx(used[-1][0] / lr), "it does not follow the schedule"
    assert stateline.load(text.parent / "run").config == model.config


def test_mixers_that_can_be_trained_are_there() -> None:
    from stateline.models import MIXERS
    from stateline.training.config import layout

    assert set(layout()["model"]["mixer"].field.metadata["choices"]) <= set(MIXERS)
