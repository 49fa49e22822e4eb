"""`stateline classify`: train, predict and stream, as typed."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stateline import SequenceClassifier
from stateline.cli import main

FAST = ["--width", "8", "--layers", "1", "--epochs", "12", "--learning-rate", "0.02", "--quiet"]


def wave(n: int, slow: bool) -> Any:
    noise = np.random.default_rng(n).normal(0, 0.1, n)
    return (np.sin(np.arange(n) * (0.2 if slow else 0.7)) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty signals with names of classes, and a model of them."""
    folder = tmp_path_factory.mktemp("classify")
    X = [wave(20 + i, i % 2 == 0) for i in range(40)]
    y = ["slow", "fast"] * 20
    np.savez(folder / "waves.npz", X=np.concatenate(X), lengths=[len(x) for x in X], y=y)
    np.savez(folder / "numbers.npz", X=np.concatenate(X), lengths=[len(x) for x in X], y=np.arange(40) / 7)
    np.savez(folder / "bare.npz", X=np.concatenate(X[:2]), lengths=[20, 21])
    assert main(["classify", "train", str(folder / "waves.npz"), "--out", str(folder / "model"), *FAST]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    code = main(["classify", *map(str, arguments)])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out, out.err


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["classify", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_train_keeps_a_fifth_and_reports_on_it(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "train", home / "waves.npz", "--out", tmp_path / "m", *FAST)
    assert "32 signals of 20 to" in out
    assert "8 more for the test" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["fast", "4", "100.0%", "-"] in lines
    assert ["all", "8", "100.0%", "balanced", "100.0%"] in lines
    given, _ = run(capsys, "train", home / "waves.npz", "--test", home / "waves.npz", "--out", tmp_path / "n", *FAST)
    assert "40 signals" in given
    assert "40 more for the test" in given
    none, _ = run(capsys, "train", home / "waves.npz", "--test-share", 0, "--out", tmp_path / "o", *FAST)
    assert "class" not in none.splitlines()[3:4]
    assert "0 more for the test" in none


def test_train_overwrites_if_asked(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = ("train", home / "waves.npz", "--out", tmp_path, "--overwrite", *FAST)
    run(capsys, *given)
    out, _ = run(capsys, *given)
    assert "samples, 1 channel;" in out
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_predict_answers_as_the_estimator(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "predict", home / "model", home / "waves.npz", "--probabilities")
    rows = list(csv.DictReader(io.StringIO(out)))
    model = SequenceClassifier.load(home / "model")
    with np.load(home / "waves.npz") as file:
        X = np.split(file["X"], np.cumsum(file["lengths"])[:-1])
    assert [row["predicted"] for row in rows] == model.predict(X).tolist()
    assert [float(row["fast"]) for row in rows] == pytest.approx(model.predict_proba(X)[:, 0], rel=1e-4)
    assert "all" in err
    out, err = run(capsys, "predict", home / "model", home / "bare.npz")
    assert out.splitlines() == ["signal,predicted", "0,slow", "1,fast"]
    assert err == ""


def test_stream_reads_stdin(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = io.StringIO("# volts\n1\n2\n")
    monkeypatch.setattr("sys.stdin", given)
    out, _ = run(capsys, "stream", home / "model")
    assert [line.split(",")[0] for line in out.splitlines()] == ["samples", "1", "2"]
    assert not given.closed
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n?\n"))
    assert "X has missing values" in complaint(capsys, "stream", home / "model")


def test_stream_of_a_file_is_the_prefixs_answer(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = wave(24, False)
    (tmp_path / "one.txt").write_text("\n".join(map(repr, x.tolist())) + "\n\n" + "0.5\n0.25\n")
    out, _ = run(capsys, "stream", home / "model", tmp_path / "one.txt", "--every", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row["samples"]) for row in rows] == [*range(2, 25, 2), 2]
    model = SequenceClassifier.load(home / "model")
    want = model.predict_proba([x])[0]
    assert [float(rows[11]["fast"]), float(rows[11]["slow"])] == pytest.approx(want, abs=1e-5)
    assert float(rows[12]["fast"]) == pytest.approx(model.predict_proba([[0.5, 0.25]])[0, 0], abs=1e-5)


def test_stream_of_a_csv_with_a_header(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.csv"
    file.write_text("# volts\nx\n1\n2\n3\n\n4\n")
    out, _ = run(capsys, "stream", home / "model", file, "--every", 2)
    assert [line.split(",")[0] for line in out.splitlines()] == ["samples", "2", "3", "1"]
    file.write_text("series,label,x\n1,a,2\n")
    assert "names a column series" in complaint(capsys, "stream", home / "model", file)
    file.write_text("1,\n")
    assert "line 1: update: " in (said := complaint(capsys, "stream", home / "model", file))
    assert "2 channels" in said
    file.write_text("x\ny\n")
    assert "line 2 is no sample" in complaint(capsys, "stream", home / "model", file)


def test_regression(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "train", home / "numbers.npz", "--regress", "--out", tmp_path / "r", *FAST)
    assert "rms error" in out
    out, err = run(capsys, "predict", tmp_path / "r", home / "numbers.npz")
    assert out.splitlines()[0] == "signal,label,predicted"
    assert "rms error" in err
    (tmp_path / "one.txt").write_text("1\n2\n")
    out, _ = run(capsys, "stream", tmp_path / "r", tmp_path / "one.txt")
    assert len(out.splitlines()) == 3
    assert "asks for classes" in complaint(capsys, "predict", tmp_path / "r", home / "bare.npz", "--probabilities")


def test_complaints_are_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x"
    assert "no action given" in complaint(capsys)
    assert "bare.npz has no labels" in complaint(capsys, "train", home / "bare.npz", "--out", out)
    assert "--regress estimates numbers" in complaint(capsys, "train", home / "numbers.npz", "--out", out)
    assert "is no number" in complaint(capsys, "train", home / "waves.npz", "--out", out, "--regress")
    assert "--test-share is 1.5" in complaint(capsys, "train", home / "waves.npz", "--out", out, "--test-share", 1.5)
    assert "No such file" in complaint(capsys, "train", home / "nothing.npz", "--out", out)
    assert "--label-smoothing is about classes" in complaint(
        capsys, "train", home / "numbers.npz", "--out", out, "--regress", "--label-smoothing", 0.1
    )
    assert "crop is 1.5" in complaint(capsys, "train", home / "waves.npz", "--out", out, "--crop", 1.5)
    assert "mixer is 'x'" in complaint(capsys, "train", home / "waves.npz", "--out", out, "--mixer", "x")
    foreign = _language_model(tmp_path)
    assert "x is no directory; DIR is what" in complaint(capsys, "predict", out, home / "bare.npz")
    assert "holds no model of signals: what stateline classify train --out wrote" in complaint(capsys, "stream", home)
    assert main(["info", str(home / "model")]) == 2
    assert "Ask it with stateline classify predict" in capsys.readouterr().err
    few = tmp_path / "few.csv"
    few.write_text("label,t0\n0.5,1\n0.7,2\n0.9,3\n0.9,4\n")
    assert "--regress estimates numbers" in complaint(capsys, "train", few, "--out", out)
    few.write_text("label,t0\na,1\na,2\n")
    assert "one class, 'a'" in complaint(capsys, "train", few, "--out", out, "--test-share", 0)
    assert "of 2 signals is none; --test-share 0.5" in complaint(capsys, "train", few, "--out", out)
    assert "stateline.load reads others" in complaint(capsys, "predict", foreign, home / "bare.npz")
    (tmp_path / "bad.txt").write_text("1\nx\n")
    assert "line 2 is no sample" in complaint(capsys, "stream", home / "model", tmp_path / "bad.txt")
    (tmp_path / "bare.csv").write_text("class,t0\n0,1\n")
    assert "no column `label`; its first line names class, t0" in complaint(
        capsys, "train", tmp_path / "bare.csv", "--out", out
    )
    for y, message in (
        (np.zeros((4, 2)), "has labels y (4, 2)"),
        (np.array(["a", "", "b", "b"]), "no label for signal 1"),
    ):
        np.savez(tmp_path / "y.npz", X=np.zeros((4, 9)), y=y)
        assert message in complaint(capsys, "train", tmp_path / "y.npz", "--out", out)
    assert not out.exists()


def test_what_would_fail_after_training_fails_before(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceClassifier, "fit", lambda *_: pytest.fail("it trained"))
    foreign, file = _language_model(tmp_path), tmp_path / "file"
    file.write_text("")
    assert "holds a model of another kind" in complaint(capsys, "train", home / "waves.npz", "--out", foreign)
    assert "is a file, expected a directory" in complaint(capsys, "train", home / "waves.npz", "--out", file)
    assert "holds a model. Choose another directory, or --overwrite" in complaint(
        capsys, "train", home / "waves.npz", "--out", home / "model"
    )
    assert "holds other files" in complaint(capsys, "train", home / "waves.npz", "--out", home)
    foreign_too = ("train", home / "waves.npz", "--out", foreign, "--overwrite")
    assert "holds a model of another kind" in complaint(capsys, *foreign_too)
    assert "proc/self/x" in complaint(capsys, "train", home / "waves.npz", "--out", "/proc/self/x")
    assert "file/x: Not a directory" in complaint(capsys, "train", home / "waves.npz", "--out", file / "x")
    np.savez(tmp_path / "gaps.npz", X=np.full((4, 9), np.nan), y=[*"abab"])
    got = complaint(capsys, "train", home / "waves.npz", "--out", tmp_path / "o", "--test", tmp_path / "gaps.npz")
    assert "gaps.npz has missing values for the test" in got
    got = complaint(capsys, "train", home / "waves.npz", "--out", tmp_path / "o", "--test", tmp_path)
    assert "is sound, and" in got
    np.savez(tmp_path / "two.npz", X=np.zeros((4, 9, 5)), y=[*"abab"])
    got = complaint(capsys, "train", home / "waves.npz", "--out", tmp_path / "o", "--test", tmp_path / "two.npz")
    assert "two.npz has 5 channels" in got


def _language_model(tmp_path: Path) -> Path:
    import stateline
    from stateline.models import LanguageModel, ModelConfig

    stateline.save(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=16)), tmp_path / "l")
    return tmp_path / "l"


def test_a_model_of_sound_answers_about_numbers_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = SequenceClassifier.load(home / "model")
    model.metadata_ = {"rate": 8000}
    model.save(tmp_path / "sound")
    out, err = run(capsys, "predict", tmp_path / "sound", home / "bare.npz")
    assert len(out.splitlines()) == 3
    assert "taken for sound of 8000 samples a second" in err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGTERM to catch")
def test_sigterm_keeps_what_was_learnt(home: Path, tmp_path: Path) -> None:
    given = ["train", str(home / "waves.npz"), "--out", str(tmp_path / "m"), "--width", "8", "--layers", "1"]
    command = [sys.executable, "-u", "-m", "stateline", "classify", *given, "--epochs", "100000"]
    command += ["--early-stopping", "off"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    while "epoch" not in seen and process.poll() is None:  # one is done
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Stopping after this step" in err
    assert "saved in" in out
    assert len(SequenceClassifier.load(tmp_path / "m").predict([wave(30, True)])) == 1
