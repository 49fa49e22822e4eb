"""Layers: each continues a sequence from a state, in any pieces, and gives the state back."""

from stateline.nn.attention import Attention, AttentionState
from stateline.nn.block import Block, GatedMLP
from stateline.nn.groups import param_groups
from stateline.nn.linear import PackedEmbedding, PackedLinear
from stateline.nn.mamba import Mamba, MambaState
from stateline.nn.mamba2 import Mamba2, Mamba2State
from stateline.nn.mamba3 import Mamba3, Mamba3State
from stateline.nn.mixer import Mixer
from stateline.nn.norm import GatedRMSNorm, LayerNorm, RMSNorm
from stateline.nn.s4 import S4D, S4DState
from stateline.nn.wrappers import Bidirectional, Scan2d

__all__ = [
    "Attention",
    "AttentionState",
    "Bidirectional",
    "Block",
    "GatedMLP",
    "GatedRMSNorm",
    "LayerNorm",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "MambaState",
    "Mixer",
    "PackedEmbedding",
    "PackedLinear",
    "RMSNorm",
    "S4D",
    "S4DState",
    "Scan2d",
    "param_groups",
]
