"""`device_sampling.draw` on a CUDA device: the same function over the kernels of gpu_kernels.py, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.generation import gpu_kernels as kernels
from stateline.generation.device_sampling import READY, Plan, Rows
from stateline.ops import cuda

_penalise, _survey, _search, _settle, _weigh, _finish = map(
    cuda.Kernel,
    (kernels.penalise, kernels.survey, kernels.search, kernels.settle, kernels.weigh, kernels.finish),
)
#: Ids of a block, and recent ids that a program looks at.
C, W = 1024, 256
WARPS = 4
F32, F64, I32 = torch.float32, torch.float64, torch.int32


def draw(logits: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """As `device_sampling.draw`, for logits (b, v) of 16 or 32 bits."""
    logits = cuda.data(logits)
    (b, v), width = logits.shape, rows["recent"].shape[1]
    nb = cuda.ceil_div(v, C)
    blocks, lines = (nb, b, 1), cuda.power_of_2(nb)
    settings = rows["settings"]
    scores = logits
    if plan.penalty:
        scores = cuda.empty((b, v), F32, logits).copy_(logits)
        where = (v, logits.stride(0), v, width)
        _penalise((cuda.ceil_div(width, W), b, 1), (logits, rows["recent"], settings, scores, *where), (W,), WARPS)
    highest, sums, best, place = (cuda.empty((b, nb), dtype, logits) for dtype in (F32, F64, F32, I32))
    strides = logits.stride(0), scores.stride(0)
    _survey(blocks, (logits, scores, highest, sums, best, place, v, *strides, nb), (C,), WARPS)
    narrow = scores.dtype.itemsize == 2
    least = edge = first = above = equals = None
    if plan.random:
        if plan.top_k:
            least, _ = _threshold(scores, best, settings, None, count=True)
        if plan.top_p:
            edge, first = _threshold(scores, best, settings, least, count=False)
        above, equals = cuda.empty((b, nb), F64, logits), cuda.empty((b, nb), I32, logits)
        _weigh(
            blocks, (scores, best, settings, least, edge, above, equals, v, strides[1], nb), (narrow, lines, C), WARPS
        )
    out = cuda.empty((b, 2), F64, logits)
    own = (settings, rows["counters"], rows["uniforms"], rows["recent"])
    given = (logits, scores, highest, sums, best, place, *own, least, edge, first, above, equals, out)
    _finish((b, 1, 1), (*given, v, *strides, nb, width), (READY, plan.random, plan.penalty, narrow, lines, C, W), WARPS)
    return out


def _threshold(
    scores: Tensor, best: Tensor, settings: Tensor, least: Tensor | None, *, count: bool
) -> tuple[Tensor, Tensor]:
    """Keys (b) that a search ends with, and the masses (b, nb, 16) of its first pass."""
    (b, v), nb = scores.shape, best.shape[1]
    lines = cuda.power_of_2(nb)
    first = before = bases_before = None
    narrow = scores.dtype.itemsize == 2
    for shift in range(12 if narrow else 28, -1, -4):
        masses, bases = cuda.empty((b, nb, 16), F64, scores), cuda.empty((b,), I32, scores)
        given = (scores, best, settings, least, first, before, masses, bases_before, bases, v, scores.stride(0), nb)
        _search((nb, b, 1), (*given, shift), (before is None, count, narrow, lines, C), WARPS)
        first = masses if first is None else first
        before, bases_before = masses, bases
    found = cuda.empty((b,), I32, scores)
    _settle((b, 1, 1), (settings, first, before, bases_before, found, nb), (count, lines), WARPS)
    assert first is not None
    return found, first
