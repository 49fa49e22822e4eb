"""How well signals were told apart: a table of classes, a picture of what was taken for what, errors of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[Any]


def confusion(y: Labels, predicted: Labels) -> tuple[list[Any], NDArray[np.int64]]:
    """(classes, counts (true, predicted)) of signals of classes y (n) taken for `predicted` (n)."""
    classes = np.unique(np.concatenate([y, predicted]))
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (np.searchsorted(classes, y), np.searchsorted(classes, predicted)), 1)
    return classes.tolist(), counts


def class_table(y: Labels, predicted: Labels) -> str:
    """A line a class: its signals, the share that was recognised, and what most of the others were taken for."""
    classes, counts = confusion(y, predicted)
    width = max(5, *(len(str(c)) for c in classes))
    lines = [f"{'class':<{width}}  signals   right  most mistaken for"]
    for i, name in enumerate(classes):
        total, right = int(counts[i].sum()), int(counts[i, i])
        if not total:
            continue
        others = counts[i].copy()
        others[i] = 0
        mistaken = f"{classes[others.argmax()]} ({others.max()})" if others.any() else "-"
        lines.append(f"{name!s:<{width}}  {total:7d}  {100 * right / total:5.1f}%  {mistaken}")
    right = int(np.trace(counts))
    lines.append(
        f"{'all':<{width}}  {len(y):7d}  {100 * right / len(y):5.1f}%  balanced {100 * _balanced(counts):.1f}%"
    )
    return "\n".join(lines)


def _balanced(counts: NDArray[np.int64]) -> float:
    """Mean over the classes there are of the share that was recognised."""
    totals = counts.sum(1)
    return float(np.mean(np.diag(counts)[totals > 0] / totals[totals > 0]))


def error_table(y: NDArray[np.float64], predicted: NDArray[np.float64]) -> str:
    """A line a target: root mean square error, mean absolute error, and R² (1 is perfect, 0 is the mean's)."""
    y, predicted = y.reshape(len(y), -1), predicted.reshape(len(y), -1)
    lines = [f"target  signals  {'rms error':>10}  {'mean error':>10}      R²"]
    for i in range(y.shape[1]):
        error = predicted[:, i] - y[:, i]
        spread = float(np.var(y[:, i]))
        score = f"{1 - float(np.mean(error**2)) / spread:6.3f}" if spread else "     -"
        rms, mean = float(np.sqrt(np.mean(error**2))), float(np.mean(np.abs(error)))
        lines.append(f"{i:6d}  {len(y):7d}  {rms:10.4g}  {mean:10.4g}  {score}")
    return "\n".join(lines)


def plot_confusion(y: Labels, predicted: Labels, path: str | Path) -> None:
    """Write the confusion matrix as a picture. Raises ImportError, naming the extra, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the confusion matrix needs matplotlib. Install it: pip install 'stateline[plot]'."
        ) from error
    classes, counts = confusion(y, predicted)
    size = min(12.0, 3.0 + 0.35 * len(classes))
    figure = Figure(figsize=(size, size), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state of pyplot
    axes = figure.add_subplot()
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), [str(c) for c in classes], rotation=90 if len(classes) > 8 else 0)
    axes.set_yticks(range(len(classes)), [str(c) for c in classes])
    axes.set(xlabel="taken for", ylabel="class")
    for i, j in np.argwhere(counts) if len(classes) <= 25 else ():
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=150)
