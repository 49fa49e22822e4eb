"""causal_conv1d: a short depthwise convolution that looks only back, over a sequence or one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops import parts
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.segments import Segments, build

OP = "causal_conv1d"
STEP = "causal_conv1d_step_"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own taps, `y[t] = Σ_j weight[j] x[t - (k-1) + j] + bias`; also the last state.

    Args:
        x: (b, t, d) input.
        weight: (d, k) taps, the last one for the current token.   bias: (d).
        activation: None or "silu".
        initial_state: (n_seq, k-1, d) float32 (float64 where x is): the last k-1 inputs, oldest first; zeros if None.
        lengths, padding_side, cu_seqlens, reverse, backend: as in `selective_scan`.

    Returns:
        y (b, t, d) in x's dtype, 0 at padding, and the state (n_seq, k-1, d): the last k-1 valid inputs, the initial
        state's included when the sequence is shorter.

    Differentiable in every tensor, into the initial state and out of the returned one; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> y, state = causal_conv1d(torch.ones(1, 4, 1), torch.ones(1, 3))
    >>> y[0, :, 0].tolist(), state.shape
    ([1.0, 2.0, 3.0, 3.0], torch.Size([1, 2, 1]))
    """
    sizes = Sizes(OP)
    sizes.match("x", x, "b t d")
    segments = _check(sizes, x, weight, bias, activation, initial_state, (lengths, padding_side, cu_seqlens))
    return call(
        _CausalConv1d, x, weight, bias, initial_state, segments.table, activation == "silu", bool(reverse), backend
    )


def conv_halves(
    xz: Tensor, weight: Tensor, bias: Tensor | None, *, initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None, cu_seqlens: Tensor | None = None, reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, z = the halves of xz (b, t, 2d); u, state = causal_conv1d(x, …, activation="silu"): (u, u, z, state).

    For layers that project both at once and read u twice: where the convolution's gradient is computed the gradients of
    the two u's are added and those of the halves put together, which would be passes over memory of their own. u comes
    as two tensors of the same memory, z is a part of xz: write into none of them.
    """
    sizes = Sizes(OP)
    sizes.match("xz", xz, "b t 2d")
    sizes.bind("d", sizes["2d"] // 2, "half of xz")
    segments = _check(sizes, xz, weight, bias, "silu", initial_state, (lengths, "right", cu_seqlens))
    if sizes["2d"] != 2 * sizes["d"]:
        raise checks.fail(OP, f"xz has {sizes['2d']} channels, expected twice the {sizes['d']} of weight.")
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not (torch.is_grad_enabled() and xz.requires_grad):  # nothing to save, or a graph without aliases
        x, z = xz.chunk(2, dim=-1)
        u, state = call(_CausalConv1d, x, weight, bias, initial_state, segments.table, True, reverse, backend)
        return u, u, z, state
    made: tuple[Tensor, Tensor, Tensor, Tensor] = call(
        _ConvHalves, xz, weight, bias, initial_state, segments.table, reverse, backend
    )
    return made


def causal_conv1d_step_(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one token into `state` in place and return y (b, d). No gradient: for engines that generate.

    Args:
        state: (slots, k-1, d), contiguous, float32 (float64 where x is); written in place.
        x: (b, d).   weight: (d, k).   bias: (d).   activation: None or "silu".
        index: (b) distinct slots; a negative one skips its row: y = 0 and no state is touched. None: slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("x", x, "b d")
    _check_taps(STEP, sizes, x, weight, bias, activation)
    sizes.match("state", state, "slots k-1 d")
    _check_state(STEP, "state", state, x)
    checks.slots(STEP, sizes, state, index)
    checks.same_device(STEP, {"x": x, "weight": weight, "bias": bias, "state": state, "index": index})
    with torch.no_grad():
        return _step(state, x, weight, bias, activation == "silu", index, backend)


def _check(
    sizes: Sizes, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    initial_state: Tensor | None, where: tuple[Tensor | Sequence[int] | None, str, Tensor | None],
) -> Segments:  # fmt: skip
    """Where sequences lie. Raises ValueError or TypeError for arguments that do not fit together or to `sizes`."""
    _check_taps(OP, sizes, x, weight, bias, activation)
    segments = build(OP, x, *where)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq k-1 d")
        _check_state(OP, "initial_state", initial_state, x)
    checks.same_device(OP, {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    return segments


def _check_taps(op: str, sizes: Sizes, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    checks.dtype(op, "x", x, checks.REAL_DTYPES)
    sizes.match("weight", weight, "d k", "A torch Conv1d keeps it as (d, 1, k): pass weight.squeeze(1).")
    checks.dtype(op, "weight", weight, checks.REAL_DTYPES)
    if weight.shape[1] < 1:
        raise checks.fail(op, "weight has no taps, expected (d, k) with k at least 1.")
    sizes.bind("k-1", weight.shape[1] - 1, "weight")
    if bias is not None:
        sizes.match("bias", bias, "d")
        checks.dtype(op, "bias", bias, checks.REAL_DTYPES)
    checks.choice(op, "activation", activation, (None, "silu"))


def _check_state(op: str, name: str, state: Tensor, x: Tensor) -> None:
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.dtype(op, name, state, (expected,), "States keep full precision, so that a stream does not drift.")


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.kernel(OP, x.device.type, backend, x.dtype).forward(x, *rest)


def _run_backward(dy: Tensor, *args: Any, in_room: bool = False) -> tuple[Tensor, ...]:
    *rest, backend = args
    module = backends.kernel(OP, dy.device.type, backend, rest[1].dtype)
    grads = module.backward(dy, *rest, **(parts.within(module) if in_room else {}))
    return tuple(or_empty(g, dy) for g in grads)


def _run_backward_halves(dy: Tensor, more: Tensor, dz: Tensor, dstate: Tensor, *args: Any) -> tuple[Tensor, ...]:
    xz, weight, *rest, backend = args
    module = backends.kernel(OP, dy.device.type, backend, xz.dtype)
    if hasattr(module, "backward_halves"):
        grads = module.backward_halves(dy, more, dz, dstate, xz, weight, *rest)
    else:  # a pass over memory weighs little beside the arithmetic
        dx, *others = module.backward(dy + more, dstate, xz[..., : weight.shape[0]], weight, *rest)
        grads = (torch.cat([dx, dz], -1), *others)
    return tuple(or_empty(g, dy) for g in grads)


def _run_step(state: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return backends.kernel(OP, state.device.type, backend, state.dtype).step(state, *rest)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    segments = args[-3]
    rows = x.shape[0] if segments is None else segments.shape[0]
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=state_dtype)


def _fake_backward(dy: Tensor, dstate: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, weight, bias, _, initial_state = args[:5]
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in (x, weight, bias, initial_state))


def _fake_backward_halves(dy: Tensor, more: Tensor, dz: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_backward(dy, *args)


def _fake_step(state: Tensor, x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_ARGS = "Tensor x, Tensor weight, Tensor? bias, bool silu"
_WHERE = "Tensor? initial_state, Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}({_ARGS}, {_WHERE}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dstate, {_ARGS}, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    partial(_run_backward, in_room=True),
)
_backward_halves = define(
    f"{OP}_halves_backward(Tensor dy, Tensor more, Tensor dz, Tensor dstate, Tensor xz, Tensor weight, Tensor? bias, "
    f"bool silu, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward_halves,
    _fake_backward_halves,
)
_step = define(f"{STEP}(Tensor(a!) state, {_ARGS}, Tensor? index, str? backend) -> Tensor", _run_step, _fake_step)


class _CausalConv1d(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, table: Tensor | None, silu: bool,
        reverse: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward(x, weight, bias, silu, initial_state, table, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, table = ctx.saved_tensors
        silu, reverse, backend = ctx.options
        grads = _backward(dy, dstate, x, weight, bias, silu, initial_state, table, reverse, backend)
        given = (x, weight, bias, initial_state)
        return (*first_only_of(OP, given, grads, dy, dstate), None, None, None, None)


class _ConvHalves(Function):
    """`conv_halves`, with gradients to add and to put together."""

    @staticmethod
    def forward(
        xz: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, table: Tensor | None,
        reverse: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        x, z = xz.chunk(2, dim=-1)
        u, state = _forward(x, weight, bias, True, initial_state, table, reverse, backend)
        return u, u.view_as(u), z, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.reverse, ctx.backend = inputs[5:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, more: Tensor, dz: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        xz, weight, bias, initial_state, table = ctx.saved_tensors
        where = (True, initial_state, table, ctx.reverse, ctx.backend)
        grads = _backward_halves(dy, more, dz, dstate, xz, weight, bias, *where)
        given = (xz, weight, bias, initial_state)
        return (*first_only_of(OP, given, grads, dy, more, dz, dstate), None, None, None)
