"""Several linear convolutions as one: their kernels added, or convolved with each other.

A convolution is linear, so branches that are added up, or layers one after another with nothing in between, are one
convolution: one pass over the data instead of several. Plain PyTorch, differentiable any number of times.

Suffixes: d channel, l taps, o and i channels out and in, f frequency.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from stateline import checks
from stateline.ops.long_conv.spectrum import fast_length


def fuse_parallel(*kernels: Tensor) -> Tensor:
    """The kernel of branches whose outputs are added up: `long_conv(u, k)` is the sum of `long_conv(u, kernels[i])`.

    kernels: (d, l) or (l, d_out, d) each, as `long_conv` takes them, of any lengths; if one has matrix taps, so has the
    result. It is as long as the longest.

    Raises ValueError or TypeError for kernels whose channels differ.

    >>> fuse_parallel(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0, 30.0]])).tolist()
    [[11.0, 22.0, 30.0]]
    """
    given, matrices, dtype = _checked("fuse_parallel", kernels)
    shapes = {tuple(k.shape[1:]) if matrices else k.shape[0] for k in given}
    if len(shapes) > 1:
        raise checks.fail("fuse_parallel", f"kernels have channels {sorted(shapes)}, expected the same of all.")
    longest = max(k.shape[0 if matrices else 1] for k in given)

    def padded(k: Tensor) -> Tensor:
        return F.pad(k, (0, 0, 0, 0, 0, longest - k.shape[0]) if matrices else (0, longest - k.shape[1]))

    return functools.reduce(torch.add, (padded(k) for k in given)).to(dtype)


def fuse_cascade(*kernels: Tensor) -> Tensor:
    """The kernel of convolutions one after another, the first one first: `long_conv(long_conv(u, k1)[0], k2)`.

    kernels: (d, l) or (l, d_out, d) each; matrices are multiplied in the order in which data meets them. The result has
    l1 + l2 - 1 taps, computed in float64 and rounded once.

    Raises ValueError or TypeError for kernels whose channels do not fit.

    >>> fuse_cascade(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 10.0]])).round().tolist()
    [[1.0, 2.0, 10.0, 20.0]]
    """
    given, matrices, dtype = _checked("fuse_cascade", kernels)
    for i, (before, after) in enumerate(itertools.pairwise(given)):
        comes, takes = (before.shape[1], after.shape[2]) if matrices else (before.shape[0], after.shape[0])
        if comes != takes:
            problem = f"kernel {i} gives {comes} channels, kernel {i + 1} takes {takes}."
            raise checks.fail("fuse_cascade", problem, "Kernels come in the order in which data meets them.")
    return functools.reduce(_one_after_another, given).to(dtype)


def _one_after_another(first: Tensor, second: Tensor) -> Tensor:
    """Depthwise (d, l), or (l, o, i): W[n] = Σ second[n-m] first[m]."""
    time = 0 if first.dim() == 3 else 1
    length = first.shape[time] + second.shape[time] - 1
    n = fast_length(length)
    f, g = (torch.fft.rfft(k, n=n, dim=time) for k in (first, second))
    product = torch.matmul(g, f) if time == 0 else f * g
    return torch.fft.irfft(product, n=n, dim=time).narrow(time, 0, length)


def _checked(op: str, kernels: tuple[Tensor, ...]) -> tuple[list[Tensor], bool, torch.dtype]:
    """Kernels in float64, all as matrices if one is; whether they are; the dtype of the result."""
    if not kernels:
        raise checks.fail(op, "it was given no kernels, expected one at least.")
    for i, k in enumerate(kernels):
        if not isinstance(k, Tensor) or k.dim() not in (2, 3) or 0 in k.shape:
            got = tuple(k.shape) if isinstance(k, Tensor) else type(k).__name__
            raise checks.fail(op, f"kernel {i} is {got}, expected taps (d, l) or matrices (l, d_out, d).")
        checks.dtype(op, f"kernel {i}", k, checks.REAL_DTYPES)
    checks.same_device(op, {f"kernel {i}": k for i, k in enumerate(kernels)})
    matrices = any(k.dim() == 3 for k in kernels)
    dtype = functools.reduce(torch.promote_types, (k.dtype for k in kernels))
    wide = [k.double() for k in kernels]
    return [torch.diag_embed(k.T) if matrices and k.dim() == 2 else k for k in wide], matrices, dtype
