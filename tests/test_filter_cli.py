"""`stateline filter` and its Python: cut anywhere, files give the numbers of the whole; nothing is lost or replaced."""

from __future__ import annotations

import csv
import doctest
import io
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stateline.apps import filter_models, filter_output, filtering, series_files
from stateline.apps.filtering import SeriesFilter, series_of
from stateline.classical import kalman_filter, kalman_smoother, local_level
from stateline.cli import main
from stateline.cli.filter import _followed

F64 = torch.float64
KNOWN = {"components": {"level": {"kind": "local-level", "level": 0.3}}, "noise": 0.5}
MODELS = (
    "local-level", "local-trend", "local-trend:0.9", "seasonal:12", "seasonal:12:2", "oscillator:30",
    "local-trend+seasonal:7+oscillator:40", "constant-velocity", "constant-acceleration",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `stateline filter` in an empty folder; it must succeed. What it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        code = main(["filter", *arguments])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return call


def walk(rows: int = 60, columns: int = 1, seed: int = 0) -> Tensor:
    """A level that wanders, seen through noise."""
    made = torch.Generator().manual_seed(seed)
    steps, noise = (torch.randn(rows, columns, generator=made, dtype=F64) for _ in range(2))
    return 20 + steps.cumsum(0) + noise


def write(path: Path | str, values: Tensor, times: list[str] | None = None, header: bool = True) -> None:
    """A CSV with empty cells for NaN."""
    names = [chr(ord("a") + c) for c in range(values.shape[1])]
    lines = [",".join((["time"] if times else []) + names)] if header else []
    for t, row in enumerate(values.tolist()):
        cells = ["" if math.isnan(v) else repr(v) for v in row]
        lines.append(",".join(([times[t]] if times else []) + cells))
    Path(path).write_text("\n".join(lines) + "\n")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("module", [filtering, filter_models, series_files, filter_output], ids=lambda m: m.__name__)
def test_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_filter_and_smoother(run: Callable[..., str], tmp_path: Path) -> None:
    values = walk(columns=2)
    values[5:9, 0] = math.nan
    write("x.csv", values)
    Path("m.yaml").write_text("components: {l: {kind: local-level, level: 0.3}}\nnoise: 0.5\n")
    rows = table(run("x.csv", "--model", "m.yaml", "--smooth", "--forecast", "3", "--interval", "0.9"))
    assert len(rows) == (60 + 3) * 2
    for c, name in enumerate("ab"):
        y = values[:, c : c + 1]
        scale = max(float(y[y.isfinite()].var(correction=0)), 0.5)
        model = local_level(0.3, 0.5)
        model = model._replace(m0=y.nanmedian()[None], P0=torch.full((1, 1), filtering.PRIOR * scale, dtype=F64))
        out, smooth = kalman_filter(model, y)[0], kalman_smoother(model, y)
        mine = [row for row in rows if row["column"] == name]
        assert [row["kind"] for row in mine] == ["data"] * 60 + ["forecast"] * 3
        assert [row["time"] for row in mine] == [str(t) for t in range(1, 64)]
        assert [row["observed"] == "" for row in mine[:10]] == [False] * 5 + [c == 0] * 4 + [False]
        for key, expected in {
            "mean": out.mean, "sd": out.cov.sqrt(), "smoothed": smooth.mean, "smoothed_sd": smooth.cov.sqrt(),
        }.items():  # fmt: skip
            got = torch.tensor([float(row[key]) for row in mine[:60]], dtype=F64)
            torch.testing.assert_close(got, expected.flatten(), rtol=1e-5, atol=1e-6)
        last, step = mine[-1], float(out.cov[-1])
        assert float(last["sd"]) == pytest.approx(math.sqrt(step + 3 * 0.3 + 0.5), rel=1e-6)
        assert float(last["upper"]) - float(last["mean"]) == pytest.approx(1.6448536 * float(last["sd"]), rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_pieces_are_the_whole_bit_for_bit(model: str, tmp_path: Path) -> None:
    """Uneven times, missing values, saved and loaded between; and one row at a time."""
    values = walk(64, 2)
    values[10:14, 1] = math.nan
    values[20] = math.nan
    times = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=F64).cumsum(0).tolist()
    series = series_of(values, times)
    spec = filter_models.described(model)
    fixed = {name: dict(part) for name, part in spec["components"].items()}
    for part in fixed.values():
        part |= dict.fromkeys(filter_models.KINDS[part["kind"]][2], 0.2)
    whole = SeriesFilter({"components": fixed, "noise": 0.4}).fit(series)
    expected = whole.extend(series)
    pieces = SeriesFilter({"components": fixed, "noise": 0.4}).fit(series)
    got = []
    for start, stop in pairwise([0, 1, 2, 31, 31, 50, 64]):
        got.append(pieces.extend(series[start:stop]))
        pieces.save(tmp_path / "s.safetensors")
        pieces = SeriesFilter.load(tmp_path / "s.safetensors")
    for name in ("mean", "sd", "loglik"):
        assert torch.equal(torch.cat([getattr(part, name) for part in got]), getattr(expected, name))
    assert torch.equal(pieces.forecast(4).mean, whole.forecast(4).mean)
    assert pieces.forecast(4).times == whole.forecast(4).times
    assert pieces.variances == whole.variances


def test_chunks_are_the_whole_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    series = series_of(walk(200))
    whole = SeriesFilter(KNOWN).fit(series).extend(series)
    monkeypatch.setattr(filtering, "CHUNK", 7)
    assert torch.equal(SeriesFilter(KNOWN).fit(series).extend(series).mean, whole.mean)


@pytest.mark.parametrize("model", ["local-trend:0.9+seasonal:12", "constant-velocity", "oscillator:30"])
def test_a_row_that_is_not_there_is_a_row_that_is_missing(model: str) -> None:
    values = walk(40)
    values[[7, 8, 9, 21]] = math.nan
    keep = values[:, 0].isfinite()
    times = torch.arange(40, dtype=F64)
    full = SeriesFilter(model).fit(series_of(values, times.tolist()))
    some = SeriesFilter(model).fit(series_of(values, times.tolist()))
    a, b = full.extend(series_of(values, times.tolist())), some.extend(series_of(values[keep], times[keep].tolist()))
    torch.testing.assert_close(a.mean[keep], b.mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(a.loglik[keep], b.loglik, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(full.forecast(3).sd, some.forecast(3).sd, rtol=1e-7, atol=1e-7)


def test_matrices_find_data_however_far_from_zero() -> None:
    learn = {"A": [[1]], "C": [[1]], "Q": "learn", "R": "learn"}
    near, far = (SeriesFilter(learn).fit(series_of(walk(400) + off)).variances for off in (0.0, 1e6))
    for name, (value,) in near.items():
        assert far[name][0] == pytest.approx(value, rel=1e-2)


def test_a_filter_tells_what_it_is() -> None:
    sensor = SeriesFilter("local-level")
    assert repr(sensor) == "SeriesFilter({'components': {'local-level': {'kind': 'local-level'}}}, not fitted)"
    sensor.fit(torch.arange(9.0)).extend(torch.arange(9.0))
    assert repr(sensor).endswith(", columns=('1',), rows=9)")


def test_what_was_observed_is_written_whole(run: Callable[..., str]) -> None:
    numbers = ["123456887.25", "123456888.25", "123456887.5"]
    write("x.csv", torch.tensor([[float(x)] for x in numbers], dtype=F64))
    run("x.csv", "--model", "local-level", "--out", "o.csv", "--quiet")
    found = csv.DictReader(io.StringIO(Path("o.csv").read_text()))
    assert [row["observed"] for row in found] == numbers


def test_matrices_are_a_model() -> None:
    values = walk(50)
    level = {"A": [[1]], "C": [[1]], "Q": [[0.3]], "R": [[0.5]], "m0": [20], "P0": [[9.0]]}
    got = SeriesFilter(level).fit(series_of(values)).extend(series_of(values))
    one = torch.ones(1, 1, dtype=F64)
    model = local_level(0.3, 0.5)._replace(m0=20 * one[0], P0=9 * one)
    torch.testing.assert_close(got.mean, kalman_filter(model, values)[0].mean)
    learnt = SeriesFilter({**level, "Q": "learn", "R": "learn"}).fit(series_of(walk(400)))
    assert learnt.learns
    assert 0.3 < learnt.variances["Q[0,0]"][0] < 3
    assert 0.3 < learnt.variances["R[0,0]"][0] < 3
    gaps = series_of(values[:3], [0.0, 1.0, 4.0])
    assert SeriesFilter(level, step=1.0).fit(gaps).extend(gaps).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"2\.5 steps apart.*continuous: true"):
        SeriesFilter(level, step=1.0).fit(gaps).extend(series_of(values[:2], [0.0, 2.5]))
    smooth = SeriesFilter({**level, "A": [[0]], "continuous": True}, step=1.0).fit(gaps)
    assert smooth.extend(series_of(values[:2], [0.0, 2.5])).mean.isfinite().all()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_two_files_are_one(run: Callable[..., str]) -> None:
    values = walk(50, 2)
    start = datetime(2024, 3, 1)
    times = [(start + timedelta(hours=t)).strftime("%Y-%m-%d %H:%M") for t in range(50)]
    write("both.csv", values, times)
    write("first.csv", values[:30], times[:30])
    write("then.csv", values[30:], times[30:])
    write("bare.csv", values[30:], times[30:], header=False)
    one = ["--time", "time", "--quiet", "--learn-rows", "30"]
    whole = run("both.csv", *one, "--forecast", "2").splitlines()
    first = run("first.csv", *one, "--save-state", "s.safetensors").splitlines()
    for name in ("then.csv", "bare.csv"):
        then = run(name, "--load-state", "s.safetensors", "--forecast", "2", "--quiet").splitlines()
        assert first + then[1:] == whole
    run("then.csv", "--load-state", "s.safetensors", "--save-state", "t.safetensors")
    assert run("--load-state", "t.safetensors", "--forecast", "2").splitlines()[1:] == whole[-4:]
    assert whole[-1].startswith("2024-03-03 03:00,b,forecast,,")
    assert main(["filter", "first.csv", "--load-state", "t.safetensors"]) == 2  # a file taken in twice


def follow(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "m.yaml").write_text("components: {l: {kind: local-level, level: 0.3}}\nnoise: 0.5\n")
    command = [sys.executable, "-m", "stateline", "filter", *arguments, "--follow", "--model", "m.yaml"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as a user's is
    return subprocess.Popen(
        command, cwd=folder, env=buffered, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_a_stream_is_answered_line_by_line_and_saved_by_ctrl_c(run: Callable[..., str], tmp_path: Path) -> None:
    with follow(tmp_path, "-", "--save-state", "s.safetensors") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for t, line in enumerate(["3.0", "nan", "4.0"], 1):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            if t == 1:
                assert process.stdout.readline().startswith("time,column,kind")
            assert process.stdout.readline().startswith(f"{t},1,data,")  # before the next is written
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert said == "stateline: stopped after row 3; what was read is written; s.safetensors holds where it was\n"
    assert SeriesFilter.load(tmp_path / "s.safetensors").rows == 3
    Path("more.csv").write_text("5.0\n")
    assert run("more.csv", "--load-state", "s.safetensors").splitlines()[1].startswith("4,1,data,5,")


def test_a_bad_line_ends_a_stream_and_what_came_before_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text("components: {l: {kind: local-level, level: 0.3}}\nnoise: 0.5\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\nthree\n4\n"))
    arguments = ["-", "--follow", "--model", "m.yaml", "--save-state", "s.safetensors", "--out", "o.csv"]
    assert main(["filter", *arguments, "--forecast", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("stateline: error: filter: stdin, line 3, column '1': 'three' is no number.")
    assert said.endswith(" s.safetensors holds the state after row 2; --load-state goes on from it.\n")
    assert SeriesFilter.load("s.safetensors").rows == 2
    lines = [line.split(",")[:3] for line in Path("o.csv").read_text().splitlines()[1:]]
    assert lines == [[n, "1", k] for n, k in zip("123234", ["data", "forecast", "forecast"] * 2, strict=True)]


def test_a_reader_that_goes_away_ends_a_stream_and_what_it_got_is_saved(tmp_path: Path) -> None:
    with follow(tmp_path, "-", "--save-state", "s.safetensors") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("3.0\n")
        process.stdin.flush()
        assert [process.stdout.readline()[:7] for _ in range(2)] == ["time,co", "1,1,dat"]
        process.stdout.close()
        process.stdin.write("4.0\n5.0\n")
        process.stdin.close()
        assert process.wait(60) == 141
    assert SeriesFilter.load(tmp_path / "s.safetensors").rows == 2  # the second met nobody


def test_ctrl_c_keeps_what_was_read(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("x.csv", walk(100))
    monkeypatch.setattr(filtering, "CHUNK", 10)
    extend = SeriesFilter.extend

    def stopped(self: SeriesFilter, *arguments: Any, **options: Any) -> Any:
        if self.rows == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return extend(self, *arguments, **options)

    monkeypatch.setattr(SeriesFilter, "extend", stopped)
    few = ["--learn-rows", "20"]
    assert main(["filter", "x.csv", "--out", "o.csv", "--save-state", "s.safetensors", *few, "--forecast", "5"]) == 130
    assert "stopped after row 40; what was read is written" in capsys.readouterr().err
    assert SeriesFilter.load("s.safetensors").rows == 40
    assert len(Path("o.csv").read_text().splitlines()) == 41
    monkeypatch.setattr(SeriesFilter, "extend", extend)
    write("rest.csv", walk(100)[40:])
    rest = run("rest.csv", "--load-state", "s.safetensors").splitlines()
    assert Path("o.csv").read_text().splitlines() + rest[1:] == run("x.csv", *few).splitlines()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_file_is_watched_for_more(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("1.0\n2")
    lines = _followed(path.open())
    assert next(lines) == "1.0\n"
    with path.open("a") as log:
        log.write(".5\n")
    assert next(lines) == "2.5\n"  # not before it is whole


def test_a_pipe_is_written_to_as_it_is(run: Callable[..., str]) -> None:
    write("x.csv", walk(30))
    run("x.csv", "--out", os.devnull)
    assert not Path(os.devnull).is_file()


def test_memory_does_not_grow_with_the_file(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering, "CHUNK", 16)
    sizes = []
    extend = SeriesFilter.extend

    def watched(self: SeriesFilter, series: Any, **options: Any) -> Any:
        sizes.append(len(series))
        return extend(self, series, **options)

    monkeypatch.setattr(SeriesFilter, "extend", watched)
    write("x.csv", walk(300))
    run("x.csv", "--learn-rows", "50", "--out", "o.csv", "--quiet")
    assert max(sizes) == 16
    assert sum(sizes) == 300


def test_a_picture_is_drawn(run: Callable[..., str]) -> None:
    write("x.csv", walk(40, 2), [f"2024-01-{1 + t // 24:02d}T{t % 24:02d}:00" for t in range(40)])
    for name in ("p.png", "p.svg"):
        run("x.csv", "--time", "1", "--forecast", "6", "--plot", name, "--smooth", "--out", f"{name}.csv")
        assert Path(name).stat().st_size > 5000


def test_nothing_is_replaced_unasked(run: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write("x.csv", walk(30))
    for flag in ("--out", "--plot", "--save-state"):
        Path("kept.png").write_text("precious")
        assert main(["filter", "x.csv", flag, "kept.png"]) == 2
        assert "kept.png exists; --overwrite replaces it" in capsys.readouterr().err
        assert Path("kept.png").read_text() == "precious"
        run("x.csv", flag, "kept.png", "--overwrite")
        assert Path("kept.png").read_bytes() != b"precious"
    Path("o.csv").write_text("precious")
    Path("bad.csv").write_text("1\n2\n3\n4\n5\n6\nx\n")
    assert main(["filter", "bad.csv", "--out", "o.csv", "--overwrite", "--learn-rows", "6"]) == 2
    assert Path("o.csv").read_text() == "precious"
    assert not list(Path().glob(".*"))


WRONG = [
    ([], "no DATA given"),
    (["absent.csv"], "absent.csv: No such file or directory"),
    (["x.csv", "--model", "nonsense"], "the model 'nonsense' is unknown, expected one of local-level"),
    (["x.csv", "--model", "seasonal"], "seasonal has no period"),
    (["x.csv", "--model", "seasonal:1"], "period of seasonal is 1"),
    (["x.csv", "--model", "seasonal:week"], "period of seasonal is 'week'"),
    (["x.csv", "--model", "seasonal:12:7"], "harmonics of seasonal is 7"),
    (["x.csv", "--model", "local-trend:2"], "damping of local-trend is 2"),
    (["x.csv", "--model", "constant-velocity+seasonal:12"], "seasonal is of one column"),
    (["x.csv", "--model", "absent.yaml"], "absent.yaml: No such file"),
    (["x.csv", "--model", "wide.yaml"], "wide.yaml: A is 1 by 2, expected 1 by 1: as many rows as columns"),
    (["x.csv", "--model", "joint.yaml"], "joint.yaml: seasonal is of one column"),
    (["x.csv", "--model", "rows.yaml"], "rows.yaml: C has 1 row, and the data 2 columns. C has a row a column: choose"),
    (["x.csv", "--columns", "c"], "x.csv has no column 'c' (--columns); its first line says a, b"),
    (["x.csv", "--columns", "a,1"], "'a' is asked for twice"),
    (["x.csv", "--time", "t"], "x.csv has no column 't' (--time)"),
    (["x.csv", "--time-format", "%d"], "--time-format needs --time"),
    (
        ["x.csv", "--interval", "95"],
        "the interval is 95.0, expected a probability between 0 and 1, such as 0.95. In per",
    ),
    (["x.csv", "--forecast", "0"], "0 is not a whole number from 1"),
    (["x.csv", "--step", "0", "--time", "a"], "step is 0.0"),
    (["x.csv", "--step", "2"], "--step needs --time: without times a row is a step"),
    (["x.csv", "--follow"], "the model has variances to learn"),
    (["x.csv", "--follow", "--smooth"], "--smooth waits for the last row"),
    (["x.csv", "--follow", "--plot", "p.png"], "--plot waits for the last row"),
    (["x.csv", "--follow", "--learn-rows", "5"], "--follow learns nothing"),
    (["x.csv", "--plot", "p.txt"], "expected a name that ends in .png"),
    (["x.csv", "--out", "x.csv", "--overwrite"], "--out and DATA are both x.csv"),
    (["x.csv", "--out", "o", "--save-state", "o"], "--save-state and --out are both o"),
    (["x.csv", "--out", "no/o.csv"], "there is no such folder"),
    (["x.csv", "--load-state", "absent"], "absent: No such file"),
    (["x.csv", "--load-state", "x.csv"], "filter: x.csv is no saved filter. stateline filter --save-state writes one."),
    (["x.csv", "--load-state", "s", "--model", "local-level"], "--load-state brings what --model would say"),
    (["--load-state", "s"], "nothing to do but --forecast N"),
    (["--load-state", "s", "--forecast", "3", "--smooth"], "--smooth needs DATA"),
    (["text.csv"], "text.csv, line 3, column 'a': 'high' is no number"),
    (["dates.csv"], "dates.csv, line 2, column 'time': '2024-01-01' is no number. The time? Say --time time."),
    (["back.csv", "--time", "1"], "back.csv, line 4: the time '1' is before that of the row ahead, '2'"),
    (["ragged.csv"], "ragged.csv, line 3: 1 cells, expected 2"),
    (["inf.csv"], "inf.csv, line 2, column 'a': 'inf' is infinite"),
    (["empty.csv"], "empty.csv is empty"),
    (["header.csv"], "header.csv has no rows below its header"),
    (["few.csv"], "3 variances are to be learnt and it has 2 values, expected more than 3. Give more, or"),
    (["x.csv", "--columns", ","], "has no column ''"),
    (["x.csv", "--load-state", "s", "--decimal", ","], "--load-state brings what --decimal would say"),
]
FILES = {
    "text.csv": "a\n1\nhigh\n", "dates.csv": "time,a\n2024-01-01,3\n", "back.csv": "time,a\n1,3\n2,4\n1,5\n3,4\n4,5\n",
    "ragged.csv": "a,b\n1,2\n3\n", "inf.csv": "a\ninf\n", "empty.csv": "# nothing\n\n", "header.csv": "a,b\n",
    "few.csv": "a\n1\n2\n", "wide.yaml": "A: [[1, 0]]\nC: [[1]]\nQ: learn\nR: learn\n",
    "rows.yaml": "A: [[1]]\nC: [[1]]\nQ: learn\nR: learn\n",
    "joint.yaml": "components: {move: {kind: constant-velocity}, day: {kind: seasonal, period: 7}}",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_complaints_are_one_line_and_nothing_is_done(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write("x.csv", walk(30, 2))
    for name, text in FILES.items():
        Path(name).write_text(text)
    series = series_of(walk(10))
    made = SeriesFilter(KNOWN).fit(series)
    made.extend(series)
    made.save("s")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main(["filter", *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("stateline: error: ")
    assert out.err.count("\n") == 1
    assert message in out.err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_column_that_is_the_time_by_its_name_is_told(run: Callable[..., str], capsys: Any) -> None:
    write("x.csv", walk(30), [str(t) for t in range(30)])
    assert main(["filter", "x.csv", "--model", "local-level"]) == 0
    assert "note: 'time' is filtered as a series; --time time takes it for the time" in capsys.readouterr().err
    assert main(["filter", "x.csv", "--model", "local-level", "--time", "time"]) == 0
    assert "note" not in capsys.readouterr().err


def test_a_file_with_decimal_commas_is_filtered_and_gone_on_with(run: Callable[..., str]) -> None:
    write("x.csv", walk(40))
    points = Path("x.csv").read_text()
    Path("y.csv").write_text(points.replace(".", ","))
    assert run("y.csv", "--decimal", ",", "--save-state", "s", "--quiet") == run("x.csv", "--quiet")
    Path("more.csv").write_text("21,5\n")
    assert run("more.csv", "--load-state", "s").splitlines()[1].startswith("41,a,data,21.5,")


@pytest.mark.parametrize("columns", [1, 2, 9])
def test_what_was_learnt_is_told_by_column(columns: int, run: Callable[..., str], capsys: Any) -> None:
    write("x.csv", walk(60, columns))
    assert main(["filter", "x.csv", "--model", "local-level", "--out", os.devnull]) == 0
    said = [line.split() for line in capsys.readouterr().err.splitlines()[1:]]
    more = ["…", "3", "more"] if columns == 9 else []
    if columns > 1:
        assert said.pop(0) == [*"abcdef"[:columns], *more]
    assert [line[0] for line in said] == ["level", "noise"]
    assert [line[7:] for line in said] == [more] * 2
    assert all(float(value) >= 0 for line in said for value in line[1:7])


def test_a_column_that_is_predicted_without_error_is_told(
    run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = torch.arange(60, dtype=F64)[:, None]
    write("x.csv", torch.cat([walk(60), 0 * line + 5, line], 1))
    assert main(["filter", "x.csv", "--out", "o.csv", "--save-state", "s"]) == 0
    said = capsys.readouterr().err
    note = r"note: '(.)' is predicted without error \(constant, or a line\): its noise could not be learnt"
    assert re.findall(note, said) == ["b", "c"]
    assert SeriesFilter.load("s").exact == ("b", "c")
    assert SeriesFilter(KNOWN).fit(series_of(0 * line)).exact == ()


def test_help_lists_every_model() -> None:
    from stateline.cli import filter as command

    for kind in filter_models.KINDS:
        assert kind in command.EPILOG
    assert re.search(r"examples:\n  stateline filter ", command.EPILOG)
