"""Damaged files: loaders refuse them with an error that names the file, and never run, crash or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

import stateline
from stateline import state
from stateline.generation import JsonTokenizer
from stateline.models.checkpoint import CheckpointError

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
import damaged  # noqa: E402  # shared with the coverage-guided harness, which is a program of its own

CASES = 60

#: What JSON may hold where something else belongs.
ODD: list[Any] = [None, True, -1, 0, 3, 0.5, 1e300, 2**31, 10**30, "", "x", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, damaged.Loader]:
    return {loader.name: loader for loader in damaged.loaders(tmp_path_factory.mktemp("sound"))}


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


NAMES = [
    "stateline model.safetensors", "stateline config.json", "stateline, no header, config.json",
    "mamba_ssm pytorch_model.bin", "mamba_ssm config.json", "huggingface model.safetensors", "huggingface config.json",
    "state", "tokenizer", "gguf",
]  # fmt: skip

damage = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.binary(min_size=1, max_size=8)), max_size=4)


def broken(sound: bytes, wounds: list[tuple[int, int, bytes]]) -> bytes:
    """Bytes overwritten, put in, taken out, or the end cut off; half of the places are in the first 400 bytes."""
    for place, kind, new in wounds:
        at = (place >> 1) % (len(sound) + 1) if place & 1 else (place >> 1) % 400
        ends = {0: at + len(new), 1: at, 2: at + new[0], 3: len(sound)}[kind]
        sound = sound[:at] + (new if kind < 2 else b"") + sound[ends:]
    return sound


@pytest.mark.parametrize("name", NAMES)
def test_damaged_bytes(loaders: dict[str, damaged.Loader], empty: Path, name: str) -> None:
    if name in ("tokenizer", "gguf"):
        pytest.importorskip({"tokenizer": "tokenizers"}.get(name, name), reason="an optional package reads it")
    loader = loaders[name]
    assert loader.check(empty, loader.sound) == "loaded"
    assert loader.check(empty, loader.sound[:-3]) == "refused"

    @settings(max_examples=CASES, deadline=None, database=None)
    @given(damage)
    @example([(1, 3, b"x")])
    def check(wounds: list[tuple[int, int, bytes]]) -> None:
        loader.check(empty, broken(loader.sound, wounds))

    check()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, v in inner for found in [(*path, key), *places(v, (*path, key))]]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


def with_header(sound: bytes, header: Any) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(sound[:8], "little")
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + sound[8 + size :]


@pytest.mark.parametrize("name", [n for n in NAMES if "bin" not in n and n != "gguf"])
def test_wrong_values_in_json(loaders: dict[str, damaged.Loader], empty: Path, name: str) -> None:
    """Configurations, tokenizers and the headers of safetensors files with a value that does not belong."""
    if name == "tokenizer":
        pytest.importorskip("tokenizers", reason="tokenizer.json is read by an optional package")
    loader = loaders[name]
    binary = "safetensors" in name or name == "state"
    size = int.from_bytes(loader.sound[:8], "little")
    whole = json.loads(loader.sound[8 : 8 + size] if binary else loader.sound)

    @settings(max_examples=CASES, deadline=None, database=None)
    @given(st.sampled_from(places(whole)), st.sampled_from(ODD))
    def check(path: tuple[Any, ...], new: Any) -> None:
        value = replaced(whole, path, new)
        loader.check(empty, with_header(loader.sound, value) if binary else json.dumps(value).encode())

    check()


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"null", b"1" * 5000])
@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("json")])
def test_json_too_deep_or_none(loaders: dict[str, damaged.Loader], empty: Path, name: str, text: bytes) -> None:
    assert loaders[name].check(empty, text) == "refused"


@pytest.mark.parametrize("key", ["n_layer", "num_hidden_layers", "vocab_size", "d_model", "hidden_size", "state_size"])
@pytest.mark.parametrize("value", [2**31, 10**15, 2**62, 10**30])
def test_impossible_sizes_build_nothing(loaders: dict[str, damaged.Loader], empty: Path, key: str, value: int) -> None:
    """A claimed billion of layers or of channels is refused before anything of that size is made."""
    for name in ("stateline, no header, config.json", "mamba_ssm config.json", "huggingface config.json"):
        config = json.loads(loaders[name].sound)
        inner = config.get("model", config)
        if key in inner:
            inner[key] = value
            assert loaders[name].check(empty, json.dumps(config).encode()) == "refused"


class Trap:
    """A pickle that would make a folder when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["plain", "torch", "legacy", "zip"])
def test_pickles_are_never_run(loaders: dict[str, damaged.Loader], empty: Path, how: str) -> None:
    sprung = empty / "sprung"
    target = empty / "pytorch_model.bin"
    sound = loaders["mamba_ssm pytorch_model.bin"]
    assert sound.check(empty, sound.sound) == "loaded"
    if how == "plain":
        target.write_bytes(pickle.dumps({"weight": Trap(sprung)}))
    elif how == "zip":  # the sound file with another pickle inside
        with zipfile.ZipFile(target) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(target, "w") as new:
            for name, data in entries.items():
                new.writestr(name, pickle.dumps(Trap(sprung)) if name.endswith("data.pkl") else data)
    else:
        torch.save({"weight": Trap(sprung)}, target, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is damaged, or holds Python objects"):
        stateline.load(empty)
    assert not sprung.exists()


def test_states_of_other_shapes_are_refused(loaders: dict[str, damaged.Loader], empty: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    owner = damaged.model()
    state.save(owner.init_state(2), empty / "state", owner)
    with safe_open(str(empty / "state"), "pt") as file:
        values, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    first = next(iter(values))
    for wrong, message in [
        (values[first][:, :-1], "a sequence, the model's state is float32"), (values[first].double(), "of float64"),
        (values[first][:1], "different numbers of rows"), (values[first][..., None], "the model's state is float32"),
    ]:  # fmt: skip
        save_file(values | {first: wrong.contiguous()}, empty / "state", metadata)
        with pytest.raises(ValueError, match=f"state.load: {empty / 'state'} .*{message}"):
            state.load(empty / "state", owner)


@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="tokenizer.json needs an optional package")
@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"null", b'{"version": "1.0", "model": {}}'])
def test_tokenizers_that_are_none(empty: Path, text: bytes) -> None:
    (empty / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        JsonTokenizer(empty / "tokenizer.json")


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: stateline[fuzz]")
def test_coverage_guided_damage(tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ / "loaders.py"), "-max_total_time=60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
