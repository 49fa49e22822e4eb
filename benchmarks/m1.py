"""Forecasts of the M1 competition's 181 yearly series: how good, how fast, beside statsmodels.

    python -m benchmarks.m1                          # accuracy and time; fetches the data (a wheel of 6 MB)
    python -m benchmarks.m1 --archives FOLDER        # takes the wheel from FOLDER
    python -m benchmarks.m1 --statsmodels            # and the same structures, series by series, with statsmodels
    python -m benchmarks.m1 --validate               # six years earlier, for choosing: never looks at the test

Six years are forecast from what comes before. MASE is the mean absolute error over the mean absolute change from one
year to the next in the years before (Hyndman & Koehler 2006), averaged over series, as in the Monash archive
(Godahewa et al. 2021), whose table has for these series: SES 4.94, Theta 4.19, ARIMA 4.48, ETS 3.77, TBATS 3.50.
One thread; a Markdown table comes out. Both searches start afresh; "log-likelihood" compares where both ended.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.signal_sets import AEON

from stateline.classical import StructuralModel

MEMBER = "aeon/datasets/data/m1_yearly_dataset/m1_yearly_dataset.tsf"
HORIZON = 6
SHORTEST = 15  # values that must be left to validate on
Series = list[np.ndarray[Any, Any]]
#: Name, arguments of StructuralModel, of UnobservedComponents.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("level", {"trend": "none"}, {"level": "llevel"}),
    ("level, fixed slope", {"trend": "fixed"}, {"level": "lldtrend"}),
    ("level, slope", {"trend": "walk"}, {"level": "lltrend"}),
    ("smooth slope", {"level": "fixed", "trend": "walk"}, {"level": "strend"}),
]
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("default, best structure alone", {"combine": "best"}),
    ("without logarithms", {"transform": "none"}),
    ("with trend none too", {"trend": ("none", "fixed", "walk", "damped")}),
    ("damped, without logarithms", {"trend": "damped", "transform": "none"}),
    *((name, {**ours, "transform": "none"}) for name, ours, _ in SAME),
]


def yearly(archives: Path | None) -> Series:
    """The 181 series, whole."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = AEON.fetch(archives, Path(scratch))
    text = zipfile.ZipFile(BytesIO(wheel)).read(MEMBER).decode("latin-1")
    lines = text.split("@data\n")[1].split("\n")
    return [np.array(line.rsplit(":", 1)[1].split(","), dtype=float) for line in lines if line.strip()]


def split(series: Series, validate: bool) -> tuple[Series, np.ndarray[Any, Any]]:
    """What is known, and the six years to forecast (N, 6)."""
    if validate:
        series = [row[:-HORIZON] for row in series if len(row) >= SHORTEST + HORIZON]
    return [row[:-HORIZON] for row in series], np.stack([row[-HORIZON:] for row in series])


def mase(known: Series, truth: np.ndarray[Any, Any], said: np.ndarray[Any, Any]) -> float:
    """Mean absolute scaled error, averaged over series."""
    unit = np.array([np.abs(np.diff(row)).mean() for row in known])
    return float((np.abs(truth - said).mean(1) / unit).mean())


def accuracy(known: Series, truth: np.ndarray[Any, Any]) -> None:
    """A row a model: error, share of truths within its intervals, seconds."""
    print("| model | mean MASE | within 80% | within 95% | fit, s |\n|---|---:|---:|---:|---:|")
    for name, arguments in MODELS:
        began = time.perf_counter()
        model = StructuralModel(progress=False, **arguments).fit(known)
        spent = time.perf_counter() - began
        ahead = model.forecast(HORIZON)
        inside = []
        for level in (0.8, 0.95):
            low, high = ahead.interval(level)
            inside.append(((truth >= low) & (truth <= high)).mean())
        print(
            f"| {name} | {mase(known, truth, ahead.median):.2f} | {inside[0]:.0%} | {inside[1]:.0%} | {spent:.2f} |",
            flush=True,
        )


def race(known: Series, turns: int) -> None:
    """A row a structure: processor seconds of both in turn, on the scaled series, and where both searches ended."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    print(
        "\n| structure | stateline, s | statsmodels, s | times | log-likelihood, ours − theirs: least, median, most |"
    )
    print("|---|---:|---:|---:|---|")
    whole = np.zeros(2)
    for name, ours, theirs in SAME:
        spent = np.full((turns, 2), np.inf)
        for turn in range(turns):
            began = time.process_time()
            model = StructuralModel(transform="none", progress=False, **ours).fit(known)
            spent[turn, 0] = time.process_time() - began
            fit = model.fits_[0]
            rows = [
                row.numpy()[: int(n)] for row, n in zip(fit.scaled(model.panel_).y, model.panel_.length, strict=True)
            ]
            d = fit.structure.diffuse
            began = time.process_time()
            ends = []
            for row in rows:
                one = UnobservedComponents(row, loglikelihood_burn=d, **theirs)
                one.initialize_default(approximate_diffuse_variance=1e6)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ends.append(one.fit(disp=0).llf)
            spent[turn, 1] = time.process_time() - began
        least = spent.min(0)
        whole += least
        units = (model.panel_.count - d) * fit.scale.log()
        apart = (fit.loglik + units).numpy() - np.array(ends)
        said = f"{apart.min():.1e}, {np.median(apart):.1e}, {apart.max():.1e}"
        print(f"| {name} | {least[0]:.2f} | {least[1]:.2f} | {least[1] / least[0]:.0f} | {said} |", flush=True)
    print(f"| all | {whole[0]:.2f} | {whole[1]:.2f} | {whole[1] / whole[0]:.0f} | |")


def main() -> int:
    """Fetch, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, help="a folder with the wheel")
    parser.add_argument("--validate", action="store_true", help="six years earlier, for choosing defaults")
    parser.add_argument("--statsmodels", action="store_true", help="the race too; needs pip install statsmodels")
    parser.add_argument("--turns", type=int, default=3, help="of the race; the least time counts (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known, truth = split(yearly(options.archives), options.validate)
    print(f"{len(known)} series of {min(map(len, known))} to {max(map(len, known))} years\n")
    accuracy(known, truth)
    if options.statsmodels:
        race(known, options.turns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
