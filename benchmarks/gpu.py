"""Measure a GPU: one JSON line a candidate, beside floors from the copying and matrix rates of the same run.

    python -m benchmarks.gpu                          # everything whose kernels exist
    python -m benchmarks.gpu --only conv --out gpu.jsonl
    python -m benchmarks.gpu --profile training       # where the time of one call goes, by kernel

ms_p50 is a whole call as a user sees it, the host's work before the first launch included; ms_device is what is left
when that work is hidden behind other work of the device. floor_ms: bytes over the copying rate, or operations over the
matrix rate.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import (
    cases_gpu,
    cases_gpu_accelerate,
    cases_gpu_gated,
    cases_gpu_kalman,
    cases_gpu_linear,
    cases_gpu_mamba2,
    cases_gpu_mamba3,
    cases_gpu_s4,
    measure,
)
from benchmarks.cases_gpu import Case
from benchmarks.measure import Work

CYCLES = 8_000_000  # four to five milliseconds, in which the host queues a call


def milliseconds(run: Work, turns: int, hidden: bool) -> list[float]:
    """Device time from before a call to after it; `hidden`: the host's work is done while the device waits."""
    times = []
    for _ in range(turns):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if hidden:
            torch.cuda._sleep(CYCLES)
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return times


def figures(run: Work, many: bool, steps: int, seconds: float) -> dict[str, float]:
    """Times of a step, the first call's, and the most memory a call holds."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    once = statistics.median(milliseconds(run, 3, False))
    turns = int(min(100, max(5, 1e3 * seconds / once)))
    whole = [ms / steps for ms in milliseconds(run, turns, False)]
    row = {"ms_p50": statistics.median(whole), "ms_min": min(whole), "turns": turns, "first_call_s": first}
    if not many:
        row["ms_device"] = statistics.median(milliseconds(run, turns, True)) / steps
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 4) for name, value in row.items()}


def rows(case: Case, seconds: float, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Figures of one case. Rates that it measures are remembered for the floors of the rest."""
    work, ours = case.make(), None
    for name, run in work.items():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "by": name}
        row |= figures(run, case.many, case.steps, seconds)
        best = row.get("ms_device", row["ms_p50"])
        if case.op.startswith("limit: "):
            kind, amount = ("bytes", case.bytes) if case.bytes else ("operations", case.operations)
            rates[kind] = (amount or 0) / best
            row[f"tera_{kind}_per_s"] = round(rates[kind] / 1e9, 3)
        else:
            if case.bytes and "bytes" in rates:
                row["floor_ms"] = round(case.bytes / rates["bytes"], 4)
                row["share_of_floor"] = round(row["floor_ms"] / best, 3)
            for kind, amount in (("bytes", case.bytes), ("exponentials", case.exponentials)):
                if amount:
                    row[f"tera_{kind}_per_s"] = round(amount / best / 1e9, 3)
        if case.tokens:
            row["tokens_per_s"] = round(1e3 * case.tokens / row["ms_p50"])
        if ours is None:
            ours = best
            row |= {"bar_ms": round(case.bar, 4)} if case.bar else {}
        else:
            row["ratio"] = round(best / ours, 2)
        yield row


def profile(case: Case) -> str:
    """Time by kernel of one call of the first candidate, after three to warm up."""
    run = next(iter(case.make().values()))
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as recorded:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, tuple[float, int]] = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent, count = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = spent + event.device_time_total / 1e3, count + 1
    total = sum(spent for spent, _ in kernels.values())
    lines = [f"{case.op} {case.shape}: {total:.3f} ms in kernels"]
    for name, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:40]:
        lines.append(f"{spent:9.3f} ms {100 * spent / total:5.1f} %  {count:5d} ×  {name[:100]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--not", action="append", default=[], metavar="TEXT", dest="without", help="but not these")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each candidate (default: 0.5)")
    parser.add_argument("--out", type=Path, help="a file to append to, beside a short table on stdout")
    parser.add_argument("--profile", metavar="TEXT", help="profile one call of the cases with this in their name")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks: torch sees no CUDA device here", file=sys.stderr)
        return 2
    words = [options.profile] if options.profile else [*options.only, *(["limit"] if options.only else [])]
    every = (
        *cases_gpu.cases(),
        *cases_gpu_mamba2.cases(),
        *cases_gpu_mamba3.cases(),
        *cases_gpu_gated.cases(),
        *cases_gpu_linear.linear(),
        *(replace(case, dtype="float32") for case in (*cases_gpu_s4.structured(), *cases_gpu_kalman.kalman())),
        *cases_gpu_accelerate.accelerated(),
    )
    named = {f"{case.op} {case.shape}".lower(): case for case in every}
    named = {name: case for name, case in named.items() if not words or any(word.lower() in name for word in words)}
    chosen = [case for name, case in named.items() if not any(word.lower() in name for word in options.without)]
    given = torch.ones(1, device="cuda", requires_grad=True)
    torch.autograd.grad(given * given, given, torch.ones_like(given))  # torch imports sympy for the first: seconds
    about, rates = measure.provenance() | {"gpu": torch.cuda.get_device_name()}, {}
    for case in chosen:
        if (why := case.missing()) is not None:
            print(f"left out: {case.op} {case.shape}: {why}", flush=True)
            continue
        if options.profile:
            print(profile(case), flush=True)
            continue
        for row in rows(case, options.seconds, rates):
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")
            print(shown(row) if options.out else json.dumps(row | about), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def shown(row: dict[str, Any]) -> str:
    """A row as a line to read."""
    device = f", device {row['ms_device']:.4f}" if "ms_device" in row else ""
    shown = ("floor_ms", "bar_ms", "ratio", *(f"tera_{kind}_per_s" for kind in ("bytes", "exponentials", "operations")))
    rest = "".join(f"  {k} {row[k]}" for k in (*shown, "peak_gib", "first_call_s") if k in row)
    return f"{row['op']} {row['shape']} [{row['by']}] {row['ms_p50']:.4f} ms{device}{rest}"


if __name__ == "__main__":
    sys.exit(main())
