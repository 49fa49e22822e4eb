"""`generate --save-stream` and `--load-stream`: what is stopped one day goes on the next, whatever the flags."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import Scripted

import stateline
from stateline.cli import main
from stateline.generation import SamplingConfig, Stream
from stateline.models import LanguageModel, ModelConfig

COMMAND = [sys.executable, "-m", "stateline", "generate"]
SAMPLED = ("--temperature", "0.9", "--top-p", "0.95", "--repetition-penalty", "1.2", "--seed", "4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("cli") / "model"
    stateline.save(LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256)), path)
    return path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `generate` with a small model, which must succeed, and return what it printed."""

    def call(*arguments: Any) -> str:
        code = main(["generate", "--model", str(home), *map(str, arguments)])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return call


def test_two_days_are_one_run(run: Callable[..., str], tmp_path: Path) -> None:
    """The same flags on both days: they name the sampling that the stream has anyway."""
    path = tmp_path / "stream"
    whole = run("x", *SAMPLED, "--max-tokens", 60)
    days = [run("x", *SAMPLED, "--max-tokens", 20, "--save-stream", path)]
    days.append(run(*SAMPLED, "--max-tokens", 15, "--load-stream", path, "--save-stream", path))
    days.append(run("--max-tokens", 25, "--load-stream", path))
    assert "".join(days).replace("\ufffd", "") == whole.replace("\ufffd", "")  # one may be cut at the very end
    assert run("--max-tokens", 25, "--load-stream", path) == days[-1]  # loading changes no file


def test_a_prompt_is_a_continuation(run: Callable[..., str], home: Path, tmp_path: Path) -> None:
    path, more = tmp_path / "stream", tmp_path / "more"
    more.write_text(" and on")
    assert run("A book", "--max-tokens", 0, "--seed", 1, "--save-stream", path) == ""
    model = stateline.load(home)
    stream = Stream(model, sampling=SamplingConfig(temperature=0.8, seed=1))
    stream.feed("A book")
    stream.feed(" and on")
    expected = "".join(stream.text(20, final=True))
    assert run(" and on", "--load-stream", path, "--max-tokens", 20) == expected + "\n"
    assert run("--prompt-file", more, "--load-stream", path, "--max-tokens", 20) == expected + "\n"
    assert run(" and on", "--load-stream", path, "--max-tokens", 20, "--echo") == f" and on{expected}\n"


def test_characters_and_stops_cut_in_two_wait(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stateline.interop.load", lambda *_, **__: Scripted("a😀b stop".encode()))
    path = tmp_path / "stream"
    assert run("x", "--max-tokens", 3, "--save-stream", path) == "a"
    assert run("--max-tokens", 3, "--load-stream", path, "--save-stream", path) == "😀b"
    assert run("--max-tokens", 9, "--load-stream", path, "--stop", "stop") == " \n"


def test_stats_count_the_day(run: Callable[..., str], home: Path, tmp_path: Path, capsys: Any) -> None:
    path = str(tmp_path / "stream")
    run("123", "--save-stream", path, "--max-tokens", 5)
    assert main(["generate", "4567", "--model", str(home), "--load-stream", path, "--max-tokens", "7", "--stats"]) == 0
    err = capsys.readouterr().err
    assert "prompt 4 tokens" in err
    assert "generated 7 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load-stream", "STREAM", "--seed", "5"], "was begun with seed 1, not 5; it keeps its sampling"),
        (["--load-stream", "STREAM", "--greedy"], "was begun with temperature 0.8, not 0.0"),
        (["--load-stream", "STREAM", "--top-k", "5"], "was begun with top-k 0, not 5"),
        (["--load-stream", "STREAM", "--top-p", "7"], "top_p is 7.0"),
        (["--load-stream", "STREAM", "--dtype", "bfloat16"], "was made in float32"),
        (["--load-stream", "absent"], "absent: No such file"),
        (["--load-stream", "notes"], "notes cannot be read"),
        (["--load-stream", "STREAM", "--model", "bundled"], "was made by another model"),
        (["--batch", "a", "--load-stream", "STREAM"], "--load-stream goes with one prompt, not with --batch"),
        (["--batch", "a", "--save-stream", "new"], "--save-stream goes with one prompt, not with --batch"),
        (["--save-stream", "no/such/folder"], "there is no directory"),
        (["--save-stream", "notes"], "notes exists and is no saved stream; it is not replaced"),
        (["--save-stream", "."], "exists and is no saved stream"),
        (["--save-every", "5"], "--save-every goes with --save-stream FILE"),
        (["--save-stream", "new", "--save-every", "-1"], "-1 is not a number of minutes from 0"),
    ],
)
def test_complaints_come_before_any_text(
    run: Callable[..., str],
    home: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run("x", "--seed", 1, "--max-tokens", 3, "--save-stream", "STREAM")
    (tmp_path / "notes").write_text("precious")
    assert main(["generate", "--model", str(home), *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("stateline: error: ")
    assert message in out.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["STREAM", "notes"]
    assert (tmp_path / "notes").read_text() == "precious"


def start(home: Path, *arguments: Any) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "--model", str(home), *map(str, arguments)]
    pipe = subprocess.PIPE  # unbuffered, for communicate() does not see what an earlier read has buffered
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    assert process.stdout is not None
    return process


def test_ctrl_c_saves_and_the_next_day_goes_on(run: Callable[..., str], home: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with start(home, "x", *SAMPLED, "--endless", "--save-stream", path) as process:
        first = process.stdout.read(9)  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with --load-stream {path}".encode() in errors
    assert b"Traceback" not in errors
    day = (first + rest).decode()
    after = run("--max-tokens", 40, "--load-stream", path)
    stream = Stream(stateline.load(home), sampling=SamplingConfig(0.9, top_p=0.95, repetition_penalty=1.2, seed=4))
    stream.feed("x")
    whole = ""
    for piece in stream.text(None):
        whole += piece
        if len(whole) > len(day) + len(after):
            break
    assert whole.startswith(day + after.rstrip("\n").rstrip("\ufffd"))


def test_a_reader_that_leaves_still_saves(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with start(home, "x", "--endless", "--save-stream", path) as process:
        process.stdout.read(9)  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(timeout=60) == 141
    assert Stream.load(path, stateline.load(home)).length > 1


IN_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this process's own terminal, whose loss it is told of
from stateline.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_terminal_that_goes_away_saves(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", IN_A_TERMINAL, "generate", "x", "--model", str(home), "--endless"]
    with subprocess.Popen(
        [*words, "--save-stream", str(path)], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        assert os.read(ours, 9)
        os.close(ours)
        assert process.wait(timeout=60) in (2, 130)  # as the write or the signal comes first
    assert Stream.load(path, stateline.load(home)).length > 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk without room")
def test_a_full_disk_saves(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    command = [*COMMAND, "x", "--model", str(home), "--endless", "--save-stream", str(path)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    problem = "the text cannot be written (No space left on device)"
    assert ended.stderr == f"stateline: error: {problem}; go on with --load-stream {path}\n"
    assert ended.returncode == 2
    assert Stream.load(path, stateline.load(home)).length > 1


def test_a_kill_costs_no_more_than_the_time_between_saves(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with start(home, "x", *SAMPLED, "--endless", "--save-stream", path, "--save-every", 0.001) as process:
        until = time.monotonic() + 60
        while not path.exists() and time.monotonic() < until:
            process.stdout.read(9)  # type: ignore[union-attr]
        process.kill()
    assert Stream.load(path, stateline.load(home)).length > 1


@pytest.mark.parametrize(("minutes", "saves"), [(None, 2), (0, 1), (10, 2), (31, 1)])
def test_when_a_stream_is_saved(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, saves: int
) -> None:
    """A text that takes half an hour, on a clock that ticks once, and whose first save finds no room."""
    times, made = iter([0.0, 1800.0]), []

    def save(stream: Stream, path: Path) -> None:
        made.append(stream.length)
        if len(made) < saves:
            raise OSError("no room.")

    monkeypatch.setattr("stateline.cli.generate.time.monotonic", lambda: next(times, 1800.0))
    monkeypatch.setattr(Stream, "save", save)
    monkeypatch.setattr("stateline.cli._warn", lambda message, *_, **__: made.append(str(message)))
    every = () if minutes is None else ("--save-every", minutes)
    run("x", "--max-tokens", 40, "--save-stream", tmp_path / "stream", *every)
    failed = [made[0], "no room. The text goes on, unsaved until the next try."]
    assert made == [*(failed if saves == 2 else []), 41]


def test_a_stop_inside_the_prompt_says_what_was_read(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, feed = tmp_path / "stream", Stream.feed_pieces

    def feed_then_stop(stream: Stream, lists: Any) -> None:
        feed(stream, lists)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stream, "feed_pieces", feed_then_stop)
    code = main(["generate", "y" * 5000, "--model", str(home), "--save-stream", str(path)])
    out = capsys.readouterr()
    assert (code, out.out) == (130, "")
    assert "stopped after 2,048 tokens of the prompt, the rest is yours to give; go on with --load-stream" in out.err
    assert Stream.load(path, stateline.load(home)).length == 2048
