"""Fitted estimators in a directory: model.safetensors, which alone is complete, and config.json for people and tools.

Nothing is pickled: parameters, classes and scales are JSON and tensors, so that loading runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from safetensors.torch import save_file

from stateline import checks
from stateline.files import share
from stateline.models.checkpoint import CONFIG, HEADER, MISFIT, WEIGHTS, CheckpointError, read_safetensors, write_aside
from stateline.models.sequence import SequenceConfig, SequenceModel

if TYPE_CHECKING:
    from stateline.apps.estimator_base import Sequences

FORMAT, VERSION = "stateline-sequence", 1
E = TypeVar("E", bound="Sequences")


def save(estimator: Sequences, directory: str | Path) -> None:
    """Write a fitted estimator, whole or not at all; other files of the directory stay.

    Raises ValueError if the directory holds a model of another kind, or a parameter is no JSON value; OSError if the
    disk is full or not writable.
    """
    target = check_target(directory)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "estimator": type(estimator).__name__,
        "params": _plain(estimator.get_params()),
        "model": estimator.model_.config.to_dict(),
        "fitted": estimator._record(),
    }
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise checks.fail("save", f"a parameter cannot be written as JSON: {error}.", "Set plain values.") from error
    tensors = {name: x.detach().cpu().contiguous() for name, x in estimator.model_.state_dict().items()}

    def write(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", HEADER: json.dumps(record)})
        share(folder / WEIGHTS)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    write_aside(target, write, [WEIGHTS, CONFIG])


def check_target(directory: str | Path) -> Path:
    """The directory, if `save` may write there; whoever trains for long asks before. Raises ValueError if not."""
    target = Path(directory).expanduser()
    if target.exists() and not target.is_dir():
        raise checks.fail("save", f"{target} is a file, expected a directory.")
    if (target / WEIGHTS).exists() and _kind(target / WEIGHTS) != FORMAT:
        raise checks.fail("save", f"{target} holds a model of another kind.", "Choose another directory.")
    return target


def check_new(directory: str | Path, overwrite: bool) -> None:
    """Raise unless a model may be saved there when it is trained: nothing lost, and the place writable.

    Raises ValueError for a directory that is not empty unless `overwrite`, or a model of another kind; OSError if
    nothing can be written.
    """
    target = check_target(directory)
    if not overwrite and target.exists() and any(target.iterdir()):
        what = "a model" if (target / WEIGHTS).exists() else "other files"
        raise checks.fail("save", f"{target} holds {what}.", "Choose another directory, or --overwrite.")
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def load(kind: type[E], directory: str | Path, device: str | None) -> E:
    """The estimator of this class that `save` wrote. Raises CheckpointError naming the file and what is wrong."""
    path = Path(directory).expanduser() / WEIGHTS
    tensors, header = read_safetensors(path)
    record = _record(header, path)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        got = f"format {record.get('format')!r} version {record.get('version')!r}"
        raise CheckpointError(f"{path} has {got}, expected {FORMAT!r} version {VERSION}. stateline.load reads others.")
    if record.get("estimator") != kind.__name__:
        name = record.get("estimator")
        raise CheckpointError(f"{path} holds a {name}, expected a {kind.__name__}. Load it with {name}.load.")
    try:
        estimator = kind(**_params(record["params"]), device=device)
        estimator.model_ = SequenceModel(SequenceConfig(**record["model"]))
        estimator.model_.load_state_dict(tensors)
        estimator._restore(record["fitted"])
    except (KeyError, *MISFIT) as error:
        reason = " ".join(str(error).split())[:300]  # torch lists every weight
        raise CheckpointError(f"{path} is damaged: {reason}. Copy it again.") from error
    estimator.model_.eval().to(estimator._device())
    return estimator


def estimator_name(directory: str | Path) -> str:
    """The class of the estimator in a directory. Raises CheckpointError if there is none."""
    path = Path(directory).expanduser() / WEIGHTS
    record = _record(read_safetensors(path)[1], path)
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path.parent} holds a model, not one of signals. stateline.load reads others.")
    return str(record.get("estimator"))


def labels_to_json(labels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Class labels as JSON keeps them, with their dtype."""
    return {"dtype": "object" if labels.dtype == object else labels.dtype.str, "values": labels.tolist()}


def labels_from_json(record: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The labels `labels_to_json` kept."""
    return np.asarray(record["values"], dtype=np.dtype(record["dtype"]))


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters for JSON, whose objects have only strings for keys; where it computes is no part of an estimator."""
    params = {name: checks.plain(value) for name, value in params.items() if name != "device"}
    if isinstance(params.get("class_weight"), dict):
        params["class_weight"] = [[checks.plain(k), float(v)] for k, v in params["class_weight"].items()]
    return params


def _params(stored: dict[str, Any]) -> dict[str, Any]:
    """What `_plain` made plain."""
    weight = stored.get("class_weight")
    return stored | {"class_weight": dict(weight)} if isinstance(weight, list) else stored


def _kind(path: Path) -> Any:
    try:
        return _record(read_safetensors(path)[1], path).get("format")
    except CheckpointError:
        return None


def _record(header: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        record = json.loads(header.get(HEADER, ""))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no model of signals. Was it written by classify train --out, or save()?")
    return record
