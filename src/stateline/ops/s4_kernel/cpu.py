"""s4_kernel and s4_cauchy in C++: the same functions as reference.py, over the kernels of cpu.cpp.

Suffixes: r read-out, h system, n state, l step, k frequency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native


def _pairs(x: Tensor) -> Tensor:
    """(…) complex as (…, 2) real, contiguous."""
    return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())


def forward(c: Tensor, z: Tensor, length: int) -> Tensor:
    """c (r, h, n), z (h, n) -> K (r, h, length)."""
    reads, logs = _pairs(c), _pairs(z)
    kernel = torch.empty(*c.shape[:2], length, dtype=reads.dtype)
    sizes = (*c.shape, length, torch.get_num_threads(), reads.dtype == torch.float64)
    native.call("s4_kernel_forward", (*sizes, logs.data_ptr(), reads.data_ptr(), 0, kernel.data_ptr(), 0, 0))
    return kernel


def backward(dk: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of c (r, h, n) and z (h, n) from dk (r, h, length)."""
    reads, logs = _pairs(c), _pairs(z)
    given = native.parameter(dk, reads.dtype)
    dc, dz = torch.empty_like(reads), torch.empty(reads.shape, dtype=torch.float64)
    sizes = (*c.shape, dk.shape[-1], torch.get_num_threads(), reads.dtype == torch.float64)
    native.call(
        "s4_kernel_backward",
        (*sizes, logs.data_ptr(), reads.data_ptr(), given.data_ptr(), 0, dc.data_ptr(), dz.data_ptr()),
    )
    return torch.view_as_complex(dc), torch.view_as_complex(dz.sum(0))


def cauchy(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """alpha, beta (r, h, n), p, q (h, n), s, c (k) -> (r, h, k, 2)."""
    inputs = [native.parameter(x, torch.float64) for x in (alpha, beta, p, q, s, c)]
    out = torch.empty(*alpha.shape[:2], s.shape[0], 2, dtype=torch.float64)
    where = (*alpha.shape, s.shape[0], torch.get_num_threads(), *(x.data_ptr() for x in inputs))
    native.call("s4_cauchy_forward", (*where, out.data_ptr(), 0, 0, 0, 0, 0))
    return out


def cauchy_backward(
    g: Tensor, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of alpha, beta, p, q from g (r, h, k, 2)."""
    inputs = [native.parameter(x, torch.float64) for x in (alpha, beta, p, q, s, c)]
    given = native.parameter(g, torch.float64)
    grads = tuple(torch.empty_like(x) for x in inputs[:4])
    where = (*alpha.shape, s.shape[0], torch.get_num_threads(), *(x.data_ptr() for x in inputs))
    native.call("s4_cauchy_backward", (*where, 0, given.data_ptr(), *(x.data_ptr() for x in grads)))
    da, db, dp, dq = grads
    return da, db, dp, dq
