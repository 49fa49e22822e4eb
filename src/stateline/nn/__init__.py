"""Layers: each continues a sequence from a state, in any pieces, and gives the state back."""

from stateline.nn.block import Block, GatedMLP
from stateline.nn.groups import param_groups
from stateline.nn.linear import PackedEmbedding, PackedLinear
from stateline.nn.mamba import Mamba, MambaState
from stateline.nn.mamba2 import Mamba2, Mamba2State
from stateline.nn.mixer import Mixer
from stateline.nn.norm import GatedRMSNorm, LayerNorm, RMSNorm

__all__ = [
    "Block",
    "GatedMLP",
    "GatedRMSNorm",
    "LayerNorm",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "Mixer",
    "PackedEmbedding",
    "PackedLinear",
    "RMSNorm",
    "param_groups",
]
