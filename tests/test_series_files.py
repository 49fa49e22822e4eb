"""Files of series and their times: what is understood, what is refused, and how times go on."""

from __future__ import annotations

import math
import re
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stateline.apps.filtering import SeriesFilter, read_series, series_of
from stateline.apps.series_files import Clock, SeriesReader
from stateline.classical import kalman, smoother

KNOWN = {"components": {"level": {"kind": "local-level", "level": 0.3}}, "noise": 0.5}


def rows_of(times: list[str], form: str | None = None) -> list[Any]:
    """Rows of a column of times, and one of ones."""
    return list(SeriesReader("x", ["t,a", *(f"{time},1" for time in times)], time="t", time_format=form))


def steps_of(times: list[str], form: str | None = None) -> tuple[Clock, set[float]]:
    """The clock of times, and the steps from each to the next."""
    rows = rows_of(times, form)
    clock = Clock.of(rows, None, form)
    places = [clock.position(row.moment) for row in rows]
    return clock, {clock.steps(b - a) for a, b in pairwise(places)}


@pytest.mark.parametrize(
    ("text", "columns", "values"),
    [
        ("a,b\n1,2\n3,\n", ("a", "b"), [[1, 2], [3, None]]),
        ("1;2\n3;NA\n", ("1", "2"), [[1, 2], [3, None]]),
        ("\ufeffx\ty\n\n# note\n1\t?\n", ("x", "y"), [[1, None]]),
        ("1 2\nnan 4", ("1", "2"), [[1, 2], [None, 4]]),
        ('"a, b",c\n1,2\n', ("a, b", "c"), [[1, 2]]),
    ],
)
def test_files_are_understood(tmp_path: Path, text: str, columns: tuple[str, ...], values: list[Any]) -> None:
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    series = read_series(tmp_path / "x.csv")
    assert series.columns == columns
    assert [[None if math.isnan(v) else v for v in row] for row in series.values.tolist()] == values


def test_decimal_commas_are_read_if_that_is_said(tmp_path: Path) -> None:
    """Also in times, without a header, and in what a loaded filter goes on with."""
    (tmp_path / "x.csv").write_text("0,5;1,25;-3\n1,5;;1e2\n2,5;7;\n3,5;2;,5\n")
    series = read_series(tmp_path / "x.csv", time="1", decimal=",")
    assert [row.moment for row in series.rows] == [0.5, 1.5, 2.5, 3.5]
    assert series.values.nan_to_num(9).tolist() == [[1.25, -3], [9, 100], [7, 9], [2, 0.5]]
    for text, message in (
        ("1,5;2.5\n", "'2.5' is no number. Decimals were to be"),
        ("1,5;1.000,5\n", "no marks between"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_series(tmp_path / "x.csv", decimal=",")
    (tmp_path / "x.csv").write_text("1,5;3\n2,5;4\n")
    with pytest.raises(ValueError, match=r"line 1, column '1': '1,5' is no number\. Is that"):  # nor a name
        read_series(tmp_path / "x.csv")
    dated = list(SeriesReader("x", ["t;a", "02.01.2024;2,5"], time="t", time_format="%d.%m.%Y", decimal=","))
    assert (dated[0].moment, dated[0].values) == (datetime(2024, 1, 2), [2.5])
    sensor = SeriesFilter(KNOWN).fit(series)
    sensor.extend(series)
    sensor.save(tmp_path / "s")
    assert SeriesFilter.load(tmp_path / "s").decimal == ","


@pytest.mark.parametrize(
    ("times", "form", "expected"),
    [
        (["2020-01-01", "2020-02-01", "2020-03-01"], None, ["2020-04-01", "2020-05-01"]),
        (["2019-10-31", "2019-11-30", "2019-12-31"], None, ["2020-01-31", "2020-02-29"]),
        (["2018-07-01", "2019-07-01", "2020-07-01"], None, ["2021-07-01", "2022-07-01"]),
        (["2024-02-27", "2024-02-28"], None, ["2024-02-29", "2024-03-01"]),
        (["2024-01-01 23:00", "2024-01-02 00:00"], None, ["2024-01-02 01:00", "2024-01-02 02:00"]),
        (["2024-01-01T00:00:00+02:00", "2024-01-01T00:00:10+02:00"], None,
         ["2024-01-01T00:00:20+02:00", "2024-01-01T00:00:30+02:00"]),
        (["31/12/2023", "01/01/2024"], "%d/%m/%Y", ["02/01/2024", "03/01/2024"]),
        (["0.5", "0.75"], None, ["1", "1.25"]),
    ],
)  # fmt: skip
def test_times_go_on_as_they_are_written(times: list[str], form: str | None, expected: list[str]) -> None:
    lines = ["t,a", *(f"{t},1" for t in times)]
    rows = list(SeriesReader("x", lines, time="t", time_format=form))
    clock = Clock.of(rows, None, form)
    last = clock.position(rows[-1].moment)  # type: ignore[arg-type]  # rows have moments
    assert [clock.written(last + i * clock.step) for i in (1, 2)] == expected
    places = [clock.position(row.moment) for row in rows]  # type: ignore[arg-type]  # rows have moments
    if clock.kind == "months" and times[0].endswith("01"):
        assert {clock.steps(b - a) for a, b in pairwise(places)} == {1.0}


def dates(count: int, **step: int) -> list[str]:
    return [(datetime(2023, 1, 3) + timedelta(**step) * i).strftime("%Y-%m-%d") for i in range(count)]


def month_ends(count: int, start: int = 0) -> list[str]:
    firsts = (datetime(2023 + i // 12, i % 12 + 1, 1) for i in range(start + 1, start + 1 + count))
    return [(first - timedelta(days=1)).strftime("%Y-%m-%d") for first in firsts]


@pytest.mark.parametrize(
    ("times", "kind", "steps"),
    [
        (dates(30, days=28), "seconds", {1.0}),
        ([*dates(9, days=28), "2023-10-10"], "seconds", {1.0, 2.0}),
        (dates(30, days=30), "seconds", {1.0}),
        (dates(30, days=91), "seconds", {1.0}),
        (month_ends(30), "months", {1.0}),
        (month_ends(30)[::3], "months", {1.0}),  # of quarters
        (month_ends(3) + month_ends(20, 4), "months", {1.0, 2.0}),
        ([f"2023-{i:02d}-30 06:00" for i in range(3, 13)], "months", {1.0}),
        (["2023-01-30", "2023-02-28", "2023-03-30", "2023-04-30"], "months", {1.0}),
        ([f"{y}-04-01" for y in range(2021, 2024)], "months", {1.0}),  # 365 days and 365 days
        (["2022-12-30", "2023-01-31", "2023-02-28", "2023-03-31", "2023-04-28"], "months", None),  # days of work
    ],
)
def test_months_are_those_of_the_calendar(times: list[str], kind: str, steps: set[float] | None) -> None:
    clock, found = steps_of(times)
    assert clock.kind == kind
    assert steps is None or found == steps
    last = rows_of(times)[-1]
    assert clock.written(clock.position(last.moment)) == times[-1]


def test_a_step_is_whole_months_only_where_gaps_nearly_are() -> None:
    clock, _ = steps_of(["2023-01-01", "2023-02-15", "2023-04-01", "2023-05-16", "2023-07-02"])
    assert clock.kind == "months"
    assert 1.45 < clock.step < 1.55
    clock, _ = steps_of(["2022-12-30", "2023-01-31", "2023-02-28", "2023-03-31", "2023-04-28"])
    assert clock.step == 1
    rows = rows_of(month_ends(3))
    assert Clock.of(rows).kind == "months"
    assert (Clock.of(rows, 3600.0).kind, Clock.of(rows, 3600.0).step) == ("seconds", 3600.0)  # as it was asked for


@pytest.mark.parametrize(("first", "dated"), [("19000101", True), ("18991231", False), ("21000101", False)])
def test_digits_are_dates_of_two_centuries(first: str, dated: bool) -> None:
    assert isinstance(rows_of([first])[0].moment, datetime) == dated


def test_the_last_days_of_months_go_on_after_loading(tmp_path: Path) -> None:
    for name, times in {"a": month_ends(14), "b": month_ends(3, 14)}.items():
        (tmp_path / name).write_text("t,a\n" + "".join(f"{time},{time[5:7]}\n" for time in times))
    sensor = SeriesFilter(KNOWN).fit(read_series(tmp_path / "a", time="t"))
    sensor.extend(read_series(tmp_path / "a", time="t"))
    sensor.save(tmp_path / "s")
    again = SeriesFilter.load(tmp_path / "s")
    assert again.forecast(3).times == sensor.forecast(3).times == month_ends(3, 14)
    later = read_series(tmp_path / "b", time="t")
    assert torch.equal(again.extend(later).mean, sensor.extend(later).mean)


@pytest.mark.parametrize("day", [0.0, 14.25, 30.0])
def test_positions_of_months_grow_with_time_and_lead_back(day: float) -> None:
    clock = Clock("months", example="2023-01-01 00:00", day=day)
    moments = [datetime(2023, 12, 1) + timedelta(hours=7 * i) for i in range(500)]
    places = [clock.position(moment) for moment in moments]
    assert all(a < b for a, b in pairwise(places))
    assert [clock.moment(place) for place in places] == moments
    assert [clock.moment(math.nextafter(place, 0)) for place in places] == moments  # as after many steps of 1.1 months


def test_a_position_that_rounding_put_beside_a_month_is_written_as_that_month() -> None:
    for times in (["2023-01-01", "2023-02-01", "2023-03-01"], month_ends(3)):
        clock, _ = steps_of(times)
        last = clock.position(rows_of(times)[-1].moment)
        assert [clock.written(math.nextafter(last, to)) for to in (0, math.inf)] == [times[-1]] * 2


@pytest.mark.parametrize(
    ("times", "form", "expected"),
    [
        (["20240129", "20240130", "20240131"], "%Y%m%d", ["20240201", "20240202"]),
        (["202311", "202312", "202401"], "%Y%m", ["202402", "202403"]),
        (["1704067200000", "1704067210000", "1704067220000"], "number", ["1704067230000", "1704067240000"]),
        (["2024-01-01T00:00Z", "2024-01-01T00:10Z"], None, ["2024-01-01T00:20Z", "2024-01-01T00:30Z"]),
        (["2024-01-01T00:00+01:00", "2024-01-01T00:10+01:00"], None,
         ["2024-01-01T00:20+01:00", "2024-01-01T00:30+01:00"]),
        (["2024", "2025"], "number", ["2026", "2027"]),
        (["10", "20240101", "40480192"], "number", ["60720283", "80960374"]),  # not by its second
    ],
)  # fmt: skip
def test_digits_are_dates_if_the_first_is_one(
    tmp_path: Path, times: list[str], form: str | None, expected: list[str]
) -> None:
    (tmp_path / "x.csv").write_text("\n".join(["t,a", *(f"{time},{i}" for i, time in enumerate(times))]))
    series = read_series(tmp_path / "x.csv", time="t")
    sensor = SeriesFilter(KNOWN).fit(series)
    assert sensor.time_format == form
    sensor.extend(series)
    assert sensor.forecast(2).times == expected


def test_digits_that_are_no_date_are_refused_and_can_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("t,a\n20240130,1\n20240131,2\n20240132,3\n")
    with pytest.raises(ValueError, match=r"line 4, column 't': '20240132' is no date.*--time-format number says"):
        read_series(tmp_path / "x.csv", time="t")
    series = read_series(tmp_path / "x.csv", time="t", time_format="number")
    assert [row.moment for row in series.rows] == [20240130.0, 20240131.0, 20240132.0]
    sensor = SeriesFilter(KNOWN).fit(series)
    sensor.save(tmp_path / "s")
    assert SeriesFilter.load(tmp_path / "s").time_format == "number"  # for the file that goes on
    with pytest.raises(ValueError, match=r"the time format 'dd.mm.yyyy' has no %"):
        read_series(tmp_path / "x.csv", time="t", time_format="dd.mm.yyyy")


@pytest.mark.parametrize("zone", ["", "+02:00", "Z"])
def test_a_time_zone_is_had_by_all_or_none(tmp_path: Path, zone: str) -> None:
    first = [f"2024-03-0{d}T00:00{zone}" for d in range(1, 5)]
    other = "2024-03-06T00:00" + ("" if zone else "Z")
    write = lambda name, times: (tmp_path / name).write_text("t,a\n" + "".join(f"{t},1\n" for t in times))  # noqa: E731
    write("a.csv", first)
    write("b.csv", [other])
    write("both.csv", [*first, other])
    sensor = SeriesFilter(KNOWN).fit(read_series(tmp_path / "a.csv", time="t"))
    sensor.extend(read_series(tmp_path / "a.csv", time="t"))
    with pytest.raises(ValueError, match=r"b\.csv, line 2: the time .* has (a|no) time zone, and those before have"):
        sensor.extend(read_series(tmp_path / "b.csv", time="t"))
    with pytest.raises(ValueError, match=r"line 6, column 't': .* has (a|no) time zone, unlike those before"):
        read_series(tmp_path / "both.csv", time="t")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("t;a\n1;20,5\n", r"line 2, column 'a': '20,5' is no number\. Is that a decimal comma\? Say --decimal ,\."),
        ("t;a\n1;1.020,5\n", r"column 'a': '1\.020,5' is no number\. Numbers have no marks between thousands\."),
        ("t;a\n1;1e200\n", r"'1e200' is too large\. Does it stand for missing\?"),
        ("\x1f\x8bH\x00", r"line 1: this is no text\. Unpack"),
        ("t;a\n1;20.5 C\n", r"'20\.5 C' is no number\. Missing is an empty cell"),
        ("Device: X17\nt;a\n1;2\n", r"no column 't' \(--time\); its first line says Device:, X17"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(data)
    with pytest.raises(ValueError, match=message):
        read_series(tmp_path / "x.csv", time="t")


def test_arrays_are_series() -> None:
    assert series_of([1, None, 3]).values[:, 0].isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="the values are not numbers"):
        series_of([["high"]])


class Frame:
    """A table with names, as pandas has it."""

    def __init__(self, table: Any, columns: list[str]) -> None:
        self.table, self.columns, self.ndim = np.asarray(table), columns, 2

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.table.astype(dtype or float)


def test_a_frame_brings_the_names_of_its_columns() -> None:
    table = torch.arange(20.0).reshape(10, 2).numpy()
    sensor = SeriesFilter(KNOWN).fit(series_of(Frame(table, ["a", "b"])))
    assert sensor.columns == ("a", "b")
    assert sensor.extend(Frame(table, ["a", "b"])).mean.shape == (10, 2)  # type: ignore[arg-type]  # as a tensor
    assert sensor.extend(torch.ones(1, 2)).mean.shape == (1, 2)
    with pytest.raises(ValueError, match="has the columns b, a, expected a, b as fitted"):
        sensor.extend(Frame(table, ["b", "a"]))  # type: ignore[arg-type]  # as a tensor


class Index(list[Any]):
    """Of a table, as pandas has it."""

    def __init__(self, labels: Any, dtype: str, name: str | None = None) -> None:
        super().__init__(labels)
        self.dtype, self.name = dtype, name


class RangeIndex(Index):
    """That which pandas makes where none is given."""


class Column(Frame):
    """A column of a table, as pandas has it."""

    def __init__(self, values: Any, index: Index, name: str | None = None) -> None:
        super().__init__(values, [])
        del self.columns
        self.index, self.name, self.ndim = index, name, 1


def test_the_index_of_a_frame_is_its_times() -> None:
    values, days = np.arange(5.0), [datetime(2024, 1, day) for day in (1, 2, 3, 8, 9)]
    frame = Frame(values[:, None], ["a"])
    frame.index = Index(days, "datetime64[us]", "day")  # type: ignore[attr-defined]  # as pandas has it
    expected = SeriesFilter(KNOWN).fit(series_of(values, days)).extend(series_of(values, days)).sd
    assert not torch.equal(expected, SeriesFilter(KNOWN).fit(torch.arange(5.0)).extend(torch.arange(5.0)).sd)
    for given in (frame, Column(values, frame.index, "a")):  # type: ignore[attr-defined]  # as pandas has it
        sensor = SeriesFilter(KNOWN).fit(given)  # type: ignore[arg-type]  # as a tensor
        assert (sensor.columns, sensor.time, sensor.clock.kind) == (("a",), "day", "seconds")
        assert torch.equal(sensor.extend(given).sd, expected)  # type: ignore[arg-type]  # as a tensor
    assert series_of(Column(values, RangeIndex(range(5), "int64"))).time is None
    assert series_of(Column(values, Index(range(5), "int64"))).time == "time"
    assert series_of(Column(values, Index(days, "datetime64[us]")), range(5)).rows[4].moment == 4
    for dtype, remedy in (
        ("period[D]", r"the times are of type period\[D\], expected.*\.to_timestamp\(\)"),
        ("timedelta64[us]", r"the times are of type timedelta.*Give seconds, as index\.total_seconds\(\)"),
        ("str", r"time 1 is 'x', expected a number, a date .* Of an index that is no time: reset_index\(drop=True\)"),
    ):
        with pytest.raises(ValueError, match=remedy):
            series_of(Column(values, Index("xyzuv", dtype)))


def test_a_column_brings_its_name() -> None:
    named = Column(np.arange(9.0), RangeIndex(range(9), "int64"), "a")
    sensor = SeriesFilter(KNOWN).fit(named)  # type: ignore[arg-type]  # as a tensor
    assert sensor.columns == ("a",)
    sensor.extend(torch.ones(2))
    with pytest.raises(ValueError, match="has the columns b, expected a as fitted"):
        sensor.extend(Column(np.ones(2), named.index, "b"))  # type: ignore[arg-type]  # as a tensor


def test_pandas_is_taken_as_it_is() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is no dependency; its look is tested above")
    index = pandas.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-06"], name="day")
    frame = pandas.DataFrame({"a": [1.0, 2.0, None, 3.0]}, index)
    for given in (frame, frame["a"]):
        sensor = SeriesFilter(KNOWN).fit(given)
        assert (sensor.columns, sensor.time) == (("a",), "day")
        assert torch.equal(sensor.extend(given).sd, SeriesFilter(KNOWN).fit(given).extend(series_of(frame, index)).sd)
        assert sensor.forecast(1).times == ["2024-01-07 00:00:00"]
        for bad in (index.to_period("D"), index - index[0]):
            with pytest.raises(ValueError, match="the times are"):
                series_of(given.set_axis(bad))
        assert series_of(given.set_axis((index - index[0]).total_seconds())).rows[3].moment == 5 * 86400.0
        assert series_of(given.reset_index(drop=True)).time is None


def test_times_are_numbers_dates_or_texts_of_them() -> None:
    noon = datetime(2024, 1, 1, 12)
    for times, expected in (
        (["2024-01-01 12:00"], noon), (np.array(["2024-01-01T12"], dtype="datetime64[ns]"), noon), ([noon], noon),
        ([date(2024, 1, 1)], datetime(2024, 1, 1)), (["1.5"], 1.5), (np.array([1.5]), 1.5), ([3], 3.0),
    ):  # fmt: skip
        assert series_of([0.0], times).rows[0].moment == expected
    for time in (math.nan, np.datetime64("NaT"), "noon", None, "nan", math.inf):
        told = re.escape(repr(time))  # as it was given
        with pytest.raises(ValueError, match=rf"time 2 is {told}, expected a number, a date or a text of one"):
            series_of([0.0, 0.0], [0, time])


def test_columns_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("t,ab,a\n1,2,3\n")
    series = read_series(tmp_path / "x.csv", time=1, columns=[3])
    assert (series.time, series.columns) == ("t", ("a",))
    assert read_series(tmp_path / "x.csv", columns="ab").columns == ("ab",)


def test_smoothing_filters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it gives beside is what the filter alone gives, its state too."""
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    values[7, 0] = math.nan
    series = series_of(values)
    plain, smooth = (SeriesFilter(KNOWN).fit(series) for _ in range(2))
    expected = plain.extend(series[:30]), plain.extend(series[30:])
    passes = []
    for module in (smoother, kalman):
        once = module.run
        monkeypatch.setattr(module, "run", lambda *a, once=once, **k: passes.append(0) or once(*a, **k))
    got = smooth.extend(series[:30], smooth=True), smooth.extend(series[30:], smooth=True)
    assert len(passes) == 2
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.sd, b.sd)
        assert torch.equal(a.loglik, b.loglik)
        assert a.smoothed is not None
        assert torch.equal(a.smoothed[-1], a.mean[-1])
    nothing = smooth.extend(series[:0], smooth=True)
    assert nothing.smoothed is not None
    assert nothing.smoothed.shape == (0, 2)
    assert torch.equal(smooth.forecast(3).mean, plain.forecast(3).mean)
