"""long_conv: a causal convolution with kernels of any length, a kernel a channel or a matrix a tap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.long_conv.fuse import fuse_cascade, fuse_parallel
from stateline.ops.long_conv.reference import compute_dtype, taps, width
from stateline.ops.segments import build

__all__ = ["fuse_cascade", "fuse_parallel", "long_conv", "long_conv_step_"]

OP = "long_conv"
STEP = "long_conv_step_"


def long_conv(
    u: Tensor,
    k: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution `y[t] = Σ_i k[i] u[t-i]`, i = 0 … l-1, which looks only back; also the last state.

    Args:
        u: (b, t, d) input.
        k: (d, l) taps, a kernel a channel, or (l, d_out, d) matrices; the first tap is for the current token. l may be
            beyond t. Any real dtype.
        initial_state: (n_seq, l-1, d) float32 (float64 where u is): the last l-1 inputs, oldest first; zeros if None.
        lengths, padding_side, cu_seqlens, reverse: as in `selective_scan`.
        backend: "gpu", "cpu", "chunked" (PyTorch, Fourier transforms) or "reference" forces one, None chooses.

    Returns:
        y (b, t, d), (b, t, d_out) for matrices, in u's dtype, 0 at padding, and the state (n_seq, l-1, d): the last l-1
        valid inputs, the initial state's included when the sequence is shorter.

    float64 is computed as such, all else in float32. Short kernels are summed tap by tap, long ones by `torch.fft` in
    blocks of time, whichever sizes say is less work. Cut a sequence anywhere and continue from the state: the outputs
    agree within the bound of docs/numerics.md, not to the bit, since other lengths are transformed. Differentiable in
    every tensor, into the initial state and out of the returned one; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> y, state = long_conv(torch.ones(1, 4, 1), torch.tensor([[1.0, 0.5, 0.25]]))
    >>> y[0, :, 0].tolist(), state.shape
    ([1.0, 1.5, 1.75, 1.75], torch.Size([1, 2, 1]))
    """
    sizes = Sizes(OP)
    sizes.match("u", u, "b t d")
    _check_taps(OP, sizes, u, k)
    segments = build(OP, u, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq l-1 d")
        _check_state(OP, "initial_state", initial_state, u)
    checks.same_device(OP, {"u": u, "k": k, "initial_state": initial_state})
    made: tuple[Tensor, Tensor] = call(_LongConv, u, k, initial_state, segments.table, bool(reverse), backend)
    return made


def long_conv_step_(
    state: Tensor, u: Tensor, k: Tensor, *, index: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Take one token into `state` in place and return y (b, d_out). No gradient: for engines that generate.

    Reads and moves all l-1 inputs of the state. A system that a recurrence describes steps in constant time.

    Args:
        state: (slots, l-1, d), contiguous, float32 (float64 where u is); written in place.
        u: (b, d).   k: (d, l) or (l, d_out, d).
        index: (b) distinct slots; a negative one skips its row: y = 0 and no state is touched. None: slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("u", u, "b d")
    _check_taps(STEP, sizes, u, k)
    sizes.match("state", state, "slots l-1 d")
    _check_state(STEP, "state", state, u)
    checks.slots(STEP, sizes, state, index)
    checks.same_device(STEP, {"u": u, "k": k, "state": state, "index": index})
    with torch.no_grad():
        return _step(state, u, k, index, backend)


def _check_taps(op: str, sizes: Sizes, u: Tensor, k: Tensor) -> None:
    checks.dtype(op, "u", u, checks.REAL_DTYPES)
    if isinstance(k, Tensor) and k.dim() == 3:
        sizes.match("k", k, "l d_out d", "Matrix taps are (l, d_out, d).")
    else:
        sizes.match("k", k, "d l", "Taps are (d, l), a kernel a channel, or matrices (l, d_out, d).")
    checks.dtype(op, "k", k, checks.REAL_DTYPES)
    if taps(k) < 1:
        raise checks.fail(op, f"k has shape {tuple(k.shape)}, which is no taps.", "l is 1 at least.")
    sizes.bind("l-1", taps(k) - 1, "k")


def _check_state(op: str, name: str, state: Tensor, u: Tensor) -> None:
    checks.dtype(op, name, state, (compute_dtype(u),), "States keep full precision, so that a stream does not drift.")


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.kernel(OP, u.device.type, backend, u.dtype).forward(u, *rest)


def _run_backward(dy: Tensor, dstate: Tensor, u: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    grads = backends.kernel(OP, dy.device.type, backend, u.dtype).backward(dy, dstate, u, *rest)
    return tuple(or_empty(g, dy) for g in grads)


def _run_step(state: Tensor, u: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return backends.kernel(OP, state.device.type, backend, u.dtype).step(state, u, *rest)


def _fake(u: Tensor, k: Tensor, initial_state: Tensor | None, segments: Tensor | None, *_: Any) -> Any:
    rows = u.shape[0] if segments is None else segments.shape[0]
    state = u.new_empty((rows, taps(k) - 1, u.shape[2]), dtype=compute_dtype(u))
    return u.new_empty((u.shape[0], u.shape[1], width(k))), state


def _fake_backward(dy: Tensor, dstate: Tensor, u: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, k, args[0]))


def _fake_step(state: Tensor, u: Tensor, k: Tensor, *_: Any) -> Tensor:
    return u.new_empty((u.shape[0], width(k)))


_WHERE = "Tensor? initial_state, Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}(Tensor u, Tensor k, {_WHERE}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dstate, Tensor u, Tensor k, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_step = define(
    f"{STEP}(Tensor(a!) state, Tensor u, Tensor k, Tensor? index, str? backend) -> Tensor", _run_step, _fake_step
)


class _LongConv(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        u: Tensor, k: Tensor, initial_state: Tensor | None, table: Tensor | None, reverse: bool, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(u, k, initial_state, table, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        u, k, initial_state, table = ctx.saved_tensors
        grads = _backward(dy, dstate, u, k, initial_state, table, *ctx.options)
        given = (u, k, initial_state)
        return (*first_only_of(OP, given, grads, dy, dstate), None, None, None)
