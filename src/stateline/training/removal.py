"""What --overwrite deletes: a run's own files, known by name and by what lies beside them; a user's never."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from stateline.checks import fail
from stateline.models.checkpoint import ASIDE
from stateline.training import resume
from stateline.training.board import remove_events
from stateline.training.config import SETTINGS_FILE, TrainConfig
from stateline.training.resume import BASE, BOARD, CHECKPOINTS, LATEST, METRICS, MODEL, PREPARED, TOKENIZER_FILES
from stateline.training.shards import is_dataset, remove_dataset

#: What a run keeps in the folders that it has to itself.
_OWN = {
    CHECKPOINTS: re.compile(rf"step-\d+|{LATEST}"),
    MODEL: re.compile(r"model\.safetensors|config\.json|tokenizer\.json|tokenizer_config\.json"),
}
_OWN[BASE] = _OWN[MODEL]
#: The data sets that a run prepares, in PREPARED.
PARTS = ("train", "val")
#: Whose data set a run may put where it would read the text, or the validation text, from.
_OTHER = {"the text": "val", "val": "train"}


def refuse_losses(config: TrainConfig) -> None:
    """Raise ValueError if a new run would write over what is no run's, or delete what it reads itself."""
    root = config.directory
    for name in (CHECKPOINTS, MODEL, METRICS, *[BASE] * bool(config.adapters.lora)):
        if (root / name).exists() and (stranger := _stranger(root, name)):
            remedy = "Move it away, or choose another folder with --out."
            raise fail("train", f"{stranger} is not a run's, and the run would write there.", remedy)
    doomed = [path.resolve() for path in _files_of(root) if path.name != BOARD]
    data = config.data
    named = {"the text": data.path, "val": data.val, "tokenizer": data.tokenizer, "init_from": config.save.init_from}
    for name, place in named.items():
        path = Path(place or "").expanduser().resolve()
        if name == "init_from" and path in (root.resolve(), (root / MODEL).resolve()):
            continue  # the run starts by saving these weights again
        replaced = [(root / PREPARED / _OTHER[name]).resolve()] if name in _OTHER else []
        if place and any(path.is_relative_to(there) for there in [*doomed, *replaced]):
            remedy = "Copy it elsewhere first, or choose another folder with --out."
            raise fail("train", f"{name} is {path}, which the run in {root} would replace or delete.", remedy)


def remove_run(root: Path, *, keep_prepared: bool = False) -> None:
    """Delete a run's own files and nothing else in its folder; `keep_prepared` spares the data prepared there."""
    names = [SETTINGS_FILE, *TOKENIZER_FILES] if resume.holds_run(root) else []
    remove_results(root)
    if names and not keep_prepared:
        for part in PARTS:
            if is_dataset(root / PREPARED / part):
                remove_dataset(root / PREPARED / part)
                (root / PREPARED / part / resume.LOCK).unlink(missing_ok=True)
                _remove_empty(root / PREPARED / part)
        _remove_empty(root / PREPARED)
    for name in names:
        (root / name).unlink(missing_ok=True)


def remove_results(root: Path) -> None:
    """Delete what a run has learnt and reported; its settings, tokenizer and prepared data stay."""
    for path in list(_files_of(root)):
        if path.name in (SETTINGS_FILE, *TOKENIZER_FILES):
            continue
        if path.name == BOARD:
            remove_events(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _files_of(root: Path) -> Iterator[Path]:
    """The files and folders of a run, but its prepared data; the settings, which prove that it is one, last."""
    if not resume.holds_run(root):
        return
    for name in (CHECKPOINTS, MODEL, METRICS, BASE):
        if (root / name).exists() and not _stranger(root, name):
            yield root / name
    yield from (root / name for name in (BOARD, *TOKENIZER_FILES, SETTINGS_FILE) if (root / name).exists())


def _stranger(root: Path, name: str) -> Path | None:
    """Something under a run's name that is not the run's; None if all of it is."""
    path = root / name
    if (name == BASE and not _was_adapted(root)) or (name != CHECKPOINTS and not resume.holds_run(root)):
        return path
    if name not in _OWN:
        return None
    if not path.is_dir() or path.is_symlink():
        return path
    others = (
        p
        for p in sorted(path.iterdir())
        if not (p.name.startswith((resume.TEMPORARY, ASIDE)) or _OWN[name].fullmatch(p.name))
    )
    return next(others, None)


def _was_adapted(root: Path) -> bool:
    """Whether a run trains adapters, and so keeps the frozen weights in BASE."""
    last, settings = resume.newest(root), root / SETTINGS_FILE
    if last is not None:
        return (last / resume.ADAPTERS).is_file()
    try:
        return bool(json.loads(settings.read_text(encoding="utf-8"))["adapters"]["lora"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # what cannot be told is left alone


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
