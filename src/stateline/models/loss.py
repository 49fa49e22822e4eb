"""The mean cross-entropy of a head's logits in pieces, so that never more than a piece of them exists.

The gradients of a piece, those of its hidden vectors and of the head's parameters, are formed as soon as its loss is,
and added in float32. The backward pass only multiplies what is there by the gradient of the loss. The head is called as
a module and differentiated by autograd, so adapters, quantised and parallel heads work as they are.
Suffixes: r row (token), d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from stateline import ops
from stateline.ops.library import first_only

Head = Callable[[Tensor], Tensor]
#: Numbers that the logits of a piece may have, by device: adding a piece's gradients of the head costs as much as its
#: softmax at some 1,500 tokens on a GPU, and little on a CPU.
LOGITS = {"cuda": 2**28, "cpu": 2**26}
#: What gradients are multiplied by until they are complete: a sum over a piece's tokens then fits into float16.
SHRUNK = 2.0**-6


def piece_of(classes: int, device: str) -> int:
    """Tokens of a piece: the largest power of two whose logits are at most those of `LOGITS`, at least 256."""
    return max(256, 1 << (LOGITS.get(device, LOGITS["cpu"]) // classes).bit_length() - 1)


def mean_cross_entropy(
    head: nn.Module, x: Tensor, targets: Tensor, classes: int, ignore_index: int, piece: int
) -> Tensor:
    """Mean −log softmax(head(x))[target] over the targets that count, 0 if none does; float32 (float64) scalar.

    x: (r, d).   targets: (r).   classes: columns of head(x) that count.   piece: rows at once.
    """
    counted = (targets != ignore_index).sum().clamp(min=1)
    total = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    def losses(part: Tensor, wanted: Tensor) -> Tensor:
        return ops.cross_entropy(head(part), wanted, classes=classes, ignore_index=ignore_index)

    learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in head.parameters()))
    compiling = torch.compiler.is_compiling()
    if learns and x.shape[0] > piece and not compiling and not torch._C._are_functorch_transforms_active():
        return _formed(head, losses, x, targets, counted, piece)
    # split, not a range over tokens: a compiled graph then depends on the number of pieces, not on the length
    again = learns and compiling and x.shape[0] > piece  # a compiler does not trace a gradient inside a forward pass
    for part, wanted in zip(x.split(piece), targets.split(piece), strict=True):
        loss = checkpoint(losses, part, wanted, use_reentrant=False) if again else losses(part, wanted)
        total = total + loss.sum()
    return total / counted


def _formed(
    head: nn.Module, losses: Callable[..., Tensor], x: Tensor, targets: Tensor, counted: Tensor, piece: int
) -> Tensor:
    """The mean loss with its gradients already formed, of a head called once for each piece."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.new_zeros((), dtype=wide)
    parameters: list[Tensor] = [p for p in head.parameters() if p.requires_grad]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if x.requires_grad else None
    sums: list[Tensor | None] = []
    start = 0
    # Hooks of the surrounding graph (offloading, recomputation) are for what waits for its backward pass.
    with torch.autograd.graph.saved_tensors_hooks(_same, _same), torch.enable_grad():
        for part, wanted in zip(x.detach().split(piece), targets.split(piece), strict=True):
            part = part.detach().requires_grad_(x.requires_grad)
            loss = losses(part, wanted)
            if start == 0:
                parameters = _leaves(loss, parameters, part)
                sums = [None] * len(parameters)
            total += loss.detach().sum()
            inputs = [part, *parameters] if dx is not None else parameters
            grads = list(torch.autograd.grad(loss, inputs, torch.full_like(loss, SHRUNK), allow_unused=True))
            if dx is not None:
                dpart = grads.pop(0)
                dx[start : start + len(part)] = 0 if dpart is None else dpart
            for i, grad in enumerate(grads):
                sums[i] = _added(sums[i], grad)
            start += len(wanted)
    found = [(v, g) for v, g in [(x, dx), *zip(parameters, sums, strict=True)] if g is not None]
    factor = 1 / (counted.to(wide) * SHRUNK)
    value: Tensor = _Formed.apply(total / counted, factor, *(v for v, _ in found), *(g for _, g in found))
    return value


def _same(x: Tensor) -> Tensor:
    return x


def _leaves(loss: Tensor, known: list[Tensor], part: Tensor) -> list[Tensor]:
    """`known` and what else `loss` depends on and learns, apart from `part`: a head may use tensors it does not own."""
    found = {id(p): p for p in known}
    for leaf in _variables(loss):
        if leaf is not part:
            found.setdefault(id(leaf), leaf)
    return list(found.values())


def _variables(loss: Tensor) -> Iterator[Tensor]:
    """Leaves of the graph behind `loss`."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            yield cast(Any, node).variable
        waiting += [following for following, _ in node.next_functions]


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A sum over pieces in float32 at least; always memory of its own, for two parameters may get the same gradient."""
    if grad is None:
        return total
    if total is None:
        return grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
    return total.add_(grad)


class _Formed(Function):
    """A loss whose gradients are there: passes each on to its input, times the loss's own gradient."""

    @staticmethod
    def forward(value: Tensor, factor: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, factor, *rest = inputs
        half = len(rest) // 2
        ctx.save_for_backward(factor, *rest[half:])
        ctx.dtypes = [x.dtype for x in rest[:half]]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        factor, *formed = ctx.saved_tensors
        with torch.no_grad():
            scale = dloss * factor
            grads = [_scaled(grad, scale, dtype) for grad, dtype in zip(formed, ctx.dtypes, strict=True)]
        refusing = torch.empty(0, requires_grad=True)
        return None, None, *(first_only("loss", g, refusing) for g in grads), *([None] * len(grads))


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · scale, multiplied in float32 at least and rounded once."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return torch.mul(wide, scale, out=torch.empty(grad.shape, dtype=dtype, device=grad.device))
