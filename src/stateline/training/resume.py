"""Checkpoints of a run, written so that no crash, signal or full disk can damage the last good one.

A run's folder:

    run.json                       the settings (config.py)
    model/                         the best model so far, in our format: what `stateline.load(folder)` reads
    metrics.jsonl                  one line a record
    tensorboard/                   the same for TensorBoard, if asked for
    base/                          under LoRA, the frozen weights
    checkpoints/latest             the name of the newest checkpoint
    checkpoints/step-00000250/     model/ (adapters.safetensors under LoRA), optimizer.safetensors, training.json, and
                                   ema.safetensors if there is a running mean

A checkpoint is built in a hidden folder beside its place, flushed to disk, and renamed; then `latest` is replaced.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stateline.checks import fail
from stateline.files import flush
from stateline.models import LanguageModel, checkpoint
from stateline.training import adapters
from stateline.training.config import SETTINGS_FILE, TrainConfig
from stateline.training.ema import Ema
from stateline.training.guard import Watched

CHECKPOINTS, MODEL, METRICS, LATEST, LOCK = "checkpoints", "model", "metrics.jsonl", "latest", ".lock"
#: What a run that does not read bytes keeps beside its settings and its models.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: Where a run keeps what it had to prepare of its text.
PREPARED = "data"
BASE, BOARD = "base", "tensorboard"
OPTIMIZER, ADAPTERS, EMA = "optimizer.safetensors", "adapters.safetensors", "ema.safetensors"
TEMPORARY = ".tmp-"


class TrainingError(RuntimeError):
    """A run cannot go on (full disk, loss not finite); what was saved before is intact, and the message names it."""


@dataclass
class Position:
    """Where a run stands. `windows` is the whole state of the data: the number of windows consumed."""

    step: int = 0
    windows: int = 0
    elapsed: float = 0.0
    evaluated: int = 0  # the step of the last validation, and below of the last sample: neither is made twice
    sampled: int = 0
    val_bpb: float | None = None
    best_bpb: float | None = None
    best_step: int | None = None
    watched: Watched = field(default_factory=Watched)

    def __post_init__(self) -> None:
        if isinstance(self.watched, dict):  # as JSON has it
            self.watched = Watched(**self.watched)


def newest(root: Path) -> Path | None:
    """The last complete checkpoint of a run: where `latest` points, else the highest step; None if there is none."""
    folder = root / CHECKPOINTS
    pointer = folder / LATEST
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8").strip()
        if name and (folder / name).is_dir():
            return folder / name
    steps = _steps(folder)
    return steps[-1] if steps else None


def holds_run(root: Path) -> bool:
    """Whether a folder is a run's: it has a run's settings, or a checkpoint (made before them for given weights)."""
    last = newest(root)
    return (root / SETTINGS_FILE).is_file() or (last is not None and (last / "training.json").is_file())


def never_saved(root: Path) -> bool:
    """Whether a run has begun and has not made its first checkpoint; not if its checkpoints were deleted."""
    folder = root / CHECKPOINTS
    deleted = (folder / LATEST).exists() or ((root / MODEL).exists() and not folder.exists())
    return (root / SETTINGS_FILE).is_file() and not deleted and newest(root) is None


def save(
    root: Path,
    position: Position,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    digest: str,
    ema: Ema | None = None,
) -> Path:
    """Write a checkpoint, whole or not at all, and drop those beyond `config.save.keep`. Returns its folder."""
    about = {"position": asdict(position), "config": config.to_dict(), "data": digest, "torch": torch.__version__}
    folder = root / CHECKPOINTS
    name = f"step-{position.step:08d}"
    with saving(root, f"checkpoint {name}"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            if adapters.present(model):
                save_file(adapters.learnt(model), temporary / ADAPTERS)
            else:
                save_model(model, temporary / MODEL, {"step": position.step, "val_bpb": position.val_bpb}, root)
            if ema is not None:
                save_file(ema.means, temporary / EMA)
            save_file(_optimizer_tensors(model, optimizer) | _random_state(), temporary / OPTIMIZER)
            (temporary / "training.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
            _flush_tree(temporary)
            _move_aside(folder / name)
            os.replace(temporary, folder / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        write_atomically(folder / LATEST, name + "\n")
        for old in _steps(folder)[: -config.save.keep]:
            if old.name != name:
                _move_aside(old)
        clean(root)
    return folder / name


def save_model(model: LanguageModel, folder: Path, about: dict[str, Any], root: Path) -> None:
    """Write weights in our format, with a word on where they come from, and the tokenizer of the run in `root`.

    Draws no random numbers of the run's.
    """
    for name in TOKENIZER_FILES:
        if "tokenizer_sha256" in model.metadata and (root / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, (root / name).read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        checkpoint.save(model, folder, metadata=model.metadata | {"training": about})


def weights(path: Path) -> Path:
    """The folder of a checkpoint's weights, and tokenizer; under LoRA the frozen ones."""
    return path.parents[1] / BASE if (path / ADAPTERS).is_file() else path / MODEL


def load_model(path: Path) -> LanguageModel:
    """A checkpoint's weights, under LoRA the frozen ones, on the CPU. Raises ValueError if they are damaged."""
    try:
        return checkpoint.load(weights(path))
    except checkpoint.CheckpointError as error:
        raise _damaged(path, error) from error


def load(
    path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, device: torch.device, ema: Ema | None = None
) -> None:
    """Put a checkpoint's optimiser, adapters, mean and random state in place; the weights came with the model."""
    try:
        if adapters.present(model):
            adapters.load(model, load_file(path / ADAPTERS, device=str(device)))
        if ema is not None:
            ema.load(load_file(path / EMA, device=str(device)))
        tensors = load_file(path / OPTIMIZER, device=str(device))
        for name, parameter in model.named_parameters():
            prefix = f"{name}:"
            entries = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if entries:
                optimizer.state[parameter] = entries
        _set_random_state(tensors)
    except (OSError, SafetensorError, KeyError) as error:
        raise _damaged(path, error) from error


def read_about(path: Path) -> tuple[Position, TrainConfig, str]:
    """A checkpoint's position, settings and data digest. Raises ValueError if it is damaged."""
    try:
        about: dict[str, Any] = json.loads((path / "training.json").read_text(encoding="utf-8"))
        return Position(**about["position"]), TrainConfig.from_dict(about["config"]), str(about["data"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


@contextmanager
def saving(root: Path, what: str) -> Iterator[None]:
    """Turn a failed write into one TrainingError that says what is still good."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        last = newest(root)
        good = f"The last good checkpoint is {last}" if last else "No checkpoint was saved before"
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        again = "--resume" if last or never_saved(root) else "start again with --overwrite"
        remedy = f"Free some space in {root}, then {again}." if full else f"Once that is mended, {again}."
        raise TrainingError(f"train: {what} could not be saved: {str(error).rstrip('.?')}. {good}. {remedy}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents so that a reader, or a crash, sees the old or the new, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def clean(root: Path) -> None:
    """Remove what a killed process left half written. Call with the lock held."""
    for leftover in (root / CHECKPOINTS).glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextmanager
def locked(root: Path, doing: str = "training into") -> Iterator[None]:
    """Hold a run's folder (made if needed) against a second process; a killed process releases it by dying.

    Raises ValueError if another process holds it or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        remedy = "Choose another folder with --out."
        raise fail("train", f"{root} cannot be written: {error.strerror}.", remedy) from error
    try:
        if not _try_lock(handle):
            raise fail("train", f"another process is {doing} {root}.", "Wait for it, or choose another --out.")
        yield
    finally:
        os.close(handle)


def _damaged(path: Path, error: Exception) -> Exception:
    return fail(
        "train", f"{path} is damaged: {str(error).rstrip('.')}.", "Delete that folder to resume from the one before."
    )


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _move_aside(path: Path) -> None:
    """Take a folder out of sight in one step; `clean` deletes it, now or after a crash."""
    if path.exists():
        aside = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def _optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, `name:entry`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{entry}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def _random_state() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"].cpu())
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (state := tensors.get(f"random.cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state.cpu(), i)


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)
