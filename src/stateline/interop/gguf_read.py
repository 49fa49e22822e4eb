"""GGUF files of Mamba and Mamba-2, as llama.cpp's tools and `gguf.save` write them, as models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateline.interop import gguf_vocabulary
from stateline.interop.gguf import KIND_OF, library
from stateline.interop.gguf_layers import LAYERS, Fields, Layer
from stateline.models import LanguageModel, ModelConfig
from stateline.models.checkpoint import HEAD, MISFIT, CheckpointError, assemble

AGAIN = "Copy or download it again."
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
OUTSIDE = {EMBEDDING: "backbone.embedding.weight", "output_norm.weight": "backbone.norm_f.weight", OUTPUT: HEAD}


def load(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model in a GGUF file; matrices that were rounded to fewer bits come as the numbers that were kept.

    dtype: None is the file's for F32, F16 and BF16, float32 for anything that gguf can unpack.

    Raises CheckpointError naming the file and what is missing, damaged or not supported; ImportError naming the extra.
    """
    source = Path(path)
    values, found = _open(source)
    layer, fields = _describe(values, source)
    if EMBEDDING not in found:
        raise CheckpointError(f"{source} has no {EMBEDDING}. {AGAIN}")
    config = _config(layer, fields, found, source)
    tensors = _tensors(layer, config, found, source)
    stored = {name: kept for kept, name in KIND_OF.items()}.get(found[EMBEDDING].tensor_type.name)
    return assemble(config, tensors, source, device=device, dtype=dtype or stored)


def is_file(path: Path) -> bool:
    """Whether a GGUF file lies there: by its name, or by how it begins."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def write_tokenizer(path: Path, directory: Path) -> None:
    """Write the vocabulary of a GGUF file as tokenizer.json and tokenizer_config.json; nothing for bytes or none.

    Raises CheckpointError for a vocabulary that is no byte-level BPE cut as GPT-2's is.
    """
    known, _ = _open(path, vocabulary=True)
    try:
        files = gguf_vocabulary.files(known)
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its vocabulary lacks {error}. {AGAIN}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error} `stateline convert --no-tokenizer` leaves it out.") from error
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _open(path: Path, *, vocabulary: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's metadata, those about its vocabulary or the others, and its tensors, by name."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    gguf = library("load")
    try:
        reader = gguf.GGUFReader(path)
        wanted = [name for name in reader.fields if name.startswith("tokenizer.") == vocabulary]
        values = {name: reader.fields[name].contents() for name in wanted}
        return values, {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # what the reader raises depends on the damage
        raise CheckpointError(f"{path} is no GGUF file, or damaged: {error}. {AGAIN}") from error


def _describe(values: dict[str, Any], path: Path) -> tuple[Layer, Fields]:
    """The kind of layer in a file, and its metadata without the architecture's name before them."""
    arch = values.get("general.architecture")
    layer = next((layer for layer in LAYERS.values() if layer.arch == arch), None)
    if layer is None:
        known = " and ".join(repr(layer.arch) for layer in LAYERS.values())
        raise CheckpointError(f"{path} holds a model of architecture {arch!r}; {known} are supported.")
    return layer, {name.removeprefix(f"{arch}."): value for name, value in values.items()}


def _config(layer: Layer, fields: Fields, found: dict[str, Any], path: Path) -> ModelConfig:
    try:
        d_model, eps = fields["embedding_length"], float(f"{fields['attention.layer_norm_rms_epsilon']:.7g}")
        mixer = {"layer": layer.name, **layer.options(fields, d_model)}
        if layer.arch == "mamba2" and eps != 1e-5:  # one for all norms there
            mixer["norm_eps"] = eps
        return ModelConfig(
            d_model=d_model,
            n_layer=fields["block_count"],
            vocab_size=int(found[EMBEDDING].shape[1]),
            ssm_cfg=mixer,
            pad_vocab_size_multiple=1,
            tie_embeddings=OUTPUT not in found,
            norm_eps=eps,
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the metadata {error}. {AGAIN}") from error
    except (*MISFIT, ArithmeticError) as error:
        raise CheckpointError(f"{path} describes a model that is not supported: {error}") from error


def _tensors(layer: Layer, config: ModelConfig, found: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """A file's tensors by our names; those that have none keep theirs, for `assemble` to name."""
    blank = config.make_mixer(device="meta")
    weights = {weight.theirs: weight for weight in layer.weights}
    tensors: dict[str, Tensor] = {}
    for name, stored in found.items():
        values = _numbers(stored, path)
        prefix, block, inner = [*name.split(".", 2), "", ""][:3]
        try:
            if name in OUTSIDE:
                tensors[OUTSIDE[name]] = values
            elif prefix != "blk":
                tensors[name] = values
            elif inner == "attn_norm.weight":
                tensors[f"backbone.layers.{block}.norm.weight"] = values
            elif inner in weights:
                weight = weights[inner]
                tensors[f"backbone.layers.{block}.mixer.{weight.ours}"] = weight.here(values, blank)
            else:
                tensors[name] = values
        except ValueError as error:
            raise CheckpointError(f"{path}: {name} {error}. {AGAIN}") from error
    return tensors


def _numbers(stored: Any, path: Path) -> Tensor:
    """What a tensor of a file stands for, float32."""
    try:
        values = library("load").quants.dequantize(stored.data, stored.tensor_type)
    except NotImplementedError as error:
        kind = stored.tensor_type.name
        raise CheckpointError(f"{path}: {stored.name} is stored as {kind}, which gguf cannot unpack.") from error
    return torch.from_numpy(values.astype("float32"))  # a copy: the file is only mapped
