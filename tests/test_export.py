"""Models as programs: traced with free sizes, written to a file, run by a process that knows only the file."""

from __future__ import annotations

import errno
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from makers import contents, small
from test_layers import close
from torch import Tensor

import stateline
from stateline import LanguageModel
from stateline.cli import main
from stateline.interop import export_model, exported_program, load_exported
from stateline.interop.export import init_state

SIZES = [(1, 1), (3, 2), (2, 7), (1, 64)]


def ids(b: int, t: int) -> Tensor:
    return torch.randint(61, (b, t))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(3)
    return small(d_intermediate=16)


@pytest.fixture(scope="module")
def saved(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(model, tmp_path_factory.mktemp("export") / "model.pt2")


RUN = """
import sys
from stateline.interop import load_exported
from stateline.interop.export import init_state
import torch
torch.set_num_threads(1)
program = load_exported(sys.argv[1]).module()
calls = torch.load(sys.argv[2])
state, out = init_state(load_exported(sys.argv[1]), 2), []
with torch.no_grad():
    for piece in calls:
        logits, state = program(piece, state)
        out.append(logits)
torch.save((out, [leaf for layer in state.layers for leaf in (layer.conv, layer.ssm)]), sys.argv[3])
"""


@torch.no_grad()
def test_a_process_that_knows_only_the_file_continues_the_stream(
    model: LanguageModel, saved: Path, tmp_path: Path
) -> None:
    """Bit for bit, since the program calls the same operations as the model."""
    x = ids(2, 20)
    pieces = list(x.split([7, 1, 10, 2], 1))
    torch.save(pieces, tmp_path / "in.pt")
    arguments = [str(saved), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True)
    out, leaves = torch.load(tmp_path / "out.pt")
    state = model.init_state(2)
    for piece, got in zip(pieces, out, strict=True):
        want, state = model.extend(piece, state)
        assert torch.equal(got, want)
    assert all(map(torch.equal, leaves, [leaf for layer in state.layers for leaf in (layer.conv, layer.ssm)]))


@torch.no_grad()
def test_every_batch_and_length_runs(model: LanguageModel, saved: Path) -> None:
    program = load_exported(saved)
    for b, t in SIZES:
        got = program.module()(ids := torch.randint(61, (b, t)), init_state(program, b))
        close(got, model.extend(ids, model.init_state(b)), torch.float32)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_forward_and_extend_trace_either_way(strict: bool) -> None:
    model, (b, t) = small(n_layer=1, rms_norm=False), (torch.export.Dim("b"), torch.export.Dim("t"))
    forward = torch.export.export(model, (ids(2, 3),), dynamic_shapes=({0: b, 1: t},), strict=strict).module()
    extend = exported_program(model, strict=strict).module()
    for size in SIZES:
        x, state = ids(*size), model.init_state(size[0])
        close(forward(x), model(x), torch.float32)
        _, state = model.extend(x, state)
        close(extend(x, state), model.extend(x, state), torch.float32)


@torch.no_grad()
def test_last_only_gives_one_row_of_logits() -> None:
    model = small(n_layer=1)
    program = exported_program(model, last_only=True).module()
    for b, t in SIZES:
        x = ids(b, t)
        close(program(x, model.init_state(b)), model.extend(x, model.init_state(b), last_only=True), torch.float32)


def test_weights_are_stored_once_and_nothing_tells_of_this_machine(model: LanguageModel, saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    weights = sum(len(data) for name, data in files.items() if "/weights/weight_" in name)
    assert weights == 4 * model.num_parameters()
    here = str(Path(stateline.__file__).parent).encode()
    assert not [name for name, data in files.items() if here in data]
    assert not [name for name, data in files.items() if "sample_inputs" in name and data], "a pickle"


def test_the_models_mode_stays_and_the_program_is_in_evaluation_mode() -> None:
    model = small(n_layer=1).train()
    exported_program(model)
    assert model.training
    assert model.backbone.training


def test_wrong_calls_are_named(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to is 'tflite', expected one of 'export', 'onnx'"):
        export_model(model, tmp_path / "x", "tflite")
    with pytest.raises(ValueError, match="cannot be written as a file"):
        export_model(model, tmp_path)
    with pytest.raises(ValueError, match="cannot be written as a file"):
        export_model(model, tmp_path / "absent" / "x")
    with pytest.raises(TypeError, match="model is a Linear, expected a LanguageModel"):
        export_model(torch.nn.Linear(1, 1), tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no file"):
        load_exported(tmp_path / "absent")
    (tmp_path / "damaged").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="is no program, or damaged"):
        load_exported(tmp_path / "damaged")
    assert sorted(contents(tmp_path)) == ["damaged"]


def test_a_full_disk_leaves_the_old_file(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt2").write_bytes(b"old")

    def full(program: Any, file: Path) -> NoReturn:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match=r"x.pt2 could not be written: .*No space left"):
        export_model(model, tmp_path / "x.pt2")
    assert contents(tmp_path) == {"x.pt2": b"old"}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small(n_layer=1)
    stateline.save(model, tmp_path / "model")
    command = ["convert", str(tmp_path / "model"), str(tmp_path / "out.pt2"), "--to", "export"]
    assert main(command) == 0
    assert f"out.pt2: export, {model.num_parameters():,} parameters" in capsys.readouterr().out
    x = ids(2, 5)
    with torch.no_grad():
        got, _ = load_exported(tmp_path / "out.pt2").module()(x, model.init_state(2))
        assert torch.equal(got, model(x))
    before = contents(tmp_path)
    assert main(command) == 2
    assert "out.pt2 exists; --force replaces it" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "model"), "--to", "export", "--force"]) == 2
    assert "is a directory, expected a file to make" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "absent" / "out"), "--to", "export"]) == 2
    assert contents(tmp_path) == before
