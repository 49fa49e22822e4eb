"""kalman in C++: the same functions as reference.py, over the kernels of cpu.cpp and cpu_backward.cpp.

Suffixes: N series (s: N, or 1 where covariances are shared), T time step, n state, m observation.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stateline.ops import native
from stateline.ops.kalman import reference
from stateline.ops.kalman.reference import DROPPED, RESULTS

ABSENT3 = (0, 0, 0)
CPU = torch.device("cpu")  # said each time: another device may be the default
_DIMS = (1, 2, 2, 2, 2, 1, 1, 1, 2)  # adjacent dimensions of y, A, C, Q, R, b, d, mean0, cov0
#: Numbers from which a result is much.
LARGE = 1 << 19
#: mean (b, n), cov (b, n, n), loglik (b), and info.
Stepped = tuple[Tensor, Tensor, Tensor, list[int]]
_FINE = (-1, -1, 0)
_NO_GRADIENTS = (*ABSENT3 * 7, *(0,) * 9)
#: In a record of a step: of Q and R, lower triangles of factors are given.
FACTORS = 2


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
    (s, n, n), info; None for what `keep` leaves out. Square roots of float32 data are computed in float64."""
    if form == "sqrt" and y.dtype is torch.float32:
        given = (None if v is None else v.double() for v in (y, A, C, Q, R, b, d, mean0, cov0))
        *wide, info = forward(*given, form=form, keep=keep, shared=shared)  # type: ignore[arg-type]  # nine in order
        return (*(None if v is None else v.float() for v in wide), info)
    (N, T, _), n, s = y.shape, mean0.shape[1], 1 if shared else y.shape[0]
    shapes = ((N, T, n), (s, T, n, n), (N, T, n), (s, T, n, n), (N, T), (N, n), (s, n, n))
    dropped = DROPPED[keep]
    results = [None if name in dropped else _empty(shape, y.dtype) for name, shape in zip(RESULTS, shapes, strict=True)]
    info = torch.empty(3, dtype=torch.int64, device=CPU)
    system, fields = _system((y, A, C, Q, R, b, d, mean0, cov0), y.dtype)
    native.call(
        "kalman_forward",
        (
            *_sizes(y, n, form, shared), *fields, *(native.pointer(v) for v in results), info.data_ptr(), 0, 0, 0,
            *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    del system
    return (*results, info)


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
        return reference.backward(grads, *given, predicted_mean, predicted_cov, shared=shared)
    results = [None if v is None else _empty(v.shape, dtype) for v in given]
    operands = [None if v is None else _spread(v) for v in given[:7]]
    system, fields = _system([*operands, predicted_mean, predicted_cov], dtype)
    info = array.array("q", _FINE)
    slopes = [
        _operand(None if g is None else _spread(g), dtype, dims)
        for g, dims in zip(grads, (1, 2, 1, 2, 0, 1, 2), strict=True)
    ]
    native.call(
        "kalman_backward",
        (
            *_sizes(y, n, "joseph", shared), *fields, *(0,) * 7, info.buffer_info()[0], 0, 0, 0,
            *(x for _, f in slopes for x in f), *(native.pointer(v) for v in results),
        ),
    )  # fmt: skip
    _need_digits(info, y)
    del system, slopes
    results[4] = reference.symmetric(results[4])  # type: ignore[arg-type]  # R is there
    return tuple(results)


def _need_digits(info: Sequence[int], y: Tensor) -> None:
    """Raise if a way back says that it could not factorise."""
    if info[0] >= 0:
        step, series = divmod(info[0], y.shape[0])
        raise reference.too_few_digits(series, step, y.dtype)


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
) -> Stepped:
    """One observation y (b, m), in place: filtered mean (b, n), cov (b, n, n), loglik (b), and info as of `forward`.

    A (·, n, n), C (·, m, n), Q, R, b (·, n), d (·, m): the first dimension is that of y or 1. index (b) picks rows of
    mean and cov, a negative one skips. No state is touched where a number of y or the system is not finite; a series
    that fails, or whose next state is not finite, keeps its own, others may not.
    """
    if form == "sqrt" and y.dtype is torch.float32:
        return _wide_step(y, (A, C, Q, R, b, d), mean, cov, index)
    means, covs = native.parameter(mean, y.dtype), native.parameter(cov, y.dtype)
    found = _advance(y, (A, C, Q, R, b, d), means, covs, index, form == "sqrt")
    for state, used in ((mean, means), (cov, covs)):
        if state is not used:
            state.copy_(used)
    return found


def update(
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
    noise: int,
) -> Stepped:
    """`step` with one system for all, A (n, n) or (1, n, n) and so on; all contiguous, of one dtype, on the CPU, as is
    the state; index of int64. noise: 1 if the state has factors, and so Q, R; + FACTORS if these have anyway, whose
    lower triangles count."""
    if noise & 1 and y.dtype is torch.float32:
        return _wide_step(y, (A, C, Q, R, b, d), mean, cov, index, noise)
    (rows, m), (slots, n), dtype = y.shape, mean.shape, y.dtype
    if index is None:
        m_out, P_out, loglik = torch.empty_like(mean), torch.empty_like(cov), torch.empty(rows, dtype=dtype, device=CPU)
        which = 0
    else:
        kind: Any = {"dtype": dtype, "device": CPU}
        m_out, P_out, loglik = (torch.zeros(shape, **kind) for shape in ((rows, n), (rows, n, n), (rows,)))
        which = index.data_ptr()
    info = array.array("q", _FINE)
    native.call(
        "kalman_step",
        (
            rows, 1, n, m, torch.get_num_threads(), dtype is torch.float64, noise, 0,
            y.data_ptr(), m, 0, A.data_ptr(), 0, 0, C.data_ptr(), 0, 0, Q.data_ptr(), 0, 0,
            R.data_ptr(), 0, 0, 0 if b is None else b.data_ptr(), n, 0, 0 if d is None else d.data_ptr(), m, 0,
            mean.data_ptr(), n, 0, cov.data_ptr(), n * n, 0, m_out.data_ptr(), P_out.data_ptr(), 0, 0,
            loglik.data_ptr(), mean.data_ptr(), cov.data_ptr(), info.buffer_info()[0], 0, which, slots, *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    return m_out, P_out, loglik, info.tolist()


def _wide_step(
    y: Tensor, system: tuple[Tensor | None, ...], mean: Tensor, cov: Tensor, index: Tensor | None, noise: int = 1
) -> Stepped:
    """A step of factors in float64, of float32 data; of the state's rows only those that are used become wide."""
    system = tuple(None if v is None else v.double() for v in system)
    if index is None:
        wide, rows = (mean.double(), cov.double()), index
    else:
        rows = index.long()
        wide = mean[rows.clamp(min=0)].double(), cov[rows.clamp(min=0)].double()
        index = torch.where(rows < 0, rows, torch.arange(len(rows), device=CPU))
    m, P, loglik, info = _advance(y.double(), system, *wide, index, noise)
    for state, new in zip((mean, cov), wide, strict=True):
        if rows is None:
            state.copy_(new)
        else:
            state[rows[rows >= 0]] = new[rows >= 0].float()
    return m.float(), P.float(), loglik.float(), info


def _advance(
    y: Tensor, system: tuple[Tensor | None, ...], means: Tensor, covs: Tensor, index: Tensor | None, noise: int | bool
) -> Stepped:
    """Results of a step, whose state is contiguous and of the dtype of y; `noise`: the record's `factors`."""
    (rows, m), n, dtype = y.shape, means.shape[1], y.dtype
    make = torch.empty if index is None else torch.zeros
    kind: Any = {"dtype": dtype, "device": CPU}
    out = make(rows, n, **kind), make(rows, n, n, **kind), make(rows, **kind)
    index, info = native.slots(index), array.array("q", _FINE)
    alive: list[Tensor | None] = []
    fields: list[int] = []
    for v, own in zip((y, *system, means, covs), _DIMS, strict=True):
        if v is not None and (v.dtype is not dtype or not v.is_contiguous() or v.is_neg()):
            v = native.parameter(v, dtype)
        alive.append(v)
        fields += ABSENT3 if v is None else (v.data_ptr(), v.stride(0) if v.dim() > own and len(v) > 1 else 0, 0)
    native.call(
        "kalman_step",
        (
            rows, 1, n, m, torch.get_num_threads(), dtype is torch.float64, noise, False, *fields,
            out[0].data_ptr(), out[1].data_ptr(), 0, 0, out[2].data_ptr(), means.data_ptr(), covs.data_ptr(),
            info.buffer_info()[0], 0, native.pointer(index), means.shape[0], *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    del alive
    return (*out, info.tolist())


def smooth(
    y: Tensor,
    A: Tensor,
    C: Tensor,
    R: Tensor,
    d: Tensor | None,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean (N, T, n), cov (s, T, n, n) and Cov(h[t], h[t+1]) (s, T−1, n, n) given all of y, from predicted moments.

    Series that share covariances have those of the first, and means by products over all series at a step."""
    (N, T, _), n = y.shape, predicted_mean.shape[2]
    if not y.numel():
        return reference.smooth(y, A, C, R, d, predicted_mean, predicted_cov, shared=shared)
    if shared and N > 1:
        one = smooth(y[:1], A, C, R, None if d is None else d[:1], predicted_mean[:1], predicted_cov, shared=False)
        return _shared_means(y, A, C, R, d, predicted_mean, predicted_cov), *one[1:]
    shapes = ((N, T, n), (N, T, n, n), (N, T - 1, n, n))
    mean, cov, lag = (_empty(shape, y.dtype) for shape in shapes)
    system, fields = _system((y, A, C, A, R, None, d, predicted_mean, predicted_cov), y.dtype)
    native.call(
        "kalman_smooth",
        (
            *_sizes(y, n, "joseph", False), *fields, mean.data_ptr(), cov.data_ptr(), 0, lag.data_ptr(), *(0,) * 7,
            *_NO_GRADIENTS,
        ),
    )  # fmt: skip
    del system
    return mean, cov, lag


def smooth_backward(
    grads: tuple[Tensor | None, ...],
    y: Tensor,
    A: Tensor,
    C: Tensor,
    R: Tensor,
    d: Tensor | None,
    predicted_mean: Tensor,
    predicted_cov: Tensor,
    *,
    shared: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of y, A, C, R, d, predicted_mean, predicted_cov in their shapes from those of `smooth`'s results."""
    given, dtype, n = (y, A, C, R, d, predicted_mean, predicted_cov), y.dtype, predicted_mean.shape[2]
    if not y.numel():
        return reference.smooth_backward(grads, *given, shared=shared)
    r, W = _empty(predicted_mean.shape, dtype), _empty(predicted_cov.shape, dtype)
    results = [None if v is None else _empty(v.shape, dtype) for v in given]
    y, A, C, R, d = (None if v is None else _spread(v) for v in given[:5])  # type: ignore[assignment]  # d alone may be
    system, fields = _system((y, A, C, W, R, r, d, predicted_mean, predicted_cov), dtype)
    sizes = _sizes(y, n, "joseph", shared)
    found = (0, 0, r.data_ptr(), 0, 0, 0, W.data_ptr())
    native.call("kalman_smooth", (*sizes, *fields, *found, *(0,) * 4, *_NO_GRADIENTS))
    info = array.array("q", _FINE)
    slopes = [
        _operand(None if g is None else _spread(g), dtype, dims) for g, dims in zip(grads, (1, 2, 2), strict=True)
    ]
    (_, mean), (_, cov), (_, lag) = slopes
    incoming = (*mean, *cov, *ABSENT3 * 4, *lag)
    dy, dA, dC, dR, dd, dmean, dcov = (native.pointer(v) for v in results)
    outgoing = (dy, dA, dC, 0, dR, 0, dd, dmean, dcov)
    native.call(
        "kalman_smooth_backward",
        (*sizes, *fields, *(0,) * 7, info.buffer_info()[0], 0, 0, 0, *incoming, *outgoing),
    )
    _need_digits(info, y)
    del system, slopes
    results[3] = reference.symmetric(results[3])  # type: ignore[arg-type]  # R is there
    return tuple(results)


def _shared_means(
    y: Tensor, A: Tensor, C: Tensor, R: Tensor, d: Tensor | None, predicted_mean: Tensor, predicted_cov: Tensor
) -> Tensor:
    """What `reference.smooth` says of means (N, T, n), with a step's series as rows of one matrix."""
    T, m = y.shape[1:]
    rows, before, P = y.transpose(0, 1), predicted_mean.transpose(0, 1), predicted_cov[0]
    e = torch.baddbmm(rows, before, C[0].mT.expand(T, -1, m), alpha=-1)
    if d is not None:
        e -= d.transpose(0, 1)
    seen = ~torch.isnan(rows[:, 0])
    e.masked_fill_(~seen[:, None], 0.0)
    C, R = reference.masked(C[0], R[0], seen)
    S = torch.linalg.cholesky_ex(reference.symmetric(C @ P @ C.mT + R)).L
    K = torch.cholesky_solve(C @ P, S).mT
    rest = torch.eye(A.shape[-1], dtype=y.dtype, device=CPU) - K @ C
    L, PA = (A[0] @ rest).expand_as(P), (rest @ P @ rest.mT + K @ R @ K.mT) @ A[0].mT
    g = torch.bmm(e, torch.cholesky_solve(C, S))
    r = torch.zeros_like(g)
    for t in range(T - 1, 0, -1):
        torch.addmm(g[t], r[t], L[t], out=r[t - 1])
    return torch.baddbmm(before, e, K.mT).baddbmm_(r, PA.mT).transpose(0, 1)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a result, in large pages where there is much: finding pages else takes longer than the filter."""
    result = torch.empty(shape, dtype=dtype, device=CPU)
    if result.numel() > LARGE:
        native.large_pages(result)
    return result


def _sizes(y: Tensor, n: int, form: str, shared: bool) -> tuple[int, ...]:
    N, T, m = y.shape
    return N, T, n, m, torch.get_num_threads(), y.dtype == torch.float64, form == "sqrt", shared


def _operand(v: Tensor | None, dtype: torch.dtype, dims: int) -> tuple[Tensor | None, tuple[int, int, int]]:
    """`v` (·, ·, …) as kernels read it, to be kept alive, and its fields; `dims` trailing dimensions are adjacent."""
    if v is None:
        return None, ABSENT3
    if v.dtype is not dtype:
        v = v.to(dtype)
    shape, strides = v.shape, v.stride()
    inner = len(shape) - dims
    if (dims and shape[-1] > 1 and strides[-1] != 1) or (dims == 2 and strides[-2] != shape[-1]) or v.is_neg():
        v = v.resolve_neg().contiguous()
        strides = v.stride()
    time = strides[1] if inner > 1 and shape[1] > 1 else 0
    return v, (v.data_ptr(), strides[0] if shape[0] > 1 else 0, time)


def _system(operands: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """What the kernels read of y, A, C, Q, R, b, d, mean, cov, to be kept alive, and its fields."""
    alive: list[Tensor | None] = []
    fields: list[int] = []
    for v, dims in zip(operands, _DIMS, strict=True):
        used, where = _operand(v, dtype, dims)
        alive.append(used)
        fields += where
    return alive, tuple(fields)
