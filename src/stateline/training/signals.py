"""Ctrl-C, SIGTERM and a lost terminal: finish the step, save, then leave. A second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

#: What ends a run; Windows has no SIGHUP.
NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal and saved; its text says how to go on. Exit with `exit_code`."""

    exit_code = 130  # what shells give a program that Ctrl-C ended

    def __init__(self, message: str, directory: Path) -> None:
        super().__init__(message)
        self.directory = directory


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `received`; a second SIGINT or SIGTERM raises
    KeyboardInterrupt. A second SIGHUP does not: a terminal that goes away may well send two.

    Signals that are ignored, as SIGHUP is under nohup, stay so. Outside the main thread Python allows no signal
    handlers: there it does nothing.

    said: what a first signal is answered with, on stderr.
    """

    def __init__(self, said: str = "Stopping after this step, then saving. Again to stop at once.") -> None:
        self._said = said
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is signal.SIG_IGN:  # nohup, or a script's background job: meant to go on
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received and name == "SIGHUP":
            return
        if self.received:
            raise KeyboardInterrupt("stopped at once, without saving")
        self.received = name
        try:
            print(f"\n{self._said}", file=sys.stderr, flush=True)
        except OSError:  # the terminal is gone: nothing more can be said, but saving must not fail for that
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
