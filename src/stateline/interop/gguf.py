"""The format of llama.cpp: one file with weights, sizes and tokenizer, for programs that know nothing of Python.

Names, layouts and metadata are those of llama.cpp's own converter: A = −exp(A_log), convolutions (channels, taps), and
float32 for these, for D and for vectors.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stateline import checks
from stateline.interop import gguf_vocabulary
from stateline.interop.export import write_aside
from stateline.interop.gguf_layers import LAYERS, Layer, Tensors
from stateline.models import LanguageModel, checkpoint

OP = "save"
#: How matrices are kept. The last two in blocks of 32 along a row, with a scale each.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
BLOCKED, BLOCK = ("Q8_0", "Q4_0"), 32
KIND_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CONTEXT = 2**20  # as llama.cpp's converter says of models that have no limit


def save(
    model: LanguageModel, path: str | Path, kind: str | None = None, *, tokenizer: str | Path | None = None
) -> None:
    """Write a model as one GGUF file, whole or not at all; one that was there is replaced.

    Args:
        model: of Mamba layers with expand = 2, or of Mamba2 layers.
        path: the file.
        kind: of `KINDS`, how matrices are kept; None keeps their dtype. Q8_0 and Q4_0 want a d_model that is a multiple
            of 32, their block; a small matrix that does not fit beside it (that of the step sizes) is kept as F16.
        tokenizer: a directory with tokenizer.json, or "none" to write none, for programs that pass ids. None: the bytes
            themselves for a vocabulary of 256; refused for any other.

    Raises:
        ImportError: naming the extra `gguf`.
        ValueError, TypeError: what the format cannot express.
    """
    kind = KIND_OF.get(model_dtype(model), "F32") if kind is None else kind
    checks.choice(OP, "kind", kind, KINDS)
    model = checkpoint.plain(model)
    target = Path(path).expanduser()
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise checks.fail(OP, f"{target} cannot be written as a file.", "Give a file in a directory that exists.")
    writer = library(OP)
    layer = _layer(model)
    if kind in BLOCKED and model.config.d_model % BLOCK:
        raise checks.fail(
            OP, f"d_model is {model.config.d_model}, {kind} keeps rows in blocks of {BLOCK}.", "Use F16 or BF16."
        )
    vocabulary = gguf_vocabulary.read(tokenizer, model.config.vocab_size)

    def write(file: Path) -> None:
        out = writer.GGUFWriter(file, layer.arch)
        _describe(out, model, layer, writer)
        gguf_vocabulary.write(out, vocabulary, model.config.vocab_size)
        for name, values, is_matrix in _tensors(model, layer):
            _add(out, writer, name, values, kind if is_matrix else "F32")
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()

    write_aside(target, write, OP)


def model_dtype(model: LanguageModel) -> torch.dtype:
    """The dtype of a model's matrices."""
    return checkpoint.plain(model).backbone.embedding.weight.dtype


def library(op: str) -> ModuleType:
    """The package gguf, for an operation. Raises ImportError naming the extra."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{op}: GGUF files need the package gguf. pip install 'stateline[gguf]'") from error
    return gguf


def _layer(model: LanguageModel) -> Layer:
    """The kind of layer that all of a model's are; raises for what llama.cpp cannot express."""
    config = model.config
    mixers = [block.mixer for block in model.backbone.layers]
    odd = sorted({type(m).__name__ for m in mixers} - {cls.__name__ for cls in LAYERS})
    if odd or len({type(m) for m in mixers}) != 1:
        names = ", ".join(odd or sorted({type(m).__name__ for m in mixers}))
        raise checks.fail(OP, f"the model has layers of kind {names}, GGUF takes one of {_names()}.", OTHER)
    layer = LAYERS[type(mixers[0])]
    problems = layer.problems(mixers[0], config.norm_eps)
    if config.d_intermediate:
        problems.append(f"d_intermediate is {config.d_intermediate} (no MLP there)")
    if not config.rms_norm:
        problems.append("rms_norm is False (RMSNorm only there)")
    if problems:
        raise checks.fail(OP, f"llama.cpp cannot express this model: {'; '.join(problems)}.", OTHER)
    return layer


OTHER = 'Use format="stateline".'


def _names() -> str:
    return ", ".join(cls.__name__ for cls in LAYERS)


def _describe(out: Any, model: LanguageModel, layer: Layer, library: ModuleType) -> None:
    config = model.config
    out.add_name("stateline")
    out.add_quantization_version(library.GGML_QUANT_VERSION)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(config.d_model)
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(config.n_layer)
    out.add_layer_norm_rms_eps(config.norm_eps)
    out.add_vocab_size(config.vocab_size)
    layer.sizes(out, model.backbone.layers[0].mixer)


def _tensors(model: LanguageModel, layer: Layer) -> Tensors:
    rows = model.config.vocab_size  # those that pad the embedding stay here
    yield "token_embd.weight", model.backbone.embedding.weight[:rows], True
    yield "output_norm.weight", model.backbone.norm_f.weight, False
    if not model.config.tie_embeddings:
        yield "output.weight", model.lm_head.weight[:rows], True
    blocks: Any = model.backbone.layers
    for i, block in enumerate(blocks):
        yield f"blk.{i}.attn_norm.weight", block.norm.weight, False
        for name, values, is_matrix in layer.tensors(block.mixer):
            yield f"blk.{i}.{name}", values, is_matrix


def _add(out: Any, library: ModuleType, name: str, values: Tensor, kind: str) -> None:
    if kind in BLOCKED and values.shape[-1] % BLOCK:
        kind = "F16"
    array = values.detach().to("cpu", torch.float32).contiguous().numpy()
    stored = getattr(library.GGMLQuantizationType, kind)
    out.add_tensor(name, library.quants.quantize(array, stored), raw_dtype=stored)
