"""GPU kernels on a machine without a GPU: tests/gpu at small sizes, under Triton's interpreter."""

from __future__ import annotations

import os
import shutil
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
FILES = {
    "gpu_ops": "test_norm or test_cross_entropy or test_steps or test_a_row or test_convolution and float32 or whole",
    "gated_scan_gpu": "",
    "linear_scan_gpu": "test_step and True-True or test_a_row or (test_grid and packed)",
    "s4_kernel_gpu": "test_kernels and 70 or test_cauchy and 16 or test_float64",
    "parts_gpu": "False-None-Mamba3",
    "s4_scan_gpu": "test_step or test_a_row or zoh or (test_grid and packed and float32)",
    "sampling_gpu": "",
    "scan_triton": QUICK,
    "ssd_gpu": "test_step or test_each or gated or (test_grid and packed)",
    "trapezoid_ssd_gpu": "test_step or refused or (test_grid and packed or test_controls) and float32",
}
#: Of the Kalman filter's kernels, which are CUDA C++.
KALMAN = (
    "test_gradients and float64 or test_steps and float32 or test_runs and float32 or test_the_first or test_keep"
    " or test_shared or test_what or test_states or common and (300 and float64 or once or settle)"
)
#: Of those in which several lanes share a series.
WIDE = (
    "test_lanes and 9-2 or test_values and (3-4-5-3 or 5-3-2-9 or 3-2-9-2) or test_batch or test_the_first"
    " or test_steps or test_every or test_singular or test_each"
)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install --no-deps triton==3.6.0"
)
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler to stand in for NVRTC"
)


def interpreted(chosen: str, *files: str) -> None:
    """Run tests of tests/gpu in a process of their own: Triton reads the switch when it is imported."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-k",
            chosen,
            *(str(TESTS / f"test_{name}.py") for name in files),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


@needs_triton
def test_kernels_compute_the_same_under_the_interpreter() -> None:
    """All files at once: starting a process takes as long as the kernels of a file."""
    interpreted(" or ".join(f"test_{name}.py and ({chosen or name})" for name, chosen in FILES.items()), *FILES)


@needs_triton
@needs_compiler
@pytest.mark.parametrize("chosen", [KALMAN, pytest.param("", marks=pytest.mark.full)], ids=["quick", "all"])
def test_cuda_kernels_compute_the_same_on_the_cpu(chosen: str) -> None:
    interpreted(chosen, "kalman_gpu")


@needs_triton
@needs_compiler
@pytest.mark.parametrize("chosen", [WIDE, pytest.param("", marks=pytest.mark.full)], ids=["quick", "all"])
def test_cuda_kernels_of_several_lanes_a_series_do_too(chosen: str) -> None:
    interpreted(chosen, "kalman_wide_gpu")


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, chosen in FILES.items() if chosen])
def test_all_of_a_file_under_the_interpreter(name: str) -> None:
    interpreted("", name)
