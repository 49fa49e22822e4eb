"""Noisy series made clean, forecast, and gone on with tomorrow: what `stateline filter` does, in Python.

    series = read_series("sensor.csv", time="time")
    sensor = SeriesFilter("local-trend").fit(series)     # learns how noisy the sensor is, and how the signal moves
    clean = sensor.extend(series, smooth=True)
    ahead = sensor.forecast(24)
    sensor.save("sensor.safetensors")                    # SeriesFilter.load(…).extend(…) goes on with what comes

The columns of a series are filtered apart, each with variances of its own, unless the model takes them together
(constant-velocity, constant-acceleration, matrices). Suffixes: N series apart, T rows, m columns together, n state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateline import checks, state
from stateline.apps.filter_learning import likeliest, starts_of
from stateline.apps.filter_models import F64, NOISE, Blueprint, blueprint, described
from stateline.apps.series_files import NUMBERS, Clock, Row, Series, names_of, read_series, series_of
from stateline.classical import KalmanState, StateSpace, kalman_filter
from stateline.classical.smoother import filter_and_smooth

__all__ = ["Ahead", "Clean", "SeriesFilter", "read_series", "series_of"]

OP = "filter"
FORMAT = "stateline-filter"
#: Variance of what is not known before the first row, in those of the data.
PRIOR = 1e4
#: Logarithms of variances, in those of the data: what moves less stands still. Of a sensor's noise so much stays that
#: covariances keep their digits.
LEAST, LEAST_NOISE, MOST = -30.0, -18.0, 12.0
#: Numbers of a chunk's matrices, which keeps memory constant.
ROOM = 2_000_000
CHUNK = 4096


@dataclass(frozen=True)
class Clean:
    """Estimates of the signal, without the sensor's noise: mean, sd (T, columns), from the rows until then.

    smoothed, smoothed_sd: from all rows, those after it too; None if not asked for.   loglik: (T), summed over columns.
    """

    mean: Tensor
    sd: Tensor
    loglik: Tensor
    smoothed: Tensor | None = None
    smoothed_sd: Tensor | None = None


@dataclass(frozen=True)
class Ahead:
    """What the next rows are expected to be, the sensor's noise included: mean, sd (steps, columns); times, written."""

    times: list[str]
    mean: Tensor
    sd: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (steps, columns) between which each value lies with probability `level`."""
        reach = deviations(level)
        return self.mean - reach * self.sd, self.mean + reach * self.sd


def deviations(level: float) -> float:
    """How many standard deviations an interval of this probability reaches to each side."""
    checks.probability(OP, "the interval", level)
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=F64)))


class SeriesFilter:
    """A filter that learns its noise from a series, goes on for ever, and is saved and loaded.

    Args:
        model: a name ("local-trend"), a sum of names ("local-trend+seasonal:24"), a YAML file, or what such a file
            holds; `stateline filter --help` lists the names.
        step: what is one step of the model, in the units of numeric times or in seconds; None: the middle of the gaps
            between the rows that `fit` sees.

    Raises:
        ValueError, TypeError: naming what was expected and what came.

    >>> wave = torch.sin(torch.arange(200) / 20) + 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    >>> series = series_of(wave)
    >>> sensor = SeriesFilter("local-trend").fit(series)
    >>> clean = sensor.extend(series, smooth=True)
    >>> truth = torch.sin(torch.arange(200) / 20)
    >>> bool((clean.smoothed[:, 0] - truth).std() < 0.4 * (wave - truth).std())
    True
    >>> sensor.forecast(5).mean.shape
    torch.Size([5, 1])
    """

    def __init__(self, model: str | Path | Mapping[str, Any] = "local-trend", *, step: float | None = None) -> None:
        if step is not None:
            checks.number(OP, "step", step, low=0.0, open_low=True)
        self.spec = described(model)
        self._source = str(model) if isinstance(model, str | Path) else "the model"
        self.step = step
        self.columns: tuple[str, ...] = ()
        self.time: str | None = None
        self.time_format: str | None = None
        self.decimal = "."
        self.names: tuple[str, ...] = ()  # of all columns of the file it was fitted to
        self.clock = Clock()
        self.rows = 0
        self.last = math.nan  # position of the last row
        self._plan: Blueprint | None = None
        self._values: dict[str, Tensor] = {}  # each variance (N)
        self._middle = self._scale = torch.empty(0)
        self._state: KalmanState | None = None  # filtered moments at the last row
        self._kept: dict[bytes, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        known = f"columns={self.columns}, rows={self.rows}" if self._plan is not None else "not fitted"
        return f"SeriesFilter({self.spec!r}, {known})"

    # ---- learning ----------------------------------------------------------------------------------------------------

    @property
    def variances(self) -> dict[str, list[float]]:
        """Each variance by name: one a column, or one for all; empty before `fit`."""
        return {name: values.tolist() for name, values in self._values.items() if name not in ("Q", "R")}

    @property
    def exact(self) -> tuple[str, ...]:
        """Columns predicted without error, as one that is constant: their noise is the least there is, not learnt."""
        plan = self._plan
        if plan is None or plan.joint or NOISE not in plan.free:
            return ()
        moves = torch.stack([self._values[name] for name in plan.free if name != NOISE] or [0 * self._values[NOISE]])
        none = (moves == 0).all(0) & (self._values[NOISE] < 1.01 * self._scale * math.exp(LEAST_NOISE))
        return tuple(name for name, one in zip(self.columns, none.tolist(), strict=True) if one)

    @property
    def learns(self) -> bool:
        """Whether the model leaves variances to be learnt."""
        spec = self.spec
        if "components" not in spec:
            return "learn" in (spec["Q"], spec["R"])
        return bool(self._blueprint(1).free)

    def fit(self, series: Series | Tensor, *, learn: bool = True) -> SeriesFilter:
        """Find the step, and the variances that make the series most likely; nothing of it is filtered yet.

        series: or what `series_of` takes: a tensor; a DataFrame or Series of pandas, whose index is the times.
        learn: False takes only names, step and scale from the series, for a model without variances to learn.
        """
        series = series if isinstance(series, Series) else series_of(series)
        if self.step is not None and series.time is None:
            problem = f"step is {self.step:g}, and {series.source} has no times"
            raise checks.fail(OP, f"{problem}.", "Without times a row is a step: leave it out.")
        self.columns, self.time = series.columns, series.time
        self.time_format, self.names, self.decimal = series.time_format, series.names, series.decimal
        self.clock = Clock.of(series.rows, self.step, series.time_format)
        if self.clock.kind == "numbers":  # also where a file begins with 202401, say
            self.time_format = NUMBERS
        plan = self._plan = self._blueprint(len(self.columns))
        values = series.values
        seen = values.isfinite().sum(0)
        if learn and plan.free:
            for name, count in zip(self.columns, seen.tolist(), strict=True):
                if count < 2 + plan.n:
                    need = f"{len(plan.free)} variances are to be learnt and it has {count} values, expected more"
                    remedy = "Give more, or variances of its own in a .yaml model."
                    remedy = remedy if count else "Leave it out: --columns names those to filter."
                    raise checks.fail(OP, f"{series.source}, column {name!r}: {need} than {1 + plan.n}.", remedy)
        self._middle = torch.nan_to_num(values.nanmedian(0).values if len(values) else torch.zeros(values.shape[1]))
        spread = torch.stack([column[column.isfinite()].var(correction=0) for column in values.T])
        known = max([value for name, value in plan.fixed.items() if name in plan.names] or [0.0]) or 1.0
        self._scale = torch.where(spread > 0, spread, known)  # of one row, or rows all alike, nothing is learnt
        self._state, self.rows, self.last, self._kept = None, 0, math.nan, {}
        N = 1 if plan.joint else len(self.columns)
        self._values = {name: torch.full((N,), value, dtype=F64) for name, value in plan.fixed.items()}
        if plan.free:
            if not learn:
                raise checks.fail(OP, f"the model leaves {', '.join(plan.free)} to be learnt.", "Fit it to a series.")
            self._learn(plan, series)
        self._values = {name: self._values[name] for name in (*plan.names, *self._values) if name in self._values}
        return self

    def _learn(self, plan: Blueprint, series: Series) -> None:
        """Maximum likelihood, columns side by side, by L-BFGS on logarithms: the best of a few searches for each.

        Likelihoods have several tops: one where all that may move does, others where one thing explains all motion.
        """
        y, gaps = self._arranged(series.values), self._steps(self._places(series.rows, None, series.source), True)
        gaps = gaps[:1] if bool((gaps[:-1] == gaps[0]).all()) else gaps  # what follows the last row is not seen
        A, units = self._over(gaps)
        scale = self._scale.amax().expand(1) if plan.joint else self._scale
        moves = torch.tensor([name not in plan.sensors for name in plan.free])
        least = torch.where(moves, LEAST, LEAST_NOISE).to(F64)
        starts = starts_of(moves)

        def likelihood(logs: Tensor, at: Tensor) -> Tensor:
            free = scale[at, None] * logs.clamp(least, least.new_tensor(MOST)).exp()
            given = {name: value[at] for name, value in self._values.items() if name in plan.fixed}
            model = self._model(A, units, given | {n: free[:, k] for k, n in enumerate(plan.free)}, at)
            return kalman_filter(model, y[at], keep="loglik")[0].loglik.sum(-1)

        found = []
        for at in torch.arange(len(y)).split(max(1, ROOM // (len(gaps) * plan.n**2 + len(series.rows)))):
            with torch.no_grad():
                chances = torch.stack([likelihood(x.expand(len(at), -1), at) for x in starts.flatten(0, 1)])
            first = chances.unflatten(0, starts.shape[:2]).argmax(1)  # of each family (families, N)
            begin = torch.stack([family[best] for family, best in zip(starts, first, strict=True)])
            tops = likeliest(likelihood, begin.flatten(0, 1), at.repeat(len(starts)))
            x, value = (v.unflatten(0, first.shape) for v in tops)
            best = x[value.argmin(0), torch.arange(len(at))].clamp(least, least.new_tensor(MOST))
            found.append(torch.where(moves & (best < LEAST + 8), 0.0, scale[at, None] * best.exp()))
        self._values |= dict(zip(plan.free, torch.cat(found).unbind(1), strict=True))

    # ---- filtering ---------------------------------------------------------------------------------------------------

    def extend(self, series: Series | Tensor, *, smooth: bool = False, tied: bool = False) -> Clean:
        """Go on with the rows of a series: estimates of each. In pieces, the results are those of the whole.

        smooth: also estimate each row from those after it, of this series; takes memory for all of them at once.
        tied: allow its first row the time of the last so far, where rows of one time were cut apart.

        Raises:
            ValueError: if columns or times are not those of the series so far.
        """
        if not isinstance(series, Series):
            series = series_of(series, columns=names_of(series) or self.columns or None)
        self._check(series, tied)
        parts: list[Clean] = []
        plan, T = self._plan, len(series.rows)
        assert plan is not None
        if smooth:
            return self._piece(series.values, series.rows, series.source, smooth=True)
        size = self.chunk
        for at in range(0, T, size):
            rows = series.rows[at : at + size]
            parts.append(self._piece(series.values[at : at + size], rows, series.source))
        if not parts:
            nothing = torch.empty(0, len(self.columns), dtype=F64)
            return Clean(nothing, nothing, torch.empty(0, dtype=F64))
        return Clean(*(torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "sd", "loglik")))

    @property
    def chunk(self) -> int:
        """How many rows are filtered at once, so that memory is constant."""
        assert self._plan is not None
        N = 1 if self._plan.joint else len(self.columns)
        return max(1, min(CHUNK, ROOM // (N * self._plan.n**2)))

    def forecast(self, steps: int) -> Ahead:
        """What the next `steps` rows are expected to be; the filter stays where it is."""
        checks.number(OP, "forecast", steps, low=0, integer=True)
        plan = self._ready()
        if self._state is None:
            raise checks.fail(OP, "nothing was filtered yet.", "Call extend first.")
        where = [self.last + (i + 1) * self.clock.step for i in range(steps)]
        start = self.rows + 1
        times = [str(start + i) if self.clock.kind == "rows" else self.clock.written(x) for i, x in enumerate(where)]
        gaps = torch.cat([torch.ones(steps, dtype=F64), torch.zeros(1, dtype=F64)])
        A, units = self._over(gaps)
        y = torch.full((len(self._state.mean), steps + 1, len(plan.seen)), math.nan, dtype=F64)
        model = self._model(A, units, self._values)
        out, _ = kalman_filter(model, y, initial_state=self._state)
        assert out.mean is not None
        assert out.cov is not None
        mean, variance = self._shown(out.mean[:, 1:], out.cov[:, 1:])
        sd = (variance + model.R.diagonal(dim1=-2, dim2=-1)).sqrt()
        return Ahead(times, self._flat(mean), self._flat(sd))

    def places(self, ahead: Ahead) -> list[Any]:
        """Where on the axis of time a forecast lies: row numbers, numbers or datetimes."""
        if self.clock.kind == "rows":
            return [int(text) for text in ahead.times]
        where = [self.last + (i + 1) * self.clock.step for i in range(len(ahead.times))]
        return where if self.clock.kind == "numbers" else [self.clock.moment(x) for x in where]

    def _piece(self, values: Tensor, rows: list[Row], source: str, smooth: bool = False) -> Clean:
        model, y, start, skip, end = self._prepared(values, rows, source)
        late: tuple[Tensor, ...] = ()
        if smooth:
            out, last, whole = filter_and_smooth(model, y, initial_state=start)
            late = self._signal(whole.mean, whole.cov, skip)
        else:
            out, last = kalman_filter(model, y, initial_state=start)
        assert out.mean is not None
        assert out.cov is not None
        assert isinstance(last, KalmanState)
        self._state, self.last, self.rows = last, end, self.rows + len(rows)
        return Clean(*self._signal(out.mean, out.cov, skip), out.loglik[:, skip:].sum(0), *late)

    def _signal(self, mean: Tensor, cov: Tensor, skip: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (T, columns) of the signal, without the first rows."""
        shown, variance = self._shown(mean[:, skip:], cov[:, skip:])
        return self._flat(shown), self._flat(variance.sqrt())

    def _shown(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (N, T, m) of what a state (N, T, n) shows; as sums, a row's bits are its own."""
        seen = self._ready().seen
        half = (cov[..., None, :, :] * seen[:, :, None]).sum(-2)
        return (mean[..., None, :] * seen).sum(-1), (half * seen).sum(-1).clamp(min=0)

    def _prepared(
        self, values: Tensor, rows: list[Row], source: str
    ) -> tuple[StateSpace, Tensor, KalmanState | None, int, float]:
        """Model, y, start of a piece, how many rows stand ahead of it, and the position of its last.

        Ahead stands the last row again with nothing seen, so that the way from there is a step as any other; after the
        last row the model stands still, so that the state it leaves is that row's: pieces equal the whole, bit for bit.
        """
        places = self._places(rows, self.last, source)
        y = self._arranged(values)
        if self._state is None:
            A, units = self._over(self._steps(places, True))
            return self._model(A, units, self._values), y, None, 0, places[-1] if places else math.nan
        y = torch.cat([torch.full_like(y[:, :1], math.nan), y], 1)
        A, units = self._over(self._steps([self.last, *places], True))
        return self._model(A, units, self._values), y, self._state, 1, places[-1] if places else self.last

    def _places(self, rows: Sequence[Row], last: float | None, source: str) -> list[float]:
        """Positions of rows, in order."""
        if self.clock.kind == "rows":
            begin = self.rows if last is not None else 0
            return [self.clock.step * (begin + i) for i in range(len(rows))]
        found: list[float] = []
        before = -math.inf if last is None or math.isnan(last) else last
        for row in rows:
            if row.moment is None or not self.clock.fits(row.moment):
                raise checks.fail(OP, f"{source}, line {row.line}: {self._unlike(row)}")
            place = self.clock.position(row.moment)
            if place < before:
                raise self._back(row, source, f"before that of the row ahead, {self.clock.written(before)!r}")
            before = place
            found.append(place)
        return found

    def _back(self, row: Row, source: str, what: str) -> Exception:
        problem = f"{source}, line {row.line}: the time {row.label!r} is {what}."
        return checks.fail(OP, problem, "Sort the rows; or was this file taken in before?")

    def _unlike(self, row: Row) -> str:
        """What is wrong with the time of a row that does not fit the clock."""
        if self.clock.kind == "numbers" or not isinstance(row.moment, datetime):
            kind = "numbers" if self.clock.kind == "numbers" else "dates"
            return f"the time {row.label!r} is unlike the {kind} before."
        has, had = ("no", "have one") if row.moment.tzinfo is None else ("a", "have none")
        return f"the time {row.label!r} has {has} time zone, and those before {had}."

    def _steps(self, places: list[float], stop: bool) -> Tensor:
        """Gaps (T) in steps from each place to the next; none after the last."""
        gaps = [self.clock.steps(b - a) for a, b in pairwise(places)]
        return torch.tensor([*gaps, 0.0] if stop and places else gaps, dtype=F64)

    def _over(self, gaps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Transitions (T, n, n) over gaps (T), and what a unit of each variance adds."""
        plan = self._ready()
        different, which = torch.unique(gaps, return_inverse=True)
        key = different.numpy().tobytes()
        if key not in self._kept:
            if len(self._kept) > 8:  # uneven series have gaps of their own in each piece
                self._kept.clear()
            self._kept[key] = plan.transitions(different)  # type: ignore[assignment]  # a pair
        A, units = self._kept[key]
        return A[which], {name: Q[which] for name, Q in units.items()}  # type: ignore[attr-defined]  # a pair

    def _model(
        self, A: Tensor, units: Mapping[str, Tensor], values: Mapping[str, Tensor], at: Tensor | None = None
    ) -> StateSpace:
        """The model of all series apart (N, T, n, n), or of the series `at` (N); A (T, n, n), values (N) each."""
        plan = self._ready()
        apart = 1 if plan.joint else len(self.columns)
        Q = torch.zeros_like(A)
        for name, unit in units.items():
            Q = Q + values[name].reshape(-1, 1, 1, 1) * unit
        R = A.new_zeros(len(plan.seen), len(plan.seen))
        for name, unit in plan.sensors.items():
            R = R + values[name].reshape(-1, 1, 1, 1) * unit
        m0, P0 = A.new_zeros(apart, plan.n), PRIOR * torch.eye(plan.n, dtype=F64)
        if plan.levels:
            m0[:, list(plan.levels)] = self._middle.reshape(apart, -1).to(F64)
        # Without a level that begins among the data, the start is 0 and must allow for how far off they are.
        scale = self._scale if plan.levels else self._scale + self._middle.to(F64).square()
        scale = scale.amax().expand(apart) if plan.joint else scale
        P0 = scale[:, None, None] * P0
        if plan.m0 is not None:
            m0 = plan.m0.expand(apart, plan.n)
        if plan.P0 is not None:
            P0 = plan.P0.expand(apart, plan.n, plan.n)
        if at is not None:
            m0, P0 = m0[at], P0[at]
        return StateSpace(A, None, plan.seen, None, Q, R, m0, P0)

    def _arranged(self, values: Tensor) -> Tensor:
        """(T, columns) as the filter takes them, (N, T, m)."""
        return values[None] if self._ready().joint else values.mT[..., None]

    def _flat(self, x: Tensor) -> Tensor:
        """(N, T, m) as (T, columns)."""
        return x[0] if self._ready().joint else x[..., 0].mT

    def _ready(self) -> Blueprint:
        if self._plan is None:
            raise checks.fail(OP, "the filter was not fitted.", "Call fit with a series, or load a filter.")
        return self._plan

    def _blueprint(self, columns: int) -> Blueprint:
        return blueprint(self.spec, columns, self._source)

    def _check(self, series: Series, tied: bool) -> None:
        self._ready()
        if series.columns != self.columns:
            problem = f"{series.source} has the columns {', '.join(series.columns)}"
            raise checks.fail(OP, f"{problem}, expected {', '.join(self.columns)} as fitted.")
        if (series.time is None) != (self.clock.kind == "rows"):
            has, had = ("no times", "has") if series.time is None else ("times", "has none")
            raise checks.fail(OP, f"{series.source} has {has}, what was fitted {had}.")
        for row in () if tied else series.rows[:1]:
            if row.moment is not None and self.clock.fits(row.moment) and self.clock.position(row.moment) == self.last:
                raise self._back(row, series.source, "that of the last row so far")

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all that is needed to go on to a safetensors file, whole or not at all."""
        self._ready()
        about = {
            "model": self.spec, "columns": self.columns, "time": self.time, "time_format": self.time_format,
            "names": self.names, "rows": self.rows, "clock": asdict(self.clock), "step": self.step,
            "decimal": self.decimal,
        }  # fmt: skip
        tensors = {f"variance {name}": value for name, value in self._values.items()}
        tensors |= {"middle": self._middle, "scale": self._scale, "last": torch.tensor(self.last, dtype=F64)}
        if self._state is not None:
            tensors |= {"mean": self._state.mean, "cov": self._state.cov}
        state.write(OP, path, tensors, {"format": FORMAT, "filter": json.dumps(checks.plain(about))})

    @classmethod
    def load(cls, path: str | Path) -> SeriesFilter:
        """A filter as it was saved, to go on from its last row. Raises ValueError if the file is none."""
        if not Path(path).is_file():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        tensors, about = ({}, {}) if state.foreign(path) else state.read(OP, path)
        if about.get("format") != FORMAT or "filter" not in about:
            raise checks.fail(OP, f"{path} is no saved filter.", "stateline filter --save-state writes one.")
        try:
            return cls._restored(json.loads(about["filter"]), tensors)
        except KeyError as error:
            raise checks.fail(OP, f"{path} lacks {error}.", "Was it written by another version? Fit again.") from error

    @classmethod
    def _restored(cls, told: dict[str, Any], tensors: dict[str, Tensor]) -> SeriesFilter:
        made = cls(told["model"], step=told["step"])
        made.columns, made.time, made.rows = tuple(told["columns"]), told["time"], told["rows"]
        made.time_format, made.clock = told["time_format"], Clock(**told["clock"])
        made.names, made.decimal = tuple(told["names"]), told.get("decimal", ".")  # not in files of before
        made._plan = made._blueprint(len(made.columns))
        made._values = {
            name: tensors[f"variance {name}"]
            for name in (*made._plan.names, *made._plan.fixed)
            if f"variance {name}" in tensors
        }
        made._middle, made._scale, made.last = tensors["middle"], tensors["scale"], float(tensors["last"])
        if "mean" in tensors:
            made._state = KalmanState(tensors["mean"], tensors["cov"])
        return made
