"""Take the noise out of a sensor, forecast it, and go on the next day from a file.

    python examples/filter_a_sensor.py                        # a made-up tank that is filled and emptied
    python examples/filter_a_sensor.py sensor.csv time        # your CSV, and its column of times if it has one

Needs nothing beside stateline. The same from a shell: stateline filter --help
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from pathlib import Path

from stateline.apps.filtering import SeriesFilter, read_series

STEPS = 12  # that are forecast


def tank(path: Path) -> None:
    """A level every ten minutes for two weeks, daily filled and emptied; one reading in twenty is lost."""
    chance = random.Random(0)
    lines = ["time,level\n"]
    for t in range(2016):
        day, clock = divmod(10 * t, 1440)
        level = 120 + 0.01 * t + 30 * math.sin(2 * math.pi * t / 144) + chance.gauss(0, 4)
        reading = "" if chance.random() < 0.05 else f"{level:.1f}"
        lines.append(f"2024-05-{1 + day:02d} {clock // 60:02d}:{clock % 60:02d},{reading}\n")
    path.write_text("".join(lines))


def main() -> None:
    """Filter all but the last tenth, forecast, save; then load and go on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(folder) / "tank.csv")
        time = sys.argv[2] if len(sys.argv) > 2 else None
        if len(sys.argv) == 1:
            tank(path)
            time = "time"
        series = read_series(path, time=time)
        cut = len(series) * 9 // 10
        past, today = series[:cut], series[cut:]

        sensor = SeriesFilter("local-trend").fit(past)  # learns how noisy the sensor is, and how the level moves
        clean = sensor.extend(past, smooth=True)
        assert clean.smoothed is not None
        for name, noise in zip(series.columns, sensor.variances["noise"], strict=True):
            print(f"{name}: readings are wrong by {noise**0.5:.2f}")
        print(f"of the last one the filter is sure to {clean.sd[-1, 0]:.2f}; steps ahead, with 95 %:")

        ahead = sensor.forecast(STEPS)
        low, high = ahead.interval(0.95)
        for t, when in enumerate(ahead.times):
            print(f"  {when:20s} {ahead.mean[t, 0]:8.2f}   {low[t, 0]:8.2f} to {high[t, 0]:8.2f}")

        state = Path(folder) / "sensor.safetensors"
        sensor.save(state)
        later = SeriesFilter.load(state)  # the next day, in another program
        went = later.extend(today)
        print(f"gone on with {len(today)} rows; the last: {went.mean[-1, 0]:.2f} ± {went.sd[-1, 0]:.2f}")


if __name__ == "__main__":
    main()
