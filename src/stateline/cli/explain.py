"""`stateline explain`: which back end each operation takes on this machine, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from stateline.cli.parser import Parser, new_parser

DEVICES = ("cpu", "cuda", "mps", "xpu")

DESCRIPTION = "Say which back end each operation would take here and why, and what the machine offers."
EPILOG = """\
examples:
  stateline explain                    every operation, for CPU tensors
  stateline explain selective_scan --device cuda
  stateline explain --json             for scripts and bug reports
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    summary = "which back end each operation takes here, and why"
    parser = new_parser(commands, "explain", DESCRIPTION, EPILOG, summary=summary)
    parser.set_defaults(run=run)
    parser.add_argument("op", nargs="*", help="operations (default: all)")
    parser.add_argument("--device", default="cpu", help="where the tensors would be (default: cpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the choices."""
    from stateline import backends, checks, ops

    names = options.op or list(ops.__all__)
    for name in names:
        checks.choice("explain", "the operation", name, tuple(ops.__all__))
    device = options.device.partition(":")[0]
    checks.choice("explain", "--device", device, DEVICES)
    choices = {name: backends.choose(name, device) for name in names}
    facts = machine()
    if options.json:
        told = {name: {"backend": c.name, "rejected": c.rejected} for name, c in choices.items()}
        print(json.dumps({"ops": told, "machine": facts}, indent=2))
        return 0
    width = max(map(len, choices))
    for name, choice in choices.items():
        print(f"{name:<{width}}  {choice.name}")
        for other, why in choice.rejected.items():
            print(f"{'':<{width}}    not {other}: {why}")
    print()
    show(facts)
    return 0


def machine() -> dict[str, Any]:
    """What decides how fast things run here."""
    import os
    import platform
    from importlib.metadata import version
    from importlib.util import find_spec

    import torch

    import stateline
    from stateline import backends

    problem = backends.native_problem()
    return {
        "stateline": stateline.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native library": "loaded" if problem is None else f"absent: {problem}",
        "instructions": _isa() if problem is None else "none",
        "triton": version("triton") if find_spec("triton") else "absent",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _isa() -> str:
    """The instruction set the native library chose (STATELINE_ISA forces one)."""
    import ctypes

    from stateline import backends

    function = backends.load_native().sl_isa
    function.restype = ctypes.c_char_p
    return str((function() or b"").decode())


def show(facts: dict[str, Any]) -> None:
    """Print facts as two columns; a dict becomes an indented block."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:" if value else f"{name:<{width + 2}}  none")
            for key, inner in value.items():
                print(f"  {key:<{width}}  {_shown(inner)}")
        else:
            print(f"{name:<{width + 2}}  {_shown(value)}")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
