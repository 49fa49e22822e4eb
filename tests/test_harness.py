"""lm-evaluation-harness: likelihoods beside plain arithmetic, tokens read once, and the harness itself, offline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from makers import small

import stateline
from stateline.apps import harness


def plainly(model: stateline.LanguageModel, context: list[int], tail: list[int]) -> tuple[float, bool]:
    """The likelihood of a tail, by one pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([context + tail]))[0, len(context) - 1 : -1]
    targets = torch.tensor(tail)
    picked = F.log_softmax(logits.double(), -1)[torch.arange(len(tail)), targets]
    return float(picked.sum()), bool((logits.argmax(-1) == targets).all())


def test_likelihoods() -> None:
    model = small()
    stem = torch.randint(61, (12,)).tolist()
    contexts = [stem, stem[:5], [*stem[:5], 3], [*stem, 1, 2], [9], [*stem[:5], 3, 4], stem]
    pairs = [(context, torch.randint(61, (k,)).tolist()) for context in contexts for k in (1, 4, 2)]
    best = int(model(torch.tensor([stem]))[0, -1].argmax())
    pairs += [(stem, [best]), (stem, [])]
    found = harness.log_likelihoods(model, pairs)
    for (context, tail), answer in zip(pairs, found, strict=True):
        logprob, greedy = plainly(model, context, tail) if tail else (0.0, True)
        assert answer.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
        assert answer.greedy == greedy
    assert found[-2].greedy
    assert harness.log_likelihoods(model, []) == []
    with pytest.raises(ValueError, match="harness: a context is empty"):
        harness.log_likelihoods(model, [([], [1])])


def test_what_is_shared_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small(), []
    extend = model.extend

    def counting(ids: Any, state: Any, **options: Any) -> Any:
        read.append(ids.numel() if options.get("last_only") else 0)
        return extend(ids, state, **options)

    monkeypatch.setattr(model, "extend", counting)
    shots = list(range(40))
    questions = [[*shots, 50, i] for i in range(6)]
    harness.log_likelihoods(model, [(q, tail) for q in questions for tail in ([1, 2], [3], [4, 5, 6])])
    assert sum(read) == 41 + 6
    read.clear()
    branches = [[*shots, 1, 2], [*shots, 1, 3], [*shots[:20], 60], [*shots[:20], 60, 5], [*shots[:10], 60]]
    harness.log_likelihoods(model, [(context, [1]) for context in branches])
    assert sum(read) == 42 + 1 + 1 + 1 + 1


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def bundled() -> Any:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra `eval`, 500 MB) is not installed")
    return harness.harness_model(stateline.load("bundled"))


@pytest.mark.full
def test_the_harness_interface(bundled: Any) -> None:
    model = stateline.load("bundled")
    text = "We the people of the United States"
    asked = [("We the people", " of the"), ("", "We the"), ("We the ", "people")]
    pairs = [*asked[:2], ("We the", " people")]  # the harness gives a last space to the continuation
    for (context, tail), found in zip(pairs, bundled.loglikelihood([request(*p) for p in asked], True), strict=True):
        logprob, greedy = plainly(model, list(context.encode()) or [10], list(tail.encode()))
        assert found == (pytest.approx(logprob, rel=1e-4), greedy)
    rolled = bundled.loglikelihood_rolling([request(text), request("a")], True)
    wanted = [plainly(model, [10], list(part.encode()))[0] for part in (text, "a")]
    assert rolled == pytest.approx(wanted, rel=1e-4)
    options = {"until": ["\n", "the"], "max_gen_toks": 20}
    greedy = stateline.generation.SamplingConfig(temperature=0)
    wanted_text = "".join(stateline.generate(model, text, max_tokens=20, sampling=greedy, stop=["\n", "the"]))
    assert bundled.generate_until([request(text, options)], True) == [wanted_text]


@pytest.mark.full
def test_simple_evaluate_offline(bundled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"q": "The United", "a": [" States", " zqxvk"], "gold": 0},
        {"q": "in the year of our", "a": [" qqq", " Lord"], "gold": 1},
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: ours\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'rows.json'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(model=bundled, tasks=["ours"], task_manager=tasks, bootstrap_iters=0)
    assert result["results"]["ours"]["acc,none"] == 1.0


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"harness: .*stateline\[eval\]"):
        harness.harness_model(small())
