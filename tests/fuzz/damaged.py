"""Files as crashes, bad disks and strangers leave them: what every loader must answer, for any bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import stateline
from stateline import state
from stateline.generation import JsonTokenizer
from stateline.models import LanguageModel, ModelConfig
from stateline.models.checkpoint import CheckpointError

#: What loaders may raise. A RecursionError, a panic of a library or a crash of the process is none of these.
DOCUMENTED = (CheckpointError, ValueError, OSError)
FORMATS = {"stateline": "model.safetensors", "mamba_ssm": "pytorch_model.bin", "huggingface": "model.safetensors"}


def model() -> LanguageModel:
    """The smallest of models."""
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=16, ssm_cfg={"d_state": 2})).eval()


class Loader:
    """A loader with a sound set of files, of which `file` is damaged; folder: where they may be written."""

    def __init__(self, name: str, file: str, files: dict[str, bytes], load: Callable[[Path], object]) -> None:
        self.name, self.file, self.files, self.load = name, file, files, load
        self.sound = files[file]

    def check(self, folder: Path, data: bytes) -> str:
        """ "loaded" or "refused". AssertionError if the complaint names no file; undocumented errors pass through."""
        for path in folder.iterdir():
            path.unlink()
        for name, content in self.files.items():
            (folder / name).write_bytes(data if name == self.file else content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.load(folder)
        except DOCUMENTED as error:
            if isinstance(error, UnicodeError) or not any(str(folder / name) in str(error) for name in self.files):
                raise AssertionError(f"{self.name}: the file is not named: {error!r}") from error
            return "refused"
        return "loaded"


def loaders(folder: Path) -> list[Loader]:
    """Every loader, by the file that is damaged; `folder` is used while they are made."""
    found = []
    for format, weights in FORMATS.items():
        stateline.save(model(), folder / format, format)
        files = {p.name: p.read_bytes() for p in (folder / format).iterdir()}
        shutil.rmtree(folder / format)
        for file in (weights, "config.json"):
            found.append(Loader(f"{format} {file}", file, files, stateline.load))
        if format == "stateline":  # configuration from config.json alone, as tools that drop headers leave it
            from safetensors.torch import load, save

            files = files | {weights: save(load(files[weights]))}
            found.append(Loader("stateline, no header, config.json", "config.json", files, stateline.load))
    if importlib.util.find_spec("gguf"):
        stateline.save(model(), folder / "m.gguf", "gguf", tokenizer="none")
        files = {"m.gguf": (folder / "m.gguf").read_bytes()}
        found.append(Loader("gguf", "m.gguf", files, lambda at: stateline.load(at / "m.gguf")))
    owner = model()
    state.save(owner.init_state(2), folder / "state", owner)
    files = {"state": (folder / "state").read_bytes()}
    found.append(Loader("state", "state", files, lambda at: state.load(at / "state", owner)))
    text = json.dumps(tokenizer()).encode()
    files = {"tokenizer.json": text}
    found.append(Loader("tokenizer", "tokenizer.json", files, lambda at: JsonTokenizer(at / "tokenizer.json")))
    return found


def tokenizer() -> dict[str, object]:
    """A byte-level BPE of three merges, as the `tokenizers` package writes it."""
    vocabulary = {c: i for i, c in enumerate("abcdĠé")} | {"ab": 6, "abc": 7, "Ġa": 8}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 9, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}  # fmt: skip
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
           "vocab": vocabulary, "merges": [["a", "b"], ["ab", "c"], ["Ġ", "a"]]}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe}  # fmt: skip
