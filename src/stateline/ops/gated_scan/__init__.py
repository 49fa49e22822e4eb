"""gated_scan: a recurrence whose new state is a function of the old one and an input, times a gate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of
from stateline.ops.segments import build

OP = "gated_scan"
STEP = "gated_scan_step_"
ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid")


def gated_scan(
    v: Tensor,
    g: Tensor,
    A: Tensor,
    *,
    activation: str = "identity",
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan `h[t+1] = f(A h[t] + v[t]) ⊙ g[t]`, returning h[t], the state *before* each token, and the last state.

    Args:
        v: (b, t, n) input, usually a projection B u of the tokens.   g: (b, t, n) gate, as it multiplies.
        A: (n) diagonal, or (n, n), float32, float64 where the data is.
        activation: f, one of "identity", "relu", "tanh", "sigmoid". None has a slope above 1, so that any two states
            come together where the largest singular value of A times the largest gate is below 1.
        initial_state: (n_seq, n) in A's dtype, zeros if None; n_seq is b, or the number of packed sequences.
        lengths, padding_side, cu_seqlens, reverse, backend: as in `selective_scan`.

    Returns:
        h (b, t, n) in v's dtype, 0 at padding, and the state after the last token (n_seq, n) in A's dtype.

    Differentiable in every tensor, into the initial state and out of both results; first derivatives only. Products of
    16-bit data are made and kept in float32.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> one = torch.ones(1, 4, 1)
    >>> h, state = gated_scan(one, one, torch.tensor([0.5]))
    >>> h[0, :, 0].tolist(), state.item()
    ([0.0, 1.0, 1.5, 1.75], 1.875)
    """
    sizes = Sizes(OP)
    _check_system(OP, sizes, "b t", v, g, A, activation)
    segments = build(OP, v, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq n")
        _check_state(OP, "initial_state", initial_state, A)
    checks.same_device(OP, {"v": v, "g": g, "A": A, "initial_state": initial_state})
    h, state = call(_GatedScan, v, g, A, initial_state, segments.table, activation, bool(reverse), backend)
    return h.to(v.dtype), state


def gated_scan_step_(
    state: Tensor,
    v: Tensor,
    g: Tensor,
    A: Tensor,
    *,
    activation: str = "identity",
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one token into `state` in place; h (b, n) in v's dtype: the state *before* it. No gradient, for engines.

    Args:
        state: (slots, n) in A's dtype; written in place.
        v, g: (b, n).   A, activation: as in `gated_scan`.
        index: (b) distinct slots; a negative one skips its row: h = 0 and no state is touched. None: slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    _check_system(STEP, sizes, "b", v, g, A, activation)
    sizes.match("state", state, "slots n")
    _check_state(STEP, "state", state, A)
    checks.slots(STEP, sizes, state, index)
    checks.same_device(STEP, {"v": v, "g": g, "A": A, "state": state, "index": index})
    with torch.no_grad():
        return _step(state, v, g, A, activation, index, backend).to(v.dtype)


def _check_system(op: str, sizes: Sizes, lead: str, v: Tensor, g: Tensor, A: Tensor, activation: str) -> None:
    for name, x in (("v", v), ("g", g)):
        sizes.match(name, x, f"{lead} n")
        checks.dtype(op, name, x, checks.REAL_DTYPES)
    dense = isinstance(A, Tensor) and A.dim() == 2
    sizes.match("A", A, "n n" if dense else "n", "It is the diagonal, (n,), or the whole matrix, (n, n).")
    full = (torch.float64,) if torch.float64 in (v.dtype, g.dtype) else (torch.float32,)
    checks.dtype(op, "A", A, full, "A keeps full precision: float32, or float64 where the data is.")
    checks.choice(op, "activation", activation, ACTIVATIONS)


def _check_state(op: str, name: str, state: Tensor, A: Tensor) -> None:
    checks.dtype(op, name, state, (A.dtype,), "A state has A's dtype, so that a stream does not drift.")


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _kernel(backend: str | None, v: Tensor, g: Tensor, A: Tensor) -> ModuleType:
    return backends.kernel(OP, v.device.type, backend, A.dtype, (v, g, A))


def _run(v: Tensor, g: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return _kernel(backend, v, g, A).forward(v, g, A, *rest)


def _run_backward(dh: Tensor, dstate: Tensor, h: Tensor, v: Tensor, g: Tensor, A: Tensor, *args: Any) -> Any:
    *rest, backend = args
    return _kernel(backend, v, g, A).backward(dh, dstate, h, v, g, A, *rest)


def _run_step(state: Tensor, v: Tensor, g: Tensor, A: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return _kernel(backend, v, g, A).step(state, v, g, A, *rest)


def _fake(v: Tensor, g: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    segments = args[-3]
    rows = v.shape[0] if segments is None else segments.shape[0]
    return A.new_empty(v.shape), A.new_empty((rows, v.shape[2]))


def _fake_backward(dh: Tensor, dstate: Tensor, h: Tensor, v: Tensor, g: Tensor, A: Tensor, *args: Any) -> Any:
    return v.new_empty(v.shape), g.new_empty(g.shape), A.new_empty(A.shape), dstate.new_empty(dstate.shape)


def _fake_step(state: Tensor, v: Tensor, g: Tensor, A: Tensor, *args: Any) -> Tensor:
    return A.new_empty(v.shape)


_ARGS = "Tensor v, Tensor g, Tensor A, str activation"
_WHERE = "Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}({_ARGS}, Tensor? initial_state, {_WHERE}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dh, Tensor dstate, Tensor h, {_ARGS}, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_step = define(f"{STEP}(Tensor(a!) state, {_ARGS}, Tensor? index, str? backend) -> Tensor", _run_step, _fake_step)


class _GatedScan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        v: Tensor, g: Tensor, A: Tensor, initial_state: Tensor | None, table: Tensor | None, activation: str,
        reverse: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward(v, g, A, activation, initial_state, table, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        v, g, A, initial_state, table, *options = inputs
        ctx.save_for_backward(v, g, A, initial_state, table, output[0])
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        v, g, A, initial_state, table, h = ctx.saved_tensors
        activation, reverse, backend = ctx.options
        grads = _backward(dh, dstate, h, v, g, A, activation, table, reverse, backend)
        return (*first_only_of(OP, (v, g, A, initial_state), grads, dh, dstate), *[None] * 4)
