"""Parts of a projection whose gradients are written where they belong, instead of being put together afterwards.

A kernel that finds its input to be a part of wider rows may write the gradient into a *room*, memory of the
projection's shape, at the same place; the gradient of `split` then fills what is left of it. Which of them did so is
seen from the gradients alone, so nothing has to be agreed upon, and what was not written in place is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from stateline.ops import cuda
from stateline.ops.library import call


def split(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """x.split(widths, -1) of (b, t, d); the parts are memory of x: write into none of them."""
    plain = (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    if plain or not (torch.is_grad_enabled() and x.requires_grad and x.is_contiguous()):
        return x.split(list(widths), dim=-1)
    parts: tuple[Tensor, ...] = call(_Split, x, *widths)
    return parts


def within(module: ModuleType) -> dict[str, bool]:
    """What tells a back end's `backward` to write gradients into rooms, if it can."""
    return {"in_room": True} if hasattr(module, "ROOMS") else {}


def gradients(parts: Sequence[Tensor], segments: Tensor | None) -> list[Tensor]:
    """Memory for the gradients of parts (b, t, …), in one room if they are parts of one projection; 0 as of tokens."""
    first = parts[0]
    b, t, width = *first.shape[:2], first.stride(1)
    sizes = [math.prod(part.shape[2:]) for part in parts]
    if first.numel() and sum(sizes) < width <= 3 * sum(sizes) and all(map(_rows, parts, [(first, width)] * len(parts))):
        room = cuda.empty((b, t, width), first.dtype, first)
        if segments is not None:
            room.zero_()
        start = room.storage_offset()
        whole = room if room._base is None else room._base
        whole.stateline_room = (start, (b, t, width))  # type: ignore[attr-defined]  # read by `_adopted`
        return [room.as_strided(part.shape, part.stride(), start + part.storage_offset() % width) for part in parts]
    return [cuda.tokens(part, segments) for part in parts]


def _rows(part: Tensor, of: tuple[Tensor, int]) -> bool:
    """Whether `part` lies within rows of `width` numbers, in the memory of `first`."""
    first, width = of
    inner = part[0, 0]
    return (
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.dtype == first.dtype
        and part.shape[:2] == first.shape[:2]
        and inner.is_contiguous()
        and part.stride()[:2] == (part.shape[1] * width, width)
        and part.storage_offset() % width + inner.numel() <= width
    )


def _adopted(grad: Tensor | None, offset: int, shape: tuple[int, ...]) -> Tensor | None:
    """The room of this shape that `grad` is in, at `offset`; None if it is in none."""
    base = None if grad is None else grad._base
    if grad is None or base is None or getattr(base, "stateline_room", (0, ()))[1] != shape:
        return None
    start = base.stateline_room[0]  # type: ignore[attr-defined]  # set above
    room = base.as_strided(shape, (shape[1] * shape[2], shape[2], 1), start)
    return room if _same_place(grad, room[..., offset : offset + grad.shape[-1]]) else None


def _same_place(grad: Tensor, place: Tensor) -> bool:
    return (
        grad.data_ptr() == place.data_ptr()
        and grad.dtype == place.dtype
        and all(a == b or n == 1 for a, b, n in zip(grad.stride(), place.stride(), grad.shape, strict=True))
    )


class _Split(Function):
    @staticmethod
    def forward(x: Tensor, *widths: int) -> tuple[Tensor, ...]:
        return x.split(list(widths), dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.like, ctx.widths = inputs[0].new_empty(0), inputs[1:]
        ctx.shape = tuple(inputs[0].shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = [None] * len(ctx.widths)
        if torch.is_grad_enabled():  # to be differentiated itself
            made = [
                ctx.like.new_zeros((*ctx.shape[:-1], width)) if g is None else g
                for g, width in zip(grads, ctx.widths, strict=True)
            ]
            return torch.cat(made, -1), *nothing
        offsets = [sum(ctx.widths[:i]) for i in range(len(ctx.widths))]
        rooms = (_adopted(g, offset, ctx.shape) for g, offset in zip(grads, offsets, strict=True))
        room = next((room for room in rooms if room is not None), None)
        room = ctx.like.new_empty(ctx.shape) if room is None else room
        for g, offset, width in zip(grads, offsets, ctx.widths, strict=True):
            place = room[..., offset : offset + width]
            if g is None:
                place.zero_()
            elif not _same_place(g, place):
                cuda.paste(place, g)
        return room, *nothing
