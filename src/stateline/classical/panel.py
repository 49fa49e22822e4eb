"""Many series of different lengths as one table: read, checked, aligned at their first values, and scaled.

Suffixes: N series, T time step from a series' first value on, c columns of regressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stateline import checks

#: What `y` may be.
KINDS = "a list of arrays (T), or an array (N, T) of equal times with NaN where a value is missing"


@dataclass(frozen=True)
class Panel:
    """y (N, T) from each series' first value to its end, NaN where missing and after it; X (N, T, c) beside it.

    length (N): steps from first value to end.   first (N): steps that were left out before.   count (N): values.
    """

    y: Tensor
    length: Tensor
    first: Tensor
    X: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """(N, T): which entries have a value."""
        return ~torch.isnan(self.y)

    @property
    def count(self) -> Tensor:
        """(N): how many values each series has."""
        return self.seen.sum(1)

    def after(self, terms: int) -> Tensor:
        """(N, T): values that come after the first `terms` of their series."""
        return self.seen & (self.seen.cumsum(1) > terms)

    def take(self, rows: Tensor) -> Panel:
        """Some series, their table no longer than they are."""
        length = self.length[rows]
        T = int(length.max()) if len(rows) else 0
        X = None if self.X is None else self.X[rows, :T]
        return Panel(self.y[rows, :T], length, self.first[rows], X)

    def logarithms(self) -> Panel:
        """The panel of log y."""
        return Panel(self.y.log(), self.length, self.first, self.X)

    def scaling(self) -> tuple[Tensor, Tensor]:
        """(N) first value and size of a typical change: what y is measured from and in.

        The median change, which outliers do not move; where more than half do not change, the mean change or the range.
        """
        changes = self.y.diff(dim=1).abs()
        low, high = (torch.nan_to_num(self.y, nan=float(sign)) for sign in (np.inf, -np.inf))
        tries = (
            [changes.nanmedian(1).values, changes.nanmean(1), high.amax(1) - low.amin(1)] if self.y.shape[1] > 1 else []
        )
        scale = torch.zeros(len(self.y), dtype=self.y.dtype)
        for size in tries:
            scale = torch.where((scale > 0) | ~(size > 0) | ~torch.isfinite(size), scale, size)
        # A change that is nothing beside the values themselves is rounding, not a unit to measure in.
        centre = self.y[:, 0]
        return centre, torch.where(scale > 1e-12 * centre.abs(), scale, centre.abs().clamp(min=1.0))


def read(op: str, y: Any, X: Any = None, lengths: ArrayLike | None = None, *, trim: bool = True) -> Panel:
    """The panel of series y and regressors X. `trim`: leave out what is missing before a series' first value.

    Raises:
        ValueError, TypeError: naming the series and what is wrong with it.
    """
    rows = _rows(op, y, lengths)
    inputs = None if X is None else _inputs(op, X, [len(row) for row in rows])
    first, kept = [], []
    for i, row in enumerate(rows):
        if np.isinf(row).any():
            raise checks.fail(op, f"series {i} has infinite values.", "Make them NaN, which is a missing value.")
        values = np.flatnonzero(~np.isnan(row))
        if trim and not len(values):
            raise checks.fail(op, f"series {i} has no values.", "Leave it out.")
        first.append(int(values[0]) if trim else 0)
        kept.append(row[first[-1] :])
    length = torch.tensor([len(row) for row in kept])
    table = torch.full((len(kept), int(length.max())), torch.nan, dtype=torch.float64)
    beside = None if inputs is None else torch.zeros(*table.shape, inputs[0].shape[1], dtype=torch.float64)
    for i, row in enumerate(kept):
        table[i, : len(row)] = torch.from_numpy(row)
        if inputs is not None and beside is not None:
            beside[i, : len(row)] = torch.from_numpy(inputs[i][first[i] :])
    return Panel(table, length, torch.tensor(first), beside)


def column_names(X: Any) -> list[str] | None:
    """What the columns of a DataFrame X, or of a list of them, are called; None where they are numbered only."""
    first = X[0] if isinstance(X, Sequence) and len(X) else X
    columns = list(getattr(first, "columns", ()))
    return columns if columns and all(isinstance(name, str) for name in columns) else None


def same_columns(op: str, X: Any, names: list[str]) -> None:
    """Raise if X is a DataFrame, in a list or not, whose columns are not those of the fit, in this order."""
    for table in X if isinstance(X, list | tuple) else [X]:
        found = column_names(table)
        if found is not None and len(found) == len(names) and found != names and not unnamed(names):
            raise checks.fail(op, f"X has the columns {found}, expected {names}, as in fit.", f"As in X[{names}].")


def unnamed(names: list[str]) -> bool:
    """Whether regressors were fitted without names."""
    return names == [f"weight_{i}" for i in range(len(names))]


def future(op: str, X: Any, N: int, steps: int, columns: int) -> Tensor | None:
    """Regressors (N, steps, c) of the steps ahead, from (steps, c) for all series, (N, steps, c) or a list of them."""
    if not columns:
        if X is not None:
            raise checks.fail(op, "X was given, to a model that was fitted without.", "Fit it with X.")
        return None
    if X is None:
        raise checks.fail(op, f"X is None, expected the {columns} regressors of the {steps} steps ahead.")
    found = _inputs(op, X, [steps] * N)
    if found[0].shape[1] != columns:
        raise checks.fail(op, f"X has {found[0].shape[1]} columns, expected {columns}, as in fit.")
    return torch.from_numpy(np.stack(found))


def _rows(op: str, y: Any, lengths: ArrayLike | None) -> list[Any]:
    if type(getattr(y, "index", None)).__name__ in ("DatetimeIndex", "PeriodIndex") and np.ndim(y) == 2:
        raise checks.fail(op, "y is a table whose rows are times, expected a row a series.", "Transpose it: y.T.")
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    if isinstance(y, Sequence) and not isinstance(y, str) and len(y) and np.ndim(y[0]) > 0:
        if lengths is not None:
            raise checks.fail(op, "lengths were given with a list.", "The arrays of a list end where they end.")
        rows = [_floats(op, f"series {i}", row) for i, row in enumerate(y)]
    else:
        table = _floats(op, "y", y)
        if table.ndim == 1:
            raise checks.fail(op, f"y has shape {table.shape}, expected {KINDS}.", "One series is a list of one: [y].")
        rows = list(table) if table.ndim == 2 else [table]
        if lengths is not None:
            ends = np.asarray(lengths)
            if (
                ends.shape != (len(rows),)
                or ends.dtype.kind not in "iu"
                or (ends < 0).any()
                or (ends > table.shape[1]).any()
            ):
                raise checks.fail(
                    op, f"lengths is {lengths!r}, expected {len(rows)} whole numbers up to {table.shape[1]}."
                )
            rows = [row[:end] for row, end in zip(rows, ends, strict=True)]
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise checks.fail(op, f"series {i} has shape {row.shape}, expected (T): {KINDS}.")
    if not rows:
        raise checks.fail(op, "there are no series, expected at least one.")
    return rows


def _floats(op: str, name: str, x: Any) -> Any:
    try:
        given = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x)
        if given.dtype.kind in "mM":
            raise TypeError(f"but of {given.dtype}")
        made = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise checks.fail(
            op, f"{name} is not made of numbers ({error}).", f"Expected {KINDS}.", error=TypeError
        ) from error
    return np.ascontiguousarray(made)


def _inputs(op: str, X: Any, lengths: list[int]) -> list[Any]:
    """(T, c) for each series, from one (T, c) for all, (N, T, c), or a list of (T, c)."""
    if isinstance(X, Sequence) and len(X) and np.ndim(X[0]) == 2:
        found = [_floats(op, f"X of series {i}", x) for i, x in enumerate(X)]
    else:
        table = _floats(op, "X", X)
        if table.ndim not in (2, 3):
            expected = "(T, c) for all series, (N, T, c) or a list of (T, c)"
            remedy = "One regressor is X[:, None]." if table.ndim == 1 else ""
            raise checks.fail(op, f"X has shape {table.shape}, expected {expected}.", remedy)
        found = [table] * len(lengths) if table.ndim == 2 else list(table)
    if len(found) != len(lengths):
        raise checks.fail(op, f"X has {len(found)} series, y has {len(lengths)}.")
    for i, (x, length) in enumerate(zip(found, lengths, strict=True)):
        if x.shape[0] < length or x.shape[1] != found[0].shape[1] or not x.shape[1]:
            expected = f"({length}, {found[0].shape[1] or 'at least one column'})"
            raise checks.fail(op, f"X of series {i} has shape {x.shape}, expected {expected}.")
        if not np.isfinite(x[:length]).all():
            raise checks.fail(op, f"X of series {i} has values that are not finite.", "Only y may have missing values.")
    return [x[:length] for x, length in zip(found, lengths, strict=True)]
