"""Matrices rounded and laid out for `packed_linear`; native/packed.h describes the layout for the kernels.

Rows come in blocks of 16, one row a lane of four bytes, so that a product broadcasts a number of x to 16 outputs:
bf16 (blocks, columns/2, 16, 2), int8 (blocks, columns/4, 16, 4), int4 (blocks, columns/8, 16, 4), two columns a byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16  # rows of a block
GROUP = 32  # columns of an int4 scale
FORMATS = ("bf16", "int8", "int4")
#: Columns of one lane of four bytes, and what columns are padded to.
COLUMNS = {"bf16": (2, 2), "int8": (4, 4), "int4": (8, GROUP)}
#: Scales tried for a group of int4 weights, as shares of the one that just holds the largest.
SHARES = tuple(0.7 + 0.05 * i for i in range(8))


def pack(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> data (bytes,) uint8 and scales.

    bf16: no scales (0,). int8: float32 (padded rows,), absmax / 127 of each row. int4: bfloat16 (blocks, groups, 16),
    for the 32 columns of a group the scale, out of a few, that loses least in squares; weights are -8 … 7 times it.
    """
    weight = weight.detach().float()
    rows, columns = weight.shape
    lane, multiple = COLUMNS[format]
    weight = F.pad(weight, (0, -columns % multiple, 0, -rows % LANES))
    if format == "bf16":
        return _blocks(weight.bfloat16(), lane), weight.new_empty(0)
    if format == "int8":
        scales = weight.abs().amax(1) / 127
        quanta = (weight / _nonzero(scales)[:, None]).round_().clamp_(-127, 127)
        return _blocks((quanta + 128).to(torch.uint8), lane), scales
    groups = weight.unflatten(1, (-1, GROUP))
    scales = _best_scales(groups)
    quanta = (_quanta(groups, scales).flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2, 4))
    data = _blocks((quanta[:, :, 0] | quanta[:, :, 1] << 4).flatten(1), 4)
    return data, scales.bfloat16().unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def unpack(data: Tensor, scales: Tensor, format: str, rows: int, columns: int) -> Tensor:
    """The weights that `pack` kept, (rows, columns) float32."""
    lane, multiple = COLUMNS[format]
    padded = columns + -columns % multiple
    if format == "bf16":  # of whole matrices often, on a GPU at every call: one copy
        blocks = data.view(torch.bfloat16).view(-1, padded // lane, LANES, lane)
        return blocks.transpose(1, 2).reshape(-1, padded)[:rows, :columns].float()
    return unpack_rows(data, scales, format, torch.arange(rows, device=data.device), columns)


def unpack_rows(data: Tensor, scales: Tensor, format: str, rows: Tensor, columns: int) -> Tensor:
    """Chosen rows (…) of a packed matrix -> (…, columns) float32."""
    lane, multiple = COLUMNS[format]
    padded = columns + -columns % multiple
    block, row = rows // LANES, rows % LANES
    if format == "bf16":
        return (
            data.view(torch.bfloat16)
            .view(-1, padded // lane, LANES, lane)[block, :, row]
            .flatten(-2)[..., :columns]
            .float()
        )
    lanes = data.view(-1, padded // lane, LANES, 4)[block, :, row]
    if format == "int8":
        return (lanes.flatten(-2)[..., :columns].float() - 128) * scales[rows][..., None]
    quanta = torch.stack([lanes & 15, lanes >> 4], -2).flatten(-3).float() - 8
    groups = scales[block, :, row].float()
    return (quanta.unflatten(-1, (-1, GROUP)) * groups[..., None]).flatten(-2)[..., :columns]


def _blocks(weight: Tensor, lane: int) -> Tensor:
    """(rows, columns) -> bytes of (blocks, columns/lane, 16, lane)."""
    blocks = weight.unflatten(0, (-1, LANES)).unflatten(2, (-1, lane)).transpose(1, 2)
    return blocks.contiguous().flatten().view(torch.uint8)


def _best_scales(groups: Tensor) -> Tensor:
    """(rows, groups, 32) -> the scale (rows, groups) of least squared loss, as bfloat16 keeps it."""
    # The number of largest magnitude takes -8, the side with one step more.
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2) / -8
    best, least = largest.bfloat16().float(), torch.full_like(largest, torch.inf)
    for share in SHARES:
        scales = (largest * share).bfloat16().float()
        loss = (_quanta(groups, scales) * scales[..., None] - groups).square_().sum(2)
        best, least = torch.where(loss < least, scales, best), torch.minimum(loss, least)
    return best


def _quanta(groups: Tensor, scales: Tensor) -> Tensor:
    return (groups / _nonzero(scales)[..., None]).round_().clamp_(-8, 7)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
