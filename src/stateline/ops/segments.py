"""Where sequences lie inside a batch: the one thing kernels know of lengths, padding, packing and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stateline.checks import INTEGERS, can_read, choice, fail


@dataclass(frozen=True)
class Segments:
    """Sequences of a (b, t, …) batch.

    table: (n_seq, 3) int64 rows [batch row, start, stop], or None when every batch row is one whole sequence.
           Sequence i reads and writes state row i.
    count: n_seq, the rows of every state.
    """

    table: Tensor | None
    count: int


def build(
    op: str,
    like: Tensor,
    lengths: Tensor | Sequence[int] | None,
    padding_side: str,
    cu_seqlens: Tensor | None,
) -> Segments:
    """Segments of a batch shaped like `like` (b, t, …) from `lengths` (b) or `cu_seqlens` (n_seq + 1)."""
    b, t = like.shape[:2]
    choice(op, "padding_side", padding_side, ("right", "left"))
    if lengths is not None and cu_seqlens is not None:
        raise fail(
            op, "lengths and cu_seqlens were both given.", "Padded batches take lengths, packed ones cu_seqlens."
        )
    if lengths is not None:
        return _padded(op, b, t, _whole_numbers(op, "lengths", lengths, like.device), padding_side)
    if cu_seqlens is not None:
        return _packed(op, b, t, _whole_numbers(op, "cu_seqlens", cu_seqlens, like.device))
    return Segments(None, b)


def _padded(op: str, b: int, t: int, lengths: Tensor, padding_side: str) -> Segments:
    if tuple(lengths.shape) != (b,):
        raise fail(op, f"lengths has shape {tuple(lengths.shape)}, expected (b,) with b = {b}.")
    if can_read(lengths) and b and not (int(lengths.min()) >= 0 and int(lengths.max()) <= t):
        raise fail(op, f"lengths is {lengths.tolist()}, expected values from 0 to t = {t}.")
    rows = torch.arange(b, device=lengths.device)
    start = torch.zeros_like(lengths) if padding_side == "right" else t - lengths
    return Segments(torch.stack([rows, start, start + lengths], 1), b)


def _packed(op: str, b: int, t: int, cu_seqlens: Tensor) -> Segments:
    if b != 1:
        raise fail(op, f"cu_seqlens needs a batch of 1, got {b}.", "Concatenate the sequences along time.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise fail(op, f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n_seq + 1,).")
    if can_read(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != t or any(b < a for a, b in pairwise(values)):
            raise fail(op, f"cu_seqlens is {values}, expected to rise from 0 to t = {t}.")
    start, stop = cu_seqlens[:-1], cu_seqlens[1:]
    return Segments(torch.stack([torch.zeros_like(start), start, stop], 1), start.shape[0])


def _whole_numbers(op: str, name: str, values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    tensor = (
        values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=None if len(values) else torch.int64)
    )
    if tensor.dtype not in INTEGERS:
        raise fail(op, f"{name} is {tensor.dtype}, expected int32 or int64.", error=TypeError)
    return tensor.to(device=device, dtype=torch.int64)


def pieces(segments: Tensor | None, t: int) -> list[tuple[slice, slice, slice]]:
    """(batch rows, state rows, time) slices that the reference loops over: one piece if all rows are whole."""
    if segments is None:
        return [(slice(None), slice(None), slice(0, t))]
    return [
        (slice(row, row + 1), slice(i, i + 1), slice(start, stop))
        for i, (row, start, stop) in enumerate(segments.tolist())
    ]


def gathered(x: Tensor, table: Tensor, reverse: bool, *, back: bool) -> Tensor:
    """x (b, t, d) of a padded batch with every row's sequence running forwards from step 0, zeros after it.

    back: the opposite, zeros at padding. Neither reads the table nor looks at padding.
    """
    if 0 in x.shape:
        return x.new_zeros(x.shape)
    start, stop = table[:, 1:2], table[:, 2:3]
    step = torch.arange(x.shape[1], device=x.device)[None]
    if back:
        index, live = (stop - 1 - step if reverse else step - start), (start <= step) & (step < stop)
    else:
        index, live = (stop - 1 - step if reverse else start + step), step < stop - start
    picked = torch.take_along_dim(x, index.clamp(0, x.shape[1] - 1)[..., None], 1)
    return picked.masked_fill(~live[..., None], 0)
