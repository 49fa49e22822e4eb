"""`stateline train`: a model of your own text; the options are the training package's."""

from __future__ import annotations

import argparse

from stateline.cli.parser import Parser, new_parser

DESCRIPTION = "Train a byte-level Mamba language model on a text file or a folder of them."
EPILOG = """\
examples:
  stateline train book.txt                                  checkpoints and samples go to runs/book
  stateline train letters/ --out runs/letters --steps 2000  a folder; Ctrl-C saves and stops
  stateline train letters/ --out runs/letters --resume      go on from the last checkpoint
  stateline generate "Dear" --model runs/letters            let it write
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand; its options are added once it is chosen."""
    summary = "train a model on your text"
    parser = new_parser(commands, "train", DESCRIPTION, EPILOG, later=_add_options, summary=summary)
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from stateline import training

    training.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train as asked."""
    from stateline import training

    training.train(training.from_arguments(options))
    return 0
