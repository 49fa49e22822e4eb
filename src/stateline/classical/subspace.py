"""Find a model from inputs and observations without a start: the order and the matrices, by linear algebra alone.

What the past of a record tells of its future goes through the state, so a regression of the future on the past has
the rank n of the state. In canonical variates, singular values are the correlations of past and future; the first n
directions of the past are the state, and A, B, C, D and the noise follow from two regressions.
Sources: Larimore 1990, "Canonical variate analysis in identification, filtering, and adaptive control"; Van Overschee &
De Moor 1996, "Subspace identification for linear systems", chapter 4.

Suffixes: N record, T time step, n state, m observation, p input, i block rows (steps of past, and of future), c column.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stateline import checks
from stateline.classical.model import DTYPES, StateSpace, no_tensor

OP = "n4sid"
#: Of the state's variance: added to Q, so that every motion may be noisy where it is learned further.
NOISE_FLOOR = 1e-4
#: An eigenvalue of A outside the unit circle comes to lie here.
INSIDE = 0.999
#: Singular values, relative to the largest, below which columns of the past count as dependent.
DEPENDENT = {torch.float64: 1e-9, torch.float32: 1e-5}


class Subspace(NamedTuple):
    """model: where to start `fit`.   singular_values: correlations of past and future, (i·min(m, m + p)), at most 1.

    suggested_order: the one behind which they fall farthest.
    y_mean (m), u_mean (p): what was taken from the records with centre=True, else zeros; the model is one of y − y_mean
    and u − u_mean.
    """

    model: StateSpace
    singular_values: Tensor
    suggested_order: int
    y_mean: Tensor
    u_mean: Tensor


def n4sid(
    y: Tensor,
    u: Tensor | None = None,
    *,
    order: int | None = None,
    block_rows: int | None = None,
    feedthrough: bool = False,
    stable: bool = False,
    centre: bool = False,
) -> Subspace:
    """A model of records y, without a start: for `fit` to go on from.

    Args:
        y: (T, m) one record or (N, T, m) several of one system, without gaps.   u: (T, p) or (N, T, p) likewise.
        order: n, the number of states; None takes the suggested one. Look at singular_values before believing it.
        block_rows: steps of the past that tell of as many in the future; None takes 20 or 2 n, fewer in short records.
        feedthrough: whether y[t] may show u[t] at once (D).
        centre: take the mean of all records from y and u first. A `StateSpace` has no offset: without this, records
            whose means are not 0 bend the model, or cost it a state that stands still.
        stable: eigenvalues of A outside the unit circle are moved inside, as `FitOptions(stable=True)` wants them.

    Returns:
        `Subspace`. The state's coordinates are the record's own; m0 and P0 are mean and covariance of the states met.
        Q and R are what the regressions leave, without their correlation, which a `StateSpace` does not have.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; if entries are missing; if records
            are too short, or inputs do not excite the system enough.

    >>> from stateline.classical import oscillator, simulate
    >>> swing = oscillator(period=20.0, variance=1.0, damping=0.98, noise=0.1, prior=1.0)
    >>> _, y = simulate(swing, 2000, generator=torch.Generator().manual_seed(0))
    >>> found = n4sid(y)
    >>> found.suggested_order
    2
    """
    if feedthrough and u is None:
        raise checks.fail(OP, "feedthrough=True, and there are no inputs u.", "Leave it out, or give u.")
    y, u, dtype = _records(y, u)
    N, T, m = y.shape
    p = 0 if u is None else u.shape[2]
    y_mean, u_mean = y.new_zeros(m), y.new_zeros(p)
    if centre:
        y_mean = y.mean((0, 1))
        y = y - y_mean
        if u is not None:
            u_mean = u.mean((0, 1))
            u = u - u_mean
    i = _block_rows(T, m, p, N, order, block_rows)
    most = i * m
    if order is not None:
        checks.number(OP, "order", order, low=1, high=most, integer=True)
    past, future = _windows(y, u, i)
    left, values = _canonical(past, *future, DEPENDENT[dtype])
    suggested = _suggest(values, i * _whiten(y.flatten(0, 1), DEPENDENT[dtype]).shape[1])
    n = order or suggested
    if not left.shape[1]:
        raise checks.fail(OP, "y stays at 0, or is a sum of inputs ahead.", "There is nothing to find a state in.")
    if n > left.shape[1]:
        problem = f"order is {n}, and the past has {left.shape[1]} independent directions"
        raise checks.fail(OP, f"{problem}.", "Take a lower order.")
    states = past @ left[:, :n]
    model = _model(states, y, u, i, feedthrough, stable, dtype)
    return Subspace(model, values.to(dtype), suggested, y_mean.to(dtype), u_mean.to(dtype))


def _records(y: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None, torch.dtype]:
    given = {"y": y} if u is None else {"y": y, "u": u}
    for name, v in given.items():
        if not isinstance(v, Tensor):
            raise no_tensor(OP, name, v, "(N, T, ·)")
        checks.dtype(OP, name, v, DTYPES, "Convert with .to(torch.float64).")
        if v.dim() not in (2, 3) or v.dim() != y.dim() or v.shape[:-1] != y.shape[:-1] or not v.shape[-1]:
            expected = "(T, ·) or (N, T, ·), records and steps alike"
            shapes = ", ".join(f"{n} has shape {tuple(x.shape)}" for n, x in given.items() if isinstance(x, Tensor))
            remedy = f"One value a step is {name}[:, None]." if v.dim() == 1 else ""
            raise checks.fail(OP, f"{shapes}, expected {expected}.", remedy)
        if not torch.isfinite(v).all():
            remedy = (
                "Fill short gaps with the smoothed series of kalman_smoother, or cut the record there, into several."
            )
            raise checks.fail(OP, f"{name} has entries that are missing or infinite.", remedy)
    y, u = (None if v is None else v.detach().to("cpu", torch.float64) for v in (y, u))  # type: ignore[assignment]  # y stays a tensor
    return (y[None], None if u is None else u[None], given["y"].dtype) if y.dim() == 2 else (y, u, given["y"].dtype)


def _block_rows(T: int, m: int, p: int, N: int, order: int | None, wanted: int | None) -> int:
    """Steps of past and of future, so that there are at least twice as many columns as rows of both."""

    def columns(i: int) -> int:
        return N * max(T - 2 * i, 0)

    if wanted is not None:
        checks.number(OP, "block_rows", wanted, low=1, integer=True)
        if columns(wanted) <= 2 * wanted * (m + p):
            problem = f"block_rows is {wanted}: {columns(wanted)} windows for {2 * wanted * (m + p)} rows"
            raise checks.fail(OP, f"{problem}.", "Take fewer, or longer records.")
        return wanted
    least = -(-(order or 1) // m)
    i = max(20, 2 * (order or 1))
    while i > least and columns(i) < 4 * i * (m + p):
        i -= 1
    if columns(i) <= 2 * i * (m + p):
        raise checks.fail(OP, f"records of {T} steps are too short for {order or 1} states.", "Give longer or more.")
    return i


def _windows(y: Tensor, u: Tensor | None, i: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Past of y and u (c, i (m + p)) before each step, and from it on the future of y (c, i m) and of u (c, i p)."""

    def windows(v: Tensor) -> Tensor:
        return v.unfold(1, i, 1).transpose(2, 3).flatten(2)  # (N, T − i + 1, i ·)

    def cut(v: Tensor, ahead: int) -> Tensor:
        W = windows(v)
        return W[:, ahead : W.shape[1] - i + ahead].flatten(0, 1)

    both = y if u is None else torch.cat([y, u], 2)
    future_u = y.new_zeros(cut(y, 0).shape[0], 0) if u is None else cut(u, i)
    return cut(both, 0), (cut(y, i), future_u)


def _canonical(past: Tensor, future_y: Tensor, future_u: Tensor, dependent: float) -> tuple[Tensor, Tensor]:
    """Directions of the past (i (m + p), k), most telling first and of unit variance, and their correlations."""
    c = len(past)
    if future_u.shape[1]:
        Q, triangle = torch.linalg.qr(future_u)
        size = triangle.diagonal().abs()
        if float(size.min()) <= dependent * float(size.max()):
            remedy = "Excite them by steps or noise at more frequencies, or take fewer block_rows."
            raise checks.fail(OP, "the inputs of successive steps are dependent.", remedy)
        past_free, future_y = past - Q @ (Q.mT @ past), future_y - Q @ (Q.mT @ future_y)
    else:
        past_free = past
    white_past, white_future = _whiten(past_free, dependent), _whiten(future_y, dependent)
    U, values, _ = torch.linalg.svd((past_free @ white_past).mT @ (future_y @ white_future) / c)
    rest = future_y.shape[1] - len(values)
    return white_past @ U[:, : len(values)], torch.nn.functional.pad(values.clamp(max=1.0), (0, rest))


def _whiten(X: Tensor, dependent: float) -> Tensor:
    """W with (X W)ᵀ (X W) = c I, directions that X does not have left out."""
    _, sizes, V = torch.linalg.svd(X, full_matrices=False)
    kept = sizes > dependent * sizes[:1]
    return V[kept].mT / sizes[kept] * len(X) ** 0.5


def _suggest(values: Tensor, directions: int) -> int:
    """The order behind which the singular values fall by the largest factor, of half of a future's `directions`.

    Columns of y that are sums of others add no direction.
    """
    if len(values) < 2:
        return 1
    floor = values.clamp(min=1e-8)
    fall = floor[:-1] / floor[1:]
    return int(fall[: max(1, directions // 2)].argmax()) + 1


def _model(
    states: Tensor, y: Tensor, u: Tensor | None, i: int, feedthrough: bool, stable: bool, dtype: torch.dtype
) -> StateSpace:
    N = len(y)
    h = states.unflatten(0, (N, -1))  # at steps i … T − i
    n, steps = h.shape[-1], h.shape[1]
    now_y = y[:, i : i + steps]
    now_u = y.new_zeros(N, steps, 0) if u is None else u[:, i : i + steps]
    p = now_u.shape[-1]
    z = torch.cat([h, now_u if feedthrough else now_u[..., :0]], 2).flatten(0, 1)
    CD = torch.linalg.lstsq(z, now_y.flatten(0, 1)).solution.mT
    rest_y = now_y.flatten(0, 1) - z @ CD.mT
    z = torch.cat([h, now_u], 2)[:, :-1].flatten(0, 1)
    AB = torch.linalg.lstsq(z, h[:, 1:].flatten(0, 1)).solution.mT
    rest_h = h[:, 1:].flatten(0, 1) - z @ AB.mT
    A = AB[:, :n]
    if stable:
        A = _inside(A)
    spread = h.flatten(0, 1)
    centre = spread.mean(0)
    P0 = (spread - centre).mT @ (spread - centre) / len(spread)
    Q = rest_h.mT @ rest_h / len(rest_h) + NOISE_FLOOR * torch.diag(P0.diagonal())
    R = rest_y.mT @ rest_y / len(rest_y)
    R = R + NOISE_FLOOR * torch.diag(y.flatten(0, 1).var(0))
    D = CD[:, n:] if feedthrough and p else None
    return StateSpace(A, AB[:, n:] if p else None, CD[:, :n], D, Q, R, centre, P0).to(dtype)


def _inside(A: Tensor) -> Tensor:
    """A with eigenvalues outside of the unit circle moved in along their directions."""
    values, vectors = torch.linalg.eig(A)
    size = values.abs()
    if bool((size < 1).all()):
        return A
    values = torch.where(size >= 1, values / size * INSIDE, values)
    return torch.linalg.solve(vectors, vectors * values, left=False).real
