"""The format of mamba_ssm and the `state-spaces/*` checkpoints: config.json and pytorch_model.bin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stateline import checks
from stateline.interop.weights import read_weights, remove_others
from stateline.models import LanguageModel, ModelConfig
from stateline.models.checkpoint import HEAD, MISFIT, CheckpointError, assemble, read_json, weights, write_aside
from stateline.ops.ssd import check_limit

LAYERS = ("Mamba1", "Mamba2", "Mamba3")
EPS = 1e-5  # mamba_ssm's norms have no other, and its configuration no field for it

#: mamba_ssm's defaults, for keys that older files lack; None: no default, the key must be there.
DEFAULTS: dict[str, Any] = {
    "d_model": None, "n_layer": None, "vocab_size": None, "d_intermediate": 0, "ssm_cfg": {}, "rms_norm": True,
    "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True, "attn_layer_idx": [],
    "attn_cfg": {},
}  # fmt: skip
KERNELS = "fused_add_norm"  # a key that chooses kernels: its values change nothing
#: Arguments of its mixers that choose kernels, or how work is cut for them.
KERNEL_CHOICES = ("use_fast_path", "use_mem_eff_path", "chunk_size", "fuse_pregate_headwise_norm")
#: Arguments of our attention that mamba_ssm's lacks.
OWN = ("window", "max_tokens", "cache_dtype")

#: Mixers that mamba_ssm has.
LAYERS = ("Mamba1", "Mamba2", "Mamba3")


def load(
    directory: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model in a mamba_ssm directory. CheckpointError names what is missing, damaged or not supported."""
    source = Path(directory)
    config = read_config(source / "config.json")
    tensors, blame = read_weights(source)
    stored = tensors.get("backbone.embedding.weight")
    return assemble(config, tensors, blame, device=device, dtype=dtype or (None if stored is None else stored.dtype))


def read_config(path: Path) -> ModelConfig:
    """mamba_ssm's config.json as ours; what only chooses kernels there is dropped."""
    values = read_json(path)
    if not isinstance(values.pop(KERNELS, True), bool):
        raise CheckpointError(f"{path}: {KERNELS} is neither true nor false. Copy or download it again.")
    unknown = sorted(set(values) - set(DEFAULTS))
    if unknown:
        raise CheckpointError(
            f"{path} has unknown keys {', '.join(unknown)}; known are {', '.join([*DEFAULTS, KERNELS])}."
        )
    values = {**DEFAULTS, **values}
    for key in ("attn_layer_idx", "attn_cfg"):
        values[key] = values[key] or DEFAULTS[key]
    _check_attention(values, path)
    lost = [key for key, value in values.items() if value is None]
    if lost:
        raise CheckpointError(f"{path} lacks {', '.join(lost)}. Copy or download it again.")
    if isinstance(values["ssm_cfg"], dict):
        values["ssm_cfg"] = {key: v for key, v in values["ssm_cfg"].items() if key not in KERNEL_CHOICES}
    try:
        return ModelConfig(**values, norm_eps=EPS)
    except MISFIT as error:
        raise CheckpointError(f"{path} describes a model that is not supported: {error}") from error


def _check_attention(values: dict[str, Any], path: Path) -> None:
    """What our configuration would read otherwise than mamba_ssm does."""
    if not values["attn_layer_idx"]:
        values["attn_cfg"] = {}  # unused, and allowed there
    elif isinstance(values["attn_cfg"], dict):
        if values["attn_cfg"].get("causal", False) is not True:
            raise CheckpointError(f"{path}: attn_cfg is not causal; a language model must be. Set causal to true.")
        if own := [key for key in OWN if key in values["attn_cfg"]]:
            raise CheckpointError(f"{path}: attn_cfg has unknown keys {', '.join(own)}.")


#: Mixers that it has, too.
LAYERS = ("Mamba1", "Mamba2", "Mamba3")


def save(model: LanguageModel, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a model so that mamba_ssm's `from_pretrained` reads it; other weights there go once these are written."""
    config = model.config
    if config.norm_eps != EPS:
        raise checks.fail(
            "save", f"norm_eps is {config.norm_eps}, mamba_ssm has only {EPS}.", 'Use format="stateline".'
        )
    if config.attn_cfg.get("window") is not None:
        problem = f"attention has a window of {config.attn_cfg['window']} tokens, mamba_ssm's has none."
        raise checks.fail("save", problem, 'Use format="stateline".')
    values = {key: value for key, value in config.to_dict().items() if key != "norm_eps"}
    values["ssm_cfg"] = _their_mixer(config.ssm_cfg)
    values.update(attn_layer_idx=config.attn_layer_idx, attn_cfg={}, fused_add_norm=True)
    if config.attn_layer_idx:  # how a cache is kept is no property of the model there
        known = {key: value for key, value in config.attn_cfg.items() if key not in OWN}
        values["attn_cfg"] = known | {"causal": True}
    tensors = weights(model, dtype)
    if config.tie_embeddings:  # mamba_ssm stores it all the same
        tensors[HEAD] = tensors["backbone.embedding.weight"]

    def write(folder: Path) -> None:
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    write_aside(Path(directory), write, ["pytorch_model.bin", "config.json"])
    remove_others(Path(directory), "pytorch_model.bin")


def _their_mixer(ours: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our mixer as its own takes them: both limits of dt are numbers, and its norm has one eps."""
    theirs = dict(ours)
    if (name := theirs.get("layer", "Mamba1")) not in LAYERS:
        problem = f"the mixer is {name!r}, mamba_ssm has {', '.join(LAYERS)}."
        raise checks.fail("save", problem, 'Use format="stateline".')
    if theirs.pop("norm_eps", EPS) != EPS:
        raise checks.fail(
            "save", f"the mixer's norm_eps is {ours['norm_eps']}, mamba_ssm has only {EPS}.", 'Use format="stateline".'
        )
    if theirs.pop("b_c_dt_rms_eps", None) is not None:
        raise checks.fail(
            "save", "b_c_dt_rms_eps is set, mamba_ssm's Mamba does not normalise dt, B and C.",
            'Use format="huggingface".',
        )  # fmt: skip
    if "dt_limit" in theirs:
        low, high = check_limit("save", theirs["dt_limit"])
        theirs["dt_limit"] = [max(low, 0.0), high]  # after softplus, which is never below 0
    return _their_mamba3(theirs) if theirs.get("layer") == "Mamba3" else theirs


def _their_mamba3(theirs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Mamba3 as its own takes them: it ignores what it does not know, so nothing of that may matter."""
    fraction, ranks = theirs.get("rope_fraction", 0.5), theirs.get("is_mimo", False)
    activation, neighbours = theirs.pop("A_activation", "heavy_tail"), theirs.pop("rope_interleaved", None)
    problem = ""
    if activation != "heavy_tail":
        problem = f"A_activation is {activation!r}, mamba_ssm's Mamba3 has only 'heavy_tail'."
    elif neighbours not in (None, not ranks):
        problem = f"rope_interleaved is {neighbours} with is_mimo {ranks}, mamba_ssm's Mamba3 has {not ranks} there."
    elif fraction not in (0.5, 1.0) or int(theirs.get("d_state", 128) * fraction) < 2:
        problem = f"rope_fraction is {fraction}, mamba_ssm's Mamba3 has 0.5 and 1.0, of two states at least."
    if problem:
        raise checks.fail("save", problem, 'Use format="stateline".')
    return theirs
