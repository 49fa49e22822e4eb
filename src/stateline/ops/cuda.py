"""How tensors reach the GPU kernels: layouts they read, where sequences are cut, launches on the right device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: What kernels compute in float32; wider data goes to the reference.
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def data(x: Tensor) -> Tensor:
    """`x` as kernels read data: the last dimension adjacent."""
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def plain(x: Tensor | None) -> Tensor | None:
    """`x` as kernels read parameters and states: contiguous."""
    return None if x is None else x.resolve_neg().contiguous()


def on(x: Tensor) -> torch.cuda.device_of:
    """Makes x's device the current one for a launch."""
    return torch.cuda.device_of(x)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(x: int) -> int:
    """The least power of two that is not below x, at least 1."""
    return 1 << max(x - 1, 0).bit_length()


@dataclass(frozen=True)
class Runs:
    """Time cut into runs of equal length, anchored where each sequence starts.

    count: programs that cover all of them.   each: runs of a whole row (without a table).
    table, tiles: None, or the sequences (n_seq, 3) and for each program its sequence (-1: none) and run (count, 2),
        int64, found on the device: no value is read back.
    """

    count: int
    each: int
    table: Tensor | None = None
    tiles: Tensor | None = None


def runs(segments: Tensor | None, b: int, t: int, steps: int) -> Runs:
    """Runs of `steps` of (b, t); an empty sequence has one too, since it passes its state on."""
    each = max(1, ceil_div(t, steps))
    if segments is None:
        return Runs(b * each, each)
    segments = segments.contiguous()
    needed = ((segments[:, 2] - segments[:, 1] + (steps - 1)) // steps).clamp(min=1)
    ends = needed.cumsum(0)
    count = b * (t // steps) + segments.shape[0]
    program = torch.arange(count, device=segments.device)
    sequence = torch.searchsorted(ends, program, right=True)
    if not segments.shape[0]:
        return Runs(0, each, segments, torch.empty(0, 2, dtype=torch.int64, device=segments.device))
    used = sequence < segments.shape[0]
    nearest = sequence.clamp(max=segments.shape[0] - 1)
    run = program - (ends - needed)[nearest]
    return Runs(count, each, segments, torch.stack([sequence.where(used, -1), run], 1))
