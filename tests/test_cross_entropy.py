"""cross_entropy against float64: values and gradients, padding columns, ignored rows, extreme logits, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import BACKENDS, BOUND, DTYPES, close, leaf
from torch import Tensor

from stateline import ops


def answer(logits: Tensor, targets: Tensor, classes: int, ignored: Tensor) -> Tensor:
    """log of a sum of exponentials, one term after another, with no maximum taken out."""
    x = logits.double()[:, :classes]
    own = torch.nn.functional.one_hot(targets.masked_fill(ignored, 0), classes).double()
    total = (x - x.detach().median()).exp().sum(1).log() + x.detach().median()
    return (total - (x * own).sum(1)).masked_fill(ignored, 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "classes"), [(0, 5, 5), (1, 1, 1), (3, 17, 15), (9, 61, 61), (2, 4096, 4096), (5, 9001, 8999)]
)
def test_values_and_gradients(backend: str, dtype: torch.dtype, rows: int, width: int, classes: int) -> None:
    wide = leaf((rows, width + 3), dtype, 3.0)
    logits, targets = wide[:, 1 : 1 + width], torch.randint(classes, (rows,))
    ignored = torch.arange(rows) % 4 == 2
    targets[ignored] = -7
    exact = logits.to(torch.float64, copy=True).requires_grad_()
    want = answer(exact, targets, classes, ignored)
    given = logits.clone()
    given[ignored] = float("nan")
    given[:, classes:] = float("nan")
    given = (wide.copy_(torch.cat([wide[:, :1], given, wide[:, -2:]], 1)))[:, 1 : 1 + width].requires_grad_()
    loss = ops.cross_entropy(given, targets.int(), classes=classes, ignore_index=-7, backend=backend)
    slope = torch.randn(rows, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(want, exact, slope)
    (got,) = torch.autograd.grad(loss, given, slope.to(loss.dtype))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.dtype == dtype
    close("loss", loss, want, loss.dtype)
    close("gradient", got, wanted, dtype)
    assert not got[ignored].any()
    assert not got[:, classes:].any()
    assert not loss[ignored].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: str) -> None:
    inf = float("inf")
    x = torch.tensor([[1e4, -1e4, 0.0], [-inf, 2.0, -inf], [-3e38, 3e38, 0.0], [0.0, float("nan"), 0.0]])
    x.requires_grad_()
    loss = ops.cross_entropy(x, torch.tensor([0, 1, 1, 0]), backend=backend)
    assert loss[:3].tolist() == [0, 0, 0]
    assert loss[3].isnan()
    (grad,) = torch.autograd.grad(loss[:3].sum(), x)
    assert grad[:3].abs().max() <= BOUND[torch.float32]
    assert ops.cross_entropy(x, torch.tensor([1, 0, 0, -100]), backend=backend)[:2].tolist() == [2e4, inf]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    x, targets = leaf((7, 5000), torch.float32).requires_grad_(), torch.randint(5000, (7,))
    loss = ops.cross_entropy(x, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    alone = x[4:5].detach().requires_grad_()
    single = ops.cross_entropy(alone, targets[4:5], backend=backend)
    if backend != "reference":
        assert torch.equal(single, loss[4:5])
        assert torch.equal(torch.autograd.grad(single.sum(), alone)[0], grad[4:5])


def test_compiles_and_transforms() -> None:
    x, targets = leaf((4, 9), torch.float32).requires_grad_(), torch.tensor([0, 8, -100, 3])

    def run(x: Tensor) -> Tensor:
        return ops.cross_entropy(x, targets).sum()

    want = torch.autograd.grad(run(x), x)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], want)
    assert torch.equal(torch.func.grad(run)(x), want)
    rows = torch.func.vmap(torch.func.grad(lambda v, t: ops.cross_entropy(v[None], t[None]).sum()))(x, targets)
    assert torch.allclose(rows, want, atol=1e-6)


@pytest.mark.parametrize("given", [
    (torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.long), {}, "logits has shape (2, 3, 4), expected (r, v)"),
    (torch.randn(2, 3), torch.zeros(3, dtype=torch.long), {}, "targets has shape (3,), expected (r,) with r = 2"),
    (torch.randn(2, 3), torch.zeros(2), {}, "targets is float32"),
    (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), {}, "logits is int64"),
    (torch.randn(2, 3), torch.tensor([0, 3]), {}, "a target is 3, expected 0 to 2 or ignore_index = -100"),
    (torch.randn(2, 3), torch.tensor([0, 2]), {"classes": 2}, "a target is 2, expected 0 to 1"),
    (torch.randn(2, 3), torch.tensor([0, -1]), {}, "a target is -1"),
    (torch.randn(2, 3), torch.tensor([0, 1]), {"classes": 4}, "classes is 4"),
    (torch.randn(2, 3), torch.tensor([0, 1]), {"ignore_index": 2**40}, "ignore_index is 1099511627776"),
], ids=lambda given: given[-1])  # fmt: skip
def test_wrong_arguments_are_named(given: Any) -> None:
    logits, targets, options, message = given
    with pytest.raises((ValueError, TypeError)) as caught:
        ops.cross_entropy(logits, targets, **options)
    assert message in str(caught.value)
