"""gated_rms_norm: a gate and root-mean-square normalisation, by groups of channels, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of

OP = "gated_rms_norm"


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise `y · silu(z)` by its root mean square or, `norm_before_gate`, y alone, times silu(z) after that.

    Args:
        y, z: (…, d).   weight: (d).
        eps: added to the mean square, > 0.
        groups: of d / groups neighbouring channels, each normalised by itself.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        (…, d) in y's dtype, rounded once. Differentiable in every tensor; first derivatives only.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7.

    >>> import torch
    >>> gated_rms_norm(torch.ones(1, 4), torch.zeros(1, 4), torch.ones(4)).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """
    if not isinstance(y, Tensor) or y.dim() < 1:
        raise checks.fail(OP, f"y is {y!r}, expected a tensor (…, d).", error=TypeError)
    for name, x in (("y", y), ("z", z), ("weight", weight)):
        checks.dtype(OP, name, x, checks.REAL_DTYPES)
    if z.shape != y.shape:
        raise checks.fail(OP, f"z has shape {tuple(z.shape)}, y has {tuple(y.shape)}; one gates the other.")
    sizes = Sizes(OP)
    sizes.bind("d", y.shape[-1], "y")
    sizes.match("weight", weight, "d")
    checks.number(OP, "eps", eps, low=0.0, open_low=True)
    checks.number(OP, "groups", groups, low=1, integer=True)
    if y.shape[-1] % groups:
        raise checks.fail(OP, f"y has {y.shape[-1]} channels, which {groups} groups do not divide.")
    checks.same_device(OP, {"y": y, "z": z, "weight": weight})
    out: Tensor = call(_GatedRMSNorm, y, z, weight, float(eps), groups, bool(norm_before_gate), backend)
    return out


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(y: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    out: Tensor = backends.kernel(OP, y.device.type, backend, y.dtype).forward(y, *rest)
    return out


def _run_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    grads: tuple[Tensor, ...] = backends.kernel(OP, dout.device.type, backend, rest[0].dtype).backward(dout, *rest)
    return grads


def _fake(y: Tensor, *args: Any) -> Tensor:
    return y.new_empty(y.shape)


def _fake_backward(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


_ARGS = "Tensor y, Tensor z, Tensor weight, float eps, int groups, bool norm_before_gate, str? backend"
_forward = define(f"{OP}({_ARGS}) -> Tensor", _run, _fake)
_backward = define(f"{OP}_backward(Tensor dout, {_ARGS}) -> (Tensor, Tensor, Tensor)", _run_backward, _fake_backward)


class _GatedRMSNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool, backend: str | None
    ) -> Tensor:
        out: Tensor = _forward(y, z, weight, eps, groups, norm_before_gate, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        grads = _backward(dout, *given, *ctx.options)
        return (*first_only_of(OP, given, grads, dout), *[None] * 4)
