"""torch.compile of the language model: one graph serves every batch and length, and computes what eager does."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from makers import small
from test_layers import close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stateline import LanguageModel, ops
from stateline.ops import library

SIZES = [(2, 9), (3, 5), (2, 14), (5, 3)]  # above 1 each: PyTorch makes a graph of its own for sizes of 1

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor compiles C++ at run time")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(b: int, t: int) -> Tensor:
    return torch.randint(61, (b, t))


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function compiled whole with free sizes (aot_eager: no code is generated), and the graphs made by each call.

    The first call may make several: torch starts again where it learns that a number should stay symbolic.
    """
    counter, made = CompileCounterWithBackend("aot_eager"), []
    fast = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)

    def call(*args: Any) -> Any:
        out = fast(*args)
        made.append(int(counter.frame_count))
        return out

    return call, made


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: LanguageModel, loss: Callable[..., Tensor], batches: list[Tensor]) -> list[float]:
    steps, losses = optimiser(model), []
    for batch in batches:
        steps.zero_grad()
        value = loss(batch[:, :-1], batch[:, 1:])
        value.backward()
        steps.step()
        losses.append(value.item())
    return losses


def test_training_is_eagers_and_no_length_compiles_again() -> None:
    model, twin = small(n_layer=1).train(), small(n_layer=1).train()
    twin.load_state_dict(model.state_dict())
    fast, made = compiled(model.loss)
    batches = [ids(b, t) for b, t in SIZES for _ in range(2)]
    got, want = train(model, fast, batches), train(twin, twin.loss, batches)
    assert len(set(made)) == 1, "a new batch or length compiled again"
    assert got == pytest.approx(want, rel=1e-5)
    assert len(set(want)) == len(want), "training changed nothing"
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name  # Adam divides small gradients by their own size


@torch.no_grad()
def test_compiling_warns_of_nothing_in_our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of Python's, for one, which torch looks through."""
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled(small().loss)[0](ids(2, 9), ids(2, 9))
    assert not [str(w.message) for w in said if "stateline" in str(w.message)]


def test_inference_is_eagers_and_no_length_compiles_again() -> None:
    model = small(n_layer=1)
    forward, first = compiled(model)
    extend, second = compiled(model.extend)
    step, third = compiled(model.step_)
    for b, t in SIZES:
        x, state = ids(b, t), model.init_state(b)
        close(forward(x), model(x), torch.float32)
        _, state = model.extend(x, state)
        close(extend(x, state), model.extend(x, state), torch.float32)
        _, twin = model.extend(x, model.init_state(b))
        close(step(x[:, 0], state), model.step_(x[:, 0], twin), torch.float32)
        close(state, twin, torch.float32)
    assert [len(set(made)) for made in (first, second, third)] == [1, 1, 1], "a new batch or length compiled again"


@pytest.mark.full
@torch.no_grad()
def test_lengths_and_packed_bounds_may_differ_from_call_to_call() -> None:
    """Values of lengths and cu_seqlens are data, not constants of the graph."""
    model = small(n_layer=1)
    padded, first = compiled(lambda x, n: model.extend(x, lengths=n))
    packed, second = compiled(lambda x, n: model.extend(x, cu_seqlens=n))
    for t, n in ((9, 4), (12, 0), (7, 7)):
        x, lengths, bounds = ids(2, t), torch.tensor([t, n]), torch.tensor([0, n, n, 2 * t])
        close(padded(x, lengths), model.extend(x, lengths=lengths), torch.float32)
        row = x.reshape(1, -1)
        close(packed(row, bounds), model.extend(row, cu_seqlens=bounds), torch.float32)
    assert (len(set(first)), len(set(second))) == (1, 1)


@pytest.mark.full  # generating and compiling the backward pass takes most of a minute
@needs_compiler
def test_inductor_trains() -> None:
    """The default back end, whose generated code replaces everything around our operations, backward pass included."""
    model, twin = small(n_layer=1).train(), small(n_layer=1).train()
    twin.load_state_dict(model.state_dict())
    batches = [ids(2, 8), ids(2, 8)]
    got = train(model, torch.compile(model.loss, fullgraph=True), batches)
    assert got == pytest.approx(train(twin, twin.loss, batches), rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("old", [True, False])
def test_a_compiler_that_writes_out_what_it_does_not_know_knows_our_ops(
    old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to torch 2.12, an unknown op behind a dozen layers kept inductor writing for ever."""
    from torch._inductor import config, graph, lowering

    for op in library.DEFINED:
        monkeypatch.delitem(lowering.lowerings, op, raising=False)
    unknown: list[Any] = []
    fallback = lowering.make_fallback
    monkeypatch.setattr(graph, "make_fallback", lambda op, **how: (unknown.append(op), fallback(op, **how)))
    monkeypatch.setattr(library, "WRITES_OUT", old)
    scale = torch.rand(4)

    def twice(x: Tensor) -> Tensor:
        return ops.rms_norm(ops.rms_norm(x, scale)[0], scale)[0]

    x = torch.rand(3, 4)
    with config.patch(force_disable_caches=True):
        torch.testing.assert_close(torch.compile(twice, fullgraph=True)(x), twice(x))
    assert bool(unknown) is not old
    assert (torch.ops.stateline.ssd.default in lowering.lowerings) is old
