"""GPU kernels on a machine without a GPU: tests/gpu at small sizes, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "gpu"
TESTS = [str(FOLDER / name) for name in ("test_gpu_ops.py", "test_sampling_gpu.py")]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install --no-deps triton==3.6.0")
def test_kernels_compute_the_same_under_the_interpreter() -> None:
    """In a process of its own: Triton reads the switch when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", *TESTS],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
