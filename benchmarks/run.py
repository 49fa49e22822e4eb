"""Measure this machine: one JSON line a candidate, with its provenance.

    python -m benchmarks.run                             # our own figures
    python -m benchmarks.run --peers --out run.jsonl     # beside what others take, in one run, in turns
    python -m benchmarks.run --only scan --only import   # cases whose name has one of these

`benchmarks.report` makes docs/performance.md of such a file, `benchmarks.plot` a picture of time against length. On a
busy machine look at ms_min and at the ratios, which are taken in turns. Peers: pip install
transformers mambapy llama-cpp-python gguf.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks import (
    cases,
    cases_130m,
    cases_accelerate,
    cases_gated,
    cases_kalman,
    cases_linear,
    cases_ops,
    cases_s4,
    cases_training,
    measure,
)


def rows(case: cases.Case, with_peers: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Figures of one case; `ratio` is the time of a candidate over that of the case's first."""
    work = case.make(with_peers)
    figures = measure.interleave(work, seconds)
    first = next(iter(figures))
    for name, figure in figures.items():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "by": name, **figure}
        if name != first:
            row["ratio"] = round(figure["ms_p50"] / figures[first]["ms_p50"], 3)
        if case.tokens:
            row["tokens_per_s"] = round(1e3 * case.tokens / figure["ms_p50"], 1)
        yield row | case.extra()


def operations() -> Iterator[cases.Case]:
    """The single operations of `cases_ops`, of ours only, in the same form; those with peers are in `cases`."""
    covered = {(case.op, "float32") for case in cases.scans()}
    for name, shape, run in cases_ops.cases():
        shape, _, dtype = shape.rpartition(" ")
        if (name, dtype) not in covered:
            yield cases.Case(name, shape, dtype, lambda _, run=run: {cases.OURS: run})


def everything() -> Iterator[cases.Case]:
    """Every case there is."""
    yield from cases.cases()
    yield from cases_130m.model_130m()
    yield from cases_training.training()
    yield from cases_accelerate.accelerated()
    yield from cases_gated.gated()
    yield from cases_linear.linear()
    yield from cases_kalman.kalman()
    yield from cases_s4.structured()
    yield from operations()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases with this in their name")
    parser.add_argument("--peers", action="store_true", help="also run the peers that are installed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=measure.SECONDS, help="for each candidate (default: 2)")
    parser.add_argument("--out", type=Path, help="a file to append to; otherwise lines go to stdout")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    about = measure.provenance()
    chosen = [
        case
        for case in everything()
        if not options.only or any(text.lower() in case.op.lower() for text in options.only)
    ]
    if not chosen:
        known = sorted({case.op for case in everything()})
        print(f"benchmarks: no case has {options.only} in its name; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    for case in chosen:
        for row in rows(case, options.peers, options.seconds):
            line = json.dumps(row | about)
            if options.out:
                with options.out.open("a") as file:
                    file.write(line + "\n")
                ratio = f"  ×{row['ratio']}" if "ratio" in row else ""
                print(
                    f"{row['op']} {row['shape']} {row['dtype']}: {row['by']} {row['ms_p50']:.3f} ms{ratio}", flush=True
                )
            else:
                print(line, flush=True)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
