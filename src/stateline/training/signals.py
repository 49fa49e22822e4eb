"""Ctrl-C and SIGTERM: finish the step, save, then leave. A second one leaves at once."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal and saved; its text says how to go on. Exit with `exit_code`."""

    exit_code = 130  # what shells give a program that Ctrl-C ended

    def __init__(self, message: str, directory: Path) -> None:
        super().__init__(message)
        self.directory = directory


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets `received`; the second raises KeyboardInterrupt.

    Outside the main thread Python allows no signal handlers: there it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
        if self.received:
            raise KeyboardInterrupt("stopped at once, without saving")
        self.received = signal.Signals(number).name
        print("\nStopping after this step, then saving. Again to stop at once.", file=sys.stderr, flush=True)
