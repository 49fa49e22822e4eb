"""Gates from document frequencies: counted by hand, streamed, given to a language model, trained with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import tiny

import stateline
from stateline import LanguageModel, ModelConfig
from stateline.training import tfidf, train
from stateline.training.text import Layout, TokenText
from stateline.training.tfidf import DocumentFrequency


def corpus(seed: int = 0) -> tuple[list[list[int]], TokenText]:
    """Documents of many lengths, and the same as a text of three shards whose bounds are not the documents'."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, rng.integers(2, 40), rng.integers(0, 30)).tolist() for _ in range(25)]
    ids = np.concatenate([np.array(d, np.uint16) for d in documents])
    starts = np.cumsum([0, *map(len, documents[:-1])])
    return documents, TokenText(np.array_split(ids, 3), layout=Layout(starts=starts.astype(np.int64)))


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_frequencies_are_those_counted_by_hand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfidf, "_BLOCK", block)
    documents, text = corpus()
    streamed, single = DocumentFrequency(50), DocumentFrequency(50)
    streamed.add_text(text)
    for document in documents:
        single.add(document)
    wanted = [sum(i in d for d in documents) for i in range(50)]
    assert streamed.containing.tolist() == single.containing.tolist() == wanted
    assert streamed.documents == single.documents == 25
    assert np.allclose(streamed.idf(), [math.log(26 / (1 + c)) + 1 for c in wanted])


def test_a_section_counts_the_document_it_begins_in() -> None:
    text = TokenText([np.arange(10, dtype=np.uint8)], layout=Layout(starts=np.array([0, 4, 8])))
    counts = DocumentFrequency(10)
    counts.add_text(text.section(2, 6))
    assert counts.documents == 2
    assert counts.containing.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]


def test_gates_grow_with_rarity() -> None:
    counts = DocumentFrequency(4)
    for document in ([0, 1, 1], [0, 2], [0, 1]):
        counts.add(document)
    gates = counts.gates(0.5, 0.9)
    assert gates.dtype == torch.float32
    assert torch.allclose(gates[[0, 2, 3]], torch.tensor([0.5, 0.9, 0.9]))  # what never occurred is as rare as can be
    assert 0.5 < gates[1] < 0.9


def test_errors() -> None:
    counts = DocumentFrequency(4)
    with pytest.raises(ValueError, match="every token in them is in as many as any other"):
        counts.gates()
    counts.add([0, 1])
    with pytest.raises(ValueError, match=r"1 documents were counted.*Count more documents"):
        counts.gates()
    with pytest.raises(ValueError, match="ids from 2 to 7, expected whole numbers below 4"):
        counts.add([7, 2])
    assert counts.documents == 1, "a refused document was counted"
    with pytest.raises(ValueError, match="low is 2"):
        counts.gates(2)


def test_a_language_model_reads_its_table() -> None:
    model = LanguageModel(
        ModelConfig(d_model=12, n_layer=2, vocab_size=9, ssm_cfg={"layer": "GatedSSM", "gate": "given"})
    )
    ids = torch.tensor([[3, 5, 3, 1, 8]])
    before = model(ids)
    model.backbone.token_gate[5] = 0.0  # forgets all before it, itself included
    after = model(ids)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2:], before[:, 2:], atol=1e-3)
    state = model.extend(ids[:, :2])[1]
    assert all(not layer.h.any() for layer in state.layers)
    assert model.bfloat16().backbone.token_gate.dtype == torch.float32
    assert LanguageModel(ModelConfig(d_model=12, n_layer=1, vocab_size=9)).backbone.token_gate is None


def test_training_takes_the_table_from_its_text(tmp_path: Path) -> None:
    lines = [f"The {word} of the {word} is strong and free. " * 9 for word in ("state", "union", "sum", "zoo")]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    options = {"size": None, "d_model": 16, "n_layer": 1, "mixer": "GatedSSM", "gate": "tfidf", "d_state": 16}
    options |= {"steps": 2, "val_fraction": 0.2, "document_separator": r"\n", "out": str(tmp_path / "run")}
    model = train(tiny(tmp_path / "a.txt", **options)).model
    gate = model.backbone.token_gate
    assert gate[ord("e")] == gate[ord("s")] == pytest.approx(0.9)
    assert gate[ord("q")] == 1
    assert gate[ord("t")] < gate[ord("u")] < 1
    stateline.save(model, tmp_path / "half", dtype=torch.bfloat16)
    for saved in ("run", "half"):
        assert torch.equal(stateline.load(tmp_path / saved).backbone.token_gate, gate)
