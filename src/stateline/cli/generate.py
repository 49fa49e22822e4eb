"""`stateline generate`: text that continues a prompt, as it is written."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from stateline.generation import SamplingConfig, Stream
    from stateline.training.signals import StopSignals

MAX_TOKENS = 256
#: Livelier than greedy, safer than the model's own distribution: the usual choice of text generators.
TEMPERATURE = 0.8
#: Minutes between the times an unfinished stream is saved.
SAVE_EVERY = 10.0
#: Fields of SamplingConfig that are flags.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window", "seed")

DESCRIPTION = "Continue a prompt with a model's text, streamed to the terminal."
EPILOG = """\
examples:
  stateline generate "My fellow citizens"
  stateline generate 春 --model bundled-zh                        a poem; needs the package tokenizers
  stateline generate "Once upon" --model runs/book --max-tokens 500 --seed 1 --echo
  stateline generate "The year" --greedy --stop "." --stats --weights int8
  stateline generate --prompt-file book.txt --max-tokens 100     a prompt of any size, in constant memory
  cat notes.txt | stateline generate --prompt-file -
  stateline generate "We" --endless | head -c 1000000            as long as you let it
  stateline generate "We" --endless --save-stream day.stream     until Ctrl-C, which saves; and every 10 minutes
  stateline generate --load-stream day.stream --save-stream day.stream --endless     go on, byte for byte
  stateline generate "But now" --load-stream day.stream          go on from another text
  stateline generate --batch "One" "Two" "Three"                 one JSON object a line
  stateline generate --batch --prompt-file prompts.txt           one prompt a line

An empty prompt starts from a newline. The same --seed gives the same text.

With --save-stream the text is not at its end: characters and stop strings that are cut short wait in the file, and no
newline is added unless to a terminal, so that the outputs put together are what one run would have written. A loaded
stream keeps its own sampling, random numbers included: a flag that asks for another is refused.
"""


class OutputError(OSError):
    """The output takes no more: a full disk, a terminal that is gone."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "generate", DESCRIPTION, EPILOG, summary="continue a prompt with a model's text")
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="*", help="what to continue; several only with --batch")
    parser.add_argument("--model", default="bundled", help=f"{NAMED} (default: bundled)")
    parser.add_argument("--prompt-file", metavar="FILE", help='read the prompt from a file, "-" for stdin')
    parser.add_argument("--batch", action="store_true", help="several prompts: arguments, or lines of --prompt-file")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="prompts at a time (default: 16)")
    parser.add_argument("--echo", action="store_true", help="write the prompt before its continuation")
    parser.add_argument("--stats", action="store_true", help="tokens per second, on stderr")
    length = parser.add_argument_group("how long")
    either = length.add_mutually_exclusive_group()
    either.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"(default: {MAX_TOKENS})")
    either.add_argument("--endless", action="store_true", help="go on until interrupted, past any end of text")
    length.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    kept = parser.add_argument_group("days on end")
    kept.add_argument("--save-stream", metavar="FILE", help="keep the stream when the text ends, however it does")
    kept.add_argument(
        "--save-every",
        type=_minutes,
        metavar="MINUTES",
        help=f"keep it in between too, for a power cut; 0: only at the end (default: {SAVE_EVERY:g})",
    )
    kept.add_argument("--load-stream", metavar="FILE", help="go on with a kept stream; a prompt is fed to it first")
    _add_sampling(parser)
    add_model_options(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which tokens")
    heat = group.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, metavar="T", help=f"(default: {TEMPERATURE})")
    heat.add_argument(
        "--greedy", dest="temperature", action="store_const", const=0.0, help="always the most likely token"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="from the K most likely only")
    group.add_argument("--top-p", type=float, metavar="P", help="from the fewest that hold this probability")
    group.add_argument("--min-p", type=float, metavar="P", help="at least P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids recent tokens")
    group.add_argument("--repetition-window", type=int, metavar="N", help="recent means the last N (default: 64)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")


def run(options: argparse.Namespace) -> int:
    """Generate as asked; the options are checked before the model is loaded."""
    from stateline.generation import stop_strings

    if options.max_tokens < 0:
        raise UsageError(f"--max-tokens is {options.max_tokens}, expected a whole number from 0")
    sampling = _sampling(options)
    stop_strings(options.stop)
    if options.save_every is not None and options.save_stream is None:
        raise UsageError("--save-every goes with --save-stream FILE")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" and goes on
    return _batch(options, sampling) if options.batch else _single(options, sampling)


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the command line names."""
    return {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}


def _sampling(options: argparse.Namespace) -> SamplingConfig:
    from stateline.generation import SamplingConfig

    return SamplingConfig(**{"temperature": TEMPERATURE, **_asked(options)})


def _single(options: argparse.Namespace, sampling: SamplingConfig) -> int:
    from stateline.training.signals import StopSignals

    prompt = _prompt(options)
    _check_target(options.save_stream)
    stream = _open(options, sampling)
    if options.save_stream is None:
        _write(stream, prompt, options, StopSignals())  # not entered: Ctrl-C ends at once
        return 0
    with StopSignals() as stop:
        try:
            left = _write(stream, prompt, options, stop)
        except BrokenPipeError:
            stream.save(options.save_stream)
            raise
        except OutputError as error:
            stream.save(options.save_stream)
            raise OutputError(f"{error}; go on with --load-stream {options.save_stream}") from error
        stream.save(options.save_stream)
    if stop:
        raise KeyboardInterrupt(f"{left}go on with --load-stream {options.save_stream}")
    return 0


def _open(options: argparse.Namespace, sampling: SamplingConfig) -> Stream:
    """A new stream, or the one to go on with, which must be sampled as asked."""
    from stateline.generation import Stream

    path = None if options.load_stream is None else _existing(options.load_stream)
    model = load_model(options)
    tokenizer = tokenizer_of(options.model, model.config.vocab_size)
    if path is None:
        return Stream(model, sampling=sampling, tokenizer=tokenizer)
    stream = Stream.load(path, model, tokenizer)
    for name, value in _asked(options).items():
        own = getattr(stream.sampler.config, name)
        if own != value:
            flag = name.replace("_", "-")
            raise UsageError(f"the stream in {path} was begun with {flag} {own}, not {value}; it keeps its sampling")
    return stream


def _write(stream: Stream, prompt: Any, options: argparse.Namespace, stop: StopSignals) -> str:
    """Feed the prompt and write the text, until `stop`; what a stop left unread is returned as a remark."""
    started, before = time.perf_counter(), stream.length
    save_if_due = _Saves(options)
    pieces = stream.read(prompt)
    while not stop and (ids := next(pieces, None)):
        stream.feed_pieces([ids])
    read, read_at, drawn = stream.length - before, time.perf_counter(), stream.sampler.drawn
    if stop:
        return f"stopped after {read:,} tokens of the prompt, the rest is yours to give; "
    if options.echo:
        _show(prompt.decode("utf-8", "replace"))
    length = None if options.endless else options.max_tokens
    ends = options.save_stream is None or sys.stdout.isatty()
    final = options.save_stream is None
    try:
        for piece in stream.text(length, stop=options.stop, ignore_end=options.endless, final=final):
            _show(piece)
            if stop:
                break
            save_if_due(stream)
        _show("\n" if ends else "")
    except (KeyboardInterrupt, ValueError):  # an interrupted text still ends its line, before any complaint
        _show("\n")
        raise
    finally:
        if options.stats:
            made = stream.sampler.drawn - drawn
            _report(stream, (read, read_at - started), (made, time.perf_counter() - read_at))
    return ""


class _Saves:
    """Saves a stream that is being written, every so often, so that a power cut costs no more than that."""

    def __init__(self, options: argparse.Namespace) -> None:
        minutes = SAVE_EVERY if options.save_every is None else options.save_every
        self.path = options.save_stream
        self.every = 60 * minutes if self.path is not None and minutes else math.inf
        self.due = time.monotonic() + self.every

    def __call__(self, stream: Stream) -> None:
        if time.monotonic() < self.due:
            return
        try:
            stream.save(self.path)
        except OSError as error:  # the text is better off going on: the disk may have room again at its end
            warnings.warn(f"{error} The text goes on, unsaved until the next try.", RuntimeWarning, stacklevel=2)
        self.due = time.monotonic() + self.every


def _minutes(text: str) -> float:
    """Minutes from 0, for `type=`."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes from 0")
    return value


def _check_target(name: str | None) -> None:
    """Complain before any work about a place that a stream cannot be saved in, and about files that are no streams."""
    from stateline.generation.saved import is_stream

    if name is None:
        return
    path = Path(name)
    if not path.parent.is_dir():
        raise UsageError(f"--save-stream {name}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--save-stream {name}: nothing can be written in {path.parent}")
    if path.is_dir() or (path.exists() and not is_stream(path)):
        raise UsageError(f"--save-stream {name} exists and is no saved stream; it is not replaced")


def _prompt(options: argparse.Namespace) -> Any:
    if len(options.prompt) > 1:
        raise UsageError(f"{len(options.prompt)} prompts given; quote a prompt of several words, or add --batch")
    if options.prompt_file is None:
        return os.fsencode(options.prompt[0]) if options.prompt else b""  # bytes that are no UTF-8 pass unchanged
    if options.prompt:
        raise UsageError("a prompt and --prompt-file were both given")
    if options.echo:
        raise UsageError("--echo is for a prompt on the command line, not for --prompt-file")
    return sys.stdin.buffer if options.prompt_file == "-" else _existing(options.prompt_file)


def _batch(options: argparse.Namespace, sampling: SamplingConfig) -> int:
    from stateline.generation import Engine

    for flag in ("endless", "save_stream", "load_stream"):
        if getattr(options, flag):
            raise UsageError(f"--{flag.replace('_', '-')} goes with one prompt, not with --batch")
    prompts = _prompts(options)
    model = load_model(options)
    tokenizer = tokenizer_of(options.model, model.config.vocab_size)
    engine = Engine(model, max_batch=options.batch_size, tokenizer=tokenizer)
    started = time.perf_counter()
    done = 0
    for group in _groups(prompts, options.batch_size):
        seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + done)
        texts = engine.generate(group, max_tokens=options.max_tokens, sampling=seeded, stop=options.stop)
        for prompt, text in zip(group, texts, strict=True):
            shown = prompt.decode("utf-8", "replace")
            line = {"prompt": shown, "text": shown + text if options.echo else text}
            _show(json.dumps(line, ensure_ascii=False) + "\n")
        done += len(group)
    if options.stats:
        took = time.perf_counter() - started
        print(f"{done} prompts in {took:.2f} s ({done / took:,.2f} prompts/s)", file=sys.stderr)
    return 0


def _prompts(options: argparse.Namespace) -> Iterator[bytes]:
    if options.prompt_file is None:
        if not options.prompt:
            raise UsageError("--batch needs prompts, or --prompt-file with one a line")
        return (os.fsencode(p) for p in options.prompt)
    if options.prompt:
        raise UsageError("prompts and --prompt-file were both given")
    path = None if options.prompt_file == "-" else _existing(options.prompt_file)
    return _lines(path)


def _lines(path: Path | None) -> Iterator[bytes]:
    with sys.stdin.buffer if path is None else path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def _groups(prompts: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    for prompt in prompts:
        group.append(prompt)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _existing(name: str) -> Path:
    """A readable file's path; the complaint comes before a model is loaded."""
    path = Path(name)
    with path.open("rb"):
        return path


def _show(text: str) -> None:
    """Write text at once; on a terminal without the characters that would steer it, which a model may well produce."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the text cannot be written ({error.strerror or error})") from error


def _report(stream: Stream, prompt: tuple[int, float], text: tuple[int, float]) -> None:
    """Print how many tokens were read and made, each with its seconds."""
    from stateline import state

    (read, reading), (made, took) = prompt, text
    print(
        f"prompt {read:,} tokens in {reading:.2f} s ({read / max(reading, 1e-9):,.0f} tokens/s) · "
        f"generated {made:,} tokens in {took:.2f} s ({made / max(took, 1e-9):,.0f} tokens/s) · "
        f"state {state.num_bytes(stream.state) / 1024:,.0f} KiB at any length",
        file=sys.stderr,
    )
