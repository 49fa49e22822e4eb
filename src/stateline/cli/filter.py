"""`stateline filter`: take the noise out of series, forecast them, go on with what comes tomorrow or this second."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from stateline.cli.parser import Parser, UsageError, new_parser, positive

if TYPE_CHECKING:
    from stateline.apps.filter_output import Picture, Table
    from stateline.apps.filtering import SeriesFilter
    from stateline.apps.series_files import Row, Series, SeriesReader

SUMMARY = "take noise out of series, forecast them"
DESCRIPTION = """\
Take the noise out of a series, forecast it, and go on with what comes tomorrow. How noisy the sensor is, and how the
signal moves, is learnt from the data. Values may be missing, times uneven. Memory is constant, for any file."""
EPILOG = """\
examples:
  stateline filter sensor.csv > clean.csv
  stateline filter sensor.csv --time time --smooth --forecast 24 --plot clean.png --out clean.csv
  stateline filter sales.csv --time month --model local-trend+seasonal:12 --forecast 12 --interval 0.8 --out ahead.csv
  stateline filter track.csv --time seconds --columns x,y --model constant-velocity --smooth --plot track.png
  stateline filter monday.csv --save-state sensor.safetensors --out monday_clean.csv
  stateline filter tuesday.csv --load-state sensor.safetensors --save-state sensor2.safetensors   as if one file
  stateline filter --load-state sensor.safetensors --forecast 24                                  no new data
  tail -n 0 -f sensor.log | stateline filter - --follow --load-state sensor.safetensors

models (default: local-trend), of which variances are learnt:
  local-level                a level that wanders
  local-trend[:DAMPING]      a level with a slope; a damping below 1 lets forecasts flatten out
  seasonal:PERIOD[:WAVES]    a pattern that repeats every PERIOD steps, as a sum of waves (at most 6 if not said)
  oscillator:PERIOD          a wave whose size and phase wander
  constant-velocity, constant-acceleration
                             all columns are the axes of one moving thing
  a+b                        a sum, as in local-trend+seasonal:24; a local-level is added where a sum has no level
  model.yaml                 components with values of their own:   or matrices, of one step:
                               components:                            A: [[1, 1], [0, 1]]
                                 trend: {kind: local-trend,           C: [[1, 0]]
                                         level: 0, slope: learn}      Q: [[0, 0], [0, 0.01]]   (or learn: a diagonal)
                                 day: {kind: seasonal, period: 24}    R: learn
                               noise: 0.25                            m0, P0, continuous: true (optional)

data:
  A row a moment, a column a series; tabs, semicolons, commas or blanks between. With a header or without (columns are
  then 1, 2, …). Missing is an empty cell or nan; rows may be missing too, if there are times: numbers, or dates as in
  2024-03-01 12:30; a file whose first time is a day, 20240131, or a month, 202401, has such (if it has not:
  --time-format number). A step of a model is the middle gap between times, a month in monthly data. --decimal , is for
  21,5 in place of 21.5.

output:
  A line for each row and column: time, column, kind (data or forecast), observed, mean, sd, lower, upper; with --smooth
  also smoothed, smoothed_sd. mean is what is known at that row, smoothed what the whole series tells. For data they
  speak of the signal; for a forecast of the values to be observed, noise included.
Ctrl-C ends it early: what was read is written and saved.
"""
SECONDS = 5.0  # between lines of progress
LEARN_ROWS = 5000
TIMES = ("time", "date", "datetime", "timestamp", "day", "month", "year", "seconds", "t")  # what times are often called
DECIMALS = (".", ",")
TOLD, TOLD_WIDTH = 6, 12  # columns of which variances are told, and of what width
POLL = 0.2  # seconds between looks at a file that is followed


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "filter", DESCRIPTION, EPILOG, summary=SUMMARY)
    parser.set_defaults(run=run)
    parser.add_argument("data", nargs="?", metavar="DATA", help="a CSV file, or - for stdin")
    what = parser.add_argument_group("what the data is")
    what.add_argument("--time", metavar="COLUMN", help="name or number of the column of times (default: even rows)")
    what.add_argument("--time-format", metavar="FORM", help="how dates are written, as in %%d/%%m/%%Y; or number")
    what.add_argument("--columns", metavar="A,B", help="names or numbers of those to filter (default: all)")
    what.add_argument(
        "--decimal", choices=DECIMALS, metavar="MARK", help="what is before decimals, . or , (default: .)"
    )
    what.add_argument("--step", type=float, metavar="X", help="what is one step: seconds, or units of numeric times")
    model = parser.add_argument_group("how it is filtered")
    model.add_argument("--model", metavar="NAME", help="a name, a sum of names, or a .yaml file (default: local-trend)")
    model.add_argument(
        "--learn-rows", type=positive, metavar="N", help=f"learn from the first N rows (default: {LEARN_ROWS})"
    )
    model.add_argument("--smooth", action="store_true", help="also estimate from all rows; holds them in memory")
    model.add_argument("--forecast", type=positive, metavar="N", help="go on for N steps")
    model.add_argument("--interval", type=float, metavar="P", help="probability of lower to upper (default: 0.95)")
    out = parser.add_argument_group("where it goes")
    out.add_argument("--out", type=_to, metavar="FILE", help="the CSV (default, and -: stdout)")
    out.add_argument("--plot", type=Path, metavar="FILE", help="a picture: .png, .svg, .pdf; of the last 2,000 rows")
    out.add_argument("--save-state", type=Path, metavar="FILE", help="all that is needed to go on")
    out.add_argument("--load-state", type=Path, metavar="FILE", help="go on from there; it brings model and columns")
    out.add_argument("--overwrite", action="store_true", help="replace files that exist")
    out.add_argument("--follow", action="store_true", help="answer each row at once; a file is watched for more")
    out.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr")


def _to(name: str) -> Path | None:
    return None if name == "-" else Path(name)


def run(options: argparse.Namespace) -> int:
    """Filter as asked."""
    _check(options)
    from stateline.apps.filter_output import Picture
    from stateline.apps.filtering import deviations

    deviations(_level(options))
    sensor = _sensor(options)
    if options.plot:
        Picture.check(0)
    with ExitStack() as stack:
        stop = stack.enter_context(_stopped())
        job = Job(options, sensor, stop)
        out = stack.enter_context(_output(options))
        if options.data is None:
            job.begin(out, None)
        else:
            source = "stdin" if options.data == "-" else options.data
            lines = stop.until(stack.enter_context(_lines(options)))
            try:
                reader = job.reader(source, lines)
            except ValueError:
                if stop.asked:  # nothing came until then
                    raise KeyboardInterrupt from None
                raise
            job.begin(out, reader)
            job.all_rows()
        job.end()
    if stop.asked:
        saved = f"; {options.save_state} holds where it was" if options.save_state else ""
        raise KeyboardInterrupt(f"stopped after row {sensor.rows:,}; what was read is written{saved}")
    return 0


def _level(options: argparse.Namespace) -> float:
    return 0.95 if options.interval is None else float(options.interval)


def _check(options: argparse.Namespace) -> None:
    """Refuse what does not go together, and what would be overwritten, before anything is done."""
    if options.load_state:
        for name in ("model", "time", "time_format", "columns", "decimal", "step", "learn_rows"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"--load-state brings what {flag} would say; leave one of the two out")
    if options.data is None:
        if not options.load_state:
            raise UsageError("no DATA given; stateline filter --help shows how")
        for name in ("follow", "smooth", "plot"):
            if getattr(options, name):
                raise UsageError(f"--{name} needs DATA")
        if not options.forecast:
            raise UsageError("without DATA there is nothing to do but --forecast N")
    if options.time_format and not options.time:
        raise UsageError("--time-format needs --time, the column it is about")
    if options.step is not None and not options.time:
        raise UsageError("--step needs --time: without times a row is a step")
    for name in ("smooth", "plot"):
        if options.follow and getattr(options, name):
            raise UsageError(f"--{name} waits for the last row, and --follow answers each at once")
    if options.follow and options.learn_rows:
        raise UsageError("--follow learns nothing; learn from a file first, with --save-state, and --load-state that")
    _check_files(options)


def _check_files(options: argparse.Namespace) -> None:
    seen: dict[Path, str] = {}
    if options.data not in (None, "-"):
        seen[Path(options.data).resolve()] = "DATA"
    for name in ("out", "plot", "save_state"):
        path, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if (other := seen.get(path.resolve())) is not None:
            raise UsageError(f"{flag} and {other} are both {path}")
        seen[path.resolve()] = flag
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: " + ("is a folder" if path.is_dir() else "there is no such folder"))
        if path.exists() and not path.is_file():
            if name == "out":  # a pipe or a terminal
                continue
            raise UsageError(f"{flag} {path}: is no file")
        if path.exists() and not options.overwrite:
            raise UsageError(f"{flag}: {path} exists; --overwrite replaces it")
    if options.plot and options.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {options.plot}: expected a name that ends in .png, .svg or .pdf")


def _sensor(options: argparse.Namespace) -> SeriesFilter:
    from stateline.apps.filtering import SeriesFilter

    if options.load_state:
        return SeriesFilter.load(options.load_state)
    sensor = SeriesFilter("local-trend" if options.model is None else options.model, step=options.step)
    if options.follow and sensor.learns:
        remedy = "learn from a file first, with --save-state, then --load-state that; or give values in a .yaml file"
        raise UsageError(f"--follow answers at once, and the model has variances to learn: {remedy}")
    if options.follow and options.time and options.step is None:
        raise UsageError("--follow with --time needs --step: seconds, or units of numeric times, that one step is")
    return sensor


class Job:
    """One run: reads rows, filters them in pieces of constant size, writes what comes out."""

    def __init__(self, options: argparse.Namespace, sensor: SeriesFilter, stop: Stop) -> None:
        self.options, self.sensor, self.stop = options, sensor, stop
        self.table: Table
        self.picture: Picture | None = None
        self._reader: SeriesReader | None = None
        self._tied = False

    def reader(self, source: str, lines: Iterable[str]) -> SeriesReader:
        """Rows of the columns that were asked for, or that the loaded filter knows."""
        from stateline.apps.series_files import SeriesReader

        o, sensor = self.options, self.sensor
        if o.load_state:
            return SeriesReader(
                source,
                lines,
                time=sensor.time,
                columns=sensor.columns,
                time_format=sensor.time_format,
                names=sensor.names,
                decimal=sensor.decimal,
            )
        columns = None if o.columns is None else [name.strip() for name in o.columns.split(",")]
        decimal = "." if o.decimal is None else o.decimal
        return SeriesReader(source, lines, time=o.time, columns=columns, time_format=o.time_format, decimal=decimal)

    def begin(self, out: TextIO, reader: SeriesReader | None) -> None:
        """Prepare what is written, once the data was found to be there."""
        from stateline.apps.filter_output import Picture, Table

        self._reader = reader
        if self.options.plot and reader is not None:
            self.picture = Picture(_level(self.options))
            self.picture.check(len(reader.columns))
        self.table = Table(out, _level(self.options), self.options.smooth)

    def all_rows(self) -> None:
        """Learn if there is nothing to go on from, then filter row by row, piece by piece, or all at once."""
        o = self.options
        assert self._reader is not None
        rows = iter(self._reader)
        try:
            if not o.load_state:
                first = list(islice(rows, 1 if o.follow else o.learn_rows or LEARN_ROWS))
                self._learn(first)
                rows = chain(first, rows)
            if o.smooth:
                self._piece(list(rows), smooth=True)
                return
            size = 1 if o.follow else self.sensor.chunk
            while piece := list(islice(rows, size)):
                self._piece(piece)
                if o.follow:
                    self._ahead()
                    self.table.out.flush()
        except OSError:  # whoever reads the answers went away
            if o.follow:
                self._save()
            raise
        except ValueError as error:  # a bad line
            if o.follow and self._save():
                told = f"{o.save_state} holds the state after row {self.sensor.rows:,}; --load-state goes on from it."
                raise ValueError(f"{error} {told}") from error
            raise

    def end(self) -> None:
        """Forecast, draw and save."""
        o, ahead = self.options, None
        if o.forecast and not o.follow and not self.stop.asked:
            ahead = self._ahead()
        if self.picture is not None and self.sensor.rows:
            self.picture.draw(o.plot, self.sensor, ahead, o.smooth)
        self.table.begin()
        self._save()

    def _ahead(self) -> Any:
        if not self.options.forecast:
            return None
        ahead = self.sensor.forecast(self.options.forecast)
        self.table.ahead(ahead, self.sensor.columns)
        return ahead

    def _save(self) -> bool:
        """Whether there was something to save, and a file for it."""
        if not (self.options.save_state and self.sensor.rows):
            return False
        self.sensor.save(self.options.save_state)
        return True

    def _learn(self, rows: list[Row]) -> None:
        assert self._reader is not None
        if not rows:
            if self.stop.asked:
                return
            raise UsageError(f"{self._reader.source} has no rows below its header")
        learns = self.sensor.learns
        for name in self._reader.columns if self._reader.time is None and not self.options.quiet else ():
            if name.lower() in TIMES:
                print(f"note: {name!r} is filtered as a series; --time {name} takes it for the time", file=sys.stderr)
        began = time.perf_counter()
        if learns and not self.options.quiet and sys.stderr.isatty():
            print(f"learning from {len(rows):,} rows …", end="\r", file=sys.stderr, flush=True)
        self.sensor.fit(self._series(rows), learn=learns)
        if learns and not self.options.quiet:
            took = time.perf_counter() - began
            print(f"learnt from {len(rows):,} rows in {took:.1f} s; standard deviations a step:", file=sys.stderr)
            for line in _deviations(self.sensor):
                print(line, file=sys.stderr)
            for name in self.sensor.exact:
                told = "its noise could not be learnt, and the least that the filter allows is kept"
                print(f"note: {name!r} is predicted without error (constant, or a line): {told}", file=sys.stderr)

    def _series(self, rows: list[Row]) -> Series:
        assert self._reader is not None
        return self._reader.series(rows)

    def _piece(self, rows: list[Row], *, smooth: bool = False) -> None:
        if not rows:
            return
        series = self._series(rows)
        clean = self.sensor.extend(series, smooth=smooth, tied=self._tied)
        self._tied = True  # rows of one time may be cut apart, and those of a file are not its own again
        self.table.rows(series, clean, self.sensor.rows)
        if self.picture is not None:
            self.picture.add(series, clean, self.sensor.rows)


def _deviations(sensor: SeriesFilter) -> list[str]:
    """A line for each standard deviation, a field for each column, of many the first few."""
    table = {name: [f"{value**0.5:.6g}" for value in values] for name, values in sensor.variances.items()}
    columns = max(map(len, table.values()))
    head = {"": [name[:TOLD_WIDTH] for name in sensor.columns]} if columns > 1 else {}
    more = f"  … {columns - TOLD} more" if columns > TOLD else ""
    return [
        f"  {name:12s} " + ("  ".join(f"{value:<{TOLD_WIDTH}}" for value in values[:TOLD]) + more).rstrip()
        for name, values in (head | table).items()
    ]


# ---- stopping --------------------------------------------------------------------------------------------------------


class Stop:
    """Ctrl-C and SIGTERM end the lines: at once while one is awaited, else after the piece in work.

    What was read by then is written and saved. A second signal ends it all at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self._waits:  # the second is meant
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True

    def until(self, lines: Iterable[str]) -> Iterator[str]:
        """The lines, until a signal comes."""
        source = iter(lines)
        while not self.asked:
            try:
                self._waits = True
                line = next(source, None)
            except KeyboardInterrupt:
                return
            finally:
                self._waits = False
            if line is None:
                return
            yield line


@contextmanager
def _stopped() -> Iterator[Stop]:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[TextIO]:
    """Stdout, or a file that is there whole at the end, or row by row if it follows."""
    if options.out is None:
        yield sys.stdout
        return
    straight = options.follow or (options.out.exists() and not options.out.is_file())
    path = options.out if straight else options.out.with_name(f".{options.out.name}.part")
    with open(path, "w", encoding="utf-8", newline="") as file:
        try:
            yield file
        except BaseException:
            if not straight:
                path.unlink(missing_ok=True)
            raise
    if not straight:
        path.replace(options.out)


@contextmanager
def _lines(options: argparse.Namespace) -> Iterator[Iterable[str]]:
    if options.data == "-":
        if isinstance(sys.stdin, TextIOWrapper):  # read as files are, whatever the locale
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield sys.stdin
        return
    with open(Path(options.data).expanduser(), encoding="utf-8", errors="replace") as file:
        if options.follow:
            yield _followed(file)
        else:
            yield _counted(file, Path(options.data).expanduser().stat().st_size, options.quiet)


def _followed(file: TextIO) -> Iterator[str]:
    """The lines of a file that grows; one that is not whole yet is waited for."""
    begun = ""
    while True:
        line = begun + file.readline()
        if line.endswith("\n"):
            begun = ""
            yield line
        else:
            begun = line
            time.sleep(POLL)


def _counted(file: TextIO, size: int, quiet: bool) -> Iterator[str]:
    """The lines of a file, with a bar on a terminal and a line now and then elsewhere."""
    if quiet or not size:
        yield from file
        return
    begun = shown = time.perf_counter()
    bar, done, pending = None, 0, 0
    try:
        for number, line in enumerate(file, 1):
            yield line
            pending += len(line)
            if number % 1000:
                continue
            done, pending, now = done + pending, 0, time.perf_counter()
            if bar is None and now - begun > 1.0 and sys.stderr.isatty():
                bar = _bar(size)
            if bar is not None:
                bar.update(done - bar.n)
            elif now - shown > SECONDS:
                shown = now
                print(f"{number:,} lines · {100 * done / size:.0f} %", file=sys.stderr, flush=True)
    finally:
        if bar is not None:
            bar.close()


def _bar(size: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=size, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
