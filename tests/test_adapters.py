"""Low-rank adapters: every targeted Linear learns, nothing else does, and what is saved is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_layers import BOUND
from test_recipes import without_package
from test_resume import LINES, stop_after, tiny
from torch import nn

import stateline
from stateline.models import LanguageModel, ModelConfig, checkpoint
from stateline.training import Interrupted, TrainConfig, adapters, resume, train
from stateline.training.config import AdapterConfig

LINEARS = {"in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"}
NO_SHAPE = {"d_model": None, "n_layer": None, "d_state": 16}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def small() -> LanguageModel:
    shape = ModelConfig(d_model=16, n_layer=2, vocab_size=256, d_intermediate=24, ssm_cfg={"d_state": 4})
    return LanguageModel(shape)


def disturbed(model: LanguageModel) -> LanguageModel:
    """The adapters away from where they start, where B = 0 and A has no gradient."""
    with torch.no_grad():
        for value in adapters.learnt(model).values():
            value += 0.1 * torch.randn_like(value)
    return model


def test_every_targeted_linear_learns_and_nothing_else() -> None:
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = sum(isinstance(m, nn.Linear) for m in model.backbone.modules())
    adapters.add(model, AdapterConfig(lora=3))
    ids = torch.randint(256, (2, 20))
    with torch.no_grad():
        start = model(ids)
    assert torch.equal(start, adapters.without(model, merged=False)(ids)), "training starts at the given model"
    disturbed(model).loss(ids, ids).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == set(adapters.learnt(model))
    assert len(learning) == 2 * count == 2 * 2 * len(LINEARS)
    assert {name.split(".")[4] for name in learning} == LINEARS
    left_out = adapters.without(model, merged=False).state_dict()
    assert all(torch.equal(left_out[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_equals_unmerged(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    with torch.no_grad():
        plain = model(torch.arange(60)[None])
    adapters.add(model, AdapterConfig(lora=3, lora_alpha=5.0))
    state = model.state_dict()
    disturbed(model).eval()
    held = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        wrapped, merged = model(torch.arange(60)[None]), adapters.without(model)(torch.arange(60)[None])
    error = float((wrapped - merged).abs().max() / wrapped.abs().max())
    assert error <= BOUND[dtype]
    assert float((wrapped - plain).abs().max() / wrapped.abs().max()) > 1e-2, "the adapters do something"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in held.items()), "merging must not touch the model"
    # The scale: W + alpha / rank · B A, by hand.
    name = "backbone.layers.1.mixer.dt_proj"
    a, b = after[f"{name}.lora_A.default.weight"], after[f"{name}.lora_B.default.weight"]
    expected = after[f"{name}.base_layer.weight"] + 5.0 / 3 * b @ a
    assert torch.allclose(adapters.without(model).state_dict()[f"{name}.weight"], expected, atol=1e-6)


def test_targets_are_chosen_by_name() -> None:
    model = small()
    adapters.add(model, AdapterConfig(lora=2, lora_targets="dt_proj, fc1"))
    assert {name.split(".")[4] for name in adapters.learnt(model)} == {"dt_proj", "fc1"}
    with pytest.raises(ValueError, match=r"lora_targets has 'q_proj'; the blocks' Linears are in_proj, x_proj"):
        adapters.targets(small(), AdapterConfig(lora=2, lora_targets="in_proj,q_proj"))


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_a_run_resumes_bit_for_bit_and_saves_a_plain_model(
    text: Path, ema: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = text.parent / "given"
    given = small()
    stateline.save(given, source)
    settings: dict[str, Any] = {"init_from": source, "lora": 3, "ema": ema, "sample_every": 0, **NO_SHAPE}
    straight = train(tiny(text, "straight", **settings))
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(Interrupted):
            train(tiny(text, **settings))
    (source / "model.safetensors").unlink()  # the run has its own copy
    resumed = train(tiny(text, resume=True, **settings))
    assert resumed.best_bpb == straight.best_bpb
    ends = [resume.newest(r.directory) for r in (straight, resumed)]
    for name in ("adapters.safetensors", "optimizer.safetensors", *["ema.safetensors"] * bool(ema)):
        one, two = (load_file(end / name) for end in ends if end)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert not any((end / "model").exists() for end in ends if end), "a checkpoint holds the adapters alone"
    saved = stateline.load(resumed.directory)
    assert type(saved.backbone.layers[0].mixer.in_proj) is nn.Linear  # type: ignore[union-attr]
    changed = {name for name, value in given.state_dict().items() if not torch.equal(value, saved.state_dict()[name])}
    assert changed == {f"{name}.weight" for name in adapters.targets(given, AdapterConfig(lora=3))}
    with torch.no_grad():
        assert torch.equal(resumed.model(torch.arange(9)[None]), saved(torch.arange(9)[None]))
    with pytest.raises(ValueError, match="lora: 3 → 4"):
        train(tiny(text, resume=True, **settings | {"lora": 4}))


def test_what_cannot_work_is_refused_before_anything_is_written(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lora adapts given weights, and none are given"):
        train(tiny(text, lora=2))
    adapted = small()
    adapters.add(adapted, AdapterConfig(lora=2))
    with pytest.raises(ValueError, match="model has adapters already"):
        train(tiny(text, **NO_SHAPE), model=adapted)
    without_package("peft", monkeypatch)
    with pytest.raises(ValueError, match=r"lora needs peft.*pip install 'stateline\[lora\]'"):
        train(tiny(text, lora=2, **NO_SHAPE), model=small())
    assert not (text.parent / "run").exists()
    assert TrainConfig.of(lora=2).adapters.lora_alpha is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 12}, "warmup_steps is 12, but the run has 12 steps"),
        ({"schedule": "wsd", "decay_share": 0.5, "warmup_steps": 7}, "the decay takes the last 50% of 12 steps"),
        ({"lora": 2, "lora_targets": "q_proj"}, "lora_targets has 'q_proj'"),
        ({"lora": 2}, "lora needs peft"),
    ],
)
def test_no_text_is_prepared_for_a_run_that_cannot_be(
    settings: dict[str, Any], message: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message == "lora needs peft":
        without_package("peft", monkeypatch)
    checkpoint.save(small(), text.parent / "given")
    settings = {**NO_SHAPE, "init_from": text.parent / "given", "document_separator": "half", "steps": 12} | settings
    with pytest.raises(ValueError, match=message):
        train(tiny(text, **settings))
    assert not (text.parent / "run").exists()
