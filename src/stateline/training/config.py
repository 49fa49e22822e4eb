"""Every setting of a training run: one dataclass a subject, validated when made, and the source of the command line.

`settings` says what a setting is and checks one; `arguments` makes the command line of them and reads files.
This module imports no torch: `stateline train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from stateline.training.settings import Info, checked, setting, settings_of

#: Width and depth of the named sizes: (d_model, n_layer). Parameters at 256 bytes of vocabulary, state 16, expand 2.
SIZES = {
    "tiny": (64, 2),  # 0.08 million parameters: tests, and texts of a few kilobytes
    "small": (192, 6),  # 1.6 million: minutes on a laptop
    "medium": (384, 8),  # 8 million: an hour or more on a laptop
    "base": (512, 12),  # 21 million: a GPU
    "large": (768, 24),  # 90 million: a GPU, and text by the gigabyte
}

#: Default peak learning rate by what is trained: new weights, given ones, or adapters beside given ones.
PEAK_LR = {"new": 3e-3, "init_from": 3e-4, "lora": 1e-3}

#: Mixers that a new model can have, as `ModelConfig` names them.
MIXER_NAMES = ("Mamba1", "Mamba2", "Mamba3", "S4D")
#: Those among them with an inner width, those with a short convolution, and arguments that others cannot have.
MAMBAS, CONVOLVED = ("Mamba1", "Mamba2", "Mamba3"), ("Mamba1", "Mamba2")

#: A run's settings, in its folder: what --resume reads.
SETTINGS_FILE = "run.json"


@dataclass(frozen=True)
class DataConfig:
    """text and batches"""

    path: str = setting(
        "",
        "text to learn: a .txt or .jsonl file, plain or compressed (.gz, .zst), a folder searched for --pattern, in "
        "sorted order, or what stateline tokenize made",
        positional=True,
        resume="free",  # the text may have moved; its contents are compared instead
    )
    val: str | None = setting(
        None,
        "validation text, a file or folder (default: the tail of PATH, see --val-fraction)",
        resume="free",
        metavar="PATH",
    )
    val_fraction: float = setting(
        0.05,
        "share of PATH's tail kept for validation, at most 256 KiB, cut at the next blank line, line or character "
        "(with a tokenizer: at the next document or token)",
        above=0,
        high=0.5,
    )
    pattern: str = setting(
        "*.txt", "which files of a folder to read, for example '*.md' or '*'", resume="free", metavar="GLOB"
    )
    force_binary: bool = setting(False, "read files even if they are not UTF-8 text", resume="free")
    tokenizer: str | None = setting(
        None,
        "bytes, a tokenizer.json, or bpe:N, which learns N ids from PATH (default: that of --init-from or of a "
        "prepared data set, else bytes)",
        resume="free",  # a resumed run has its own; the data set is compared instead
        metavar="NAME",
    )
    text_field: str = setting("text", "which field of JSON lines holds the text", resume="free", metavar="NAME")
    document_separator: str | None = setting(
        None, r"what stands between documents of a text file, e.g. '\n\n\n'; left out", resume="free", metavar="TEXT"
    )
    cache: str | None = setting(
        None, "where prepared data sets are kept, for several runs (default: the run's folder)",
        resume="free", metavar="DIR",
    )  # fmt: skip
    packing: str = setting(
        "stream",
        "stream: windows run over the joined text; documents: nothing flows from one document into the next",
        choices=("stream", "documents"),
    )
    context: int = setting(
        256, "window length in tokens, bytes without a tokenizer: how far gradients flow, from an empty state", low=1
    )
    batch_size: int = setting(8, "windows in one forward pass", low=1)
    accumulate: int = setting(1, "forward passes whose gradients one step adds up (a batch too big for memory)", low=1)


@dataclass(frozen=True)
class ShapeConfig:
    """model"""

    size: str | None = setting(
        None,
        "named size, d_model × n_layer: "
        + ", ".join(f"{k} {d}×{n}" for k, (d, n) in SIZES.items())
        + " (default: small)",
        choices=tuple(SIZES),
    )
    d_model: int | None = setting(None, "width (default: that of --size)", low=1)
    n_layer: int | None = setting(None, "number of blocks (default: that of --size)", low=1)
    mixer: str = setting("Mamba1", "what mixes along time in a block", choices=MIXER_NAMES)
    d_state: int = setting(16, "states per channel; for all but Mamba1, 64 to 128 are usual", low=1)
    d_conv: int = setting(4, "taps of the convolution; only Mamba1 and Mamba2 have one", low=1)
    mimo_rank: int = setting(1, "inputs and outputs that share each state of Mamba3; 1 means none", low=1)
    expand: int = setting(2, "inner width of a Mamba, as a multiple of d_model", low=1)
    d_intermediate: int = setting(0, "width of a gated MLP after each mixer; 0 means none", low=0)
    attention_every: int = setting(0, "attention instead of the mixer in every Nth block, rotary; 0 means none", low=0)
    attention_window: int | None = setting(
        None, "tokens that attention looks back, itself included, so that memory stays constant (default: 512)", low=1
    )

    def refuse_beside(self, source: str) -> None:
        """Raise ValueError if a shape is asked for although the weights come from `source`, whose shape counts."""
        own = [info.name for info in dataclasses.fields(self) if getattr(self, info.name) != info.default]
        if own:
            raise ValueError(f"train: {own[0]} is set, but {source} brings its own shape. Drop one of the two.")


@dataclass(frozen=True)
class OptimConfig:
    """optimiser"""

    lr: float | None = setting(
        None,
        "peak learning rate of AdamW (default: 0.003; with --init-from 0.0003, so that little is forgotten; with "
        "--lora 0.001)",
        above=0,
    )
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up: cosine falls all the way; wsd stays at the peak, then falls over the last "
        "--decay-share of the run; constant stays",
        choices=("cosine", "wsd", "constant"),
    )
    decay_share: float | None = setting(
        None, "share of the run in which wsd falls (default: 0.2)", above=0, high=1, resume="free"
    )
    decay_form: str | None = setting(
        None,
        "how wsd falls: linear, cosine, or sqrt, which is 1 − √x (default: linear)",
        choices=("linear", "cosine", "sqrt"),
        resume="free",
    )
    min_lr_ratio: float | None = setting(
        None, "learning rate at the end of cosine and wsd, as a share of the peak (default: 0.1)", low=0, high=1
    )
    warmup_steps: int | None = setting(
        None, "linear warm-up (default: a twentieth of the steps, at most 200; 20 under --minutes alone)", low=0
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", low=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient", low=0, below=1)
    weight_decay: float = setting(0.1, "weight decay of the matrices (norms, biases, A, D and dt have none)", low=0)
    dropout: float = setting(
        0.0,
        "share of what each block adds that is set to 0 in training, e.g. 0.1, against learning a small text by heart",
        low=0,
        below=1,
    )
    clip: float = setting(1.0, "largest norm of the gradient; 0 means no clipping", low=0)
    ema: float = setting(
        0.0,
        "keep a running mean of the weights with this decay, e.g. 0.999, for validation, samples and the saved model; "
        "0 means none",
        low=0,
        below=1,
    )
    checkpoint_activations: bool = setting(
        False,
        "compute each block again in the backward pass instead of keeping what it computed: same numbers, less memory, "
        "about a third more time",
        resume="free",
    )


@dataclass(frozen=True)
class AdapterConfig:
    """low-rank adapters (LoRA)"""

    lora: int = setting(
        0,
        "train adapters of this rank beside frozen weights, e.g. 8; the saved model has them merged (needs peft); "
        "0 trains all weights",
        low=0,
        metavar="RANK",
    )
    lora_alpha: float | None = setting(
        None, "adapters are scaled by this over the rank (default: twice the rank)", above=0
    )
    lora_targets: str | None = setting(
        None,
        "which Linears get one, by the last part of their name, separated by commas (default: all of the blocks')",
        metavar="NAMES",
    )


@dataclass(frozen=True)
class GuardConfig:
    """when to stop before the end"""

    patience: int = setting(
        0, "stop after so many validations in a row without a better result; 0 means never", low=0, resume="free"
    )
    min_delta: float = setting(
        0.0, "bits per byte that --patience asks for before it calls a result better", low=0, resume="free"
    )
    on_spike: str = setting(
        "stop",
        "what a loss far above the recent ones means: skip leaves that step's update out; stop and skip both end a run "
        "whose loss stays there for 5 steps; ignore goes on. A loss that is not a number always ends the run",
        choices=("stop", "skip", "ignore"),
        resume="free",
    )
    spike_mads: float = setting(
        10.0,
        "a spike lies this many median absolute deviations above the median (one such deviation is taken to be at "
        "least 1% of the median)",
        above=0,
        resume="free",
    )
    spike_window: int = setting(100, "over how many recent losses these are taken", low=10, resume="free")


@dataclass(frozen=True)
class BudgetConfig:
    """how long"""

    steps: int | None = setting(None, "optimiser steps (default: 1000)", low=1, resume="free")
    epochs: float | None = setting(None, "passes over the text, instead of --steps, e.g. 2.5", above=0, resume="free")
    minutes: float | None = setting(
        None,
        "time for training; ends the run, and leads the learning rate to its end, even if steps remain. The schedule "
        "then follows the clock, so two such runs differ",
        above=0,
        resume="free",
    )


@dataclass(frozen=True)
class ReportConfig:
    """reports on the way"""

    eval_every: int = setting(100, "steps between validations; 0 means only at the end", low=0)
    eval_bytes: int = setting(65536, "validation bytes read on the way (all of them at the end)", low=2)
    sample_every: int = setting(250, "steps between samples of text; 0 means none", low=0, resume="free")
    sample_bytes: int = setting(200, "bytes in a sample", low=1, resume="free")
    sample_prompt: str | None = setting(
        None, "how samples begin (default: as the validation text does)", resume="free", metavar="TEXT"
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", low=1, resume="free")
    tensorboard: bool = setting(
        False, "write the figures of metrics.jsonl for TensorBoard too, to OUT/tensorboard", resume="free"
    )
    progress: str = setting(
        "auto",
        "bar (needs tqdm), lines, or off; auto takes the bar on a terminal, lines elsewhere",
        choices=("auto", "bar", "lines", "off"),
        resume="free",
    )


@dataclass(frozen=True)
class SaveConfig:
    """checkpoints"""

    out: str | None = setting(
        None,
        "folder for the model, checkpoints and metrics (default: runs/NAME-OF-THE-TEXT)",
        resume="free",
        metavar="DIR",
    )
    save_every: int = setting(
        250, "steps between checkpoints; 0 means only at the end and on Ctrl-C", low=0, resume="free"
    )
    keep: int = setting(2, "how many of the newest checkpoints to keep", low=1, resume="free")
    init_from: str | None = setting(
        None,
        "start from these weights (fine-tuning): 'bundled', 'bundled-zh', a training run, or a model folder in any "
        "format that `stateline info` reads",
        metavar="MODEL",
    )
    resume: bool = setting(
        False, "continue the run in --out; its settings are kept, PATH may be left out", resume="mode"
    )
    overwrite: bool = setting(False, "delete the run that --out holds, then start", resume="mode")


@dataclass(frozen=True)
class TrainConfig:
    """machine

    Groups of settings; `TrainConfig.of(path="a.txt", lr=1e-3, …)` makes one from the flat names that the command line
    uses.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ShapeConfig = field(default_factory=ShapeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    dtype: str = setting(
        "float32",
        "bfloat16 runs matrix products in half the bits (autocast); weights stay float32",
        choices=("float32", "bfloat16"),
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one", resume="free")
    cuda_graphs: bool = setting(
        False,
        "record a batch's forward and backward pass at the first step and replay it: the same numbers, without the "
        "host's time for launching kernels; the memory of a batch stays taken. Needs a GPU",
        resume="free",
    )
    seed: int = setting(0, "fixes weights, order of the text and samples", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        for group, settings in layout().items():
            owner = getattr(self, group) if group else self
            for name, info in settings.items():
                object.__setattr__(owner, name, checked(name, getattr(owner, name), info))
        _check_together(self)

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """A configuration from flat names (`path`, `lr`, `steps`, …); unknown ones are refused."""
        return cls().replace(**settings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Read flat names, or groups of them as `to_dict` writes. Raises ValueError for unknown keys."""
        return cls.of(**flat_names(values))

    def replace(self, **settings: Any) -> TrainConfig:
        """A copy with some settings changed, by flat name."""
        for name in settings:
            if name not in places():
                close = get_close_matches(name, places(), 1)
                hint = f"Did you mean {close[0]}?" if close else f"Settings: {', '.join(sorted(places()))}."
                raise ValueError(f"train: unknown setting {name!r}. {hint}")
        changes: dict[str, Any] = {}
        for group in layout():
            mine = {name: value for name, value in settings.items() if places()[name] == group}
            changes |= ({group: dataclasses.replace(getattr(self, group), **mine)} if mine else {}) if group else mine
        return dataclasses.replace(self, **changes)

    def flat(self) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
        """Every setting as (name, value, field), groups in order."""
        for group, settings in layout().items():
            for name, info in settings.items():
                yield name, getattr(getattr(self, group) if group else self, name), info.field

    def to_dict(self) -> dict[str, Any]:
        """Groups of plain values for JSON, without the settings that only say how to start."""
        values = {name: value for name, value, info in self.flat() if info.metadata["resume"] != "mode"}
        grouped = {g: {n: values[n] for n in names if n in values} for g, names in layout().items() if g}
        return grouped | {name: values[name] for name in layout()[""]}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @property
    def shape(self) -> tuple[int, int]:
        """(d_model, n_layer) after the named size is looked up."""
        d_model, n_layer = SIZES[self.model.size or "small"]
        return self.model.d_model or d_model, self.model.n_layer or n_layer

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, a default one looked up."""
        kind = "lora" if self.adapters.lora else "init_from" if self.save.init_from else "new"
        return self.optim.lr or PEAK_LR[kind]

    @property
    def directory(self) -> Path:
        """Where the run is written."""
        return Path(self.save.out) if self.save.out else Path("runs") / (Path(self.data.path).resolve().stem or "text")


def flat_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by flat name, of flat names or groups of them; the values are not looked at.

    Raises ValueError for an unknown name in a group, and for a setting that is given twice.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key not in layout() or not key:
            given = {key: value}
        elif isinstance(value, Mapping):
            given = dict(value)
            for name in given:
                if name not in layout()[key]:
                    close = get_close_matches(name, layout()[key], 1)
                    hint = f". Did you mean {key}.{close[0]}?" if close else f"; {key} has {', '.join(layout()[key])}."
                    raise ValueError(f"train: unknown setting {key}.{name}{hint}")
        else:
            raise ValueError(f"train: {key} is {value!r}, expected a table of settings.")
        if twice := flat.keys() & given.keys():
            raise ValueError(f"train: {min(twice)} is given twice, alone and in a table of settings. Drop one.")
        flat |= given
    return flat


def differences(old: TrainConfig, new: TrainConfig, kind: str) -> list[str]:
    """Lines `name: old → new` for settings of one resume kind that differ; a named size equals its numbers."""
    shapes: dict[str, tuple[Any, Any]] = {"size": (None, None)}
    shapes |= {name: (old.shape[i], new.shape[i]) for i, name in enumerate(("d_model", "n_layer"))}
    lines = []
    for (name, before, info), (_, after, _) in zip(old.flat(), new.flat(), strict=True):
        before, after = shapes.get(name, (before, after))
        if before != after and info.metadata["resume"] == kind:
            lines.append(f"{name}: {before} → {after}")
    return lines


@cache
def layout() -> dict[str, dict[str, Info]]:
    """Group → name → field; the group "" is TrainConfig itself."""
    groups = [f.name for f in dataclasses.fields(TrainConfig) if "help" not in f.metadata]
    hints = typing.get_type_hints(TrainConfig)
    return {g: settings_of(hints[g]) for g in groups} | {"": settings_of(TrainConfig)}


@cache
def places() -> dict[str, str]:
    """Setting → its group. Names are unique across groups, so that flags need no prefixes."""
    return {name: group for group, settings in layout().items() for name in settings}


def _check_together(config: TrainConfig) -> None:
    """Rules that involve more than one setting."""
    budget, save, optim, guard = config.budget, config.save, config.optim, config.guard
    if budget.steps and budget.epochs:
        raise ValueError(f"train: steps is {budget.steps} and epochs is {budget.epochs:g}. Give one of the two.")
    if save.resume and save.overwrite:
        raise ValueError("train: resume and overwrite are both set. Resume continues a run, overwrite deletes it.")
    if save.init_from:
        config.model.refuse_beside("init_from")
    if config.model.size and config.model.d_model and config.model.n_layer:
        raise ValueError("train: size, d_model and n_layer are all set. Give the size or the numbers.")
    every, (_, n_layer) = config.model.attention_every, config.shape
    if every > n_layer:
        raise ValueError(f"train: attention_every is {every}, and the model has {n_layer} blocks.")
    if config.model.attention_window and not every:
        raise ValueError("train: attention_window is set, and attention_every is 0, which means no attention.")
    mixer = config.model.mixer
    if mixer not in CONVOLVED and config.model.d_conv != ShapeConfig.d_conv:
        raise ValueError(f"train: d_conv is {config.model.d_conv}, but mixer is {mixer!r}, which has no convolution.")
    if mixer not in MAMBAS and config.model.expand != ShapeConfig.expand:
        raise ValueError(f"train: expand is {config.model.expand}, but mixer is {mixer!r}, which has no inner width.")
    if config.model.mixer != "Mamba3" and config.model.mimo_rank > 1:
        raise ValueError(
            f"train: mimo_rank is {config.model.mimo_rank}, but mixer is {config.model.mixer!r}: Mamba3's."
        )
    for name in ("decay_share", "decay_form"):
        if optim.schedule != "wsd" and getattr(optim, name) is not None:
            raise ValueError(f"train: {name} is set, but schedule is {optim.schedule!r}. It belongs to schedule 'wsd'.")
    if optim.schedule == "constant" and optim.min_lr_ratio is not None:
        raise ValueError("train: min_lr_ratio is set, but schedule is 'constant', which does not fall. Drop one.")
    for name in ("lora_alpha", "lora_targets"):
        if getattr(config.adapters, name) is not None and not config.adapters.lora:
            raise ValueError(f"train: {name} is set, but lora is 0. Give a rank with --lora.")
    if guard.patience and not config.report.eval_every:
        raise ValueError(f"train: patience is {guard.patience}, but eval_every is 0, so nothing is validated. Set it.")
    if config.cuda_graphs and config.data.packing == "documents":
        raise ValueError("train: cuda_graphs is set, but packing is 'documents', whose batches differ in shape.")
    if config.cuda_graphs and optim.checkpoint_activations:
        raise ValueError("train: cuda_graphs and checkpoint_activations are both set. Drop one of the two.")
    if guard.min_delta and not guard.patience:
        raise ValueError("train: min_delta is set, but patience is 0. Give the number of validations to wait for.")
