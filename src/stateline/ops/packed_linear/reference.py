"""packed_linear in PyTorch: the definition.

y = x̃ W̃ᵀ + bias with W̃ the weights that packing kept and x̃ what the format multiplies: x in bfloat16 for bf16; for
integers round(x·s)/s with s = 32639 / max|x| of each row, halves away from zero. A row whose step 1/s is no normal
number (max|x| below 4e-34) counts as zeros; one that holds an infinity or NaN gives no finite number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops.packed_linear.pack import unpack

LARGEST = 32639.0  # 127·256 + 127: two signed bytes
SMALLEST = torch.finfo(torch.float32).tiny  # of the steps between two products; s itself overflows soon below


def rounded(x: Tensor, format: str) -> Tensor:
    """x (m, columns) float32 as products of this format see it."""
    if format == "bf16":
        return x.bfloat16().float()
    largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < LARGEST * SMALLEST, 0.0, largest)
    factor = torch.where(largest > 0, LARGEST / largest, 0.0)
    scaled = x * factor
    return torch.trunc(scaled + torch.copysign(torch.full_like(x, 0.5), scaled)) * (largest / LARGEST)


def forward(
    x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, format: str, rows: int, columns: int
) -> Tensor:
    """x (m, columns) -> y (m, rows) in x's dtype."""
    y = rounded(x.float(), format) @ unpack(data, scales, format, rows, columns).to(x.device).T
    return (y if bias is None else y + bias).to(x.dtype)
