"""The format of Hugging Face transformers for Mamba, FalconMamba and Mamba-2, and of flash-linear-attention, which
registers Mamba-3 with it: config.json and safetensors, whole or sharded."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stateline import checks
from stateline.files import share
from stateline.interop.weights import read_weights, remove_others
from stateline.models import LanguageModel, ModelConfig
from stateline.models.checkpoint import HEAD, MISFIT, CheckpointError, assemble, read_json, weights, write_aside
from stateline.ops.ssd import check_limit

OURS, THEIRS = "backbone.embedding.weight", "backbone.embeddings.weight"


@dataclass(frozen=True)
class Kind:
    """One of their models. model, mixer: our field -> (their key, their default where a file leaves it out).

    fixed: arguments of our mixer that have one value there.   library: whose model it is.
    """

    name: str  # model_type
    layer: str
    architecture: str
    model: dict[str, tuple[str, Any]]
    mixer: dict[str, tuple[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)
    library: str = "transformers"


MAMBA = Kind(
    "mamba",
    "Mamba1",
    "MambaForCausalLM",
    {
        "d_model": ("hidden_size", 768),
        "n_layer": ("num_hidden_layers", 32),
        "vocab_size": ("vocab_size", 50280),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_embeddings": ("tie_word_embeddings", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    {
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
    },
)
MAMBA2 = Kind(
    "mamba2",
    "Mamba2",
    "Mamba2ForCausalLM",
    {
        "d_model": ("hidden_size", 4096),
        "n_layer": ("num_hidden_layers", 64),
        "vocab_size": ("vocab_size", 32768),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_embeddings": ("tie_word_embeddings", False),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    {
        "d_state": ("state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "expand": ("expand", 2),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 8),
        "dt_min": ("time_step_min", 0.001),
        "dt_max": ("time_step_max", 0.1),
        "dt_init_floor": ("time_step_floor", 1e-4),
        "dt_limit": ("time_step_limit", None),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
    },
)
MAMBA3 = Kind(
    "mamba3",
    "Mamba3",
    "Mamba3ForCausalLM",
    {
        "d_model": ("hidden_size", 2048),
        "n_layer": ("num_hidden_layers", 48),
        "vocab_size": ("vocab_size", 32000),
        "residual_in_fp32": ("residual_in_fp32", True),
        "tie_embeddings": ("tie_word_embeddings", False),
        "norm_eps": ("norm_eps", 1e-5),
    },
    {
        "d_state": ("state_size", 128),
        "expand": ("expand", 2),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "rope_fraction": ("rope_fraction", 0.5),
        "A_floor": ("A_floor", 1e-4),
        "dt_min": ("dt_min", 0.001),
        "dt_max": ("dt_max", 0.1),
        "dt_init_floor": ("dt_init_floor", 1e-4),
        "is_outproj_norm": ("is_outproj_norm", False),
        "is_mimo": ("is_mimo", False),
        "mimo_rank": ("mimo_rank", 4),
    },
    {"A_activation": "softplus"},  # whatever mamba_ssm has come to since
    "flash-linear-attention",
)
#: Mamba whose dt, B and C are normalised.
FALCON = replace(
    MAMBA,
    name="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    mixer=MAMBA.mixer | {"b_c_dt_rms_eps": ("mixer_rms_eps", 1e-6)},
)
KINDS = {kind.name: kind for kind in (MAMBA, MAMBA2, MAMBA3, FALCON)}
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
    """Their configuration of a kind in `KINDS` as ours. Keys about training or generation are left aside."""
    name = values.get("model_type")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(map(repr, KINDS))
        raise CheckpointError(f"{path} has model_type {name!r}; of Hugging Face's, these are supported: {known}.")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{path}: hidden_act is {values['hidden_act']!r}, supported is 'silu'.")
    ours = {name: values.get(key, default) for name, (key, default) in kind.model.items()}
    mixer = {name: _plain(values.get(key, default)) for name, (key, default) in kind.mixer.items()} | kind.fixed
    inner, width = values.get("intermediate_size"), ours["d_model"]
    if kind is FALCON and all(isinstance(size, int) and size > 0 for size in (inner, width)):
        mixer["expand"] = inner / width  # their files say 16 beside a width that is twice the model's, which counts
    if kind is MAMBA3 and values.get("use_bias", False):
        raise CheckpointError(f"{path}: use_bias is {values['use_bias']!r}, Mamba3's projections have none.")
    if kind in (MAMBA2, MAMBA3) and ours["norm_eps"] != 1e-5:  # theirs is one for all norms
        mixer["norm_eps"] = ours["norm_eps"]
    try:
        config = ModelConfig(**ours, ssm_cfg={"layer": kind.layer, **mixer}, pad_vocab_size_multiple=1)
    except MISFIT as error:
        raise CheckpointError(f"{path} describes a model that is not supported: {error}") from error
    made: Any = config.make_mixer(device="meta")
    for key, own, why in (
        ("intermediate_size", made.d_inner, "expand · hidden_size"),
        ("num_heads", getattr(made, "nheads", None), "expand · hidden_size / head_dim"),
    ):
        if own is not None and values.get(key, own) != own:
            raise CheckpointError(f"{path}: {key} is {values[key]}, {why} is {own}.")
    return config


def _plain(value: Any) -> Any:
    """Limits as we keep them: None for an infinite one, which they write in two ways."""
    if not isinstance(value, list | tuple):
        return value
    numbers = [float(v["__float__"]) if isinstance(v, dict) and "__float__" in v else v for v in value]
    return [None if isinstance(v, float) and math.isinf(v) else v for v in numbers]


def save(model: LanguageModel, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model so that transformers reads it as MambaForCausalLM, FalconMambaForCausalLM or Mamba2ForCausalLM, or,
    with flash-linear-attention imported, as Mamba3ForCausalLM.

    Other weights there go once these are written.
    Rows that only pad the embedding are left out. Raises ValueError for what these cannot express.
    """
    write(*contents(model, dtype), Path(directory))


def contents(model: LanguageModel, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, named weights) of a model as transformers has them; `dtype`: of the stored matrices."""
    values = write_config(model)
    tensors = weights(model, dtype)
    rows = model.config.vocab_size
    tensors[THEIRS] = tensors.pop(OURS)[:rows].contiguous()
    if HEAD in tensors:
        tensors[HEAD] = tensors[HEAD][:rows].contiguous()
    values["dtype"] = str(tensors[THEIRS].dtype).removeprefix("torch.")
    return values, tensors


def write(
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    directory: Path,
    more: Mapping[str, Callable[[Path], Any]] | None = None,
) -> None:
    """Put weights, then files by name (`more`: what writes each), then the configuration in their place."""
    others = dict(more or {})

    def make(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        share(folder / "model.safetensors")
        for name, put in others.items():
            put(folder / name)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    write_aside(directory, make, ["model.safetensors", *others, "config.json"])
    remove_others(directory, "model.safetensors")


def write_config(model: LanguageModel) -> dict[str, Any]:
    """Our configuration as theirs, every key explicit."""
    config = model.config
    mixer: Any = config.make_mixer(device="meta")
    kind = _kind(config, mixer)
    if wrong := problems(model):
        what = f"{kind.library} cannot express this model: {'; '.join(wrong)}."
        raise checks.fail("save", what, 'Use format="stateline".')
    given = _defaults(mixer, kind) | config.ssm_cfg | {"expand": int(mixer.expand)}
    values: dict[str, Any] = {"architectures": [kind.architecture], "model_type": kind.name}
    values |= {key: getattr(config, name) for name, (key, _) in kind.model.items()}
    values |= {key: given[name] for name, (key, _) in kind.mixer.items()}
    values |= {"intermediate_size": mixer.d_inner, "hidden_act": "silu"}
    if kind is MAMBA3:
        values |= {"use_bias": False, "num_heads": mixer.nheads, "chunk_size": 64}
    elif kind is MAMBA2:
        low, high = check_limit("save", mixer.dt_limit)
        # Python's JSON and theirs have an infinity.
        values |= {"time_step_limit": [max(low, 0.0), high], "num_heads": mixer.nheads, "chunk_size": 256}
    else:
        values["time_step_rank"] = mixer.dt_rank
    ids = model.metadata.get("huggingface", {})
    return values | {key: ids.get(key) for key in TOKEN_IDS}


def problems(model: LanguageModel) -> list[str]:
    """What of a model transformers, or flash-linear-attention, has no words for."""
    config = model.config
    mixer: Any = config.make_mixer(device="meta")
    kind = _kind(config, mixer)
    found = []
    if config.attn_layer_idx:
        found.append(f"attn_layer_idx is {config.attn_layer_idx} (no attention there)")
    if config.d_intermediate:
        found.append(f"d_intermediate is {config.d_intermediate} (no MLP there)")
    if not config.rms_norm:
        found.append("rms_norm is False (RMSNorm only there)")
    if mixer.expand != int(mixer.expand):
        found.append(f"expand is {mixer.expand} (whole numbers only there)")
    if kind is MAMBA2:
        found += beyond_mamba2(mixer, config.norm_eps)
    if kind is MAMBA3:
        found += _beyond_mamba3(mixer, config.norm_eps)
    return found


def _kind(config: ModelConfig, mixer: Any) -> Kind:
    """Theirs for the mixer of a model; ValueError for a mixer of the user's own."""
    layer = config.ssm_cfg.get("layer", "Mamba1")
    found = next((kind for kind in KINDS.values() if kind.layer == layer), None)
    if found is None:
        raise checks.fail("save", f"transformers has no mixer for {layer}.", 'Use format="stateline".')
    return FALCON if found is MAMBA and mixer.b_c_dt_rms_eps is not None else found


def _defaults(mixer: Any, kind: Kind) -> dict[str, Any]:
    """The arguments of our mixer that they have too, at our defaults, which need not be theirs."""
    parameters = inspect.signature(type(mixer)).parameters
    return {name: parameters[name].default for name in kind.mixer}


def beyond_mamba2(mixer: Any, eps: float) -> list[str]:
    """What their Mamba2, and llama.cpp's, has no words for."""
    problems = []
    if mixer.d_mlp:
        problems.append(f"d_ssm is {mixer.d_ssm} (all {mixer.d_inner} channels there)")
    if mixer.D_has_hdim:
        problems.append("D_has_hdim is True (one skip weight a head there)")
    if mixer.norm is None:
        problems.append("rmsnorm is False (always True there)")
    elif mixer.norm.norm_before_gate:
        problems.append("norm_before_gate is True (the gate comes first there)")
    elif mixer.norm.eps != eps:
        problems.append(f"the mixer's norm_eps is {mixer.norm.eps}, the model's {eps} (one for all norms there)")
    return problems


def _beyond_mamba3(mixer: Any, eps: float) -> list[str]:
    """What flash-linear-attention's Mamba3 has no words for, or does not run."""
    problems = []
    if mixer.A_activation != "softplus":
        problems.append(f"A_activation is {mixer.A_activation!r} ('softplus' there)")
    if mixer.is_mimo:
        problems.append("is_mimo is True (it runs one rank)")
    elif not mixer.rope_interleaved:
        problems.append("rope_interleaved is False (neighbours turn there)")
    if mixer.rope_fraction not in (0.5, 1.0) or not mixer.num_rope_angles:
        problems.append(f"rope_fraction is {mixer.rope_fraction} of {mixer.d_state} states (0.5 or 1.0 of some there)")
    if mixer.B_norm.eps != eps:
        problems.append(f"the mixer's norm_eps is {mixer.B_norm.eps}, the model's {eps} (one for all norms there)")
    return problems
