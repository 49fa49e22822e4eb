"""s4_kernel and s4_cauchy by their formulas, a block of steps or a state at a time: the definition.

Suffixes: r read-out, h system, n state, l step, k frequency, i block, j step in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Steps whose powers exist at once.
BLOCK = 128


def forward(c: Tensor, z: Tensor, length: int) -> Tensor:
    """c (r, h, n), z (h, n) -> K (r, h, length): 2 Re Σ_n c exp(l z), with exp(l z) = exp(i·BLOCK·z) exp(j z)."""
    powers = torch.exp(torch.arange(min(BLOCK, max(1, length)), device=z.device)[:, None, None] * z)  # (j, h, n)
    kernel = torch.empty(*c.shape[:2], length, dtype=c.real.dtype, device=c.device)
    for first in range(0, length, BLOCK):
        now = c * torch.exp(first * z)
        some = powers[: length - first]
        kernel[..., first : first + BLOCK] = 2 * torch.einsum("rhn,jhn->rhj", now, some).real
    return kernel


def backward(dk: Tensor, c: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of c and z: 2 conj Σ_l dK exp(l z), and 2 conj(c Σ_l dK l exp(l z)) summed over read-outs."""
    length = dk.shape[-1]
    j = torch.arange(min(BLOCK, max(1, length)), device=z.device, dtype=torch.float64)
    powers = torch.exp(j[:, None, None] * z)
    sums, moments = (torch.zeros(c.shape, dtype=torch.complex128, device=c.device) for _ in range(2))
    for first in range(0, length, BLOCK):
        some = dk[..., first : first + BLOCK].double()
        steps = j[: some.shape[-1]]
        ahead = torch.exp(first * z)
        part = torch.einsum("rhj,jhn->rhn", some + 0j, powers[: len(steps)]) * ahead
        moment = torch.einsum("rhj,jhn->rhn", some * steps + 0j, powers[: len(steps)]) * ahead
        sums += part
        moments += moment + first * part
    return (2 * sums.conj()).resolve_conj().to(c.dtype), 2 * (c * moments).conj().resolve_conj().sum(0)


def cauchy(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    """Σ_n (c α + i s β) / ((c² q − 4 s²) − 4i s c p): alpha, beta (r, h, n), p, q (h, n), s, c (k) -> (r, h, k, 2)."""
    total = torch.zeros(*alpha.shape[:2], s.shape[0], dtype=torch.complex128, device=alpha.device)
    for n in range(alpha.shape[2]):
        above = torch.complex(c * alpha[..., n, None], s * beta[..., n, None])
        total += above * _fraction(p[:, n, None], q[:, n, None], s, c)
    return torch.view_as_real(total)


def cauchy_backward(
    g: Tensor, alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of alpha, beta, p, q from g (r, h, k, 2)."""
    back = torch.view_as_complex(g.contiguous()).conj()
    da, db, dp, dq = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (alpha, beta, p, q))
    for n in range(alpha.shape[2]):
        one = _fraction(p[:, n, None], q[:, n, None], s, c)
        above = torch.complex(c * alpha[..., n, None], s * beta[..., n, None])
        da[..., n] = ((back * one).real * c).sum(-1)
        db[..., n] = -((back * one).imag * s).sum(-1)
        squared = (back * above).sum(0) * one * one
        dp[:, n] = -4 * (squared.imag * s * c).sum(-1)
        dq[:, n] = -(squared.real * c * c).sum(-1)
    return da, db, dp, dq


def _fraction(p: Tensor, q: Tensor, s: Tensor, c: Tensor) -> Tensor:
    return 1 / torch.complex(c * c * q - 4 * s * s, -4 * s * c * p)
