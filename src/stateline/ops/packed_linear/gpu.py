"""packed_linear on a GPU: the matrix laid out plainly for the time of the call, then the library's product in bfloat16.

For many rows of x, prompts above all; one token goes through `decode_token`. x is rounded to bfloat16 in every format,
and so are int4's weights; sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.cuda import DTYPES as DTYPES
from stateline.ops.packed_linear.pack import unpack


def forward(
    x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    """x (m, columns) -> y (m, rows) in x's dtype."""
    scale = scales[:rows] if format == "int8" else None
    weight = unpack(data, torch.ones_like(scales) if format == "int8" else scales, format, rows, columns)
    y = torch.mm(x.bfloat16(), weight.bfloat16().T, out_dtype=torch.float32)
    if scale is not None:
        y *= scale
    return (y if bias is None else y + bias).to(x.dtype)
