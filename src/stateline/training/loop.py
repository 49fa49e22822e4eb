"""The training loop: AdamW on next-token prediction, resumable bit for bit at any step boundary."""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from stateline.checks import fail
from stateline.models import LanguageModel, ModelConfig, checkpoint
from stateline.nn import param_groups
from stateline.training import resume
from stateline.training.config import SETTINGS_FILE, TrainConfig, differences
from stateline.training.data import TextData, Windows, load_data
from stateline.training.evaluate import bits_per_byte
from stateline.training.progress import Meter, MetricsLog, Reporter, clock, quantity
from stateline.training.resume import Position, TrainingError
from stateline.training.sample import default_prompt, printable, sample_text
from stateline.training.schedule import Schedule, make_schedule
from stateline.training.signals import Interrupted, StopSignals
from stateline.training.text import TokenText
from stateline.training.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the best model by validation, its bits per byte on all validation text, and where it lies."""

    model: LanguageModel
    best_bpb: float
    directory: Path
    steps: int
    tokens: int
    seconds: float


def train(config: TrainConfig, *, model: LanguageModel | None = None) -> TrainResult:
    """Train a language model on text; the best one is at `result.directory / "model"`, readable by `stateline.load`.

    `model` gives the starting weights instead of `config.save.init_from`; it is trained in place. Everything is checked
    before anything is written. Raises ValueError for settings or text that cannot work, TrainingError if the loss stops
    being finite or a checkpoint cannot be saved, Interrupted (a KeyboardInterrupt) once Ctrl-C or SIGTERM has led to a
    checkpoint. The caller's random state is left as it was.
    """
    device = _device(config.device)
    if config.data.path:  # the run must be resumable from any folder
        config = config.replace(**_places(config))
    _refuse_occupied(config)
    source = _source(config)
    data = load_data(
        config.data, home=config.directory, model=source, resumed=config.save.resume, progress=config.report.progress
    )
    windows = Windows(data.train, config.data.context, config.seed, apart=config.data.packing == "documents")
    schedule = make_schedule(config, windows.per_epoch)
    start = _start(config, data)
    if model is not None and (start or config.save.init_from):
        other = "resume" if start else "init_from"
        raise fail("train", f"both model and {other} bring weights.", "Give one of the two.")
    if model is not None:
        config.model.refuse_beside("model")
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.seed)
        model = (model or _model(config, start, data.vocabulary)).to(device)
        _check_vocabulary(model, data.vocabulary)
        with resume.locked(config.directory):
            if config.save.overwrite:
                resume.remove_run(config.directory, keep_prepared=data.lies_in(config.directory))
            resume.clean(config.directory)
            share = schedule.progress(start.position.step, start.position.elapsed) if start else 0.0
            with StopSignals() as stop, Reporter(config.report.progress, share) as reporter:
                run = _Run(config, model, data, windows, schedule, stop, reporter)
                run.begin(start)
                return run.finish()


@dataclass(frozen=True)
class _Start:
    """The checkpoint a run continues from."""

    path: Path
    position: Position
    changed: list[str]


class _Run:
    """One session of a run. What decides the weights is in `model`, `optimizer`, `position` and the settings alone."""

    def __init__(
        self,
        config: TrainConfig,
        model: LanguageModel,
        data: TextData,
        windows: Windows,
        schedule: Schedule,
        stop: StopSignals,
        reporter: Reporter,
    ) -> None:
        self.config, self.model, self.data, self.windows = config, model, data, windows
        self.schedule, self.stop, self.reporter = schedule, stop, reporter
        self.root = config.directory
        self.device = next(model.parameters()).device
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            param_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True
        )
        self.autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.log = MetricsLog(self.root / resume.METRICS)
        self.meter = Meter()
        self.position = Position()
        self.saved: int | None = None  # the step of the newest checkpoint
        self.session = time.perf_counter()

    def begin(self, start: _Start | None) -> None:
        """Take up a checkpoint, or write a new run's settings; say what is about to happen."""
        if start:
            self.position = start.position
            resume.load(start.path, self.model, self.optimizer, self.device)
            self.saved = start.position.step
            self.log.rewind(start.position.step)
        self.session = time.perf_counter() - self.position.elapsed
        with resume.saving(self.root, "the settings"):
            self.data.vocabulary.save(self.root)
            resume.write_atomically(self.root / SETTINGS_FILE, self.config.to_json())
        self._announce(start)

    def finish(self) -> TrainResult:
        """Step until the schedule ends, then judge the best model on all validation text."""
        self.model.train()
        while not self._boundary():
            self._step()
        self.reporter.show(self.meter, self._label(), 1.0, last=True)
        position, whole = self.position, self.data.val
        model = self.model
        if position.best_step != position.step:
            model = checkpoint.load(self.root / resume.MODEL, device=self.device)
        best = position.best_bpb
        if whole.num_bytes > self.config.report.eval_bytes:
            best = self._score(model, whole)
            self._leave_if_asked()
        assert best is not None
        model.eval()
        judged = f"{best:.3f} bits per byte on {quantity(whole.num_bytes)} validation bytes"
        self.reporter.say(f"Best: {judged} (step {position.best_step})")
        self.reporter.say(f"Saved in {self.root}. Try: stateline generate --model {shlex.quote(str(self.root))} 'Once'")
        return TrainResult(model, best, self.root, position.step, self._tokens(), position.elapsed)

    def _step(self) -> None:
        """One optimiser step over `accumulate` batches, weighted by their targets, so that the mean loss is exact."""
        data, position, begun = self.config.data, self.position, time.perf_counter()
        rate = self.schedule.learning_rate(position.step, position.elapsed)
        loss = torch.zeros((), device=self.device)
        firsts = (position.windows + part * data.batch_size for part in range(data.accumulate))
        batches = [self.windows.fetch(first, data.batch_size) for first in firsts]
        total = max(1, sum(batch.count for batch in batches))
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
                share = batch.loss(self.model, self.device) / (total / max(1, batch.count))
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or math.inf)
        nats, norm_value = float(loss), float(norm)
        if not (math.isfinite(nats) and math.isfinite(norm_value)):
            self._not_finite(nats, norm_value)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        position.step += 1
        position.windows += data.batch_size * data.accumulate
        now = time.perf_counter()
        position.elapsed = now - self.session
        speed = data.batch_size * data.accumulate * data.context / (now - begun)
        wide = sum(self.data.train.count(batch.targets) for batch in batches)
        bits = nats / math.log(2) * (total / max(1, wide))  # a byte; exactly that of a token where tokens are bytes
        self.meter.update(bits, speed)
        if position.step % self.config.report.log_every == 0:
            self._record(bpb=bits, lr=rate, grad_norm=norm_value, tokens_per_s=speed)
        self.reporter.show(self.meter, self._label(), self.schedule.progress(position.step, position.elapsed))

    def _boundary(self) -> bool:
        """Between two steps: validate, sample and save where due, leave if asked. True at the end of the run."""
        position, report = self.position, self.config.report
        done = self.schedule.finished(position.step, position.elapsed)
        self._leave_if_asked()
        if (done or _due(position.step, report.eval_every)) and position.evaluated != position.step:
            self._evaluate()
            self._leave_if_asked()
        if _due(position.step, report.sample_every) and position.sampled != position.step:
            self._sample()
            self._leave_if_asked()
        if done or _due(position.step, self.config.save.save_every):
            self._save()
        return done

    def _evaluate(self) -> None:
        bits = self._score(self.model, self.data.val.head(self.config.report.eval_bytes))
        if bits is None:
            return
        position = self.position
        position.evaluated, position.val_bpb, self.meter.val = position.step, bits, bits
        if not math.isfinite(bits):
            self._not_finite(bits, 0.0)
        if position.best_bpb is None or bits < position.best_bpb:
            position.best_bpb, position.best_step = bits, position.step
            self._save_model()
        self._record(val_bpb=bits)

    def _score(self, model: LanguageModel, text: TokenText) -> float | None:
        return bits_per_byte(
            model, text, apart=self.windows.apart, autocast=self.autocast, stop=lambda: bool(self.stop)
        )

    def _sample(self) -> None:
        report, tokenizer = self.config.report, self.data.vocabulary.tokenizer
        prompt = report.sample_prompt or default_prompt(self.data.val, tokenizer)
        seed, size = self.config.seed, report.sample_bytes
        text = sample_text(self.model, prompt, size, seed, lambda: bool(self.stop), tokenizer)
        if self.stop:
            return
        self.position.sampled = self.position.step
        self._record(sample=text)
        self.reporter.say(f"--- step {self.position.step} ---\n{printable(text)}\n---")

    def _save(self) -> None:
        if self.saved == self.position.step:
            return
        if self.position.best_step is None:
            self._save_model()
        resume.save(self.root, self.position, self.model, self.optimizer, self.config, self.data.digest)
        self.saved = self.position.step

    def _save_model(self) -> None:
        position = self.position
        about = {"step": position.step, "tokens": self._tokens(), "val_bpb": position.best_bpb}
        with resume.saving(self.root, "the best model"):
            resume.save_model(self.model, self.root / resume.MODEL, about, self.root)

    def _leave_if_asked(self) -> None:
        if not self.stop:
            return
        if self.position.step:
            self._save()
        again = f"stateline train --resume --out {shlex.quote(str(self.root))}"
        saved = f"Saved at step {self.position.step}." if self.position.step else "Nothing was learnt yet."
        raise Interrupted(f"Stopped by {self.stop.received}. {saved} Continue with: {again}", self.root)

    def _not_finite(self, loss: float, norm: float) -> None:
        last = resume.newest(self.root)
        good = f"The last good checkpoint is {last}" if last else "No checkpoint was saved yet"
        raise TrainingError(
            f"train: after {self.position.step} steps the loss is {loss:g}, the norm of its gradient {norm:g}. {good}. "
            f"Start again with a lower --lr (it is {self.config.optim.lr:g}) or a longer --warmup-steps."
        )

    def _record(self, **figures: float | str) -> None:
        position = self.position
        with resume.saving(self.root, resume.METRICS):
            self.log.write(step=position.step, tokens=self._tokens(), elapsed_s=position.elapsed, **figures)

    def _tokens(self) -> int:
        return self.position.windows * self.config.data.context

    def _label(self) -> str:
        total = f"/{self.schedule.steps}" if self.schedule.steps else ""
        return f"step {self.position.step}{total}"

    def _announce(self, start: _Start | None) -> None:
        data, steps, seconds = self.config.data, self.schedule.steps, self.schedule.seconds
        size = f"{self.model.config.d_model} × {self.model.config.n_layer}"
        per_step = data.batch_size * data.accumulate * data.context
        say = self.reporter.say
        parameters = quantity(self.model.num_parameters())
        say(f"Mamba {size}, {parameters} parameters, {self.config.dtype} on {self.device}, writing to {self.root}")
        text, vocabulary = self.data.train, self.data.vocabulary
        tokens = "" if vocabulary.is_bytes else f" ({quantity(len(text))} tokens of {vocabulary.size} ids)"
        validation = quantity(self.data.val.num_bytes)
        say(f"Text: {quantity(text.num_bytes)} bytes{tokens} to learn, {validation} to validate")
        length = " or ".join([f"{steps} steps"] * bool(steps) + [clock(seconds or 0)] * bool(seconds))
        passes = f", {steps * per_step / len(self.data.train):.1f} passes over the text" if steps else ""
        say(f"Plan: {length}, {quantity(per_step)} tokens a step{passes}")
        if start:
            changed = f"; changed since: {', '.join(start.changed)}" if start.changed else ""
            say(f"Resumed at step {start.position.step} from {start.path}{changed}")


def _refuse_occupied(config: TrainConfig) -> None:
    """Refuse to disturb a run unasked; before anything is prepared in its folder."""
    root = config.directory
    if root.exists() and not root.is_dir():
        raise fail("train", f"{root} is a file, expected a folder to write to.", "Choose another --out.")
    last = resume.newest(root)
    if config.save.resume and last is None:
        raise fail("train", f"{root} holds no checkpoint to resume from.", "Start the run without --resume.")
    if resume.holds_run(root) and not (config.save.resume or config.save.overwrite):
        how = "--resume to continue it" if last else "--out to choose another folder"
        raise fail("train", f"{root} already holds a run.", f"Use {how}, or --overwrite to delete it and start.")


def _start(config: TrainConfig, data: TextData) -> _Start | None:
    """The checkpoint to continue from, if asked; refuses to continue another run."""
    last = resume.newest(config.directory)
    if not config.save.resume or last is None:
        return None
    position, old, digest = resume.read_about(last)
    wrong = differences(old, config, "fixed")
    if digest != data.digest:
        wrong.append("the text: its contents or its split differ from what the run was started with")
    if wrong:
        listed = "".join(f"\n  {line}" for line in wrong)
        problem = f"{last} was made with other settings:{listed}\n"
        raise fail("train", problem, "Drop these changes, or start a new run.")
    return _Start(last, position, differences(old, config, "free"))


def _places(config: TrainConfig) -> dict[str, str]:
    """The settings that name files, as absolute paths."""
    data = config.data
    named = {"path": data.path, "val": data.val, "cache": data.cache}
    if data.tokenizer and data.tokenizer != "bytes" and not data.tokenizer.startswith("bpe:"):
        named["tokenizer"] = data.tokenizer
    return {name: str(Path(place).expanduser().resolve()) for name, place in named.items() if place}


def _source(config: TrainConfig) -> Path | None:
    """The folder of the weights that a run starts from: those of the checkpoint it resumes, or of --init-from."""
    if config.save.resume:
        last = resume.newest(config.directory)
        return last / resume.MODEL if last else None
    if not config.save.init_from:
        return None
    source = Path(config.save.init_from)
    if config.save.init_from == "bundled":
        return Path(str(files("stateline") / "bundled" / "model"))
    return source / resume.MODEL if (source / resume.MODEL).is_dir() else source  # a run's folder, or a model's


def _model(config: TrainConfig, start: _Start | None, vocabulary: Vocabulary) -> LanguageModel:
    if start:
        return resume.load_model(start.path)
    source = _source(config)
    if source is None:
        shape, (d_model, n_layer) = config.model, config.shape
        return LanguageModel(
            ModelConfig(
                d_model=d_model,
                n_layer=n_layer,
                vocab_size=vocabulary.size,
                d_intermediate=shape.d_intermediate,
                ssm_cfg={"d_state": shape.d_state, "d_conv": shape.d_conv, "expand": shape.expand},
            )
        )
    return checkpoint.load(source)


def _check_vocabulary(model: LanguageModel, vocabulary: Vocabulary) -> None:
    """Refuse a model of other ids than the text's, and note which they are."""
    size, known = model.config.vocab_size, model.metadata.get("tokenizer_sha256", vocabulary.fingerprint)
    reads = f"bytes ({vocabulary.size})" if vocabulary.is_bytes else str(vocabulary)
    if size != vocabulary.size if vocabulary.is_bytes else size < vocabulary.size:
        problem = f"the model's vocabulary has {size} entries, training reads {reads}."
        raise fail("train", problem, "Start from a model of the same vocabulary, or from none.")
    if known != vocabulary.fingerprint:
        problem = f"the model was made for the tokenizer {known[:12]}, training reads {reads}."
        raise fail("train", problem, "Put that tokenizer.json beside the model, or start from none.")
    if not vocabulary.is_bytes:
        model.metadata["tokenizer_sha256"] = vocabulary.fingerprint


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise fail("train", f"device {name!r} cannot be used: {reason}.", "Use --device cpu.") from error
    return device


def _due(step: int, every: int) -> bool:
    return bool(step and every and step % every == 0)
