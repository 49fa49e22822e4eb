"""kalman_step_: one observation a series taken into a state in place, for streams.

On a CPU a step of a few states takes a microsecond, and what autograd, transforms and a choice of back ends need takes
forty: `quick_step` does without them wherever nothing of that kind is at work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.kalman import (
    DTYPES,
    SYSTEM,
    Filtered,
    KalmanState,
    SquareRootState,
    State,
    check_state,
    check_system,
    cpu,
    exact,
    kernel,
    raise_failed,
    square_root,
)
from stateline.ops.library import count_write, define, seen_by_nobody

STEP = "kalman_step_"


def kalman_step_(
    state: State,
    y: Tensor,
    A: Tensor,
    C: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    transition_offset: Tensor | None = None,
    observation_offset: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Filtered:
    """Take one observation a series into `state` in place; mean (b, n), cov (b, n, n) given it, and loglik (b).

    Args:
        state: `KalmanState`, or `SquareRootState` for the form by factors, of any number of rows, contiguous.
        y: (b, m), NaN: missing.   A: (·, n, n), C: (·, m, n), Q: (·, n, n), R: (·, m, m), the first dimension b or 1.
        transition_offset: (·, n).   observation_offset: (·, m).
        factors: square roots of Q and R, as in `kalman`; without them they are computed for every call.
        index: (b) distinct rows of the state; a negative one skips: its results are 0 and no row is touched. None: all.

    Predicted moments are in the state: None here. No gradient: for streams.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; as `kalman` for a failed step.
    """
    form = "sqrt" if isinstance(state, SquareRootState) else "joseph"
    given = (Q, R) if factors is None else factors
    usual = backend is None and (form == "joseph") == (factors is None)
    if usual and (factors is None or _alike((Q, R), factors)):
        out = quick_step(state, y, (A, C, *given), (transition_offset, observation_offset), index)
        if out is not None:
            return out
    sizes = Sizes(STEP)
    sizes.match("y", y, "b m")
    offsets = {"transition_offset": transition_offset, "observation_offset": observation_offset}
    check_system(STEP, sizes, y, A, C, Q, R, offsets, form, factors)
    check_state(STEP, sizes, y, state, form, "slots")
    if index is not None:
        sizes.match("index", index, "b")
    checks.same_device(STEP, {"y": y, "index": index})
    with torch.no_grad():
        if form == "sqrt" and factors is None:
            factors = square_root(Q, STEP, "Q"), square_root(R, STEP, "R")
        noise = factors or (Q, R)
        return advance(sizes, state, y, (A, C, *noise, transition_offset, observation_offset), index, backend)


def advance(
    sizes: Sizes, state: State, y: Tensor, system: tuple[Tensor | None, ...], index: Tensor | None, backend: str | None
) -> Filtered:
    """`kalman_step_` with a system that is known to fit y and state: A, C, Q, R (or their roots), b, d."""
    root = isinstance(state, SquareRootState)
    second = state.factor if isinstance(state, SquareRootState) else state.cov
    checks.slots(STEP, sizes, state.mean, index)
    checks.slots(STEP, sizes, second, index)
    mean, cov, loglik = _step(state.mean, second, y, *system, index, "sqrt" if root else "joseph", backend)
    with exact(y):
        return Filtered(mean, cov @ cov.mT if root else cov, None, None, loglik, cov if root else None)


def _alike(given: tuple[Tensor, Tensor], noise: tuple[Tensor, Tensor]) -> bool:
    """Whether Q and R are as their factors are."""
    tensors = type(noise) is tuple and len(noise) == 2 and all(isinstance(v, Tensor) for v in (*given, *noise))
    return tensors and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in zip(given, noise, strict=True)
    )


def _distinct(index: Tensor, b: int, rows: int) -> bool:
    """Whether `index` is b distinct slots below `rows` or negative, as the kernel reads them."""
    usual = isinstance(index, Tensor) and index.shape == (b,) and index.dtype is torch.int64
    if not usual or not (index.is_cpu and index.is_contiguous()):
        return False
    used = [i for i in index.tolist() if i >= 0]
    return not used or (max(used) < rows and len(set(used)) == len(used))


def quick_step(
    state: State,
    y: Tensor,
    system: tuple[Tensor, Tensor, Tensor, Tensor],
    offsets: tuple[Tensor | None, Tensor | None],
    index: Tensor | None = None,
    *,
    triangles: bool = False,
) -> Filtered | None:
    """`kalman_step_`, or None, nothing done, where anything is not as the C++ kernel reads it.

    y: (b, m).   index: (b), as there; None: the state's b rows.   offsets: b = B u (b, n), d = D u (b, m).
    system: A (1, n, n), C (1, m, n), Q (1, n, n), R (1, m, m), or square roots of the last two for a state of factors.
    triangles: the system has no dimension ahead, and of Q, R come square roots whatever the state, of which the lower
        triangles count. They are read as they are now, whoever wrote them.
    """
    if type(state) is KalmanState:
        roots, second = 0, state.cov
    elif type(state) is SquareRootState:
        roots, second = 1, state.factor
    else:
        return None
    given = (y, state.mean, second, *system, *offsets, index)
    if not all(isinstance(v, Tensor) for v in given[:7]) or not seen_by_nobody(given):
        return None
    if y.dim() != 2 or system[1].dim() != (2 if triangles else 3) or backends.native_problem() is not None:
        return None
    (b, _), (*one, m, n), dtype = y.shape, system[1].shape, y.dtype
    rows = b if index is None else (*second.shape, 0)[0]
    shapes = (
        (b, m),
        (rows, n),
        (rows, n, n),
        (*one, n, n),
        (*one, m, n),
        (*one, n, n),
        (*one, m, m),
        (b, n),
        (b, m),
    )
    for v, shape in zip(given, shapes, strict=False):
        if v is not None and not (
            v.shape == shape
            and v.dtype is dtype
            and v.is_cpu
            and v.is_contiguous()
            and not (v.is_neg() or v._is_zerotensor())
        ):
            return None
    if not (m and n) or dtype not in DTYPES or one not in ([], [1]):
        return None
    if index is not None and not _distinct(index, b, rows):
        return None
    kind = roots + (cpu.FACTORS if triangles else 0)
    mean, cov, loglik, info = cpu.update(y, *system, *offsets, state.mean, second, index, kind)
    count_write(state.mean, second)
    if info[1] >= 0 or info[2]:
        raise_failed(info, "sqrt" if roots else "joseph", STEP, (y, *system, *offsets, state.mean, second), index)
    if not roots:
        return Filtered(mean, cov, None, None, loglik)
    with exact(y):
        return Filtered(mean, cov @ cov.mT, None, None, loglik, cov)


# ---- the raw op ------------------------------------------------------------------------------------------------------


def _run_step(mean: Tensor, cov: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, *system, index, form, backend = args
    with exact(y):
        *results, info = kernel(y, backend, *system, form).step(y, *system, mean, cov, index, form=form)
    raise_failed(info, form, STEP, (y, *system, mean, cov), index)
    return tuple(results)


def _fake_step(mean: Tensor, cov: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    b, n = y.shape[0], mean.shape[1]
    return y.new_empty((b, n)), y.new_empty((b, n, n)), y.new_empty((b,))


_step = define(
    f"{STEP}(Tensor(a!) mean, Tensor(b!) cov, {SYSTEM}, Tensor? index, str form, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
    _run_step,
    _fake_step,
)
