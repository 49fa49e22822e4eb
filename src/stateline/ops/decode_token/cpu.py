"""decode_token in C++: the same function as reference.py, over the kernel of cpu.cpp."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.decode_token import Layer, Matrix, Network, Norm
from stateline.ops.packed_linear.cpu import fields as matrix_fields

NO_MATRIX = (0,) * 6

#: What the kernel reads of a network, made once: fields of the call that never change, and the table of layers.
_known: WeakKeyDictionary[Network, tuple[tuple[int, ...], tuple[int, ...], Tensor]] = WeakKeyDictionary()


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
    k, d = first.taps.shape
    hidden = 0 if first.mlp is None else first.mlp[2].columns
    widths = (network.head.columns, d, first.A2.shape[1], first.dt_proj.columns, k, hidden)
    table = torch.tensor([number for layer in network.layers for number in _layer(layer)], dtype=torch.int64)
    sizes = (len(network.layers), *widths, native.double_bits(network.eps))
    return sizes, (*_norm(network.norm), *_matrix(network.embedding), *_matrix(network.head)), table


def _layer(layer: Layer) -> tuple[int, ...]:
    own = (layer.taps, layer.conv_bias, layer.A2, layer.D, layer.dt_bias)
    mlp: tuple[int, ...] = (0, 0, *NO_MATRIX, *NO_MATRIX)
    if layer.mlp is not None:
        norm, fc1, fc2 = layer.mlp
        mlp = (*_norm(norm), *_matrix(fc1), *_matrix(fc2))
    matrices = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    return (
        *_norm(layer.norm), *(number for m in matrices for number in _matrix(m)), *map(native.pointer, own), *mlp
    )  # fmt: skip


def _norm(norm: Norm) -> tuple[int, int]:
    return native.pointer(norm.weight), native.pointer(norm.bias)


def _matrix(m: Matrix) -> tuple[int, ...]:
    return matrix_fields(m.data, m.scales, m.bias, m.format, m.rows, m.columns)
