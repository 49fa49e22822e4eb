"""Kill -9 at random moments, resume, again and again: in the end the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_resume import LINES, Child, assert_same_bits, tiny

import stateline
from stateline.training import resume, train

STEPS = 60
SETTINGS: dict[str, Any] = {
    "steps": STEPS, "save_every": 4, "keep": 1, "eval_every": 6, "eval_bytes": 400, "sample_every": 0, "log_every": 1,
    "ema": 0.9, "schedule": "wsd", "on_spike": "skip", "spike_window": 20, "patience": 100,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def check_what_is_there(root: Path) -> int:
    """The step of the checkpoint that `latest` names, all of which must load; 0 if there is none yet."""
    last = resume.newest(root)
    if last is None:
        return 0
    position, _, _ = resume.read_about(last)
    assert last.name == f"step-{position.step:08d}"
    for file in last.rglob("*.safetensors"):
        assert load_file(file), file
    resume.load_model(last)
    stateline.load(root)  # the best model so far
    return position.step


def survive(text: Path, kills: int, seed: int, **settings: Any) -> list[int]:
    """Train to the end through `kills` kills at random moments; returns where each attempt had got to."""
    root, random_source, reached = text.parent / "run", random.Random(seed), [0]
    slow = {**SETTINGS, **settings}
    stride = max(1, 2 * (STEPS - 10) // kills)  # so that the kills are over before the run is
    for attempt in range(kills + 1):
        how = {"resume": True} if (root / "run.json").exists() else {}
        run = Child(text, **slow, **how)
        if attempt == kills:
            run.process.join(300)
            assert run.process.exitcode == 0, run.text()
        else:
            target = reached[-1] + random_source.randint(1, stride)
            if target < STEPS - 1 and random_source.random() < 0.8:  # else while it starts
                run.wait_for_step(target)
            time.sleep(random_source.uniform(0, 0.03))
            run.kill(signal.SIGKILL)
        reached.append(check_what_is_there(root))
    return reached


def check_the_end(text: Path, reached: list[int], **settings: Any) -> None:
    """Bits, metrics and data of a run that was killed are those of one that was not."""
    straight = train(tiny(text, "straight", **(SETTINGS | settings)))
    root = text.parent / "run"
    assert_same_bits(straight.directory, root)
    ends = [resume.newest(folder) for folder in (straight.directory, root)]
    means = [load_file(end / "ema.safetensors") for end in ends if end]
    assert all((means[0][name] == means[1][name]).all() for name in means[0])
    assert reached == sorted(reached), "no attempt may lose what an earlier one had saved"
    position, _, _ = resume.read_about(resume.newest(root))  # type: ignore[arg-type]
    assert (position.step, position.windows) == (STEPS, STEPS * 2 * 2), "every window was counted once"
    logged = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "bpb" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in logged if "val_bpb" in r] == list(range(6, STEPS + 1, 6))
    assert not [p for p in (root / "checkpoints").iterdir() if p.name.startswith(".")]


def test_killed_again_and_again(text: Path) -> None:
    reached = survive(text, kills=5, seed=1)
    assert len(set(reached)) > 2, "the kills came before anything was saved: the test shows nothing"
    check_the_end(text, reached)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_killed_forty_times(text: Path, seed: int) -> None:
    more = {"save_every": 1, "tensorboard": seed == 1, "checkpoint_activations": seed == 2}
    check_the_end(text, survive(text, kills=40, seed=seed, **more), **more)
