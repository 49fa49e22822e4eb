"""decode_token in C++: the same function as reference.py, over the kernel of cpu.cpp."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.decode_token import HeadLayer, Layer, Matrix, Network, Norm
from stateline.ops.packed_linear.cpu import fields as matrix_fields

NO_MATRIX = (0,) * 6
NO_HEADS = (0,) * 8

#: What the kernel reads of a network, made once: fields of the call that never change, and the table of layers.
_known: WeakKeyDictionary[Network, tuple[tuple[int, ...], tuple[int, ...], Tensor]] = WeakKeyDictionary()


def problem(*args: object) -> str | None:
    """Why the kernel does not cover the network among the arguments, or None if it does."""
    network = next((x for x in args if isinstance(x, Network)), None)
    if network is not None and any(isinstance(layer, HeadLayer) and layer.heads.narrow for layer in network.layers):
        return "it keeps states in float32, these are bfloat16."
    return None


def step(states: Sequence[Tensor], ids: Tensor, network: Network) -> Tensor:
    """ids (b) -> logits (b, v), writing into states."""
    if network not in _known:
        _known[network] = _describe(network)
    sizes, matrices, table = _known[network]
    b = ids.shape[0]
    logits = torch.empty(b, network.head.rows)
    addresses = array("q", [x.data_ptr() for x in states])
    where = (b, *sizes[:-1], torch.get_num_threads(), sizes[-1], table.data_ptr())
    native.call("decode_token", (*where, *matrices, ids.data_ptr(), addresses.buffer_info()[0], logits.data_ptr()))
    if not states[0].is_inference():
        torch.autograd.graph.increment_version([x for x in states if not x.is_inference()])
    return logits


def _describe(network: Network) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """Sizes with the bits of eps last, norm and matrices of both ends, and the layers' table."""
    first = network.layers[0]
    hidden = 0 if first.mlp is None else first.mlp[2].columns
    n, rank = (first.A2.shape[1], first.dt_proj.columns) if isinstance(first, Layer) else (first.heads.n, 0)
    widths = (network.head.columns, first.D.shape[0], n, rank, first.taps.shape[0], hidden)
    table = torch.tensor([number for layer in network.layers for number in _layer(layer)], dtype=torch.int64)
    sizes = (len(network.layers), *widths, *_heads(first), native.double_bits(network.eps))
    return sizes, (*_norm(network.norm), *_matrix(network.embedding), *_matrix(network.head)), table


def _heads(layer: Layer | HeadLayer) -> tuple[int, ...]:
    """Count, groups, width beside, flags, limits and epsilon of Mamba-2's heads; zeros for Mamba-1."""
    if isinstance(layer, Layer):
        return NO_HEADS
    s = layer.heads
    numbers = (native.double_bits(x) for x in (s.low, s.high, s.eps))
    return (layer.A.shape[0], s.g, s.beside, s.normalise, s.gate_last, *numbers)


def _layer(layer: Layer | HeadLayer) -> tuple[int, ...]:
    mlp: tuple[int, ...] = (0, 0, *NO_MATRIX, *NO_MATRIX)
    if layer.mlp is not None:
        norm, fc1, fc2 = layer.mlp
        mlp = (*_norm(norm), *_matrix(fc1), *_matrix(fc2))
    if isinstance(layer, Layer):
        inner, A, scale = (*_matrix(layer.x_proj), *_matrix(layer.dt_proj)), layer.A2, None
    else:
        inner, A, scale = NO_MATRIX + NO_MATRIX, layer.A, layer.scale
    own = (layer.taps, layer.conv_bias, A, layer.D, layer.dt_bias, scale)
    matrices = (*_matrix(layer.in_proj), *inner, *_matrix(layer.out_proj))
    return (*_norm(layer.norm), *matrices, *map(native.pointer, own), *mlp)


def _norm(norm: Norm) -> tuple[int, int]:
    return native.pointer(norm.weight), native.pointer(norm.bias)


def _matrix(m: Matrix) -> tuple[int, ...]:
    return matrix_fields(m.data, m.scales, m.bias, m.format, m.rows, m.columns)
