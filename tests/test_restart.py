"""Runs that stop before their first checkpoint: --resume starts them again, and nothing that was given is lost."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import LINES, assert_same_bits, records, tiny

from stateline.models import LanguageModel, ModelConfig, checkpoint
from stateline.training import Interrupted, TrainingError, loop, resume, train


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


@pytest.mark.parametrize("how", ["Ctrl-C at step 0", "full disk"])
def test_a_run_without_a_checkpoint_is_resumed_from_its_start(
    text: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train(tiny(text, "straight"))
    with monkeypatch.context() as patch:
        if how == "full disk":  # at step 5, after the best model of step 4

            def full(*_: Any) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(resume, "save_file", full)
            with pytest.raises(TrainingError, match=r"No checkpoint was saved before. Free some space in .*--resume"):
                train(tiny(text))
            assert (text.parent / "run" / "model").is_dir()
        patch.setattr(loop._Run, "_announce", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted, match=r"Nothing was learnt yet. Continue with: .*--resume"):
            train(tiny(text, resume=how == "full disk"))
    assert not (text.parent / "run" / "model").exists(), "the early best model is dropped"
    with pytest.raises(ValueError, match=r"already holds a run.*--resume to continue it"):
        train(tiny(text))
    with pytest.raises(ValueError, match=r"run.json was made with other settings:\n  lr: 0.01 → 0.5\n"):
        train(tiny(text, resume=True, lr=0.5))
    resumed = train(tiny(text, resume=True))
    assert resumed.best_bpb == straight.best_bpb
    assert_same_bits(straight.directory, resumed.directory)
    assert records(resumed.directory) == records(straight.directory)


def test_a_given_model_is_not_lost_before_the_first_checkpoint(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting names it, so it could not be had again."""
    shape = {"d_model": None, "n_layer": None, "d_state": 16}
    own = LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=256, ssm_cfg={"d_state": 4}))
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_announce", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(tiny(text, **shape), model=own)
    straight = train(tiny(text, "straight", **shape), model=own)
    assert not torch.equal(own.state_dict()["backbone.embedding.weight"], before["backbone.embedding.weight"])
    assert train(tiny(text, resume=True, **shape)).best_bpb == straight.best_bpb


def test_a_run_that_replaces_the_one_it_starts_from_keeps_the_weights(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"d_model": None, "n_layer": None, "d_state": 16, "init_from": text.parent / "run"}
    before = train(tiny(text, steps=4)).model.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_announce", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            train(tiny(text, overwrite=True, **shape))
    kept = checkpoint.load(text.parent / "run" / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert train(tiny(text, resume=True, **shape)).steps == 20


def test_a_model_whose_checkpoints_were_deleted_is_kept(text: Path) -> None:
    root = train(tiny(text, steps=3)).directory
    shutil.rmtree(root / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        train(tiny(text, steps=6, resume=True))
    assert (root / "model" / "model.safetensors").is_file()


def test_overwriting_spares_what_is_not_the_runs(text: Path) -> None:
    root = text.parent / "proj"
    (root / "data").mkdir(parents=True)
    (root / "base").mkdir()
    (root / "tensorboard").mkdir()
    corpus = Path(shutil.copy(text, root / "data" / "corpus.txt"))
    mine = [root / "data" / "notes.md", root / "base" / "model.safetensors", root / "tensorboard" / "notes.md"]
    for path in mine:
        path.write_text("precious")
    for _ in range(2):  # no run there, then one
        train(tiny(corpus, out=root, steps=2, overwrite=True, document_separator="half"))
        assert [path.read_text() for path in mine] == ["precious"] * 3
        assert corpus.is_file()
    assert (root / "data" / "train" / "dataset.json").is_file()
    train(tiny(corpus, out=root, steps=2, overwrite=True))
    assert sorted(path.name for path in (root / "data").iterdir()) == ["corpus.txt", "notes.md"]


def test_overwriting_refuses_to_delete_what_it_reads_or_does_not_know(text: Path) -> None:
    root = text.parent / "run"
    (root / "model").mkdir(parents=True)
    (root / "model" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="model is not a run's, and the run would write there"):
        train(tiny(text, overwrite=True))
    shutil.rmtree(root)
    train(tiny(text, steps=2))
    inside = root / "checkpoints" / "step-00000002" / "corpus.txt"
    shutil.copy(text, inside)
    for name, settings in {"the text": {"path": inside}, "val": {"val": inside}}.items():
        with pytest.raises(ValueError, match=f"{name} is .*corpus.txt, which the run in .* would replace or delete"):
            train(tiny(text, overwrite=True, **settings))
    step = root / "checkpoints" / "step-00000002" / "model"
    with pytest.raises(ValueError, match=r"init_from is .*, which the run in .* would replace or delete"):
        train(tiny(text, overwrite=True, init_from=step, d_model=None, n_layer=None, d_state=16))
    (root / "model" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.md is not a run's"):
        train(tiny(text, overwrite=True))
    assert inside.is_file()
    assert (root / "run.json").is_file()


def test_a_data_set_that_is_read_is_not_prepared_over(text: Path) -> None:
    root = train(tiny(text, steps=2, document_separator="half")).directory
    index = (root / "data" / "train" / "dataset.json").read_bytes()
    with pytest.raises(ValueError, match=r"val is .*train, which the run in .* would replace or delete"):
        train(tiny(text, overwrite=True, document_separator="some", val=root / "data" / "train"))
    assert (root / "data" / "train" / "dataset.json").read_bytes() == index
    assert train(tiny(root / "data" / "train", out=root, overwrite=True, steps=1)).steps == 1
