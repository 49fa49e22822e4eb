"""Series over time from CSV files and streams, a row at a time: delimiter and header are found out, times understood.

A row is a moment, a column a series. Cells are separated by tabs, semicolons, commas or blanks, as in the first line.
That is a header if one of its cells is neither a number, nor missing, nor a date; without one, columns are called 1, 2,
…. Missing is an empty cell, nan, na, null, none or ?. Lines that are empty or begin with # are passed over.
"""

from __future__ import annotations

import calendar
import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stateline import checks

OP = "filter"
MISSING = ("", "nan", "na", "n/a", "null", "none", "?")
#: Of a step: gaps nearer than this to a whole number of steps are that.
EVEN = 1e-6
MONTH = 28 * 86400.0
Moment = float | datetime


@dataclass(frozen=True)
class Row:
    """A line's number, the time as it was written, what it means (None without a time), and a number a column."""

    line: int
    label: str
    moment: Moment | None
    values: list[float]


class SeriesReader:
    """The rows of CSV lines.

    Args:
        source: what errors call it.   lines: of text, read as they come.
        time: the name or the number, from 1, of the column of times; None if there is none.
        columns: names or numbers of those to read, in order; None for all but the time.
        time_format: of dates, as for strptime; None for numbers or ISO 8601.
        names: of all columns, for lines without a header that go on with a file that had one.
    """

    def __init__(
        self,
        source: str,
        lines: Iterable[str],
        *,
        time: str | None = None,
        columns: Sequence[str] | None = None,
        time_format: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.source, self.time_format = source, time_format
        self._lines = enumerate(lines, 1)
        self._waiting: list[tuple[int, list[str]]] = []
        self._aware: bool | None = None
        self.delimiter = ""
        number, cells = self._first()
        names = list(names) if len(names) == len(cells) else [str(i) for i in range(1, len(cells) + 1)]
        if any(not (_plain(cell) or _date(cell, time_format)) for cell in cells):
            names = [name or str(i) for i, name in enumerate(cells, 1)]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise checks.fail(OP, f"{source}, line {number}: two columns are called {twice!r}.")
        else:
            self._waiting.append((number, cells))
        self.width, self._names, self.names = len(cells), names, tuple(names)
        self._time = None if time is None else self._place(time, "--time")
        if columns is None:
            self._places = [i for i in range(self.width) if i != self._time]
        else:
            self._places = [self._place(name, "--columns") for name in columns]
        if not self._places:
            raise checks.fail(OP, f"{source} has no column beside the time.")
        for place in self._places:
            if self._places.count(place) > 1 or place == self._time:
                raise checks.fail(OP, f"{source}: the column {names[place]!r} is asked for twice.")
        self.columns = tuple(names[i] for i in self._places)
        self.time = None if self._time is None else names[self._time]

    def __iter__(self) -> Iterator[Row]:
        for number, cells in self._cells():
            if len(cells) != self.width:
                problem = f"{self.source}, line {number}: {len(cells)} cells, expected {self.width}"
                raise checks.fail(OP, f"{problem} as in the first line.")
            values = [self._number(number, i, cells[i]) for i in self._places]
            label = "" if self._time is None else cells[self._time].strip()
            moment = None if self._time is None else self._moment(number, label)
            yield Row(number, label, moment, values)

    def _first(self) -> tuple[int, list[str]]:
        for number, line in self._lines:
            if (text := line.strip("\ufeff\r\n")).strip() and not text.lstrip().startswith("#"):
                self.delimiter = next((mark for mark in "\t;," if mark in text), " ")
                return number, self._split(text)
        raise checks.fail(OP, f"{self.source} is empty.", "Expected a row a moment, a column a series.")

    def _split(self, line: str) -> list[str]:
        if self.delimiter == " ":
            return line.split()
        quoted = '"' in line
        cells = next(csv.reader([line], delimiter=self.delimiter)) if quoted else line.split(self.delimiter)
        return [cell.strip() for cell in cells]

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        yield from self._waiting
        self._waiting = []
        for number, line in self._lines:
            text = line.rstrip("\r\n")
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, self._split(text)

    def _place(self, name: str, option: str) -> int:
        if name in self._names:
            return self._names.index(name)
        if name.isdigit() and 1 <= int(name) <= self.width:
            return int(name) - 1
        known = ", ".join(self._names[:20])
        raise checks.fail(OP, f"{self.source} has no column {name!r} ({option}); it has {known}.")

    def _number(self, line: int, i: int, cell: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            if cell.lower() in MISSING:
                return math.nan
            place = f"{self.source}, line {line}, column {self._names[i]!r}"
            dated = _date(cell, self.time_format) is not None
            hint = f"The time? Say --time {self._names[i]}." if dated else "Missing is an empty cell or nan."
            others = "" if self.width == 1 or dated else " --columns chooses columns."
            raise checks.fail(OP, f"{place}: {cell[:40]!r} is no number.", hint + others) from None
        if math.isinf(value):
            raise checks.fail(OP, f"{self.source}, line {line}, column {self._names[i]!r}: {cell!r} is infinite.")
        return value

    def _moment(self, line: int, text: str) -> Moment:
        place = f"{self.source}, line {line}, column {self.time!r}"
        if self.time_format is None:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if math.isfinite(value):
                return value
        found = _date(text, self.time_format)
        if found is None:
            form = "a number or a date as in 2024-03-01 12:30" if self.time_format is None else self.time_format
            raise checks.fail(
                OP, f"{place}: {text[:40]!r} is no time, expected {form}.", "--time-format says how dates are written."
            )
        aware = found.tzinfo is not None
        if self._aware not in (None, aware):
            raise checks.fail(OP, f"{place}: {text!r} has {'a' if aware else 'no'} time zone, unlike those before.")
        self._aware = aware
        return found


def _plain(cell: str) -> bool:
    if cell.lower() in MISSING:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _date(text: str, form: str | None) -> datetime | None:
    try:
        return datetime.strptime(text, form) if form else datetime.fromisoformat(text)
    except ValueError:
        return None


# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """How moments become positions on an axis, and positions times that can be written.

    kind: "rows" (no times: a row a step), "numbers", "seconds" or "months"; in the last a month is 1, of whatever
        length, so that monthly and yearly series are even.   step: positions that one step of a model is.
    form: of dates, as for strftime; "" for ISO.   example: how the first was written.   zone: minutes, or None.
    """

    kind: str = "rows"
    step: float = 1.0
    form: str = ""
    example: str = ""
    zone: int | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], step: float | None = None, form: str | None = None) -> Clock:
        """The clock of a series' first rows. step: None for the middle of their gaps."""
        if not rows or rows[0].moment is None:
            return cls() if step is None else cls(step=step)
        first = rows[0].moment
        kind, zone = "numbers", None
        if isinstance(first, datetime):
            seconds = cls(kind="seconds")
            kind = "months" if step is None and _middle_gap(seconds, rows, MONTH - 1) >= MONTH else "seconds"
            offset = first.utcoffset()
            zone = None if offset is None else int(offset.total_seconds() // 60)
        clock = cls(kind, 1.0, form or "", rows[0].label, zone)
        if step is None:
            step = _middle_gap(clock, rows, 1.0)
            step = round(step) if kind == "months" and abs(step - round(step)) < 0.05 else step
        return replace(clock, step=step)

    def position(self, moment: Moment) -> float:
        """Of a moment of this clock."""
        if not isinstance(moment, datetime):
            return float(moment)
        if self.kind == "seconds":
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        day = (moment.hour + (moment.minute + moment.second / 60) / 60) / 24
        length = calendar.monthrange(moment.year, moment.month)[1]
        return 12 * moment.year + moment.month - 1 + (moment.day - 1 + day) / length

    def fits(self, moment: Moment) -> bool:
        """Whether a moment is of this clock's kind."""
        return isinstance(moment, datetime) == (self.kind in ("seconds", "months"))

    def steps(self, gap: float) -> float:
        """How many steps a gap between positions is."""
        count = gap / self.step
        return float(round(count)) if abs(count - round(count)) < EVEN else count

    def moment(self, position: float) -> datetime:
        """The date of a position, for a clock of dates."""
        if self.kind == "months":
            number, part = divmod(position + 1e-9, 1.0)
            year, month = divmod(int(number), 12)
            unit = 24 if len(self.example) <= 10 else 1  # months end on different days: whole ones, where days are
            hours = round(part * calendar.monthrange(year, month + 1)[1] * 24 / unit) * unit
            own = None if self.zone is None else timezone(timedelta(minutes=self.zone))
            return datetime(year, month + 1, 1, tzinfo=own) + timedelta(hours=hours)
        zone = UTC if self.zone is None else timezone(timedelta(minutes=self.zone))
        moment = datetime.fromtimestamp(round(position, 3), zone)
        return moment if self.zone is not None else moment.replace(tzinfo=None)

    def written(self, position: float) -> str:
        """A position as times are written in the series."""
        if self.kind == "numbers":
            return f"{position:.12g}"
        moment = self.moment(position)
        if self.form:
            return moment.strftime(self.form)
        if len(self.example) <= 10 and moment.hour == moment.minute == moment.second == 0:
            return moment.date().isoformat()
        separator = self.example[10] if len(self.example) > 10 else " "
        short = moment.second == 0 and moment.microsecond == 0 and len(self.example) == 16
        return moment.isoformat(separator, "minutes" if short else "auto")


def _middle_gap(clock: Clock, rows: Sequence[Row], default: float) -> float:
    places = [clock.position(row.moment) for row in rows if row.moment is not None]
    gaps = sorted(b - a for a, b in pairwise(places) if b > a)
    return gaps[len(gaps) // 2] if gaps else default


# ---- whole series ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """values (T, columns), NaN where missing; moments (T) numbers, dates or None; what times and columns are called."""

    values: Tensor
    columns: tuple[str, ...]
    rows: list[Row]
    source: str = "the series"
    time: str | None = None
    time_format: str | None = None
    names: tuple[str, ...] = ()  # of all columns of the file

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Series:
        """Some of its rows, as a series."""
        return replace(self, values=self.values[rows], rows=self.rows[rows])


def series_of(values: Any, times: Sequence[Any] | None = None, columns: Sequence[str] | None = None) -> Series:
    """A series from an array (T) or (T, columns), and times (T): numbers or datetimes."""
    table = torch.as_tensor(values, dtype=torch.float64)
    table = table[:, None] if table.dim() == 1 else table
    if table.dim() != 2:
        raise checks.fail(OP, f"the values have shape {tuple(table.shape)}, expected (T) or (T, columns).")
    names = tuple(columns) if columns is not None else tuple(str(i) for i in range(1, table.shape[1] + 1))
    if len(names) != table.shape[1]:
        raise checks.fail(OP, f"{len(names)} names were given for {table.shape[1]} columns.")
    if torch.isinf(table).any():
        raise checks.fail(OP, "the values are not all finite.", "Missing is NaN.")
    if times is not None and len(times) != len(table):
        raise checks.fail(OP, f"{len(times)} times were given for {len(table)} values.")
    moments: list[Moment | None] = [None] * len(table) if times is None else [_as_moment(t) for t in times]
    rows = [
        Row(i, "" if moment is None else str(moment), moment, row)
        for i, (moment, row) in enumerate(zip(moments, table.tolist(), strict=True), 1)
    ]
    return Series(table, names, rows, time=None if times is None else "time")


def _as_moment(value: Any) -> Moment:
    if isinstance(value, datetime):
        return value
    if hasattr(value, "astype") and getattr(value, "dtype", None) is not None and value.dtype.kind == "M":
        found = value.astype("datetime64[us]").item()
        assert isinstance(found, datetime)
        return found
    return float(value)


def read_series(
    path: str | Path,
    *,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    time_format: str | None = None,
) -> Series:
    """The columns of a CSV file over time; arguments as of `SeriesReader`.

    Raises:
        ValueError: naming file, line and column of what cannot be read; OSError for what is not there.
    """
    with Path(path).expanduser().open(encoding="utf-8", errors="replace") as file:
        reader = SeriesReader(str(path), file, time=time, columns=columns, time_format=time_format)
        rows = list(reader)
    values = torch.tensor([row.values for row in rows], dtype=torch.float64).reshape(len(rows), len(reader.columns))
    return Series(values, reader.columns, rows, str(path), reader.time, time_format, reader.names)
