"""trapezoid_ssd: the recurrence of Mamba-3, whose input is integrated by a trapezoid and whose state turns."""

from __future__ import annotations

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
from stateline.ops.trapezoid_ssd.reference import Inputs

OP = "trapezoid_ssd"
STEP = "trapezoid_ssd_step_"
PARTS = ("angle", "ssm", "k", "v")
SHAPES = ("h s", "h p n", "h r n", "h p")
State = tuple[Tensor, Tensor, Tensor, Tensor]


def trapezoid_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    blend: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rates: Tensor | None = None,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mix: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    z_mix: Tensor | None = None,
    y_mix: Tensor | None = None,
    interleaved: bool = True,
    initial_state: State | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    padding_side: str = "right",
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Scan a state that decays, turns, and takes its input by a trapezoid; return y and the last state.

        S[t] = exp(dt A) (S[t-1] + (1 − blend) dt Σ_r v_r[t-1]⊗k_r[t-1]) + blend dt Σ_r v_r[t]⊗k_r[t]
        y_r[t] = S[t] q_r[t] + D v_r[t];   gated: y = Σ_r y_mix_r ∘ y_r ∘ silu(z_mix_r ∘ z)
        v_r = mix_r ∘ x;   k, q: B and C with their biases, turned by θ[t] = θ[t-1] + dt rates

    Args:
        x: (b, t, h, p) input, h heads of width p.
        dt, A, blend: (b, t, h) step size > 0, rate (below 0 for a stable system) and the weight, 0 to 1, of the newer
            end of the trapezoid; 1 is Mamba-2's rule. float32, or float64 where the data is, as is all that follows C.
        B, C: (b, t, r, g, n) of r ranks that share the state, or (b, t, g, n) of one; head i uses group floor(i·g/h).
        rates: (b, t, s) turns (of 2π) of s pairs of states per unit of dt, shared by all heads; None turns nothing.
        B_bias, C_bias: (h, r, n), added before turning.   mix: (h, r, p), 1 if None.   D: (h) skip weight.
        z: (b, t, h, p) gate; it sums over ranks.   z_mix, y_mix: (h, r, p) scales of gate and output, 1 if None.
        interleaved: pairs are states (2i, 2i + 1), otherwise (i, i + n/2); i < s ≤ n/2.
        initial_state: angle (n_seq, h, s) in turns, S (n_seq, h, p, n), and of the last token k (n_seq, h, r, n) and x
            (n_seq, h, p); zeros if None. n_seq is b, or the number of packed sequences.
        lengths, padding_side, cu_seqlens, reverse: as in `selective_scan`.
        backend: "gpu", "cpu", "chunked" (PyTorch, matrix products) or "reference" forces one, None chooses.

    Returns:
        y (b, t, h, r, p), or (b, t, h, p) where B has no ranks or z is given, in x's dtype, 0 at padding; and the
        state, in A's dtype, its angle within half a turn of 0.

    Differentiable in every tensor, into the initial state and out of all results; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles", section 3.

    >>> x, B, dt = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 4), torch.rand(2, 5, 3)
    >>> y, state = trapezoid_ssd(x, dt, -dt, dt, B, B, rates=torch.randn(2, 5, 2))
    >>> y.shape, [tuple(s.shape) for s in state]
    (torch.Size([2, 5, 3, 8]), [(2, 3, 2), (2, 3, 8, 4), (2, 3, 1, 4), (2, 3, 8)])
    """
    sizes, ranked = Sizes(OP), z is None and isinstance(B, Tensor) and B.dim() == 5
    inputs = _check(OP, sizes, "b t", x, dt, A, blend, B, C, rates, B_bias, C_bias, mix, D, z, z_mix, y_mix)
    _check_flag(OP, interleaved)
    segments = build(OP, x, lengths, padding_side, cu_seqlens)
    state: Sequence[Tensor | None] = (None,) * 4
    if initial_state is not None:
        sizes.bind("n_seq", segments.count, "the number of sequences")
        state = _check_state(OP, sizes, "initial_state", "n_seq", initial_state, A)
    checks.same_device(OP, dict(zip(NAMES, (*inputs, *state), strict=True)))
    keep = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (*inputs, *state))
    how = (bool(interleaved), segments.table, bool(reverse), keep, backend)
    y, *end = call(_TrapezoidSSD, *inputs, *state, *how)[:5]
    return (y if ranked else y.squeeze(3)), tuple(end)


def trapezoid_ssd_step_(
    state: State,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    blend: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    rates: Tensor | None = None,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    mix: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    z_mix: Tensor | None = None,
    y_mix: Tensor | None = None,
    interleaved: bool = True,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Advance `state` by one token in place and return y (b, h, r, p) or (b, h, p). No gradient: for engines.

    Args:
        state: angle (slots, h, s), S (slots, h, p, n), k (slots, h, r, n), x (slots, h, p), contiguous, in A's dtype.
        x, z: (b, h, p).   dt, A, blend: (b, h).   B, C: (b, r, g, n) or (b, g, n).   rates: (b, s).
        B_bias, C_bias, mix, D, z_mix, y_mix, interleaved: as in `trapezoid_ssd`.
        index: (b) distinct slots, int32 or int64; a negative one skips its row: y = 0 and no state is touched.
            None: row i uses slot i, and slots = b.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    sizes, ranked = Sizes(STEP), z is None and isinstance(B, Tensor) and B.dim() == 4
    inputs = _check(STEP, sizes, "b", x, dt, A, blend, B, C, rates, B_bias, C_bias, mix, D, z, z_mix, y_mix)
    _check_flag(STEP, interleaved)
    own = _check_state(STEP, sizes, "state", "slots", state, A)
    for part in own:
        checks.slots(STEP, sizes, part, index)
    checks.same_device(STEP, dict(zip(NAMES, (*inputs, *own), strict=True)) | {"index": index})
    with torch.no_grad():
        y = _step(*own, *inputs, bool(interleaved), index, backend)
    return y if ranked else y.squeeze(2)


NAMES = ("x", "dt", "A", "blend", "B", "C", "rates", "B_bias", "C_bias", "mix", "D", "z", "z_mix", "y_mix", *PARTS)


def _check(
    op: str, sizes: Sizes, lead: str, x: Tensor, dt: Tensor, A: Tensor, blend: Tensor, B: Tensor, C: Tensor,
    rates: Tensor | None, B_bias: Tensor | None, C_bias: Tensor | None, mix: Tensor | None, D: Tensor | None,
    z: Tensor | None, z_mix: Tensor | None, y_mix: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Check what scan and step share; the inputs, B and C brought to (…lead, r, g, n)."""
    sizes.match("x", x, f"{lead} h p")
    checks.dtype(op, "x", x, checks.REAL_DTYPES)
    full = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    for name, v in (("dt", dt), ("A", A), ("blend", blend)):
        sizes.match(name, v, f"{lead} h")
        checks.dtype(op, name, v, full, "It keeps full precision: float32, or float64 where the data is.")
    B, C = _projection(op, sizes, "B", B, lead), _projection(op, sizes, "C", C, lead)
    forms = (("rates", rates, f"{lead} s"), ("B_bias", B_bias, "h r n"), ("C_bias", C_bias, "h r n"))
    mixes = (("mix", mix, "h r p"), ("z_mix", z_mix, "h r p"), ("y_mix", y_mix, "h r p"))
    for name, given, form in (*forms, *mixes, ("D", D, "h")):
        if given is not None:
            sizes.match(name, given, form)
            checks.dtype(op, name, given, full, f"Keep {name} out of casts.")
    if rates is None:
        sizes.bind("s", 0, "rates, which is None")
    if 2 * sizes["s"] > sizes["n"]:
        raise checks.fail(op, f"rates turns {sizes['s']} pairs of states, B has {sizes['n']} states.")
    if z is not None:
        sizes.match("z", z, f"{lead} h p")
        checks.dtype(op, "z", z, checks.REAL_DTYPES)
    elif z_mix is not None or y_mix is not None:
        raise checks.fail(op, "z_mix and y_mix belong to a gate, and z is None.", "Give z, or scale y yourself.")
    return x, dt, A, blend, B, C, rates, B_bias, C_bias, mix, D, z, z_mix, y_mix


def _check_flag(op: str, interleaved: bool) -> None:
    if not isinstance(interleaved, bool):
        raise checks.fail(op, f"interleaved is {interleaved!r}, expected True or False.", error=TypeError)


def _projection(op: str, sizes: Sizes, name: str, v: Tensor, lead: str) -> Tensor:
    if not isinstance(v, Tensor):
        raise checks.fail(op, f"{name} is a {type(v).__name__}, expected a tensor", error=TypeError)
    checks.dtype(op, name, v, checks.REAL_DTYPES)
    if v.dim() == len(lead.split()) + 2:
        v = v.unsqueeze(-3)
    sizes.match(name, v, f"{lead} r g n", "Were ranks, groups and states swapped?")
    if min(sizes["r"], sizes["g"]) < 1:
        raise checks.fail(op, f"{name} has shape {tuple(v.shape)}, expected at least one rank and one group.")
    return v


def _check_state(op: str, sizes: Sizes, name: str, rows: str, state: State, A: Tensor) -> State:
    if not isinstance(state, list | tuple) or len(state) != len(PARTS):
        raise checks.fail(op, f"{name} is {type(state).__name__}, expected {', '.join(PARTS)}.", error=TypeError)
    for part, v, form in zip(PARTS, state, SHAPES, strict=True):
        sizes.match(f"{name}, {part},", v, f"{rows} {form}")
        checks.dtype(op, f"{name}, {part},", v, (A.dtype,), "A state has A's dtype, so that a stream does not drift.")
    return tuple(state)  # type: ignore[return-value]  # four of them


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _kernel(backend: str | None, system: Sequence[Any]) -> ModuleType:
    """The module that computes it; `system` is x, dt, A, blend, B, C, rates, B_bias, C_bias, mix."""
    return backends.kernel(OP, system[0].device.type, backend, system[2].dtype, system)


def _run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    return _kernel(backend, (x, *rest[:9])).forward(x, *rest)


def _run_kept(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    module = _kernel(backend, (x, *rest[:9]))
    if hasattr(module, "forward_kept"):
        return module.forward_kept(x, *rest)
    return (*module.forward(x, *rest), *(x.new_empty(0) for _ in range(4)))


def _run_backward(dy: Tensor, *args: Any, in_room: bool = False) -> tuple[Tensor, ...]:
    *rest, backend, kept = args
    module = _kernel(backend, rest[4:14])
    more: dict[str, Any] = parts.within(module) if in_room else {}
    if kept and kept[0].numel():
        more["kept"] = tuple(kept)
    return tuple(or_empty(g, dy) for g in module.backward(dy, *rest, **more))


def _run_step(angle: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    return _kernel(backend, rest[3:13]).step(angle, *rest)


def _shapes(x: Tensor, B: Tensor, rates: Tensor | None, gated: bool, segments: Tensor | None) -> list[tuple[int, ...]]:
    """Of y and the state's four."""
    (b, t, h, p), r, n, s = x.shape, B.shape[2], B.shape[4], 0 if rates is None else rates.shape[2]
    rows = b if segments is None else segments.shape[0]
    return [(b, t, h, 1 if gated else r, p), (rows, h, s), (rows, h, p, n), (rows, h, r, n), (rows, h, p)]


def _fake(x: Tensor, dt: Tensor, A: Tensor, blend: Tensor, B: Tensor, C: Tensor, *args: Any) -> tuple[Tensor, ...]:
    first, *state = _shapes(x, B, args[0], args[5] is not None, args[-3])
    return (x.new_empty(first), *(A.new_empty(shape) for shape in state))


def _fake_kept(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    shapes = getattr(_kernel(backend, (x, *rest[:9])), "kept_shapes", None)
    made = [((0,), x.dtype)] * 4 if shapes is None else shapes(Inputs(x, *rest))
    return (*_fake(x, *args), *(x.new_empty(shape, dtype=dtype) for shape, dtype in made))


def _fake_backward(dy: Tensor, dangle: Tensor, dssm: Tensor, dk: Tensor, dv: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = (*args[:14], *args[15:19])
    return tuple(dy.new_empty(0) if v is None else v.new_empty(v.shape) for v in inputs)


def _fake_step(angle: Tensor, ssm: Tensor, k: Tensor, v: Tensor, x: Tensor, *args: Any) -> Tensor:
    b, h, p = x.shape
    return x.new_empty((b, h, args[3].shape[1] if args[10] is None else 1, p))


_ARGS = (
    "Tensor x, Tensor dt, Tensor A, Tensor blend, Tensor B, Tensor C, Tensor? rates, Tensor? B_bias, Tensor? C_bias, "
    "Tensor? mix, Tensor? D, Tensor? z, Tensor? z_mix, Tensor? y_mix, bool interleaved"
)
_WHERE = "Tensor? angle, Tensor? ssm, Tensor? k, Tensor? v, Tensor? segments, bool reverse, str? backend"
_forward = define(f"{OP}({_ARGS}, {_WHERE}) -> ({', '.join(['Tensor'] * 5)})", _run, _fake)
# The last four results spare the gradient work; their shapes are the back end's own, and they are empty if it has none.
_forward_kept = define(f"{OP}_kept({_ARGS}, {_WHERE}) -> ({', '.join(['Tensor'] * 9)})", _run_kept, _fake_kept)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dangle, Tensor dssm, Tensor dk, Tensor dv, {_ARGS}, {_WHERE}, Tensor[] kept) -> "
    f"({', '.join(['Tensor'] * 18)})",
    _run_backward,
    _fake_backward,
    partial(_run_backward, in_room=True),
)
_STATE = "Tensor(a!) angle, Tensor(b!) ssm, Tensor(c!) k, Tensor(d!) v"
_step = define(
    f"{STEP}({_STATE}, {_ARGS}, Tensor? index, str? backend) -> Tensor",
    _run_step,
    _fake_step,
)


class _TrapezoidSSD(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        x: Tensor, dt: Tensor, A: Tensor, blend: Tensor, B: Tensor, C: Tensor, rates: Tensor | None,
        B_bias: Tensor | None, C_bias: Tensor | None, mix: Tensor | None, D: Tensor | None, z: Tensor | None,
        z_mix: Tensor | None, y_mix: Tensor | None, angle: Tensor | None, ssm: Tensor | None, k: Tensor | None,
        v: Tensor | None, interleaved: bool, table: Tensor | None, reverse: bool, keep: bool, backend: str | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        inputs = (x, dt, A, blend, B, C, rates, B_bias, C_bias, mix, D, z, z_mix, y_mix)
        args = (*inputs, interleaved, angle, ssm, k, v, table, reverse, backend)
        return _forward_kept(*args) if keep else (*_forward(*args), *[None] * 4)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        kept = output[5:] if output[5] is not None else ()
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.save_for_backward(*inputs[:18], inputs[19], *kept, *(output[2:4] if kept else ()))
        ctx.options = (inputs[18], inputs[20], inputs[22])

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing gives them once
        (*inputs, table), kept = saved[:19], saved[19:]
        interleaved, reverse, backend = ctx.options
        like = (inputs[0], *[inputs[2]] * 4)
        shapes = _shapes(inputs[0], inputs[4], inputs[6], inputs[11] is not None, table)
        incoming = [
            v.new_zeros(shape) if grad is None else grad for v, shape, grad in zip(like, shapes, given[:5], strict=True)
        ]
        where = (*inputs[14:], table, reverse, backend, list(kept))
        grads = _backward(*incoming, *inputs[:14], interleaved, *where)
        return (*first_only_of(OP, inputs, grads, *incoming), *[None] * 5)
