"""selective_scan: the recurrence of Mamba-1, over a sequence or one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.segments import build

OP = "selective_scan"
STEP = "selective_scan_step_"


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan `h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t]`, returning `y[t] = C[t]·h[t]` and the last state.

    Args:
        u: (b, t, d) input.
        dt: (b, t, d) step size, unitless for tokens; with `dt_softplus` it becomes softplus(dt + dt_bias).
        A: (d, n) float32, float64, complex64 or complex128; real parts below 0 for a stable system.
        B, C: per token (b, t, n) or (b, t, g, n), channel i using group floor(i·g/d), or constant (d, n).
            For complex A per-token ones end in a (real, imaginary) pair, constant ones are complex, and y = 2 Re(C·h).
        D: (d) skip weight, y += D·u.   z: (b, t, d) gate, y *= silu(z).   dt_bias: (d).
        initial_state: (n_seq, d, n), zeros if None; n_seq is b, or the number of packed sequences.
        lengths: (b) valid tokens a row; the rest is skipped, at the end of rows or, `padding_side="left"`, their start.
        cu_seqlens: (n_seq + 1) bounds of sequences packed along time in a batch of 1.
        reverse: run time backwards; the state enters after the last valid token and leaves before the first.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        y (b, t, d) in u's dtype, 0 at padding, and the state (n_seq, d, n) in A's precision.

    Differentiable in every tensor, into the initial state and out of the returned one; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", Algorithm 2; A by
    zero-order hold, B by Euler as in its code.

    >>> u = torch.randn(2, 5, 3)
    >>> y, state = selective_scan(u, torch.rand(2, 5, 3), -torch.rand(3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 3, 4]))
    """
    sizes = Sizes(OP)
    sizes.match("u", u, "b t d")
    _check_system(OP, sizes, u, A, D, dt_bias)
    for name, x in (("dt", dt), ("z", z)):
        if x is not None:
            sizes.match(name, x, "b t d")
            checks.dtype(OP, name, x, checks.REAL_DTYPES)
    B, C = (_projection(OP, sizes, name, x, "b t", A) for name, x in (("B", B), ("C", C)))
    segments = build(OP, u, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.match("initial_state", initial_state, "n_seq d n")
        _check_state(OP, "initial_state", initial_state, A)
    given = {
        "u": u,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "initial_state": initial_state,
    }
    checks.same_device(OP, given)
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    wanted = torch.is_grad_enabled() and not torch.compiler.is_exporting()  # an exported graph calls the raw op alone
    keep = wanted and any(x is not None and x.requires_grad for x in inputs)
    y, state, _ = call(_SelectiveScan, *inputs, segments.table, bool(dt_softplus), bool(reverse), keep, backend)
    return y, state


def selective_scan_step_(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    log_A: bool = False,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `state` by one token in place and return y (b, d). No gradient: for engines that generate.

    Args:
        state: (slots, d, n), contiguous, in A's dtype; written in place.
        u, dt, z: (b, d).   A: (d, n).   B, C: per token (b, g, n) or constant (d, n) (complex A: see selective_scan).
        D, dt_bias: (d).
        log_A: what is given as A is log(−A), real, as models keep it: no other kernel need make A for every token.
        index: (b) distinct slots, int32 or int64; a negative one skips its row: y = 0 and no state is touched.
            None: row i uses slot i, and slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("u", u, "b d")
    _check_system(STEP, sizes, u, A, D, dt_bias)
    if log_A and A.is_complex():
        raise checks.fail(STEP, "log_A is True and A is complex, expected log(−A), real.", error=TypeError)
    for name, x in (("dt", dt), ("z", z)):
        if x is not None:
            sizes.match(name, x, "b d")
            checks.dtype(STEP, name, x, checks.REAL_DTYPES)
    B, C = (_projection(STEP, sizes, name, x, "b", A) for name, x in (("B", B), ("C", C)))
    sizes.match("state", state, "slots d n")
    _check_state(STEP, "state", state, A)
    checks.slots(STEP, sizes, state, index)
    given = {
        "u": u,
        "dt": dt,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "dt_bias": dt_bias,
        "state": state,
        "index": index,
    }
    checks.same_device(STEP, given)
    with torch.no_grad():
        return _step(state, u, dt, A, B, C, D, z, dt_bias, bool(dt_softplus), index, bool(log_A), backend)


def _check_system(op: str, sizes: Sizes, u: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> None:
    checks.dtype(op, "u", u, checks.REAL_DTYPES)
    sizes.match("A", A, "d n")
    wide = u.dtype == torch.float64
    allowed = (torch.float64, torch.complex128) if wide else (torch.float32, torch.complex64)
    checks.dtype(
        op, "A", A, allowed, "A keeps full precision: float32, or float64 where the data is; complex likewise."
    )
    for name, x in (("D", D), ("dt_bias", dt_bias)):
        if x is not None:
            sizes.match(name, x, "d")
            checks.dtype(op, name, x, (torch.float64 if wide else torch.float32,), f"Keep {name} out of casts.")


def _check_state(op: str, name: str, state: Tensor, A: Tensor) -> None:
    checks.dtype(op, name, state, (A.dtype,), "A state has A's dtype, so that a stream does not drift.")


def _projection(op: str, sizes: Sizes, name: str, x: Tensor, lead: str, A: Tensor) -> Tensor:
    """B or C checked and brought to (…lead, g, n[, 2]), or left as a constant (d, n)."""
    if not isinstance(x, Tensor):
        raise checks.fail(op, f"{name} is a {type(x).__name__}, expected a tensor", error=TypeError)
    if x.dim() == 2:
        sizes.match(name, x, "d n")
        checks.dtype(op, name, x, (A.dtype,), f"A constant {name} has A's dtype.")
        return x
    checks.dtype(op, name, x, checks.REAL_DTYPES)
    pair = " pair" if A.is_complex() else ""
    if pair:
        sizes.bind("pair", 2, "the real and imaginary part")
    one_group = lead == "b t" and x.dim() == (4 if pair else 3)
    x = x.unsqueeze(2) if one_group else x
    sizes.match(name, x, f"{lead} g n{pair}", "Or give a constant (d, n). Were groups and states swapped?")
    if sizes["g"] < 1:
        raise checks.fail(op, f"{name} has shape {tuple(x.shape)}, expected at least one group.")
    return x


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _kernel(device: str, backend: str | None, system: Sequence[Tensor]) -> ModuleType:
    """The module that computes it; `system` is u, dt, A, B, C."""
    return backends.kernel(OP, device, backend, system[2].dtype, system)


def _run(u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return _kernel(u.device.type, backend, (u, *rest[:4])).forward(u, *rest)


def _run_kept(u: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = args
    module = _kernel(u.device.type, backend, (u, *rest[:4]))
    if hasattr(module, "forward_kept"):
        return module.forward_kept(u, *rest)
    return (*module.forward(u, *rest), u.new_empty(0))


def _run_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, kept, backend = args
    module = _kernel(dy.device.type, backend, rest[1:6])
    more = (kept,) if kept is not None and kept.numel() else ()
    return tuple(or_empty(g, dy) for g in module.backward(dy, *rest, *more))


def _run_step(state: Tensor, *args: Any) -> Tensor:
    *rest, log_A, backend = args
    module = _kernel(state.device.type, backend, rest[:5])
    if log_A and not hasattr(module, "step_log_A"):
        rest[2] = -torch.exp(rest[2])
        log_A = False
    return (module.step_log_A if log_A else module.step)(state, *rest)


def _fake(u: Tensor, dt: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    segments = args[-3]
    rows = u.shape[0] if segments is None else segments.shape[0]
    return u.new_empty(u.shape), A.new_empty((rows, *A.shape))


def _fake_kept(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    segments, _, backend = args[-3:]
    shape = getattr(_kernel(u.device.type, backend, (u, dt, A, B, C)), "kept_shape", None)
    kept = u.new_empty(0) if shape is None else u.new_empty(shape(u, A, B, C, segments), dtype=torch.float32)
    return (*_fake(u, dt, A, *args), kept)


def _fake_backward(dy: Tensor, dstate: Tensor, *args: Any) -> tuple[Tensor, ...]:
    u, dt, A, B, C, D, z, dt_bias, _, initial_state = args[:10]
    return tuple(
        dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, dt, A, B, C, D, z, dt_bias, initial_state)
    )


def _fake_step(state: Tensor, u: Tensor, *args: Any) -> Tensor:
    return u.new_empty(u.shape)


_ARGS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus"
_WHERE = "Tensor? initial_state, Tensor? segments, bool reverse"
_forward = define(f"{OP}({_ARGS}, {_WHERE}, str? backend) -> (Tensor, Tensor)", _run, _fake)
# The third result spares the gradient work; its shape is the back end's own, and it is empty if there is none.
_forward_kept = define(f"{OP}_kept({_ARGS}, {_WHERE}, str? backend) -> (Tensor, Tensor, Tensor)", _run_kept, _fake_kept)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dstate, {_ARGS}, {_WHERE}, Tensor? kept, str? backend) -> "
    f"({', '.join(['Tensor'] * 9)})",
    _run_backward,
    _fake_backward,
)
_step = define(
    f"{STEP}(Tensor(a!) state, {_ARGS}, Tensor? index, bool log_A, str? backend) -> Tensor", _run_step, _fake_step
)


class _SelectiveScan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, initial_state: Tensor | None, table: Tensor | None, dt_softplus: bool, reverse: bool,
        keep: bool, backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        args = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, table, reverse, backend)
        return _forward_kept(*args) if keep else (*_forward(*args), None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        if output[2] is not None:
            ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.save_for_backward(*inputs[:10], output[2])
        ctx.options = inputs[10:12] + inputs[13:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, initial_state, table, kept = ctx.saved_tensors
        dt_softplus, reverse, backend = ctx.options
        sequences = u.shape[0] if table is None else table.shape[0]
        dy = u.new_zeros(u.shape) if dy is None else dy
        dstate = A.new_zeros((sequences, *A.shape)) if dstate is None else dstate
        inputs = (u, dt, A, B, C, D, z, dt_bias)
        grads = _backward(dy, dstate, *inputs, dt_softplus, initial_state, table, reverse, kept, backend)
        given = (*inputs, initial_state)
        return (*first_only_of(OP, given, grads, dy, dstate), *[None] * 5)
