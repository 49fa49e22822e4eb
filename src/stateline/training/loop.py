"""The training loop: AdamW on next-token prediction, resumable bit for bit at any step boundary."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from stateline.checks import fail
from stateline.models import LanguageModel, checkpoint
from stateline.nn import param_groups
from stateline.training import adapters, board, graphs, removal, resume
from stateline.training.config import SETTINGS_FILE, TrainConfig
from stateline.training.data import Batch, TextData, Windows, load_data
from stateline.training.ema import Ema
from stateline.training.evaluate import bits_per_byte
from stateline.training.guard import SPIKES_IN_A_ROW, diverged, exhausted, spike_bound, watch_loss, watch_validation
from stateline.training.progress import Meter, MetricsLog, Reporter, clock, quantity
from stateline.training.resume import Position, TrainingError
from stateline.training.sample import default_prompt, printable, sample_text
from stateline.training.schedule import Schedule, make_schedule
from stateline.training.signals import Interrupted, StopSignals
from stateline.training.start import (
    Loader,
    Start,
    device_of,
    find_start,
    initial_model,
    named_model,
    prepared,
    refuse_occupied,
    refuse_unfit,
    replaces_source,
    settings_before,
    settled,
    source,
)
from stateline.training.text import TokenText


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the best model by validation, its bits per byte on all validation text, and where it lies."""

    model: LanguageModel
    best_bpb: float
    directory: Path
    steps: int
    tokens: int
    seconds: float


def train(config: TrainConfig, *, model: LanguageModel | None = None, load: Loader | None = None) -> TrainResult:
    """Train a language model on text; the best one is at `result.directory / "model"`, readable by `stateline.load`.

    Everything is checked before anything is written. The caller's random state is left as it was.

    Args:
        model: the starting weights, instead of `config.save.init_from`; it is trained in place (with `config.adapters`
            it keeps its adapters; the result's model has them merged). Its `backbone.dropout` must be 0 or that of the
            settings, and is afterwards what it was.
        load: reads what `init_from` names; `stateline.load` knows every format, the default our own and "bundled".

    Raises:
        ValueError: settings or text that cannot work.
        TrainingError: the loss is no number or has left its bounds, or a checkpoint cannot be saved.
        Interrupted: (a KeyboardInterrupt) Ctrl-C, SIGTERM or SIGHUP came, and a checkpoint was made.
    """
    device = device_of(config.device)
    if config.cuda_graphs:
        graphs.refuse(device)
    if config.report.tensorboard:
        board.require()
    config = settled(config)
    refuse_occupied(config)
    given = model is not None
    if given and (config.save.resume or config.save.init_from):
        other = "resume" if config.save.resume else "init_from"
        raise fail("train", f"both model and {other} bring weights.", "Give one of the two.")
    if given:
        config.model.refuse_beside("model")
    if config.adapters.lora and not (given or config.save.resume or config.save.init_from):
        raise fail("train", "lora adapts given weights, and none are given.", "Name a model with --init-from.")
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        model = model or named_model(config, load)
        refuse_unfit(config, model)
        data = load_data(
            config.data,
            home=config.directory,
            model=source(config),
            resumed=config.save.resume,
            before=settings_before(config),
            progress=config.report.progress,
        )
        windows = Windows(data.train, config.data.context, config.seed, apart=config.data.packing == "documents")
        schedule = make_schedule(config, windows.per_epoch)
        start = find_start(config, data)
        torch.manual_seed(config.seed)
        model = model or initial_model(config, start, data.vocabulary)
        model = prepared(model, config, data.vocabulary).to(device)
        with resume.locked(config.directory):
            if config.save.overwrite:
                removal.remove_run(config.directory, keep_prepared=data.lies_in(config.directory))
            elif config.save.resume and not start:
                removal.remove_results(config.directory)
            resume.clean(config.directory)
            share = schedule.progress(start.position.step, start.position.elapsed) if start else 0.0
            log = MetricsLog(
                config.directory / resume.METRICS,
                config.directory / resume.BOARD if config.report.tensorboard else None,
            )
            with StopSignals() as stop, Reporter(config.report.progress, share) as reporter, log:
                run = _Run(config, model, data, windows, schedule, _Session(stop, reporter, log))
                run.begin(start, once=given or replaces_source(config))
                with _dropping(model, config.optim.dropout):
                    return run.finish()


@dataclass(frozen=True)
class _Session:
    """What one session has of its own: who may stop it, and whom it tells."""

    stop: StopSignals
    reporter: Reporter
    log: MetricsLog


class _Run:
    """One session of a run. What decides the weights is in `model`, `optimizer`, `ema`, `position` and the settings."""

    def __init__(
        self,
        config: TrainConfig,
        model: LanguageModel,
        data: TextData,
        windows: Windows,
        schedule: Schedule,
        session: _Session,
    ) -> None:
        self.config, self.model, self.data, self.windows = config, model, data, windows
        self.schedule, self.stop, self.reporter, self.log = schedule, session.stop, session.reporter, session.log
        self.root = config.directory
        self.device = next(model.parameters()).device
        optim = config.optim
        groups = [
            group | {"params": [p for p in group["params"] if p.requires_grad]}
            for group in param_groups(model, optim.weight_decay)
        ]
        groups = [group for group in groups if group["params"]]
        #: Of the schedule's learning rate, for each group: parameters with a rate of their own never learn faster.
        self.shares = [min(1.0, group.get("lr", schedule.peak) / schedule.peak) for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=schedule.peak,
            betas=(optim.beta1, optim.beta2),
            fused=True,
        )
        self.ema = Ema(model, optim.ema) if optim.ema else None
        self.autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.recorded = graphs.Gradients(model, self.autocast) if config.cuda_graphs else None
        self.meter = Meter()
        self.position = Position()
        self.saved: int | None = None  # the step of the newest checkpoint
        self.session = time.perf_counter()

    def begin(self, start: Start | None, *, once: bool) -> None:
        """Take up a checkpoint, or write down what a new run is; say what is about to happen.

        once: the initial weights cannot be had again, so they are saved at once. A run whose settings are
        there can be resumed: they are written last.
        """
        if start:
            self.position = start.position
            resume.load(start.path, self.model, self.optimizer, self.device, self.ema)
            self.saved = start.position.step
        with resume.saving(self.root, "the settings"):
            self.data.vocabulary.save(self.root)
        if self.config.adapters.lora and not start:
            with resume.saving(self.root, "the frozen weights"):
                resume.save_model(adapters.without(self.model, merged=False), self.root / resume.BASE, {}, self.root)
        if once and not start:
            self._save()
        with resume.saving(self.root, "the settings"):
            resume.write_atomically(self.root / SETTINGS_FILE, self.config.to_json())
            (self.root / resume.CHECKPOINTS).mkdir(exist_ok=True)
        with resume.saving(self.root, resume.METRICS):
            self.log.rewind(self.position.step)
        self.session = time.perf_counter() - self.position.elapsed
        self._announce(start)

    def finish(self) -> TrainResult:
        """Step until the schedule ends, then judge the best model on all validation text."""
        self.model.train()
        while not self._boundary():
            self._step()
        self.reporter.show(self.meter, self._label(), 1.0, last=True)
        position, whole = self.position, self.data.val
        model = self.model
        if position.best_step != position.step or self.ema or self.config.adapters.lora:
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
            loss += self._learn(batch, total / max(1, batch.count))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or math.inf)
        nats, norm_value = float(loss), float(norm)
        if not (math.isfinite(nats) and math.isfinite(norm_value)):
            self._not_finite(nats, norm_value)
        spike = self._judge(nats)
        if spike != "skipped":
            for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
                group["lr"] = rate * share
            self.optimizer.step()
            if self.ema:
                self.ema.update(position.step + 1)
        self.optimizer.zero_grad(set_to_none=self.recorded is None)
        position.step += 1
        position.windows += data.batch_size * data.accumulate
        now = time.perf_counter()
        position.elapsed = now - self.session
        speed = data.batch_size * data.accumulate * data.context / (now - begun)
        wide = sum(self.data.train.count(batch.targets) for batch in batches)
        bits = nats / math.log(2) * (total / max(1, wide))  # a byte; exactly that of a token where tokens are bytes
        self.meter.update(bits, speed)
        if spike or position.step % self.config.report.log_every == 0:
            told = {"spike": spike} if spike else {}
            self._record(bpb=bits, lr=rate, grad_norm=norm_value, tokens_per_s=speed, **told)
        self.reporter.show(self.meter, self._label(), self.schedule.progress(position.step, position.elapsed))

    def _learn(self, batch: Batch, divisor: float) -> Tensor:
        """The batch's mean loss over `divisor`, whose gradients are added to every parameter's."""
        if self.recorded is not None:
            return self.recorded(batch, divisor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is not None):
            loss = batch.loss(self.model, self.device) / divisor
        loss.backward()
        return loss.detach()

    def _judge(self, nats: float) -> str | None:
        """Whether a step's loss is a spike: "kept" or "skipped" is what becomes of it. Ends a run that has diverged."""
        guard, watched = self.config.guard, self.position.watched
        bound = spike_bound(watched, guard)
        if not watch_loss(watched, nats, guard):
            return None
        if diverged(watched):
            other = ", or --resume with --on-spike skip, or ignore if this is right" * (guard.on_spike != "skip")
            self._give_up(
                f"after {self.position.step} steps the loss is {nats:g}, above {bound:g} for {SPIKES_IN_A_ROW} steps "
                "in a row: it has left what the steps before it would allow (--spike-mads)",
                f"Start again with a lower --lr{other}",
            )
        watched.skipped += guard.on_spike == "skip"
        return "skipped" if guard.on_spike == "skip" else "kept"

    def _boundary(self) -> bool:
        """Between two steps: validate, sample and save where due, leave if asked. True at the end of the run."""
        position, report = self.position, self.config.report
        done = self.schedule.finished(position.step, position.elapsed)
        self._leave_if_asked()
        if (done or _due(position.step, report.eval_every)) and position.evaluated != position.step:
            self._evaluate()
            self._leave_if_asked()
        done = self._out_of_patience(done)
        if _due(position.step, report.sample_every) and position.sampled != position.step:
            self._sample()
            self._leave_if_asked()
        if done or (_due(position.step, self.config.save.save_every) and not position.watched.spikes):
            self._save()
        return done

    def _out_of_patience(self, done: bool) -> bool:
        watched = self.position.watched
        if done or not exhausted(watched, self.config.guard):
            return done
        self.reporter.say(
            f"Stopping early: {watched.stale} validations without a result better than {watched.mark:.3f}"
        )
        return True

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """While entered, the model has the weights that are judged, sampled from and saved."""
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    def _evaluate(self) -> None:
        with self._shown():
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
        watch_validation(position.watched, bits, self.config.guard)
        self._record(val_bpb=bits)

    def _score(self, model: LanguageModel, text: TokenText) -> float | None:
        return bits_per_byte(
            model, text, apart=self.windows.apart, autocast=self.autocast, stop=lambda: bool(self.stop)
        )

    def _sample(self) -> None:
        report, tokenizer = self.config.report, self.data.vocabulary.tokenizer
        prompt = report.sample_prompt or default_prompt(self.data.val, tokenizer)
        seed, size = self.config.seed, report.sample_bytes
        with self._shown():
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
        resume.save(self.root, self.position, self.model, self.optimizer, self.config, self.data.digest, self.ema)
        self.saved = self.position.step

    def _save_model(self) -> None:
        position = self.position
        about = {"step": position.step, "tokens": self._tokens(), "val_bpb": position.best_bpb}
        with resume.saving(self.root, "the best model"), self._shown():
            plain = adapters.without(self.model) if self.config.adapters.lora else self.model
            resume.save_model(plain, self.root / resume.MODEL, about, self.root)

    def _leave_if_asked(self) -> None:
        if not self.stop:
            return
        if self.position.step:
            self._save()
        again = f"stateline train --resume --out {shlex.quote(str(self.root))}"
        saved = f"Saved at step {self.position.step}." if self.position.step else "Nothing was learnt yet."
        raise Interrupted(f"Stopped by {self.stop.received}. {saved} Continue with: {again}", self.root)

    def _not_finite(self, loss: float, norm: float) -> None:
        self._give_up(
            f"after {self.position.step} steps the loss is {loss:g}, the norm of its gradient {norm:g}",
            f"Start again with a lower --lr (it is {self.schedule.peak:g}) or a longer --warmup-steps",
        )

    def _give_up(self, problem: str, remedy: str) -> NoReturn:
        last = resume.newest(self.root)
        good = f"The last good checkpoint is {last}" if last else "No checkpoint was saved yet"
        raise TrainingError(f"train: {problem}. {good}. {remedy}.")

    def _record(self, **figures: float | str) -> None:
        position = self.position
        with resume.saving(self.root, resume.METRICS):
            self.log.write(step=position.step, tokens=self._tokens(), elapsed_s=position.elapsed, **figures)

    def _tokens(self) -> int:
        return self.position.windows * self.config.data.context

    def _label(self) -> str:
        total = f"/{self.schedule.steps}" if self.schedule.steps else ""
        return f"step {self.position.step}{total}"

    def _announce(self, start: Start | None) -> None:
        data, steps, seconds = self.config.data, self.schedule.steps, self.schedule.seconds
        mixer = self.model.config.ssm_cfg.get("layer", "Mamba1")
        size = f"{mixer} {self.model.config.d_model} × {self.model.config.n_layer}"
        per_step = data.batch_size * data.accumulate * data.context
        say = self.reporter.say
        parameters = f"{quantity(self.model.num_parameters())} parameters"
        if self.config.adapters.lora:
            learnt = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            parameters += f" ({quantity(learnt)} of them adapters, which alone are trained)"
        say(f"{size}, {parameters}, {self.config.dtype} on {self.device}, writing to {self.root}")
        if self.config.save.init_from and not start:
            say(f"From {self.config.save.init_from}, at a peak learning rate of {self.schedule.peak:g}")
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
        elif self.config.save.resume:
            say("No checkpoint was made before the run stopped: starting it again")


@contextmanager
def _dropping(model: LanguageModel, share: float) -> Iterator[None]:
    """While entered, the model drops `share` of what its blocks add: a setting of the run, not of the model."""
    before, model.backbone.dropout = model.backbone.dropout, share
    try:
        yield
    finally:
        model.backbone.dropout = before


def _due(step: int, every: int) -> bool:
    return bool(step and every and step % every == 0)
