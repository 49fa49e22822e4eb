"""The step of one constant system on a CPU, for streams: what `kalman_step_` does, without the way there.

A step of a few states takes a microsecond; what autograd, transforms and the choice of a back end need takes forty.
"""

from __future__ import annotations

from torch import Tensor

from stateline import backends
from stateline.ops.kalman import DTYPES, STEP, Filtered, KalmanState, SquareRootState, State, cpu, exact, raise_failed
from stateline.ops.library import count_write, seen_by_nobody


def quick_step(
    state: State, y: Tensor, system: tuple[Tensor, Tensor, Tensor, Tensor], offsets: tuple[Tensor | None, Tensor | None]
) -> Filtered | None:
    """`kalman_step_` of rows 0 … b−1, or None, nothing done, where anything is not as the C++ kernel reads it.

    y: (b, m).   state: b rows.   offsets: b = B u (b, n), d = D u (b, m).
    system: A (n, n), C (m, n), and factors of Q (n, n), R (m, m), of which the lower triangles count. They are read as
    they are now, whoever wrote them.
    """
    if type(state) is KalmanState:
        form, second = "joseph", state.cov
    elif type(state) is SquareRootState:
        form, second = "sqrt", state.factor
    else:
        return None
    given = (y, state.mean, second, *system, *offsets)
    if not (isinstance(y, Tensor) and isinstance(state.mean, Tensor) and isinstance(second, Tensor)):
        return None
    if not seen_by_nobody(given) or y.dim() != 2 or system[1].dim() != 2:
        return None
    (rows, _), (m, n), dtype = y.shape, system[1].shape, y.dtype
    shapes = (rows, m), (rows, n), (rows, n, n), (n, n), (m, n), (n, n), (m, m), (rows, n), (rows, m)
    for v, shape in zip(given, shapes, strict=True):
        if v is not None and not (
            v.shape == shape and v.dtype is dtype and v.is_cpu and v.is_contiguous() and not v.is_neg()
        ):
            return None
    if not (m and n) or dtype not in DTYPES or backends.native_problem() is not None:
        return None
    found, cov, loglik, info = cpu.update(y, *system, *offsets, state.mean, second, form=form)
    count_write(state.mean, second)
    raise_failed(info, form, STEP)
    if form == "joseph":
        return Filtered(found, cov, None, None, loglik)
    with exact(y):
        return Filtered(found, cov @ cov.mT, None, None, loglik, cov)
