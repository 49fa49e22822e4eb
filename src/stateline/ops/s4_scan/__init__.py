"""s4_scan: a diagonal linear time-invariant system a channel, from a state to a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of, or_empty
from stateline.ops.s4_scan import chunked, cpu, reference
from stateline.ops.segments import build

OP = "s4_scan"


def s4_scan(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan `x[t] = Ā x[t-1] + B̄ u[t]`, returning `y[t] = 2 Re(C x[t]) + D u[t]` and the last state.

    The same system at every step, so that chunks of steps are matrix products.

    Args:
        u: (b, t, h) inputs, a system a channel.
        A_bar, B_bar: (h, n) complex128, the sampled diagonal system of n states, each with its conjugate.
        C: (c, h, n) complex128, c read-outs a channel.   D: (c, h) float64, what of u reaches y at once.
            All in double: Ā is raised to powers.
        initial_state: (n_seq, h, n, 2) real pairs, float32, or float64 where u is; zeros if None.
        lengths: (b) valid tokens a row; what follows them is skipped.   cu_seqlens: (n_seq + 1) bounds of sequences
            packed along time in a batch of 1.
        backend: "cpu", "chunked" (PyTorch, matrix products) or "reference" forces one, None chooses.

    Returns:
        y (b, t, c, h) in u's dtype, 0 at padding, and the state (n_seq, h, n, 2).

    Differentiable in every tensor, into the initial state and out of both results; on "cpu" first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    >>> one = torch.ones(1, 1, dtype=torch.complex128)
    >>> y, state = s4_scan(torch.ones(1, 3, 1), one / 2, one, one[None] / 2)
    >>> y.flatten().tolist(), state.flatten().tolist()
    ([1.0, 1.5, 1.75], [1.75, 0.0])
    """
    sizes = Sizes(OP)
    sizes.match("u", u, "b t h")
    checks.dtype(OP, "u", u, checks.REAL_DTYPES)
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    for name, x, form in (("A_bar", A_bar, "h n"), ("B_bar", B_bar, "h n"), ("C", C, "c h n")):
        sizes.match(name, x, form)
        checks.dtype(OP, name, x, (torch.complex128,), "Systems are raised to powers: sample them in double.")
    if D is not None:
        sizes.match("D", D, "c h")
        checks.dtype(OP, "D", D, (torch.float64,), "It is added to what is computed in double.")
    segments = build(OP, u, lengths, "right", cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.bind("2", 2, "pairs")
        sizes.match("initial_state", initial_state, "n_seq h n 2")
        checks.dtype(OP, "initial_state", initial_state, (full,), "A state keeps full precision.")
    given = {"u": u, "A_bar": A_bar, "B_bar": B_bar, "C": C, "D": D, "initial_state": initial_state}
    checks.same_device(OP, given)
    start = None if initial_state is None else initial_state.flatten(-2)
    chosen = choice(u.device.type, backend, u.dtype)
    if chosen == "cpu":
        tables = chunked.diagonal_tables(A_bar, B_bar, C, D, chunked.steps(u.shape[1], cpu.CHUNK), full)
        y, state = run(u, tables, start, segments.table)
    else:
        scan = reference.scan if chosen == "reference" else chunked.scan
        y, state = scan(u, A_bar, B_bar, C, D, start, segments.table, lengths is not None)
    return y, state.unflatten(-1, (-1, 2))


def run(u: Tensor, tables: chunked.Tables, initial: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The C++ kernels on a diagonal system's tables, for whoever keeps these: u (b, t, h), initial (n_seq, h, s)."""
    assert isinstance(tables.advance, chunked.Diagonal)
    powers = chunked.as_real(tables.advance.powers)
    y, state = call(_Scan, u, tables.taps, tables.read, tables.write, powers, initial, segments)
    return y, state


def choice(device: str, backend: str | None, dtype: torch.dtype) -> str:
    """The back end: its part of this op is PyTorch, which is traced through, so that the choice must not be."""
    return backends.choose(OP, device, backend, dtype).name


# What torch.compiler.assume_constant_result does, which would import torch's compiler, and Triton with it.
choice._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


# ---- raw ops: the C++ kernels, on tables ----------------------------------------------------------------------------


def _fake(u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    segments = where[1]
    (b, t, h), rows = u.shape, u.shape[0] if segments is None else segments.shape[0]
    return u.new_empty(b, t, taps.shape[0], h), taps.new_empty(rows, h, read.shape[-1])


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(or_empty(g, args[0]) for g in cpu.backward(*args))


def _fake_backward(dy: Tensor, dstate: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:6])


_ARGS = "Tensor u, Tensor taps, Tensor read, Tensor write, Tensor powers, Tensor? initial_state, Tensor? segments"
_forward = define(f"{OP}({_ARGS}) -> (Tensor, Tensor)", cpu.forward, _fake)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dstate, {_ARGS}) -> ({', '.join(['Tensor'] * 6)})", _run_backward, _fake_backward
)


class _Scan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, initial: Tensor | None,
        table: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward(u, taps, read, write, powers, initial, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        *given, table = ctx.saved_tensors
        grads = _backward(dy, dstate, *given, table)
        return (*first_only_of(OP, given, grads, dy, dstate), None)
