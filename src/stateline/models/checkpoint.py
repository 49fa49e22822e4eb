"""Our own format: a directory of model.safetensors, which alone is complete, and config.json for people and tools.

The configuration is stored in the header of model.safetensors too. A save writes everything aside, then renames
model.safetensors into place: that single rename is the moment the checkpoint changes, so a full disk, a kill or a power
cut leaves the old one or the new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stateline import checks
from stateline.files import flush, share
from stateline.models.backbone import ModelConfig
from stateline.models.language import LanguageModel
from stateline.models.rounding import RoundingError, restored, rounded
from stateline.nn.precision import full_precision_names

FORMAT = "stateline"
VERSION, VERSION_INT8 = 1, 2  # the second where matrices are stored in eight bits
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
HEADER = "stateline"  # the key of our record among a safetensors file's metadata
ASIDE = ".saving"
HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"
LAYERS = "backbone.layers."
#: What a configuration with impossible values raises: wrong ones, and sizes that no machine can count.
MISFIT = (TypeError, ValueError, OverflowError, RuntimeError, MemoryError)


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message names the file and what to do."""


def save(
    model: LanguageModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, whole or not at all; other files of the directory stay.

    dtype: of the stored weights, e.g. torch.bfloat16 for a file of half the size; None stores them as they are.
        torch.int8 stores matrices in eight bits with a scale for each row, and vectors as they are. Decay rates, skip
        weights and step-size biases are never rounded. `load` gives back the model's dtype either way.
    metadata: JSON values that travel with the model; None keeps `model.metadata`.

    Raises:
        ValueError: the directory holds another kind of model, or the model has weights its configuration does not, or
            ones that are not finite where they were to be rounded to eight bits.
        OSError: the disk is full or not writable; an older checkpoint is untouched.
    """
    model = plain(model)
    target = Path(directory)
    _refuse_foreign(target)
    record = {
        "format": FORMAT,
        "version": VERSION_INT8 if dtype == torch.int8 else VERSION,
        "dtype": str(model.backbone.embedding.weight.dtype).removeprefix("torch."),
        "model": model.config.to_dict(),
        "metadata": dict(model.metadata if metadata is None else metadata),
    }
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise checks.fail("save", f"metadata cannot be written as JSON: {error}.") from error
    tensors = weights(model, None if dtype == torch.int8 else dtype)
    if dtype == torch.int8:
        try:
            tensors = rounded(tensors, full_precision_names(model))
        except RoundingError as error:
            raise checks.fail("save", f"{error}, and eight bits hold none such.", "Save them as they are.") from error

    def write(folder: Path) -> None:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", HEADER: json.dumps(record)})
        share(folder / WEIGHTS)
        (folder / CONFIG).write_text(text + "\n")

    write_aside(target, write, [WEIGHTS, CONFIG])


def load(
    directory: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model that `save` wrote, in evaluation mode.

    device: CPU if None.   dtype: of the weights; None is what the model had when it was saved.

    Raises CheckpointError naming the file if one is missing, damaged or does not fit, with every misfit listed.
    """
    source = Path(directory)
    tensors, header = read_safetensors(source / WEIGHTS)
    record = _read_header(header[HEADER], source / WEIGHTS) if HEADER in header else None
    blame = source / (CONFIG if record is None else WEIGHTS)
    if (source / CONFIG).exists():
        beside = read_json(source / CONFIG)
        if record is not None and beside.get("model") != record.get("model"):
            warnings.warn(
                f"{source / CONFIG} disagrees with the configuration inside {WEIGHTS}, which is used. Save it again.",
                RuntimeWarning,
                stacklevel=2,
            )
        record = record or beside
    if record is None:
        raise CheckpointError(f"{source / CONFIG} is missing. Copy the whole directory.")
    if record.get("format") != FORMAT or record.get("version") not in (VERSION, VERSION_INT8):
        got = f"format {record.get('format')!r} version {record.get('version')!r}"
        known = f"{FORMAT!r} versions {VERSION} and {VERSION_INT8}"
        raise CheckpointError(f"{blame} has {got}, this release reads {known}. Update stateline?")
    config, stored, metadata = _read_record(record, blame)
    if record["version"] == VERSION_INT8:
        try:
            tensors = restored(tensors)
        except RoundingError as error:
            raise CheckpointError(f"{source / WEIGHTS} is damaged: {error}. Copy or download it again.") from error
    model = assemble(config, tensors, source / WEIGHTS, device=device, dtype=dtype or stored)
    model.metadata = metadata
    return model


def _read_header(text: str, path: Path) -> dict[str, Any]:
    """Our record as a file's header holds it; CheckpointError unless it is an object with something in it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}. Copy or download it again.") from error
    if not isinstance(record, dict) or not record:
        raise CheckpointError(f"{path} has a damaged header: {text[:40]!r} is no record. Copy or download it again.")
    return record


def _read_record(record: dict[str, Any], path: Path) -> tuple[ModelConfig, torch.dtype, dict[str, Any]]:
    """(configuration, dtype, metadata) of a record; CheckpointError names the file that holds it and the wrong part."""
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in checks.REAL_DTYPES}
    dtype, metadata = record.get("dtype", "float32"), record.get("metadata")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(f"{path} is damaged: dtype is {dtype!r}, expected one of {', '.join(dtypes)}.")
    if not isinstance(metadata, dict | None):
        raise CheckpointError(f"{path} is damaged: metadata is {metadata!r}, expected an object.")
    try:
        return ModelConfig.from_dict(record["model"]), dtypes[dtype], metadata or {}
    except (KeyError, *MISFIT) as error:
        raise CheckpointError(f"{path} is no configuration: {error}") from error


def plain(model: nn.Module) -> LanguageModel:
    """The LanguageModel itself, taken out of torch.compile's wrapper; TypeError for anything else, or a packed one."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, LanguageModel):
        raise checks.fail("save", f"model is a {type(model).__name__}, expected a LanguageModel.", error=TypeError)
    if not isinstance(model.backbone.embedding, nn.Embedding):
        remedy = "Save the model it was prepared from, and prepare it again after loading."
        raise checks.fail("save", "model is packed for decoding; its weights are rounded.", remedy, error=TypeError)
    return model


def weights(model: LanguageModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Named weights on the CPU, ready to store: a tied matrix once, full-precision ones never narrowed."""
    if dtype is not None:
        checks.choice("save", "dtype", dtype, checks.REAL_DTYPES)
    exact = full_precision_names(model)
    found = {
        name: t.detach() for name, t in model.state_dict().items() if not (model.config.tie_embeddings and name == HEAD)
    }
    expected = expected_shapes(model.config)
    odd = sorted(set(found) ^ set(expected))
    if odd:
        raise checks.fail(
            "save",
            f"the model has weights that its configuration does not, or lacks some: {', '.join(odd[:8])}.",
            "Merge or remove adapters first.",
        )
    return {
        name: t.to("cpu", t.dtype if dtype is None or name in exact else dtype).contiguous()
        for name, t in found.items()
    }


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The stored weights of a configuration, by name."""
    blank = _blank(config).state_dict()
    return {name: tuple(t.shape) for name, t in blank.items() if not (config.tie_embeddings and name == HEAD)}


def _blank(config: ModelConfig, dtype: torch.dtype | None = None) -> LanguageModel:
    """A model without values; drawing them on no device would still move the caller's random numbers on."""
    with torch.random.fork_rng(devices=[]):
        return LanguageModel(config, device="meta", dtype=dtype)


def assemble(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    source: Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """A model with exactly these weights, in evaluation mode; CheckpointError lists every misfit."""
    if dtype is not None:
        checks.choice("load", "dtype", dtype, checks.REAL_DTYPES)
    tensors = dict(tensors)
    if config.tie_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        embedding = tensors.setdefault(EMBEDDING, head)
        if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
            raise CheckpointError(
                f"{source}: tie_embeddings is true, yet {HEAD} differs from the embedding. Set it to false."
            )
    held = len({name[len(LAYERS) :].partition(".")[0] for name in tensors if name.startswith(LAYERS)})
    if config.n_layer > held:  # before as many are built as a damaged file may ask for
        raise CheckpointError(f"{source} does not fit its configuration: n_layer is {config.n_layer}, it holds {held}.")
    try:
        expected = expected_shapes(config)
    except MISFIT as error:
        reason = str(error).partition("\n")[0]  # torch adds its own stack
        raise CheckpointError(f"{source} does not fit its configuration, of impossible sizes: {reason}") from error
    problems = _misfits(expected, tensors)
    if problems:
        raise CheckpointError(f"{source} does not fit its configuration:\n  " + "\n  ".join(problems))
    model = _blank(config, dtype).to_empty(device=device or "cpu")
    model.tie_weights()  # to_empty gives each name its own memory
    with torch.no_grad():
        for name, place in model.state_dict().items():
            if name in tensors:  # all but a tied matrix's second name
                place.copy_(tensors[name])
    return model.eval()


def _misfits(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> list[str]:
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected: {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"wrong shape: {name} is {tuple(tensor.shape)}, expected {expected[name]}")
        elif not tensor.is_floating_point():
            problems.append(f"wrong dtype: {name} is {tensor.dtype}, expected floating point")
    return problems


def is_complete(path: Path) -> bool:
    """Whether a file of weights is ours and holds its configuration; False too if it is missing or damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            return HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a file; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy the whole directory.")
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}. Copy or download it again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds; CheckpointError if it is missing, damaged or no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON and encoding errors are ValueErrors
        raise CheckpointError(f"{path} cannot be read: {error}. Copy or download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object. Copy or download it again.")
    return values


def write_aside(target: Path, write: Callable[[Path], None], names: list[str]) -> None:
    """Have `write(folder)` make files aside, flush them to disk, then rename those in `names` into `target`, in order.

    Nothing of `target` changes before every file is complete; whatever goes wrong, the half-written ones are removed.
    """
    existed = target.is_dir()
    if target.exists() and not existed:
        raise checks.fail("save", f"{target} is a file, expected a directory.")
    aside = target / ASIDE  # inside, so that renaming never crosses file systems
    try:
        target.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
        aside.mkdir()
        write(aside)
        for name in names:
            flush(aside / name)
        for name in names:
            os.replace(aside / name, target / name)
        flush(target)
    except (SafetensorError, OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        unchanged = "The checkpoint that was there is untouched." if existed else "Nothing was written."
        raise OSError(f"save: {target} could not be written: {error}. {unchanged} Is the disk full?") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _refuse_foreign(target: Path) -> None:
    if (target / CONFIG).exists() and read_json(target / CONFIG).get("format") != FORMAT:
        raise checks.fail("save", f"{target} holds a model in another format.", "Choose another directory.")
