"""Draw the picture of docs/forecast_a_thousand_series.md, from what the code of that page makes.

    python scripts/forecasting.py                   # writes docs/forecast_a_thousand_series.png

Needs matplotlib: pip install 'stateline[plot]'.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "forecast_a_thousand_series.md", DOCS / "forecast_a_thousand_series.png"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """What the page's code leaves behind; files it writes go to a folder that vanishes."""
    made: dict[str, Any] = {"__name__": "page"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in FENCE.findall(page):
                exec(compile(block, str(PAGE), "exec"), made)
        finally:
            os.chdir(here)
    return made


def draw(axes: Any, whole: Any, ahead: Any, series: int, time: Any) -> None:
    """One series over `time`, its forecast, intervals of 50 and 90 percent, and what came."""
    steps = ahead.median.shape[1]
    then = time[-steps:]
    for level, shade in ((0.9, 0.18), (0.5, 0.35)):
        low, high = ahead.interval(level)
        look = {"color": "tab:blue", "alpha": shade, "linewidth": 0, "label": f"{level:.0%}"}
        axes.fill_between(then, low[series], high[series], **look)
    axes.plot(time[:-steps], whole[:-steps], color="black", linewidth=1, label="known")
    axes.plot(then, ahead.median[series], color="tab:blue", label="median")
    axes.plot(then, whole[-steps:], ".", color="tab:red", markersize=5, label="what came")
    axes.set_ylim(bottom=0)


def main() -> None:
    """Run the page and draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = run(PAGE.read_text(encoding="utf-8"))
    figure, grid = pyplot.subplot_mosaic("AB;CD;EE", figsize=(9, 9), layout="constrained")
    for i, place in enumerate("ABCD"):
        whole = made["yearly"][i]
        draw(grid[place], whole, made["ahead"], i, np.arange(len(whole)))
        grid[place].set_title(f"M1, yearly: series {i + 1} of the page", fontsize="small")
        grid[place].set_xlabel("year", fontsize="small")
    passengers = made["passengers"]
    draw(grid["E"], passengers, made["monthly"].forecast(24), 0, 1949 + np.arange(len(passengers)) / 12)
    grid["E"].set_title("airline passengers, thousands a month", fontsize="small")
    grid["A"].legend(fontsize="small", loc="upper left")
    figure.savefig(PICTURE, dpi=80)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
