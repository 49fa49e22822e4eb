"""kalman in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.kalman.reference import DROPPED, RESULTS

ABSENT3 = (0, 0, 0)
_NO_GRADIENTS = (*ABSENT3 * 7, *(0,) * 9)


def forward(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean0: Tensor,
    cov0: Tensor,
    *,
    form: str,
    keep: str,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """mean (N, T, n), cov (s, T, n, n), predicted_mean, predicted_cov, loglik (N, T), mean_next (N, n), cov_next
    (s, n, n), info; None for what `keep` leaves out."""
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n), (N, T), (N, n), (s, n, n))
    dropped = DROPPED[keep] if keep != "loglik" else RESULTS[:4]
    results = [
        None if name in dropped else _empty(shape, y.dtype) for name, shape in zip(RESULTS, shapes, strict=True)
    ]
    info = torch.empty(2, dtype=torch.int64)
    system, fields = _system(y, A, C, Q, R, b, d, mean0, cov0)
    native.call(
        "kalman_forward",
        (
            *_sizes(y, n, form, shared), *fields, *(native.pointer(v) for v in results), info.data_ptr(), 0, 0, 0,
            *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    del system
    return (*results, _failure(info, N))


def backward(
    grads: tuple[Tensor | None, ...],
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean0: Tensor,
    cov0: Tensor,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, A, C, Q, R, b, d, mean0, cov0 in their own shapes, None where there was no b or d, from those of
    the seven results of `forward` (None: zero). All covariances are covariances here, whatever the form was."""
    given, dtype, n = (y, A, C, Q, R, b, d, mean0, cov0), y.dtype, mean0.shape[1]
    if y.numel() == 0:
        return _unseen(grads, given)
    results = [None if v is None else _empty(v.shape, dtype) for v in given]
    system, fields = _system(*(None if v is None else _spread(v) for v in given[:7]), predicted_mean, predicted_cov)  # type: ignore[arg-type]  # nine in order
    slopes = [
        _operand(None if g is None else _spread(g), dtype, dims)
        for g, dims in zip(grads, (1, 2, 1, 2, 0, 1, 2), strict=True)
    ]
    native.call(
        "kalman_backward",
        (
            *_sizes(y, n, "joseph", shared), *fields, *(0,) * 11, *(x for _, f in slopes for x in f),
            *(native.pointer(v) for v in results),
        ),
    )  # fmt: skip
    del system, slopes
    dR = results[4]
    assert dR is not None
    results[4] = (dR + dR.mT) / 2
    return tuple(results)


def _unseen(grads: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients where no observation came: the state passed as it was, its covariance symmetric."""
    results = [None if v is None else torch.zeros_like(v) for v in given]
    for i, g in ((7, grads[5]), (8, grads[6])):
        if g is not None:
            results[i] = g if i == 7 else (g + g.mT) / 2
    return tuple(results)


def _spread(v: Tensor) -> Tensor:
    """`v` without dimensions that are one in memory and more in its shape, whose gradients are apart."""
    return v.contiguous() if any(k > 1 and s == 0 for k, s in zip(v.shape, v.stride(), strict=True)) else v


def step(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    mean: Tensor,
    cov: Tensor,
    index: Tensor | None,
    *,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One observation y (b, m), in place: filtered mean (b, n), cov (b, n, n), loglik (b), and info as of `forward`.

    A (·, n, n), C (·, m, n), Q, R, b (·, n), d (·, m): the first dimension is that of y or 1. index (b) picks rows of
    mean and cov, a negative one skips. After a failure the state of the series that failed is as before.
    """
    rows, n, make = y.shape[0], mean.shape[1], torch.empty if index is None else torch.zeros
    out = make(rows, n, dtype=y.dtype), make(rows, n, n, dtype=y.dtype), make(rows, dtype=y.dtype)
    means, covs = native.parameter(mean, y.dtype), native.parameter(cov, y.dtype)
    index, info = native.slots(index), torch.empty(2, dtype=torch.int64)
    system, fields = _system(y[:, None], *(None if v is None else v[:, None] for v in (A, C, Q, R, b, d)), means, covs)
    native.call(
        "kalman_step",
        (
            *_sizes(y[:, None], n, form, False), *fields, out[0].data_ptr(), out[1].data_ptr(), 0, 0, out[2].data_ptr(),
            means.data_ptr(), covs.data_ptr(), info.data_ptr(), 0, native.pointer(index), len(means), *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    del system
    for state, used in ((mean, means), (cov, covs)):
        if state is not used:
            state.copy_(used)
    return (*out, _failure(info, rows))


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _sizes(y: Tensor, n: int, form: str, shared: bool) -> tuple[int, ...]:
    N, T, m = y.shape
    return N, T, n, m, torch.get_num_threads(), y.dtype == torch.float64, form == "sqrt", shared


def _operand(v: Tensor | None, dtype: torch.dtype, dims: int) -> tuple[Tensor | None, tuple[int, int, int]]:
    """`v` (·, ·, …) as kernels read it, to be kept alive, and its fields; `dims` trailing dimensions are adjacent."""
    if v is None:
        return None, ABSENT3
    if v.dtype is not dtype:
        v = v.to(dtype)
    inner = v.shape[v.dim() - dims :]
    adjacent = v.stride()[v.dim() - dims :] == (inner[1], 1) if dims == 2 else dims == 0 or v.shape[-1] <= 1 or v.stride(-1) == 1
    if not adjacent or v.is_neg():
        v = v.resolve_neg().contiguous()
    batch = v.stride(0) if v.shape[0] > 1 else 0
    time = v.stride(1) if v.dim() > dims + 1 and v.shape[1] > 1 else 0
    return v, (v.data_ptr(), batch, time)


def _system(
    y: Tensor, A: Tensor, C: Tensor, Q: Tensor, R: Tensor, b: Tensor | None, d: Tensor | None, mean0: Tensor, cov0: Tensor
) -> tuple[list[Tensor | None], tuple[int, ...]]:  # fmt: skip
    """What the kernels read, to be kept alive, and its fields."""
    pairs = [
        _operand(v, y.dtype, dims)
        for v, dims in zip((y, A, C, Q, R, b, d, mean0, cov0), (1, 2, 2, 2, 2, 1, 1, 1, 2), strict=True)
    ]
    return [v for v, _ in pairs], tuple(x for _, fields in pairs for x in fields)


def _failure(info: Tensor, series: int) -> Tensor:
    """Series and step of the first failure, or (−1, −1)."""
    first = int(info[0])
    return info.fill_(-1) if first < 0 else torch.tensor((first % series, first // series))
