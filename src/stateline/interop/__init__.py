"""Models in and out of every format we know: `load` finds out which, `save` writes the one asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from stateline import checks
from stateline.files import BUNDLED_NAMES, bundled
from stateline.interop import gguf, gguf_read, hub, huggingface, mamba_ssm, servers
from stateline.interop.export import export_model, exported_program, load_exported
from stateline.models import LanguageModel, checkpoint
from stateline.models.checkpoint import CheckpointError
from stateline.training.config import SETTINGS_FILE

__all__ = [
    "CheckpointError", "FORMATS", "detect", "export_model", "exported_program", "load", "load_exported", "resolve",
    "save",
]  # fmt: skip

FORMATS = ("stateline", "mamba_ssm", "huggingface")
GGUF = "gguf"  # one file, llama.cpp's
VLLM = "vllm"  # "huggingface" with a tokenizer, as vLLM and SGLang serve it
_LOAD: dict[str, Callable[..., LanguageModel]] = {
    "stateline": checkpoint.load,
    "mamba_ssm": mamba_ssm.load,
    "huggingface": huggingface.load,
    GGUF: gguf_read.load,
}
_SAVE = {"stateline": checkpoint.save, "mamba_ssm": mamba_ssm.save, "huggingface": huggingface.save}


def load(
    path_or_name: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model in a directory of any known format or a GGUF file, one that ships, or one of the Hugging Face Hub.

    Args:
        path_or_name: a directory (of a model, or of a training run, whose best model is meant), a file, "bundled"
            (English, by bytes) or "bundled-zh" (Chinese poems; its text needs `load_tokenizer("bundled-zh", …)`), or a
            name, "organisation/model" or "organisation/model@revision". Only such a name, where no directory has it, is
            looked for on the Hub, by huggingface_hub (extra `hf`), which downloads what is not here yet.
        device: where the weights go; CPU if None.
        dtype: of the weights; None keeps the checkpoint's. Time constants stay float32 at least.

    Raises CheckpointError naming the file that is missing, damaged, foreign or misfitting, and what to do.
    """
    if not isinstance(path_or_name, str | os.PathLike):
        raise checks.fail("load", f"{path_or_name!r} is no path and no name.", error=TypeError)
    if (ours := bundled(path_or_name)) is not None:
        if not ours.is_dir():
            raise CheckpointError(
                f"this installation has no {path_or_name} model. Reinstall stateline, or give a directory."
            )
        return checkpoint.load(ours, device=device, dtype=dtype)
    path = resolve(path_or_name)
    if (path / SETTINGS_FILE).is_file():  # a training run: its best model
        path = path / "model"
    return _LOAD[detect(path)](path, device=device, dtype=dtype)


def resolve(path_or_name: str | Path) -> Path:
    """The directory that a path or a name on the Hub stands for; see `load`."""
    path = Path(path_or_name).expanduser()
    named = isinstance(path_or_name, str) and hub.is_name(path_or_name)
    return hub.fetch(str(path_or_name)) if named and not path.exists() and not path.parent.is_dir() else path


def save(
    model: LanguageModel,
    path: str | Path,
    format: str = "stateline",
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a model to a directory as "stateline", "mamba_ssm", "huggingface" or "vllm", or to one file as "gguf".

    Every file is whole or not there. Ours changes in one rename; the other directories are two files, renamed one after
    the other, and older weights beside them are removed.

    dtype: of the stored weights; None stores them as they are; torch.int8, for "stateline" alone, is eight bits for
        matrices with a scale a row. Time constants are never rounded. For "gguf" also one of `gguf.KINDS`, such as
        "Q8_0".
    tokenizer: for "gguf" and "vllm", which hold it: a directory with tokenizer.json, or "none"; None for the bytes of
        a vocabulary of 256.

    Raises ValueError for what the format cannot express, and where the directory holds a model in another format.
    """
    checks.choice("save", "format", format, (*FORMATS, VLLM, GGUF))
    if format == GGUF:
        kind = gguf.KIND_OF.get(dtype) if isinstance(dtype, torch.dtype) else dtype
        if dtype is not None and kind is None:
            raise checks.fail("save", f"dtype is {dtype}, GGUF has {', '.join(gguf.KINDS)}.")
        return gguf.save(model, path, kind, tokenizer=tokenizer)
    if tokenizer is not None and format != VLLM:
        raise checks.fail(
            "save", f"tokenizer was given for format={format!r}.", "Copy tokenizer.json beside the weights."
        )
    if isinstance(dtype, str):
        raise checks.fail("save", f"dtype is {dtype!r}, expected a torch.dtype.", 'Names are for format="gguf".')
    if dtype == torch.int8 and format != "stateline":
        raise checks.fail("save", f"dtype is torch.int8, which {format} does not store.", 'Use format="stateline".')
    model = checkpoint.plain(model)
    target = Path(path).expanduser()
    if (target / checkpoint.CONFIG).exists():
        there = detect(target)
        if there != ("huggingface" if format == VLLM else format):
            raise checks.fail("save", f"{target} holds a {there} model.", "Choose another directory.")
    if format == VLLM:
        return servers.save(model, target, dtype=dtype, tokenizer=tokenizer)
    _SAVE[format](model, target, dtype=dtype)


def detect(path: str | Path) -> str:
    """The format of a model, from a directory's config.json or how a file begins; CheckpointError if none is known."""
    path = Path(path).expanduser()
    if not path.is_dir():
        if gguf_read.is_file(path):
            return GGUF
        if path.is_file():
            raise CheckpointError(f"{path} is a file. Give the directory that holds config.json and the weights.")
        ships = f" Models that ship: {BUNDLED_NAMES}." if str(path).startswith("bundled") else ""
        kind = "file" if path.suffix == f".{GGUF}" else "directory"
        raise CheckpointError(f"{path} is no {kind}.{ships}")
    if not (path / checkpoint.CONFIG).exists() and checkpoint.is_complete(path / checkpoint.WEIGHTS):
        return "stateline"  # a kill came between the renames of a first save
    if not (path / checkpoint.CONFIG).exists():
        raise CheckpointError(
            f"{path} holds no model: there is no {checkpoint.CONFIG}. Give a model's directory, or a run's."
        )
    config = checkpoint.read_json(path / checkpoint.CONFIG)
    if config.get("format") == checkpoint.FORMAT:
        return "stateline"
    if config.get("format") == "stateline-sequence":  # apps/estimator_files.py
        name = config.get("estimator")
        ask = f"Ask it with stateline classify predict, or load it with stateline.{name}.load."
        raise CheckpointError(f"{path} holds a model of signals, no language model. {ask}")
    if "model_type" in config:
        return "huggingface"
    if {"d_model", "n_layer"} <= set(config):
        return "mamba_ssm"
    raise CheckpointError(
        f"{path / checkpoint.CONFIG} is of no known format: it has {', '.join(sorted(config)[:8]) or 'nothing'}."
        ' Expected "format": "stateline" (ours), model_type (Hugging Face), or d_model and n_layer (mamba_ssm).'
    )
