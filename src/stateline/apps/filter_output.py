"""What a filter found, as a CSV and as a picture."""

from __future__ import annotations

import csv
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from stateline import checks
from stateline.apps.filtering import Ahead, Clean, SeriesFilter, deviations
from stateline.apps.series_files import Series

OP = "filter"
COLUMNS = ("time", "column", "kind", "observed", "mean", "sd", "lower", "upper")
SMOOTHED = ("smoothed", "smoothed_sd")
#: A picture shows so many of the last rows, and so many columns.
DRAWN, PANELS = 2000, 12


@dataclass
class Table:
    """Writes a CSV to `out`: a line for each row and column, and for each step of a forecast. Its header comes with the
    first of them, so that an error leaves nothing behind.

    level: the probability of lower to upper.   smooth: whether there are two columns more.
    """

    out: TextIO
    level: float
    smooth: bool = False

    def __post_init__(self) -> None:
        self._reach = deviations(self.level)
        self._writer = csv.writer(self.out, lineterminator="\n")
        self._begun = False

    def begin(self) -> None:
        """Write the header, if it is not there yet."""
        if not self._begun:
            self._writer.writerow([*COLUMNS, *(SMOOTHED if self.smooth else ())])
        self._begun = True

    def rows(self, series: Series, clean: Clean, count: int) -> None:
        """Write what was found of a series whose last row is the `count`-th of all."""
        first = count - len(series.rows) + 1
        lines = []
        mean, sd, seen = clean.mean.tolist(), clean.sd.tolist(), series.values.tolist()
        late = clean.smoothed.tolist() if clean.smoothed is not None else None
        late_sd = clean.smoothed_sd.tolist() if clean.smoothed_sd is not None else None
        for t, row in enumerate(series.rows):
            label = row.label if row.moment is not None else str(first + t)
            for c, name in enumerate(series.columns):
                line = [label, name, "data", _cell(seen[t][c], 15), *self._moments(mean[t][c], sd[t][c])]
                if late is not None and late_sd is not None:
                    line += [_cell(late[t][c]), _cell(late_sd[t][c])]
                lines.append(line)
        self.begin()
        self._writer.writerows(lines)

    def ahead(self, ahead: Ahead, columns: tuple[str, ...]) -> None:
        """Write a forecast; nothing is observed, and intervals are of what will be."""
        self.begin()
        empty = [""] * len(SMOOTHED) if self.smooth else []
        for t, label in enumerate(ahead.times):
            for c, name in enumerate(columns):
                moments = self._moments(float(ahead.mean[t, c]), float(ahead.sd[t, c]))
                self._writer.writerow([label, name, "forecast", "", *moments, *empty])

    def _moments(self, mean: float, sd: float) -> list[str]:
        return [_cell(x) for x in (mean, sd, mean - self._reach * sd, mean + self._reach * sd)]


def _cell(value: float, digits: int = 8) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


@dataclass
class Picture:
    """Remembers the last rows that went by, and draws them: a panel a column."""

    level: float
    series: deque[tuple[Any, list[float], list[float], list[float]]] = field(
        default_factory=lambda: deque(maxlen=DRAWN)
    )

    @staticmethod
    def check(columns: int) -> None:
        """Raise, before any work, if there is no matplotlib or there are too many columns."""
        try:
            import matplotlib  # noqa: F401  # only asked whether it is there
        except ImportError as error:
            remedy = "Install it: pip install 'stateline[plot]'."
            raise checks.fail(
                OP, "--plot needs matplotlib, which is not installed.", remedy, error=ImportError
            ) from error
        if columns > PANELS:
            raise checks.fail(OP, f"{columns} columns were to be drawn, expected at most {PANELS}.", "Use --columns.")

    def add(self, series: Series, clean: Clean, count: int) -> None:
        """Take in a piece, the best estimates of it that there are."""
        best = clean.mean if clean.smoothed is None else clean.smoothed
        sd = clean.sd if clean.smoothed_sd is None else clean.smoothed_sd
        first = count - len(series.rows) + 1
        places = [row.moment if row.moment is not None else first + t for t, row in enumerate(series.rows)]
        found = zip(places, series.values.tolist(), best.tolist(), sd.tolist(), strict=True)
        self.series.extend(list(found)[-DRAWN:])

    def draw(self, path: Path, sensor: SeriesFilter, ahead: Ahead | None, smooth: bool) -> None:
        """Write the picture, of the kind that the file's name ends in."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        count = len(sensor.columns)
        figure, axes = pyplot.subplots(
            count, 1, figsize=(9, 1 + 2.6 * count), layout="constrained", sharex=True, squeeze=False
        )
        places = [row[0] for row in self.series]
        seen, best, sd = (torch.tensor([row[k] for row in self.series]).reshape(-1, count) for k in (1, 2, 3))
        later = sensor.places(ahead) if ahead is not None else []
        share = f"{100 * self.level:.6g} %"
        names = ("smoothed" if smooth else "filtered", f"{share} of the signal")
        later_names = ("forecast", f"{share} of what will be measured")
        for c, axis in enumerate(axes[:, 0]):
            axis.plot(places, seen[:, c], ".", color="0.6", markersize=3, label="observed")
            _band(axis, places, best[:, c], deviations(self.level) * sd[:, c], "tab:blue", names)
            if ahead is not None and later:
                half = deviations(self.level) * ahead.sd[:, c]
                _band(axis, later, ahead.mean[:, c], half, "tab:orange", later_names)
            axis.set_ylabel(sensor.columns[c])
            _frame(axis, seen[:, c], best[:, c], ahead.interval(self.level) if ahead is not None else (), c)
        axes[0, 0].legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False)
        axes[-1, 0].set_xlabel(sensor.time or "row")
        figure.autofmt_xdate() if sensor.clock.kind in ("seconds", "months") else None
        figure.savefig(path, dpi=90)
        pyplot.close(figure)


def _band(axis: Any, places: list[Any], mean: Tensor, half: Tensor, color: str, names: tuple[str, str]) -> None:
    axis.plot(places, mean, color=color, linewidth=1.2, label=names[0])
    axis.fill_between(places, mean - half, mean + half, color=color, alpha=0.2, linewidth=0, label=names[1])


def _frame(axis: Any, seen: Tensor, best: Tensor, interval: Sequence[Tensor], c: int) -> None:
    """Heights of what was seen, is thought, and is expected, intervals too; those of first rows may reach beyond."""
    parts = [seen[seen.isfinite()], best, *(end[:, c] for end in interval)]
    values = torch.cat([part.double() for part in parts])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    margin = 0.35 * (high - low) or 1.0
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, low - margin), min(top, high + margin))
