"""cross_entropy: the loss of predicting one class out of many, and its gradient in one pass each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only

OP = "cross_entropy"
#: Bounds of ignore_index, so that kernels may keep it in 32 bits.
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    classes: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """−log softmax(logits)[target] of each row, in nats: (r) float32 (float64 for float64 logits).

    Args:
        logits: (r, v).   targets: (r) int32 or int64, each below `classes` or `ignore_index`.
        classes: the first columns that count, v if None; later ones only pad the matrix and get the gradient 0.
        ignore_index: rows with this target have loss and gradient 0, whatever they hold.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Softmax runs in float32 (float64), whatever the logits' dtype. Differentiable in logits; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. A target outside the classes is
            found on CPU tensors; on a GPU, and in a compiled graph, its loss is NaN.

    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp().item()
    4.0
    """
    sizes = Sizes(OP)
    sizes.match("logits", logits, "r v")
    sizes.match("targets", targets, "r")
    checks.dtype(OP, "logits", logits, checks.REAL_DTYPES)
    checks.dtype(OP, "targets", targets, checks.INTEGERS, "Targets are column numbers.")
    if classes is None:
        classes = logits.shape[1]
    checks.number(OP, "classes", classes, low=1, high=logits.shape[1], integer=True)
    checks.number(OP, "ignore_index", ignore_index, low=LOWEST, high=HIGHEST, integer=True)
    checks.same_device(OP, {"logits": logits, "targets": targets})
    if checks.can_read(targets):
        _check_targets(targets, classes, ignore_index)
    losses: Tensor = call(_CrossEntropy, logits, targets, classes, ignore_index, backend)[0]
    return losses


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if wrong.any():
        raise checks.fail(
            OP, f"a target is {int(targets[wrong][0])}, expected 0 to {classes - 1} or ignore_index = {ignore_index}."
        )


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.kernel(OP, logits.device.type, backend, logits.dtype).forward(logits, *rest)


def _run_backward(dloss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return backends.kernel(OP, logits.device.type, backend, logits.dtype).backward(dloss, logits, *rest)


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, log_sum = (logits.new_empty(logits.shape[:1], dtype=real) for _ in range(2))
    return loss, log_sum


def _fake_backward(dloss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_WHERE = "Tensor targets, SymInt classes, int ignore_index, str? backend"
_forward = define(f"{OP}(Tensor logits, {_WHERE}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dloss, Tensor logits, Tensor log_sum, {_WHERE}) -> Tensor", _run_backward, _fake_backward
)


class _CrossEntropy(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        logits: Tensor, targets: Tensor, classes: int, ignore_index: int, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(logits, targets, classes, ignore_index, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, targets, classes, ignore_index, backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, targets, output[1])
        ctx.options = (classes, ignore_index, backend)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum = ctx.saved_tensors
        dlogits = _backward(dloss, logits, log_sum, targets, *ctx.options)
        return first_only(OP, dlogits, dloss, logits), None, None, None, None
