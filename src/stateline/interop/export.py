"""Models as files that run without their Python: programs of `torch.export`, and ONNX.

Both hold the form with a state: (input_ids (b, t), state) -> (logits (b, t, v), new state), batch and length free, so
that one file reads a prompt, continues it token by token, and streams for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from stateline import checks
from stateline.files import flush, share
from stateline.interop import onnx_ops
from stateline.models import LanguageModel, checkpoint

OP = "export_model"
KINDS = ("export", "onnx")
INPUT, OUTPUT = "input_ids", "logits"
#: Above it ONNX keeps weights in a file of their own beside the model: a protobuf holds at most 2 GB.
SINGLE_FILE_BYTES = 1_500_000_000


class _Extend(nn.Module):
    """`LanguageModel.extend` as a module's forward, which is what exporters take."""

    def __init__(self, model: LanguageModel, last_only: bool) -> None:
        super().__init__()
        self.model = model
        self.last_only = last_only

    def forward(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.model.extend(input_ids, state, last_only=self.last_only)


def export_model(
    model: LanguageModel, path: str | Path, to: str = "export", *, last_only: bool = False, strict: bool = False
) -> Path:
    """Write a model as one file that reads, continues and streams without its Python; return the path.

    Args:
        model: exported in evaluation mode; its own mode stays.
        path: the file to write, whole or not at all; one that was there is replaced.
        to: "export" for `torch.export` (a .pt2 file; needs this package to run, `load_exported` reads it) or "onnx"
            (plain ONNX operators, opset 18, float32; needs the extra `onnx` to be made and nothing of ours to run).
        last_only: logits (b, v) of the last token alone, which spares the head for the rest of a prompt.
        strict: trace through TorchDynamo instead of running Python; the program is the same.

    The program takes (input_ids (b, t) int64, state) and gives (logits, new state); b and t, from 1 up, are free. In
    ONNX the state is one input and one output a tensor: state.layers.0.conv, …, new_state.layers.0.conv, …

    Raises:
        TypeError, ValueError: not a LanguageModel, or an operation or dtype that ONNX cannot express.
        ImportError: naming the extra that is missing.

    >>> program = load_exported(export_model(stateline.load("bundled"), "bundled.pt2"))  # doctest: +SKIP
    """
    checks.choice(OP, "to", to, KINDS)
    model = checkpoint.plain(model)
    target = Path(path).expanduser()
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise checks.fail(OP, f"{target} cannot be written as a file.", "Give a file in a directory that exists.")
    if to == "onnx":
        onnx_ops.translations()  # complains before any work
        _check_float32(model)
    program = exported_program(model, last_only=last_only, strict=strict)
    write = _onnx_writer(program, model) if to == "onnx" else _export_writer(program)
    write_aside(target, write)
    return target


def exported_program(model: LanguageModel, *, last_only: bool = False, strict: bool = False) -> ExportedProgram:
    """`torch.export.export` of a model's `extend`, batch and length free: (input_ids, state) -> (logits, state)."""
    training = model.training
    model.eval()
    try:
        ids = torch.zeros(2, 3, dtype=torch.int64, device=model.backbone.embedding.weight.device)
        state = model.init_state(2)
        batch, shapes = Dim("batch", min=1), ShapesCollection()
        shapes[ids] = {0: batch, 1: Dim("time", min=1)}
        for leaf in pytree.tree_leaves(state):
            shapes[leaf] = {0: batch}
        with torch.no_grad():
            traced = _Extend(model, last_only)
            dynamic: Any = shapes  # taken, though not declared
            program = torch.export.export(traced, (ids, state), dynamic_shapes=dynamic, strict=strict)
    finally:
        model.train(training)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def load_exported(path: str | Path) -> ExportedProgram:
    """The program that `export_model(to="export")` wrote; `.module()(input_ids, state)` runs it.

    Raises ValueError if there is no such file or it holds no program.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise checks.fail("load_exported", f"{source} is no file.")
    if not zipfile.is_zipfile(source):  # as cut short
        raise checks.fail("load_exported", f"{source} is no program, or damaged.", "Export the model again.")
    try:
        return torch.export.load(source)
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # what torch raises depends on the damage
        raise checks.fail("load_exported", f"{source} cannot be read: {error}.", "Export the model again.") from error


def init_state(program: ExportedProgram, batch: int) -> Any:
    """The state of `batch` sequences before their first token, for a program that `load_exported` gave."""
    checks.number("init_state", "batch", batch, low=1, integer=True)
    inputs = [n.meta["val"] for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    sizes = [[n if isinstance(n, int) else 1 for n in x.shape[1:]] for x in inputs]  # the length of input_ids is free
    zeros = [torch.zeros(batch, *size, dtype=x.dtype, device=x.device) for x, size in zip(inputs, sizes, strict=True)]
    assert program.call_spec.in_spec is not None
    (_, state), _ = pytree.tree_unflatten(zeros, program.call_spec.in_spec)
    return state


def _check_float32(model: LanguageModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise checks.fail(OP, f"{name} is {parameter.dtype}, ONNX models are float32.", "Export model.float().")
    if model.cache_dtype is not None:
        remedy = "Set model.cache_dtype = None."
        raise checks.fail(OP, f"the state's cache_dtype is {model.cache_dtype}, ONNX models are float32.", remedy)
    if model.state_dtype is not None:
        remedy = "Set model.state_dtype = None."
        raise checks.fail(OP, f"the state's state_dtype is {model.state_dtype}, ONNX models are float32.", remedy)


def _export_writer(program: ExportedProgram) -> Callable[[Path], None]:
    program.example_inputs = None  # they would be the only pickle in the file
    return lambda file: torch.export.save(program, file)


def _onnx_writer(program: ExportedProgram, model: LanguageModel) -> Callable[[Path], None]:
    """A function that writes the program as ONNX."""
    onnx_ops.check_translatable(program.graph)
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(model.init_state(1))[0]]
    states = [key.replace("[", ".").replace("]", "") for key in keys]
    with _quiet():
        made = torch.onnx.export(
            program,
            custom_translation_table=onnx_ops.translations(),
            opset_version=onnx_ops.OPSET,
            input_names=[INPUT, *(f"state{key}" for key in states)],
            output_names=[OUTPUT, *(f"new_state{key}" for key in states)],
            optimize=False,  # folding constants would store a tied matrix twice, once turned round
            verbose=False,
        )
    assert made is not None
    onnx_ops.tidy(made.model)
    made.model.metadata_props["stateline.config"] = json.dumps(model.config.to_dict())
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > SINGLE_FILE_BYTES
    return lambda file: made.save(str(file), external_data=large)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about its own internals and about torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_aside(target: Path, write: Callable[[Path], None], op: str = OP) -> None:
    """Have `write(file)` make files aside, flush them and rename them into place, `target` last."""
    try:
        with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as aside:
            write(Path(aside) / target.name)
            made = sorted(Path(aside).iterdir(), key=lambda file: file.name == target.name)
            for file in made:
                share(file)
                flush(file)
            for file in made:
                os.replace(file, target.parent / file.name)
        flush(target.absolute().parent)
    except OSError as error:
        raise OSError(f"{op}: {target} could not be written: {error}. Is the disk full?") from error
