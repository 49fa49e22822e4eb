"""Our own checkpoints, and what every format keeps when a disk is full or a process dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import FORMATS, contents, edit, ids, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import stateline
from stateline.models import checkpoint
from stateline.models.checkpoint import CheckpointError
from stateline.nn.linear import PackedMatrix
from stateline.nn.precision import full_precision_names


def test_model_keeps_its_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = small().to(dtype)
        stateline.save(model, tmp_path / "m")
        again = stateline.load(tmp_path / "m")
        for name, parameter in model.named_parameters():
            assert again.get_parameter(name).dtype == parameter.dtype
            assert torch.equal(again.get_parameter(name), parameter)
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        stateline.load(tmp_path / "m", dtype=torch.int8)
    with pytest.raises(ValueError, match=r"dtype is torch.int16"):
        stateline.save(model, tmp_path / "m", dtype=torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_round_matrices_and_nothing_else(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    with torch.no_grad():
        model.get_parameter("backbone.layers.0.mixer.in_proj.weight")[3] = 0  # a row without a scale
    stateline.save(model, tmp_path, dtype=torch.int8)
    again = stateline.load(tmp_path)
    exact = full_precision_names(model)
    rounded = 0
    for name, parameter in model.named_parameters():
        found, wanted = again.get_parameter(name).float(), parameter.float()
        assert again.get_parameter(name).dtype == parameter.dtype
        if parameter.dim() == 2 and name not in exact:
            step = wanted.abs().amax(1, keepdim=True) / 127
            slack = 2.0**-8 * wanted.abs() if dtype == torch.bfloat16 else 1e-6 * step  # the cast back rounds too
            assert ((found - wanted).abs() <= step / 2 + slack).all(), name
            rounded += 1
        else:
            assert torch.equal(found, wanted), name
    assert rounded == 2 * 4 + 1  # two blocks of four, and the embedding
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(x.dtype == torch.int8 for x in stored.values()) == rounded
    assert json.loads((tmp_path / "config.json").read_text())["version"] == 2


def test_eight_bits_are_packed_for_decoding_without_further_loss(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path, dtype=torch.int8)
    once = stateline.load(tmp_path)
    packed = stateline.prepare_for_decode(once, "int8")
    kept = 0
    for name, module in packed.named_modules():
        if isinstance(module, PackedMatrix) and module.format == "int8":
            weight = once.get_parameter(name.removesuffix("matrix") + "weight")
            assert torch.allclose(module.unpacked(), weight, rtol=1e-6, atol=0)
            kept += 1
    assert kept > 4
    stateline.save(once, tmp_path / "twice", dtype=torch.int8)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "twice"))
    assert all(torch.equal(x, second[name]) for name, x in first.items() if x.dtype == torch.int8)


def test_eight_bits_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    for format in ("mamba_ssm", "huggingface"):
        with pytest.raises(ValueError, match=f"torch.int8, which {format} does not store"):
            stateline.save(small(), tmp_path / format, format, dtype=torch.int8)
    model = small()
    stateline.save(model, tmp_path / "m", dtype=torch.int8)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"embedding.weight holds numbers that are not finite.* Save them as they are"):
        stateline.save(model, tmp_path / "m", dtype=torch.int8)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = "backbone.layers.1.mixer.out_proj.weight"
    for wrong in ({name: tensors[name].float()}, {name + ".scales": torch.ones(3)}, {"none.scales": torch.ones(3)}):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        save_file(tensors | wrong, tmp_path / "m" / "model.safetensors", metadata=about)
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .*expected int8"):
            stateline.load(tmp_path / "m")


def test_metadata_travels_along(tmp_path: Path) -> None:
    model = small()
    checkpoint.save(model, tmp_path / "m", metadata={"tokenizer": "bytes", "training": {"steps": 7}, "card": "…"})
    again = stateline.load(tmp_path / "m")
    assert again.metadata == {"tokenizer": "bytes", "training": {"steps": 7}, "card": "…"}
    stateline.save(again, tmp_path / "n")
    assert stateline.load(tmp_path / "n").metadata == again.metadata
    with pytest.raises(ValueError, match="metadata cannot be written as JSON"):
        checkpoint.save(model, tmp_path / "m", metadata={"model": model})
    assert stateline.load(tmp_path / "m").metadata == again.metadata


def test_tied_matrix_is_stored_once_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    stateline.save(small(), tmp_path)
    assert set(contents(tmp_path)) == {"tokenizer.json", "config.json", "model.safetensors"}
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == "stateline"
    assert config["version"] == 1
    assert config["model"]["d_model"] == 20


def test_compiled_models_are_saved_as_themselves(tmp_path: Path) -> None:
    model = small()
    stateline.save(torch.compile(model), tmp_path)  # type: ignore[arg-type]  # the wrapper
    assert torch.equal(stateline.load(tmp_path).lm_head.weight, model.lm_head.weight)
    with pytest.raises(TypeError, match="model is a Linear, expected a LanguageModel"):
        stateline.save(nn.Linear(2, 2), tmp_path)


def test_versions_from_the_future_are_refused(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path)
    record = {**json.loads((tmp_path / "config.json").read_text()), "version": 3}
    (tmp_path / "config.json").write_text(json.dumps(record))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"stateline": json.dumps(record)})
    with pytest.raises(CheckpointError, match="version 3, this release reads 'stateline' versions 1 and 2"):
        stateline.load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")  # by a tool that drops headers: config.json counts
    with pytest.raises(CheckpointError, match="version 3"):
        stateline.load(tmp_path)
    edit(tmp_path / "config.json", version=1)
    stateline.load(tmp_path)
    edit(tmp_path / "config.json", model={"d_model": 20, "layers": 2})
    with pytest.raises(CheckpointError, match=r"config.json is no configuration: .*unknown keys layers"):
        stateline.load(tmp_path)


@pytest.mark.parametrize("where", ["header", "config.json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": [1]}, r"metadata is \[1\], expected an object"), ({"dtype": "load"}, "dtype is 'load', expected"),
        ({"dtype": ["float32"]}, "dtype is"), ({"dtype": "int8"}, "dtype is 'int8'"), ({"model": [1]}, "no config"),
        ({"model": 3}, "no configuration"), ({"version": [1]}, "version"),
    ],
    ids=str,
)  # fmt: skip
def test_damaged_records_name_their_file(tmp_path: Path, where: str, changes: dict[str, Any], message: str) -> None:
    stateline.save(small(), tmp_path)
    damaged = json.dumps({**json.loads((tmp_path / "config.json").read_text()), **changes})
    tensors = load_file(tmp_path / "model.safetensors")
    if where == "header":
        (tmp_path / "config.json").unlink()
        save_file(tensors, tmp_path / "model.safetensors", metadata={"stateline": damaged})
    else:
        (tmp_path / "config.json").write_text(damaged)
        save_file(tensors, tmp_path / "model.safetensors")
    file = "model.safetensors" if where == "header" else where
    with pytest.raises(CheckpointError, match=f"{file} .*{message}"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "null", "{}"])
def test_damaged_headers_name_their_file(tmp_path: Path, text: str) -> None:
    stateline.save(small(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"stateline": text})
    with pytest.raises(CheckpointError, match=r"model.safetensors has a damaged header"):
        stateline.load(tmp_path)


# ---- full disks, kills and interrupts --------------------------------------------------------------------------------

FULL_DISK = """
import resource, sys, torch, stateline
from stateline import LanguageModel, ModelConfig
model = LanguageModel(ModelConfig(d_model=64, n_layer=2, vocab_size=256))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond 100 kB
for format in sys.argv[2:]:
    for target in ("old", "new"):
        try:
            stateline.save(model, sys.argv[1] + "/" + target + format, format)
        except OSError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    for format in FORMATS:
        stateline.save(small(), tmp_path / f"old{format}", format)
    before = contents(tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), *FORMATS]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"old{format}" for format in FORMATS)
    for format in FORMATS:
        for target, unchanged in ((f"old{format}", "is untouched"), (f"new{format}", "Nothing was written")):
            line = next(text for text in lines if f"{target} could not be written" in text)
            assert unchanged in line
            assert "Is the disk full?" in line


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupt_leaves_the_old_checkpoint_whole(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stateline.save(small(), tmp_path, format)
    before = contents(tmp_path)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        (tmp_path / ".saving" / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stateline.save(small(), tmp_path, format)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    (tmp_path / ".saving").mkdir()  # as a killed save leaves it
    (tmp_path / ".saving" / "model.safetensors").write_bytes(b"half")
    model, x = small(), ids()
    stateline.save(model, tmp_path, format)
    assert not (tmp_path / ".saving").exists()
    assert torch.equal(stateline.load(tmp_path)(x), model(x))


def test_a_kill_between_the_renames_leaves_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' file is complete by itself, whatever config.json says."""
    stateline.save(small(), tmp_path)
    larger = small(d_model=24)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        stateline.save(larger, tmp_path)
    x = ids()
    with pytest.warns(RuntimeWarning, match="disagrees with the configuration inside"):
        assert torch.equal(stateline.load(tmp_path)(x), larger(x))
