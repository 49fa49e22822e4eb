"""The Vandermonde and Cauchy products on a GPU: values and gradients against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from test_s4_kernel import C128, F64, cauchy, near, poles, vandermonde
from where import DEVICE, INTERPRETED

from stateline import ops

LENGTHS = [0, 1, 2, 70, 257] if INTERPRETED else [0, 1, 2, 127, 128, 129, 1000, 16384]
SIZES = [(1, 1, 1), (2, 3, 5), (5, 2, 17)] + ([] if INTERPRETED else [(1, 512, 32), (9, 64, 64)])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_kernels(size: tuple[int, int, int], length: int) -> None:
    r, h, n = size
    c, z = torch.randn(r, h, n, dtype=torch.complex64), poles(h, n)
    exact = c[:, :8].to(C128).requires_grad_(), z[:8].clone().requires_grad_()
    given = c.to(DEVICE).requires_grad_(), z.to(DEVICE).requires_grad_()
    got, want = ops.s4_kernel(*given, length, backend="gpu"), vandermonde(*exact, length)
    near(got[:, :8].cpu(), want, 2e-5)
    g = torch.randn(got.shape)
    grads = torch.autograd.grad(got, given, g.to(DEVICE))
    wanted = torch.autograd.grad(want, exact, g[:, :8].double())
    near(grads[0][:, :8].cpu(), wanted[0], 2e-5)
    near(grads[1][:8].cpu(), wanted[1], 2e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 16, 101] if INTERPRETED else [1, 2, 3, 16, 101, 4096])
def test_cauchy(size: tuple[int, int, int], length: int) -> None:
    r, h, n = size
    v, w = torch.randn(r, h, n, dtype=C128), poles(h, n)
    exact = v[:, :8].clone().requires_grad_(), w[:8].clone().requires_grad_()
    given = v.to(DEVICE).requires_grad_(), w.to(DEVICE).requires_grad_()
    got, want = ops.s4_cauchy(*given, length, backend="gpu"), cauchy(*exact, length)
    near(got[:, :8].cpu(), want, 1e-11)
    g = torch.randn(got.shape, dtype=C128)
    grads = torch.autograd.grad(got, given, g.to(DEVICE))
    wanted = torch.autograd.grad(want, exact, g[:, :8])
    near(grads[0][:, :8].cpu(), wanted[0], 1e-11)
    near(grads[1][:8].cpu(), wanted[1], 1e-11)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's buffers are on the CPU")
def test_float64_kernels_go_to_the_reference() -> None:
    c, z = torch.randn(1, 2, 3, dtype=C128, device=DEVICE), poles(2, 3).to(DEVICE)
    assert ops.s4_kernel(c, z, 5).dtype == F64
