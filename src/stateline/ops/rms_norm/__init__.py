"""rms_norm: addition of a residual and root-mean-square normalisation in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stateline import backends, checks
from stateline.checks import Sizes
from stateline.ops.library import call, define, first_only_of, or_empty

OP = "rms_norm"
GATED = "gated_rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise `h = x + residual` by its root mean square over the last axis; return (y, h).

    Args:
        x: (…, d).   weight: (d).   residual: (…, d), or None for h = x.
        eps: added to the mean square, > 0.
        residual_dtype: dtype of the returned h; x's if None. float32 keeps a deep residual stream exact under bfloat16.
        backend: "gpu", "cpu" or "reference" forces one, None chooses.

    Returns:
        y (…, d) in x's dtype, rounded once, and h (…, d).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    >>> y, h = rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
    >>> y.square().mean().item()
    1.0
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise checks.fail(OP, f"x is {x!r}, expected a tensor (…, d).", error=TypeError)
    checks.dense(OP, "x", x)
    checks.dtype(OP, "x", x, checks.REAL_DTYPES)
    sizes = Sizes(OP)
    sizes.bind("d", x.shape[-1], "x")
    sizes.match("weight", weight, "d")
    checks.dtype(OP, "weight", weight, checks.REAL_DTYPES)
    if residual is not None:
        checks.dense(OP, "residual", residual)
        checks.dtype(OP, "residual", residual, checks.REAL_DTYPES)
        if residual.shape != x.shape:
            raise checks.fail(
                OP, f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}; they are added."
            )
    checks.number(OP, "eps", eps, low=0.0, open_low=True)
    checks.choice(OP, "residual_dtype", residual_dtype, (None, *checks.REAL_DTYPES))
    checks.same_device(OP, {"x": x, "weight": weight, "residual": residual})
    return call(_RMSNorm, x, weight, residual, float(eps), residual_dtype or x.dtype, backend)


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
        backend: "gpu" or "reference", PyTorch's operations, forces one; None chooses. (On CPUs layers gate in `ssd`.)

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
        raise checks.fail(GATED, f"y is {y!r}, expected a tensor (…, d).", error=TypeError)
    for name, x in (("y", y), ("z", z), ("weight", weight)):
        checks.dense(GATED, name, x)
        checks.dtype(GATED, name, x, checks.REAL_DTYPES)
    if z.shape != y.shape:
        raise checks.fail(GATED, f"z has shape {tuple(z.shape)}, y has {tuple(y.shape)}; one gates the other.")
    sizes = Sizes(GATED)
    sizes.bind("d", y.shape[-1], "y")
    sizes.match("weight", weight, "d")
    checks.number(GATED, "eps", eps, low=0.0, open_low=True)
    checks.number(GATED, "groups", groups, low=1, integer=True)
    if y.shape[-1] % groups:
        raise checks.fail(GATED, f"y has {y.shape[-1]} channels, which {groups} groups do not divide.")
    checks.same_device(GATED, {"y": y, "z": z, "weight": weight})
    out: Tensor = call(_GatedRMSNorm, y, z, weight, float(eps), groups, bool(norm_before_gate), backend)
    return out


# ---- raw ops ---------------------------------------------------------------------------------------------------------


def _run(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    return backends.kernel(OP, x.device.type, backend, x.dtype).forward(x, *rest)


def _run_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    grads = backends.kernel(OP, dy.device.type, backend, dy.dtype).backward(dy, *rest)
    return tuple(or_empty(g, dy) for g in grads)


def _fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=residual_dtype)


def _fake_backward(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, eps: float, x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty(dy.shape, dtype=x_dtype)
    dresidual = dy.new_empty(0) if residual_dtype is None else dy.new_empty(dy.shape, dtype=residual_dtype)
    return dx, weight.new_empty(weight.shape), dresidual


_forward = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType residual_dtype, str? backend)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
)
_backward = define(
    f"{OP}_backward(Tensor dy, Tensor dh, Tensor h, Tensor weight, float eps, ScalarType x_dtype, "
    "ScalarType? residual_dtype, str? backend) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


class _RMSNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, residual_dtype: torch.dtype, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, weight, residual, eps, residual_dtype, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, residual, eps, _, backend = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.options = (eps, x.dtype, None if residual is None else residual.dtype, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        eps, x_dtype, residual_dtype, backend = ctx.options
        grads = _backward(dy, dh, h, weight, eps, x_dtype, residual_dtype, backend)
        given = (h, weight, None if residual_dtype is None else h)
        return (*first_only_of(OP, given, grads, dy, dh), None, None, None)


def _run_gated(y: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    out: Tensor = backends.kernel(GATED, y.device.type, backend, y.dtype).gated_forward(y, *rest)
    return out


def _run_gated_backward(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, backend = args
    kernel = backends.kernel(GATED, dout.device.type, backend, rest[0].dtype)
    grads: tuple[Tensor, ...] = kernel.gated_backward(dout, *rest)
    return grads


def _fake_gated(y: Tensor, *args: Any) -> Tensor:
    return y.new_empty(y.shape)


def _fake_gated_backward(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


_GATED = "Tensor y, Tensor z, Tensor weight, float eps, int groups, bool norm_before_gate, str? backend"
_gated = define(f"{GATED}({_GATED}) -> Tensor", _run_gated, _fake_gated)
_gated_backward = define(
    f"{GATED}_backward(Tensor dout, {_GATED}) -> (Tensor, Tensor, Tensor)", _run_gated_backward, _fake_gated_backward
)


class _GatedRMSNorm(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # setup_context form; spelled out, since compile does not take *args here
        y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool, backend: str | None
    ) -> Tensor:
        out: Tensor = _gated(y, z, weight, eps, groups, norm_before_gate, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        grads = _gated_backward(dout, *given, *ctx.options)
        return (*first_only_of(GATED, given, grads, dout), *[None] * 4)
