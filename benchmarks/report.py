"""Turn rows of `benchmarks.run`, or of `benchmarks.gpu`, into their half of docs/performance.md; the other half stays.

python -m benchmarks.run --peers --out build/performance.jsonl && python -m benchmarks.report build/performance.jsonl
python -m benchmarks.gpu --out build/gpu.jsonl && python -m benchmarks.report build/gpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
Row = dict[str, Any]

HEAD = """# Performance

This page is generated from a run of the benchmarks, beside the libraries that one would use instead. Make your own:

```console
$ make performance
```

Candidates of a case take turns in one process, so a busy machine slows all of them alike: the ratios say more than the
milliseconds. A ratio is the time of a candidate over that of the first one of its case; above 1 means slower.
`torch loop` is the scan that anyone writes by hand first. Every candidate finds the caches full of
the others' data: alone, what fits into them runs faster.
"""

GPU_HEAD = """## On a GPU

From a run of their own:

```console
$ make performance-gpu
```

"device" is the time of the kernels, which count when calls are queued one after another; "call" is what one call takes
that is waited for, the host's work before the first kernel included. "floor" is the time in which the device copies as
many bytes as must move at least: every input read once, every result written once.

Calls of one layer's mixer, by length (`python -m benchmarks.plot build/gpu.jsonl --op "mixer length"`):

![Milliseconds of a call against length](mixers_by_length.png)
"""

MARK = "<!-- gpu -->"  # the GPU's half begins here

LINEAR = "A scan does the same work for every step, so on a quiet machine twice the length takes twice the time.\n"


def read(path: Path) -> list[Row]:
    """Rows of a file; of the same measurement taken twice the last counts."""
    rows: dict[tuple[str, ...], Row] = {}
    for line in path.read_text().splitlines():
        row: Row = json.loads(line)
        rows[(row["op"], row["shape"], row["dtype"], row["by"])] = row
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """One line a candidate, a case's name once."""
    lines = [
        "| case | candidate | median ms | least ms | ratio | tokens/s, or rate |",
        "|---|---|---:|---:|---:|---:|",
    ]
    before = None
    for row in rows:
        case = f"{row['op']}, {row['shape']} {row['dtype']}".strip()
        speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else rate(row)
        ratio = f"{row['ratio']:,.2f}" if "ratio" in row else "1"
        shown = "" if case == before else case
        lines.append(f"| {shown} | {row['by']} | {row['ms_p50']:,.2f} | {row['ms_min']:,.2f} | {ratio} | {speed} |")
        before = case
    return "\n".join(lines)


def gpu_table(rows: list[Row]) -> str:
    """One line a candidate, a case's name once."""
    lines = [
        "| case | candidate | device ms | call ms | floor ms | achieved | tokens/s | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    before = None
    for row in rows:
        case = f"{row['op']}, {row['shape']}"
        device, floor = (f"{row[key]:,.3f}" if key in row else "" for key in ("ms_device", "floor_ms"))
        tokens = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        cells = [case if case != before else "", row["by"], device, f"{row['ms_p50']:,.3f}", floor, achieved(row)]
        lines.append(f"| {' | '.join([*cells, tokens, format(row['peak_gib'], '.2f')])} |")
        before = case
    return "\n".join(lines)


def achieved(row: Row) -> str:
    """Bytes, exponentials and operations a second, as far as a row counts them."""
    units = {"tera_bytes_per_s": "TB/s", "tera_exponentials_per_s": "10¹² exp/s", "tera_operations_per_s": "TFLOP/s"}
    return ", ".join(f"{row[key]:,.2f} {unit}" for key, unit in units.items() if key in row)


def rate(row: Row) -> str:
    """What a limit of the machine amounts to."""
    for key, unit in (("bytes", "GB/s"), ("operations", "GFLOP/s")):
        if key in row:
            return f"{row[key] / row['ms_p50'] / 1e6:,.0f} {unit}"
    return ""


def memory(rows: list[Row]) -> str:
    """What a long context costs in memory, where it was measured."""
    for row in rows:
        found = {key.rpartition("_")[2]: value for key, value in row.items() if key.startswith("resident_mb_at_")}
        if found:
            said = ", ".join(f"{value:,.0f} MB after {int(tokens):,} tokens" for tokens, value in found.items())
            return f"\nMemory of the process while it reads a long context: {said}.\n"
    return ""


def peaks(rows: list[Row]) -> str:
    """What a training step adds to the memory of a process that holds the model, where it was measured."""
    for row in rows:
        if found := row.get("peak_mb_by"):
            said = ", ".join(f"{name} {value:,.0f} MB" for name, value in found.items())
            return f"\nMost memory that a training step adds, each in a process of its own: {said}.\n"
    return ""


def sources(rows: list[Row]) -> str:
    """Machines, versions and commits the rows come from."""
    seen = []
    for row in rows:
        peers = ", ".join(f"{name} {number}" for name, number in row["peers"].items()) or "none"
        changed = " with changes" if row["dirty"] else ""
        busy = f", load {row['load']} from other work" if (row.get("load") or 0) > 0.5 else ""
        what = row.get("gpu") or f"{row['machine']}, {row['threads']} threads{busy}, instruction set {row['isa']}"
        line = (
            f"- {what}; Python {row['python']}, torch {row['torch']}; commit {row['commit']}{changed}; peers: {peers}"
        )
        if line not in seen:
            seen.append(line)
    return "\n".join(seen)


def render(rows: list[Row]) -> str:
    """The half of the page that rows of one kind of machine make."""
    lengths = [row for row in rows if row["op"].endswith(" length")]
    main = [row for row in rows if row not in lengths]
    gpu = "gpu" in rows[0]
    figures = [GPU_HEAD, gpu_table(main), ""] if gpu else [HEAD, "## Figures\n", table(main), memory(rows), peaks(rows)]
    if lengths:
        same = "Mixers of sequences, forward and gradient, from one sequence.\n" if gpu else LINEAR
        title = "### Time against length\n" if gpu else "## Time against length\n"
        figures += [title, same, (gpu_table if gpu else table)(lengths), ""]
    return "\n".join([*figures, f"{'###' if gpu else '##'} Where they come from\n", sources(rows), ""])


def page(rows: list[Row], before: str) -> str:
    """The page with one half renewed; `before` is the page as it was."""
    cpu, mark, gpu = before.partition(MARK)
    if "gpu" in rows[0]:
        return f"{cpu.rstrip()}\n\n{MARK}\n\n{render(rows)}"
    return render(rows) + (f"\n{mark}{gpu}" if mark else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file that `benchmarks.run --out` or `benchmarks.gpu --out` wrote")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/performance.md)")
    options = parser.parse_args(argv)
    if not options.rows.exists():
        print(f"benchmarks: there is no {options.rows}; make it with benchmarks.run --out", file=sys.stderr)
        return 2
    rows = read(options.rows)
    if not rows or len({"gpu" in row for row in rows}) > 1:
        print(f"benchmarks: {options.rows} holds no rows, or those of a GPU among others", file=sys.stderr)
        return 2
    before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    options.out.write_text(page(rows, before), encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
