"""The format of Hugging Face transformers for Mamba: config.json and safetensors, whole or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stateline import checks
from stateline.files import share
from stateline.interop.weights import read_weights, remove_others
from stateline.models import LanguageModel, ModelConfig
from stateline.models.checkpoint import HEAD, MISFIT, CheckpointError, assemble, read_json, weights, write_aside

MODEL_TYPE = "mamba"
OURS, THEIRS = "backbone.embedding.weight", "backbone.embeddings.weight"

#: Our field -> (their key, their default where a file leaves it out).
MODEL_KEYS: dict[str, tuple[str, Any]] = {
    "d_model": ("hidden_size", 768),
    "n_layer": ("num_hidden_layers", 32),
    "vocab_size": ("vocab_size", 50280),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_word_embeddings", True),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
MIXER_KEYS: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init": ("time_step_init_scheme", "random"),
    "dt_scale": ("time_step_scale", 1.0),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
}
#: Carried through in metadata["huggingface"]: they say nothing about the model, but generation there needs them.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load(
    directory: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model in a Hugging Face directory. CheckpointError names what is missing, damaged or not supported."""
    source = Path(directory)
    values = read_json(source / "config.json")
    config = read_config(values, source / "config.json")
    tensors, blame = read_weights(source)
    if THEIRS in tensors:
        tensors[OURS] = tensors.pop(THEIRS)
    stored = tensors.get(OURS)
    model = assemble(config, tensors, blame, device=device, dtype=dtype or (None if stored is None else stored.dtype))
    model.metadata = {"huggingface": {key: values[key] for key in TOKEN_IDS if key in values}}
    return model


def read_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """transformers' MambaConfig as ours. Keys about training or generation are left aside."""
    kind = values.get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{path} has model_type {kind!r}; of Hugging Face's, {MODEL_TYPE!r} is supported.")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{path}: hidden_act is {values['hidden_act']!r}, supported is 'silu'.")
    ours = {name: values.get(key, default) for name, (key, default) in MODEL_KEYS.items()}
    mixer = {name: values.get(key, default) for name, (key, default) in MIXER_KEYS.items()}
    try:
        config = ModelConfig(**ours, ssm_cfg={"layer": "Mamba1", **mixer}, pad_vocab_size_multiple=1)
    except MISFIT as error:
        raise CheckpointError(f"{path} describes a model that is not supported: {error}") from error
    inner = int(mixer["expand"] * config.d_model)
    if values.get("intermediate_size", inner) != inner:
        raise CheckpointError(
            f"{path}: intermediate_size is {values['intermediate_size']}, expand · hidden_size is {inner}."
        )
    return config


def save(model: LanguageModel, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model so that transformers' MambaForCausalLM reads it; other weights there go once these are written.

    Rows that only pad the embedding are left out. Raises ValueError for what transformers cannot express.
    """
    values = write_config(model)
    tensors = weights(model, dtype)
    rows = model.config.vocab_size
    tensors[THEIRS] = tensors.pop(OURS)[:rows].contiguous()
    if HEAD in tensors:
        tensors[HEAD] = tensors[HEAD][:rows].contiguous()
    values["dtype"] = str(tensors[THEIRS].dtype).removeprefix("torch.")

    def write(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        share(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    write_aside(Path(directory), write, ["model.safetensors", "config.json"])
    remove_others(Path(directory), "model.safetensors")


def write_config(model: LanguageModel) -> dict[str, Any]:
    """Our configuration as transformers' MambaConfig, every key explicit."""
    config = model.config
    mixer: Any = config.make_mixer(device="meta")
    problems = []
    if config.attn_layer_idx:
        problems.append(f"attn_layer_idx is {config.attn_layer_idx} (no attention there)")
    if config.d_intermediate:
        problems.append(f"d_intermediate is {config.d_intermediate} (no MLP there)")
    if not config.rms_norm:
        problems.append("rms_norm is False (RMSNorm only there)")
    if mixer.expand != int(mixer.expand):
        problems.append(f"expand is {mixer.expand} (whole numbers only there)")
    if problems:
        raise checks.fail(
            "save", f"transformers cannot express this model: {'; '.join(problems)}.", 'Use format="stateline".'
        )
    given = {name: default for name, (_, default) in MIXER_KEYS.items()} | config.ssm_cfg
    given.update(expand=int(mixer.expand), dt_rank=mixer.dt_rank)
    values: dict[str, Any] = {"architectures": ["MambaForCausalLM"], "model_type": MODEL_TYPE}
    values |= {key: getattr(config, name) for name, (key, _) in MODEL_KEYS.items()}
    values |= {key: given[name] for name, (key, _) in MIXER_KEYS.items()}
    values |= {"intermediate_size": mixer.d_inner, "hidden_act": "silu"}
    ids = model.metadata.get("huggingface", {})
    return values | {key: ids.get(key) for key in TOKEN_IDS}
