"""The `stateline` command: one subcommand a file; torch is imported by the one that runs, so that help comes at once.

Exit codes: 0 done, 2 bad usage or input (one line on stderr; `--debug` shows the traceback), 130 interrupted,
141 the reader of the output went away.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from stateline.cli import bench, classify, convert, eval, explain, filter, generate, info, tokenize, train
from stateline.cli.parser import Parser, UsageError, new_parser

COMMANDS = (train, tokenize, generate, eval, classify, filter, bench, convert, info, explain)

#: What a user's input can cause; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)

DESCRIPTION = "State space sequence models: train one on your text, let it write, on any machine, in constant memory."
EPILOG = """\
examples:
  stateline generate "My fellow citizens"         the bundled model goes on
  stateline generate 明月 --model bundled-zh       the one of Chinese poems does
  stateline train book.txt --out runs/book        train your own on a text or a folder
  stateline generate "Once" --model runs/book     and let it write
  stateline classify train gestures.csv --out runs/gestures   and tell signals apart
  stateline filter sensor.csv --forecast 24       take out the noise, look ahead
  stateline <command> --help                      more, with examples
"""


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = new_parser(None, "stateline", DESCRIPTION, EPILOG)
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; None: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as stop:
        if str(stop):  # training says how to go on
            print(f"stateline: {stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _abandon_output()
        return 141
    except USER_ERRORS as error:
        if "--debug" in arguments:
            raise
        _complain(error)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, say, which the error is about; what is left cannot be written
            _abandon_output()
        return 2


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        import stateline

        print(f"stateline {stateline.__version__}")
        return 0
    if options.command is None:
        raise UsageError("no command given; stateline --help lists them")
    return int(options.run(options) or 0)


def _complain(error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    print(f"stateline: error: {text}", file=sys.stderr)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"stateline: note: {message}", file=sys.stderr)


def _abandon_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain too."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is no file, as under a test
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # lives as long as the process
