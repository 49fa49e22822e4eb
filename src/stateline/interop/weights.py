"""Reads the weights of other projects' checkpoints, in one file or many."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from stateline.models.checkpoint import CheckpointError, read_json, read_safetensors

FILES = ("model.safetensors", "pytorch_model.bin")
#: Every name under which weights, their shards and their indices lie.
PATTERNS = (*FILES, *(f"{name}.index.json" for name in FILES), "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")


def read_weights(directory: Path) -> tuple[dict[str, Tensor], Path]:
    """(tensors by name, the file to blame) of a directory: safetensors before .bin, whole before sharded."""
    for name in FILES:
        if (directory / name).exists():
            return _read(directory / name), directory / name
        index = directory / f"{name}.index.json"
        if index.exists():
            return _read_shards(index), index
    raise CheckpointError(f"{directory} has no weights; expected {' or '.join(FILES)}. Copy the whole directory.")


def remove_others(directory: Path, kept: str) -> None:
    """Delete the weights that a save into `kept` replaces: a reader may prefer them. OSError names one that stays."""
    for pattern in PATTERNS:
        for path in directory.glob(pattern):
            if path.name == kept:
                continue
            try:
                path.unlink()
            except OSError as error:
                raise OSError(
                    f"save: {directory / kept} is written, but {path} holds older weights and could not be removed:"
                    f" {error.strerror}. Delete it, or readers may take it instead."
                ) from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map of file names. Copy or download it again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, expected a file beside it.")
        tensors.update(_read(index.parent / name))
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise CheckpointError(f"{index} lists {', '.join(lost[:8])}, which no shard holds. Copy or download it again.")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    return _read_bin(path) if path.suffix == ".bin" else read_safetensors(path)[0]


def _read_bin(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy the whole directory.")
    try:
        # weights_only: a pickle could run any code, this reads tensors and nothing else.
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors, which are not run. Get the weights alone."
        ) from error
    except Exception as error:  # a damaged pickle can make its reader raise anything
        raise CheckpointError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{path} holds something else than named tensors. Is it a training checkpoint?")
    return values
