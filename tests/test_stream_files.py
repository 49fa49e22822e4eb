"""Stream files that are whole by their checksum and yet hold what `Stream.save` never wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from stateline.generation import SamplingConfig, Stream, saved
from stateline.models import LanguageModel, ModelConfig


def forge(path: Path, change: Callable[[Any, dict[str, Tensor]], object]) -> None:
    """Change a stream file, and give it the right checksum again."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, record = load_file(path), json.loads(metadata["stream"])
    changed = change(record, tensors)
    metadata["stream"] = changed if isinstance(changed, str) else json.dumps(record)
    del metadata["checksum"]
    save_file(tensors, path, metadata={**metadata, "checksum": saved._checksum(tensors, metadata)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, _: r["parts"][-1]["moment"].update(pending=99999), "pending is 99999, .*at most 255"),
        (lambda r, _: r["parts"][-1]["moment"].update(pending=-1), "pending is -1"),
        (lambda r, _: r["parts"][-1]["moment"].update(pending="a"), "pending is 'a'"),
        (lambda r, _: r["parts"][-1]["moment"].update(pending=None), "tokens have no last one"),
        (lambda r, _: r["parts"][-1]["moment"].update(length=-3), "length is -3"),
        (lambda r, _: r["parts"][-1]["moment"].update(length=7.5), "length is 7.5"),
        (lambda r, _: r["parts"][-1]["moment"].update(length=77), "tokens lead to the 77th"),
        (lambda r, _: r["parts"][-1]["moment"].update(drawn=10**6), "drawn is 1000000"),
        (lambda r, _: r["parts"][-1]["moment"].update(tail="xy"), "non-hexadecimal"),
        (lambda r, _: r["parts"][-1]["moment"].update(tail="f0" * 9), "wait"),
        (lambda r, _: r["parts"][-1]["moment"].update(tail=3), "fromhex"),
        (lambda r, _: r["parts"][-1]["moment"].update(held=None), "None wait"),
        (lambda r, _: r["parts"][-1]["moment"].update(other=1), "unexpected keyword argument 'other'"),
        (lambda r, _: r["parts"][-1]["moment"].pop("drawn"), "missing 1 required .*'drawn'"),
        (lambda r, _: r["parts"][-1].pop("moment"), "there is no 'moment'"),
        (lambda r, _: r["parts"].clear(), "its last part is not the present"),
        (lambda r, _: r.update(parts={"a": 1}), "holds what no stream holds"),
        (lambda r, _: r["parts"][0]["events"][0].update(ids=[300]), "an event is 300"),
        (lambda r, _: r["parts"][0]["events"][0].update(ids=7), "an event holds 7"),
        (lambda r, _: r["parts"][0]["events"][0].update(drawn=1), "is no event"),
        (lambda r, _: r["settings"].update(chunk=0), "chunk is 0"),
        (lambda r, _: r["settings"].update(rollback="all"), "rollback is 'all'"),
        (lambda r, _: r["settings"].update(rollback=0), "it has a past"),
        (lambda r, _: r["settings"].update(width=1), "width is no setting"),
        (lambda r, _: r["settings"].pop("sampling"), "there is no 'sampling'"),
        (lambda r, _: r["settings"]["sampling"].update(top_p=7), "top_p is 7"),
        (lambda r, _: r["settings"]["sampling"].update(heat=7), "unexpected keyword argument 'heat'"),
        (lambda _, t: t[max(n for n in t if n.endswith("history"))].fill_(256), "history is 256"),
        (lambda _, t: t.pop("000/history"), "there is no '000/history'"),
        (lambda _, t: t.update({"000/random": torch.zeros(9, dtype=torch.uint8)}), "RNG state size to be 9"),
        (lambda _, t: t.update({"000/random": torch.zeros(9)}), "RNG state must be"),
        (lambda _, t: t.update({n: torch.cat([x, x]) for n, x in t.items() if "/state/" in n}), "not of one sequence"),
        (lambda *_: "[]", "holds what no stream holds"),
        (lambda *_: "{", "holds what no stream holds"),
        (lambda *_: "[" * 100_000, "holds what no stream holds"),
    ],
)
def test_what_no_stream_holds_is_refused_whatever_its_checksum(
    tmp_path: Path, change: Callable[[Any, dict[str, Tensor]], object], message: str
) -> None:
    path = tmp_path / "stream"
    model = LanguageModel(ModelConfig(d_model=16, n_layer=1, vocab_size=256))
    stream = Stream(model, sampling=SamplingConfig(repetition_penalty=1.3, seed=3), rollback=9)
    stream.feed("abc")
    list(stream.tokens(5))
    stream.save(path)
    forge(path, lambda *_: None)
    assert list(Stream.load(path, model).tokens(5)) == list(stream.tokens(5))
    forge(path, change)
    with pytest.raises(ValueError, match=message) as error:
        Stream.load(path, model)
    assert str(error.value).startswith(f"Stream.load: {path} holds what no stream holds: ")
