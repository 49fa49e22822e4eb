"""s4_scan: a diagonal linear time-invariant system a channel, from a state to a state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
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
STEP = "s4_scan_step_"
#: Back ends that run on tables; the others are PyTorch, which is traced through.
KERNELS = ("gpu", "cpu")


def s4_scan(
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
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
        lengths, padding_side, cu_seqlens, reverse: as in `selective_scan`.
        backend: "gpu", "cpu", "chunked" (PyTorch, matrix products) or "reference" forces one, None chooses.

    Returns:
        y (b, t, c, h) in u's dtype, 0 at padding, and the state (n_seq, h, n, 2).

    Differentiable in every tensor, into the initial state and out of both results; on "cpu" and "gpu" first derivatives
    only.

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
    segments = build(OP, u, lengths, padding_side, cu_seqlens)
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        sizes.bind("2", 2, "pairs")
        sizes.match("initial_state", initial_state, "n_seq h n 2")
        checks.dtype(OP, "initial_state", initial_state, (full,), "A state keeps full precision.")
    given = {"u": u, "A_bar": A_bar, "B_bar": B_bar, "C": C, "D": D, "initial_state": initial_state}
    checks.same_device(OP, given)
    start = None if initial_state is None else initial_state.flatten(-2)
    chosen = choice(u.device.type, backend, u.dtype)
    if chosen in KERNELS:
        tables = tables_for(chosen, u, A_bar, B_bar, C, D)
        y, state = run(u, tables, start, segments.table, bool(reverse), chosen)
    else:
        scan = reference.scan if chosen == "reference" else chunked.scan
        padding = None if lengths is None else padding_side
        y, state = scan(u, A_bar, B_bar, C, D, start, segments.table, padding, bool(reverse))
    return y, state.unflatten(-1, (-1, 2))


def s4_scan_step_(
    state: Tensor,
    u: Tensor,
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Take one token into `state` in place and return y (b, c, h). No gradient: for engines that generate.

    Args:
        state: (slots, h, n, 2), contiguous, float32 (float64 where u is); written in place.
        u: (b, h).   A_bar, B_bar: (h, n), C: (c, h, n), complex64 or complex128; the arithmetic is the state's.
        D: (c, h) float32 or float64.
        index: (b) distinct slots; a negative one skips its row: y = 0 and no state is touched. None: slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes = Sizes(STEP)
    sizes.match("u", u, "b h")
    checks.dtype(STEP, "u", u, checks.REAL_DTYPES)
    for name, x, form in (("A_bar", A_bar, "h n"), ("B_bar", B_bar, "h n"), ("C", C, "c h n")):
        sizes.match(name, x, form)
        checks.dtype(STEP, name, x, (torch.complex64, torch.complex128))
    if D is not None:
        sizes.match("D", D, "c h")
        checks.dtype(STEP, "D", D, (torch.float32, torch.float64))
    sizes.bind("2", 2, "pairs")
    sizes.match("state", state, "slots h n 2")
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    checks.dtype(STEP, "state", state, (full,), "A state keeps full precision.")
    checks.slots(STEP, sizes, state, index)
    given = {"u": u, "A_bar": A_bar, "B_bar": B_bar, "C": C, "D": D, "state": state, "index": index}
    checks.same_device(STEP, given)
    pairs = [torch.view_as_real(x.resolve_conj().resolve_neg()) for x in (A_bar, B_bar, C)]
    with torch.no_grad():
        return _step(state, u, *pairs, D, index, choice(u.device.type, backend, u.dtype))


def tables_for(backend: str, u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None) -> chunked.Tables:
    """A sampled system's tables for sequences as long as u, as `run` takes them on "cpu" and "gpu"."""
    full = torch.float64 if u.dtype == torch.float64 else torch.float32
    q = steps(backend, u.shape[1])
    if backend == "cpu":
        return chunked.diagonal_tables(A_bar, B_bar, C, D, q, full)
    taps, read, write, powers = call(_Tables, A_bar, B_bar, C, D, q)
    return chunked.Tables(taps, read, write, chunked.Diagonal(chunked.as_complex(powers)))


def system_tables(
    u: Tensor, inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor | None, rate: float,
    bilinear: bool,
) -> chunked.Tables:  # fmt: skip
    """`tables_for` "gpu" of what S4D learns, float32, and samples on the way: dt = exp(inv_dt) · rate, A as there."""
    made = call(_System, inv_dt, A_real, A_imag, B, C, D, rate, bilinear, steps("gpu", u.shape[1]))
    taps, read, write, powers = made
    return chunked.Tables(taps, read, write, chunked.Diagonal(chunked.as_complex(powers)))


def system_step_(
    state: Tensor, u: Tensor, inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    rate: float, bilinear: bool,
) -> Tensor:  # fmt: skip
    """`s4_scan_step_` by "gpu" of what S4D learns, as `system_tables` takes it: state (b, h, n, 2), u (b, h)."""
    learned = (inv_dt, A_real, A_imag, B, C, D, rate, bilinear)
    if state.is_contiguous():
        return _system_step(state, u, *learned)
    y = _system_step(packed := state.contiguous(), u, *learned)
    state.copy_(packed)
    return y


def steps(backend: str, t: int) -> int:
    """Steps of a chunk for sequences of up to t steps."""
    if backend == "cpu":
        short = isinstance(t, int) and t <= cpu.SHORT
        return chunked.steps(t, cpu.CHUNK // 2 if short else cpu.CHUNK)
    return max(chunked.steps(t), 16)  # what a matrix unit takes at least


def run(
    u: Tensor, tables: chunked.Tables, initial: Tensor | None, segments: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The kernels on a diagonal system's tables, for whoever keeps these: u (b, t, h), initial (n_seq, h, s)."""
    assert isinstance(tables.advance, chunked.Diagonal)
    powers = chunked.as_real(tables.advance.powers)
    given = (u, tables.taps, tables.read, tables.write, powers, initial, segments, tables.prepared)
    y, state = call(_Scan, *given, reverse, backend)
    return y, state


def prepared(tables: chunked.Tables) -> chunked.Tables:
    """Tables for "cpu" that are to be kept, arranged as its kernel wants them."""
    assert isinstance(tables.advance, chunked.Diagonal)
    powers = chunked.as_real(tables.advance.powers)
    return replace(tables, prepared=cpu.prepare(tables.taps, tables.read, tables.write, powers))


def choice(device: str, backend: str | None, dtype: torch.dtype) -> str:
    """The back end: its part of this op is PyTorch, which is traced through, so that the choice must not be."""
    return backends.choose(OP, device, backend, dtype).name


# What torch.compiler.assume_constant_result does, which would import torch's compiler, and Triton with it.
choice._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a mark on a function


# ---- raw ops: the kernels, on tables, and the tables of a GPU --------------------------------------------------------


@functools.cache
def _module(backend: str) -> Any:
    return backends.kernel(OP, "cuda" if backend == "gpu" else "cpu", backend)


def _run(u: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, kept, reverse, backend = args
    y, state = _module(backend).forward(u, *rest, reverse, *(() if kept is None else (kept,)))
    return y, state


def _run_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, _, reverse, backend = args
    return tuple(or_empty(g, dy) for g in _module(backend).backward(dy, *rest, reverse))


def _run_step(state: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    y: Tensor = _module(backend).step(state, *rest)
    return y


def _fake(u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
    segments = where[1]
    (b, t, h), rows = u.shape, u.shape[0] if segments is None else segments.shape[0]
    return u.new_empty(b, t, taps.shape[0], h), taps.new_empty(rows, h, read.shape[-1])


def _fake_backward(dy: Tensor, dstate: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:6])


def _fake_step(state: Tensor, u: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0], C.shape[0], u.shape[1])


def _make_tables(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, q: int) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _module("gpu").tables(A_bar, B_bar, C, D, q)
    return made


def _make_tables_backward(dtaps: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(or_empty(g, dtaps) for g in _module("gpu").tables_backward(dtaps, *args))


def _fake_tables(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, q: int) -> tuple[Tensor, ...]:
    (c, h, _), s = C.shape, 2 * C.shape[2]
    shapes = ((c, h, q), (c, h, q, s), (h, q, s), (q + 1, h, s))
    return tuple(A_bar.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_tables_backward(dtaps: Tensor, dread: Tensor, dwrite: Tensor, dpowers: Tensor, *inputs: Any) -> Any:
    return tuple(dtaps.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:4])


def _make_system(*args: Any) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _module("gpu").system(*args)
    return made


def _make_system_backward(dtaps: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(or_empty(g, dtaps) for g in _module("gpu").system_backward(dtaps, *args))


def _run_system_step(*args: Any) -> Tensor:
    y: Tensor = _module("gpu").system_step(*args)
    return y


def _fake_system_step(state: Tensor, u: Tensor, *learned: Any) -> Tensor:
    return u.new_empty(u.shape[0], learned[4].shape[0], u.shape[1])


def _fake_system(inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Any:
    (c, h, n, _), q = C.shape, rest[-1]
    shapes = ((c, h, q), (c, h, q, 2 * n), (h, q, 2 * n), (q + 1, h, 2 * n))
    return tuple(C.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_system_backward(dtaps: Tensor, dread: Tensor, dwrite: Tensor, dpowers: Tensor, *inputs: Any) -> Any:
    return tuple(dtaps.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:6])


_ARGS = (
    "Tensor u, Tensor taps, Tensor read, Tensor write, Tensor powers, Tensor? initial_state, Tensor? segments, "
    "Tensor? prepared, bool reverse, str backend"
)
_LEARNED = "Tensor inv_dt, Tensor A_real, Tensor A_imag, Tensor B, Tensor C, Tensor? D, float rate, bool bilinear"
_SLOPES = "Tensor dtaps, Tensor dread, Tensor dwrite, Tensor dpowers"
_SYSTEM = "Tensor A_bar, Tensor B_bar, Tensor C, Tensor? D"
_SIX, _FOUR = (f"({', '.join(['Tensor'] * count)})" for count in (6, 4))
_forward = define(f"{OP}({_ARGS}) -> (Tensor, Tensor)", _run, _fake)
_backward = define(f"{OP}_backward(Tensor dy, Tensor dstate, {_ARGS}) -> {_SIX}", _run_backward, _fake_backward)
_step = define(
    f"{STEP}(Tensor(a!) state, Tensor u, {_SYSTEM}, Tensor? index, str backend) -> Tensor", _run_step, _fake_step
)
_tables = define(f"{OP}_tables({_SYSTEM}, SymInt q) -> {_FOUR}", _make_tables, _fake_tables)
_tables_backward = define(
    f"{OP}_tables_backward({_SLOPES}, {_SYSTEM}) -> {_FOUR}", _make_tables_backward, _fake_tables_backward
)
_system = define(f"{OP}_system({_LEARNED}, SymInt q) -> {_FOUR}", _make_system, _fake_system)
_system_step = define(
    f"{OP}_system_step_(Tensor(a!) state, Tensor u, {_LEARNED}) -> Tensor", _run_system_step, _fake_system_step
)
_system_backward = define(
    f"{OP}_system_backward({_SLOPES}, {_LEARNED}) -> {_SIX}", _make_system_backward, _fake_system_backward
)


class _Scan(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, taps: Tensor, read: Tensor, write: Tensor, powers: Tensor, initial: Tensor | None,
        table: Tensor | None, kept: Tensor | None, reverse: bool, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _forward(u, taps, read, write, powers, initial, table, kept, reverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.options = inputs[8:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        *given, table = ctx.saved_tensors
        grads = _backward(dy, dstate, *given, table, None, *ctx.options)
        return (*first_only_of(OP, given, grads, dy, dstate), None, None, None, None)


class _Tables(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor | None, q: int) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = _tables(A_bar, B_bar, C, D, q)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return (*first_only_of(OP, given, _tables_backward(*slopes, *given), *slopes), None)


class _System(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        inv_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor | None, rate: float,
        bilinear: bool, q: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        made: tuple[Tensor, ...] = _system(inv_dt, A_real, A_imag, B, C, D, rate, bilinear, q)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:8]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        grads = _system_backward(*slopes, *given, *ctx.options)
        return (*first_only_of(OP, given, grads, *slopes), None, None, None)
