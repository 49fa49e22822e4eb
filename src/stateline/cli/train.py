"""`stateline train`: a model of your own text; the options are the training package's."""

from __future__ import annotations

import argparse

from stateline.cli.parser import Parser, new_parser

DESCRIPTION = """\
Train a Mamba language model on your text: files, folders or JSON lines, plain or compressed, as bytes or through a
tokenizer. Ctrl-C saves and stops; --resume goes on with the same bits."""
EPILOG = """\
examples:
  stateline train book.txt                                  checkpoints and samples go to runs/book
  stateline train letters/ --out runs/letters --steps 2000  a folder; Ctrl-C saves and stops
  stateline train letters/ --out runs/letters --resume      go on from the last checkpoint
  stateline train big.jsonl.zst --tokenizer bpe:8192        learns a tokenizer and prepares the data by itself
  stateline train corpus-tokens --out runs/corpus           on what stateline tokenize made
  stateline generate "Dear" --model runs/letters            let it write
  stateline train tales.txt --init-from bundled --lora 8    fine-tune: adapters only, merged when saved
  stateline train big.txt --schedule wsd --ema 0.999 --checkpoint-activations
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
    import stateline
    from stateline import training

    training.train(training.from_arguments(options), load=stateline.load)
    return 0
