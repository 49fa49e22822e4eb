"""What a stream carries, as plain values: any pytree of tensors whose first axis is the sequence.

A state can be copied to fork a stream, indexed to pick sequences, stacked to batch them, and written to a file that
only the model it came from will accept.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from stateline.checks import fail
from stateline.files import flush, share

S = TypeVar("S")

#: Values of each parameter that enter a model's fingerprint: enough to tell checkpoints apart, cheap at any size.
SAMPLED = 64
FORMAT = "stateline-state"
#: What may differ between states of one model.
SAME = (
    "What is kept must be as it was: set the model's max_tokens (--room), cache_dtype (--cache-dtype) and state_dtype "
    "(--state-dtype) so."
)


class StateMisfitError(ValueError):
    """A whole state of the model, of other shapes or dtypes than those it makes now; the message says which."""


def clone(state: S) -> S:
    """A copy that shares no memory; gradients flow through it."""
    return _map(lambda x: x.clone(), state)


def detach(state: S) -> S:
    """The same values cut off from the graph that made them, for truncated back-propagation through time."""
    return _map(lambda x: x.detach(), state)


def to(state: S, device: torch.device | str) -> S:
    """The state on another device; dtypes stay, since a state keeps full precision."""
    return _map(lambda x: x.to(device), state)


def index(state: S, rows: int | Sequence[int] | slice | Tensor) -> S:
    """A copy of some sequences, in the order given; an int keeps the axis, so that the result is a state again."""
    rows = [rows] if isinstance(rows, int) else rows
    picked = _map(lambda x: x[rows], state)
    return clone(picked) if isinstance(rows, slice) else picked


def stack(states: Sequence[S]) -> S:
    """One state with the sequences of several, in order. Raises ValueError if their structures differ."""
    if not states:
        raise fail("state.stack", "no states were given, expected at least one.")
    leaves = [pytree.tree_flatten(s) for s in states]
    spec = leaves[0][1]
    if any(other != spec for _, other in leaves):
        raise fail("state.stack", "the states have different structures.", "Stack states of one model only.")
    columns = list(zip(*(values for values, _ in leaves), strict=True))
    for column in columns:
        if len(shapes := {tuple(x.shape[1:]) for x in column}) > 1:
            raise fail(
                "state.stack",
                f"the states have rows of different shapes, {' and '.join(map(str, sorted(shapes)))}.",
                "Make them with the same max_tokens.",
            )
        if len(dtypes := {x.dtype for x in column}) > 1:
            raise fail(
                "state.stack",
                f"the states keep one thing in different dtypes, {' and '.join(sorted(map(str, dtypes)))}.",
                "Make them with the same cache_dtype and state_dtype, by one model.",
            )
    return pytree.tree_unflatten([torch.cat(column) for column in columns], spec)


def num_bytes(state: Any) -> int:
    """Memory the state's values take."""
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(state))


def save(state: Any, path: str | Path, model: torch.nn.Module) -> None:
    """Write a state to a safetensors file, whole or not at all, with the fingerprint of the model it belongs to.

    Raises OSError if the disk is full or not writable; a file that was there is untouched.
    """
    metadata = {"format": FORMAT, "fingerprint": fingerprint(model)}
    write("state.save", path, named(state), metadata)


def write(op: str, path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, flushed, whole or not at all; errors speak as `op`.

    Raises ValueError if the directory does not exist, OSError if the disk is full or not writable.
    """
    leaves = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    target = Path(path)
    if not target.parent.is_dir():
        raise fail(op, f"there is no directory {target.parent}.", "Create it first.")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            made = Path(aside) / "state"
            save_file(leaves, made, metadata=metadata)
            share(made)
            flush(made)
            os.replace(made, target)
        flush(target.parent)
    except (SafetensorError, OSError) as error:
        raise fail(op, f"{target} could not be written: {error}.", "Is the disk full?", error=OSError) from error


def read(op: str, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in order, and its metadata. Raises ValueError if it is none."""
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise fail(op, f"{path} cannot be read: {error}.") from error


def foreign(path: str | Path) -> bool:
    """Whether a file is there that is no safetensors file, whole or not, by its first bytes: a length and then "{"."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] != b"{"


def load(path: str | Path, model: torch.nn.Module, *, device: torch.device | str | None = None) -> Any:
    """Read a state that `save` wrote, bit for bit.

    `model` must have `init_state(batch)`; its structure is the state's. Raises ValueError if the file is no state, is
    damaged, or belongs to another model.
    """
    values, metadata = read("state.load", path)
    if metadata.get("format") != FORMAT:
        raise fail("state.load", f"{path} is not a saved state.", "stateline.load reads models.")
    if "fingerprint" not in metadata:
        raise fail("state.load", f"{path} does not say which model it belongs to.", "Save the state again.")
    if metadata["fingerprint"] != fingerprint(model):
        raise fail("state.load", f"{path} was made by another model or other weights.", "Load the model that made it.")
    return assemble("state.load", path, values, model, device=device)


def named(state: Any) -> dict[str, Tensor]:
    """A state's tensors by names that sort in their order."""
    leaves = pytree.tree_flatten_with_path(state)[0]
    return {f"{i:05d}{pytree.keystr(path)}": x for i, (path, x) in enumerate(leaves)}


def assemble(
    op: str,
    path: str | Path,
    values: Mapping[str, Tensor],
    model: torch.nn.Module,
    *,
    device: torch.device | str | None = None,
) -> Any:
    """The state of `model` whose tensors `named` listed, read from `path`. Raises ValueError if they are not its."""
    template = model.init_state(1)  # type: ignore[operator]  # the contract of layers and models
    expected = named(template)
    if list(expected) != list(values):
        raise fail(op, f"{path} holds {list(values)}, the model's state is {list(expected)}.")
    for name, x in values.items():
        own = expected[name]
        if x.dtype != own.dtype or x.dim() != own.dim() or x.shape[1:] != own.shape[1:]:
            got, wanted = (f"{str(y.dtype).removeprefix('torch.')} {tuple(y.shape[1:])}" for y in (x, own))
            problem = f"{path} has {name} of {got} a sequence, the model's state is {wanted}."
            raise fail(op, problem, SAME, error=StateMisfitError)
    if len({len(x) for x in values.values()}) > 1:
        raise fail(op, f"{path} is damaged: its parts have different numbers of rows.", "Save it again.")
    home = device or next(model.parameters()).device
    return pytree.tree_unflatten([x.to(home) for x in values.values()], pytree.tree_flatten(template)[1])


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of parameter names, shapes and a sample of their values, and of the model's configuration if it has one.

    The configuration counts because two models with the same weights may still compute differently.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLED)
        sample = flat[::stride][:SAMPLED].cpu().double()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _map(function: Callable[[Tensor], Tensor], state: S) -> S:
    return pytree.tree_map_only(Tensor, function, state)
