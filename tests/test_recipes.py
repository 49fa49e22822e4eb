"""Recipes of the training loop: schedules, running means, early ends, settings from files, formats to start from."""

from __future__ import annotations

import argparse
import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import LINES, assert_same_bits, stop_after, tiny

import stateline
from stateline.cli import main
from stateline.models import LanguageModel, ModelConfig
from stateline.training import (
    Interrupted,
    TrainConfig,
    TrainingError,
    add_arguments,
    bits_per_byte,
    from_arguments,
    load_data,
    loop,
    resume,
    train,
)
from stateline.training.data import Windows
from stateline.training.ema import Ema
from stateline.training.guard import Watched, spike_bound, watch_loss
from stateline.training.schedule import FORMS, SCHEDULES, Decay, Form, make_schedule


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every import of a package, or of torch's part that needs it, fail as if it were not installed."""
    original = builtins.__import__

    def refuse(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted.split(".")[0] == name or wanted == f"torch.utils.{name}":
            raise ImportError(name)
        return original(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"steps": 101}, {"epochs": 101.0}, {"minutes": 2.0}])
@pytest.mark.parametrize(
    ("form", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5)), (None, 0.5)]
)
def test_wsd_warms_up_stays_and_falls(budget: dict[str, Any], form: str | None, half: float) -> None:
    """Warm-up over 10 steps, the peak until 60 %, half of the fall at 80 %, the end at the last step."""
    settings = {"schedule": "wsd", "decay_share": 0.4, "lr": 0.5, "min_lr_ratio": 0.2, "warmup_steps": 10}
    schedule = make_schedule(TrainConfig.of(**settings, **budget, decay_form=form, batch_size=1), 1)

    def rate(percent: int) -> float:
        return schedule.learning_rate(percent, 1.2 * percent)

    assert rate(4) == pytest.approx(0.25)
    assert rate(10) == rate(35) == rate(60) == pytest.approx(0.5)
    assert rate(80) == pytest.approx(0.5 * (0.2 + 0.8 * half))
    assert rate(100) == pytest.approx(0.1)
    assert rate(70) > rate(75) > rate(90) > rate(99)
    assert schedule.finished(101, 120.0)
    assert not schedule.finished(100, 119.9)


def test_other_schedules() -> None:
    constant = make_schedule(TrainConfig.of(schedule="constant", steps=50, lr=0.1, warmup_steps=2), 1)
    assert [constant.learning_rate(s) for s in (0, 1, 20, 49)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    wsd = make_schedule(TrainConfig.of(schedule="wsd", steps=101, lr=1.0, warmup_steps=0), 1)
    assert [wsd.learning_rate(s) for s in (80, 90, 100)] == pytest.approx([1.0, 0.55, 0.1])
    longer = make_schedule(TrainConfig.of(schedule="wsd", steps=201, lr=1.0, warmup_steps=0), 1)
    assert all(longer.learning_rate(s) == wsd.learning_rate(s) for s in range(81)), "a longer run begins alike"


def test_rows_check_themselves() -> None:
    with pytest.raises(ValueError, match="short: a form falls from 1 to 0, this one from 1"):
        Form("short", lambda x: 1 - x / 2)
    with pytest.raises(ValueError, match="wavy: a form never rises"):
        Form("wavy", lambda x: 1 - x + math.sin(math.pi * x) * 4)
    with pytest.raises(ValueError, match="expected both in"):
        Decay(1.5, FORMS["linear"], 0.0)
    choices = {f.name: f.metadata.get("choices") for _, _, f in TrainConfig().flat()}
    assert choices["schedule"] == tuple(SCHEDULES)
    assert choices["decay_form"] == tuple(FORMS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_share": 0.5}, "decay_share is set, but schedule is 'cosine'"),
        ({"schedule": "constant", "decay_form": "sqrt"}, "decay_form is set, but schedule is 'constant'"),
        ({"schedule": "constant", "min_lr_ratio": 0.5}, "min_lr_ratio is set, but schedule is 'constant'"),
        ({"schedule": "wsd", "decay_share": 0.0}, "decay_share is 0.0, expected a number above 0"),
        ({"ema": 1.0}, "ema is 1.0, expected a number at least 0 and below 1"),
        ({"lora_alpha": 2.0}, "lora_alpha is set, but lora is 0"),
        ({"patience": 3, "eval_every": 0}, "patience is 3, but eval_every is 0"),
        ({"min_delta": 0.1}, "min_delta is set, but patience is 0"),
        ({"cuda_graphs": True, "packing": "documents"}, "cuda_graphs is set, but packing is 'documents'"),
        ({"cuda_graphs": True, "checkpoint_activations": True}, "cuda_graphs and checkpoint_activations are both set"),
        ({"on_spike": "panic"}, "on_spike is 'panic', expected one of 'stop', 'skip', 'ignore'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(**settings)


def test_wsd_needs_room() -> None:
    crowded = TrainConfig.of(schedule="wsd", steps=100, warmup_steps=60, decay_share=0.5)
    with pytest.raises(ValueError, match="warmup_steps is 60, but the decay takes the last 50% of 100 steps"):
        make_schedule(crowded, 1)


# ---- a running mean --------------------------------------------------------------------------------------------------


def test_the_mean_is_the_definition() -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(layer, 0.9)
    expected = layer.weight.detach().double()
    for step in range(1, 200):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3).bfloat16())
        ema.update(step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * layer.weight.detach().double()
    assert ema.means["weight"].dtype == torch.float32
    assert torch.allclose(ema.means["weight"].double(), expected, atol=1e-4)
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, ema.means["weight"].bfloat16())
    assert torch.equal(layer.weight, own)


def test_the_mean_is_what_is_judged_and_saved(text: Path) -> None:
    plain = train(tiny(text, "plain"))
    result = train(tiny(text, "mean", ema=0.8))
    last = resume.newest(result.directory)
    assert last is not None
    means = load_file(last / "ema.safetensors")
    weights = load_file(last / "model" / "model.safetensors")
    own = load_file(resume.newest(plain.directory) / "model" / "model.safetensors")  # type: ignore[operator]
    assert all(torch.equal(weights[name], own[name]) for name in own), "the mean must not touch training"
    saved = stateline.load(result.directory).state_dict()
    position, _, _ = resume.read_about(last)
    assert position.best_step == position.step, "the test compares the last mean"
    assert all(torch.equal(saved[name], means[name]) for name in means)
    assert any(not torch.equal(means[name], weights[name]) for name in means)
    logged = [r["val_bpb"] for r in records(result.directory) if "val_bpb" in r]
    assert result.best_bpb == bits_per_byte(stateline.load(result.directory), load_data(tiny(text).data).val)
    assert logged[-1] == pytest.approx(result.best_bpb, rel=1e-5)


@pytest.mark.parametrize("at", [8, 13])
def test_resume_gives_the_same_bits_with_every_recipe(text: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "ema": 0.9, "schedule": "wsd", "decay_form": "sqrt", "on_spike": "skip", "spike_window": 10,
        "patience": 50, "checkpoint_activations": True, "dtype": "bfloat16", "dropout": 0.05,
    }  # fmt: skip
    data = tiny(text).data
    bad, _ = Windows(load_data(data).train, data.context, 0).batch(16 * 4, 2)  # the first half of step 16
    original = LanguageModel.loss

    def loss(model: LanguageModel, ids: torch.Tensor, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        return original(model, ids, targets, **options) * (9.0 if torch.equal(ids, bad) else 1.0)

    monkeypatch.setattr(LanguageModel, "loss", loss)
    straight = train(tiny(text, "straight", **recipe))
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        with pytest.raises(Interrupted):
            train(tiny(text, **recipe))
    resumed = train(tiny(text, resume=True, **recipe))
    assert resumed.best_bpb == straight.best_bpb
    assert_same_bits(straight.directory, resumed.directory)
    ends = [resume.newest(folder) for folder in (straight.directory, resumed.directory)]
    means = [load_file(end / "ema.safetensors") for end in ends if end]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    positions = [resume.read_about(end)[0].watched for end in ends if end]
    assert positions[0] == positions[1]
    assert positions[0].skipped == 1


# ---- early ends ------------------------------------------------------------------------------------------------------


def test_patience_ends_a_run(text: Path) -> None:
    """Validation text unlike the training text gets worse; three such results in a row end the run."""
    other = text.parent / "other.txt"
    other.write_text("zyxwv-" * 60)
    settings = {"val": other, "eval_every": 2, "steps": 400, "lr": 3e-2, "sample_every": 0}
    result = train(tiny(text, patience=3, **settings))
    scores = [(r["step"], r["val_bpb"]) for r in records(result.directory) if "val_bpb" in r]
    best = min(range(len(scores)), key=lambda i: scores[i][1])
    assert len(scores) - 1 - best == 3
    assert result.steps == scores[-1][0] < 400
    again = train(tiny(text, patience=3, resume=True, **settings))
    assert again.steps == result.steps, "patience stays exhausted"
    more = train(tiny(text, patience=5, resume=True, **settings))
    assert more.steps == result.steps + 4
    sooner = train(tiny(text, "sooner", patience=3, min_delta=50.0, **settings))
    assert sooner.steps == 8, "the first result counts, the next three are no 50 bits better"


def test_spike_bound_is_the_definition() -> None:
    config = TrainConfig.of(spike_window=11, spike_mads=4.0).guard
    watched = Watched()
    for loss in (1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10):
        assert spike_bound(watched, config) is None
        assert not watch_loss(watched, loss, config)
    assert not watch_loss(watched, 100.0, config), "too few losses to judge by"
    assert spike_bound(watched, config) == 6 + 4 * 3  # median 6, deviations 5 4 3 2 1 0 1 2 3 4 94
    assert watch_loss(watched, 18.1, config)
    assert (watched.spikes, len(watched.losses)) == (1, 11)
    assert not watch_loss(watched, 17.9, config)
    assert (watched.spikes, watched.losses[0]) == (0, 2.0)
    flat = Watched([2.0] * 11)
    assert spike_bound(flat, config) == pytest.approx(2 + 4 * 0.02)


def spoil(monkeypatch: pytest.MonkeyPatch, calls: range, factor: float = 3.0) -> None:
    """Make the loss of these calls of `model.loss`, from 0, too big."""
    original, count = LanguageModel.loss, iter(range(10**6))

    def loss(model: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(model, *args, **kwargs) * (factor if next(count) in calls else 1.0)

    monkeypatch.setattr(LanguageModel, "loss", loss)


def test_a_lasting_spike_ends_a_run(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 40, "accumulate": 1, "spike_window": 12, "eval_every": 0, "sample_every": 0, "lr": 1e-3}
    for on_spike in ("stop", "skip"):
        with monkeypatch.context() as patch:
            spoil(patch, range(22, 40))
            message = r"after 26 steps the loss is .*above .* for 5 steps in a row.*last good checkpoint is .*00000020"
            with pytest.raises(TrainingError, match=message):
                train(tiny(text, on_spike=on_spike, overwrite=True, **settings))
    assert train(tiny(text, on_spike="skip", resume=True, **settings)).steps == 40, "--on-spike may change on resume"
    with monkeypatch.context() as patch:
        spoil(patch, range(22, 40))
        assert train(tiny(text, on_spike="ignore", overwrite=True, **settings)).steps == 40


def test_a_skipped_spike_leaves_no_trace_in_the_weights(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "steps": 26, "accumulate": 1, "spike_window": 12, "eval_every": 0, "sample_every": 0, "lr": 1e-3, "ema": 0.9,
        "save_every": 1, "keep": 100, "log_every": 1000,
    }  # fmt: skip
    for on_spike, same in (("skip", True), ("stop", False)):
        with monkeypatch.context() as patch:
            spoil(patch, range(22, 23))
            root = train(tiny(text, on_spike, on_spike=on_spike, **settings)).directory
        found = {path.name: path for path in (root / "checkpoints").glob("step-*")}
        after = [path for path in found.values() if path.name > "step-00000022"]
        assert "step-00000023" not in found, "a checkpoint amid a spike is none to go back to"
        spike = [r for r in records(root) if "spike" in r]
        assert [(r["step"], r["spike"]) for r in spike] == [(23, "skipped" if same else "kept")]
        position, _, _ = resume.read_about(max(after))
        assert (position.watched.skipped, position.step, position.windows) == (int(same), 26, 52)
        moments = load_file(max(after) / "optimizer.safetensors")
        counts = {float(v) for k, v in moments.items() if k.endswith(":step")}
        assert counts == {25.0 if same else 26.0}


# ---- settings from YAML ----------------------------------------------------------------------------------------------

YAML = """\
# a recipe
path: book.txt
optim:
  lr: 3e-4          # YAML 1.1 would make text of it
  schedule: wsd
  decay_share: .25
budget: {steps: 50}
progress: off       # and False of this
tensorboard: true
sample_prompt: no
val:
"""


def parse(*words: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(words))


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_settings_from_yaml(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"recipe{suffix}"
    file.write_text(YAML)
    config = parse("--config", str(file), "--steps", "60")
    wanted = {"path": "book.txt", "lr": 3e-4, "schedule": "wsd", "decay_share": 0.25, "steps": 60, "progress": "off"}
    assert config == TrainConfig.of(**wanted, tensorboard=True, sample_prompt="no")
    for wrong, message in (
        ("lerning_rate: 1", "unknown setting 'lerning_rate'"),
        ("shedule: wsd", "Did you mean schedule?"),
        ("optim: {lrr: 1}", "unknown setting optim.lrr. Did you mean optim.lr?"),
        ("lr: fast", "lr is 'fast', expected a number"),
        ("lr: [1", "cannot be read as settings"),
        ("steps: 010", "steps is '010', expected a whole number"),
        ("minutes: 1:30", "minutes is '1:30', expected a number"),
        ("lr: 1e-3\nseed: 3\nlr: 1e-4", "lr is there twice"),
        ("optim: {lr: 1e-3, lr: 1e-4}", "lr is there twice"),
        ("optim: {lr: 1e-3}\nlr: 1e-4", "lr is given twice"),
        ("- 1", "holds list, expected a table"),
        ("path: !!python/object/apply:os.getcwd []", "cannot be read as settings: could not determine a constructor"),
    ):
        file.write_text(wrong)
        with pytest.raises((ValueError, TypeError), match=message):
            parse("--config", str(file))
    file.write_text(YAML)
    without_package("yaml", monkeypatch)
    with pytest.raises(ValueError, match=r"needs pyyaml, which is not installed: pip install 'stateline\[train\]'"):
        parse("--config", str(file))


def test_settings_of_a_file_and_flags_are_judged_together(tmp_path: Path, text: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"decay_share": 0.3, "optim": {"min_lr_ratio": 0}, "steps": 7, "overwrite": true}')
    wanted = {"schedule": "wsd", "decay_share": 0.3, "min_lr_ratio": 0, "overwrite": True}
    flags = ("--config", str(file), "--schedule", "wsd")
    assert parse(*flags) == TrainConfig.of(**wanted, steps=7)
    assert parse(*flags, "--epochs", "2") == TrainConfig.of(**wanted, epochs=2)
    with pytest.raises(ValueError, match="decay_share is set, but schedule is 'cosine'"):
        parse("--config", str(file))
    root = train(tiny(text, steps=2)).directory
    file.write_text('{"overwrite": true}')
    resumed = parse("--config", str(file), "--resume", "--out", str(root), "--epochs", "2")
    assert (resumed.budget.steps, resumed.budget.epochs, resumed.save.overwrite) == (None, 2, False)
    file.write_text('{"steps": 1, "steps": 2}')
    with pytest.raises(ValueError, match="steps is there twice"):
        parse("--config", str(file))
    file.write_text('{"steps": 1, "epochs": 2}')
    with pytest.raises(ValueError, match="Give one of the two"):
        parse("--config", str(file))


def test_the_settings_that_were_used_are_kept(text: Path) -> None:
    root = train(tiny(text, lr=None, steps=1)).directory
    assert json.loads((root / "run.json").read_text())["optim"]["lr"] == 3e-3
    assert TrainConfig.of(init_from="bundled").peak_lr == 3e-4
    assert TrainConfig.of(init_from="bundled", lora=2).peak_lr == 1e-3
    assert TrainConfig.of(init_from="bundled", lr=1.0).peak_lr == 1.0


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_figures_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash that lost steps and a resume, every figure of metrics.jsonl is there once, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    original = loop._Run._step

    def step(run: Any) -> None:
        original(run)
        if run.position.step == 9:  # saved at 5
            raise OSError("gone")

    settings = {"tensorboard": True, "log_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_step", step)
        with pytest.raises(OSError, match="gone"):
            train(tiny(text, **settings))
    root = train(tiny(text, resume=True, **settings)).directory
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    tags = {"bpb": "loss/train_bits_per_byte", "val_bpb": "loss/validation_bits_per_byte", "lr": "step/learning_rate"}
    for figure, tag in (tags | {"grad_norm": "step/gradient_norm", "tokens_per_s": "step/tokens_per_second"}).items():
        found = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]
        assert found == [(r["step"], r[figure]) for r in records(root) if figure in r], figure
        moments = [e.wall_time for e in events.Scalars(tag)]
        assert moments == sorted(moments)
    texts = events.Tensors("sample/text_summary")
    samples = [(r["step"], r["sample"]) for r in records(root) if "sample" in r]
    assert [(e.step, e.tensor_proto.string_val[0].decode()) for e in texts] == samples
    train(tiny(text, overwrite=True, steps=1))
    assert not (root / "tensorboard").exists(), "it belongs to the run that was deleted"
    without_package("tensorboard", monkeypatch)
    with pytest.raises(ValueError, match=r"not installed. Install it \(pip install 'stateline\[train\]'\)"):
        train(tiny(text, "other", **settings))
    assert not (text.parent / "other").exists()


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["stateline", "mamba_ssm", "huggingface"])
def test_fine_tuning_from_every_format(text: Path, format: str, capfd: pytest.CaptureFixture[str]) -> None:
    shape = ModelConfig(d_model=16, n_layer=2, vocab_size=256, ssm_cfg={"d_state": 4})
    source = LanguageModel(shape).to(torch.bfloat16)
    stateline.save(source, text.parent / "given", format)
    words = ["--steps", "1", "--context", "24", "--lr", "1e-9", "--sample-every", "0", "--device", "cpu"]
    out = str(text.parent / "out")
    code = main(["train", str(text), "--out", out, "--init-from", str(text.parent / "given"), *words])
    assert code == 0, capfd.readouterr().err
    tuned = stateline.load(out)
    assert all(p.dtype == torch.float32 for p in tuned.parameters()), "training in half precision would lose steps"
    for name, value in source.state_dict().items():
        assert torch.allclose(tuned.state_dict()[name], value.float(), atol=1e-6), name
    assert main(["train", "--out", out, "--resume", "--steps", "2"]) == 0, "without the model that it began with"
