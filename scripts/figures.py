"""Draw the pictures of docs/what_s4_remembers.md, and write its table, from five minutes of a real electrocardiogram.

    python scripts/figures.py                       # writes docs/what_s4_remembers*.png and the table of the page
    python scripts/figures.py --archives FOLDER     # takes the wheel that lies in FOLDER instead of fetching it

The signal: record 208 of the MIT-BIH arrhythmia database, 360 samples a second, as SciPy 1.11 carried it
(scipy/misc/ecg.dat). Needs matplotlib: pip install 'stateline[plot]'.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # also when it is imported from elsewhere

from archives import Archive, DataError  # noqa: E402  # needs the path above

from stateline.theory import hippo  # noqa: E402  # after the path, for one order

RECORDING = Archive(
    "pip",
    "scipy",
    "1.11.4",
    "scipy-1.11.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "530f9ad26440e85766509dbf78edcfe13ffd0ab7fec2560ee5c36ff74d6269ff",
)
RATE = 360  # samples a second
SECONDS = 4  # projected
WINDOW = 2  # seconds that the windows reach back
SEGMENTS = 1000  # over which errors are averaged
SIZES = (8, 32, 64)
#: (title, measure, dt): what each panel shows.
PANELS = (
    ("LegS, scaled: all of the past alike", "legs", None),
    ("LegS at a fixed dt, as in S4: the new finer than the old", "legs", 1 / RATE),
    ("LegT: a window of 2 s", "legt", 2 / (WINDOW * RATE)),
    ("LagT: no window, n buys reach", "lagt", 0.2),
    ("Fourier: a window of 2 s taken for periodic", "fourier", 2 / (WINDOW * RATE)),
)
NAMES = ("LegS, scaled", "LegS, dt = 1/360", "LegT", "LagT", "Fourier")
TABLE_AGES = (0.05, 0.25, 0.5, 1.0, 1.5, 1.95)  # seconds
BEGIN, END = "<!-- errors -->", "<!-- /errors -->"
PAGE = ROOT / "docs" / "what_s4_remembers.md"


def electrocardiogram(archive: bytes) -> Tensor:
    """Millivolts (108000), from the wheel."""
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        counts = np.load(io.BytesIO(wheel.read("scipy/misc/ecg.dat")))["ecg"]
    return torch.from_numpy((counts.astype(np.float64) - 1024) / 200)  # 200 steps of the converter a millivolt


def segments(signal: Tensor) -> Tensor:
    """Stretches (s, t) of it that start at even distances, about their means."""
    length = SECONDS * RATE
    starts = torch.linspace(0, len(signal) - length, SEGMENTS).long()
    cut = torch.stack([signal[start : start + length] for start in starts.tolist()])
    return cut - cut.mean(-1, keepdim=True)


def remembered(cut: Tensor) -> dict[tuple[int, int], Tensor]:
    """Reconstructions (s, k) of the last seconds, newest first, by panel and size."""
    found = {}
    for panel, (_, measure, dt) in enumerate(PANELS):
        ages = torch.arange((SECONDS if dt is None else WINDOW) * RATE) + 0.5
        for n in SIZES:
            found[panel, n] = hippo.reconstruct(hippo.project(cut, measure, n, dt=dt), ages)
    return found


def curves(pyplot: Any, cut: Tensor, found: dict[tuple[int, int], Tensor], which: int, out: Path) -> None:
    """One stretch of signal, and what each system has of it."""
    figure, axes = pyplot.subplots(len(PANELS), 1, figsize=(8, 11), layout="constrained", sharex=True, sharey=True)
    seconds = (torch.arange(cut.shape[1]) + 0.5) / RATE
    for panel, axis in enumerate(axes):
        axis.plot(-seconds, cut[which].flip(0), color="0.75", linewidth=2.5, label="the signal")
        for n, color in zip(SIZES, ("tab:orange", "tab:blue", "black"), strict=True):
            values = found[panel, n][which]
            axis.plot(-seconds[: len(values)], values, color=color, linewidth=0.9, label=f"n = {n}")
        axis.set(title=PANELS[panel][0], ylabel="mV", ylim=(-1.6, 2.4), xlim=(-SECONDS, 0))
    axes[0].legend(loc="upper left", ncols=4, fontsize="small")
    axes[-1].set(xlabel="seconds before now")
    figure.savefig(out, dpi=75)


def errors(cut: Tensor, values: Tensor) -> Tensor:
    """Root mean square error (k) by age over the stretches, in shares of the signal's own at that age."""
    truth = cut.flip(-1)[:, : values.shape[1]]
    return ((values - truth) ** 2).mean(0).sqrt() / truth.pow(2).mean(0).sqrt()


def by_age(pyplot: Any, cut: Tensor, found: dict[tuple[int, int], Tensor], out: Path) -> None:
    """Error against age, a panel a size."""
    figure, axes = pyplot.subplots(1, len(SIZES), figsize=(10, 3.6), layout="constrained", sharey=True)
    smooth = torch.ones(1, 1, 19, dtype=torch.float64) / 19  # a heartbeat's place in it is chance
    for n, axis in zip(SIZES, axes, strict=True):
        for panel, name in enumerate(NAMES):
            error = errors(cut, found[panel, n])[None, None]
            error = torch.nn.functional.conv1d(error, smooth)[0, 0]
            axis.plot((torch.arange(len(error)) + 9.5) / RATE, error, label=name, linewidth=1.2)
        axis.set(title=f"n = {n}", xlabel="age in seconds", ylim=(0, 1.3))
        axis.axhline(1, color="0.8", linewidth=0.8, zorder=0)
    axes[0].set(ylabel="error (1: nothing is known)")
    axes[0].legend(fontsize="x-small", loc="lower right")
    figure.savefig(out, dpi=75)


def table(cut: Tensor, found: dict[tuple[int, int], Tensor]) -> str:
    """The same errors in figures, about each age a tenth of a second wide."""
    head = "| | n | " + " | ".join(f"{age:g} s" for age in TABLE_AGES) + " |"
    rows = [head, "|---|---:|" + "---:|" * len(TABLE_AGES)]
    for panel, name in enumerate(NAMES):
        for n in SIZES:
            error = errors(cut, found[panel, n])
            near = [error[max(0, int((age - 0.05) * RATE)) : int((age + 0.05) * RATE)].mean() for age in TABLE_AGES]
            rows.append(f"| {name if n == SIZES[0] else ''} | {n} | " + " | ".join(f"{e:.2f}" for e in near) + " |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, help="a folder that holds the wheel")
    options = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        print("figures: matplotlib is missing; pip install 'stateline[plot]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        with tempfile.TemporaryDirectory() as scratch:
            cut = segments(electrocardiogram(RECORDING.fetch(options.archives, Path(scratch))))
    except DataError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    found = remembered(cut)
    curves(pyplot, cut, found, SEGMENTS // 2, PAGE.with_suffix(".png"))
    by_age(pyplot, cut, found, PAGE.with_name(PAGE.stem + "_by_age.png"))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(cut, found)}\n\n{END}{after}", encoding="utf-8")
    print(f"wrote {PAGE.stem}.png, {PAGE.stem}_by_age.png and the table of {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
