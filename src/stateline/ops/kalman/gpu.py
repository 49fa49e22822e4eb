"""kalman on a GPU: the same functions as reference.py, over the kernels of gpu_kernels.py, for small systems.

Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline.ops import cuda
from stateline.ops.kalman import gpu_backward_kernels, gpu_kernels
from stateline.ops.kalman.reference import DROPPED, RESULTS

DTYPES = frozenset({torch.float32, torch.float64})
#: The largest system: Triton takes seconds to compile one of four states, minutes for six, though eight would fit.
STATES, OBSERVED = 4, 4
#: Series of a program, one a lane.
LANES = 32
_DIMS = (1, 2, 2, 2, 2, 1, 1)  # adjacent dimensions of y, A, C, Q, R, b, d
_forward, _backward = map(cuda.Kernel, (gpu_kernels.forward, gpu_backward_kernels.backward))


def problem(y: object = None, A: object = None, C: object = None, *rest: object) -> str | None:
    """Why the kernels do not cover such a system, or None. rest: what else the operation takes, its form among it."""
    if "sqrt" in [v for v in rest if isinstance(v, str)] or any(hasattr(v, "factor") for v in rest):
        return 'its GPU kernels compute form="joseph"; square roots are those of the reference.'
    if isinstance(C, Tensor) and (C.shape[-1] > STATES or C.shape[-2] > OBSERVED):
        sizes = f"{C.shape[-1]} states and {C.shape[-2]} observed values"
        return f"the system has {sizes}, its GPU kernels keep up to {STATES} and {OBSERVED} in registers."
    return None


def forward(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean0: Tensor,
    cov0: Tensor, *, form: str, keep: str, shared: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """mean (N, T, n), cov (s, T, n, n), predicted_mean, predicted_cov, loglik (N, T), mean_next (N, n), cov_next
    (s, n, n), info; None for what `keep` leaves out. A series that fails has NaN from there on."""
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n), (N, T), (N, n), (s, n, n))
    out = [
        None if name in DROPPED[keep] else cuda.empty(shape, y.dtype, y)
        for name, shape in zip(RESULTS, shapes, strict=True)
    ]
    if not y.numel():
        for v, start in zip(out[5:], (mean0, (cov0 + cov0.mT) / 2), strict=True):
            assert v is not None
            v.copy_(start)
        return (*out, torch.full((2,), -1, device=y.device))
    failed = _run((y, A, C, Q, R, b, d), cuda.plain(mean0), _rows(cov0), None, out, shared)
    return (*out, _info(failed, T))


def _rows(cov: Tensor) -> Tensor:
    """Matrices (·, n, n) with adjacent entries; rows that are one in memory stay so."""
    return cov if cov.stride(0) == 0 and cov[0].is_contiguous() and not cov.is_neg() else cuda.plain(cov)  # type: ignore[return-value]  # a tensor is given


def _run(
    system: tuple[Tensor | None, ...], mean0: Tensor | None, cov0: Tensor, index: Tensor | None,
    out: list[Tensor | None], shared: bool,
) -> Tensor:  # fmt: skip
    """Launch over y, A, C, Q, R, b, d; the first step (N) at which each series failed, or T."""
    used, strides, times = _operands(system)
    y, C = used[0], used[2]
    assert y is not None
    assert C is not None
    assert mean0 is not None
    (N, T, m), n = y.shape, C.shape[-1]
    failed = cuda.empty((N,), torch.int64, y)
    if index is not None:
        failed.fill_(T)
    starts = (mean0.stride(0), cov0.stride(0) if cov0.shape[0] > 1 else 0)
    tensors = (*used, mean0, cov0, cuda.plain(index), *out, failed)
    grid, own = (cuda.ceil_div(N, LANES), 1, 1), _of_their_own(system)
    _forward(grid, (*tensors, N, T, *strides, *starts), (n, m, times, own, shared, LANES), 1)
    return failed


def _operands(system: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], list[int], int]:
    """y, A, C, Q, R, b, d as kernels read them, their strides over series and steps, and the bits of `TIMES`."""
    used: list[Tensor | None] = []
    strides: list[int] = []
    times = 0
    for i, (v, dims) in enumerate(zip(system, _DIMS, strict=True)):
        if v is not None:
            inner = v[:1, :1]
            v = v if inner.is_contiguous() and not v.is_neg() else cuda.plain(v)
            assert v is not None
            times |= (1 << i - 1) if i and v.shape[1] > 1 else 0
        used.append(v)
        strides += (0, 0) if v is None else (_stride(v, 0), _stride(v, 1))
        assert v is None or v.dim() == dims + 2
    return used, strides, times


def _of_their_own(system: tuple[Tensor | None, ...]) -> int:
    """The bits of `ROWS` of y, A, C, Q, R, b, d."""
    return sum((1 << i) for i, v in enumerate(system[1:]) if v is not None and v.shape[0] > 1)


def _stride(v: Tensor, i: int) -> int:
    return v.stride(i) if v.shape[i] > 1 else 0


def _info(failed: Tensor, steps: int) -> Tensor:
    """Series and step of the first failure, by step, then series, or (−1, −1); found where `failed` (N) is."""
    N = failed.shape[0]
    rank = (failed * N + torch.arange(N, device=failed.device)).min()
    return torch.where(rank < steps * N, torch.stack([rank % N, rank // N]), -1)


def backward(
    grads: tuple[Tensor | None, ...], y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None,
    d: Tensor | None, mean0: Tensor, cov0: Tensor, predicted_mean: Tensor, predicted_cov: Tensor, *, shared: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of y, A, C, Q, R, b, d, mean0, cov0 in their own shapes, None where there was no b or d, from those of
    the seven results of `forward` (None: zero)."""
    given = (y, A, C, Q, R, b, d, mean0, cov0)
    if not y.numel():
        return _unseen(grads, given)
    (N, T, m), n, programs = y.shape, mean0.shape[1], cuda.ceil_div(y.shape[0], LANES)
    system, strides, times = _operands(given[:7])
    before, before_cov = cuda.plain(predicted_mean), _rows(predicted_cov)
    assert before is not None
    own = _of_their_own(given[:7])
    parts: list[Tensor | None] = [cuda.empty(y.shape, y.dtype, y)]
    for v in given[1:7]:
        rows = 0 if v is None else N if v.shape[0] > 1 else programs
        parts.append(None if v is None else cuda.empty((rows, *v.shape[1:]), y.dtype, y))
    parts += [cuda.empty((N, n), y.dtype, y), cuda.empty((N, n, n), y.dtype, y)]
    used = [system[i] for i in (0, 1, 2, 4, 6)]
    steps = [strides[2 * i + k] for i in (0, 1, 2, 4, 6) for k in (0, 1)]
    steps += [x for v in (before, before_cov) for x in (_stride(v, 0), _stride(v, 1))]
    tensors = (*used, before, before_cov, *(cuda.plain(g) for g in grads), *parts)
    _backward((programs, 1, 1), (*tensors, N, T, *steps), (n, m, times, own, shared, LANES), 1)
    return tuple(
        None if v is None or part is None else part if part.shape == v.shape else part.sum(0, keepdim=True)
        for v, part in zip(given, parts, strict=True)
    )


def _unseen(grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients where no observation came: the state passed as it was, its covariance symmetric."""
    results: list[Any] = [None if v is None else torch.zeros_like(v) for v in given]
    if grads[5] is not None:
        results[7] = grads[5]
    if grads[6] is not None:
        results[8] = (grads[6] + grads[6].mT) / 2
    return tuple(results)


def step(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean: Tensor,
    cov: Tensor, index: Tensor | None, *, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One observation y (b, m), in place: filtered mean (b, n), cov (b, n, n), loglik (b), and info as of `forward`.

    A (·, n, n), C (·, m, n), Q, R, b (·, n), d (·, m): the first dimension is that of y or 1. index (b) picks rows of
    mean and cov, a negative one skips. A series that fails has a state of NaN.
    """
    rows, n = y.shape[0], mean.shape[1]
    made = [cuda.empty(shape, y.dtype, y) for shape in ((rows, 1, n), (rows, 1, n, n), (rows, 1))]
    if index is not None:
        for v in made:
            v.zero_()
    failed = None
    if rows:
        system = tuple(None if v is None else v[:, None] for v in (y, A, C, Q, R, b, d))
        out = [made[0], made[1], None, None, made[2], mean, cov]
        failed = _run(system, mean, cov, index, out, False)
    info = torch.full((2,), -1, device=y.device) if failed is None else _info(failed, 1)
    return made[0][:, 0], made[1][:, 0], made[2][:, 0], info
