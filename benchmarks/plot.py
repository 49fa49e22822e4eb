"""Draw time against length from rows of `benchmarks.run --only length --peers`.

python -m benchmarks.plot run.jsonl --out time_against_length.svg
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
    options = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print("benchmarks: matplotlib is missing; pip install 'stateline[plot]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read(options.rows):
        length = re.search(r"\bt(\d+)", row["shape"])
        if row["op"] == "selective_scan length" and length:
            curves.setdefault(row["by"], []).append((int(length[1]), row["ms_p50"]))
    if not curves:
        print(f"benchmarks: {options.rows} has no rows of `--only length`", file=sys.stderr)
        return 2
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axes.loglog(*zip(*sorted(points), strict=True), marker="o", label=name, base=2)
    axes.set(xlabel="length (time steps)", ylabel="milliseconds", title="selective_scan fwd, 256 channels × 16 states")
    axes.legend()
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
