"""What every test shares: one thread, and no leftovers of earlier tests in the random state."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and processes that tests start: threads that outnumber processors spin

# A script's background jobs inherit an ignored Ctrl-C; tests, and the processes they start, do interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty comes back full of NaN, so that reading unset memory shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
