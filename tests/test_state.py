"""State as a value: copies, rows, files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stateline import LanguageModel, ModelConfig
from stateline import state as st


@dataclass
class Pair:
    h: Tensor
    taps: Tensor


torch.export.register_dataclass(Pair, serialized_type_name="tests.test_state.Pair")


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def init_state(self, batch: int) -> list[Pair]:
        return [Pair(torch.zeros(batch, 2), torch.zeros(batch, 3, 5)) for _ in range(2)]


def random_state(batch: int) -> list[Pair]:
    torch.manual_seed(1)
    return [Pair(torch.randn(batch, 2), torch.randn(batch, 3, 5)) for _ in range(2)]


def test_clone_shares_nothing_and_detach_cuts() -> None:
    state = random_state(2)
    state[0].h.requires_grad_()
    copy = st.clone(state)
    with torch.no_grad():
        copy[0].h.add_(1)
    assert not torch.equal(copy[0].h, state[0].h)
    assert copy[0].h.requires_grad
    assert not st.detach(copy)[0].h.requires_grad


@pytest.mark.parametrize("rows", [1, [2, 0], slice(1, 3), torch.tensor([1, 1])], ids=str)
def test_index_copies_rows(rows: object) -> None:
    state = random_state(3)
    picked = st.index(state, rows)  # type: ignore[arg-type]
    keep = [rows] if isinstance(rows, int) else rows
    assert torch.equal(picked[1].taps, state[1].taps[keep])  # type: ignore[index]
    before = state[1].taps.clone()
    picked[1].taps.zero_()
    assert torch.equal(state[1].taps, before)


def test_stack_undoes_index() -> None:
    state = random_state(3)
    again = st.stack([st.index(state, i) for i in range(3)])
    assert torch.equal(again[0].h, state[0].h)
    assert st.num_bytes(state) == 2 * 3 * (2 + 15) * 4
    with pytest.raises(ValueError, match="different structures"):
        st.stack([state, state[:1]])
    with pytest.raises(ValueError, match="at least one"):
        st.stack([])


def test_file_gives_back_the_same_bits_to_the_same_model_only(tmp_path: Path) -> None:
    state, path = random_state(2), tmp_path / "stream.safetensors"
    st.save(state, path, Toy())
    again = st.load(path, Toy())
    assert torch.equal(again[0].h, state[0].h)
    assert torch.equal(again[1].taps, state[1].taps)
    with pytest.raises(ValueError, match="another model"):
        st.load(path, Toy(seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["stream.safetensors"]


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a saved state"):
        st.load(tmp_path / "other.safetensors", Toy())
    path = tmp_path / "s.safetensors"
    st.save(random_state(1), path, Toy())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read"):
        st.load(path, Toy())
    with pytest.raises(ValueError, match="cannot be read"):
        st.load(tmp_path / "absent", Toy())
    with pytest.raises(ValueError, match="no directory"):
        st.save(random_state(1), tmp_path / "nowhere" / "s", Toy())


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    st.save(random_state(1), tmp_path / "s", Toy())
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "s").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_files_are_flushed_before_they_take_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(st, "flush", lambda path: events.append((path.name, (tmp_path / "s").exists())))
    st.save(random_state(1), tmp_path / "s", Toy())
    assert events == [("state", False), (tmp_path.name, True)]


def test_a_file_without_a_fingerprint_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "s", metadata={"format": "stateline-state"})
    with pytest.raises(ValueError, match="does not say which model it belongs to"):
        st.load(tmp_path / "s", Toy())


def test_the_same_weights_in_another_configuration_are_another_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 8, "n_layer": 1, "vocab_size": 16}
    model, other = (LanguageModel(ModelConfig(**sizes, norm_eps=eps)) for eps in (1e-5, 1e-3))
    other.load_state_dict(model.state_dict())
    st.save(model.init_state(1), tmp_path / "s", model)
    st.load(tmp_path / "s", model)
    with pytest.raises(ValueError, match="another model"):
        st.load(tmp_path / "s", other)


FULL_DISK = """
import resource, sys, torch
from stateline import state as st
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow beyond 50 kB
try:
    st.save([torch.randn(1, 100_000)], sys.argv[1], torch.nn.Linear(1, 1))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "s"
    st.save(random_state(1), path, Toy())
    before = path.read_bytes()
    told = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=True, capture_output=True, text=True)
    assert f"state.save: {path} could not be written" in told.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
