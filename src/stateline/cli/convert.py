"""`stateline convert`: a checkpoint from one format to another."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from stateline.cli.parser import (
    DTYPES,
    NAMED,
    Parser,
    UsageError,
    directory_of,
    new_parser,
    positive,
    source_of,
    unpack_tokenizer,
)

FORMATS = ("stateline", "mamba_ssm", "huggingface")
PROGRAMS = ("export", "onnx")  # one file each, which runs and is not read back
GGUF = "gguf"
VLLM = "vllm"
QUANTISED = ("Q8_0", "Q4_0")
INT8 = "int8"  # how matrices may be stored, by this project's format alone; no dtype of a model
#: Files that belong to a checkpoint's tokenizer and go along.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
#: What a directory with a checkpoint may hold for --force to replace it; anything else there is somebody's work.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
BESIDE = ("config.json", "*.index.json", "README.md", "vocab.json", "merges.txt", "tokenizer.model", *TOKENIZER_FILES)
ASIDE = ".saving"  # of a save that was killed

DESCRIPTION = "Write a model in another format; which one it comes in is found out by looking."
EPILOG = """\
formats:
  stateline     config.json + model.safetensors, this project's own
  mamba_ssm     config.json + pytorch_model.bin, for state-spaces/mamba
  huggingface   config.json + model.safetensors, for transformers' MambaForCausalLM, FalconMambaForCausalLM and
                Mamba2ForCausalLM, and for flash-linear-attention's Mamba3ForCausalLM
  vllm          Mamba, FalconMamba or Mamba-2 with a tokenizer, as vLLM and SGLang serve them
  gguf          one file with the tokenizer in it, llama.cpp's; --dtype also Q8_0 or Q4_0, 8 or 4 bits a weight

programs, for running elsewhere; each takes ids and a state and gives logits and a state:
  export        one file for torch.export.load, beside this package
  onnx          one file for any ONNX runtime, without PyTorch; float32

examples:
  stateline convert mamba-130m my-mamba
  stateline convert runs/book book-hf --to huggingface
  stateline convert my-mamba small --dtype bfloat16 --force
  stateline convert my-mamba smaller --dtype int8      matrices in eight bits, a scale a row; this project's own alone
  stateline convert runs/book served --to vllm --dtype bfloat16     then: vllm serve served
  stateline convert bundled model.onnx --to onnx
  stateline convert hybrid hybrid.onnx --to onnx --room 4096        one whose attention keeps every token
  stateline convert bundled model.gguf --to gguf
  stateline convert mamba-130m mamba.gguf --to gguf --dtype Q8_0
  stateline convert mamba2-130m.Q4_K_M.gguf my-mamba2
"""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Define the subcommand."""
    parser = new_parser(commands, "convert", DESCRIPTION, EPILOG, summary="write a model in another format")
    parser.set_defaults(run=run)
    parser.add_argument("source", metavar="IN", help=NAMED)
    parser.add_argument("target", metavar="OUT", help="a directory to make, or a file for gguf and programs")
    parser.add_argument(
        "--to", choices=(*FORMATS, VLLM, GGUF, *PROGRAMS), default="stateline", help="see below (default: stateline)"
    )
    kinds = (*DTYPES, INT8, *QUANTISED)
    parser.add_argument("--dtype", choices=kinds, help="of the weights (default: as loaded; onnx: float32)")
    none = "leave the tokenizer out of gguf and vllm, whose programs then read ids alone, or in an IN that is gguf"
    parser.add_argument("--no-tokenizer", action="store_true", help=none)
    room = "tokens that a program's states have room for, if the model's attention keeps all"
    parser.add_argument("--room", type=positive, metavar="N", help=room)
    replaced = "replace OUT if it holds a checkpoint and nothing else, or if it is a file and a file is made"
    parser.add_argument("--force", action="store_true", help=replaced)


def run(options: argparse.Namespace) -> int:
    """Convert as asked: OUT appears whole or not at all, and what it replaces stays until then."""
    target = Path(options.target)
    if target.exists() and not options.force:
        raise UsageError(f"{target} exists; --force replaces it")
    if options.dtype == INT8 and options.to != "stateline":
        raise UsageError(f"--dtype int8 goes with --to stateline, not with {options.to}")
    if options.to != GGUF and options.dtype in QUANTISED:
        raise UsageError(f"--dtype {options.dtype} is for --to {GGUF}")
    if options.no_tokenizer and options.to not in (GGUF, VLLM) and not options.source.endswith(f".{GGUF}"):
        raise UsageError(f"--no-tokenizer is for --to {GGUF} and {VLLM}, or for an IN that is a {GGUF} file")
    if options.room is not None and options.to not in PROGRAMS:
        raise UsageError(f"--room is for --to {' and '.join(PROGRAMS)}; a checkpoint holds no states")
    if options.to == GGUF:
        return _write_gguf(options, target)
    if options.to in PROGRAMS:
        return _write_program(options, target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file, expected a directory to make")
    if target.exists():
        check_replaceable(target)
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UsageError(f"there is no directory {parent}")

    import torch

    import stateline

    model = stateline.load(source_of(options.source))
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}.") as temporary:
        made = Path(temporary) / "new"
        here = _home_of_tokenizer(options, Path(temporary), model.config.vocab_size)
        tokenizer = None if options.to != VLLM else "none" if options.no_tokenizer else here
        stateline.save(model, made, format=options.to, dtype=dtype, tokenizer=tokenizer)
        if options.to != VLLM and not options.no_tokenizer:  # vllm has it, described as servers want it
            _copy_tokenizer(here, made)
        _swap(made, target, Path(temporary) / "old")
    print(f"{target}: {options.to}, {model.num_parameters():,} parameters, {size_of(target) / 1e6:,.2f} MB")
    return 0


def _write_program(options: argparse.Namespace, target: Path) -> int:
    """Export as asked: OUT is one file, which appears whole or not at all."""
    if target.is_dir():
        raise UsageError(f"{target} is a directory, expected a file to make")

    import torch

    import stateline
    from stateline.interop import export_model

    name = options.dtype or ("float32" if options.to == "onnx" else None)
    model = stateline.load(source_of(options.source), dtype=None if name is None else getattr(torch, name))
    model.max_tokens = options.room
    print("tracing the model; this takes a little while", file=sys.stderr)
    export_model(model, target, to=options.to)
    print(f"{target}: {options.to}, {model.num_parameters():,} parameters, {target.stat().st_size / 1e6:,.2f} MB")
    return 0


def _write_gguf(options: argparse.Namespace, target: Path) -> int:
    """Write OUT, one file, with the tokenizer that lies beside IN."""
    if target.is_dir():
        raise UsageError(f"{target} is a directory, expected a file to make")

    import torch

    import stateline

    model = stateline.load(source_of(options.source))
    dtype = getattr(torch, options.dtype) if options.dtype in DTYPES else options.dtype
    with tempfile.TemporaryDirectory() as aside:
        here = _home_of_tokenizer(options, Path(aside), model.config.vocab_size)
        tokenizer = "none" if options.no_tokenizer else here
        stateline.save(model, target, format=GGUF, dtype=dtype, tokenizer=tokenizer)
    print(f"{target}: {options.to}, {model.num_parameters():,} parameters, {target.stat().st_size / 1e6:,.2f} MB")
    return 0


def _home_of_tokenizer(options: argparse.Namespace, aside: Path, vocab_size: int) -> Path:
    """Where IN's tokenizer lies: beside its weights, or in `aside`, taken out of a GGUF file if it is wanted."""
    from stateline.interop.gguf_read import is_file, write_tokenizer

    home = directory_of(options.source)
    if not is_file(home) or options.no_tokenizer:
        return home
    taken = aside / "tokenizer"
    taken.mkdir()
    if options.to in (GGUF, VLLM):
        unpack_tokenizer(home, taken, vocab_size, f"--no-tokenizer leaves it out of {options.to} too.")
    else:
        write_tokenizer(home, taken)
    return taken


def check_replaceable(target: Path) -> None:
    """Raise UsageError unless a directory is empty or holds a checkpoint and nothing but its files."""
    names = {p.name for p in target.iterdir() if p.is_file()}
    own = {name for name in names if any(fnmatchcase(name, pattern) for pattern in (*WEIGHTS, *BESIDE))}
    strange = sorted({p.name for p in target.iterdir()} - own - {ASIDE})
    whole = "config.json" in own and any(fnmatchcase(name, pattern) for name in own for pattern in WEIGHTS)
    if strange or (own and not whole):
        problem = f"holds {', '.join(strange[:4])}{', …' * (len(strange) > 4)}" if strange else "holds no checkpoint"
        raise UsageError(f"{target} {problem}; --force replaces checkpoints only. Choose another OUT or empty it first")


def _swap(made: Path, target: Path, old: Path) -> None:
    """Put `made` in the place of `target`, which goes to `old`, or back if that fails."""
    replaced = target.exists()
    if replaced:
        target.rename(old)
    try:
        made.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer that lies in one directory into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def size_of(directory: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(p.stat().st_size for p in (directory, *directory.rglob("*")) if p.is_file())
