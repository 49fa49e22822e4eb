"""What the subcommands share: parsers that complain in one line, options for loading a model."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stateline.files import BUNDLED_NAMES, bundled

if TYPE_CHECKING:
    from stateline.generation.tokenizer import Tokenizer
    from stateline.models import LanguageModel

#: What a model may be called, for help texts.
NAMED = f"a directory, a .gguf file, a name on the Hugging Face Hub, {BUNDLED_NAMES}"
Later = Callable[[argparse.ArgumentParser], None]

WEIGHTS = ("bf16", "int8", "int4")
DTYPES = ("float32", "bfloat16", "float16", "float64")
CACHES = ("bfloat16", "float16")
STATES = ("bfloat16",)


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """argparse, except that errors are raised and that arguments may be added when the command is chosen.

    `later`: adds arguments whose definition costs an import; called once, before this parser is used.
    """

    def __init__(self, *, later: Later | None = None, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self._later = later

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, once `later` has run; but raises for what it does not know, in the name of this subcommand."""
        later, self._later = self._later, None
        if later is not None:
            later(self)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message} ({self.prog} --help shows how)")


def new_parser(
    commands: argparse._SubParsersAction[Parser] | None,
    name: str,
    description: str,
    epilog: str,
    *,
    later: Later | None = None,
    summary: str | None = None,
) -> Parser:
    """A parser with `--debug`; a subcommand's if `commands` is given, listed there with its `summary`."""
    if commands is None:
        parser = Parser(prog=name, description=description, epilog=epilog, later=later)
    else:
        parser = commands.add_parser(name, description=description, epilog=epilog, later=later, help=summary)
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --weights, --threads, --room, --cache-dtype, --state-dtype."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", help='e.g. "cpu", "cuda:0" (default: cpu)')
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    bits.add_argument("--weights", choices=WEIGHTS, help="pack the matrices to so many bits: faster token by token")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    group.add_argument(
        "--room", type=positive, metavar="N", help="tokens to have room for, if the model's attention keeps all"
    )
    group.add_argument("--cache-dtype", choices=CACHES, help="what attention keeps tokens in (default: float32)")
    group.add_argument("--state-dtype", choices=STATES, help="what Mamba-2 keeps its state in (default: float32)")


def load_model(options: argparse.Namespace) -> LanguageModel:
    """The model that `options.model`, with the options of `add_model_options`, asks for."""
    import torch

    import stateline

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device is not None:
        check_device(options.device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = stateline.load(source_of(options.model), device=options.device, dtype=dtype)
    model.max_tokens = options.room
    if options.cache_dtype is not None:
        model.cache_dtype = options.cache_dtype
    if options.state_dtype is not None:
        model.state_dtype = options.state_dtype
    return model if options.weights is None else stateline.prepare_for_decode(model, options.weights)


def check_device(name: str) -> None:
    """Raise UsageError unless tensors can be made on this device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by device
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"--device {name} cannot be used here ({reason})") from error


def source_of(model: str) -> str:
    """What to load for a name: itself, or for a training run the model it keeps."""
    kept = Path(model).expanduser() / "model"
    if bundled(model) is not None:
        return model
    return str(kept) if (kept / "config.json").is_file() and not (kept.parent / "config.json").exists() else model


def directory_of(model: str) -> Path:
    """Where a model's files lie: one that ships, by name; a directory; or a model of the Hub, "organisation/model"."""
    from stateline.interop import resolve

    return bundled(model) or resolve(source_of(model))


def tokenizer_of(model: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies beside a model's weights, or in its GGUF file."""
    from stateline.generation import load_tokenizer
    from stateline.interop.gguf_read import is_file

    home = directory_of(model)
    if not is_file(home):
        return load_tokenizer(home, vocab_size)
    with tempfile.TemporaryDirectory() as aside:
        unpack_tokenizer(home, Path(aside), vocab_size, "Texts need one: take a file with its vocabulary in it.")
        return load_tokenizer(aside, vocab_size)


def unpack_tokenizer(file: Path, directory: Path, vocab_size: int, remedy: str) -> None:
    """Put a GGUF file's tokenizer into a directory. Raises CheckpointError with `remedy` if a model needs it, and there
    is none."""
    from stateline.generation.tokenizer import BYTES
    from stateline.interop import CheckpointError
    from stateline.interop.gguf_read import write_tokenizer

    write_tokenizer(file, directory)
    if vocab_size != BYTES and not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{file} holds no tokenizer, and its model has {vocab_size} ids. {remedy}")


def positive(text: str) -> int:
    """A whole number from 1, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value
