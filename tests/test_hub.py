"""Models by name: what is asked of huggingface_hub, and what its complaints become. Nothing is downloaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import ids, small

import stateline
from stateline.cli import main
from stateline.interop import CheckpointError, hub

try:
    import huggingface_hub
    from huggingface_hub import errors
except ImportError:  # the `hf` extra
    if os.environ.get("CI"):
        raise
    pytest.skip("huggingface_hub (extra `hf`) is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and where a download that a test did not expect fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What the Hub, which has every model in a local snapshot, was asked for."""
    stateline.save(small(), tmp_path / "snapshot", "huggingface")
    seen: list[tuple[str, str | None]] = []

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        seen.append((repo, revision))
        assert {"*.json", "*.safetensors"} <= set(allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return seen


def test_a_name_is_fetched_and_loaded(asked: list[tuple[str, str | None]], tmp_path: Path) -> None:
    x = ids()
    wanted = stateline.load(tmp_path / "snapshot")(x)
    assert torch.equal(stateline.load("state-spaces/mamba-130m-hf")(x), wanted)
    assert torch.equal(stateline.load("state-spaces/mamba-130m-hf@refs/pr/3")(x), wanted)
    assert asked == [("state-spaces/mamba-130m-hf", None), ("state-spaces/mamba-130m-hf", "refs/pr/3")]


def test_commands_take_names(asked: list[tuple[str, str | None]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "org/model"]) == 0
    assert "huggingface" in capsys.readouterr().out
    assert main(["convert", "org/model", "mine"]) == 0
    assert stateline.load("mine").config.d_model == 20
    assert set(asked) == {("org/model", None)}


def test_directories_go_first(tmp_path: Path) -> None:
    stateline.save(small(), tmp_path / "org" / "model")
    assert stateline.load("org/model").config.d_model == 20
    for path in ("org/other", "./no/where", "no", "a/b/c", Path("some/model")):
        with pytest.raises(CheckpointError, match="is no directory"):
            stateline.load(path)


def raising(error: type[Exception]) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        made = error.__new__(error)  # as the library makes them, of a response that is not needed here
        made.args = ("as the library says it",)
        raise made

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError, r"org/model .*cannot be reached.*hf download org/model --local-dir DIR"),
        (errors.RepositoryNotFoundError, r"org/model is no directory here, and no model on the Hub.*hf auth login"),
        (errors.GatedRepoError, r"org/model is given only to those.*hf auth login"),
        (errors.RevisionNotFoundError, r"org/model has no revision 'v2'"),
    ],
)
def test_complaints(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(CheckpointError, match=message):
        stateline.load("org/model@v2")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"org/model is no directory here.*stateline\[hf\]"):
        stateline.load("org/model")


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library itself, told that there is no network and that its cache is empty."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="the Hub cannot be reached, and it was not fetched before"):
        hub.fetch("org/model")
