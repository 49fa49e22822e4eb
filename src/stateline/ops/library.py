"""Registers raw custom ops, so that torch.compile and torch.export see each as one opaque node.

The raw ops carry no autograd formula: each public operation wraps them in an autograd.Function, because formulas
attached to a custom op make torch.func.jvp return zero tangents silently.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from stateline.checks import fail

LIBRARY = torch.library.Library("stateline", "DEF")
#: Types of arguments that have no way of their own to run an op: of tensors, and of what else an op takes.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype})
#: The raw ops, every one.
DEFINED: list[Any] = []
#: Whether this torch's compiler, meeting an op that it has not heard of, writes out for a log everything that the op's
#: arguments were computed from: one string for every way back through the graph, so that it never comes to an end with
#: a loss behind a dozen layers. Seen in 2.11, mended in 2.13.
WRITES_OUT = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], direct: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Define `stateline::<schema>`, run by `run` on CPU and CUDA tensors and by `fake` on shapes alone.

    direct: in `run`'s place where nothing but autograd sees the results, whose strides may be others than `fake` says.
    """
    mutable = schema.count("!)")  # the step forms, which write into their first arguments
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    # No gradient: an exported graph calls the raw op with parameters that want one, outside the Function.
    quiet = _without_grad(_counted(run, mutable) if mutable else run)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, quiet, key)
    torch.library.register_fake(f"stateline::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.stateline, name).default
    DEFINED.append(op)
    if not mutable:
        torch.library.register_vmap(f"stateline::{name}", lambda info, dims, *args: _one_by_one(op, info, dims, args))
    return _direct(op, quiet if direct is None else _without_grad(direct))


def _direct(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, past the dispatcher where it would only find its way to `run`: half of what a small op costs the host."""

    @functools.wraps(run)
    def direct(*args: Any) -> Any:
        if WRITES_OUT and torch.compiler.is_dynamo_compiling():
            _announce()
        return run(*args) if seen_by_nobody(args) else op(*args)

    return direct


def seen_by_nobody(args: Sequence[Any]) -> bool:
    """Whether an op's memory may be read and written at once: plain tensors, and nothing that traces or transforms."""
    return not (
        torch.compiler.is_compiling()
        or not _plain(args)
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def _announce() -> bool:
    """Make the ops known to inductor, as opaque nodes that keep their strides: what it makes of an unknown one."""
    from torch._inductor import lowering  # takes a second, and whoever compiles needs it anyway

    for op in DEFINED:
        if op not in lowering.lowerings:
            lowering.make_fallback(op, layout_constraint=lowering.constrain_to_fx_strides)
    return True


# What torch.compiler.assume_constant_result sets, without the compiler that it imports: `_announce` runs while a graph
# is traced, before inductor gets it.
_announce._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as torch does


def _plain(args: Sequence[Any]) -> bool:
    """Whether every argument, those in lists too, is one that `run` can take as it is: it reads tensors' memory."""
    if PLAIN.issuperset(map(type, args)):
        return True
    return all(type(a) in PLAIN or (type(a) in (list, tuple) and _plain(a)) for a in args)


def _without_grad(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under no_grad, which costs nothing where there is none anyway: inside a Function's forward pass."""

    @functools.wraps(run)
    def quiet(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return quiet


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Autograd within a raw op, for gradients found by it: in a dispatch mode (torch.utils.flop_counter's, say) raw ops
    run below autograd, where enable_grad alone changes nothing and every gradient would be missing."""
    keys, unmask = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with torch.enable_grad(), unmask(keys.AutogradFunctionality, False), unmask(keys.ADInplaceOrView, False):
        yield


def _counted(run: Callable[..., Any], mutable: int) -> Callable[..., Any]:
    """`run`, telling autograd that its first `mutable` arguments were written: C++ does so behind its back."""

    @functools.wraps(run)
    def counted(*args: Any) -> Any:
        out = run(*args)
        count_write(*args[:mutable])
        return out

    return counted


def count_write(*written: torch.Tensor) -> None:
    """Tell autograd that tensors were written behind its back."""
    torch.autograd.graph.increment_version([v for v in written if not v.is_inference()])


def _one_by_one(op: Callable[..., Any], info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap as a loop: batch axes belong into the batch of an op, so this serves per-sample gradients, not speed."""

    def row(i: int, values: Sequence[Any], dims: Sequence[Any]) -> list[Any]:
        return [
            a if d is None else row(i, a, d) if isinstance(a, list | tuple) else a.select(d, i)
            for a, d in zip(values, dims, strict=True)
        ]

    rows = [op(*row(i, args, dims)) for i in range(info.batch_size)]
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


def transformed() -> bool:
    """Whether a transform of functions or forward mode is at work, outside tracing: what only a Function can answer."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


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


def first_only_of(
    op: str, given: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor], *incoming: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """`first_only` of the gradients of an op's tensors `given`; None where such a tensor is absent.

    incoming: the gradients that these were computed from.
    """
    inputs = (*incoming, *(x for x in given if x is not None))
    pairs = zip(given, grads, strict=True)
    return tuple(None if x is None else first_only(op, g, *inputs) for x, g in pairs)


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
