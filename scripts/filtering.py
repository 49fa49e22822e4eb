"""Make the data and the pictures of docs/remove_noise.md and docs/track_objects.md.

    python scripts/filtering.py                       # runs the pages' code and draws docs/*.png
    python scripts/filtering.py --data                # first makes docs/co2.csv, co2_1989.csv and flight.csv anew
    python scripts/filtering.py --data --archives D   # from the wheels that lie in the folder D

    co2      weeks of carbon dioxide at Mauna Loa, 1980-1989, Keeling & Whorf 2004, public domain (wheel of statsmodels)
    flight   what an airliner said of its position on the way to Paris, October 2021 (wheel of traffic, MIT): kilometres
             east and north of where it landed. A receiver misses much: one message in six is kept, chosen at random; in
             one of five the north is lost, and for eighty seconds all is: then rows say only when

Needs matplotlib: pip install 'stateline[plot]'.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))  # also when it is imported from elsewhere

from archives import Archive, DataError  # noqa: E402  # needs the path above

CO2 = Archive(
    "pip",
    "statsmodels",
    "0.14.6",
    "statsmodels-0.14.6-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
    "a3764ba8195c9baf0925a96da0743ff218067a269f01d155ca3558deed2658ca",
)
FLIGHTS = Archive(
    "pip",
    "traffic",
    "2.13",
    "traffic-2.13-py3-none-any.whl",
    "5e0cd61d931d03103294361542188f08f959a55e862d5cba80ab61291021e66c",
)
YEARS = {"co2.csv": range(1980, 1989), "co2_1989.csv": range(1989, 1990)}
CALLSIGN, LANDED = "AFR26TR", 1330  # seconds after its first message
SILENCE = (640, 720)  # seconds in which nothing is known but the time
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def co2(wheel: bytes) -> dict[str, str]:
    """CSV texts by name: a date and parts per million, empty where no sample was good."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        lines = archive.read("statsmodels/datasets/co2/co2.csv").decode().split()[1:]
    rows = [line.split(",") for line in lines]
    return {
        name: "week,ppm\n" + "".join(f"{d[:4]}-{d[4:6]}-{d[6:]},{v}\n" for d, v in rows if int(d[:4]) in years)
        for name, years in YEARS.items()
    }


def flight(wheel: bytes) -> str:
    """The CSV text: seconds, kilometres east and north, at what times a message came."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        states = json.loads(gzip.decompress(archive.read("traffic/data/samples/collections/quickstart.json.gz")))
    rows = [s for s in states if s["callsign"] == CALLSIGN and s["latitude"] is not None]
    rows.sort(key=lambda s: s["timestamp"])
    start = rows[0]["timestamp"]
    rows = [s for s in rows if s["timestamp"] - start < 1000 * LANDED]
    home = rows[-1]
    chance = random.Random(0)
    lines = ["seconds,east,north\n"]
    for s in rows:
        seconds = (s["timestamp"] - start) // 1000
        if chance.random() > 1 / 6:
            continue
        if SILENCE[0] <= seconds < SILENCE[1]:
            lines.append(f"{seconds},,\n")
            continue
        north = 6371 * math.radians(s["latitude"] - home["latitude"])
        east = 6371 * math.radians(s["longitude"] - home["longitude"]) * math.cos(math.radians(home["latitude"]))
        lines.append(f"{seconds},{east:.4f},{'' if chance.random() < 0.2 else f'{north:.4f}'}\n")
    return "".join(lines)


def make_data(archives: Path | None) -> None:
    """Write the CSV files that lie beside the pages."""
    with tempfile.TemporaryDirectory() as scratch:
        made = co2(CO2.fetch(archives, Path(scratch))) | {"flight.csv": flight(FLIGHTS.fetch(archives, Path(scratch)))}
    for name, text in made.items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}: {text.count(chr(10)) - 1} rows")


def run(page: Path) -> dict[str, Any]:
    """What a page's code leaves behind, run beside copies of its data."""
    made: dict[str, Any] = {"__name__": "page"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for data in DOCS.glob("*.csv"):
            (Path(folder) / data.name).write_bytes(data.read_bytes())
        os.chdir(folder)
        try:
            for block in FENCE.findall(page.read_text(encoding="utf-8")):
                exec(compile(block, str(page), "exec"), made)
        finally:
            os.chdir(here)
    return made


def draw_noise(pyplot: Any, made: dict[str, Any], out: Path) -> None:
    """Nine years of a sensor: clean, forecast for a tenth, and two of them near."""
    series, clean, ahead, coming = (made[name] for name in ("series", "clean", "ahead", "coming"))
    low, high = ahead.interval(0.95)
    weeks = [row.moment for row in series.rows]
    later = made["sensor_places"]
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 6.5), layout="constrained")
    for axis, first in ((axes[0], 0), (axes[1], len(weeks) - 104)):
        axis.plot(weeks[first:], series.values[first:, 0], ".", color="0.55", markersize=3, label="measured")
        axis.plot(weeks[first:], clean.smoothed[first:, 0], color="tab:blue", linewidth=1.2, label="smoothed")
        axis.plot(later, ahead.mean[:, 0], color="tab:orange", linewidth=1.2, label="forecast")
        axis.fill_between(later, low[:, 0], high[:, 0], color="tab:orange", alpha=0.2, linewidth=0)
        axis.plot(
            [row.moment for row in coming.rows], coming.values[:, 0], ".", color="black", markersize=3,
            label="measured later",
        )  # fmt: skip
        axis.set_ylabel("CO₂, parts per million")
    axes[0].legend(fontsize="small", ncols=4, loc="upper left")
    axes[1].set_title("its end, with 95 % intervals", fontsize="medium")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def draw_track(pyplot: Any, made: dict[str, Any], out: Path) -> None:
    """The way by messages and by a radar, and the minute in which nothing came."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 8.5), layout="constrained", height_ratios=(4, 3))
    places, path, guess, echoes = (made[name] for name in ("places", "path", "guess", "radar_places"))
    above.plot(echoes[:, 0], echoes[:, 1], ".", color="0.55", markersize=4, label="radar: distance and bearing")
    above.plot(path[:, 0], path[:, 1], color="black", linewidth=0.8, label="smoothed messages")
    above.plot(guess[:, 0], guess[:, 1], color="tab:orange", linewidth=1.2, label="extended filter, by radar alone")
    above.plot(*made["radar"].tolist(), "^", color="tab:red", label="radar")
    lost = [t for t, gone in enumerate(made["lost"].tolist()) if gone]
    for moments, color, name in (
        (made["live"], "tab:orange", "as it came in"),
        (made["whole"], "tab:blue", "smoothed"),
    ):
        mean, cov = moments.mean[:, [0, 2]], moments.cov[:, [0, 2]][:, :, [0, 2]]
        below.plot(mean[:, 0], mean[:, 1], color=color, linewidth=1.2, label=name)
        for t in lost[::2]:
            below.add_patch(_ellipse(mean[t], cov[t], color))
    below.plot(places[:, 0], places[:, 1], ".", color="black", markersize=5, label="messages", zorder=3)
    around = path[max(lost[0] - 12, 0) : lost[-1] + 14]
    (west, south), (east, north) = around.amin(0).tolist(), around.amax(0).tolist()
    below.set(
        xlim=(west - 1, east + 1), ylim=(south - 5, north + 5), title="nothing came for 80 s: where it is with 95 %"
    )
    for axis in (above, below):
        axis.set(xlabel="km east", ylabel="km north", aspect="equal")
        axis.legend(fontsize="small")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def _ellipse(place: Any, spread: Any, color: str) -> Any:
    """Where it is with 95 %."""
    import torch
    from matplotlib.patches import Ellipse

    sizes, axes = torch.linalg.eigh(spread)
    widths = 2 * math.sqrt(5.99) * sizes.clamp(min=0).sqrt()
    angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
    x, y = place.tolist()
    return Ellipse((x, y), float(widths[1]), float(widths[0]), angle=angle, color=color, alpha=0.15)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="make the CSV files anew")
    parser.add_argument("--archives", type=Path, help="a folder of wheels, looked into before asking pip")
    options = parser.parse_args(argv)
    if options.data:
        try:
            make_data(options.archives)
        except DataError as error:
            print(f"filtering: {error}", file=sys.stderr)
            return 1
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, draw in (("remove_noise", draw_noise), ("track_objects", draw_track)):
        if (DOCS / f"{name}.md").exists():
            draw(pyplot, run(DOCS / f"{name}.md"), DOCS / f"{name}.png")
            print(f"wrote docs/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
