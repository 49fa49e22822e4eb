"""Draw time against length from rows of `benchmarks.run --only length --peers`, or of `benchmarks.gpu --only length`.

python -m benchmarks.plot run.jsonl --out time_against_length.svg
python -m benchmarks.plot gpu.jsonl --op "mixer length" --out mixers.svg
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.report import read


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file that `benchmarks.run --out` wrote")
    parser.add_argument("--out", type=Path, default=Path("time_against_length.svg"), help=".svg, .png or .pdf")
    parser.add_argument("--op", default="selective_scan length", help="the rows to draw (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print("benchmarks: matplotlib is missing; pip install 'stateline[plot]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[int, float]]] = {}
    shape = ""
    for row in read(options.rows):
        length = re.search(r"\bt(\d+)", row["shape"])
        if row["op"] == options.op and length:
            shape = re.sub(r"\bt\d+ ?", "", row["shape"])
            curves.setdefault(row["by"], []).append((int(length[1]), row["ms_p50"]))
    if not curves:
        print(f"benchmarks: {options.rows} has no rows of {options.op}", file=sys.stderr)
        return 2
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name, base=2)
    title = f"{options.op.removesuffix(' length')}, {shape}"
    axes.set(xlabel="length (time steps)", ylabel="milliseconds", title=title)
    axes.legend()
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
