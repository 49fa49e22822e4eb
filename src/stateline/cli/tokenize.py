"""`stateline tokenize`: text into the token shards that training reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stateline.cli.parser import Parser, new_parser

DESCRIPTION = """\
Prepare text for training: read, tokenize and store it once, as shards that are memory-mapped, for any number of runs.

`stateline train` does this by itself where it has to (compressed files, JSON lines, tokenizers); do it yourself to
share the result between runs or machines. Text is streamed, so its size does not matter. Ctrl-C keeps what is done, and
the same command goes on from there; once all is done, it has nothing to do."""
EPILOG = """\
what is read:
  a .txt file (or any other text), a folder searched for --pattern, JSON lines (.jsonl: one object with a text a line),
  each of them plain or compressed (.gz, .zst). A document is a file, or what stands between separators, or a record.

what is written to DIR:
  dataset.json      how many documents, tokens and bytes, from what, with SHA-256 of every other file
  tokens-*.bin      ids, uint8, uint16 or uint32
  documents.bin     where documents begin
  tokenizer.json    what made the ids (not for bytes)

examples:
  stateline tokenize book.txt --out book-tokens                             bytes: no tokenizer at all
  stateline tokenize web.jsonl.zst --out web-tokens --tokenizer bpe:8192    learn a BPE of 8192 ids first
  stateline tokenize news/ --pattern '*.txt.gz' --out news-tokens --tokenizer web-tokens/tokenizer.json
  stateline tokenize poems.txt --out poems --document-separator '\\n\\n\\n'   poems are apart by two empty lines
  stateline train web-tokens --out runs/web --packing documents             learn from it
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    summary = "prepare text as token shards for training"
    parser = new_parser(commands, "tokenize", DESCRIPTION, EPILOG, summary=summary)
    parser.set_defaults(run=run)
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="a text file, a folder, or JSON lines; plain, .gz or .zst")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="NAME",
        help="bytes (default), a tokenizer.json, or bpe:N, which learns N ids from INPUT and keeps them in DIR",
    )  # fmt: skip
    parser.add_argument("--pattern", default="*.txt", metavar="GLOB", help="which files of a folder (default: *.txt)")
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="field of JSON lines that holds the text (default: text)"
    )
    parser.add_argument(
        "--document-separator", metavar="TEXT", help=r"what stands between documents of a text file; \n is a line end"
    )
    parser.add_argument("--force-binary", action="store_true", help="read files even if they are not UTF-8 text")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that DIR holds")
    parser.add_argument("--json", action="store_true", help="print the sizes as one JSON object")
    parser.add_argument(
        "--progress", choices=("auto", "bar", "lines", "off"), default="auto",
        help="bar (needs tqdm), lines, or off (default: a bar on a terminal, lines elsewhere)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Prepare as asked."""
    from stateline.training.config import DataConfig
    from stateline.training.prepare import Request, prepare, summary

    names = ("tokenizer", "pattern", "text_field", "document_separator", "force_binary")
    config = DataConfig(path=options.input, **{name: getattr(options, name) for name in names})
    folder = Path(options.out)
    index = prepare(Request(Path(options.input), config), folder, progress=options.progress, replace=options.overwrite)
    if options.json:
        sizes = ("documents", "bytes", "tokens", "vocab_size", "dtype", "tokenizer", "digest")
        print(json.dumps({"folder": str(folder)} | {name: getattr(index, name) for name in sizes}, indent=2))
    else:
        print(f"{folder}: {summary(index)}, {len(index.shards)} shard(s) of {index.dtype}")
    return 0
