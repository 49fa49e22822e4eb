"""Gradients of a projection's parts, in place where a kernel can: the same numbers, and nothing else is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from stateline.ops import cuda, parts

WIDTHS = (16, 16, 8, 4)


class Squares(Function):
    """The sum of squares, whose gradients are written where `parts.gradients` says."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        return torch.stack([part.square().sum() for part in parts]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        made = parts.gradients(ctx.saved_tensors, None)
        for place, part in zip(made, ctx.saved_tensors, strict=True):
            place.copy_(2 * part * grad)
        return tuple(made)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the gradients that are copied."""
    widths: list[int] = []
    paste = cuda.paste

    def noted(place: Tensor, x: Tensor) -> None:
        widths.append(x.shape[-1])
        paste(place, x)

    monkeypatch.setattr(cuda, "paste", noted)
    return widths


def projection(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, sum(WIDTHS), dtype=dtype, requires_grad=True) * 1


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4))


def check(projected: Tensor, out: Tensor, used: int) -> None:
    (grad,) = torch.autograd.grad(out, projected)
    want = torch.cat([2 * projected[..., :used], torch.zeros_like(projected[..., used:])], -1)
    assert torch.equal(grad, want)


def test_parts_of_one_kernel_are_not_copied(copied: list[int]) -> None:
    x, y, z, _ = parts.split(projected := projection(), WIDTHS)
    check(projected, Squares.apply(heads(x), heads(y)) + z.square().sum(), 40)
    assert copied == [8]


def test_of_two_kernels_the_first_is_not_copied(copied: list[int]) -> None:
    x, y, *_ = parts.split(projected := projection(), WIDTHS)
    check(projected, Squares.apply(heads(x)) + Squares.apply(heads(y)), 32)
    assert copied == [16]


def test_what_is_added_up_on_the_way_is_copied(copied: list[int]) -> None:
    x, *_ = parts.split(projected := projection(), WIDTHS)
    (grad,) = torch.autograd.grad(Squares.apply(x) + Squares.apply(x), projected)
    assert torch.equal(grad[..., :16], 4 * projected[..., :16])
    assert copied == [16]


def test_a_narrow_part_and_a_tensor_of_its_own_get_memory_of_their_own(copied: list[int]) -> None:
    *_, z, narrow = parts.split(projected := projection(), WIDTHS)
    assert parts.gradients([narrow], None)[0].is_contiguous()
    assert parts.gradients([torch.randn(2, 5, 4)], None)[0].is_contiguous()
    assert parts.gradients([projected], None)[0].shape == projected.shape
    assert parts.gradients([z], None)[0].is_contiguous()


def test_a_gradient_elsewhere_of_the_same_shape_is_no_room(copied: list[int]) -> None:
    """Rooms are known by what made them: a caller's memory that looks like one is not written into."""
    theirs = torch.full((2, 5, sum(WIDTHS)), 7.0)
    x, *_ = parts.split(projected := projection(), WIDTHS)
    (grad,) = torch.autograd.grad(x, projected, theirs[..., :16])
    assert torch.equal(theirs, torch.full_like(theirs, 7.0))
    assert torch.equal(grad[..., :16], theirs[..., :16])
    assert not grad[..., 16:].any()
    assert copied == [16]


def test_second_derivatives_pass_through() -> None:
    x, y, *_ = parts.split(projected := projection(torch.float64), WIDTHS)
    (grad,) = torch.autograd.grad((x * x * y).sum(), projected, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), projected)
    assert torch.allclose(second[..., :16], 2 * (projected[..., 16:32] + projected[..., :16]))


def test_without_a_gradient_and_in_transforms_it_is_a_plain_split() -> None:
    x = torch.randn(2, 5, sum(WIDTHS))
    assert all(map(torch.equal, parts.split(x, WIDTHS), x.split(WIDTHS, -1)))
    row = torch.func.grad(lambda x: parts.split(x, WIDTHS)[1].square().sum())(x)
    assert torch.equal(row[..., 16:32], 2 * x[..., 16:32])
    assert not row[..., :16].any()
