"""Registers raw custom ops, so that torch.compile and torch.export see each as one opaque node.

The raw ops carry no autograd formula: each public operation wraps them in an autograd.Function, because formulas
attached to a custom op make torch.func.jvp return zero tangents silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from stateline.checks import fail

LIBRARY = torch.library.Library("stateline", "DEF")
#: Types of tensors that have no way of their own to run an op.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `stateline::<schema>`, run by `run` on CPU and CUDA tensors and by `fake` on shapes alone."""
    mutable = "(a!)" in schema  # the step forms, which write into their first argument
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    # No gradient: an exported graph calls the raw op with parameters that want one, outside the Function.
    quiet = _without_grad(_counted(run) if mutable else run)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, quiet, key)
    torch.library.register_fake(f"stateline::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.stateline, name).default
    if not mutable:
        torch.library.register_vmap(f"stateline::{name}", lambda info, dims, *args: _one_by_one(op, info, dims, args))
    return _direct(op, quiet)


def _direct(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, past the dispatcher where it would only find its way to `run`: half of what a small op costs the host."""

    @functools.wraps(run)
    def direct(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or type(args[0]) not in PLAIN
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd._profiler_enabled()
        ):
            return op(*args)
        return run(*args)

    return direct


def _without_grad(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under no_grad, which costs nothing where there is none anyway: inside a Function's forward pass."""

    @functools.wraps(run)
    def quiet(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return quiet


def _counted(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, telling autograd that its first argument was written: C++ does so behind its back."""

    @functools.wraps(run)
    def counted(state: torch.Tensor, *args: Any) -> Any:
        out = run(state, *args)
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)
        return out

    return counted


def _one_by_one(op: Callable[..., Any], info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap as a loop: batch axes belong into the batch of an op, so this serves per-sample gradients, not speed."""
    rows = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], torch.Tensor):
        return torch.stack(rows), 0
    outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)


def call(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`, or only its forward pass where no derivative can be wanted.

    Function.apply binds its arguments to names by inspection, which takes longer than a small op; nothing here has
    defaults, so the step below it does as well outside tracing and transforms.
    """
    # Forward mode counts as wanting a derivative, though there is none, so that the Function can refuse: a raw op has
    # zero tangents.
    if not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
        return function.forward(*args)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]  # torch does not type it


def or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, or an empty one where a raw op must return something for an absent argument."""
    return like.new_empty(0) if tensor is None else tensor


def first_only(op: str, grad: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`grad` of an op that has first derivatives only; differentiating it again raises instead of giving zeros.

    For formulas whose incoming gradient may be a constant, which `once_differentiable` lets through. inputs: what the
    gradient depends on.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    only: torch.Tensor = _FirstOnly.apply(grad, op, *inputs)
    return only


class _FirstOnly(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: torch.Tensor, op: str, *inputs: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> None:
        raise fail(ctx.op, "a second derivative was asked for, it has first ones only.", error=RuntimeError)
