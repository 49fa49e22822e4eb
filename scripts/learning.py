"""Draw the picture of docs/learn_from_data.md, from what the code of that page makes.

    python scripts/learning.py                      # writes docs/learn_from_data.png

Needs matplotlib: pip install 'stateline[plot]'.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "learn_from_data.md", DOCS / "learn_from_data.png"
FIRST = 1871  # the first year of the page's record
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """What the page's code leaves behind, up to where it has `after`."""
    made: dict[str, Any] = {"__name__": "page"}
    for block in FENCE.findall(page):
        if "after" in made:
            break
        exec(compile(block, str(PAGE), "exec"), made)
    return made


def draw(pyplot: Any, flow: Any, before: Any, after: Any, out: Path) -> None:
    """Flow (t, 1) over the years, and the levels of two `Smoothed`, the second with two standard deviations."""
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    years = range(FIRST, FIRST + len(flow))
    axis.plot(years, flow[:, 0], ".", color="0.5", label="a year's flow")
    axis.plot(years, before.mean[:, 0], color="tab:orange", linewidth=1, label="level, noise guessed")
    level, deviation = after.mean[:, 0], after.cov[:, 0, 0].sqrt()
    axis.plot(years, level, color="tab:blue", label="level, noise learned, ± 2 standard deviations")
    axis.fill_between(years, level - 2 * deviation, level + 2 * deviation, color="tab:blue", alpha=0.2, linewidth=0)
    axis.set(ylabel="Nile at Aswan, 10⁸ m³ a year", xlabel="year")
    axis.legend(fontsize="small")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run the page and draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = run(PAGE.read_text(encoding="utf-8"))
    draw(pyplot, made["flow"], made["before"], made["after"], PICTURE)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
