"""Linears and embeddings whose matrix is packed to 16, 8 or 4 bits: for inference, read at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stateline import backends, checks, ops
from stateline.ops import native
from stateline.ops.packed_linear import FORMATS, pack, unpack, unpack_rows

LINE, LARGE_PAGE = 64, 2 << 20  # bytes


class PackedMatrix(nn.Module):
    """A matrix (rows, columns) as `ops.packed_linear.pack` keeps it: moved between devices, never cast or trained."""

    data: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, format: str) -> None:
        super().__init__()
        checks.choice(type(self).__name__, "format", format, FORMATS)
        self.format = format
        self.rows, self.columns = weight.shape
        data, scales = pack(weight, format)
        self.register_buffer("data", data)
        self.register_buffer("scales", scales)

    @property
    def num_bytes(self) -> int:
        """Memory the matrix takes."""
        return sum(x.numel() * x.element_size() for x in (self.data, self.scales))

    def unpacked(self) -> Tensor:
        """The weights that were kept, (rows, columns) float32."""
        return unpack(self.data, self.scales, self.format, self.rows, self.columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        self.data = fn(self.data)  # bytes: only ever moved
        self.scales = self.scales.to(self.data.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"{self.rows}×{self.columns}, {self.format}, {self.num_bytes / 1e6:.2f} MB"


def gather(matrices: Sequence[PackedMatrix]) -> None:
    """Lay matrices on the CPU side by side, on large pages where the system has them; small ones stay where they are.

    Each dtype has a piece of memory of its own: torch.save refuses two that share one.
    """
    tensors = [(m, name, getattr(m, name)) for m in matrices for name in ("data", "scales")]
    for dtype in {x.dtype for _, _, x in tensors}:
        here = [(m, name, x) for m, name, x in tensors if x.dtype == dtype]
        line, page = LINE // dtype.itemsize, LARGE_PAGE // dtype.itemsize
        sizes = [-(-x.numel() // line) * line for _, _, x in here]
        if sum(sizes) < page:
            continue
        arena = torch.empty(sum(sizes) + page, dtype=dtype)
        if backends.native_problem() is None:
            native.large_pages(arena)
        arena = arena[-arena.data_ptr() % LARGE_PAGE // dtype.itemsize :]
        for (matrix, name, x), place in zip(here, arena[: sum(sizes)].split(sizes), strict=True):
            setattr(matrix, name, place[: x.numel()].view(x.shape).copy_(x))


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias in x's dtype, for W packed; a drop-in for torch.nn.Linear in inference.

    matrix: the packed W (out_features, in_features), possibly shared.   bias: (out_features) or None, kept in float32.
    add_bias: False leaves the bias to whoever reads it, as a layer's step sizes want.

    >>> layer = PackedLinear.pack(nn.Linear(8, 3), "int8")
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 3])
    """

    bias: Tensor | None

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None = None, *, add_bias: bool = True) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.leaves_bias_out = not add_bias

    @classmethod
    def pack(cls, linear: nn.Linear, format: str) -> PackedLinear:
        """`linear` with its weight packed; a bias that it leaves out is left out here too."""
        bias = cast("Tensor | None", linear.bias)
        matrix = PackedMatrix(linear.weight.detach(), format)
        return cls(matrix, bias, add_bias=not getattr(linear, "leaves_bias_out", False))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) -> (…, out_features)."""
        m = self.matrix
        bias = None if self.leaves_bias_out else self.bias
        return ops.packed_linear(x, m.data, m.scales, bias, format=m.format, rows=m.rows, columns=m.columns)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.matrix._apply(fn)
        if self.bias is not None:
            self.bias = self.bias.to(self.matrix.data.device)
        return self


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix by id, (…) -> (…, columns) float32; the matrix may be an output layer's too."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) -> (…, columns)."""
        m = self.matrix
        return unpack_rows(m.data, m.scales, m.format, ids.long(), m.columns)
