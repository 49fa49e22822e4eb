"""What a new model can mix with along time: the names of --mixer, the settings each has, its arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stateline.training.config import ShapeConfig

#: What --mixer and --activation may name, spelled out since this module imports no torch.
MIXERS = ("Mamba1", "Mamba2", "Mamba3", "GatedSSM", "S4", "S4D", "S5")
ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid")
#: Those with a short convolution, those with an inner width, those whose states come in pairs.
CONVOLVED, WIDE, PAIRED = ("Mamba1", "Mamba2"), ("Mamba1", "Mamba2", "Mamba3", "GatedSSM"), ("S4", "S4D", "S5")
#: Channels of a head of Mamba-2 and Mamba-3.
HEAD = 64


def check(shape: ShapeConfig) -> None:
    """Raise ValueError for a setting that the mixer does not have."""
    mixer, default = shape.mixer, type(shape)()
    if mixer not in CONVOLVED and shape.d_conv != default.d_conv:
        raise ValueError(f"train: d_conv is {shape.d_conv}, but mixer is {mixer!r}, which has no convolution.")
    if mixer not in WIDE and shape.expand != default.expand:
        raise ValueError(f"train: expand is {shape.expand}, but mixer is {mixer!r}, which has no inner width.")
    if mixer == "GatedSSM" and shape.d_state != default.d_state:
        problem = f"train: d_state is {shape.d_state}, but mixer is 'GatedSSM', whose state has expand · d_model"
        raise ValueError(f"{problem} numbers. Set expand.")
    if mixer in PAIRED and shape.d_state % 2:
        raise ValueError(f"train: d_state is {shape.d_state}, but mixer is {mixer!r}, whose states come in pairs.")
    for name in ("activation", "gate"):
        if mixer != "GatedSSM" and (value := getattr(shape, name)) is not None:
            raise ValueError(f"train: {name} is {value!r}, but mixer is {mixer!r}: GatedSSM's.")
    if mixer != "Mamba3" and shape.mimo_rank > 1:
        raise ValueError(f"train: mimo_rank is {shape.mimo_rank}, but mixer is {mixer!r}: Mamba3's.")


def arguments(shape: ShapeConfig, d_model: int) -> dict[str, Any]:
    """ModelConfig's ssm_cfg. Mamba-2 and 3 get heads of 64 channels, fewer where 64 do not divide the inner width."""
    mixer = shape.mixer
    if mixer == "GatedSSM":
        chosen = {} if shape.activation is None else {"activation": shape.activation}
        if shape.gate == "tfidf":
            chosen["gate"] = "given"
        return {"layer": mixer, "d_state": shape.expand * d_model, **chosen}
    options: dict[str, Any] = {"d_state": shape.d_state}
    if mixer in WIDE:
        options["expand"] = shape.expand
    if mixer in CONVOLVED:
        options["d_conv"] = shape.d_conv
    if mixer == "Mamba1":
        return options
    if mixer in ("Mamba2", "Mamba3"):
        options["headdim"] = math.gcd(HEAD, shape.expand * d_model)
    if mixer == "Mamba3" and shape.mimo_rank > 1:
        options |= {"is_mimo": True, "mimo_rank": shape.mimo_rank}
    return {"layer": mixer, **options}
