"""Series over time from CSV files and streams, a row at a time: delimiter and header are found out, times understood.

A row is a moment, a column a series. Cells are separated by tabs, semicolons, commas or blanks, as in the first line.
That is a header if one of its cells is neither a number, nor missing, nor a date; without one, columns are called 1, 2,
…. Decimals are written with points, or all with commas if that is said. Missing is an empty cell, nan, na, null, none
or ?. Lines that are empty or begin with # are passed over.

Times are numbers or ISO dates. Digits alone are a number, unless the first time of the file is a day or a month of 1900
to 2099, as in 20240131 or 202401: then all are dates of that form, and one that is none is an error.
"""

from __future__ import annotations

import calendar
import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stateline import checks

OP = "filter"
MISSING = ("", "nan", "na", "n/a", "null", "none", "?")
#: Of a step: gaps nearer than this to a whole number of steps are that.
EVEN = 1e-6
MONTH = 28 * 86400.0
#: Forms of dates of digits alone, by how many there are; and what says, in place of a form, that digits are numbers.
COMPACT = {8: "%Y%m%d", 6: "%Y%m"}
NUMBERS = "number"
DECIMALS = (".", ",")
#: A number by its looks, whatever its marks: nobody calls a column so.
MARKED = re.compile(r"[-+]?[\d.,]*\d[\d.,]*")
#: The square of what is larger is infinite.
LARGEST = 1e150
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
        time_format: of dates, as for strptime; "number"; None to find out, and then it says what was found.
        names: of all columns, for lines without a header that go on with a file that had one.
        decimal: the mark before decimals, "." or ","; with the latter commas separate no cells.
    """

    def __init__(
        self,
        source: str,
        lines: Iterable[str],
        *,
        time: str | int | None = None,
        columns: Sequence[str | int] | None = None,
        time_format: str | None = None,
        names: Sequence[str] = (),
        decimal: str = ".",
    ) -> None:
        checks.choice(OP, "the decimal mark", decimal, DECIMALS)
        self.source, self.time_format, self.decimal = source, time_format, decimal
        self._lines = enumerate(lines, 1)
        self._waiting: list[tuple[int, list[str]]] = []
        self._aware: bool | None = None
        self._first_time, self._compact = True, False
        if time_format not in (None, NUMBERS) and "%" not in str(time_format):
            raise checks.fail(OP, f"the time format {time_format!r} has no %.", 'As in "%d/%m/%Y", or number.')
        self.delimiter = ""
        number, cells = self._first()
        names = list(names) if len(names) == len(cells) else [str(i) for i in range(1, len(cells) + 1)]
        if any(not (_plain(cell) or MARKED.fullmatch(cell) or _date(cell, self._form)) for cell in cells):
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
            wanted = [columns] if isinstance(columns, str) else columns
            self._places = [self._place(name, "--columns") for name in wanted]
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

    def series(self, rows: list[Row]) -> Series:
        """Some of its rows as a series."""
        values = torch.tensor([row.values for row in rows], dtype=torch.float64).reshape(len(rows), len(self.columns))
        about = (self.source, self.time, self.time_format, self.names, self.decimal)
        return Series(values, self.columns, rows, *about)

    def _first(self) -> tuple[int, list[str]]:
        for number, line in self._lines:
            if (text := line.strip("\ufeff\r\n")).strip() and not text.lstrip().startswith("#"):
                if any(mark < " " and mark != "\t" for mark in text):
                    remedy = "Unpack what is compressed, save a spreadsheet as CSV, and write UTF-8."
                    raise checks.fail(OP, f"{self.source}, line {number}: this is no text.", remedy)
                self.delimiter = next((mark for mark in "\t;," if mark in text and mark != self.decimal), " ")
                return number, self._split(text)
        raise checks.fail(OP, f"{self.source} is empty.", "Expected a row a moment, a column a series.")

    def _split(self, line: str) -> list[str]:
        if self.delimiter == " ":
            return line.split()
        quoted = '"' in line and len(line) < csv.field_size_limit()
        cells = next(csv.reader([line], delimiter=self.delimiter)) if quoted else line.split(self.delimiter)
        return [cell.strip() for cell in cells]

    def _cells(self) -> Iterator[tuple[int, list[str]]]:
        yield from self._waiting
        self._waiting = []
        for number, line in self._lines:
            text = line.rstrip("\r\n")
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, self._split(text)

    @property
    def _form(self) -> str | None:
        return None if self.time_format == NUMBERS else self.time_format

    def _place(self, given: str | int, option: str) -> int:
        name = str(given)
        if name in self._names:
            return self._names.index(name)
        if name.isdigit() and 1 <= int(name) <= self.width:
            return int(name) - 1
        known = ", ".join(self._names[:20])
        raise checks.fail(OP, f"{self.source} has no column {name!r} ({option}); its first line says {known}.")

    def _pointed(self, cell: str) -> str:
        """A number as it is written with a decimal point; what has one where commas were expected is none."""
        return cell if self.decimal == "." else cell.replace(".", "?").replace(",", ".")

    def _number(self, line: int, i: int, cell: str) -> float:
        place = f"{self.source}, line {line}, column {self._names[i]!r}"
        try:
            value = float(self._pointed(cell))
        except ValueError:
            if cell.lower() in MISSING:
                return math.nan
            raise checks.fail(OP, f"{place}: {cell[:40]!r} is no number.", self._hint(i, cell)) from None
        if math.isinf(value):
            raise checks.fail(OP, f"{place}: {cell!r} is infinite.")
        if abs(value) > LARGEST:
            raise checks.fail(
                OP, f"{place}: {cell!r} is too large.", "Does it stand for missing? That is an empty cell."
            )
        return value

    def _hint(self, i: int, cell: str) -> str:
        """What could be done about a cell that is no number."""
        if _date(cell, self._form) is not None:
            return f"The time? Say --time {self._names[i]}."
        bare = cell.replace(".", "").replace(",", "")
        if "," in cell and _plain(bare):
            if cell.count(",") == 1 and "." not in cell and self.decimal == ".":
                return "Is that a decimal comma? Say --decimal ,."
            return "Numbers have no marks between thousands."
        if self.decimal == "," and _plain(cell):
            return "Decimals were to be written with commas (--decimal ,)."
        return "Missing is an empty cell or nan." + (" --columns chooses columns." if self.width > 1 else "")

    def _moment(self, line: int, text: str) -> Moment:
        place = f"{self.source}, line {line}, column {self.time!r}"
        if self._first_time and self.time_format is None and (form := _compact(text)):
            self.time_format, self._compact = form, True
        self._first_time = False
        if self._form is None:
            try:
                value = float(self._pointed(text))
            except ValueError:
                value = math.nan
            if math.isfinite(value):
                return value
        if self._compact and _compact(text) != self.time_format:
            problem = f"{text[:40]!r} is no date of digits, as those before"
            raise checks.fail(OP, f"{place}: {problem}.", "--time-format number says that they are numbers.")
        found = None if self.time_format == NUMBERS else _date(text, self._form)
        if found is None:
            form = self.time_format or "a number or a date as in 2024-03-01 12:30"
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


def _compact(text: str) -> str | None:
    """The form of a date of digits alone."""
    form = COMPACT.get(len(text)) if text.isascii() and text.isdigit() else None
    return form if form and 1900 <= int(text[:4]) < 2100 and _date(text, form) else None


# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """How moments become positions on an axis, and positions times that can be written.

    kind: "rows" (no times: a row a step), "numbers", "seconds" or "months"; in the last a month is 1, of whatever
        length, so that monthly and yearly series are even.   step: positions that one step of a model is.
    form: of dates, as for strftime; "" for ISO.   example: how the first was written.   zone: minutes, or None.
    day: from where months count, in days after their first; the last day in months that are shorter.
    """

    kind: str = "rows"
    step: float = 1.0
    form: str = ""
    example: str = ""
    zone: int | None = None
    day: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Row], step: float | None = None, form: str | None = None) -> Clock:
        """The clock of a series' first rows. step: None for the middle of their gaps."""
        if not rows or rows[0].moment is None:
            return cls() if step is None else cls(step=step)
        first = rows[0].moment
        if not isinstance(first, datetime):
            clock = cls("numbers", example=rows[0].label)
        else:
            offset = first.utcoffset()
            zone = None if offset is None else int(offset.total_seconds() // 60)
            clock = cls("seconds", 1.0, form or "", rows[0].label, zone)
            if step is None and (day := _months_from(clock, rows)) is not None:
                clock = replace(clock, kind="months", day=day)
        if step is None:
            step = _middle_gap(clock, rows, 1.0)
            step = round(step) if clock.kind == "months" and abs(step - round(step)) < 0.05 else step
        return replace(clock, step=step)

    def position(self, moment: Moment) -> float:
        """Of a moment of this clock."""
        if not isinstance(moment, datetime):
            return float(moment)
        if self.kind == "seconds":
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        local = moment.replace(tzinfo=None)
        month = 12 * moment.year + moment.month - 1
        month -= local < self._begins(month)
        begins = self._begins(month)
        return month + (local - begins) / (self._begins(month + 1) - begins)

    def _begins(self, month: int) -> datetime:
        """Where a month since year 0 begins to count."""
        first = datetime(month // 12, month % 12 + 1, 1)
        whole, part = divmod(self.day, 1.0)
        last = calendar.monthrange(first.year, first.month)[1] - 1
        return first + timedelta(days=min(whole, last) + part)

    def fits(self, moment: Moment) -> bool:
        """Whether a moment is of this clock's kind: a number, a date, or one with a time zone."""
        if isinstance(moment, datetime):
            return self.kind in ("seconds", "months") and (moment.tzinfo is None) == (self.zone is None)
        return self.kind == "numbers"

    def steps(self, gap: float) -> float:
        """How many steps a gap between positions is."""
        count = gap / self.step
        return float(round(count)) if abs(count - round(count)) < EVEN else count

    def moment(self, position: float) -> datetime:
        """The date of a position, for a clock of dates."""
        if self.kind == "months":
            month, part = divmod(position, 1.0)
            begins = self._begins(int(month))
            ahead = (self._begins(int(month) + 1) - begins) * part
            unit = timedelta(days=1) if self._days else timedelta(hours=1)  # months differ in length
            own = None if self.zone is None else timezone(timedelta(minutes=self.zone))
            return (begins + round(ahead / unit) * unit).replace(tzinfo=own)
        zone = UTC if self.zone is None else timezone(timedelta(minutes=self.zone))
        moment = datetime.fromtimestamp(round(position, 3), zone)
        return moment if self.zone is not None else moment.replace(tzinfo=None)

    def written(self, position: float) -> str:
        """A position as times are written in the series."""
        if self.kind == "numbers":
            return str(int(position)) if position.is_integer() else f"{position:.15g}"
        moment = self.moment(position)
        if self.form:
            return moment.strftime(self.form)
        if self._days and moment.hour == moment.minute == moment.second == 0:
            return moment.date().isoformat()
        separator = "T" if "T" in self.example else " "
        short = moment.second == 0 and moment.microsecond == 0 and self.example[16:17] != ":"
        text = moment.isoformat(separator, "minutes" if short else "auto")
        return text.removesuffix("+00:00") + "Z" if self.example.endswith("Z") else text

    @property
    def _days(self) -> bool:
        """Whether dates are written without an hour."""
        return len(self.example) <= 10


def _months_from(clock: Clock, rows: Sequence[Row]) -> float | None:
    """Where months begin to count (`Clock.day`), None if rows are not months apart.

    They are if they lie on one day of the month, or on its last day where it is shorter. Rows at least a month apart on
    other days are too, unless they come evenly, every 28 days say.
    """
    places = [clock.position(row.moment) for row in rows if row.moment is not None]
    middle = _middle_gap(clock, rows, 0.0)
    if middle < MONTH:
        return None
    dates = [row.moment.replace(tzinfo=None) for row in rows if isinstance(row.moment, datetime)]
    if all(date.day == calendar.monthrange(date.year, date.month)[1] for date in dates):
        day = 30.0
    else:
        day = float(max(date.day for date in dates) - 1)
    first = dates[0]
    day += (first - first.replace(hour=0, minute=0, second=0, microsecond=0)) / timedelta(days=1)
    aligned = replace(clock, kind="months", day=day)
    if all(aligned.position(date).is_integer() for date in dates):
        return day
    counts = [(b - a) / middle for a, b in pairwise(places)]
    return None if all(abs(count - round(count)) < EVEN for count in counts) else 0.0


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
    decimal: str = "."

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Series:
        """Some of its rows, as a series."""
        return replace(self, values=self.values[rows], rows=self.rows[rows])


def series_of(values: Any, times: Sequence[Any] | None = None, columns: Sequence[str] | None = None) -> Series:
    """A series from an array (T) or (T, columns), and times (T): numbers, dates or texts of either.

    times: None takes the index of a DataFrame or Series of pandas, unless that only counts rows (a RangeIndex).
    columns: names; None takes those of the DataFrame or Series, or 1, 2, ….
    """
    columns = names_of(values) if columns is None else columns
    remedy = "Leave out rows that have none."
    if times is None and (times := _index(values)) is not None:
        remedy += " Of an index that is no time: reset_index(drop=True), with which a row is a step."
    _check_moments(times)
    try:
        table = values.double() if isinstance(values, Tensor) else torch.tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise checks.fail(OP, f"the values are not numbers ({error}).", "Expected an array (T, columns).") from error
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
    moments: list[Moment | None] = (
        [None] * len(table) if times is None else [_as_moment(i, t, remedy) for i, t in enumerate(times, 1)]
    )
    rows = [
        Row(i, "" if moment is None else str(moment), moment, row)
        for i, (moment, row) in enumerate(zip(moments, table.tolist(), strict=True), 1)
    ]
    return Series(table, names, rows, time=None if times is None else str(getattr(times, "name", None) or "time"))


def names_of(values: Any) -> list[str] | None:
    """What the columns of a DataFrame or a Series are called, None of what has no names."""
    if getattr(values, "ndim", 0) == 2 and hasattr(values, "columns"):
        return [str(name) for name in values.columns]
    name = getattr(values, "name", None)
    return None if name is None or name == "" or isinstance(values, Tensor) else [str(name)]


def _index(values: Any) -> Any:
    """The index of a table or column of pandas, None if it only counts rows. (Lists too have an `index`, a method.)"""
    index = getattr(values, "index", None)
    return index if hasattr(index, "dtype") and type(index).__name__ != "RangeIndex" else None


def _check_moments(times: Any) -> None:
    kind = str(getattr(times, "dtype", ""))
    for what, remedy in {
        "period": "Convert them: .to_timestamp().",
        "timedelta": "Give seconds, as index.total_seconds() does.",
    }.items():
        if kind.startswith(what):
            raise checks.fail(OP, f"the times are of type {kind}, expected numbers or dates.", remedy)


def _as_moment(i: int, given: Any, remedy: str) -> Moment:
    """What the i-th time means: a number, a date, or a text of one."""
    numpys = hasattr(given, "dtype") and given.dtype.kind == "M"
    value = given.astype("datetime64[us]").item() if numpys else given
    if isinstance(value, str):
        value = float(value) if _plain(value) and value.lower() not in MISSING else _date(value, None)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime) and value == value:  # pandas' NaT is a datetime and not itself
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise checks.fail(OP, f"time {i} is {given!r}, expected a number, a date or a text of one.", remedy)
    return number


def read_series(
    path: str | Path,
    *,
    time: str | int | None = None,
    columns: Sequence[str | int] | None = None,
    time_format: str | None = None,
    decimal: str = ".",
) -> Series:
    """The columns of a CSV file over time; arguments as of `SeriesReader`.

    Raises:
        ValueError: naming file, line and column of what cannot be read; OSError for what is not there.
    """
    with Path(path).expanduser().open(encoding="utf-8", errors="replace") as file:
        reader = SeriesReader(str(path), file, time=time, columns=columns, time_format=time_format, decimal=decimal)
        return reader.series(list(reader))
