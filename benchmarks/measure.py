"""Timing that compares: candidates take turns in one process, and every row says where it comes from."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stateline import backends

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 2.0  # spent on each candidate of a case, warm-up aside
FEWEST, MOST = 3, 200  # turns
PEERS = ("transformers", "mambapy", "llama-cpp-python")

Work = Callable[[], object]


def interleave(work: Mapping[str, Work], seconds: float = SECONDS) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate (median, least, turns); they take turns, so a busy machine treats all alike."""
    slowest = 0.0
    for run in work.values():
        run()  # the first call allocates, chooses kernels, fills caches
        began = time.perf_counter()
        run()
        slowest = max(slowest, time.perf_counter() - began)
    turns = int(min(MOST, max(FEWEST, seconds / slowest)))
    times: dict[str, list[float]] = {name: [] for name in work}
    gc.disable()
    try:
        for _ in range(turns):
            for name, run in work.items():
                began = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - began))
    finally:
        gc.enable()
    return {
        name: {"ms_p50": round(statistics.median(t), 4), "ms_min": round(min(t), 4), "turns": turns}
        for name, t in times.items()
    }


def provenance() -> dict[str, Any]:
    """Machine, versions and commit: what a figure means nothing without."""
    return {
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # before we start: others' work
        "machine": _processor(),
        "isa": _isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "stateline": _version("stateline"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "peers": {name: found for name in PEERS if (found := _version(name))},
    }


def resident_mb() -> float:
    """Memory this process holds, in MB."""
    try:
        import psutil
    except ImportError as error:
        raise SystemExit("benchmarks: psutil is missing; pip install 'stateline[bench]'") from error
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _isa() -> str:
    """The instruction set that the CPU library chose."""
    if backends.native_problem() is not None:
        return "none (reference)"
    import ctypes

    name = backends.load_native().sl_isa
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip()
