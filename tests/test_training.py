"""Training: what is refused before any work, the order of the text, exact schedules, and that a model learns."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stateline
from stateline.models import LanguageModel, ModelConfig
from stateline.training import ByteText, TrainConfig, add_arguments, bits_per_byte, from_arguments, load_data, train
from stateline.training.config import DataConfig, differences
from stateline.training.data import Windows, permuted, read_text, split_point
from stateline.training.progress import MetricsLog, clock, quantity
from stateline.training.sample import default_prompt, printable
from stateline.training.schedule import make_schedule

TEXT = "Round and round the rugged rock the ragged rascal ran.\n" * 120
TINY: dict[str, Any] = {
    "d_model": 16, "n_layer": 1, "d_state": 4, "context": 32, "batch_size": 4, "steps": 6, "progress": "off",
    "device": "cpu", "eval_every": 0, "sample_every": 0, "save_every": 0,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def tiny(text: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.of(**{**TINY, "path": text, "out": text.parent / "run"} | settings)


def test_learns_and_leaves_a_model(text: Path) -> None:
    """A text that repeats falls below half a bit a byte, and the folder's model is the one returned."""
    config = tiny(
        text,
        d_model=64,
        d_state=16,
        context=64,
        steps=60,
        lr=1e-2,
        eval_every=20,
        sample_every=30,
        sample_bytes=8,
        log_every=1,
    )
    before = torch.get_rng_state()
    result = train(config)
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state was touched"
    assert result.best_bpb < 0.5
    assert (result.steps, result.tokens, result.directory) == (60, 60 * 4 * 64, text.parent / "run")
    assert not result.model.training
    again = stateline.load(result.directory)
    val = load_data(config.data).val
    assert bits_per_byte(again, val) == bits_per_byte(result.model, val) == result.best_bpb
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["bpb"] for r in records if "bpb" in r}
    assert sorted(losses) == list(range(1, 61))
    assert abs(losses[1] - 8) < 0.3, "an untrained model knows nothing: 8 bits a byte"
    assert [r["step"] for r in records if "val_bpb" in r] == [20, 40, 60]
    samples = [r["sample"] for r in records if "sample" in r]
    assert len(samples) == 2
    assert all(s.startswith(default_prompt(val)) for s in samples)


def test_best_model_is_kept_when_the_last_is_worse(text: Path) -> None:
    """Validation text unlike the training text gets worse as training goes on; the early model must survive."""
    other = text.parent / "other.txt"
    other.write_text("0123456789 " * 60)
    config = tiny(text, val=str(other), steps=40, lr=2e-2, eval_every=5, min_lr_ratio=1.0)
    result = train(config)
    values = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["val_bpb"] for r in values if "val_bpb" in r}
    best = min(scores, key=lambda step: scores[step])
    assert best < 40, "the last model was the best: the test shows nothing"
    assert result.best_bpb == pytest.approx(scores[best], rel=1e-5)
    assert bits_per_byte(result.model, load_data(config.data).val) == pytest.approx(result.best_bpb)


def test_validation_on_the_way_reads_a_part_and_at_the_end_all(text: Path) -> None:
    config = tiny(text, eval_bytes=50)
    result = train(config)
    val = load_data(config.data).val
    record = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_bpb"] == pytest.approx(bits_per_byte(result.model, val.section(0, 50)), rel=1e-5)
    assert result.best_bpb == bits_per_byte(result.model, val)
    assert record["val_bpb"] != pytest.approx(result.best_bpb, rel=1e-5)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_equals_a_big_batch(text: Path, clip: float) -> None:
    whole = weights(train(tiny(text, out=text.parent / "a", clip=clip)).model)
    parts = weights(train(tiny(text, out=text.parent / "b", clip=clip, batch_size=1, accumulate=4)).model)
    start = weights(train(tiny(text, out=text.parent / "c", clip=clip, steps=1, lr=1e-9)).model)
    for name, value in whole.items():
        moved = (value - start[name]).abs().max()
        assert moved > 1e-3, name
        assert (parts[name] - value).abs().max() < 2e-2 * moved, name


def test_the_optimiser_gets_clipped_gradients_and_scheduled_rates(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimiser sees is no longer than `clip`; 0 leaves it as it is. The log has the norm before clipping."""
    seen: list[float] = []
    rates: list[set[float]] = []
    original = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))
        rates.append({group["lr"] for group in optimizer.param_groups})
        return original(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    logged = {}
    for clip in (0.0, 0.05):
        result = train(tiny(text, out=text.parent / f"clip{clip}", clip=clip, steps=2, log_every=1))
        lines = (result.directory / "metrics.jsonl").read_text().splitlines()
        logged[clip] = [json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line]
    assert seen[:2] == pytest.approx(logged[0.0], rel=1e-4)
    assert seen[2:] == pytest.approx([0.05, 0.05], rel=1e-3)
    assert logged[0.05][0] == logged[0.0][0] > 0.1
    schedule = make_schedule(tiny(text, steps=2), 1)
    assert rates == [{schedule.learning_rate(0)}, {schedule.learning_rate(1)}] * 2
    assert rates[0] != rates[1]


def test_bfloat16_is_close_to_float32_and_differs(text: Path) -> None:
    full = train(tiny(text, out=text.parent / "a", steps=30))
    half = train(tiny(text, out=text.parent / "b", steps=30, dtype="bfloat16"))
    steps = [
        [json.loads(line)["bpb"] for line in (r.directory / "metrics.jsonl").open() if '"bpb"' in line]
        for r in (full, half)
    ]
    assert steps[0] != steps[1], "training itself must run in half precision, not only validation"
    assert steps[1] == pytest.approx(steps[0], rel=0.02)
    assert half.best_bpb == pytest.approx(full.best_bpb, rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_bits_per_byte_is_a_compressors(text: Path) -> None:
    """Chunking changes nothing, and the figure is the plain definition over the text as one document."""
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256, ssm_cfg={"d_state": 4}))
    data = TEXT[:300]
    ids = torch.tensor(list(data.encode()))[None]
    logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
    expected = float(-logp.detach().double().mean()) / math.log(2)
    for chunk in (1, 7, 299, 4096):
        assert bits_per_byte(model, data, chunk=chunk) == pytest.approx(expected, rel=1e-5)
    assert model.training, "the mode must come back"
    assert bits_per_byte(model, data, stop=lambda: True) is None
    with pytest.raises(ValueError, match=r"1 byte\(s\), expected at least 2"):
        bits_per_byte(model, "a")


def test_schedule_values() -> None:
    config = TrainConfig.of(steps=11, warmup_steps=4, lr=0.1, min_lr_ratio=0.2)
    schedule = make_schedule(config, 1000)
    rates = [schedule.learning_rate(step) for step in range(11)]
    for step, rate in enumerate(rates):
        cosine = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2
        assert rate == pytest.approx(0.1 * min(1, (step + 1) / 4) * cosine)
    assert rates[0] == pytest.approx(0.025)
    assert rates[5] == pytest.approx(0.06)
    assert rates[-1] == pytest.approx(0.02)
    assert not schedule.finished(10, 1e9)
    assert schedule.finished(11, 0)


def test_schedule_by_epochs_and_minutes() -> None:
    epochs = make_schedule(TrainConfig.of(epochs=2.5, batch_size=4, accumulate=2), 17)
    assert epochs.steps == 6  # 42.5 windows at 8 a step
    timed = make_schedule(TrainConfig.of(minutes=2.0, lr=1.0, warmup_steps=0, min_lr_ratio=0.0), 17)
    assert timed.steps is None
    assert timed.learning_rate(5, 60.0) == pytest.approx(0.5)
    assert timed.learning_rate(5, 500.0) == pytest.approx(0.0)
    assert not timed.finished(10**6, 119.9)
    assert timed.finished(1, 120.0)
    assert make_schedule(TrainConfig(), 17).steps == 1000
    assert make_schedule(TrainConfig.of(steps=40), 17).warmup_steps == 2
    assert make_schedule(TrainConfig.of(steps=10**6), 17).warmup_steps == 200
    with pytest.raises(ValueError, match="warmup_steps is 10, but the run has 10 steps"):
        make_schedule(TrainConfig.of(steps=10, warmup_steps=10), 17)


def test_minutes_end_a_run(text: Path) -> None:
    result = train(tiny(text, steps=None, minutes=0.01))
    assert 0.6 <= result.seconds < 6
    assert result.steps > 0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_permutation_is_one(n: int) -> None:
    for key in (0, 1, 2**63):
        assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))
    if n == 1000:
        orders = [[permuted(i, n, key) for i in range(n)] for key in (1, 2)]
        assert orders[0] != orders[1]
        steps = np.diff(orders[0])
        assert len(set(steps.tolist())) > 400, "neighbours must not stay neighbours"


def test_windows_cover_each_epoch_once_in_a_new_order() -> None:
    data = ByteText.of(bytes(i % 251 for i in range(1000)))
    windows = Windows(data, 32, seed=1)
    assert windows.per_epoch == 30
    first, second = windows.starts(0, 30), windows.starts(30, 30)
    for starts in (first, second):
        assert np.diff(sorted(starts)).tolist() == [32] * 29
        assert min(starts) >= 0
        assert max(starts) + 33 <= 1000
    assert first != second
    assert windows.starts(17, 20) == [*first, *second][17:37], "the order depends on the counter alone"
    assert Windows(data, 32, seed=2).starts(0, 30) != first
    inputs, targets = windows.batch(3, 2)
    assert inputs.shape == targets.shape == (2, 32)
    assert inputs.dtype == torch.int64
    assert inputs[1].tolist() == [i % 251 for i in range(first[4], first[4] + 32)]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert targets[1, -1] == (first[4] + 32) % 251
    assert Windows(ByteText.of(b"x" * 33), 32, seed=0).starts(5, 2) == [0, 0]  # the shortest text there is


def test_text_of_several_parts_reads_as_one() -> None:
    raw = bytes(range(200))
    parts = ByteText([np.frombuffer(raw[a:b], np.uint8) for a, b in ((0, 3), (3, 3), (3, 90), (90, 200))])
    for a, b in ((0, 200), (2, 4), (3, 90), (89, 91), (5, 5), (200, 200)):
        assert parts.read(a, b).tobytes() == raw[a:b]
        assert parts.section(a, b).read(0, b - a).tobytes() == raw[a:b]


def test_folder_is_read_sorted_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_bytes(b"second\n")
    (tmp_path / "a.txt").write_bytes(b"first")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.md").write_bytes(b"other")
    text = read_text(tmp_path)
    assert text.read(0, len(text)).tobytes() == b"first\nsecond\n"
    everything = read_text(tmp_path, "*")
    assert everything.read(0, len(everything)).tobytes() == b"first\nsecond\nother\n"
    monkeypatch.setattr("stateline.training.data.IN_MEMORY", 0)
    mapped = read_text(tmp_path)
    assert isinstance(mapped.parts[0], np.memmap)
    assert (mapped.read(0, len(mapped)).tobytes(), mapped.digest) == (b"first\nsecond\n", text.digest)


def test_split_falls_on_a_paragraph_a_line_or_a_character() -> None:
    def tail(raw: bytes) -> bytes:
        text = ByteText.of(raw)
        cut = split_point(text, 0.2)
        return text.read(cut, len(text)).tobytes()

    assert tail(b"a" * 82 + b"\n" + b"b" * 3 + b"\n\n" + b"c" * 12) == b"c" * 12
    assert tail(b"a" * 82 + b"\n" + b"b" * 17) == b"b" * 17
    assert tail("é".encode() * 50 + b"x") == "é".encode() * 9 + b"x"  # byte 80.8 would be inside a character
    assert len(tail(b"word " * 400_000)) == 256 << 10


BAD_TEXTS: dict[str, tuple[bytes | None, dict[str, Any], str]] = {
    "missing": (None, {}, "there is no file or folder"),
    "empty": (b"", {}, "is empty"),
    "nul": (b"ab\0" * 500, {}, "NUL bytes.*--force-binary"),
    "utf-16": (TEXT.encode("utf-16"), {}, "NUL bytes.*UTF-16"),
    "latin-1": ("déjà vu ".encode("latin-1") * 100, {}, "25.0 % of the bytes .* not UTF-8.*--force-binary"),
    "short": (b"hello\n" * 5, {}, "a context of 32 needs 33.*--context"),
    "one byte of validation": (b"hello\n" * 7, {"val_fraction": 0.03}, "1 for validation; expected at least 2.*--val"),
    "no such validation": (TEXT.encode(), {"val": "/nowhere/at/all"}, "no file or folder /nowhere"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    raw, settings, message = BAD_TEXTS[name]
    path = tmp_path / "text.txt"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        train(tiny(path, **settings))
    assert not (tmp_path / "run").exists()


def test_more_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text was given"):
        train(TrainConfig())
    (tmp_path / "only.md").write_text(TEXT)
    with pytest.raises(ValueError, match=r"no files like '\*.txt' \(it has .md\).*--pattern"):
        train(tiny(tmp_path))
    assert len(load_data(DataConfig(path=str(tmp_path), pattern="*.md", context=8)).train) > 1000
    (tmp_path / "noise.txt").write_bytes(bytes(range(256)) * 40)
    assert train(tiny(tmp_path / "noise.txt", force_binary=True, steps=1)).steps == 1


BAD_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": float("nan")}, ValueError, "lr is nan, expected a number above 0"),
    ({"lr": -1e-3}, ValueError, "lr is -0.001"),
    ({"lr": 0}, ValueError, "lr is 0.0"),
    ({"lr": "fast"}, TypeError, "lr is 'fast', expected a number"),
    ({"lr": True}, TypeError, "lr is True"),
    ({"min_lr_ratio": 1.5}, ValueError, "at most 1"),
    ({"beta1": 1.0}, ValueError, "beta1 is 1.0, expected a number at least 0 and below 1"),
    ({"weight_decay": float("inf")}, ValueError, "weight_decay is inf"),
    ({"clip": -1}, ValueError, "clip is -1.0, expected a number at least 0"),
    ({"steps": 0}, ValueError, "steps is 0, expected a number at least 1"),
    ({"steps": 2.5}, TypeError, "steps is 2.5, expected a whole number"),
    ({"steps": 5, "epochs": 1}, ValueError, "Give one of the two"),
    ({"minutes": 0}, ValueError, "minutes is 0.0, expected a number above 0"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"context": -4}, ValueError, "context is -4"),
    ({"accumulate": 0}, ValueError, "accumulate is 0"),
    ({"d_model": 0}, ValueError, "d_model is 0"),
    ({"size": "huge"}, ValueError, "size is 'huge', expected one of 'tiny'"),
    ({"size": "tiny", "d_model": 8, "n_layer": 1}, ValueError, "Give the size or the numbers"),
    ({"mixer": "mamba2"}, ValueError, "mixer is 'mamba2', expected one of 'Mamba1', 'Mamba2', 'Mamba3'"),
    (
        {"mixer": "GatedSSM", "d_state": 32},
        ValueError,
        "d_state is 32, but mixer is 'GatedSSM', whose state has expand",
    ),
    ({"activation": "tanh"}, ValueError, "activation is 'tanh', but mixer is 'Mamba1': GatedSSM's"),
    ({"mixer": "S4D", "d_conv": 3}, ValueError, "d_conv is 3, but mixer is 'S4D', which has no convolution"),
    ({"mixer": "S4D", "expand": 3}, ValueError, "expand is 3, but mixer is 'S4D', which has no inner width"),
    ({"mixer": "Mamba3", "d_conv": 3}, ValueError, "d_conv is 3, but mixer is 'Mamba3', which has no convolution"),
    ({"mixer": "Mamba2", "mimo_rank": 2}, ValueError, "mimo_rank is 2, but mixer is 'Mamba2'"),
    ({"size": "tiny", "attention_every": 3}, ValueError, "attention_every is 3, and the model has 2 blocks"),
    ({"attention_window": 64}, ValueError, "attention_window is set, and attention_every is 0"),
    ({"size": "tiny", "init_from": "bundled"}, ValueError, "init_from brings its own shape"),
    *(
        ({name: value, "init_from": "bundled"}, ValueError, f"{name} is set, but init_from brings its own shape")
        for name, value in {
            "d_model": 64,
            "d_state": 8,
            "d_conv": 3,
            "expand": 3,
            "mixer": "Mamba2",
            "mimo_rank": 2,
            "d_intermediate": 32,
            "attention_every": 1,
        }.items()
    ),
    ({"dtype": "float16"}, ValueError, "dtype is 'float16', expected one of 'float32', 'bfloat16'"),
    ({"val_fraction": 0}, ValueError, "val_fraction is 0.0"),
    ({"seed": -1}, ValueError, "seed is -1"),
    ({"keep": 0}, ValueError, "keep is 0"),
    ({"eval_every": -1}, ValueError, "eval_every is -1"),
    ({"resume": True, "overwrite": True}, ValueError, "both set"),
    ({"learning_rate": 1}, ValueError, "unknown setting 'learning_rate'"),
    ({"batchsize": 1}, ValueError, "unknown setting 'batchsize'. Did you mean batch_size"),
    ({"path": 3}, TypeError, "path is 3, expected text"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS, ids=lambda v: str(v)[:40])
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"train: .*{message}"):
        TrainConfig.of(**settings)


def test_bad_device_and_vocabulary(text: Path) -> None:
    with pytest.raises(ValueError, match="device 'quantum' cannot be used"):
        train(tiny(text, device="quantum"))
    words = LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=300))
    with pytest.raises(ValueError, match="vocabulary has 300 entries, training reads bytes"):
        train(tiny(text, d_model=None, n_layer=None, d_state=16), model=words)
    assert not (text.parent / "run").exists()
    (text.parent / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        train(tiny(text, out=text.parent / "file"))


def test_settings_round_trip_and_differences() -> None:
    config = TrainConfig.of(path="a.txt", lr=1e-2, size="tiny", minutes=3, seed=7)
    values = json.loads(config.to_json())
    assert TrainConfig.from_dict(values) == config
    assert "resume" not in values["save"]
    assert config.shape == (64, 2)
    assert TrainConfig().replace(d_model=100).shape == (100, 6)
    same = TrainConfig.of(path="b.txt", lr=1e-2, d_model=64, n_layer=2, minutes=4, seed=7)
    assert differences(config, same, "fixed") == [], "a named size and its numbers are the same model"
    assert differences(config, same, "free") == ["path: a.txt → b.txt", "minutes: 3.0 → 4.0"]
    assert differences(config, config.replace(lr=1e-3), "fixed") == ["lr: 0.01 → 0.001"]
    with pytest.raises(ValueError, match=r"unknown setting optim.rate; optim has lr"):
        TrainConfig.from_dict({"optim": {"rate": 1}})
    with pytest.raises(ValueError, match="optim is 3, expected a table"):
        TrainConfig.from_dict({"optim": 3})


def parse(*words: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(words))


def test_command_line_has_every_setting(tmp_path: Path) -> None:
    config = parse(
        "a.txt", "--lr", "1e-2", "--d-model", "32", "--force-binary", "--minutes", "2", "--dtype", "bfloat16"
    )
    assert config == TrainConfig.of(path="a.txt", lr=1e-2, d_model=32, force_binary=True, minutes=2, dtype="bfloat16")
    assert config.directory == Path("runs/a")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = parser.format_help()
    for name, _, _ in config.flat():
        assert ("PATH" if name == "path" else f"--{name.replace('_', '-')}") in shown
    (tmp_path / "run.toml").write_text("seed = 5\n[optim]\nlr = 0.5\n")
    assert parse("a.txt", "--config", str(tmp_path / "run.toml"), "--seed", "6") == TrainConfig.of(
        path="a.txt", lr=0.5, seed=6
    )
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json cannot be read as settings"):
        parse("a.txt", "--config", str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="--resume needs --out"):
        parse("--resume")
    with pytest.raises(ValueError, match=r"no run in .*nothing to resume"):
        parse("--resume", "--out", str(tmp_path / "nothing"))


def test_words_for_people(tmp_path: Path) -> None:
    assert [clock(s) for s in (7, 750, 11045)] == ["0:07", "12:30", "3:04:05"]
    assert [quantity(n) for n in (950, 3100, 12_400_000, 2e9)] == ["950", "3.1k", "12.4M", "2.0G"]
    assert printable("a\x1b[2Jb\n\tc") == "a·[2Jb\n\tc"
    assert default_prompt(ByteText.of("\nMy fellow citizens of the Senate")) == "My fellow citizens of"
    assert default_prompt(ByteText.of("\n\n")) == "The"
    log = MetricsLog(tmp_path / "m.jsonl")
    log.rewind(0)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.23456789)
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.rewind(2)
    assert log.path.read_text() == '{"step": 1, "loss": 1.23457}\n{"step": 2, "loss": 1.23457}\n'
