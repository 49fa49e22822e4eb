"""The file of a stream: a safetensors file with its moments as tensors and the rest as JSON, under one checksum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import stateline
from stateline import checks, state
from stateline.checks import fail
from stateline.generation.past import Event, Moment, Part
from stateline.generation.sampling import SamplingConfig
from stateline.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stateline.models import LanguageModel

FORMAT = "stateline-stream"
VERSION = 1
OP = "Stream.load"
#: Tokens of a stream; more would take longer than the sun lasts.
LONGEST = 2**62
#: A text whose ids tell tokenizers apart that know the same tokens but merge them differently.
PROBE = "The theory of naïve thermodynamics, 1234567 €, isn't   \n\tfinished; def f(x): return x**2 😀"


@dataclass(frozen=True)
class Saved:
    """A stream as a file keeps it: its settings, its past, and its present as the last part, without events."""

    settings: dict[str, Any]
    parts: list[Part]


def write(path: str | Path, model: LanguageModel, tokenizer: Tokenizer | None, saved: Saved) -> None:
    """Write the file, whole or not at all. Raises as `state.write`."""
    tensors: dict[str, Tensor] = {}
    parts = []
    for i, part in enumerate(saved.parts):
        moment = {field.name: getattr(part.moment, field.name) for field in dataclasses.fields(Moment)}
        for name, x in state.named(moment.pop("state")).items():
            tensors[f"{i:03d}/state/{name}"] = x
        tensors[f"{i:03d}/random"] = moment.pop("random")
        tensors[f"{i:03d}/history"] = torch.tensor(moment.pop("history"), dtype=torch.int64)
        events = [dataclasses.asdict(event) for event in part.events]
        parts.append({"moment": _plain(moment), "events": [_plain(event) for event in events]})
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "package": stateline.__version__,
        "model": state.fingerprint(model),
        "dtype": _dtype(model),
        "tokenizer": fingerprint(tokenizer),
        "stream": json.dumps({"settings": checks.plain(saved.settings), "parts": parts}),
    }
    state.write("Stream.save", path, tensors, {**metadata, "checksum": _checksum(tensors, metadata)})


def read(path: str | Path, model: LanguageModel, tokenizer: Tokenizer | None) -> Saved:
    """What `write` wrote. Raises ValueError for a damaged, newer or foreign file, saying which."""
    op = OP
    tensors, metadata = state.read(op, path)
    if metadata.get("format") != FORMAT:
        remedy = "state.load reads states, stateline.load models." if metadata else "Was it written by Stream.save?"
        raise fail(op, f"{path} is not a saved stream.", remedy)
    made = f"was written by stateline {metadata.get('package')}"
    if metadata.get("version") != str(VERSION):
        known = f"in format {metadata.get('version')}; this is {stateline.__version__}, which reads format {VERSION}."
        raise fail(op, f"{path} {made} {known}", "Update stateline.")
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise fail(op, f"{path} is damaged: its contents do not match its checksum.", "Take an earlier copy.")
    if metadata.get("dtype") != _dtype(model):
        raise fail(op, f"{path} was made in {metadata.get('dtype')}, the model is in {_dtype(model)}.", "Load it so.")
    if metadata.get("model") != state.fingerprint(model):
        raise fail(op, f"{path} was made by another model or other weights.", "Load the model that made it.")
    if metadata.get("tokenizer") != fingerprint(tokenizer):
        raise fail(op, f"{path} was made with another tokenizer.", "Pass the one that it was made with.")
    model.init_state(1)  # one that needs to be told how long says so itself
    try:
        return _checked(path, model, tensors, metadata)
    except state.StateMisfitError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{OP}: ").rstrip(".")
        raise fail(op, f"{path} holds what no stream holds: {what}.", "Take an earlier copy.") from error


def is_stream(path: str | Path) -> bool:
    """Whether a file is a stream's, of any version. Raises OSError if it cannot be opened."""
    with Path(path).open("rb"):
        pass
    try:
        return state.read(OP, path)[1].get("format") == FORMAT
    except ValueError:  # no safetensors file
        return False


def fingerprint(tokenizer: Tokenizer | None) -> str:
    """A digest of the bytes behind every id, the special ids, and how a sample text is cut; "ids" for none."""
    if tokenizer is None:
        return "ids"
    digest = hashlib.sha256()
    special = (tokenizer.vocab_size, tokenizer.start, tokenizer.end, tuple(tokenizer.prefix))
    digest.update(repr((special, list(tokenizer.encode(PROBE)))).encode())
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


def _checked(
    path: str | Path, model: LanguageModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Saved:
    """What the file says, every value of which `Stream` can use. Raises any of the errors that `read` translates."""
    record = json.loads(metadata["stream"])
    settings = {name: record["settings"][name] for name in ("chunk", "rollback")}
    sampling = SamplingConfig(**record["settings"]["sampling"])
    for name, low in (("chunk", 1), ("rollback", 0)):
        _whole(name, settings[name], low)
    if extra := record["settings"].keys() - {*settings, "sampling"}:
        raise ValueError(f"{', '.join(extra)} is no setting")
    parts = [_part(path, model, tensors, i, part) for i, part in enumerate(record["parts"])]
    if not parts or parts[-1].events:
        raise ValueError("its last part is not the present")
    if len(parts) > 1 and not settings["rollback"]:
        raise ValueError("it has a past, and rollback 0")
    for part, after in pairwise(parts):
        if part.end != after.moment.length:
            raise ValueError(f"{part.end} tokens lead to the {after.moment.length}th")
    return Saved({**settings, "sampling": asdict(sampling)}, parts)


def _part(
    path: str | Path, model: LanguageModel, tensors: Mapping[str, Tensor], i: int, record: dict[str, Any]
) -> Part:
    values, size = record["moment"], model.config.vocab_size
    start = f"{i:03d}/state/"
    leaves = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
    if any(len(x) != 1 for x in leaves.values() if x.dim()):
        raise ValueError("the state is not of one sequence")
    moment = Moment(
        **{**values, "tail": bytes.fromhex(values["tail"])},
        state=state.assemble(OP, path, leaves, model),
        random=tensors[f"{i:03d}/random"],
        history=tensors[f"{i:03d}/history"].tolist(),
    )
    _whole("length", moment.length, 0)
    _whole("drawn", moment.drawn, 0, moment.length)
    if moment.pending is None and moment.length:
        raise ValueError(f"{moment.length} tokens have no last one")
    if moment.pending is not None:
        _ids("pending", [moment.pending], size)
    _ids("history", moment.history, size)
    _text(moment)
    torch.Generator().set_state(moment.random)  # raises if these are no random numbers
    events = [Event(**{**event, "tail": bytes.fromhex(event["tail"])}) for event in record["events"]]
    for event in events:
        _ids("an event", event.ids, size)
        _text(event)
        if not event.ids or (event.drawn and len(event.ids) > 1) or {type(event.drawn), type(event.random)} != {bool}:
            raise ValueError(f"{event} is no event")
    return Part(moment, events)


def _whole(name: str, value: Any, low: int, high: int = LONGEST) -> None:
    """Raise unless `value` is a whole number in [low, high]."""
    checks.number(OP, name, value, low=low, high=high, integer=True)


def _ids(name: str, values: Any, size: int) -> None:
    """Raise unless `values` is a list of ids below `size`."""
    if not isinstance(values, list):
        raise TypeError(f"{name} holds {values!r}, not ids")
    for value in values:
        _whole(name, value, 0, size - 1)


def _text(at: Moment | Event) -> None:
    """Raise unless what waits can: an incomplete character, which has at most three bytes, and text."""
    if len(at.tail) > 3 or not isinstance(at.held, str):
        raise ValueError(f"{at.tail!r} and {at.held!r} wait")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Bytes as hexadecimal digits, for JSON."""
    return {name: x.hex() if isinstance(x, bytes) else x for name, x in values.items()}


def _dtype(model: LanguageModel) -> str:
    return ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in model.parameters()}))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        values = x.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
