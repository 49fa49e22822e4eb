"""GPU kernels on a machine without a GPU: tests/gpu at small sizes, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "gpu"
#: What takes seconds and not minutes there, and yet passes through every kernel.
QUICK = (
    "test_lengths or test_states and (True-3 or False-16 or -0) or test_segments and True-True-packed"
    " or test_step and float32"
)
SSD = "test_step or test_sizes or test_each or gated or (test_grid and packed)"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install --no-deps triton==3.6.0"
)


@needs_triton
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_gpu_ops.py", ""),
        ("test_sampling_gpu.py", ""),
        ("test_scan_triton.py", QUICK),
        ("test_ssd_gpu.py", SSD),
        ("test_s4_kernel_gpu.py", ""),
        pytest.param("test_scan_triton.py", "", marks=pytest.mark.full),
        pytest.param("test_ssd_gpu.py", "", marks=pytest.mark.full),
    ],
    ids=["ops", "sampling", "scan", "ssd", "s4", "all of the scan", "all of ssd"],
)
def test_kernels_compute_the_same_under_the_interpreter(file: str, chosen: str) -> None:
    """In a process of its own: Triton reads the switch when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-k", chosen, str(TESTS / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
