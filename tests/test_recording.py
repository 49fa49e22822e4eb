"""A recorded batch on stand-ins for CUDA: what making the recording leaves behind. tests/gpu has the real one."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_models import ids, small
from torch import nn

from stateline.training import resume
from stateline.training.data import Batch
from stateline.training.graphs import Gradients


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Gradients]:
    """`Gradients` that run on the CPU: its generator is the device's, capturing computes nothing, a replay does."""
    here: list[Gradients] = []

    class Here(Gradients):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            here.append(self)

    @contextlib.contextmanager
    def capture(graph: Any, **_: Any) -> Any:
        grads, state = [None if p.grad is None else p.grad.clone() for p in here[-1]._learning], torch.get_rng_state()
        yield
        torch.set_rng_state(state)
        for p, grad in zip(here[-1]._learning, grads, strict=True):
            assert (p.grad is None) == (grad is None), "a captured gradient has no memory of its own"
            if p.grad is not None and grad is not None:
                p.grad.copy_(grad)

    def replay() -> None:
        here[-1]._loss = here[-1]._pass()

    nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
    for name, value in {
        "device": nothing, "stream": nothing, "graph": capture, "current_stream": nothing, "synchronize": nothing,
        "Stream": lambda: SimpleNamespace(wait_stream=nothing), "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "get_rng_state": lambda _: torch.get_rng_state(), "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled: contextlib.nullcontext())
    return Here


def test_making_a_recording_draws_none_of_the_random_numbers(recorder: type[Gradients]) -> None:
    """Else a run that is resumed, and records again, would drop others than one that was never stopped."""
    model, x = small(n_layer=4).train(), ids(2, 9)
    model.backbone.dropout = 0.5
    gradients, plain = recorder(model, None), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain.append(model.loss(x, x).item())
    torch.manual_seed(1)
    assert float(gradients(Batch(x, x), 1.0)) == plain[0]
    torch.manual_seed(2)
    assert float(gradients(Batch(x, x), 1.0)) == plain[1] != plain[0]


def test_what_the_loss_does_not_reach_has_no_gradient(recorder: type[Gradients]) -> None:
    """Zeros would be decayed by an optimiser that skips parameters without a gradient."""
    model, x = small(), ids(2, 9)
    model.unused = nn.Parameter(torch.ones(3))
    model.loss(x, x).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    gradients = recorder(model, None)
    for _ in range(2):
        gradients(Batch(x, x), 1.0)
    for name, p in model.named_parameters():
        grad = want[name]
        if grad is None:
            assert p.grad is None, name
        else:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 2 * grad)
    assert want["unused"] is None


def test_the_random_state_of_every_device_is_part_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    states, found = [torch.arange(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)], {}
    with monkeypatch.context() as patch:
        for name in ("is_available", "is_initialized"):
            patch.setattr(torch.cuda, name, lambda: True)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: found.update({device: state}))
        saved = resume._random_state()
        drawn = torch.rand(3)
        resume._set_random_state(saved)
    assert torch.equal(torch.rand(3), drawn)
    assert list(found) == [0, 1]
    assert all(map(torch.equal, found.values(), states))
