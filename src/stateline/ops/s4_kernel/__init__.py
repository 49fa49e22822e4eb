"""s4_kernel, s4_cauchy: what a linear time-invariant system does to an impulse, over time and over frequency.

Neither ever holds the matrix (states × steps) that their formulas name.
"""

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

OP = "s4_kernel"
CAUCHY = "s4_cauchy"
COMPLEX = (torch.complex64, torch.complex128)


def s4_kernel(c: Tensor, z: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """The kernel `K[l] = 2 Re Σ_n c_n exp(l z_n)`, l = 0 … length − 1, of diagonal systems.

    Args:
        c: (r, h, n) complex64 or complex128, r read-outs of h systems with n states, each with its conjugate.
        z: (h, n) complex128, log Ā, that is Δ·A under zero-order hold. Always double: a phase is l times as wrong as z.
        length: steps, any number ≥ 0.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        K (r, h, length), float32 for complex64 c, float64 for complex128.

    Differentiable in c and z; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Gu, Gupta, Goel & Ré 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    section 3.3 (the Vandermonde product).

    >>> s4_kernel(torch.ones(1, 1, 1, dtype=torch.complex64), torch.zeros(1, 1, dtype=torch.complex128), 3)
    tensor([[[2., 2., 2.]]])
    """
    sizes = Sizes(OP)
    sizes.match("c", c, "r h n")
    sizes.match("z", z, "h n")
    checks.dtype(OP, "c", c, COMPLEX, "Make it complex.")
    checks.dtype(OP, "z", z, (torch.complex128,), "A phase is l times as wrong as z: compute it in double.")
    checks.number(OP, "length", length, low=0, integer=True)
    checks.same_device(OP, {"c": c, "z": z})
    kernel: Tensor = call(_Kernel, c, z, length, backend)
    return kernel


def s4_cauchy(v: Tensor, w: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """The Cauchy product `Σ v / (2i sin φ − w cos φ)` at the angles φ = π k / length, k = 0 … length // 2.

    The sum goes over v_n, w_n and their conjugates. It is cos(φ)⁻¹ times the resolvent of w at the bilinear node
    2(1 − ω)/(1 + ω) = 2i tan φ of the root of unity ω = exp(−2πi k / length), and so finite where that is not: at
    ω = −1. Angles are exact.

    Args:
        v: (r, h, n) complex128, r numerators of h systems.   w: (h, n) complex128, the poles, real parts below 0.
        length: ≥ 1.   backend: as for `s4_kernel`.

    Returns:
        (r, h, length // 2 + 1) complex128.

    Differentiable in v and w; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Gu, Goel & Ré 2022, "Efficiently Modeling Long Sequences with Structured State Spaces", appendix C.3.

    >>> one = torch.ones(1, 1, 1, dtype=torch.complex128)
    >>> s4_cauchy(one, -one[0], 2)[0, 0].tolist()
    [(2+0j), -1j]
    """
    sizes = Sizes(CAUCHY)
    sizes.match("v", v, "r h n")
    sizes.match("w", w, "h n")
    for name, x in (("v", v), ("w", w)):
        checks.dtype(CAUCHY, name, x, (torch.complex128,), "Near a pole nothing less will do.")
    checks.number(CAUCHY, "length", length, low=1, integer=True)
    checks.same_device(CAUCHY, {"v": v, "w": w})
    # A pole and its conjugate make one fraction with real coefficients.
    alpha, beta = -2 * (v * w.conj()).real, 4 * v.real
    p, q = w.real, w.real.square() + w.imag.square()
    sine, cosine = angles(length, v.device)
    sums: Tensor = call(_Cauchy, alpha, beta, p, q, sine, cosine, backend)
    return torch.view_as_complex(sums)


def angles(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """sin and cos of π k / length, k = 0 … length // 2, float64, exact at the ends."""
    phi = torch.arange(length // 2 + 1, dtype=torch.float64, device=device) * (torch.pi / length)
    cosine = phi.cos()
    if length % 2 == 0:
        cosine[-1] = 0
    return phi.sin(), cosine


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _module(like: Tensor, backend: str | None) -> ModuleType:
    return backends.kernel(OP, like.device.type, backend, like.dtype)


def _run(c: Tensor, z: Tensor, length: int, backend: str | None) -> Tensor:
    return _module(c, backend).forward(c, z, length)


def _run_backward(dk: Tensor, c: Tensor, z: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return _module(c, backend).backward(dk, c, z)


def _run_cauchy(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor, backend: str | None) -> Tensor:
    return _module(alpha, backend).cauchy(alpha, beta, p, q, s, c)


def _run_cauchy_backward(g: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, backend = args
    return _module(g, backend).cauchy_backward(g, *inputs)


def _fake(c: Tensor, z: Tensor, length: int, backend: str | None) -> Tensor:
    real = torch.float64 if c.dtype == torch.complex128 else torch.float32
    return c.new_empty((*c.shape[:2], length), dtype=real)


def _fake_cauchy(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, *args: Any) -> Tensor:
    return alpha.new_empty((*alpha.shape[:2], s.shape[0], 2))


def _like(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


_forward = define(f"{OP}(Tensor c, Tensor z, int length, str? backend) -> Tensor", _run, _fake)
_backward = define(
    f"{OP}_backward(Tensor dk, Tensor c, Tensor z, str? backend) -> (Tensor, Tensor)",
    _run_backward,
    lambda dk, c, z, backend: _like((c, z)),
)
_REAL = "Tensor alpha, Tensor beta, Tensor p, Tensor q, Tensor s, Tensor c, str? backend"
_cauchy = define(f"{CAUCHY}({_REAL}) -> Tensor", _run_cauchy, _fake_cauchy)
_cauchy_backward = define(
    f"{CAUCHY}_backward(Tensor g, {_REAL}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_cauchy_backward,
    lambda g, *args: _like(args[:4]),
)


class _Kernel(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(c: Tensor, z: Tensor, length: int, backend: str | None) -> Tensor:
        return _forward(c, z, length, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend = inputs[3]

    @staticmethod
    def backward(ctx: Any, dk: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors  # once: activation checkpointing gives them once
        grads = _backward(dk, *given, ctx.backend)
        return (*first_only_of(OP, given, grads, dk), None, None)


class _Cauchy(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(alpha: Tensor, beta: Tensor, p: Tensor, q: Tensor, s: Tensor, c: Tensor, backend: str | None) -> Tensor:
        return _cauchy(alpha, beta, p, q, s, c, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.backend = inputs[6]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        grads = _cauchy_backward(g, *given, ctx.backend)
        return (*first_only_of(CAUCHY, given[:4], grads, g), None, None, None)
