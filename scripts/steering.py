"""Draw the picture of docs/steer_a_system.md, from what the code of that page makes.

    python scripts/steering.py                      # writes docs/steer_a_system.png

Needs matplotlib and the extra: pip install 'stateline[classical,plot]'.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "steer_a_system.md", DOCS / "steer_a_system.png"
STEP = 0.04  # seconds, as on the page
END, FORCE = 1.05, 4.0  # of the track in metres; of the motor in newtons
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(page: str) -> dict[str, Any]:
    """What the page's code leaves behind."""
    made: dict[str, Any] = {"__name__": "page"}
    for block in FENCE.findall(page):
        exec(compile(block, str(PAGE), "exec"), made)
    return made


def draw(pyplot: Any, free: list[Tensor], held: list[Tensor], goal: Tensor, out: Path) -> None:
    """Place, angle and force over time, of states (t, 4), observations (t, 2) and forces (t)."""
    figure, axes = pyplot.subplots(3, 1, figsize=(8, 7), layout="constrained", sharex=True)
    seconds = torch.arange(len(goal)) * STEP
    axes[0].plot(seconds, goal, color="0.6", linewidth=1, drawstyle="steps-post", label="where it should be")
    axes[0].axhline(END, color="tab:red", linestyle=":", linewidth=1, label="end of the track")
    for sign in (-1, 1):
        axes[2].axhline(sign * FORCE, color="tab:red", linestyle=":", linewidth=1)
    for (states, seen, force), color, name in (
        (free, "tab:orange", "lqg, no limits"),
        (held, "tab:blue", "within limits"),
    ):
        axes[1].plot(seconds, seen[:, 1].rad2deg(), ".", color=color, alpha=0.35, markersize=3)
        axes[0].plot(seconds, states[:, 0], color=color, label=name)
        axes[1].plot(seconds, states[:, 2] * 180 / math.pi, color=color)
        axes[2].plot(seconds, force, color=color, drawstyle="steps-post")
    axes[0].set(ylabel="place of the cart, m", ylim=(-0.2, 1.55))
    axes[0].legend(fontsize="small", loc="upper center", ncols=4)
    axes[1].set(ylabel="angle of the pole, degrees\n(dots: as it is seen)")
    axes[2].set(ylabel="force, N", xlabel="seconds")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Run the page and draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = run(PAGE.read_text(encoding="utf-8"))
    goal = torch.stack([made["goal"](t)[0] for t in range(len(made["free"][0]))])
    draw(pyplot, made["free"], made["held"], goal, PICTURE)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
