"""What steers Mamba-3's recurrence at a step, from what its input projection gives: dt, A, blend and rates.

    dt = softplus(dt + dt_bias)     A = −max(f(A), floor)     blend = sigmoid(trap)     rates = tanh(angles) / 2

In PyTorch these are a dozen launches of small kernels, and two dozen for gradients; on a GPU they are one and two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from stateline import backends
from stateline.ops.library import autograd_inside, call, define, first_only_of

OP = "trapezoid_ssd"
Controls = tuple[Tensor, Tensor, Tensor, Tensor]


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x for x ≥ 0, 1 / (1 − x) below: positive, of slope 1 at 0, and slow to vanish.

    >>> heavy_tail(torch.tensor([-3.0, 0.0, 3.0])).tolist()
    [0.25, 1.0, 4.0]
    """
    return F.relu(x) + 1 / (1 - x.clamp(max=0))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in float64 too."""
    return F.softplus(x, threshold=40)


#: What makes −A of what the projection gives, by name.
A_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"heavy_tail": heavy_tail, "softplus": softplus}


def controls(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> Controls:
    """raw (…, 3 h + s): of every head a step size, a rate and a trapezoid, and s angles; dt_bias (h) in full precision.

    Returns dt, A, blend (…, h) and rates (…, s), in turns, in the dtype of dt_bias.
    """
    if not _on_gpu(raw):
        return formula(raw, dt_bias, activation, floor)
    made: Controls = call(_Controls, raw, dt_bias, activation, floor)
    return made


def formula(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> Controls:
    """The same in PyTorch."""
    h = dt_bias.shape[0]
    dt, A, trap, angles = raw.to(dt_bias.dtype).split([h, h, h, raw.shape[-1] - 3 * h], dim=-1)
    A = -A_ACTIVATIONS[activation](A).clamp(min=floor)
    return softplus(dt + dt_bias), A, torch.sigmoid(trap), torch.tanh(angles) / 2


def _on_gpu(raw: Tensor) -> bool:
    return raw.is_cuda


def _kernels(raw: Tensor, dt_bias: Tensor) -> Any:
    """The GPU kernels' module, or None where trapezoid_ssd has none for this dtype and machine."""
    module = backends.kernel(OP, raw.device.type, None, dt_bias.dtype)
    return module if hasattr(module, "controls") else None


def _run(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> Controls:
    kernels = _kernels(raw, dt_bias)
    make = formula if kernels is None else kernels.controls
    dt, A, blend, rates = (v.contiguous() for v in make(raw, dt_bias, activation, floor))
    return dt, A, blend, rates


def _run_backward(
    ddt: Tensor, dA: Tensor, dblend: Tensor, drates: Tensor, raw: Tensor, dt_bias: Tensor, activation: str, floor: float
) -> tuple[Tensor, Tensor]:
    slopes, kernels = (ddt, dA, dblend, drates), _kernels(raw, dt_bias)
    if kernels is not None:
        made: tuple[Tensor, Tensor] = kernels.controls_backward(slopes, raw, dt_bias, activation, floor)
        return made
    with autograd_inside():
        given = (raw.detach().requires_grad_(), dt_bias.detach().requires_grad_())
        draw, dbias = torch.autograd.grad(formula(*given, activation, floor), given, slopes)
    return draw, dbias


def _fake(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> Controls:
    h = dt_bias.shape[0]
    shapes = [(*raw.shape[:-1], width) for width in (h, h, h, raw.shape[-1] - 3 * h)]
    dt, A, blend, rates = (dt_bias.new_empty(shape) for shape in shapes)
    return dt, A, blend, rates


def _fake_backward(
    ddt: Tensor, dA: Tensor, dblend: Tensor, drates: Tensor, raw: Tensor, dt_bias: Tensor, activation: str, floor: float
) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape), dt_bias.new_empty(dt_bias.shape)


_ARGS = "Tensor raw, Tensor dt_bias, str activation, float floor"
_forward = define(f"{OP}_controls({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)", _run, _fake)
_backward = define(
    f"{OP}_controls_backward(Tensor ddt, Tensor dA, Tensor dblend, Tensor drates, {_ARGS}) -> (Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


class _Controls(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(raw: Tensor, dt_bias: Tensor, activation: str, floor: float) -> Controls:
        made: Controls = _forward(raw, dt_bias, activation, floor)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Controls) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.options = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        return (*first_only_of(OP, given, _backward(*slopes, *given, *ctx.options), *slopes), None, None)
