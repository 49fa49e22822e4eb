"""What `make demo` shows: the bundled model writes, a small one learns real text in about two minutes, and writes too.

Only the core dependencies are used. Every step is the command a user would type.
"""

from __future__ import annotations

import importlib.resources
import shutil
import sys
import tempfile
import time
from pathlib import Path

from stateline.cli import main


def show(*arguments: str) -> None:
    """Print a command and run it; stop if it fails."""
    quoted = [f'"{a}"' if " " in a else a for a in arguments]
    print(f"\n$ stateline {' '.join(quoted)}", flush=True)
    began = time.perf_counter()
    if code := main(list(arguments)):
        sys.exit(code)
    print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)


def demo(folder: Path) -> None:
    """Generate, train, generate."""
    excerpt = importlib.resources.files("stateline").joinpath("bundled/excerpt/train.txt")
    show("explain")
    show("generate", "My fellow citizens", "--echo", "--max-tokens", "300", "--seed", "1")
    shutil.copy(str(excerpt), folder / "speeches.txt")
    run = str(folder / "run")
    show("train", str(folder / "speeches.txt"), "--out", run, "--size", "tiny", "--steps", "300", "--batch-size", "16",
         "--context", "128", "--sample-every", "100", "--eval-every", "100")  # fmt: skip
    show("generate", "--model", run, "My fellow citizens", "--echo", "--max-tokens", "200", "--seed", "1")
    print("\nThat was a model of 80,000 numbers after 300 steps. Give it your own text and more time:")
    print("  .venv/bin/stateline train my_text.txt --out runs/mine --size small --minutes 30")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        demo(Path(name))
