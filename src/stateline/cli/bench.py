"""`stateline bench`: what this machine can do, and what share of it a model gets."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateline.cli.explain import machine
from stateline.cli.parser import NAMED, Parser, new_parser, positive, source_of, tokenizer_of

if TYPE_CHECKING:
    from stateline.apps.bench import Effort, Row
    from stateline.models import LanguageModel

DESCRIPTION = "Measure this machine's processor and what a model makes of it: reading, writing, size, quality."
EPILOG = """\
examples:
  stateline bench                      a random Mamba of 130M parameters, about two minutes
  stateline bench --quick              a small one, some seconds: to see that all is well
  stateline bench --model runs/book    your own
  stateline bench --model hybrid --room 10000   one whose attention keeps every token
  stateline bench --threads 4 --json   for scripts and bug reports

prefill: tokens/s of reading a prompt, bound by arithmetic, with the share of the matrix rate it reaches.
decode: tokens/s of writing, bound by memory since each step reads all weights, with the share of the bandwidth.
lost: bits per byte above float32 on a packaged text. Shares are of limits measured in the same run; on a busy machine
both suffer. Times are medians.
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "bench", DESCRIPTION, EPILOG, summary="measure this machine's processor")
    parser.set_defaults(run=run)
    parser.add_argument("--model", help=f"{NAMED} (default: random weights, 130M parameters)")
    parser.add_argument("--quick", action="store_true", help="a smaller random model, shorter measurements")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    room = "tokens to have room for, if the model's attention keeps all: 8192 and more"
    parser.add_argument("--room", type=positive, metavar="N", help=room)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Measure and print; after Ctrl-C, what was measured."""
    import torch

    from stateline.apps import bench

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    effort = bench.QUICK if options.quick else bench.Effort()
    model = _model(options, effort)
    facts: dict[str, Any] = {"machine": machine() | {"processor": processor()}, "complete": False}
    rows: list[Row] = []
    code = 0
    try:
        _measure(options, (model, effort), facts, rows)
    except KeyboardInterrupt:
        code = 130
    facts["rows"] = [row.to_dict() for row in rows]
    facts["complete"] = code == 0
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts, rows)
    if code:
        print("stateline: interrupted; the figures are those measured until then", file=sys.stderr)
    return code


def _model(options: argparse.Namespace, effort: Effort) -> LanguageModel:
    import torch

    import stateline
    from stateline.apps import bench

    if options.model is None:
        return bench.random_model(effort.model)
    model = stateline.load(source_of(options.model), dtype=torch.float32)
    model.max_tokens = options.room
    model.check_room(model.init_state(1), max(*bench.PREFILL, effort.text + 1))  # before any work
    return model


def _measure(
    options: argparse.Namespace, subject: tuple[LanguageModel, Effort], facts: dict[str, Any], rows: list[Row]
) -> None:
    """Fill in `facts` and `rows`, so that an interrupt leaves what is known."""
    import torch

    import stateline
    from stateline.apps import bench
    from stateline.training.progress import Meter, Reporter

    model, effort = subject
    scored = options.model or "bundled"
    judged = model if options.model else stateline.load("bundled", dtype=torch.float32)
    tokenizer = tokenizer_of(scored, judged.config.vocab_size)
    facts["model"] = {"name": options.model or "random weights", "parameters": model.num_parameters()}
    facts["model"] |= {"config": model.config.to_dict(), "quality of": scored}
    ways = bench.ways()
    steps = 1 + len(ways) * (len(bench.PREFILL) + len(bench.BATCHES) + 1)
    with Reporter("auto") as reporter:
        done = 0

        def tell(what: str) -> None:
            nonlocal done
            done += 1
            reporter.show(Meter(), what, done / steps, last=done == steps)

        reporter.show(Meter(), "limits of the machine", 0.0)
        found = bench.limits(effort)
        facts["limits"] = {"read bytes/s": found.bandwidth, "flop/s": found.rates}
        tell("limits of the machine")
        quality = bench.Quality(judged, tokenizer, effort)
        for way in ways:
            for number, (what, row) in enumerate(bench.measure(model, way, found, effort)):
                if number == 0:
                    rows.append(row)
                tell(what)
            quality.add(rows[-1])
            tell(f"{way}, quality")
    facts["missing"] = [] if len(ways) > len(bench.PLAIN) else list(bench.PREPARED)


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _show(facts: dict[str, Any], rows: list[Row]) -> None:
    about = facts["machine"]
    print(f"machine  {about['processor']}, {about['threads']} threads of {about['cpus']}, {about['instructions']}")
    print(f"         torch {about['torch']}, stateline {about['stateline']}, native library {about['native library']}")
    if "limits" not in facts:
        return
    rates = ", ".join(f"{rate / 1e9:,.0f} {dtype}" for dtype, rate in facts["limits"]["flop/s"].items())
    print(f"limits   reads {facts['limits']['read bytes/s'] / 1e9:,.1f} GB/s; matrix products {rates} GFLOP/s")
    model = facts["model"]
    print(f"model    {model['name']}, {model['parameters'] / 1e6:,.1f}M parameters; quality of {model['quality of']}\n")
    print("\n".join(table(rows)))
    if facts.get("missing"):
        print(f"\nnote: this release has no function for {', '.join(facts['missing'])} weights")


def table(rows: list[Row]) -> list[str]:
    """Lines of a table of rows."""
    from stateline.apps import bench

    head = ["weights", "MB", *(f"prefill {n:,}" for n in bench.PREFILL)]
    head += [*(f"decode ×{b}" for b in bench.BATCHES), "lost"]
    cells = [head]
    for row in rows:
        speeds = [_speed(row.prefill, row.prefill_share, n) for n in bench.PREFILL]
        speeds += [_speed(row.decode, row.decode_share, b) for b in bench.BATCHES]
        lost = "" if row.loss is None else f"{row.loss:+.4f}"
        if row.loss_interval and row.weights != "float32":
            lost += f" ± {(row.loss_interval[1] - row.loss_interval[0]) / 2:.4f}"
        cells.append([row.weights, f"{row.megabytes:,.1f}", *speeds, lost])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def _speed(speeds: dict[int, float], shares: dict[int, float], key: int) -> str:
    return f"{speeds[key]:,.0f} ({100 * shares[key]:.0f} %)" if key in speeds else ""
