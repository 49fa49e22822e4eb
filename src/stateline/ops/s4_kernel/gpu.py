"""s4_kernel and s4_cauchy on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py.

Suffixes: r read-out, h system, n state, l step, k frequency.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops.s4_kernel import gpu_kernels as kernels

#: Of c, and of the real numbers that the Cauchy product takes; kernels in float64 go to the reference.
DTYPES = frozenset({torch.complex64, torch.float64})
#: Steps or frequencies of a program, states of one in the gradient, read-outs of one.
STEPS, STATES, READOUTS = 256, 16, 4
_forward, _backward, _cauchy, _cauchy_backward = map(
    cuda.Kernel, (kernels.forward, kernels.backward, kernels.cauchy, kernels.cauchy_backward)
)


def _pairs(x: Tensor) -> Tensor:
    """(…) complex as (…, 2) real, contiguous."""
    return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())


def _turns(z: Tensor) -> Tensor:
    """z (h, n) as (h, n, 2): real part, turns a step, within half a turn."""
    turns = z.imag / (2 * math.pi)
    return torch.stack([z.real, turns - turns.round()], -1)


def forward(c: Tensor, z: Tensor, length: int) -> Tensor:
    """c (r, h, n), z (h, n) -> K (r, h, length)."""
    reads, logs = _pairs(c), _turns(z)
    r, h, n = c.shape
    out = cuda.empty((r, h, length), torch.float32, reads)
    tiles = cuda.ceil_div(length, STEPS)
    if out.numel():
        _forward((r * h * tiles, 1, 1), (reads, logs, out, tiles, h, n, length), (STEPS,), 4)
    return out


def backward(dk: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of c (r, h, n) and z (h, n) from dk (r, h, length)."""
    reads, logs, given = _pairs(c), _turns(z), dk.contiguous()
    r, h, n = c.shape
    dc, dz = (cuda.empty(reads.shape, kind, reads) for kind in (torch.float32, torch.float64))
    blocks = cuda.ceil_div(n, STATES)
    if reads.numel():
        inputs = (given, reads, logs, dc, dz, blocks, h, n, dk.shape[-1])
        _backward((r * h * blocks, 1, 1), inputs, (STATES, 64), 4)
    return torch.view_as_complex(dc), torch.view_as_complex(dz.sum(0))


def cauchy(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """alpha, beta (r, h, n), p, q (h, n), s, c (k) -> (r, h, k, 2)."""
    inputs = [x.contiguous() for x in (alpha, beta, p, q, s, c)]
    (r, h, n), k = alpha.shape, s.shape[0]
    out = cuda.empty((r, h, k, 2), torch.float64, inputs[0])
    tiles = cuda.ceil_div(k, STEPS)
    if out.numel():
        grid = (h * tiles, cuda.ceil_div(r, READOUTS), 1)
        _cauchy(grid, (*inputs, out, tiles, r, h, n, k), (READOUTS, STEPS), 4)
    return out


def cauchy_backward(
    g: Tensor, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of alpha, beta, p, q from g (r, h, k, 2)."""
    inputs = [x.contiguous() for x in (alpha, beta, p, q, s, c)]
    (r, h, n), k = alpha.shape, s.shape[0]
    da, db, dp, dq = (cuda.empty(x.shape, torch.float64, x) for x in inputs[:4])
    if p.numel():
        _cauchy_backward((h * n, 1, 1), (g.contiguous(), *inputs, da, db, dp, dq, r, h, n, k), (STEPS,), 4)
    return da, db, dp, dq
