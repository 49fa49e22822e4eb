"""What a new user of `stateline filter` meets: a file given twice, a cell that is wrong, a dash for a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stateline.apps import filtering
from stateline.apps.filtering import SeriesFilter, series_of
from stateline.cli import filter as command
from stateline.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `stateline filter` in a folder that holds only a model: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text("components: {l: {kind: local-level, level: 0.3}}\nnoise: 0.5\n")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["filter", *arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_the_last_row_is_not_taken_in_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While rows of one file may share a time, in whatever pieces it is read."""
    Path("x.csv").write_text("t,a\n1,3\n2,4\n2,5\n3,6\n3,7\n")
    Path("last.csv").write_text("t,a\n3,7\n4,8\n")
    known = ["x.csv", "--time", "t", "--model", "m.yaml", "--step", "1"]
    whole = run(*known, "--learn-rows", "1", "--save-state", "s")
    assert whole[0] == 0
    monkeypatch.setattr(filtering, "CHUNK", 2)
    assert run(*known, "--learn-rows", "1") == whole
    monkeypatch.setattr(command, "_followed", lambda file: iter(file))
    assert run(*known, "--follow") == whole
    told = "the time '3' is that of the last row so far. Sort the rows; or was this file taken in before?"
    expected = (2, "", f"stateline: error: filter: last.csv, line 2: {told}\n")
    assert run("last.csv", "--load-state", "s") == expected
    later = series_of([7.0, 8.0], [3, 4], columns=["a"])
    sensor = SeriesFilter.load("s")
    with pytest.raises(ValueError, match=r"the time '3\.0' is that of the last row so far"):
        sensor.extend(later)
    assert sensor.rows == 5
    assert sensor.extend(later, tied=True).mean.shape == (2, 1)


def test_a_dash_is_standard_output(run: Run) -> None:
    Path("x.csv").write_text("3\n4\n")
    expected = run("x.csv", "--model", "m.yaml")
    assert expected[1].count("\n") == 3
    assert run("x.csv", "--model", "m.yaml", "--out", "-") == expected
    assert not Path("-").exists()


def test_commands_that_follow_a_log_begin_at_its_end() -> None:
    """So that they can be stopped and given again."""
    pages = [command.EPILOG, *(page.read_text() for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")))]
    assert [re.findall("tail -f .* filter", text) for text in pages] == [[]] * len(pages)


def test_bands_of_a_picture_are_labelled_and_a_forecast_is_not_cut_off(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pictures are drawn by matplotlib")
    Path("x.csv").write_text("a\n" + "".join(f"{20 + t % 3}\n" for t in range(40)))
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    known = ["x.csv", "--model", "m.yaml", "--quiet", "--interval", "0.9", "--out", "o.csv", "--overwrite"]
    assert run(*known, "--forecast", "200", "--plot", "p.svg")[0] == 0
    axis = figures[0].axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["observed", "filtered", "90 % of the signal", "forecast", "90 % of what will be measured"]
    rows = [line.split(",") for line in Path("o.csv").read_text().splitlines() if ",forecast," in line]
    low, high = axis.get_ylim()
    assert low < min(float(row[6]) for row in rows)
    assert high > max(float(row[7]) for row in rows)
    monkeypatch.undo()
    pyplot.close(figures[0])
