"""Signals as estimators take them: checked, listed, split, and their channels' means and deviations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stateline import checks
from stateline.apps.sklearn_names import check_array

Floats = NDArray[np.float64]


def as_series(op: str, X: Any) -> list[Floats]:
    """Signals as a list of (time, channel) float64 arrays. Raises ValueError or TypeError saying which one is wrong."""
    if isinstance(X, list | tuple) and len(X) and all(np.ndim(x) in (1, 2) for x in map(_array, X)):
        found = []
        for i, x in enumerate(map(_array, X)):
            name = f"X[{i}]"
            if not len(x):
                raise checks.fail(op, f"{name} is empty, expected at least one sample.", "Leave it out.")
            x = check_array(x, ensure_2d=False, dtype=np.float64, ensure_all_finite="allow-nan", input_name=name)
            found.append(x[:, None] if x.ndim == 1 else x)
    else:
        array = check_array(X, allow_nd=True, dtype=np.float64, ensure_all_finite="allow-nan", input_name="X")
        if array.ndim not in (2, 3):
            raise checks.fail(op, f"X has shape {array.shape}, expected (n, time) or (n, time, channel).")
        array = array[:, :, None] if array.ndim == 2 else array
        if 0 in array.shape:
            raise checks.fail(op, f"X has shape {array.shape}, expected at least one signal, sample and channel.")
        found = list(array)
    if len(widths := {x.shape[1] for x in found}) > 1:
        raise checks.fail(
            op, f"X has signals of {' and '.join(map(str, sorted(widths)))} channels.", "Are they (time, channel)?"
        )
    return found


def _array(x: Any) -> Any:
    return x if hasattr(x, "ndim") else np.asarray(x)


def held_out(groups: NDArray[np.int64], fraction: float, random: np.random.RandomState) -> NDArray[np.bool_]:
    """Which series are held out: about `fraction` of each group, never all of one."""
    n = len(groups)
    order = random.permutation(n)
    order = order[np.argsort(groups[order], kind="stable")]
    chosen = np.zeros(n, dtype=bool)
    chosen[order[np.arange(0.5 / fraction, n, 1 / fraction).astype(int)]] = True
    for group in np.unique(groups[chosen]):
        members = np.flatnonzero(groups == group)
        if chosen[members].all():
            chosen[members[0]] = False
    return chosen


def standard(series: list[Floats]) -> tuple[Floats, Floats]:
    """(mean, standard deviation) of each channel over all samples there are; (0, 1) of one that is empty, and a
    deviation of 1 for one that is constant."""
    count = np.maximum(1, sum((~np.isnan(x)).sum(0) for x in series))
    mean = sum(np.nansum(x, 0) for x in series) / count
    scale = np.sqrt(sum(np.nansum((x - mean) ** 2, 0) for x in series) / count)
    return mean, np.where(scale > 1e-12 * np.maximum(1, np.abs(mean)), scale, 1.0)
