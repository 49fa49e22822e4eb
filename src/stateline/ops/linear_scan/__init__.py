"""linear_scan: the recurrence that diagonal state spaces share, alone: every state decays and takes an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.linear_scan.reference import state_dtype
from stateline.ops.segments import build

OP = "linear_scan"
STEP = "linear_scan_step_"
DTYPES = (*checks.REAL_DTYPES, torch.complex64, torch.complex128)


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every state of `h[t] = a[t] h[t-1] + b[t]`, and the last one.

    Args:
        a: (b, t, d) decays, one a token, or (d) constant ones; real or complex.
        b: (b, t, d) inputs, real or complex. If one of a and b is complex, so is h.
        initial_state: (n_seq, d) float32, float64 where b is; complex64, complex128 where h is complex. Zeros if None.
        lengths, padding_side, cu_seqlens, reverse, backend: as in `selective_scan`.

    Returns:
        h (b, t, d) in b's dtype, or the complex one of its precision, 0 at padding; and the state (n_seq, d): the last
        h in full precision.

    The precision is that of b: float64 and complex128 are computed as such, all else in float32. Differentiable in
    every tensor, into the initial state and out of the returned one; first derivatives only. For the gradient h is
    kept as it is returned, so that of a 16-bit h rounds before it meets that of a.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> h, state = linear_scan(torch.tensor([0.5]), torch.ones(1, 3, 1))
    >>> h[0, :, 0].tolist(), state.tolist()
    ([1.0, 1.5, 1.75], [[1.75]])
    """
    sizes = Sizes(OP)
    sizes.match("b", b, "b t d")
    a, b = _check(OP, sizes, a, b, "b t d")
    segments = build(OP, b, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq d")
        _check_state(OP, "initial_state", initial_state, b)
    checks.same_device(OP, {"a": a, "b": b, "initial_state": initial_state})
    made: tuple[Tensor, Tensor] = call(_LinearScan, a, b, initial_state, segments.table, bool(reverse), backend)
    return made


def linear_scan_step_(
    state: Tensor, a: Tensor, b: Tensor, *, index: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Take one token into `state` in place and return h (b, d). No gradient: for engines that generate.

    Args:
        state: (slots, d), contiguous, of `linear_scan`'s dtypes; written in place.
        a: (b, d) or (d).   b: (b, d).
        index: (b) distinct slots; a negative one skips its row: h = 0 and no state is touched. None: slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("b", b, "b d")
    a, b = _check(STEP, sizes, a, b, "b d")
    sizes.match("state", state, "slots d")
    _check_state(STEP, "state", state, b)
    checks.slots(STEP, sizes, state, index)
    checks.same_device(STEP, {"a": a, "b": b, "state": state, "index": index})
    with torch.no_grad():
        return _step(state, a, b, index, backend)


def _check(op: str, sizes: Sizes, a: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """a and b, both complex if one is. Raises ValueError or TypeError for what does not fit."""
    checks.dtype(op, "b", b, DTYPES)
    if isinstance(a, Tensor) and a.dim() == 1:
        sizes.match("a", a, "d")
    else:
        sizes.match("a", a, form, "Constant decays are (d).")
    checks.dtype(op, "a", a, DTYPES)
    if a.is_complex() or b.is_complex():
        double = b.dtype in (torch.float64, torch.complex128)
        kind = torch.complex128 if double else torch.complex64
        return a.to(kind), b.to(kind)
    return a, b


def _check_state(op: str, name: str, state: Tensor, b: Tensor) -> None:
    checks.dtype(op, name, state, (state_dtype(b),), "States keep full precision, so that a stream does not drift.")


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.kernel(OP, b.device.type, backend, b.dtype).forward(a, b, *rest)


def _run_backward(dh: Tensor, dstate: Tensor, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    grads = backends.kernel(OP, dh.device.type, backend, b.dtype).backward(dh, dstate, a, b, *rest)
    return tuple(or_empty(g, dh) for g in grads)


def _run_step(state: Tensor, a: Tensor, b: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return backends.kernel(OP, state.device.type, backend, b.dtype).step(state, a, b, *rest)


def _fake(a: Tensor, b: Tensor, initial_state: Tensor | None, segments: Tensor | None, *_: Any) -> Any:
    rows = b.shape[0] if segments is None else segments.shape[0]
    return b.new_empty(b.shape), b.new_empty((rows, b.shape[2]), dtype=state_dtype(b))


def _fake_backward(dh: Tensor, dstate: Tensor, a: Tensor, b: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dh.new_empty(0) if x is None else x.new_empty(x.shape) for x in (a, b, args[0]))


def _fake_step(state: Tensor, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return b.new_empty(b.shape)


_WHERE = "Tensor? initial_state, Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}(Tensor a, Tensor b, {_WHERE}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dh, Tensor dstate, Tensor a, Tensor b, Tensor h, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_step = define(
    f"{STEP}(Tensor(a!) state, Tensor a, Tensor b, Tensor? index, str? backend) -> Tensor", _run_step, _fake_step
)


class _LinearScan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        a: Tensor, b: Tensor, initial_state: Tensor | None, table: Tensor | None, reverse: bool, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(a, b, initial_state, table, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4], output[0])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        a, b, initial_state, table, h = ctx.saved_tensors
        grads = _backward(dh, dstate, a, b, h, initial_state, table, *ctx.options)
        given = (a, b, initial_state)
        return (*first_only_of(OP, given, grads, dh, dstate, h), None, None, None)
