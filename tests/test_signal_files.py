"""Signals from files: every format read as written, and every damage reported with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from stateline.apps.signal_files import Signals, read_signals
from stateline.apps.signal_report import class_table, confusion, error_table, plot_confusion

TS = """\
# a comment
@problemName two
@timeStamps false
@univariate false
@dimensions 2
@equalLength false
@classLabel true a b
@data
1,2,?:4,5,6:a
7.5,NaN:-1e3,0:b
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def same(got: Signals, X: list[Any], y: list[Any] | None) -> None:
    assert len(got.X) == len(X)
    for a, b in zip(got.X, X, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b, dtype=float))
        assert a.dtype == np.float64
    assert (got.y is None) if y is None else (got.y is not None and got.y.tolist() == y)


def test_ts(tmp_path: Path) -> None:
    nan = np.nan
    both = [[[1, 4], [2, 5], [nan, 6]], [[7.5, -1e3], [nan, 0]]]
    same(read_signals(write(tmp_path, "a.ts", TS)), both, ["a", "b"])
    numbers = TS.replace("@classLabel true a b", "@targetlabel true").replace(":a", ":0.5").replace(":b", ":-2")
    same(read_signals(write(tmp_path, "n.ts", numbers)), both, [0.5, -2.0])
    bare = TS.replace("@classLabel true a b", "@classLabel false").replace(":a", "").replace(":b", "")
    same(read_signals(write(tmp_path, "u.ts", bare)), both, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("1,2,?:4,5,6:a", "1,2,?:4,5:a"), r"a\.ts:9 has dimensions of 2 and 3 samples"),
        (("1,2,?:4,5,6:a", "1,2,?:4,5,6:c"), r"a\.ts:9 ends in 'c', expected a class of @classLabel: a b"),
        (("1,2,?:4,5,6:a", "1,2,x:4,5,6:a"), r"a\.ts:9: 'x' is no number"),
        (("1,2,?:4,5,6:a", "1,2,inf:4,5,6:a"), r"a\.ts:9: 'inf' is infinite"),
        (("1,2,?:4,5,6:a", "1,2,3:a"), r"a\.ts:9 has 1 dimensions, @dimensions says 2"),
        (("1,2,?:4,5,6:a", "(0,1),(1,2):(0,3),(1,2):a"), "has time stamps, which are not read"),
        (("@data\n", ""), r"a\.ts:8 has data before @data"),
        (("@data\n1,2,?:4,5,6:a\n7.5,NaN:-1e3,0:b\n", ""), "has no @data"),
        (("1,2,?:4,5,6:a\n7.5,NaN:-1e3,0:b\n", ""), "holds no signals"),
    ],
)
def test_damaged_ts(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in TS
    with pytest.raises(ValueError, match=message):
        read_signals(write(tmp_path, "a.ts", TS.replace(*change)))


def test_a_ts_that_does_not_say_it_has_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.ts:2: 'a' is no number\. .* A line @classLabel true"):
        read_signals(write(tmp_path, "a.ts", "@data\n1,2,3:a\n"))


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", X=np.arange(12).reshape(2, 3, 2), y=[3, 4])
    same(read_signals(tmp_path / "a.npz"), [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]], [3, 4])
    np.savez(tmp_path / "b.npz", X=np.arange(5), lengths=[2, 3], y=["a", "b"])
    same(read_signals(tmp_path / "b.npz"), [[[0], [1]], [[2], [3], [4]]], ["a", "b"])
    np.savez(tmp_path / "c.npz", X=np.arange(4).reshape(2, 2))
    same(read_signals(tmp_path / "c.npz"), [[[0], [1]], [[2], [3]]], None)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"Z": [1]}, "has no array X"),
        ({"X": np.zeros(4)}, r"X has shape \(4,\)"),
        ({"X": np.zeros(4), "lengths": [2, 3]}, "lengths add up to 5"),
        ({"X": np.zeros(4), "lengths": [2.0, 2.0]}, "lengths, float64, are expected whole numbers"),
        ({"X": np.zeros(4), "lengths": [6, -2]}, "expected whole numbers of at least 1"),
        ({"X": np.zeros((2, 3)), "y": [1]}, "y has 1 labels for 2 signals"),
        ({"X": np.array([None])}, "cannot be read: it holds Python objects"),  # a pickle is not opened
        ({"X": np.array([["a"]])}, "X holds <U1, expected numbers"),
        ({"X": np.array([[0, 0], [0, np.inf]])}, r"\.npz: signal 1 is infinite at sample 1"),
    ]
    for i, (arrays, message) in enumerate(bad):
        np.savez(tmp_path / f"{i}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_signals(tmp_path / f"{i}.npz")
    with pytest.raises(ValueError, match=r"cannot be read: it is no \.npz archive"):
        read_signals(write(tmp_path, "text.npz", "no archive"))


def test_csv(tmp_path: Path) -> None:
    wide = "label,t0,t1,t2\na,1,2,3\nb,4,,6\n\na,7,8,\n"
    same(read_signals(write(tmp_path, "w.csv", wide)), [[[1], [2], [3]], [[4], [np.nan], [6]], [[7], [8]]], [*"aba"])
    long = "series,time,label,x,y\ns,2,a,3,4\ns,1,a,1,\nr,1,b,5,6\n"
    got = read_signals(write(tmp_path, "l.csv", long))
    same(got, [[[1, np.nan], [3, 4]], [[5, 6]]], ["a", "b"])
    assert got.names == ["s", "r"]
    same(read_signals(write(tmp_path, "p.csv", "series,x\n1,2\n1,3\n")), [[[2], [3]]], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("1,2\n3,4\n", "has numbers in its first line"),
        ("a,a\n1,2\n", "names a column twice"),
        ("a,b\n1,2,3\n", r"c\.csv:2 has 3 cells, the header names 2"),
        ("a,b\n1,x\n", r"c\.csv:2, column b: 'x' is no number\. No column is called `label`"),
        ("a,b\n1,NA\n", r"'NA' is no number\. A missing value is an empty cell"),
        ("label,b\n1,-Inf\n", r"c\.csv:2, column b: '-Inf' is infinite"),
        ("a;b\n1;2\n", "separated by semicolons, expected commas"),
        ("time,b\n1,2\n", "has a column `time` and no column `series`"),
        ("a\0,b\n1,2\n", "no CSV in UTF-8. It holds no text at all"),
        ("label,b\na,\n", r"c\.csv:2 has no sample"),
        ("series,label\n1,2\n", "has no column beside series, label"),
        ("series,label,x\n1,a,2\n1,b,2\n", "series 1 is labelled 'b' here and 'a' before"),
        ("a,b\n", "holds no signals"),
    ],
)
def test_damaged_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_signals(write(tmp_path, "c.csv", text))


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("label,b\na,1\n", encoding="utf-16")
    with pytest.raises(
        ValueError, match=r"w\.csv is no CSV in UTF-8\. Convert it: iconv -f UTF-16 -t UTF-8 w\.csv > new\.csv"
    ):
        read_signals(tmp_path / "w.csv")


def test_folders_of_sound(tmp_path: Path) -> None:
    tone = np.sin(np.arange(400) / 10)
    forms: dict[str, Callable[[Any], Any]] = {
        "int16": lambda x: (x * 32767).astype(np.int16),
        "uint8": lambda x: (x * 127 + 128).astype(np.uint8),
        "float": lambda x: np.stack([x, x], 1).astype(np.float32)[:, :1],
    }
    for name, form in forms.items():
        (tmp_path / name).mkdir()
        wavfile.write(tmp_path / name / "1.wav", 8000, form(tone))
    got = read_signals(tmp_path)
    assert got.y is not None
    assert got.y.tolist() == sorted(forms)
    assert got.rate == 8000
    for x in got.X:
        np.testing.assert_allclose(x[:, 0], tone, atol=2e-2)  # of eight bits
    assert [len(x) for x in read_signals(tmp_path, rate=4000).X] == [200] * 3
    np.testing.assert_allclose(read_signals(tmp_path, rate=4000).X[1][20:180, 0], tone[::2][20:180], atol=2e-2)
    assert read_signals(tmp_path / "int16").y is None
    (tmp_path / "float" / "1.wav").rename(tmp_path / "float" / "1.WAV")  # as many recorders name them
    assert read_signals(tmp_path).y.tolist() == sorted(forms)  # type: ignore[union-attr]  # labels are there
    wavfile.write(tmp_path / "int16" / "2.wav", 16000, forms["int16"](tone))
    with pytest.raises(ValueError, match=r"has sound at 8000, 16000 samples a second\. Name one"):
        read_signals(tmp_path)
    assert len(read_signals(tmp_path, rate=8000).X) == 4
    wavfile.write(tmp_path / "int16" / "2.wav", 8000, np.stack([forms["int16"](tone)] * 2, 1))
    with pytest.raises(ValueError, match=r"2\.wav has 2 channels, .*1\.WAV has 1\. Convert them"):
        read_signals(tmp_path)
    write(tmp_path / "int16", "3.wav", "no sound at all")
    with pytest.raises(ValueError, match=r"3\.wav cannot be read"):
        read_signals(tmp_path, rate=8000)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_signals(tmp_path / "nothing.ts")
    with pytest.raises(ValueError, match=r"is no \.ts, \.npz, \.csv or \.wav file"):
        read_signals(write(tmp_path, "a.txt", ""))
    with pytest.raises(ValueError, match=r"holds no \.wav files"):
        read_signals(tmp_path)
    with pytest.raises(ValueError, match="is no sound"):
        read_signals(write(tmp_path, "a.ts", TS), rate=8000)


# ---- what is said of answers -----------------------------------------------------------------------------------------


def test_tables_and_picture(tmp_path: Path) -> None:
    y, predicted = np.array([*"aaab"]), np.array([*"aabc"])
    classes, counts = confusion(y, predicted)
    assert classes == [*"abc"]
    assert counts.tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 0]]
    table = class_table(y, predicted).splitlines()
    assert table[1].split() == ["a", "3", "66.7%", "b", "(1)"]
    assert table[2].split() == ["b", "1", "0.0%", "c", "(1)"]
    assert table[3].split() == ["all", "4", "50.0%", "balanced", "33.3%"]
    numbers = error_table(np.array([1.0, 2, 3]), np.array([1.0, 2, 5])).splitlines()[1].split()
    assert numbers == ["0", "3", "1.155", "0.6667", "-1.000"]
    pytest.importorskip("matplotlib", reason="the picture needs the extra plot")
    plot_confusion(y, predicted, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
