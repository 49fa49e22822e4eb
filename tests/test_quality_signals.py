"""The benchmark of accuracy on signals: nothing of a test is learnt from, and no row is made twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import quality_signals as quality


@pytest.mark.parametrize("name", ["acsf1", "exercises", "tones"])
def test_parts_do_not_overlap(name: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([*"abcd"], 300)
    part = {
        "acsf1": rng.choice(["train", "test"], 300),
        "exercises": rng.integers(1, 11, 300).astype(str),
        "tones": rng.choice(["3", "5"], 300),
    }[name]
    for seed in range(5):
        for fold in quality.folds(name, labels, part, seed):
            split, train, test = fold
            assert not set(train) & set(test)
            assert "random" in split or not set(part[train]) & set(part[test])  # people and voices are apart
            kept, learnt, asked = quality.validation(fold, labels, part, seed)
            assert kept == f"{split}, validation"
            assert not set(learnt) & set(asked)
            if name == "exercises":  # settings are chosen on people whom no test knows
                assert {*part[learnt], *part[asked]} == set(quality.TUNED_ON)
                assert not set(part[test]) & set(quality.TUNED_ON)
            else:
                assert sorted([*learnt, *asked]) == sorted(train)
            assert len(learnt) > len(asked) > 0
    if name == "exercises":  # everybody else is asked about once
        tests = [part[test] for s in range(5) for _, _, test in quality.folds(name, labels, part, s)]
        assert sorted(p for t in tests for p in set(t)) == sorted(set(part) - set(quality.TUNED_ON))


def test_rows_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X = [np.full((6 + i % 3, 1), i % 2, dtype="f4") for i in range(24)]
    np.savez(
        tmp_path / "acsf1.npz", X=np.concatenate(X), lengths=[len(x) for x in X], y=[*"ab"] * 12,
        part=["train"] * 16 + ["test"] * 8,
    )  # fmt: skip
    out = tmp_path / "rows.jsonl"
    command = ["--data", str(tmp_path), "--out", str(out), "--sets", "acsf1", "--seeds", "1"]
    command += ["--options", '{"max_epochs": 1}', "--models", "ours", "lstm", "gru"]
    assert quality.main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["ours", "lstm", "gru"]
    sizes = [row["parameters"] for row in rows]
    assert max(sizes) < 1.1 * min(sizes)  # of one size
    out.write_text("\n".join(out.read_text().splitlines()[:2]) + '\n{"set": "acs')  # a run that was killed
    assert quality.main(command) == 0
    assert "| acsf1 | archive |" in capsys.readouterr().out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[:2] == rows[:2]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


def test_a_plan_names_every_fit_once(tmp_path: Path) -> None:
    own = Path(quality.__file__).parent / "signal_plan.json"
    jobs = list(quality.jobs_of(quality.parser().parse_args(["--plan", str(own), "--seeds", "2"])))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)  # a run that is cut has whole seeds
    made = [(job.name, job.split, job.model, job.seed) for job in jobs]
    assert len(set(made)) == len(made)
    assert {(job.name, job.split) for job in jobs if job.model == "ours"} == {
        (name, split) for name in quality.SETS for split in quality.SPLITS.get(name, ("archive",))
    }
    for job in jobs:
        quality.fit_ours(job.model, job.options)  # raises for an option that there is not
    few = [{"sets": ["tones", "acsf1"], "models": ["pitch_7nn"], "splits": ["random"], "seeds": 1, "label": " x"}]
    (tmp_path / "plan.json").write_text(json.dumps(few))
    (job,) = quality.jobs_of(quality.parser().parse_args(["--plan", str(tmp_path / "plan.json"), "--validate"]))
    assert (job.seed, job.name, job.split, job.label) == (0, "tones", "random, validation", " x")
