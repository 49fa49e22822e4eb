"""Checkpoints of a run: the same bits after a resume, and nothing lost to signals, kills or full disks."""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import resource as rlimit
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stateline.models import LanguageModel, ModelConfig, checkpoint
from stateline.training import (
    Interrupted,
    TrainConfig,
    TrainingError,
    TrainResult,
    add_arguments,
    from_arguments,
    loop,
    resume,
    train,
)
from stateline.training.signals import StopSignals

LINES = [f"{i} times {i} is {i * i}, and half of that is {i * i / 2}.\n" for i in range(200)]
TINY: dict[str, Any] = {
    "d_model": 16, "n_layer": 2, "d_state": 4, "context": 24, "batch_size": 2, "accumulate": 2, "steps": 20, "lr": 1e-2,
    "progress": "off", "device": "cpu", "eval_every": 4, "sample_every": 6, "sample_bytes": 4, "save_every": 5,
}  # fmt: skip

#: Processes that fork from one with torch already imported: seconds less a run than fresh interpreters. The first
#: optimiser imports torch._dynamo.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["stateline.training.loop", "stateline.generation", "torch._dynamo"])


def child(settings: dict[str, Any], output: str, file_limit: int = 0) -> None:
    """A run as the command line would make it: what it prints, and each step, goes to a file; exits as it should."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if file_limit:
        rlimit.setrlimit(rlimit.RLIMIT_FSIZE, (file_limit, file_limit))
    step = loop._Run._step

    def announced(run: Any) -> None:
        step(run)
        print(f"at {run.position.step}.", flush=True)

    loop._Run._step = announced  # type: ignore[method-assign]  # the child ends with it
    try:
        train(TrainConfig.of(**settings))
    except KeyboardInterrupt as error:
        print(error)
        sys.exit(getattr(error, "exit_code", 1))
    except TrainingError as error:
        print(error)
        sys.exit(3)


class Child:
    """A running `child` and what it has printed."""

    def __init__(self, text: Path, file_limit: int = 0, **settings: Any) -> None:
        self.output = text.parent / f"output-{time.time_ns()}"
        values = {**TINY, "path": str(text), "out": str(text.parent / "run")} | settings
        self.process = FORKS.Process(target=child, args=(values, str(self.output), file_limit))
        self.process.start()

    def wait_for_step(self, step: int) -> None:
        """Return as soon as the step is announced."""
        while not (self.output.exists() and f"at {step}." in self.output.read_text()):
            assert self.process.is_alive(), f"ended before step {step}: {self.text()}"
            time.sleep(0.001)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal and wait for the end."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(60)

    def text(self) -> str:
        """Everything printed so far."""
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def tiny(text: Path, run: str = "run", **settings: Any) -> TrainConfig:
    return TrainConfig.of(**{**TINY, "path": text, "out": text.parent / run} | settings)


def tensors(result: Path) -> dict[str, torch.Tensor]:
    """Everything a run holds: the last weights, optimiser and random state, and the best model."""
    last = resume.newest(result)
    assert last is not None
    best = {f"best {k}": v for k, v in load_file(result / "model" / "model.safetensors").items()}
    return load_file(last / "optimizer.safetensors") | load_file(last / "model" / "model.safetensors") | best


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert sorted(left) == sorted(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    assert (a / "model" / "config.json").read_bytes() == (b / "model" / "config.json").read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a SIGINT, as Ctrl-C does, in the middle of step number `step`."""
    original = loop._Run._step

    def stepped(run: Any) -> None:
        original(run)
        if run.position.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop._Run, "_step", stepped)


@pytest.mark.parametrize("at", [8, 10, 12, 19])  # an evaluation, a checkpoint, a sample, the last step but one
def test_resume_gives_the_same_bits(text: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(tiny(text, "straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        with pytest.raises(
            Interrupted, match=rf"Stopped by SIGINT. Saved at step {at}. Continue with: .*--resume --out"
        ):
            train(tiny(text))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(99)  # whatever happened in between must not matter
    resumed = train(tiny(text, resume=True))
    assert (resumed.steps, resumed.tokens) == (straight.steps, straight.tokens)
    assert resumed.best_bpb == straight.best_bpb
    assert_same_bits(straight.directory, resumed.directory)
    assert records(straight.directory) == records(resumed.directory)


def test_resume_of_a_finished_run_and_a_longer_one(text: Path) -> None:
    first = train(tiny(text, steps=6))
    again = train(tiny(text, steps=6, resume=True))
    assert again.best_bpb == first.best_bpb
    assert_same_bits(first.directory, again.directory)
    longer = train(tiny(text, steps=9, keep=5, resume=True))
    assert longer.steps == 9


def test_fine_tuning_starts_from_given_weights(text: Path) -> None:
    first = train(tiny(text))
    shape = {"d_model": None, "n_layer": None, "d_state": 16}
    settings = {**shape, "steps": 1, "lr": 1e-9, "eval_every": 0}
    for source in (first.directory, first.directory / "model"):
        tuned = train(tiny(text, "tuned", init_from=source, overwrite=True, **settings))
        for name, value in first.model.state_dict().items():
            assert torch.allclose(tuned.model.state_dict()[name], value, atol=1e-6), name
    own = LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=256, ssm_cfg={"d_state": 4}))
    assert train(tiny(text, "own", steps=1, **shape), model=own).model.config == own.config
    with pytest.raises(ValueError, match="d_state is set, but model brings its own shape"):
        train(tiny(text, "other", steps=1, **{**shape, "d_state": 4}), model=own)
    with pytest.raises(ValueError, match="both model and init_from bring weights"):
        train(tiny(text, "other", init_from=first.directory, **settings), model=own)
    with pytest.raises(ValueError, match="both model and resume bring weights"):
        train(tiny(text, resume=True), model=own)
    with pytest.raises(ValueError, match="missing"):
        train(tiny(text, "other", init_from=text.parent / "nothing", **settings))
    assert not (text.parent / "other" / "run.json").exists()


def records(folder: Path) -> list[dict[str, Any]]:
    """What a run reported, without its speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("elapsed_s", "tokens_per_s")} for line in lines]


def test_old_checkpoints_are_dropped(text: Path) -> None:
    train(tiny(text, keep=3, save_every=2))
    folder = text.parent / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000016", "step-00000018", "step-00000020"]
    assert (folder / "latest").read_text() == "step-00000020\n"


def test_a_run_is_not_disturbed_unasked(text: Path) -> None:
    result = train(tiny(text, steps=3))
    before = tensors(result.directory)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume.*--overwrite"):
        train(tiny(text, steps=3))
    (result.directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="batch_size"):
        train(tiny(text, steps=3, overwrite=True).replace(batch_size=0))
    assert tensors(result.directory).keys() == before.keys()
    train(tiny(text, steps=2, overwrite=True))
    assert resume.newest(result.directory).name == "step-00000002"  # type: ignore[union-attr]
    assert (result.directory / "notes.txt").read_text() == "mine", "overwriting removes a run's own files only"


def test_resume_refuses_another_run(text: Path) -> None:
    train(tiny(text, steps=3))
    with pytest.raises(ValueError, match=r"other settings:\n  context: 24 → 12\n  lr: 0.01 → 0.5\n"):
        train(tiny(text, steps=3, resume=True, lr=0.5, context=12))
    text.write_text("".join(LINES).replace("half", "some"))
    with pytest.raises(ValueError, match="the text: its contents or its split differ"):
        train(tiny(text, steps=3, resume=True))
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        train(tiny(text, "elsewhere", resume=True))


def test_resume_from_the_command_line_keeps_the_settings(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    train(tiny(Path("text.txt"), steps=3))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    monkeypatch.chdir("/")
    config = from_arguments(parser.parse_args(["--resume", "--out", str(text.parent / "run"), "--steps", "5"]))
    assert (config.optim.lr, config.budget.steps, config.data.path) == (1e-2, 5, str(text))
    assert train(config).steps == 5


def test_one_process_a_folder(text: Path) -> None:
    with resume.locked(text.parent / "run"):
        code = "import sys, pathlib; from stateline.training import resume\n"
        code += "with resume.locked(pathlib.Path(sys.argv[1])): pass"
        words = [sys.executable, "-c", code, str(text.parent / "run")]
        other = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "another process is training into" in other.stderr
    with resume.locked(text.parent / "run"):
        pass  # released


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_exit_with_130(text: Path, number: signal.Signals) -> None:
    run = Child(text, steps=100_000, save_every=0)
    run.wait_for_step(3)
    run.kill(number)
    assert run.process.exitcode == 130, run.text()
    assert "then saving. Again to stop at once" in run.text()
    assert f"Stopped by {number.name}. Saved at step" in run.text()
    step = int(run.text().split("Saved at step ")[1].split(".")[0])
    assert f"stateline train --resume --out {text.parent / 'run'}" in run.text()
    position, _, _ = resume.read_about(resume.newest(text.parent / "run"))  # type: ignore[arg-type]
    assert position.step == step >= 3


def test_second_signal_stops_at_once() -> None:
    with StopSignals() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt, match="at once"):
            signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_goes_away_twice_is_one_wish_to_stop() -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == "SIGHUP"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_job_that_ignores_a_signal_goes_on_ignoring_it(number: signal.Signals) -> None:
    """nohup, and a script's background jobs, start programs so."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(number)
            assert not stop
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_training_in_a_thread_leaves_signals_alone(text: Path) -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(text, steps=1))))
    thread.start()
    thread.join()
    assert results[0].steps == 1


def test_kill_at_every_moment_of_a_save(text: Path) -> None:
    """Kill -9 before the first, second, … change that a save makes: the old or the new checkpoint is whole."""
    root = text.parent / "run"
    model = train(tiny(text, steps=1)).model
    config = tiny(text, keep=1)
    optimizer = torch.optim.AdamW(model.parameters())
    pristine = shutil.copytree(root, text.parent / "pristine")
    found = []
    for moment in range(100):
        if not (child_id := os.fork()):
            die_before_change(moment)
            resume.save(root, resume.Position(step=2), model, optimizer, config, "digest")
            os._exit(0)
        _, status = os.waitpid(child_id, 0)
        last = resume.newest(root)
        assert last is not None
        position, _, _ = resume.read_about(last)
        assert last.name == f"step-{position.step:08d}"
        resume.load_model(last)
        load_file(last / "optimizer.safetensors")
        found.append(position.step)
        if status == 0:
            break
        with resume.locked(root):
            resume.clean(root)
        assert not [p for p in (root / "checkpoints").iterdir() if p.name.startswith(".")]
        shutil.rmtree(root)
        shutil.copytree(pristine, root)
    assert found == sorted(found)
    assert found.count(1) > 10, "most changes happen before the new checkpoint is in place"
    assert found.count(2) > 2


def die_before_change(moment: int) -> None:
    """Let this process be killed at its `moment`-th call of anything that changes the disk."""
    calls = iter(range(1000))

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    resume.save_file = watched(resume.save_file)
    checkpoint.save_file = watched(checkpoint.save_file)


def test_kill_in_the_middle_of_training(text: Path) -> None:
    """Kill -9, resume, again and again: every attempt gets on, and the metrics hold each step once."""
    root, reached = text.parent / "run", [0]
    settings = {"save_every": 1, "keep": 1, "eval_every": 0, "sample_every": 0, "log_every": 1}
    for attempt in range(2):
        run = Child(text, steps=1000, resume=attempt > 0, **settings)
        run.wait_for_step(reached[-1] + 3)
        time.sleep(0.01 * attempt)
        run.kill(signal.SIGKILL)
        last = resume.newest(root)
        assert last is not None
        reached.append(resume.read_about(last)[0].step)
    assert reached == sorted(set(reached))
    end = reached[-1] + 2
    assert train(tiny(text, steps=end, resume=True, **settings)).steps == end
    logged = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "bpb" in r] == list(range(1, end + 1))
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["latest", f"step-{end:08d}"]


class FullDisk:
    """A `save_file` that writes half and then has no room, from the `after`-th call on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, values: dict[str, torch.Tensor], path: Path, *args: Any, **kwargs: Any) -> None:
        save_file(values, path, *args, **kwargs)
        self.left -= 1
        if self.left < 0:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("module", ["stateline.training.resume", "stateline.models.checkpoint"])
def test_full_disk_loses_nothing(text: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(tiny(text, "straight", eval_every=0))
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.save_file", FullDisk(after=2))
        with pytest.raises(
            TrainingError, match=r"could not be saved: .*No space left.*The last good checkpoint is .*step-"
        ):
            train(tiny(text, eval_every=0))
    folder = text.parent / "run" / "checkpoints"
    good = resume.newest(text.parent / "run")
    assert good is not None
    assert sorted(p.name for p in folder.iterdir()) == sorted(["latest", *(p.name for p in folder.glob("step-*"))])
    checkpoint.load(good / "model")
    train(tiny(text, eval_every=0, resume=True))
    assert_same_bits(straight.directory, text.parent / "run")


def test_a_real_write_error_loses_nothing(text: Path) -> None:
    """The system itself refuses: files of this process may not grow beyond a limit that the optimiser's exceeds."""
    train(tiny(text, steps=5))
    good = tensors(text.parent / "run")
    size = max(p.stat().st_size for p in (text.parent / "run" / "checkpoints").rglob("*.safetensors"))
    run = Child(text, steps=20, resume=True, file_limit=size - 100, sample_every=0, eval_every=4)
    run.process.join(60)
    out = run.text()
    assert run.process.exitcode == 3, out
    assert "checkpoint step-00000010 could not be saved" in out
    assert "The last good checkpoint is" in out
    assert "step-00000005" in out
    now = tensors(text.parent / "run")
    assert all(torch.equal(now[name], value) for name, value in good.items() if not name.startswith("best "))
    assert not list((text.parent / "run" / "checkpoints").glob(".*"))


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModel.loss
    calls = []

    def broken(model: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        loss = original(model, *args, **kwargs)
        return loss * float("nan") if len(calls) > 14 else loss

    monkeypatch.setattr(LanguageModel, "loss", broken)
    with pytest.raises(
        TrainingError, match=r"after 7 steps the loss is nan.*last good checkpoint is .*step-00000005.*--lr"
    ):
        train(tiny(text))


def test_damaged_checkpoints_are_named(text: Path) -> None:
    result = train(tiny(text, steps=10))
    last = resume.newest(result.directory)
    assert last is not None
    for name in ("optimizer.safetensors", "model/model.safetensors", "training.json"):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"step-00000010 is damaged.*resume from the one before"):
            train(tiny(text, steps=10, resume=True))
        (last / name).write_bytes(whole)
    shutil.rmtree(last)
    assert resume.newest(result.directory).name == "step-00000005"  # type: ignore[union-attr]
    assert train(tiny(text, steps=10, resume=True)).steps == 10
