"""`stateline info`: what a model is and what it would cost here."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from stateline.cli.convert import size_of
from stateline.cli.explain import machine, show
from stateline.cli.parser import NAMED, Parser, directory_of, new_parser, source_of

if TYPE_CHECKING:
    from stateline.models import LanguageModel

DESCRIPTION = "Describe a model: its format, sizes, data types, state, provenance, and the machine it would run on."
EPILOG = """\
examples:
  stateline info                       the bundled model of English
  stateline info bundled-zh            that of Chinese poems
  stateline info runs/book
  stateline info mamba-130m --json     for scripts
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "info", DESCRIPTION, EPILOG, summary="describe a model or checkpoint")
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", default="bundled", help=f"{NAMED} (default: bundled)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the facts."""
    facts = describe(options.model)
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        show(facts)
    return 0


def describe(name: str) -> dict[str, Any]:
    """Facts about a model, ready for JSON."""
    import stateline
    from stateline.interop import detect

    model = stateline.load(source_of(name))
    home = directory_of(name)
    weights: Counter[str] = Counter()
    for p in model.parameters():
        weights[str(p.dtype).removeprefix("torch.")] += p.numel()
    cards = [p.name for p in sorted(home.glob("*.md"))]
    return {
        "model": name,
        "format": detect(home),
        "directory": str(home),
        "parameters": model.num_parameters(),
        "dtypes": dict(weights),
        "bytes on disk": size_of(home),
        "bytes in memory": sum(p.numel() * p.element_size() for p in model.parameters()),
        "state bytes per sequence": _state_bytes(model),
        "card": cards[0] if cards else None,
        "config": model.config.to_dict(),
        "metadata": model.metadata,
        "machine": machine(),
    }


def _state_bytes(model: LanguageModel) -> int | str:
    """Memory of one sequence's state; where attention keeps all tokens and no bound is set, as a sum that says so."""
    from stateline import state

    attention = model.config.attn_cfg
    if not model.config.attn_layer_idx or attention.get("window") or attention.get("max_tokens"):
        return state.num_bytes(model.init_state(1))
    one, two = (state.num_bytes(model.init_state(1, max_tokens=n)) for n in (1, 2))
    return f"{2 * one - two:,} and {two - one:,} a token"
