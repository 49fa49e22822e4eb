"""Recipes of training on data of every kind: they work together, and a resumed run has an undisturbed one's bits."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_after
from texts import tiny, write_lines

import stateline
from stateline.cli import main
from stateline.generation import load_tokenizer
from stateline.training import Interrupted, bits_per_byte, load_data, loop, resume, train

#: Options that meet in every case: documents apart, two batches a step, a mean of the weights, a guard, room saved.
SHARED: dict[str, Any] = {
    "packing": "documents", "accumulate": 2, "ema": 0.8, "schedule": "wsd", "on_spike": "skip", "patience": 9,
    "checkpoint_activations": True, "dropout": 0.1,
}  # fmt: skip
GIVEN = {"d_model": None, "n_layer": None, "d_state": 16}  # shapes that come with weights
#: Text, and what is done with it; names of files are those of `files`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bpe learnt from json lines": ("text.jsonl.zst", {"tokenizer": "bpe:300", "tensorboard": True}),
    "data set": ("ids", {"dtype": "bfloat16"}),
    "adapters on a data set": ("ids", {"init_from": "first", "lora": 2, **GIVEN}),
    "adapters of foreign 16-bit weights": ("text.jsonl.zst", {"init_from": "huggingface", "lora": 2, **GIVEN}),
    "foreign weights": ("ids", {"init_from": "huggingface", **GIVEN}),
    "bytes of documents": ("text.jsonl.zst", {}),
    "adapters on bytes": ("text.jsonl.zst", {"init_from": "of bytes", "lora": 2, **GIVEN}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines, a data set of them with a learnt vocabulary, a run on it, its model elsewhere, and a run on bytes."""
    folder = tmp_path_factory.mktemp("given")
    lines = write_lines(folder)
    assert main(["tokenize", str(lines), "--out", str(folder / "ids"), "--tokenizer", "bpe:300"]) == 0
    first = train(tiny(folder / "ids", "first", steps=2))
    foreign = folder / "huggingface"
    stateline.save(first.model, foreign, "huggingface", dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(first.directory / "model" / name, foreign)
    train(tiny(lines, "of bytes", steps=2))
    return folder


def settings_of(case: str, files: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the files that may be deleted, and the case's settings."""
    place = tmp_path / "files"
    shutil.copytree(files, place)
    name, settings = CASES[case]
    source = {"init_from": place / settings["init_from"]} if "init_from" in settings else {}
    return place / name, SHARED | settings | source


def everything(run: Path) -> dict[str, Any]:
    """All that a run leaves: every tensor of its last checkpoint, best model and frozen weights, and its reports."""
    last = resume.newest(run)
    assert last is not None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reports = [{k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_s")} for line in lines]
    tokenizers = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("**/tokenizer*.json"))}
    files = [file for folder in (last, run / "model", run / "base") for file in sorted(folder.rglob("*.safetensors"))]
    tensors = {str(file.relative_to(run)): load_file(file) for file in files}
    return {"reports": reports, "tokenizers": tokenizers, **tensors}


def assert_same(a: Path, b: Path) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name.endswith(".safetensors"):
            assert value.keys() == right[name].keys()
            assert all(torch.equal(value[key], right[name][key]) for key in value), name
        else:
            assert value == right[name], name


@pytest.mark.parametrize("case", CASES)
def test_it_works_and_resumes_with_the_same_bits(
    case: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, settings = settings_of(case, files, tmp_path)
    straight = train(tiny(text, "straight", **settings), load=stateline.load)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted, match="Saved at step 7"):
            train(tiny(text, **settings), load=stateline.load)
    if "init_from" in settings:
        shutil.rmtree(settings["init_from"])  # the run has its own copy
    resumed = train(tiny(text, resume=True, **settings), load=stateline.load)
    assert_same(straight.directory, resumed.directory)
    saved, home = stateline.load(resumed.directory), resumed.directory / "model"
    data = load_data(tiny(text, **settings).data, home=resumed.directory, model=home, resumed=True)
    assert not data.vocabulary.is_bytes or "bytes" in case
    assert load_tokenizer(home, saved.config.vocab_size).vocab_size == data.vocabulary.size
    autocast = torch.bfloat16 if settings.get("dtype") else None
    whole = bits_per_byte(saved, data.val, apart=True, autocast=autocast)
    assert resumed.best_bpb == straight.best_bpb
    if "lora" in settings:  # judged with adapters beside the weights, saved with them added: other roundings
        whole = pytest.approx(whole, rel=1e-6)
    assert straight.best_bpb == whole, "what is saved is what was judged"
    assert main(["generate", "Day", "--model", str(resumed.directory), "--max-tokens", "3"]) == 0
    assert not any(".lora_" in name or "base_layer" in name for name in saved.state_dict())


@pytest.mark.parametrize("case", ["bpe learnt from json lines", "adapters on a data set", "foreign weights"])
def test_a_run_stopped_at_once_is_resumed_from_its_start(
    case: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, settings = settings_of(case, files, tmp_path)
    straight = train(tiny(text, "straight", **settings), load=stateline.load)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_announce", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match="Nothing was learnt yet"):
            train(tiny(text, **settings), load=stateline.load)
    assert_same(straight.directory, train(tiny(text, resume=True, **settings), load=stateline.load).directory)


def test_weights_and_text_of_other_ids_are_refused(files: Path, tmp_path: Path) -> None:
    ids, lines = files / "ids", files / "text.jsonl.zst"
    with pytest.raises(ValueError, match=r"was made with a tokenizer of .* reads bytes"):
        train(tiny(ids, str(tmp_path / "run"), init_from="bundled", lora=2, **GIVEN), load=stateline.load)
    foreign = {"init_from": files / "huggingface", "tokenizer": "bpe:400", **GIVEN}
    with pytest.raises(ValueError, match=r"tokenizer is 'bpe:400', but .*huggingface has its own"):
        train(tiny(lines, str(tmp_path / "run"), **foreign), load=stateline.load)
    bare = tmp_path / "bare"
    shutil.copytree(files / "huggingface", bare)
    (bare / "tokenizer.json").unlink()
    for tokenizer in (None, str(files / "huggingface")):
        with pytest.raises(ValueError, match=r"[Pp]ut the model's own tokenizer.json beside its weights"):
            train(tiny(lines, str(tmp_path / "run"), init_from=bare, tokenizer=tokenizer, **GIVEN), load=stateline.load)
    assert not (tmp_path / "run").exists()


def test_a_run_on_bytes_does_not_take_a_tokenizer_that_lies_in_its_folder(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "huggingface" / "tokenizer.json", tmp_path)
    result = train(tiny(files / "text.jsonl.zst", str(tmp_path), steps=4))
    assert not list(result.directory.glob("*/**/tokenizer.json"))
    assert train(tiny(files / "text.jsonl.zst", str(tmp_path), steps=5, resume=True)).steps == 5
