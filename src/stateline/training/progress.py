"""What a run tells: a bar or lines on the terminal, and metrics.jsonl for machines."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stateline.checks import fail
from stateline.training.board import Board

#: Seconds between lines where there is no bar.
LINE_SECONDS = 5.0
#: Weight of the past in the running loss and speed that are shown.
SMOOTH = 0.9


@dataclass
class Meter:
    """Running figures of the terminal line; none of them touches training."""

    bits: float | None = None
    val: float | None = None
    speed: float | None = None

    def update(self, bits: float, speed: float) -> None:
        """Take in one step: its bits per byte and its tokens per second."""
        self.bits = bits if self.bits is None else SMOOTH * self.bits + (1 - SMOOTH) * bits
        self.speed = speed if self.speed is None else SMOOTH * self.speed + (1 - SMOOTH) * speed


class _Terminal:
    """A bar that is closed at the end, or lines some seconds apart, on stderr."""

    def __init__(self, mode: str) -> None:
        self.mode = _resolve(mode)
        self._last_line = -LINE_SECONDS
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, line: str, last: bool) -> None:
        now = time.perf_counter()
        if last or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(line, file=sys.stderr, flush=True)


class Reporter(_Terminal):
    """Terminal output on stderr: `mode` is bar, lines, off, or auto (bar on a terminal with tqdm, lines elsewhere)."""

    def __init__(self, mode: str, start: float = 0.0) -> None:
        super().__init__(mode)
        self._begun = time.perf_counter()
        self._first: tuple[float, float] | None = None  # time and share of the first step, which is slower than others
        if self.mode == "bar":
            from tqdm import tqdm

            layout = "{percentage:3.0f}% {bar:24} {desc}"
            self._bar = tqdm(total=1.0, initial=start, bar_format=layout, file=sys.stderr, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.mode == "bar":
            self._bar.write(text, file=sys.stderr)
        elif self.mode == "lines":
            print(text, file=sys.stderr, flush=True)

    def show(self, meter: Meter, step: str, share: float, *, last: bool = False) -> None:
        """Refresh the bar, or print a line if the last one is some seconds old."""
        if self.mode == "off":
            return
        line = " · ".join([step, *_figures(meter), self._left(share)])
        if self.mode == "bar":
            self._bar.set_description_str(line, refresh=False)
            self._bar.n = share
            if last:
                self._bar.refresh()
            else:
                self._bar.update(0)
            return
        self._print(line, last)

    def _left(self, share: float) -> str:
        now = time.perf_counter()
        self._first = self._first or (now, share)
        if share >= 1:
            return f"took {clock(now - self._begun)}"
        spent, gained = now - self._first[0], share - self._first[1]
        return f"{clock(spent * (1 - share) / gained)} left" if gained > 0 else "… left"


class EpochReporter(_Terminal):
    """Figures of epochs on stderr: a bar on a terminal with tqdm, lines elsewhere; nothing where `verbose` is 0."""

    def __init__(self, verbose: int) -> None:
        super().__init__("auto" if verbose else "off")

    def __call__(self, figures: dict[str, float], epochs: int) -> None:
        """Show an epoch's figures; `epochs` are planned."""
        if self.mode == "off":
            return
        shown = {k: v for k, v in figures.items() if k not in ("epoch", "seconds")}
        line = " · ".join(f"{name.replace('_', '-')} {value:.4f}" for name, value in shown.items())
        if self.mode == "bar":
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=epochs, unit="epoch", file=sys.stderr, dynamic_ncols=True)
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(1)
            return
        self._print(f"epoch {figures['epoch']:.0f} of {epochs} · {line}", figures["epoch"] == epochs)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended; after a resume it never holds a step twice.

    board: a folder to keep the same figures in for TensorBoard, or None. Call `rewind` first.
    """

    def __init__(self, path: Path, board: Path | None = None) -> None:
        self.path = path
        self._folder = board
        self._board: Board | None = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, **record: Any) -> None:
        """Append one record. Numbers are rounded to 6 significant digits."""
        tidy = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(tidy, ensure_ascii=False) + "\n")
        if self._board is not None:
            self._board.write(tidy)

    def rewind(self, step: int) -> None:
        """Drop records after `step`, and a line that a crash cut short; then TensorBoard's are made again."""
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("step", 0) <= step:
                kept.append(line + "\n")
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
        if self._folder is not None:
            self._board = Board(self._folder, self.path)


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:04:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def quantity(value: float) -> str:
    """A count in three digits: 950, 3.1k, 12.4M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _figures(meter: Meter) -> list[str]:
    figures = []
    if meter.bits is not None:
        val = "" if meter.val is None else f", val {meter.val:.3f}"
        figures.append(f"{meter.bits:.3f}{val} bits/byte")
    if meter.speed is not None:
        figures.append(f"{quantity(meter.speed)} tok/s")
    return figures


def _resolve(mode: str) -> str:
    if mode not in ("auto", "bar"):
        return mode
    try:
        import tqdm  # noqa: F401  # only asked whether it is there
    except ImportError as error:
        if mode == "bar":
            remedy = "Install it (pip install 'stateline[train]') or take progress='lines'."
            raise fail("train", "progress='bar' needs tqdm, which is not installed.", remedy) from error
        return "lines"
    return "bar" if mode == "bar" or sys.stderr.isatty() else "lines"
