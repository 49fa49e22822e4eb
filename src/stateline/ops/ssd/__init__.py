"""ssd: the state space dual of Mamba-2, a recurrence with one decay a head, over a sequence or one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops import parts
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.segments import build

OP = "ssd"
STEP = "ssd_step_"
Limit = Sequence[float | None]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limit | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_decay: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Scan `S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t]⊗B[t]`, returning `y[t] = S[t] C[t]` and the last state.

    Args:
        x: (b, t, h, p) input, h heads of width p.
        dt: (b, t, h) step size, unitless; with `dt_softplus` softplus(dt + dt_bias), then clamped to `dt_limit`.
        A: (h) float32, or float64 where the data is; below 0 for a stable system.
        B, C: (b, t, n) or (b, t, g, n); head i uses group floor(i·g/h): neighbours share one.
        D: (h) or (h, p) skip weight, y += D·x.   z: (b, t, h, p) gate, y *= silu(z).   dt_bias: (h).
        dt_limit: (low, high) of the step size; None, or None for one of them: none.
        initial_state: (n_seq, h, p, n), zeros if None; n_seq is b, or the number of packed sequences.
        lengths, padding_side, cu_seqlens, reverse: as in `selective_scan`.
        return_decay: return exp(A·Σ dt) of each sequence too. A sequence cut in two, both halves run from zeros, ends
            in `state_2 + decay_2 · state_1`: all that machines sharing a sequence need to exchange.
        backend: "gpu", "cpu", "chunked" (PyTorch, matrix products) or "reference" forces one, None chooses.

    Returns:
        y (b, t, h, p) in x's dtype, 0 at padding, the state (n_seq, h, p, n) in A's dtype and, with `return_decay`, the
        decay (n_seq, h) in A's dtype.

    Differentiable in every tensor, into the initial state and out of all results; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Dao & Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
    Space Duality", section 5; A by zero-order hold, B by Euler.

    >>> x, B = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 4)
    >>> y, state = ssd(x, torch.rand(2, 5, 3), -torch.rand(3), B, B)
    >>> y.shape, state.shape
    (torch.Size([2, 5, 3, 8]), torch.Size([2, 3, 8, 4]))
    """
    sizes = Sizes(OP)
    sizes.match("x", x, "b t h p")
    low, high = _check_system(OP, sizes, "b t", x, dt, A, D, z, dt_bias, dt_limit)
    B, C = (_projection(OP, sizes, name, v, "b t") for name, v in (("B", B), ("C", C)))
    segments = build(OP, x, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq h p n")
        _check_state(OP, "initial_state", initial_state, A)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    checks.same_device(OP, dict(zip(names, inputs, strict=True)))
    wanted = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # an exported graph calls the raw op alone
    keep = wanted and any(v is not None and v.requires_grad for v in inputs)
    options = (segments.table, bool(dt_softplus), low, high, bool(reverse), keep, backend)
    y, state, decay, _ = call(_SSD, *inputs, *options)
    return (y, state, decay) if return_decay else (y, state)


def ssd_step_(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limit | None = None,
    log_A: bool = False,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `state` by one token in place and return y (b, h, p). No gradient: for engines that generate.

    Args:
        state: (slots, h, p, n), contiguous, in A's dtype; written in place. bfloat16 beside a float32 A is widened to
            compute and rounded as it is stored: half the memory, and an error that grows as docs/numerics.md tells.
        x, z: (b, h, p).   dt: (b, h).   A: (h).   B, C: (b, g, n) or (b, n).   D: (h) or (h, p).   dt_bias: (h).
        dt_softplus, dt_limit: as in `ssd`.
        log_A: what is given as A is log(−A), as models keep it: no other kernel need make A for every token.
        index: (b) distinct slots, int32 or int64; a negative one skips its row: y = 0 and no state is touched.
            None: row i uses slot i, and slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("x", x, "b h p")
    low, high = _check_system(STEP, sizes, "b", x, dt, A, D, z, dt_bias, dt_limit)
    B, C = (_projection(STEP, sizes, name, v, "b") for name, v in (("B", B), ("C", C)))
    sizes.match("state", state, "slots h p n")
    if state.dtype != torch.bfloat16 or A.dtype != torch.float32:
        _check_state(STEP, "state", state, A)
    checks.slots(STEP, sizes, state, index)
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "state": state}
    checks.same_device(STEP, given | {"index": index})
    with torch.no_grad():
        return _step(state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), low, high, index, bool(log_A), backend)


def _check_system(
    op: str, sizes: Sizes, lead: str, x: Tensor, dt: Tensor, A: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_limit: Limit | None,
) -> tuple[float, float]:  # fmt: skip
    """Check what scan and step share; the limits of dt, infinite where there are none."""
    for name, v, form in (("x", x, f"{lead} h p"), ("dt", dt, f"{lead} h"), ("z", z, f"{lead} h p")):
        if v is not None:
            sizes.match(name, v, form)
            checks.dtype(op, name, v, checks.REAL_DTYPES)
    sizes.match("A", A, "h")
    full = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    checks.dtype(op, "A", A, full, "A keeps full precision: float32, or float64 where the data is.")
    if D is not None:
        sizes.match("D", D, "h" if isinstance(D, Tensor) and D.dim() == 1 else "h p", "Or give one a head, (h,).")
        checks.dtype(op, "D", D, full, "Keep D out of casts.")
    if dt_bias is not None:
        sizes.match("dt_bias", dt_bias, "h")
        checks.dtype(op, "dt_bias", dt_bias, full, "Keep dt_bias out of casts.")
    return check_limit(op, dt_limit)


def check_limit(op: str, dt_limit: Limit | None) -> tuple[float, float]:
    """(low, high) of a step size, infinite where there are none; raises unless they are numbers or None, low ≤ high."""
    pair = (None, None) if dt_limit is None else tuple(dt_limit) if isinstance(dt_limit, list | tuple) else ()
    if len(pair) == 2 and all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in pair):
        low, high = (-math.inf if pair[0] is None else pair[0]), (math.inf if pair[1] is None else pair[1])
        if low <= high:
            return float(low), float(high)
    raise checks.fail(op, f"dt_limit is {dt_limit!r}, expected two numbers (low, high) with low ≤ high, or None.")


def _check_state(op: str, name: str, state: Tensor, A: Tensor) -> None:
    checks.dtype(op, name, state, (A.dtype,), "A state has A's dtype, so that a stream does not drift.")


def _projection(op: str, sizes: Sizes, name: str, v: Tensor, lead: str) -> Tensor:
    """B or C checked and brought to (…lead, g, n)."""
    if not isinstance(v, Tensor):
        raise checks.fail(op, f"{name} is a {type(v).__name__}, expected a tensor", error=TypeError)
    checks.dtype(op, name, v, checks.REAL_DTYPES)
    if v.dim() == len(lead.split()) + 1:
        v = v.unsqueeze(-2)
    sizes.match(name, v, f"{lead} g n", "Were groups and states, or head width and state size, swapped?")
    if sizes["g"] < 1:
        raise checks.fail(op, f"{name} has shape {tuple(v.shape)}, expected at least one group.")
    return v


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _kernel(device: str, backend: str | None, system: Sequence[Tensor]) -> ModuleType:
    """The module that computes it; `system` is x, dt, A, B, C."""
    return backends.kernel(OP, device, backend, system[2].dtype, system)


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = args
    return _kernel(x.device.type, backend, (x, *rest[:4])).forward(x, *rest)


def _run_kept(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, backend = args
    module = _kernel(x.device.type, backend, (x, *rest[:4]))
    if hasattr(module, "forward_kept"):
        return module.forward_kept(x, *rest)
    return (*module.forward(x, *rest), x.new_empty(0))


def _run_backward(dy: Tensor, *args: Any, in_room: bool = False) -> tuple[Tensor, ...]:
    *rest, backend, kept = args
    more = (kept,) if kept is not None and kept.numel() else ()
    module = _kernel(dy.device.type, backend, rest[2:7])
    grads = module.backward(dy, *rest, *more, **(parts.within(module) if in_room else {}))
    return tuple(or_empty(g, dy) for g in grads)


def _run_step(state: Tensor, *args: Any) -> Tensor:
    *rest, log_A, backend = args
    module = _kernel(state.device.type, backend, rest[:5])
    if log_A and not hasattr(module, "step_log_A"):
        rest[2] = -torch.exp(rest[2])
        log_A = False
    step = module.step_log_A if log_A else module.step
    if state.dtype == rest[2].dtype or hasattr(module, "NARROW"):
        return step(state, *rest)
    wide = state.to(rest[2].dtype)
    y = step(wide, *rest)
    state.copy_(wide)
    return y


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    segments = args[-3]
    rows = x.shape[0] if segments is None else segments.shape[0]
    state = A.new_empty((rows, *x.shape[2:], B.shape[3]))
    return x.new_empty(x.shape), state, A.new_empty((rows, A.shape[0]))


def _fake_kept(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any) -> tuple[Tensor, ...]:
    segments, _, backend = args[-3:]
    shape = getattr(_kernel(x.device.type, backend, (x, dt, A, B, C)), "kept_shape", None)
    kept = x.new_empty(0) if shape is None else x.new_empty(shape(x, B, C, segments), dtype=torch.float32)
    return (*_fake(x, dt, A, B, C, *args), kept)


def _fake_backward(dy: Tensor, dstate: Tensor, ddecay: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = (*args[:8], args[11])
    return tuple(dy.new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs)


def _fake_step(state: Tensor, x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_ARGS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float dt_low, float dt_high"
)
_WHERE = "Tensor? initial_state, Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}({_ARGS}, {_WHERE}) -> (Tensor, Tensor, Tensor)", _run, _fake)
# The last result spares the gradient work; its shape is the back end's own, and it is empty if there is none.
_forward_kept = define(f"{OP}_kept({_ARGS}, {_WHERE}) -> (Tensor, Tensor, Tensor, Tensor)", _run_kept, _fake_kept)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dstate, Tensor ddecay, {_ARGS}, {_WHERE}, Tensor? kept) -> "
    f"({', '.join(['Tensor'] * 9)})",
    _run_backward,
    _fake_backward,
    partial(_run_backward, in_room=True),
)
_step = define(
    f"{STEP}(Tensor(a!) state, {_ARGS}, Tensor? index, bool log_A, str? backend) -> Tensor", _run_step, _fake_step
)


class _SSD(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, initial_state: Tensor | None, table: Tensor | None, dt_softplus: bool, low: float,
        high: float, reverse: bool, keep: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        args = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, initial_state, table, reverse, backend)
        return _forward_kept(*args) if keep else (*_forward(*args), None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        if output[3] is not None:
            ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.save_for_backward(*inputs[:10], output[3])
        ctx.options = inputs[10:14] + inputs[15:]

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dstate: Tensor | None, ddecay: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, table, kept = ctx.saved_tensors
        dt_softplus, low, high, reverse, backend = ctx.options
        (b, _t, h, p), A, n = inputs[0].shape, inputs[2], inputs[3].shape[3]
        sequences = b if table is None else table.shape[0]
        dy = inputs[0].new_zeros(inputs[0].shape) if dy is None else dy
        dstate = A.new_zeros((sequences, h, p, n)) if dstate is None else dstate
        ddecay = A.new_zeros((sequences, h)) if ddecay is None else ddecay
        where = (dt_softplus, low, high, initial_state, table, reverse, backend, kept)
        grads = _backward(dy, dstate, ddecay, *inputs, *where)
        given = (*inputs, initial_state)
        return (*first_only_of(OP, given, grads, dy, dstate, ddecay), *[None] * 7)
