"""packed_linear: y = x Wᵀ + bias for a matrix packed to bfloat16, 8 or 4 bits; for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import define
from stateline.ops.packed_linear.pack import COLUMNS, FORMATS, GROUP, LANES, pack, unpack, unpack_rows

__all__ = ["FORMATS", "pack", "packed_linear", "unpack", "unpack_rows"]

OP = "packed_linear"
MOST_COLUMNS = 32768  # sums of bytes stay exact in 32 bits


def packed_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    format: str,
    rows: int,
    columns: int,
    backend: str | None = None,
) -> Tensor:
    """x (…, columns) -> y (…, rows) in x's dtype.

    Args:
        x: bf16 rounds it to bfloat16, int8 and int4 each of its rows to 16 bits; sums are float32 or exact integers.
            A row's result does not depend on the others. On a GPU every format rounds x to bfloat16, and int4 its
            weights; products are torch's there.
        data, scales: what `pack(weight, format)` gave for a weight (rows, columns).   bias: (rows) float32.
        format: "bf16", "int8" or "int4".
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: x wants a gradient.
    """
    checks.choice(OP, "format", format, FORMATS)
    checks.dtype(OP, "x", x, checks.REAL_DTYPES)
    if columns > MOST_COLUMNS:
        raise checks.fail(OP, f"columns is {columns}, expected at most {MOST_COLUMNS}.", "Split the matrix.")
    if x.shape[-1:] != (columns,):
        raise checks.fail(OP, f"x has shape {tuple(x.shape)}, expected (…, columns) with columns = {columns}.")
    lane, multiple = COLUMNS[format]
    blocks, padded = -(-rows // LANES), columns + -columns % multiple
    expected = 4 * LANES * blocks * (padded // lane)
    if data.dtype != torch.uint8 or data.numel() != expected or not data.is_contiguous():
        raise checks.fail(OP, f"data has {data.numel()} bytes, expected {expected} contiguous ones.", "Take pack's.")
    wanted = {"bf16": 0, "int8": blocks * LANES, "int4": blocks * LANES * (padded // GROUP)}[format]
    if scales.numel() != wanted or not scales.is_contiguous():
        raise checks.fail(
            OP, f"scales has {scales.numel()} numbers, expected {wanted} contiguous ones.", "Take pack's."
        )
    if bias is not None:
        sizes = Sizes(OP)
        sizes.bind("rows", rows, "the matrix")
        sizes.match("bias", bias, "rows")
        checks.dtype(OP, "bias", bias, (torch.float32,))
    checks.same_device(OP, {"x": x, "data": data, "scales": scales, "bias": bias})
    if torch.is_grad_enabled() and x.requires_grad:
        remedy = "Use torch.no_grad(), or the model as it was before packing."
        raise checks.fail(OP, "x wants a gradient, packed matrices have none.", remedy, error=RuntimeError)
    y = _forward(x.reshape(-1, columns), data, scales, bias, format, rows, columns, backend)
    return y.view(*x.shape[:-1], rows)


def _run(x: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return backends.kernel(OP, x.device.type, backend, x.dtype).forward(x, *rest)


def _fake(x: Tensor, data: Tensor, scales: Tensor, bias: Any, format: str, rows: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], rows)


_MATRIX = "Tensor data, Tensor scales, Tensor? bias, str format, int rows, int columns"
_forward = define(
    f"{OP}(Tensor x, {_MATRIX}, str? backend) -> Tensor",
    _run,
    _fake,
)
