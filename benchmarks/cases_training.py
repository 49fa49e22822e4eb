"""Training steps: a 130M language model forward and backward, beside a peer's, with the memory that each needs.

Memory is the peak of a fresh process, less what the process held before the step, so that candidates do not share one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks import peers
from benchmarks.cases import OURS, Case
from benchmarks.measure import ROOT, Work

from stateline.models import LanguageModel, ModelConfig

D_MODEL, N_LAYER, VOCABULARY = 768, 24, 50280
BATCH, LENGTH = 1, 512
CHECKPOINTED = f"{OURS}, activations computed again"

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def candidates() -> dict[str, Callable[[], tuple[torch.nn.Module, Loss] | None]]:
    """What makes each candidate's model and its loss (ids, targets) -> scalar; None where it is not installed."""

    def ours(again: bool = False) -> tuple[torch.nn.Module, Loss]:
        model = LanguageModel(ModelConfig(d_model=D_MODEL, n_layer=N_LAYER, vocab_size=VOCABULARY))
        model.backbone.checkpoint_activations = again
        return model, model.loss

    return {
        OURS: ours,
        CHECKPOINTED: lambda: ours(again=True),
        "mambapy": lambda: peers.mambapy_language_model(D_MODEL, N_LAYER, VOCABULARY),
    }


def step(name: str) -> Work | None:
    """Forward and backward of one batch, gradients freed before the next; None where the peer is not installed."""
    torch.manual_seed(0)
    made = candidates()[name]()
    if made is None:
        return None
    model, loss = made
    ids, targets = torch.randint(VOCABULARY, (2, BATCH, LENGTH)).unbind()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        loss(ids, targets).backward()

    return run


def peak_mb(name: str) -> float:
    """MB that the first step adds to a process that holds the model; measured in a process of its own."""
    code = f"from benchmarks.cases_training import report_peak; report_peak({name!r}, {torch.get_num_threads()})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out)["mb"])


def report_peak(name: str, threads: int) -> None:
    """Print the figure of `peak_mb` for this process."""
    torch.set_num_threads(threads)
    run = step(name)
    assert run is not None, f"{name} is not installed"
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew: building the model has one of its own
    run()
    print(json.dumps({"mb": round(_status("VmHWM") - before, 1)}))


def training() -> Iterator[Case]:
    """The training step of the 130M shape; `peak_mb` is each candidate's own."""
    found: dict[str, Any] = {}

    def make(with_peers: bool) -> dict[str, Work]:
        names = [
            OURS,
            CHECKPOINTED,
            *(name for name in candidates() if name not in (OURS, CHECKPOINTED) and with_peers),
        ]
        work = {name: run for name in names if (run := step(name)) is not None}
        found.update({name: peak_mb(name) for name in work})
        return work

    shape = f"b{BATCH} t{LENGTH} d{D_MODEL} layers{N_LAYER} v{VOCABULARY}"
    yield Case("130M training step", shape, "float32", make, BATCH * LENGTH, lambda: {"peak_mb_by": dict(found)})


def _status(key: str) -> float:
    """A figure of /proc/self/status in MB; Linux only."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6
