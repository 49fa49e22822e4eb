"""`stateline eval`: bits per byte and perplexity of a model on texts."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING

from stateline.cli.parser import (
    NAMED,
    Parser,
    UsageError,
    add_model_options,
    load_model,
    new_parser,
    positive,
    tokenizer_of,
)

if TYPE_CHECKING:
    from stateline.apps.evaluate import EvalConfig, Evaluator, Report, Score
    from stateline.training.progress import Reporter

MODES = ("document", "window", "sliding")

DESCRIPTION = "Score texts in bits per byte and perplexity: how well a model predicts what it did not write."
EPILOG = """\
examples:
  stateline eval bundled letters.txt
  stateline eval runs/book chapters/ --json                    every .txt, .jsonl and .ndjson file of a folder
  stateline eval runs/book news.jsonl --field body             one document a line of JSON
  stateline eval runs/book news.jsonl.zst book.txt.gz          compressed files are decompressed
  stateline eval runs/book messages.txt --lines                one document a line of text
  stateline eval runs/book long.txt --mode window --context 1024
  stateline eval runs/book long.txt --mode sliding --context 1024 --stride 256
  stateline eval mamba-130m big.txt --limit 1000000 --dtype bfloat16

Lower is better. Bits per byte compare models of any vocabulary, and compressors; perplexity per token compares
models of one vocabulary only. By default each document is read from a fresh state to its end, so that every byte is
predicted from all before it, in constant memory. A window forgets what came before it: its figures are those of a
model with that context. The interval holds the figure for all text of the kind with 95 % confidence.
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "eval", DESCRIPTION, EPILOG, summary="score texts in bits per byte and perplexity")
    parser.set_defaults(run=run)
    parser.add_argument("model", help=NAMED)
    parser.add_argument("files", nargs="+", metavar="FILE", help="texts, JSON lines, or folders of them")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    texts = parser.add_argument_group("what a document is")
    texts.add_argument("--lines", action="store_true", help="each line of a text file (default: the file)")
    texts.add_argument("--field", default="text", help="the field of JSON lines that holds the text (default: text)")
    texts.add_argument("--force-binary", action="store_true", help="read files even if they are not UTF-8 text")
    texts.add_argument("--limit", type=positive, metavar="BYTES", help="stop after this much text, over all files")
    context = parser.add_argument_group("what the model sees of it")
    context.add_argument("--mode", choices=MODES, default=MODES[0], help="(default: document)")
    context.add_argument("--context", type=positive, metavar="N", help="tokens of a window, read from a fresh state")
    context.add_argument("--stride", type=positive, metavar="S", help="sliding: tokens between the windows' starts")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Print the figures; after Ctrl-C, those of what was read."""
    from stateline.apps.evaluate import Corpus, Evaluator
    from stateline.training.progress import Reporter

    config = _config(options)
    corpus = Corpus.of(
        options.files,
        lines=options.lines,
        field=options.field,
        limit=options.limit,
        force_binary=options.force_binary,
    )
    model = load_model(options)
    evaluator = Evaluator(model, tokenizer_of(options.model, model.config.vocab_size), config)
    code = 0
    with Reporter("auto") as reporter:
        progress = _Progress(reporter, corpus.size)
        try:
            evaluator.run(corpus.documents(), progress)
        except KeyboardInterrupt:
            code = 130
        progress.end(evaluator)
    report = evaluator.report()
    if options.json:
        print(json.dumps(_finite(report.to_dict() | {"model": options.model, "complete": code == 0}), indent=2))
    else:
        _show(report)
    if code:
        print("stateline: interrupted; the figures are those of the text read until then", file=sys.stderr)
    return code


def _config(options: argparse.Namespace) -> EvalConfig:
    from stateline.apps.evaluate import EvalConfig

    if options.mode != "document" and options.context is None:
        raise UsageError(f"--mode {options.mode} needs --context N, in tokens")
    if options.mode == "sliding" and options.stride is None:
        raise UsageError("--mode sliding needs --stride S, in tokens, at most --context")
    return EvalConfig(options.mode, options.context, options.stride)


class _Progress:
    """Share, speed and the figure so far."""

    def __init__(self, reporter: Reporter, size: int) -> None:
        self.reporter, self.size, self.begun = reporter, size, time.perf_counter()

    def __call__(self, read: int, score: Score, *, last: bool = False) -> None:
        from stateline.training.progress import Meter

        speed = score.tokens / max(1e-9, time.perf_counter() - self.begun)
        step = f"{read / 1000:,.0f} of {self.size / 1000:,.0f} kB"
        bits = None if math.isnan(score.bits_per_byte) else score.bits_per_byte
        self.reporter.show(Meter(bits, None, speed), step, min(1.0, read / self.size), last=last)

    def end(self, evaluator: Evaluator) -> None:
        """The last line."""
        total = evaluator.report().total
        self(total.bytes, total, last=True)


def _show(report: Report) -> None:
    """A row a file, and all of them if there are several."""
    rows = [("file", "documents", "bytes", "tokens", "bits/byte", "95 % interval", "perplexity")]
    scores = report.files if len(report.files) == 1 else [*report.files, report.total]
    for score in scores:
        low, high = score.interval or (math.nan, math.nan)
        between = f"{low:.3f} to {high:.3f}" if score.interval else "too little text"
        counts = (f"{n:,}" for n in (score.documents, score.bytes, score.tokens))
        rows.append((score.name, *counts, f"{score.bits_per_byte:.4f}", between, f"{score.perplexity:,.3f}"))  # type: ignore[arg-type]  # three counts
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        print("  ".join([f"{name:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))]))
    print()
    print(_explanation(report))
    for note in report.notes:
        print(f"note: {note}")


def _explanation(report: Report) -> str:
    config = report.config
    seen = {
        "document": "every byte from all before it in its document",
        "window": f"windows of {config.context:,} tokens, each from a fresh state" if config.context else "",
        "sliding": f"every token from more than {(config.context or 0) - config.step:,} and at most"
        f" {config.context or 0:,} tokens before it, or from its document's start",
    }[config.mode]
    return f"{seen}; interval from {report.total.units}"


def _finite(value: object) -> object:
    """NaN as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
