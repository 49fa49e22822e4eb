"""Make the record of docs/steer_a_system.md, and draw its picture from what the code of that page makes.

    python scripts/steering.py                       # runs the page's code and draws docs/steer_a_system.png
    python scripts/steering.py --data                # first makes docs/hair_dryer.csv anew
    python scripts/steering.py --data --archives D   # from the package that lies in the folder D

    hair_dryer   heater and air of a laboratory's hair dryer, Ljung 1987: an example of SLICOT (Debian's libslicot-doc;
                 the same file comes with SLICOT-Reference, BSD-3-Clause)

Needs matplotlib and the extra: pip install 'stateline[classical,plot]'.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE, PICTURE, RECORD = DOCS / "steer_a_system.md", DOCS / "steer_a_system.png", DOCS / "hair_dryer.csv"
sys.path.insert(0, str(ROOT / "scripts"))  # also when it is imported from elsewhere

from archives import Archive, DataError, debian_files  # noqa: E402  # needs the path above
from filtering import run  # noqa: E402

SLICOT = Archive(
    "apt",
    "libslicot-doc",
    "5.0+20101122-4",
    "libslicot-doc_5.0+20101122-4_all.deb",
    "cc676d85124d1434522554ac8382171a9de2430990a78e6944f0418d6bc717f5",
)
EXAMPLE = "usr/share/doc/libslicot-doc/examples/fortran77/IB01BD.dat.gz"
HEADER = 3  # lines before the numbers: all inputs, then all outputs
STEPS, STEP = 1000, 0.08  # seconds
#: Ways to steer, by the page's name of what each made.
WAYS = (
    ("alone", "tab:orange", "set and left alone"),
    ("free", "tab:green", "lqg"),
    ("held", "tab:blue", "within limits, goals known ahead"),
)


def hair_dryer(package: bytes) -> str:
    """The CSV text: seconds, and what lay at the heater and came from the thermocouple then, in volts."""
    lines = gzip.decompress(debian_files(package)[EXAMPLE]).decode().splitlines()
    numbers = " ".join(lines[HEADER:]).split()
    if len(numbers) != 2 * STEPS:
        raise DataError(f"{EXAMPLE} holds {len(numbers)} numbers, expected {STEPS} inputs and as many outputs.")
    rows = zip(numbers[:STEPS], numbers[STEPS:], strict=True)
    return "seconds,heater,air\n" + "".join(f"{STEP * t:.2f},{u},{y}\n" for t, (u, y) in enumerate(rows))


def make_data(archives: Path | None) -> None:
    """Write the CSV file that lies beside the page."""
    with tempfile.TemporaryDirectory() as scratch:
        RECORD.write_text(hair_dryer(SLICOT.fetch(archives, Path(scratch))), encoding="utf-8")
    print(f"wrote docs/{RECORD.name}: {STEPS} rows")


def draw(pyplot: Any, made: dict[str, Any], out: Path) -> None:
    """The half that the model never saw as it was foreseen, and steered: the air, how far off it is, the heater."""
    count, start = len(made["goal"]), made["start"]
    seconds = STEP * torch.arange(count)
    mean, low, high, goal, measured = (
        (x[-count:] + start.y_mean)[:, 0]
        for x in (made["ahead"].mean, made["low"], made["high"], made["goal"], made["air"])
    )
    figure, axes = pyplot.subplots(4, 1, figsize=(9, 10.5), layout="constrained", sharex=True)
    axes[0].fill_between(seconds, low, high, color="tab:blue", alpha=0.25, linewidth=0, label="95 %")
    axes[0].plot(seconds, mean, color="tab:blue", linewidth=1, label="from the heater alone")
    axes[0].plot(seconds, measured, ".", color="black", markersize=2.5, label="measured")
    axes[1].plot(seconds, goal, color="0.6", linewidth=1.5, drawstyle="steps-post", label="goal")
    for name, color, words in WAYS:
        air, heater = (made[name] + torch.cat([start.y_mean, start.u_mean])).unbind(1)
        axes[1].plot(seconds, air, color=color, linewidth=1.1, label=words)
        axes[2].plot(seconds, air - goal, color=color, linewidth=1.1)
        axes[3].plot(seconds, heater, color=color, linewidth=1.1, drawstyle="steps-post")
    axes[2].axhline(0, color="0.6", linewidth=1)
    for end in ("least", "most"):
        axes[3].axhline(float(made[end] + start.u_mean), color="tab:red", linestyle=":", linewidth=1.2)
    titles = (
        "forty seconds that the model never saw, foreseen",
        "the same forty seconds, steered",
        "how far from the goal: the drift, and what is left of it",
        "what the heater gets; between the dotted lines is what was tried",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel("heater, V" if axis is axes[3] else "air − goal, V" if axis is axes[2] else "air, V")
    axes[0].set_ylim(3, 7.2)
    axes[1].set_ylim(3.6, 6.4)
    axes[2].set_ylim(-0.35, 0.35)
    axes[3].set(xlabel="seconds", xlim=(0, STEP * count))
    for axis in axes[:2]:
        axis.legend(fontsize="small", ncols=4, loc="upper center")
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="make the CSV file anew")
    parser.add_argument("--archives", type=Path, help="a folder of packages, looked into before asking apt")
    options = parser.parse_args(argv)
    if options.data:
        try:
            make_data(options.archives)
        except DataError as error:
            print(f"steering: {error}", file=sys.stderr)
            return 1
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw(pyplot, run(PAGE), PICTURE)
    print(f"wrote docs/{PICTURE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
